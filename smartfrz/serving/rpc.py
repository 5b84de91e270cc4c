"""gRPC: kserve's servicer behind limits on calls, on the time of their messages, and on what those hold."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.servicer import InferenceServicer

from smartfrz.predictor.protobuf import read_varint
from smartfrz.serving import metrics
from smartfrz.serving.dataplane import DataPlane, explain
from smartfrz.serving.options import ServeOptions

MAX_MESSAGES = 64  # in memory, on their way or at work
MAX_CALLS = 1000  # those that wait for a place among the messages do not hold memory
_MAX_CALLS_OF_CONNECTION = 128
_MAX_FIELDS = 1000  # of a message, which has seven kinds
_PLACE_SECONDS = 60.0  # by then a client has given up and asked again
_LOOK_SECONDS = 0.1
_RAW_TENSORS = 7  # the number of the field
_DECIDES = "/inference.GRPCInferenceService/ModelInfer"
_SHUTS_DOWN = "The server shuts down, and had no time left for this request. Try again later."


class _Refused(Exception):
    """How a call fails."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str):
        super().__init__(message)
        self.code = code
        self.reason = reason


class _Places:
    """Places for messages. gRPC receives a message only once it is asked for it, so the others hold no memory.

    While calls wait for a place, those whose message is on its way for longest have to go: they may well be silent.

    Args:
        number: Number of places.
        seconds: How long a message may be on its way if nobody waits.
    """

    def __init__(self, number: int, seconds: float):
        self._number = number
        self._seconds = seconds
        self._free = asyncio.Semaphore(number)  # fair: the first to wait is the first to enter
        self._waiting = 0
        self._reading: dict[asyncio.Timeout, float] = {}  # since when, the oldest first

    @contextlib.asynccontextmanager
    async def message(self, context: Any) -> AsyncIterator[bytes]:
        """Hold a place for the duration of the block, and read the message.

        Raises:
            _Refused: If there is no place, or no message, in time.
        """
        self._waiting += 1
        if self._free.locked() and self._waiting == 1:
            asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._end_old)
        try:
            async with asyncio.timeout(_PLACE_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            message = f"There was no room for this request within {_PLACE_SECONDS:.0f} seconds. Try again later."
            raise _Refused(grpc.StatusCode.UNAVAILABLE, "queue", message) from None
        finally:
            self._waiting -= 1
        try:
            yield await self._read(context)
        finally:
            self._free.release()

    async def _read(self, context: Any) -> bytes:
        limit = asyncio.timeout(self._seconds)
        begin = self._reading[limit] = asyncio.get_running_loop().time()
        try:
            async with limit:
                message = await context.read()
        except TimeoutError:
            took = asyncio.get_running_loop().time() - begin
            text = f"The message did not arrive within {took:.0f} s. Send it at once."
            raise _Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "slow", text) from None
        finally:
            del self._reading[limit]
        if message is grpc.aio.EOF:
            raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, "invalid", "The call ends without a message.")
        return bytes(message)

    def _end_old(self) -> None:
        """End those that may not be waited for any longer; for less time if many wait."""
        if not self._waiting:
            return
        now = asyncio.get_running_loop().time()
        patience = 2.0 if self._waiting <= self._number else 0.25
        for limit, since in self._reading.items():
            if now - since > patience and not limit.expired():
                limit.reschedule(now)
        asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._end_old)


class _Servicer(InferenceServicer):  # type: ignore[misc]
    """kserve's servicer, with requests counted, and without loading and unloading of models."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Answer a request for decisions."""
        with self._data_plane.counting(request.model_name, "grpc"):
            return await super().ModelInfer(request, context)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        """Refuse: the models are chosen when the server starts."""
        raise NotImplementedError("The models of this server are chosen when it starts.")

    RepositoryModelUnload = RepositoryModelLoad


