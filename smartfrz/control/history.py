"""The weight history of the active layers: the last `window` tailored vectors of each, or their encodings."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smartfrz.predictor.contract import ENCODING_SIZE, PredictorInfo


class WeightHistory:
    """Keeps the newest `window` tailored vectors of every active layer.

    Args:
        window: Timestamps kept.
        tailored_size: Length of a tailored vector.
    """

    def __init__(self, window: int, tailored_size: int):
        self.window = window
        self.tailored_size = tailored_size
        self._rings: dict[str, NDArray[np.float32]] = {}
        self._counts: dict[str, int] = {}

    def append(self, layer: str, vector: NDArray[np.float32]) -> None:
        """Add the newest tailored vector of a layer, float32 `[tailored_size]`.

        Raises:
            ValueError: If the vector has another shape.
        """
        _check_length(layer, vector, self.tailored_size)
        if layer not in self._rings:
            self._rings[layer] = np.zeros((self.window, self.tailored_size), np.float32)
            self._counts[layer] = 0
        self._rings[layer][self._counts[layer] % self.window] = vector
        self._counts[layer] += 1

    def drop(self, layer: str) -> None:
        """Forget a layer: frozen layers need no history."""
        self._rings.pop(layer, None)
        self._counts.pop(layer, None)

    def length(self, layer: str) -> int:
        """How many timestamps of the layer are kept."""
        return min(self._counts.get(layer, 0), self.window)

    def is_finite(self, layer: str) -> bool:
        """Whether all that is kept of the layer is finite."""
        return bool(np.isfinite(self._rings[layer][: self.length(layer)]).all())

    def rows(self, layer: str) -> NDArray[np.float32]:
        """What is kept of a layer, oldest first, float32 `[length, tailored_size]`."""
        ring, count = self._rings[layer], self._counts[layer]
        return ring[:count].copy() if count <= self.window else np.roll(ring, -(count % self.window), axis=0)

    def windows(self, layers: list[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The predictor's two inputs for these layers.

        Args:
            layers: Names of layers that have a history.

        Returns:
            `history`, float32 `[layers, window, tailored_size]`, short histories left-padded with
            zeros, and `lengths`, int64 `[layers]`. The window is as long as the longest history.
        """
        lengths = np.array([self.length(layer) for layer in layers], np.int64)
        longest = int(lengths.max(initial=1))
        history = np.zeros((len(layers), longest, self.tailored_size), np.float32)
        for index, layer in enumerate(layers):
            history[index, longest - lengths[index] :] = self.rows(layer)
        return history, lengths

    def state_dict(self) -> dict[str, Any]:
        """What is kept, as one float32 array `[length, tailored_size]` a layer."""
        return {layer: self.rows(layer) for layer in self._rings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what is kept.

        Raises:
            ValueError: If a vector has another length.
        """
        self._rings, self._counts = {}, {}
        for layer, rows in state.items():
            for row in np.asarray(rows, np.float32)[-self.window :]:
                self.append(layer, row)


class Encodes(Protocol):
    """What `EncodedHistory` needs of an incremental `Predictor`."""

    @property
    def info(self) -> PredictorInfo:
        """Facts of the predictor."""
        ...

    def encode(self, history: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of records."""
        ...

    def advance(
        self,
        newest: NDArray[np.float32],
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
        lengths: NDArray[np.int64],
    ) -> Any:
        """Confidence, attention, and the keys and values of the newest records."""
        ...


class EncodedHistory:
    """Keeps what an incremental predictor made of every active layer's records, instead of the records.

    The same layers get the same answers as from a `WeightHistory`, since an encoding does not change
    when later records come. A layer's weights that are not finite leave NaN for as long as they would
    be in the window.

    Args:
        predictor: Encodes each record once.
    """

    def __init__(self, predictor: Encodes):
        self._predictor = predictor
        self._tailored_size = predictor.info.tailored_size
        # A step starts at the row before: that one is kept, and the first row of a window has no encoding.
        self._num_before = 1 if predictor.info.representation == "steps" else 0
        self._capacity = predictor.info.window - self._num_before
        self._encodings: dict[str, NDArray[np.float32]] = {}  # [length, 2, 64]: key and value, oldest first
        self._last: dict[str, NDArray[np.float32]] = {}  # [num_before, tailored_size]
        self._confidence: dict[str, float] = {}

    def record(self, vectors: Mapping[str, NDArray[np.float32]], *, ask: bool) -> None:
        """Add the newest tailored vectors.

        Args:
            vectors: Of each active layer, float32 `[tailored_size]`.
            ask: Whether it is a freezing stage: `confidence` has the answers then.

        Raises:
            ValueError: If a vector has another shape.
        """
        layers = list(vectors)
        for layer in layers:
            _check_length(layer, vectors[layer], self._tailored_size)
        newest = np.zeros((len(layers), self._num_before + 1, self._tailored_size), np.float32)
        for index, layer in enumerate(layers):
            newest[index, -1] = vectors[layer]
            if layer in self._last:
                newest[index, :-1] = self._last[layer]
        if ask:
            past, lengths = self._past(layers)
            confidence, _, keys, values = self._predictor.advance(newest, past[0], past[1], lengths)
            self._confidence = dict(zip(layers, confidence[:, 1].tolist(), strict=True))
        else:
            keys, values = self._predictor.encode(newest)
        encoded = np.stack([keys, values], axis=2)
        # Explicitly: a network may make finite numbers of NaN.
        encoded[~np.isfinite(newest).all(axis=(1, 2))] = np.nan
        for index, layer in enumerate(layers):
            if self._num_before and layer not in self._last:
                kept = np.zeros((0, 2, ENCODING_SIZE), np.float32)  # no step leads to a first record
            else:
                kept = np.concatenate([self._kept(layer), encoded[index]])
            self._encodings[layer] = kept
            self._last[layer] = newest[index, 1:].copy()

    def _kept(self, layer: str) -> NDArray[np.float32]:
        """Encodings that are still in the window when one more comes."""
        encodings = self._encodings.get(layer, np.zeros((0, 2, ENCODING_SIZE), np.float32))
        return encodings[max(0, len(encodings) + 1 - self._capacity) :]

    def _past(self, layers: list[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Keys and values, `[2, layers, past, 64]`, and how many records are real with the new one."""
        kept = [self._kept(layer) for layer in layers]
        longest = max(map(len, kept), default=0)
        past = np.zeros((2, len(layers), longest, ENCODING_SIZE), np.float32)
        lengths = np.empty(len(layers), np.int64)
        for index, (layer, encodings) in enumerate(zip(layers, kept, strict=True)):
            past[:, index, longest - len(encodings) :] = encodings.swapaxes(0, 1)
            lengths[index] = len(encodings) + 1 + (self._num_before if layer in self._last else 0)
        return past, lengths

    def confidence(self, layers: list[str]) -> dict[str, float]:
        """The answers of the newest record, if it asked: the confidence that each layer can be frozen."""
        return {layer: self._confidence[layer] for layer in layers}

    def drop(self, layer: str) -> None:
        """Forget a layer: frozen layers need no history."""
        self._encodings.pop(layer, None)
        self._last.pop(layer, None)

    def length(self, layer: str) -> int:
        """How many timestamps of the layer are kept."""
        return len(self._encodings[layer]) + self._num_before if layer in self._encodings else 0

    def is_finite(self, layer: str) -> bool:
        """Whether all that is kept of the layer is finite."""
        return bool(np.isfinite(self._encodings[layer]).all() and np.isfinite(self._last[layer]).all())

    def state_dict(self) -> dict[str, Any]:
        """What is kept, as one flat float32 array a layer: the last record, for `steps`, and the encodings."""
        return {
            layer: np.concatenate([self._last[layer].ravel(), encodings.ravel()])
            for layer, encodings in self._encodings.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what is kept.

        Raises:
            ValueError: If an array has another length.
        """
        before = self._num_before * self._tailored_size
        encodings, last = {}, {}
        for layer, values in state.items():
            flat = np.array(values, np.float32)
            if flat.ndim != 1 or len(flat) < before or (len(flat) - before) % (2 * ENCODING_SIZE):
                raise ValueError(
                    f"history for layer {layer!r} was saved with shape {flat.shape}; expected {before} numbers and a "
                    f"multiple of {2 * ENCODING_SIZE}. Load what state_dict() returned, with the same predictor."
                )
            last[layer] = flat[:before].reshape(self._num_before, self._tailored_size)
            encodings[layer] = flat[before:].reshape(-1, 2, ENCODING_SIZE)[-self._capacity :]
        self._encodings, self._last = encodings, last


def _check_length(layer: str, vector: NDArray[np.float32], tailored_size: int) -> None:
    if vector.shape != (tailored_size,):
        raise ValueError(
            f"history for layer {layer!r} holds vectors of length {tailored_size}: received shape {vector.shape}. Tailor "
            f"with tailored_size={tailored_size}."
        )
