"""GradES: freezes each layer once its gradient hardly changes from one step to the next."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartfrz.control.policy import Policy

_HALF = math.nextafter(0.5, 0.0)  # less than the threshold, where rounding would reach it


class GradES(Policy):
    """Freezes a layer at the first stage after its gradient changed by less than `tau` from one step to the next.

    The change of a weight matrix at a step is the L1 norm, the sum of absolute values, of its gradient less its gradient
    at the step before. It is measured at every step, and counts from the end of a grace period on. A layer with
    several matrices freezes when each of them fell below `tau` since the last stage. This keeps a copy of all gradients,
    in memory and in saved states.

    Args:
        tau: The threshold. The norm grows with the number of weights and depends on loss, batch and clipping, so there is
            no value for all models.
        alpha: The grace period, as a fraction of the run: nothing freezes at stages before its end.
        relative: Whether `tau` is a share of the largest change of the layer, among the smallest since each stage, so that
            one value may suit several models. This is ours.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Wen et al. 2025 (arXiv 2509.01842, version 3) and their code. The versions differ: the first one compares the norm
        of the gradient itself with tau, the later ones the norm of its change, as here. Their published code
        reads no gradient: it compares with tau the L1 norm of the change of the *weights* since the last step, so that
        its tau, such as 2.4 for full fine-tuning and 0.02 for LoRA, has another scale. (`WeightChange` is our rule of
        that kind.) Their freezing is static, and so is this: a frozen layer stays frozen unless it is thawed by hand.
        Departures: the unit is SmartFRZ's layer, which may hold biases, a norm or several matrices,
        where theirs is a single matrix and, of LoRA, the two factors, whose norms they add up; all layers of the network
        count, not the attention and feed-forward matrices of a decoder only; layers freeze at 30 stages of the run, at
        which the smallest change since the last stage counts (`record_every=1` freezes at once), so that the
        first stage after the grace period may count steps of its last interval; one layer of each optimizer is kept, and
        training goes on to its end where theirs stops once everything is frozen.
    """

    name = "grades"
    compares_gradients = True

    def __init__(self, tau: float, *, alpha: float = 0.5, relative: bool = False):
        if not 0.0 < tau < math.inf:
            raise ValueError(f"`tau` is {tau!r}; expected a positive number, the L1 norm of a change of gradients.")
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"`alpha` is {alpha!r}; expected a fraction of the run in [0, 1), such as 0.5.")
        self.tau = float(tau)
        self.alpha = float(alpha)
        self.relative = bool(relative)

    def settings(self) -> dict[str, Any]:
        """Return all arguments."""
        return {"tau": self.tau, "alpha": self.alpha, "relative": self.relative}

    def record_every(self, total_steps: int | None) -> int | None:
        """Return a 30th of the run.

        Raises:
            ValueError: If the run's length is not known, and there is a grace period.
        """
        if total_steps is None and self.alpha:
            raise ValueError(
                f"GradES freezes nothing in the first {self.alpha:.0%} of the run, and received no `total_steps`; expected "
                "the optimizer steps of the whole run. Pass total_steps=len(loader) * epochs, or GradES(alpha=0)."
            )
        return super().record_every(total_steps)

    def begin(self, adapter: Any, layers: Sequence[str], *, total_steps: int | None, seed: int) -> None:
        """Forget all changes."""
        self._adapter = adapter
        self._grace = int(self.alpha * (total_steps or 0))
        self._changes: dict[str, float] = {}
        self._largest: dict[str, float] = {}

    def record(self, active: list[str], *, ask: bool) -> None:
        """Read the changes since the last stage."""
        if not ask:
            return
        self._changes = dict(self._adapter.gradient_changes(active))
        if self.relative:
            known = {layer: change for layer, change in self._changes.items() if math.isfinite(change)}
            self._largest |= {layer: max(change, self._largest.get(layer, 0.0)) for layer, change in known.items()}

    def confidence(self, layers: list[str], *, step: int) -> dict[str, float]:
        """Return `tau / (tau + change)`, which is above 0.5, the threshold, if the change is below tau; 0 in the grace."""
        if step < self._grace:
            return dict.fromkeys(layers, 0.0)
        return {layer: _readiness(self._changes.get(layer, math.inf), self._tau(layer)) for layer in layers}

    def _tau(self, layer: str) -> float:
        return self.tau * self._largest.get(layer, 0.0) if self.relative else self.tau

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the largest change of each layer, float64 `[1]`; nothing unless `relative`."""
        return {layer: np.array([change], np.float64) for layer, change in self._largest.items()}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace the largest changes."""
        self._largest = {layer: float(change[0]) for layer, change in state.items()}


def _readiness(change: float, tau: float) -> float:
    """Return a confidence of at least 0.5 if, and only if, the change is below tau."""
    if change < tau:
        return tau / (tau + change)
    return min(tau / (tau + change), _HALF) if math.isfinite(change) and tau else 0.0
