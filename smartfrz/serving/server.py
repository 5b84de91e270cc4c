"""The server: both protocols in one process, from its start to the last answer."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from smartfrz.predictor.runtime import Predictor
from smartfrz.serving.dataplane import DataPlane
from smartfrz.serving.model import PredictorModel
from smartfrz.serving.options import ServeOptions
from smartfrz.serving.rest import application
from smartfrz.serving.rpc import grpc_server

logger = logging.getLogger("smartfrz")


class _Rest(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: gRPC and the predictors have to end, too."""
        yield


async def serve(
    predictors: Mapping[str, Predictor], options: ServeOptions, on_start: Callable[[int, int], None]
) -> None:
    """Serve until SIGTERM or SIGINT; what is in flight then is answered, for at most `grace_seconds`.

    Args:
        predictors: By the name in addresses.
        options: How to serve.
        on_start: Told the ports of REST and gRPC, once both listen.

    Raises:
        OSError: If an address cannot be listened at.
    """
    logging.getLogger("kserve").setLevel(logging.CRITICAL)  # it prints a traceback for each bad request
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with contextlib.AsyncExitStack() as stack:  # what is entered last ends first
        models = {name: PredictorModel(name, predictor, options) for name, predictor in predictors.items()}
        for model in models.values():
            stack.push_async_callback(model.close)
        dataplane = DataPlane(models)
        listener = stack.enter_context(_listening(options.host, options.port))
        rpc, grpc_port = await grpc_server(dataplane, options.host, options.grpc_port, options.max_request_bytes)
        rest = _Rest(_config(dataplane, options))
        await rpc.start()
        serving = asyncio.create_task(rest.serve([listener]))
        try:
            while not rest.started and not serving.done():
                await asyncio.sleep(0.01)
            on_start(listener.getsockname()[1], grpc_port)
            stopped = asyncio.create_task(stopping.wait())
            await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            dataplane.draining = True
            rest.should_exit = True
            await asyncio.gather(serving, rpc.stop(options.grace_seconds))


def _config(dataplane: DataPlane, options: ServeOptions) -> uvicorn.Config:
    return uvicorn.Config(
        application(dataplane, options.max_request_bytes),
        http="h11",  # which limits the length of headers
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=options.grace_seconds,
        server_header=False,
    )


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"{host!r} is no address to listen at ({error})") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise OSError(
                f"REST cannot listen at {host}, port {port} ({error.strerror}). Choose another one with --port, 0 for any"
            ) from error
        yield listener
