"""The weight history of the active layers: the last `window` tailored vectors of each."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class WeightHistory:
    """Keeps the newest `window` tailored vectors of every active layer.

    Args:
        window: Number of timestamps that are kept.
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
        """Return how many timestamps of the layer are kept."""
        return min(self._counts.get(layer, 0), self.window)

    def is_finite(self, layer: str) -> bool:
        """Return whether everything that is kept of the layer is finite."""
        return bool(np.isfinite(self._rings[layer][: self.length(layer)]).all())

    def rows(self, layer: str) -> NDArray[np.float32]:
        """Return the kept vectors of a layer, oldest first, float32 `[length, tailored_size]`."""
        ring, count = self._rings[layer], self._counts[layer]
        return ring[:count].copy() if count <= self.window else np.roll(ring, -(count % self.window), axis=0)

    def windows(self, layers: list[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the predictor's two inputs for these layers.

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
        """Return what is kept: one float32 array `[length, tailored_size]` per layer."""
        return {layer: self.rows(layer) for layer in self._rings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything that is kept.

        Raises:
            ValueError: If a vector has another length.
        """
        self._rings, self._counts = {}, {}
        for layer, rows in state.items():
            for row in np.asarray(rows, np.float32)[-self.window :]:
                self.append(layer, row)


def _check_length(layer: str, vector: NDArray[np.float32], tailored_size: int) -> None:
    if vector.shape != (tailored_size,):
        raise ValueError(
            f"history for layer {layer!r} holds vectors of length {tailored_size}: received shape {vector.shape}. Tailor "
            f"with tailored_size={tailored_size}."
        )
