"""The REST side: the paths of the Open Inference Protocol, and /metrics."""

import logging
from http import HTTPStatus
from typing import Any, cast

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER, V2_ROUTE_PREFIX
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady, ServerNotReady
from kserve.protocol.rest.server import metrics_handler
from kserve.protocol.rest.v2_datamodels import InferenceRequest
from kserve.protocol.rest.v2_endpoints import V2Endpoints
from starlette.exceptions import HTTPException

from smartfrz.serving import metrics
from smartfrz.serving.batching import Overloaded
from smartfrz.serving.dataplane import DataPlane
from smartfrz.serving.intake import BODY, App, Intake

logger = logging.getLogger("smartfrz")
_STATUS = {
    InvalidInput: HTTPStatus.BAD_REQUEST,
    ModelNotFound: HTTPStatus.NOT_FOUND,
    ModelNotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    ServerNotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
}


class Endpoints(V2Endpoints):  # type: ignore[misc]
    """As kserve's, but for what is said of models, and for bodies: tensors of binary data stay what they are."""

    async def describe(self, model_name: str) -> dict[str, Any]:
        """The metadata of a model."""
        described: dict[str, Any] = await self.dataplane.model_metadata(model_name)
        return described

    async def is_ready(self, model_name: str) -> dict[str, Any]:
        """Whether a model can be asked."""
        await self.dataplane.ready_model(model_name)
        return {"name": model_name, "ready": True}

    async def decide(self, request: Request, model_name: str) -> Response:
        """Answer a request for decisions."""
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        try:
            model = await self.dataplane.ready_model(model_name)
            # Popped: what was copied out of it need not be held twice while it waits.
            asked = await model.read(request.scope.pop(BODY), request.headers.get(INFERENCE_CONTENT_LENGTH_HEADER))
            answer, _ = await self.dataplane.infer(model_name, asked)
            body, json_length = answer.to_rest()
            status = HTTPStatus.OK
        except tuple(_STATUS) as error:
            status = _STATUS[type(error)]
            metrics.REJECTED.labels(metrics.REASONS.get(type(error).__name__, "other")).inc()
            raise
        finally:
            known = model_name if self.dataplane.model_registry.get_model(model_name) else "unknown"
            metrics.REQUESTS.labels(known, "rest", str(int(status))).inc()
        if json_length is None:
            return JSONResponse(body)
        headers = {INFERENCE_CONTENT_LENGTH_HEADER: str(json_length)}
        return Response(body, media_type="application/octet-stream", headers=headers)


def application(dataplane: DataPlane, max_request_bytes: int) -> App:
    """The ASGI application.

    Args:
        dataplane: Knows the models.
        max_request_bytes: Of one body.
    """
    app = FastAPI(title="smartfrz serve", docs_url=None, redoc_url=None)
    endpoints = Endpoints(dataplane)
    router = APIRouter(prefix=V2_ROUTE_PREFIX)
    for path, endpoint in {
        "": endpoints.metadata,
        "/health/live": endpoints.live,
        "/health/ready": endpoints.ready,
        "/models": endpoints.models,
        "/models/{model_name}": endpoints.describe,
        "/models/{model_name}/ready": endpoints.is_ready,
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
    for expected in _STATUS:
        app.add_exception_handler(expected, _expected)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    return Intake(app, max_request_bytes)


async def _expected(request: Request, error: Exception) -> JSONResponse:
    status = _STATUS[type(error)]
    headers = {"Retry-After": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    message = str(error) or "The server has more requests than it can answer. Try again later."
    return JSONResponse({"error": message}, status, headers)


async def _http(request: Request, error: Exception) -> JSONResponse:
    known = cast(HTTPException, error)
    return JSONResponse({"error": known.detail}, known.status_code, known.headers)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("A request for %s failed", request.url.path, exc_info=error)
    return JSONResponse({"error": "The server failed; its log says why."}, HTTPStatus.INTERNAL_SERVER_ERROR)
