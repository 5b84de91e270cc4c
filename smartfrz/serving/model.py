"""A predictor as a model of kserve."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput, ModelNotReady
from numpy.typing import NDArray

from smartfrz.predictor.contract import (
    ATTENTION,
    CONFIDENCE,
    HISTORY,
    LENGTHS,
    LOSS,
    POSITION,
    POSITIONAL,
    PREFIX,
    READS_LOSS,
)
from smartfrz.predictor.runtime import Prediction, Predictor
from smartfrz.serving import metrics, tensors
from smartfrz.serving.batching import Batcher
from smartfrz.serving.options import ServeOptions


class PredictorModel(Model):  # type: ignore[misc]
    """Checks requests and answers them through a `Batcher`.

    Args:
        name: The name in addresses.
        predictor: The predictor that answers.
        options: The options of the server.

    Attributes:
        info: Facts about the predictor.
        sha256: SHA-256 of the predictor's file, as `smartfrz zoo list` gives it.
        version: The beginning of it; a file does not know its version in the zoo.
    """

    def __init__(self, name: str, predictor: Predictor, options: ServeOptions):
        super().__init__(name)
        self.info = predictor.info
        self.version = predictor.sha256[:12]
        self.sha256 = predictor.sha256
        self._max_layers = options.max_batch
        # One body at a time and off the event loop: lists of numbers take many times the memory of their text.
        self._reader = ThreadPoolExecutor(1, "smartfrz-read")
        self._batcher = Batcher(
            predictor,
            max_batch=options.max_batch,
            max_delay=options.max_delay_ms / 1000,
            threads=options.threads,
            on_run=self._count_run,
        )
        metrics.WAITING.labels(name).set_function(lambda: self._batcher.num_waiting)
        self.ready = True

    @property
    def properties(self) -> dict[str, str]:
        """What a client needs to know: the metadata of the predictor file, its checksum, and the limit of layers."""
        facts = {PREFIX + "sha256": self.sha256, PREFIX + "max_layers": str(self._max_layers)}
        return self.info.to_metadata() | facts

    def get_input_types(self) -> list[dict[str, Any]]:
        """Return name, datatype and shape of the inputs; -1 is dynamic. `position` and `loss` are optional."""
        shapes = {HISTORY: [-1, -1, self.info.tailored_size], LENGTHS: [-1]}
        if self.info.representation in POSITIONAL:
            shapes[POSITION] = [-1]
        if self.info.representation in READS_LOSS:
            shapes[LOSS] = [-1, -1]
        return [{"name": name, "datatype": tensors.INPUTS[name].datatype, "shape": s} for name, s in shapes.items()]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Return name, datatype and shape of the outputs; -1 is dynamic."""
        return [
            {"name": name, "datatype": "FP32", "shape": shape}
            for name, shape in ((CONFIDENCE, [-1, 2]), (ATTENTION, [-1, -1]))
        ]

    def load(self) -> bool:
        """Refuse to be loaded again: a model that is not ready has been closed.

        Raises:
            ModelNotReady: Always.
        """
        raise ModelNotReady(self.name)

    async def close(self) -> None:
        """Stop answering."""
        self.ready = False
        await self._batcher.close()
        self._reader.shutdown()

    async def read(self, body: bytes | bytearray, header_length: str | None) -> InferRequest:
        """Read the body of a REST request.

        Raises:
            InvalidInput: If the body is not what the protocol demands.
        """
        arguments = (body, header_length, self.name)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, tensors.read, *arguments)
        except ValueError as error:
            raise InvalidInput(str(error)) from error

    async def predict(
        self, payload: InferRequest, headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> InferResponse:
        """Answer a request that came over either protocol.

        Raises:
            InvalidInput: If the predictor cannot answer it.
            Overloaded: If it waited for too long.
        """
        begin = time.perf_counter()
        try:
            arrays, wanted = self._check(payload)
        except ValueError as error:
            raise InvalidInput(str(error)) from error
        question = arrays[HISTORY], arrays[LENGTHS], arrays.get(POSITION), arrays.get(LOSS)
        answer = _keep_training_on_overflow(await self._batcher.ask(*question))
        metrics.LAYERS.labels(self.name).inc(len(answer.confidence))
        protocol = "grpc" if payload.from_grpc else "rest"
        metrics.SECONDS.labels(self.name, protocol).observe(time.perf_counter() - begin)
        return InferResponse(
            payload.id or "",
            self.name,
            [_make_output(name, getattr(answer, name), payload) for name in wanted],
            model_version=self.version,
            parameters={PREFIX + "sha256": self.sha256},
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )

    def _check(self, payload: InferRequest) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return the tensors of a request and the names of the outputs that it wants."""
        if payload.model_version not in (None, "", self.version):
            raise ValueError(f"model_version is {payload.model_version[:40]!r}; expected {self.version!r}, or none.")
        arrays = _read_arrays(payload)
        tensors.check(arrays, self.info, self._max_layers)
        wanted = [output.name for output in payload.request_outputs or ()] or list(tensors.OUTPUTS)
        tensors.check_outputs(wanted)
        return arrays, wanted

    def _count_run(self, num_requests: int, num_layers: int) -> None:
        metrics.BATCH_REQUESTS.labels(self.name).observe(num_requests)
        metrics.BATCH_LAYERS.labels(self.name).observe(num_layers)


def _read_arrays(payload: InferRequest) -> dict[str, NDArray[Any]]:
    """Return the tensors by name. Over REST they are arrays already; over gRPC kserve reads them now."""
    tensors.check_names([given.name for given in payload.inputs])
    arrays = {}
    for given in payload.inputs:
        tensors.check_claim(given.name, given.datatype, given.shape)
        try:
            arrays[given.name] = given.data if isinstance(given.data, np.ndarray) else given.as_numpy()
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{given.name!r} does not fit its shape {given.shape}: {error}.") from error
    return arrays


def _keep_training_on_overflow(answer: Prediction) -> Prediction:
    """Replace answers that are not finite, because the weights were too large, by 'keep training'. JSON has no NaN."""
    finite = np.asarray(np.isfinite(np.concatenate(answer, axis=1)).all(axis=1))
    if finite.all():
        return answer
    keep = np.array([1, 0], np.float32)
    attention = np.where(finite[:, None], answer.attention, np.float32(0))
    return Prediction(np.where(finite[:, None], answer.confidence, keep), attention)


def _make_output(name: str, array: NDArray[np.float32], payload: InferRequest) -> InferOutput:
    output = InferOutput(name, list(array.shape), "FP32", cast(Any, array))
    if payload.from_grpc:  # kserve converts arrays for REST only
        output.set_data_from_numpy(array, binary_data=payload.use_binary_outputs)
    return output
