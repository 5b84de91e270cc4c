"""AutoFreeze: freezes layers, front to back, whose gradient norms change less than others."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartfrz.control.decision import Reason
from smartfrz.control.policy import Policy


class AutoFreeze(Policy):
    """Freezes the layers before the first one whose gradient norm changes as much as the given percentile.

    Between two evaluations all gradients of a layer are added up. What counts is the change of the sum's L1
    norm since the last evaluation, relative to that norm. This keeps a copy of all gradients, in memory and in
    saved states.

    Args:
        intervals_per_epoch: How often layers are evaluated, M in the paper.
        percentile: The percentile of the changes of all active layers, in (0, 100), N in the paper.
        epochs: Number of epochs of the whole run; the length of an interval then follows from `total_steps`.
        steps_per_epoch: Optimizer steps of an epoch, instead of `epochs`.

    Raises:
        ValueError: If a number is out of range, or not exactly one of `epochs` and `steps_per_epoch`
            is given.

    Source:
        Liu et al. 2021 (arXiv 2102.01386) and their code; paper, Appendix B, whose best setting is
        the default here. Departures: gradients count once for each optimizer step, as the optimizer
        gets them; the optimizer is kept instead of replaced; a change that is not finite counts
        as above the percentile; the rule runs over all layers of the network, not over the blocks of
        BERT; and neither activations are cached nor evaluations run on held-out data.
    """

    name = "autofreeze"
    freeze_order = "prefix"
    reads_gradients = True

    def __init__(
        self,
        *,
        intervals_per_epoch: int = 4,
        percentile: float = 50.0,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
    ):
        if not 0.0 < percentile < 100.0:
            raise ValueError(f"`percentile` is {percentile!r}; expected a number in (0, 100), such as 50.")
        if (epochs is None) == (steps_per_epoch is None):
            raise ValueError(
                f"AutoFreeze evaluates layers {intervals_per_epoch} times an epoch, and received epochs={epochs} and "
                f"steps_per_epoch={steps_per_epoch}; expected one of them. Pass epochs=, with total_steps= for SmartFRZ, "
                "or steps_per_epoch=len(loader)."
            )
        counts = {"intervals_per_epoch": intervals_per_epoch, "epochs": epochs, "steps_per_epoch": steps_per_epoch}
        for name, value in counts.items():
            if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; expected an integer of at least 1.")
        self.intervals_per_epoch = int(intervals_per_epoch)
        self.percentile = float(percentile)
        self.epochs = None if epochs is None else int(epochs)
        self.steps_per_epoch = None if steps_per_epoch is None else int(steps_per_epoch)
        self.record_fraction = None if epochs is None else 1.0 / (int(epochs) * self.intervals_per_epoch)

    def settings(self) -> dict[str, Any]:
        """Return all arguments."""
        names = ("intervals_per_epoch", "percentile", "epochs", "steps_per_epoch")
        return {name: getattr(self, name) for name in names}

    def record_every(self, total_steps: int | None) -> int | None:
        """Return the steps of an interval.

        Raises:
            ValueError: If only the number of epochs is known, and not the length of the run.
        """
        if self.steps_per_epoch is not None:
            return max(1, round(self.steps_per_epoch / self.intervals_per_epoch))
        if total_steps is None:
            raise ValueError(
                f"AutoFreeze(epochs={self.epochs}) received no `total_steps`, and does not know how long an epoch is. Pass "
                "total_steps=len(loader) * epochs to SmartFRZ, or AutoFreeze(steps_per_epoch=len(loader))."
            )
        return super().record_every(total_steps)

    def begin(self, adapter: Any, layers: Sequence[str], *, total_steps: int | None, seed: int) -> None:
        """Forget all norms."""
        self._adapter = adapter
        self._norms: dict[str, list[float]] = {}

    def record(self, active: list[str], *, ask: bool) -> None:
        """Keep the norms of this interval and of the one before."""
        self._norms = {
            layer: [*self._norms.get(layer, [])[-1:], self._adapter.gradient_norm(layer)] for layer in active
        }

    def excused(self, active: list[str]) -> dict[str, Reason]:
        """Return layers with the norm of one interval only: all layers at first, later layers that were thawed."""
        return {layer: "history_too_short" for layer in active if len(self._norms.get(layer, [])) < 2}

    def confidence(self, layers: list[str], *, step: int) -> dict[str, float]:
        """Return 1 for layers whose change is below the percentile, else 0."""
        changes = [_change(*self._norms[layer]) for layer in layers]
        finite = [change for change in changes if math.isfinite(change)]
        limit = float(np.percentile(finite, self.percentile)) if finite else 0.0
        return {layer: float(change < limit) for layer, change in zip(layers, changes, strict=True)}

    def drop(self, layer: str) -> None:
        """Forget the norms of a layer that was frozen."""
        self._norms.pop(layer, None)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the norms of each layer, float64 `[2]`, or `[1]` after the first interval."""
        return {layer: np.array(norms, np.float64) for layer, norms in self._norms.items()}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace the norms."""
        self._norms = {layer: [float(norm) for norm in norms] for layer, norms in state.items()}


def _change(before: float, now: float) -> float:
    """Return the relative change of a norm; infinity if it is undefined and something changed."""
    if not (math.isfinite(before) and math.isfinite(now)):
        return math.inf
    if before == 0.0:
        return 0.0 if now == 0.0 else math.inf
    return abs(before - now) / before
