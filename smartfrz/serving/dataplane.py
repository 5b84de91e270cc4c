"""What both protocols ask: which models there are, and for decisions."""

from typing import Any, cast

from kserve import ModelRepository
from kserve.errors import ModelNotFound, ModelNotReady
from kserve.protocol.dataplane import DataPlane as KserveDataPlane

from smartfrz import __version__
from smartfrz.serving.model import PredictorModel


class DataPlane(KserveDataPlane):  # type: ignore[misc]
    """As kserve's, for predictors that are all loaded, and stay so.

    Args:
        models: By name.

    Attributes:
        draining: Whether the server is about to end.
    """

    def __init__(self, models: dict[str, PredictorModel]):
        repository = ModelRepository()
        for name, model in models.items():
            repository.update(model, name)
        super().__init__(repository)
        self.draining = False

    def metadata(self) -> dict[str, Any]:
        """Of the server."""
        return {"name": "smartfrz", "version": __version__, "extensions": ["binary_tensor_data"]}

    async def ready(self) -> bool:
        """Whether requests are welcome."""
        return not self.draining

    async def ready_model(self, name: str) -> PredictorModel:
        """The model of that name.

        Raises:
            ModelNotFound: If there is none.
            ModelNotReady: If it does not answer any more.
        """
        model = self.model_registry.get_model(name)
        if model is None:
            raise ModelNotFound(name[:40])
        if not model.ready:
            raise ModelNotReady(name)
        return cast(PredictorModel, model)

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        """Of a model: what kserve says of it, and the metadata of the predictor file as `properties`."""
        model = await self.ready_model(model_name)
        described: dict[str, Any] = await super().model_metadata(model_name)
        facts = {"versions": [model.version], "platform": "onnxruntime_onnx", "properties": model.properties}
        return described | facts
