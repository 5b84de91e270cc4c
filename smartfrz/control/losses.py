"""The training loss as predictors read it: its mean over the steps between two records."""

import math
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartfrz.errors import StateError

_LARGEST = float(np.finfo(np.float32).max)


class LossCurve:
    """Keeps the mean loss of the steps that led to each of the newest records. All layers share it.

    A mean is NaN, which stands for "not known", if there was no loss, or if it is zero or not finite. While one in the
    window is below zero, none is known: ratios of numbers of both signs mean nothing, and a loss on its way through zero
    would pass for one that has fallen far.

    Args:
        window: Number of records that are kept.
    """

    def __init__(self, window: int):
        self._window = window
        self._means: deque[float] = deque(maxlen=window)
        self._sum: Any = 0.0
        self._count = 0

    def add(self, loss: Any, weight: int = 1) -> None:
        """Add the mean of `weight` losses: a float, or a scalar on a device, which is not waited for."""
        self._sum = self._sum + (loss if weight == 1 else weight * loss)
        self._count += weight

    def take_mean(self) -> Any:
        """Return the mean of what was added since the last call: a float, or a scalar on the device of the losses."""
        mean = self._sum / self._count if self._count else math.nan
        self._sum, self._count = 0.0, 0
        return mean

    def append(self, mean: float) -> None:
        """Add the mean that belongs to the newest record."""
        self._means.append(mean if 0 < abs(mean) <= _LARGEST else math.nan)

    def windows(self, lengths: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return the mean before each record of histories that end at the newest one.

        Args:
            lengths: Records of each layer's history, int64 `[layers]`.

        Returns:
            float32 `[layers, window]`, left-padded with NaN. The window is as long as the longest history. None if no
            loss is known, or if one in the window is below zero.
        """
        longest = int(lengths.max(initial=1))
        row = np.full(longest, np.nan, np.float32)
        known = list(self._means)[-longest:]
        row[longest - len(known) :] = known
        if (row < 0).any():
            return None
        losses = np.where(np.arange(longest) >= longest - lengths[:, None], row, np.float32(np.nan))
        return None if np.isnan(losses).all() else losses

    def state(self) -> NDArray[np.float64]:
        """Return sum and number of the losses since the newest record, and the means, oldest first: float64 `[2 + n]`."""
        return np.array([float(self._sum), self._count, *self._means])

    def check_state(self, state: NDArray[Any]) -> None:
        """Raise `StateError` if `state` did not return this."""
        fine = state.ndim == 1 and state.dtype.kind == "f" and 2 <= len(state) <= 2 + self._window
        if fine:
            count, sizes = state[1], np.abs(state[2:])
            known = sizes[~np.isnan(sizes)]
            fine = bool(0 <= count < 2**53 and count == np.floor(count) and ((known > 0) & (known <= _LARGEST)).all())
        if not fine:
            shown = " ".join(repr(state).split())
            raise StateError(
                f"The saved state is damaged: the training losses are {shown:.100}; expected a sum, a number of steps, and "
                f"up to {self._window} means that are neither zero nor infinite. Resume from another checkpoint, or start "
                "without a state."
            )

    def load_state(self, state: NDArray[Any]) -> None:
        """Replace what is kept by what `state` returned."""
        total, count, *means = state.tolist()
        self._sum, self._count = total, int(count)
        self._means = deque(means, maxlen=self._window)
