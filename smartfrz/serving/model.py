"""A predictor as a model of kserve."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import RequestedOutput
from numpy.typing import NDArray

from smartfrz.predictor.contract import HISTORY, LENGTHS, POSITION, PREFIX
from smartfrz.predictor.runtime import Prediction, Predictor
from smartfrz.serving import metrics, tensors
from smartfrz.serving.batching import Batcher
from smartfrz.serving.options import ServeOptions


class PredictorModel(Model):  # type: ignore[misc]
    """Answers requests by way of a `Batcher`.

    Args:
        name: In addresses.
        predictor: Who is asked.
        options: Of the server.

    Attributes:
        info: Facts of the predictor.
        sha256: Of the predictor.
        version: The beginning of that, since a file does not tell its version in the zoo.
    """

    def __init__(self, name: str, predictor: Predictor, options: ServeOptions):
        super().__init__(name)
        self.info = predictor.info
        self.sha256 = predictor.sha256
        self.version = self.sha256[:12]
        self._max_layers = options.max_batch
        # One at a time, apart from the event loop: lists of numbers take many times the room of their text.
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
        """All that a client needs to know: the metadata of the predictor file, its checksum, and our limit."""
        facts = {"sha256": self.sha256, "max_layers": str(self._max_layers)}
        return self.info.to_metadata() | {PREFIX + name: value for name, value in facts.items()}

    def get_input_types(self) -> list[dict[str, Any]]:
        """For the model's metadata."""
        return tensors.inputs_of(self.info)

    def get_output_types(self) -> list[dict[str, Any]]:
        """For the model's metadata."""
        return tensors.outputs_of()

    async def close(self) -> None:
        """Stop answering."""
        self.ready = False
        await self._batcher.close()
        self._reader.shutdown()

    async def read(self, body: bytes | bytearray, header_length: str | None) -> InferRequest:
        """The request in the body of a REST request.

        Raises:
            InvalidInput: If it cannot be answered.
        """
        try:
            asked = await asyncio.get_running_loop().run_in_executor(self._reader, tensors.read, body, header_length)
        except ValueError as error:
            raise InvalidInput(str(error)) from error
        return InferRequest(
            self.name,
            [
                InferInput(name, list(array.shape), tensors.DATATYPES[name], cast(Any, array))
                for name, array in asked.tensors.items()
            ],
            request_id=asked.id,
            request_outputs=[RequestedOutput(name, {"binary_data": raw}) for name, raw in asked.outputs.items()],
        )

    async def predict(
        self, payload: InferRequest, headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> InferResponse:
        """Answer a request, over either protocol.

        Raises:
            InvalidInput: If it cannot be answered.
            Overloaded: If it waited for too long.
        """
        begin = time.perf_counter()
        try:
            arrays = _arrays(payload)
            tensors.check(arrays, self.info, self._max_layers)
            wanted = [output.name for output in payload.request_outputs or ()] or tensors.OUTPUTS
            tensors.check_outputs(wanted)
        except ValueError as error:
            raise InvalidInput(str(error)) from error
        history, lengths = arrays[HISTORY], arrays[LENGTHS]
        answer = _finite(await self._batcher.ask(history, lengths, arrays.get(POSITION)))
        metrics.LAYERS.labels(self.name).inc(len(history))
        protocol = "grpc" if payload.from_grpc else "rest"
        metrics.SECONDS.labels(self.name, protocol).observe(time.perf_counter() - begin)
        return InferResponse(
            payload.id or "",
            self.name,
            [_output(name, getattr(answer, name), payload) for name in wanted],
            model_version=self.version,
            parameters={PREFIX + "sha256": self.sha256},
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )

    def _count_run(self, num_requests: int, num_layers: int) -> None:
        metrics.BATCH_REQUESTS.labels(self.name).observe(num_requests)
        metrics.BATCH_LAYERS.labels(self.name).observe(num_layers)


def _finite(answer: Prediction) -> Prediction:
    """Keep training, where weights so large that the network overflows got no number; JSON has no NaN."""
    right = np.asarray(np.isfinite(np.concatenate(answer, axis=1)).all(axis=1))
    if right.all():
        return answer
    keep = np.array([1, 0], np.float32)
    attention = np.where(right[:, None], answer.attention, np.float32(0))
    return Prediction(np.where(right[:, None], answer.confidence, keep), attention)


def _output(name: str, array: NDArray[np.float32], payload: InferRequest) -> InferOutput:
    output = InferOutput(name, list(array.shape), "FP32", cast(Any, array))
    if payload.from_grpc:  # kserve converts arrays for REST only
        output.set_data_from_numpy(array, binary_data=payload.use_binary_outputs)
    return output


def _arrays(payload: InferRequest) -> dict[str, NDArray[Any]]:
    """The tensors of a request; those of gRPC have not been read yet."""
    tensors.check_names([given.name for given in payload.inputs])
    arrays = {}
    for given in payload.inputs:
        tensors.check_claim(given.name, given.datatype, given.shape)
        try:
            arrays[given.name] = given.data if isinstance(given.data, np.ndarray) else given.as_numpy()
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{given.name!r} does not fit to its shape {given.shape}: {error}.") from error
    return arrays
