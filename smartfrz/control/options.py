"""When a run records and decides, and how: what the user may choose, and what follows from the policy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from smartfrz.control.ordering import ORDERS, FreezeOrder
from smartfrz.control.policy import Policy
from smartfrz.control.quality import require_quality

# Where a change of the frozen set has the model compiled again, which takes seconds to minutes, at most
# this many freezing stages of a run freeze anything.
COMPILED_STAGES = 4

T = TypeVar("T")


class Schedule(NamedTuple):
    """When a run records and decides, and how, with nothing left open.

    Attributes:
        record_every: Steps between two records.
        decide_every: Records between two freezing stages.
        threshold: Confidence from which a layer is frozen.
        patience: Number of freezing stages in a row at which a layer must be confident.
        freeze_order: See `Ordering`.
    """

    record_every: int
    decide_every: int
    threshold: float
    patience: int
    freeze_order: FreezeOrder


@dataclass(frozen=True)
class FreezeOptions:
    """The options of a run; keyword arguments of `SmartFRZ` in every framework.

    What is None follows from the policy; the learned predictors decide at every second record, with a patience of 2.

    Attributes:
        total_steps: Optimizer steps of the whole run, `len(loader) * epochs`. `record_every` follows from it, so
            that the run has as many records as the runs that the predictor was trained on. The callbacks of training
            frameworks take it from the framework.
        record_every: Steps between two records of the weights.
        decide_every: Records between two freezing stages.
        threshold: Confidence from which a layer is frozen, in (0, 1].
        quality: What the run may pay for the time that it saves, instead of `threshold`: `"same"` is expected to cost
            no accuracy, `"balanced"` half a percentage point, `"fast"` one and a half. The card of a predictor says
            what these meant on runs that it had never seen; a predictor that was not calibrated has none of them.
        patience: Number of freezing stages in a row at which a layer must be confident. The thresholds of the zoo
            are calibrated for a patience of 2.
        dry_run: Decide, log and report, but freeze nothing.
        seed: Seed of the positions at which weights are sampled; the same one in every process.
        norm_batches: Number of batches before a freezing stage over which the statistics of a frozen batch norm are
            averaged. 0 keeps its running statistics as they are.
        freeze_order: `"free"`: freeze wherever the policy is confident, as in the paper. `"prefix"`: freeze front to
            back only. `"cost_aware"`: freeze a layer at a lower confidence if that would save much time now, and at a
            higher one if it would save little. PyTorch measures for that what each layer costs, in the second to
            fourth training step, which take about twice as long; Keras estimates it from shapes.
        thaw_on_restart: Thaw every layer when the learning rate rises above twice its lowest value since layers
            froze, as in warm restarts.
        verbose: Write one line at each freezing stage, and in the callbacks the report at the end of training. The lines
            go to the logger `smartfrz` (level INFO) where logging is set up to show that, else to standard error.

    Raises:
        ValueError: If a value is out of range.
    """

    total_steps: int | None = None
    record_every: int | None = None
    decide_every: int | None = None
    threshold: float | None = None
    patience: int | None = None
    dry_run: bool = False
    seed: int = 0
    norm_batches: int = 24
    freeze_order: FreezeOrder | None = None
    thaw_on_restart: bool = False
    verbose: bool = True
    quality: str | None = None  # the last one, so that those before it keep their places

    def __post_init__(self) -> None:
        if self.freeze_order is not None:
            _require_order(self.freeze_order)
        for name in ("total_steps", "record_every", "decide_every", "patience"):
            value = getattr(self, name)
            if value is not None and (not _is_integer(value) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; expected an integer of at least 1.")
        if self.threshold is not None:
            _require_confidence(self.threshold)
        if self.quality is not None:
            require_quality(self.quality)
            if self.threshold is not None:
                raise ValueError(
                    f"received both `quality`, {self.quality!r}, and `threshold`, {self.threshold!r}, which a quality "
                    "stands for. Pass one of them."
                )
        if not _is_integer(self.norm_batches) or self.norm_batches < 0:
            raise ValueError(f"`norm_batches` is {self.norm_batches!r}; expected 0 or more batches.")
        if not _is_integer(self.seed) or self.seed < 0:
            raise ValueError(f"`seed` is {self.seed!r}; expected an integer of at least 0.")

    def schedule(self, policy: Policy) -> Schedule:
        """Return what the user chose, and else what follows from the policy and the length of the run.

        Raises:
            ValueError: If neither `total_steps` nor `record_every` is given and the policy does not know either, or
                if the policy's own values are out of range, or it was not calibrated for the quality.
        """
        # Ask the policy in any case: it may refuse a run of unknown length.
        record_every = _first(self.record_every, policy.record_every(self.total_steps))
        if record_every is None:
            raise ValueError(
                "SmartFRZ needs to know how long the run is: received neither `total_steps` nor `record_every`. Pass "
                "total_steps=len(loader) * epochs."
            )
        # Not NumPy's numbers: torch.load(weights_only=True) refuses those.
        chosen = Schedule(
            int(record_every),
            int(_first(self.decide_every, policy.decide_every)),
            float(_first(self._threshold(policy), policy.threshold)),
            int(_first(self.patience, policy.patience)),
            _first(self.freeze_order, policy.freeze_order),
        )
        _require_confidence(chosen.threshold)
        _require_order(chosen.freeze_order)
        return chosen

    def _threshold(self, policy: Policy) -> float | None:
        return self.threshold if self.quality is None else policy.threshold_of(self.quality)

    def continuing(
        self, policy: Policy, saved: Mapping[str, Any], total_steps: int | None
    ) -> tuple[Schedule, int | None]:
        """Return how a run goes on that was saved: as the user chose now, and else as it was saved.

        `record_every` follows the length of the run, unless it was chosen then or is now.

        Args:
            policy: The policy of the run.
            saved: The fields of the run's `Schedule`.
            total_steps: The length of the run, as it was saved.

        Returns:
            The schedule, and the length of the run.
        """
        length = _first(self.total_steps, total_steps)
        record_every = saved["record_every"]
        if length != total_steps and record_every == policy.record_every(total_steps):
            record_every = _first(policy.record_every(length), record_every)
        schedule = Schedule(
            int(_first(self.record_every, record_every)),
            int(_first(self.decide_every, saved["decide_every"])),
            float(_first(self._threshold(policy), saved["threshold"])),
            int(_first(self.patience, saved["patience"])),
            _first(self.freeze_order, saved["freeze_order"]),
        )
        return schedule, None if length is None else int(length)


def _first(given: T | None, otherwise: T) -> T:
    """Return what was given, or else the other value."""
    return otherwise if given is None else given


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _require_confidence(threshold: float) -> None:
    if not isinstance(threshold, (int, float, np.number)) or not 0 < threshold <= 1:
        raise ValueError(f"`threshold` is {threshold!r}; expected a confidence in (0, 1].")


def _require_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"`freeze_order` is {order!r}; expected one of {', '.join(ORDERS)}.")


def stages_apart(policy: Policy, total_steps: int | None, record_every: int, decide_every: int) -> int:
    """Return how many freezing stages pass for each one at which anything is frozen, if the model is compiled.

    At most `COMPILED_STAGES` stages of the run then freeze anything.

    Args:
        policy: Tells how many records a run has if its length is unknown. If it cannot, the answer is 1.
        total_steps: Optimizer steps of the whole run, if known.
        record_every: Steps between two records.
        decide_every: Records between two freezing stages.
    """
    records = 1.0 if policy.record_fraction is None else 1.0 / policy.record_fraction
    if total_steps is not None:
        records = total_steps / record_every
    return max(1, math.ceil(records / decide_every / COMPILED_STAGES))
