"""What REST and gRPC share: the models, and how failures are reported and counted."""

import contextlib
import logging
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, NamedTuple

import grpc
from kserve import ModelRepository
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady, ServerNotReady
from kserve.protocol.dataplane import DataPlane as KserveDataPlane

from smartfrz import __version__
from smartfrz.serving import metrics
from smartfrz.serving.batching import Overloaded
from smartfrz.serving.model import PredictorModel

logger = logging.getLogger("smartfrz")
_MAX_MESSAGE = 450
_DESCRIPTION = (
    "Freeze predictors: they say which layers of a neural network need no more training. Ask them over the Open Inference "
    "Protocol v2."
)
_LINKS = {
    "live": "/v2/health/live",
    "ready": "/v2/health/ready",
    "metadata": "/v2",
    "models": "/v2/models",
    "metrics": "/metrics",
    "openapi": "/openapi.json",
}


class Failure(NamedTuple):
    """How a kind of error is reported: over REST, over gRPC, and as the reason in the metrics."""

    status: HTTPStatus
    code: grpc.StatusCode
    reason: str


EXPECTED_FAILURES: dict[type[Exception], Failure] = {
    InvalidInput: Failure(HTTPStatus.BAD_REQUEST, grpc.StatusCode.INVALID_ARGUMENT, "invalid"),
    ModelNotFound: Failure(HTTPStatus.NOT_FOUND, grpc.StatusCode.NOT_FOUND, "unknown_model"),
    ModelNotReady: Failure(HTTPStatus.SERVICE_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, "other"),
    NotImplementedError: Failure(HTTPStatus.NOT_IMPLEMENTED, grpc.StatusCode.UNIMPLEMENTED, "other"),
    Overloaded: Failure(HTTPStatus.SERVICE_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, "overloaded"),
    ServerNotReady: Failure(HTTPStatus.SERVICE_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, "other"),
}
_UNEXPECTED = Failure(HTTPStatus.INTERNAL_SERVER_ERROR, grpc.StatusCode.INTERNAL, "failed")


def explain(error: Exception) -> tuple[Failure, str]:
    """Return how an error is reported, and the message for the client. Unexpected errors are logged."""
    failure = EXPECTED_FAILURES.get(type(error))
    if failure is None:
        logger.error("A request failed", exc_info=error)
        return _UNEXPECTED, "The server failed; its log says why."
    return failure, str(error)[:_MAX_MESSAGE]


class DataPlane(KserveDataPlane):  # type: ignore[misc]
    """kserve's data plane with models that are never unloaded, and the predictor's facts in their metadata.

    Args:
        models: The models by name.
    """

    def __init__(self, models: dict[str, PredictorModel]):
        repository = ModelRepository()
        for name, model in models.items():
            repository.update(model, name)
        super().__init__(repository)
        self._draining = False

    def drain(self) -> None:
        """Report from now on that the server is not ready for new requests."""
        self._draining = True

    def metadata(self) -> dict[str, Any]:
        """Describe the server."""
        return {"name": "smartfrz", "version": __version__, "extensions": ["binary_tensor_data"]}

    async def overview(self) -> dict[str, Any]:
        """Say what this server is, which predictors it has, and where to go on. Addresses are paths of this server."""
        about = {key: value for key, value in self.metadata().items() if key in ("name", "version")}
        paths = {name: f"/v2/models/{name}" for name in self.model_registry.get_models()}
        models = [
            {
                "name": name,
                "version": model.version,
                "sha256": model.sha256,
                "predictor": model.info.name,
                "metadata": paths[name],
                "ready": f"{paths[name]}/ready",
                "infer": f"{paths[name]}/infer",
            }
            for name, model in self.model_registry.get_models().items()
        ]
        return about | {"description": _DESCRIPTION, "models": models, "links": _LINKS}

    async def ready(self) -> bool:
        """Return whether the server takes new requests."""
        return not self._draining

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        """Describe a model, with the metadata of the predictor file as `properties`."""
        described: dict[str, Any] = await super().model_metadata(model_name)
        model = self.get_model_from_registry(model_name)
        facts = {"versions": [model.version], "platform": "onnxruntime_onnx", "properties": model.properties}
        return described | facts

    @contextlib.contextmanager
    def counting(self, model_name: str, protocol: str) -> Iterator[None]:
        """Count the request for decisions that the block answers, and how it ends."""
        known = model_name if self.model_registry.get_model(model_name) else "unknown"

        def count(status: HTTPStatus, code: grpc.StatusCode) -> None:
            metrics.REQUESTS.labels(known, protocol, code.name if protocol == "grpc" else str(int(status))).inc()

        try:
            yield
        except Exception as error:
            failure = EXPECTED_FAILURES.get(type(error), _UNEXPECTED)
            metrics.REJECTED.labels(failure.reason).inc()
            count(failure.status, failure.code)
            raise
        count(HTTPStatus.OK, grpc.StatusCode.OK)
