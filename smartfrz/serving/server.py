"""The server: REST and gRPC in one process, from its start to the last answer."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import grpc
import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from google.protobuf.message import DecodeError
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER, V2_ROUTE_PREFIX
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.server import metrics_handler
from kserve.protocol.rest.v2_datamodels import InferenceRequest
from kserve.protocol.rest.v2_endpoints import V2Endpoints
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from smartfrz.predictor.runtime import Predictor
from smartfrz.serving import metrics
from smartfrz.serving.connections import Connections, fit_open_files
from smartfrz.serving.dataplane import EXPECTED_FAILURES, DataPlane, explain
from smartfrz.serving.limits import BODY, BodyLimits
from smartfrz.serving.model import PredictorModel
from smartfrz.serving.options import ServeOptions

MAX_GRPC_CALLS = 64  # gRPC receives a whole message before it can be told that there is no room for it


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
        rpc, grpc_port = await _grpc_server(dataplane, options)
        rest = _RestServer(_uvicorn_config(dataplane, options))
        await rpc.start()
        serving = asyncio.create_task(rest.serve([listener]))
        try:
            while not rest.started and not serving.done():
                await asyncio.sleep(0.01)
            on_start(listener.getsockname()[1], grpc_port)
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


class _FailuresToCodes(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Reports every failure as its status code. gRPC alone would call bytes that are not a message an internal error."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Return a handler that decodes the message itself and reports failures."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler

        async def answer(message: bytes, context: Any) -> Any:
            try:
                request = handler.request_deserializer(message)
            except DecodeError:
                metrics.REJECTED.labels("invalid").inc()
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The bytes are not a message of this method.")
            try:
                return await handler.unary_unary(request, context)
            except Exception as error:
                failure, text = explain(error)
                await context.abort(failure.code, text)

        return grpc.unary_unary_rpc_method_handler(answer, None, handler.response_serializer)


async def _grpc_server(dataplane: DataPlane, options: ServeOptions) -> tuple[Any, int]:
    """Return a gRPC server that has not been started, and its port."""
    server = grpc.aio.server(
        interceptors=(_FailuresToCodes(),),
        maximum_concurrent_rpcs=MAX_GRPC_CALLS,
        options=[
            ("grpc.max_receive_message_length", options.max_request_bytes),
            ("grpc.max_metadata_size", 16 * 2**10),
            ("grpc.so_reuseport", 0),  # otherwise two servers share a port, and neither reports it
        ],
    )
    add_GRPCInferenceServiceServicer_to_server(_Servicer(dataplane, None), server)
    host, port = options.host, options.grpc_port
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:
        bound = 0
    if not bound:
        await server.stop(None)
        raise OSError(f"gRPC cannot listen at {host}, port {port}. Choose another one with --grpc-port, 0 for any")
    return server, bound
