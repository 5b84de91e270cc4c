"""The server: REST and gRPC in one process, from its start to the last answer."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER, V2_ROUTE_PREFIX
from kserve.protocol.rest.server import metrics_handler
from kserve.protocol.rest.v2_datamodels import InferenceRequest
from kserve.protocol.rest.v2_endpoints import V2Endpoints
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from smartfrz.predictor.runtime import Predictor
from smartfrz.serving.connections import Connections, fit_open_files
from smartfrz.serving.dataplane import EXPECTED_FAILURES, DataPlane, explain
from smartfrz.serving.limits import BODY, BodyLimits
from smartfrz.serving.model import PredictorModel
from smartfrz.serving.options import ServeOptions
from smartfrz.serving.rpc import RpcServer


async def serve(
    predictors: Mapping[str, Predictor], options: ServeOptions, on_start: Callable[[int, int], None]
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is in flight, for at most `grace_seconds`.

    Args:
        predictors: The predictors by the name in addresses.
        options: How to serve.
        on_start: Called with the ports of REST and gRPC as soon as both accept connections.

    Raises:
        OSError: If an address is not available.
    """
    logging.getLogger("kserve").setLevel(logging.CRITICAL)  # it logs a traceback for each bad request
    options = replace(options, max_connections=fit_open_files(options.max_connections))
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with contextlib.AsyncExitStack() as stack:  # what is entered last ends first
        models = {name: PredictorModel(name, predictor, options) for name, predictor in predictors.items()}
        for model in models.values():
            stack.push_async_callback(model.close)
        dataplane = DataPlane(models)
        listener = stack.enter_context(_listen(options.host, options.port))
        rpc = RpcServer(dataplane, options)
        stack.push_async_callback(rpc.stop, 0)
        rest = _RestServer(_uvicorn_config(dataplane, options))
        await rpc.start()
        serving = asyncio.create_task(rest.serve([listener]))
        try:
            while not rest.started and not serving.done():
                await asyncio.sleep(0.01)
            on_start(listener.getsockname()[1], rpc.port)
            stopped = asyncio.create_task(stopping.wait())
            await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            dataplane.drain()
            rest.should_exit = True
            await asyncio.gather(serving, rpc.stop(options.grace_seconds))


class _RestServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`, which has to stop gRPC and the predictors, too."""
        yield


def _uvicorn_config(dataplane: DataPlane, options: ServeOptions) -> uvicorn.Config:
    connections = Connections(options)
    return uvicorn.Config(
        BodyLimits(_rest_application(dataplane), options, connections),
        http=connections.protocol(),  # h11 limits the length of headers
        timeout_keep_alive=cast(int, min(5.0, options.header_seconds)),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=options.grace_seconds,
        server_header=False,
    )


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"{host!r} is not an address to listen on ({error})") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise OSError(
                f"REST cannot listen at {host}, port {port} ({error.strerror}). Choose another one with --port, 0 for any"
            ) from error
        yield listener


class _Endpoints(V2Endpoints):  # type: ignore[misc]
    """kserve's endpoints, except that metadata keep `properties`, and that binary tensors are never turned into lists."""

    async def describe(self, model_name: str) -> dict[str, Any]:
        """Describe a model."""
        described: dict[str, Any] = await self.dataplane.model_metadata(model_name)
        return described

    async def decide(self, request: Request, model_name: str) -> Response:
        """Answer a request for decisions."""
        with self.dataplane.counting(model_name, "rest"):
            model = await self.dataplane.get_model(model_name)
            header_length = request.headers.get(INFERENCE_CONTENT_LENGTH_HEADER)
            # Popped, so that the body is freed as soon as the tensors have been copied out of it.
            asked = await model.read(request.scope.pop(BODY), header_length)
            answer, _ = await self.dataplane.infer(model_name, asked)
            body, json_length = answer.to_rest()
        if json_length is None:
            return JSONResponse(body)
        headers = {INFERENCE_CONTENT_LENGTH_HEADER: str(json_length)}
        return Response(body, media_type="application/octet-stream", headers=headers)


def _rest_application(dataplane: DataPlane) -> ASGIApp:
    app = FastAPI(title="smartfrz serve", docs_url=None, redoc_url=None)
    endpoints = _Endpoints(dataplane)
    router = APIRouter(prefix=V2_ROUTE_PREFIX)
    for path, endpoint in {
        "": endpoints.metadata,
        "/health/live": endpoints.live,
        "/health/ready": endpoints.ready,
        "/models": endpoints.models,
        "/models/{model_name}": endpoints.describe,
        "/models/{model_name}/ready": endpoints.model_ready,
    }.items():
        router.add_api_route(path, endpoint, methods=["GET"])
    schema = {"application/json": {"schema": InferenceRequest.model_json_schema()}, "application/octet-stream": {}}
    router.add_api_route(
        "/models/{model_name}/infer",
        endpoints.decide,
        methods=["POST"],
        openapi_extra={"requestBody": {"content": schema, "required": True}},
    )
    app.add_api_route("/", dataplane.overview, methods=["GET"])
    app.include_router(router)
    app.add_api_route("/metrics", metrics_handler, methods=["GET"], include_in_schema=False)
    for kind in (*EXPECTED_FAILURES, Exception):
        app.add_exception_handler(kind, _answer_failure)
    app.add_exception_handler(HTTPException, _answer_http_error)
    return app


async def _answer_failure(request: Request, error: Exception) -> JSONResponse:
    failure, message = explain(error)
    return JSONResponse({"error": message}, failure.status, {"Retry-After": "1"} if failure.status == 503 else None)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    known = cast(HTTPException, error)
    return JSONResponse({"error": known.detail}, known.status_code, known.headers)