class _Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Reads messages within the limits, and reports every failure as its status code.

    gRPC alone would wait for a message for ever, and would call bytes that are not a message an internal error. To the
    client it is the same whether the server takes a call of one message for a stream, as it is done here.

    Args:
        options: The options of the server.
    """

    def __init__(self, options: ServeOptions):
        self._max_plain = min(options.max_json_bytes, options.max_request_bytes)
        self._decisions = _Places(MAX_MESSAGES, options.body_seconds)
        self._others = _Places(MAX_MESSAGES, options.header_seconds)
        self._tasks: set[Any] = set()
        self._closing = False

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Return a handler that reads and decodes the message itself, and reports failures."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        places = self._decisions if handler_call_details.method == _DECIDES else self._others

        async def answer(_: Any, context: Any) -> Any:
            with self._known():
                response, refused = await self._answer(handler, places, context)
                if refused:
                    # Here, since gRPC's call and its error hold each other, and with them all that this frame holds.
                    await context.abort(refused.code, str(refused))
                return response

        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)

    async def _answer(self, handler: Any, places: _Places, context: Any) -> tuple[Any, _Refused | None]:
        """Return the answer to a call, or how it fails."""
        try:
            async with places.message(context) as message:
                request = self._decode(message, handler.request_deserializer)
                del message  # the request has copies of its parts
                return await handler.unary_unary(request, context), None
        except asyncio.CancelledError:
            if not self._closing:  # the client has gone
                raise
            return None, _Refused(grpc.StatusCode.UNAVAILABLE, "other", _SHUTS_DOWN)
        except _Refused as refused:
            metrics.REJECTED.labels(refused.reason).inc()
            return None, _Refused(refused.code, refused.reason, str(refused))  # without its frames
        except Exception as error:
            failure, text = explain(error)
            return None, _Refused(failure.code, failure.reason, text)

    def _decode(self, message: bytes, deserialize: Callable[[bytes], Any]) -> Any:
        try:
            _check_plain(message, self._max_plain)
            return deserialize(message)
        except (DecodeError, IndexError, ValueError):
            text = "The bytes are not a message of this method."
            raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, "invalid", text) from None

    @contextlib.contextmanager
    def _known(self) -> Iterator[None]:
        """Have `close` know of the task that runs the block."""
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def close(self, seconds: float) -> None:
        """Let calls end for so long, and then report to the others that the server shuts down."""
        until = asyncio.get_running_loop().time() + seconds
        while self._tasks and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)
        self._closing = True
        for task in self._tasks:
            task.cancel()


def _check_plain(message: bytes, most: int) -> None:
    """Check how much of a message is not raw tensors, before it is decoded: lists of numbers cost many times their bytes.

    Raises:
        _Refused: If it is more than `most` bytes, or too many fields.
        IndexError: If the bytes end within a field.
        DecodeError: If they are no message.
        ValueError: If a number in them has no end.
    """
    position, plain, fields = 0, 0, 0
    while position < len(message):
        begin = position
        key, position = read_varint(message, position)
        kind = key & 7
        if kind == 2:
            size, position = read_varint(message, position)
            is_raw = key >> 3 == _RAW_TENSORS
            plain += 0 if is_raw else size
            position += size
        elif kind == 0:
            _, position = read_varint(message, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise DecodeError
        if position > len(message):
            raise IndexError
        plain += min(position - begin, 20)  # the key and the size
        fields += 1
        if plain > most or fields > _MAX_FIELDS:
            text = (
                f"The message holds more than {most} bytes besides raw_input_contents, or more than {_MAX_FIELDS} fields. "
                "Send tensors as raw_input_contents."
            )
            raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "size", text)


class RpcServer:
    """The gRPC server. It is bound to its port when it is created, and serves once it is started.

    Args:
        dataplane: What answers.
        options: The options of the server.

    Attributes:
        port: The port.

    Raises:
        OSError: If the address is not available.
    """

    def __init__(self, dataplane: DataPlane, options: ServeOptions):
        self._guard = _Guard(options)
        self._server = grpc.aio.server(
            interceptors=(self._guard,),
            maximum_concurrent_rpcs=MAX_CALLS,
            options=[
                ("grpc.max_receive_message_length", options.max_request_bytes),
                ("grpc.max_metadata_size", 16 * 2**10),
                ("grpc.so_reuseport", 0),  # otherwise two servers share a port, and neither reports it
                ("grpc.max_concurrent_streams", _MAX_CALLS_OF_CONNECTION),
                ("grpc.max_allowed_incoming_connections", options.max_connections),
                ("grpc.server_handshake_timeout_ms", round(1000 * options.header_seconds)),
                ("grpc.max_connection_idle_ms", 300_000),
                ("grpc.keepalive_time_ms", 60_000),  # finds peers that have gone without a word
            ],
        )
        add_GRPCInferenceServiceServicer_to_server(_Servicer(dataplane, None), self._server)
        host, port = options.host, options.grpc_port
        try:
            self.port = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(
                f"gRPC cannot listen at {host}, port {port}. Choose another one with --grpc-port, 0 for any"
            ) from error

    async def start(self) -> None:
        """Accept connections."""
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Take no more calls, and end those that there are, which may take so long."""
        await asyncio.gather(self._server.stop(seconds + 1), self._guard.close(seconds))
