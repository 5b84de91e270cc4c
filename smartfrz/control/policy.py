"""`Policy`: how ready each layer is to be frozen. The learned predictor and the baselines derive from it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from smartfrz.control.decision import Reason
from smartfrz.control.ordering import FreezeOrder


class Policy:
    """Judges at every freezing stage how ready each layer is to be frozen. The learned predictor is one.

    This base class is never confident, and so freezes nothing; policies derive from it. `decide` turns the confidences
    of every policy into decisions in the same way. A policy object holds settings; each run works on a copy
    of it, which starts with `begin`.

    Where several processes train together, all of them call every method in the same order, except
    `confidence`: only the first process calls it, so it must change nothing.

    Attributes:
        name: For messages and reports.
        threshold: Confidence from which a layer is frozen, in (0, 1].
        record_fraction: Fraction of a run between two records; None if that does not follow from
            the run's length.
        decide_every: Records between two freezing stages.
        patience: Freezing stages in a row at which a layer must be confident.
        freeze_order: See `Ordering`.
        scales_learning_rates: Whether the policy uses `lr_scales`; the adapter then needs `set_lr_scale`.
        reads_gradients: Whether the adapter needs `gradient_norm`.
        compares_gradients: Whether the adapter needs `gradient_changes`.
        waits_for_weights: Whether recording reads weights, which on a GPU takes until the next step; the controller then
            asks after that step.
        reads_loss: Whether the policy reads the training loss; the controller then passes it to `note_loss`.
        has_budget: Whether the policy is asked less often where its answers take too large a part of the run.
    """

    name = "policy"
    threshold = 0.5
    record_fraction: float | None = 1 / 30
    decide_every = 1
    patience = 1
    freeze_order: FreezeOrder = "free"
    scales_learning_rates = False
    reads_gradients = False
    compares_gradients = False
    reads_loss = False
    has_budget = False
    waits_for_weights = False

    def settings(self) -> dict[str, Any]:
        """Return the settings that distinguish this policy from others of its class: plain data."""
        return {}

    def threshold_of(self, quality: str) -> float:
        """Return the threshold that a quality stands for; see `smartfrz.control.quality`.

        Raises:
            ValueError: If what the policy costs was never measured.
        """
        raise ValueError(
            f"`quality` is {quality!r}, but what freezing with {self.name!r} costs was never measured. Pass `threshold` "
            "instead, or a predictor that was calibrated with smartfrz-build calibrate."
        )

    @property
    def sha256(self) -> str:
        """Digest of the policy and its settings. A saved run only continues with an equal one."""
        return hashlib.sha256(json.dumps([self.name, self.settings()], sort_keys=True).encode()).hexdigest()

    def record_every(self, total_steps: int | None) -> int | None:
        """Return the steps between two records in a run of this length; None if it does not follow from that.

        Raises:
            ValueError: If the policy cannot judge a run of unknown length.
        """
        if total_steps is None or self.record_fraction is None:
            return None
        return max(1, round(total_steps * self.record_fraction))

    def begin(self, adapter: Any, layers: Sequence[str], *, total_steps: int | None, seed: int) -> None:
        """Begin a run: set up everything that changes during it. The model stays as it is.

        Args:
            adapter: The model, as its framework's adapter shows it.
            layers: The layers that may be frozen, in execution order.
            total_steps: Optimizer steps of the whole run, if known.
            seed: Seed of the run.

        Raises:
            UnsupportedModelError: If the adapter does not offer what the policy needs.
        """

    def layers_changed(self, layers: Sequence[str]) -> None:
        """Go on with these layers, in execution order: some are new, or some are not trained any more."""

    def note_loss(self, loss: Any, weight: int = 1) -> None:
        """Take the training loss of one step, if `reads_loss` is true. Each process has its own.

        Args:
            loss: A float, or a scalar on a device that reads it later, as a policy that `waits_for_weights` does. Between
                two records nobody waits for the device.
            weight: The number of losses of which it is the mean.
        """

    def record(self, active: list[str], *, ask: bool) -> None:
        """Record the active layers. `ask` is true if a freezing stage follows."""

    def excused(self, active: list[str]) -> dict[str, Reason]:
        """Return the layers that cannot be judged at this stage, with the reason."""
        return {}

    def confidence(self, layers: list[str], *, step: int) -> dict[str, float]:
        """Return the confidence, in [0, 1], that freezing is right, for active layers that are not excused.

        A layer without a confidence is kept, with the reason `no_answer`.

        Args:
            layers: Names of these layers, in execution order.
            step: Optimizer steps taken so far.
        """
        return dict.fromkeys(layers, 0.0)

    def lr_scales(self, active: list[str], *, step: int) -> dict[str, float]:
        """Return factors on the learning rates of layers for the next step; a layer without one keeps its rate."""
        return {}

    def drop(self, layer: str) -> None:
        """Forget a layer that froze."""

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return what was recorded, one array for each layer."""
        return {}

    def check_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Raise `StateError` if `load_state_dict` could not use this. Nothing is changed."""

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace what was recorded by what `state_dict` returned."""
