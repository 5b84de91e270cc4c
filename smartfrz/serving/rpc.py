"""The gRPC side."""

import logging
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer

from smartfrz.serving import metrics
from smartfrz.serving.batching import Overloaded
from smartfrz.serving.dataplane import DataPlane

logger = logging.getLogger("smartfrz")
MAX_CALLS = 64  # gRPC holds a message before anybody can say that there is no room for it
_CODES = {
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    ModelNotReady: grpc.StatusCode.UNAVAILABLE,
    Overloaded: grpc.StatusCode.UNAVAILABLE,
}


class Messages(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses bytes that are no message as any other bad request, where gRPC would tell of a failure."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The handler of a call, with a reader that does not fail."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler

        def read(message: bytes) -> Any:
            try:
                return handler.request_deserializer(message)
            except DecodeError:
                return None

        async def answer(request: Any, context: Any) -> Any:
            if request is None:
                metrics.REJECTED.labels("invalid").inc()
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The bytes are no message of this method.")
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, read, handler.response_serializer)


class Servicer(InferenceServicer):  # type: ignore[misc]
    """As kserve's, but nobody loads and unloads models from afar."""

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """Name, inputs and outputs; the facts of the predictor are in REST's metadata only."""
        try:
            return await super().ModelMetadata(request, context)
        except ModelNotFound as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, error.reason)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Whether a model can be asked."""
        try:
            return await super().ModelReady(request, context)
        except ModelNotFound as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, error.reason)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        """Refused."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "The models of this server are loaded, and stay so.")

    RepositoryModelUnload = RepositoryModelLoad

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Answer a request for decisions."""
        code = grpc.StatusCode.INTERNAL
        try:
            model = await self._data_plane.ready_model(request.model_name)
            if request.model_version not in ("", model.version):
                raise InvalidInput(
                    f"model_version is {request.model_version[:40]!r}; expected {model.version!r}, or none."
                )
            answer = await super().ModelInfer(request, context)
            code = grpc.StatusCode.OK
            return answer
        except tuple(_CODES) as error:
            code = _CODES[type(error)]
            metrics.REJECTED.labels(metrics.REASONS.get(type(error).__name__, "other")).inc()
            message = str(error) or "The server has more requests than it can answer. Try again later."
            await context.abort(code, message)
        except Exception:
            logger.exception("A request over gRPC failed")
            await context.abort(code, "The server failed; its log says why.")
        finally:
            known = self._data_plane.model_registry.get_model(request.model_name)
            metrics.REQUESTS.labels(request.model_name if known else "unknown", "grpc", code.name).inc()


async def grpc_server(dataplane: DataPlane, host: str, port: int, max_request_bytes: int) -> tuple[Any, int]:
    """A gRPC server that has not been started, and its port.

    Args:
        dataplane: Knows the models.
        host: Address to listen at.
        port: 0 for any that is free.
        max_request_bytes: Of one message.

    Raises:
        OSError: If it cannot listen there.
    """
    server = grpc.aio.server(
        interceptors=(Messages(), ExceptionToStatusInterceptor()),
        maximum_concurrent_rpcs=MAX_CALLS,
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_metadata_size", 16 * 2**10),
            ("grpc.so_reuseport", 0),  # else two servers share a port, and neither says so
        ],
    )
    add_GRPCInferenceServiceServicer_to_server(Servicer(dataplane, None), server)
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:
        bound = 0
    if not bound:
        await server.stop(None)
        raise OSError(f"gRPC cannot listen at {host}, port {port}. Choose another one with --grpc-port, 0 for any")
    return server, bound
