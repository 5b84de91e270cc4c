"""How layers are judged, and from that to decisions. Pure: nothing here changes a model."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smartfrz.predictor.ordering import FreezeOrder, Ordering

# Records over which the heuristic that our predictor is compared with looks at the weights' change: 3 of 30 are
# a tenth of a run; between 3 and 10 of 60 it makes little difference.
CHANGE_RECORDS = 3

Action = Literal["freeze", "would_freeze", "keep", "thaw"]
Reason = Literal[
    "confident",  # frozen
    "below_threshold",
    "patience",  # confident, but not yet for as many stages in a row as asked
    "history_too_short",
    "no_answer",  # from the server that was asked
    "not_finite",  # the layer's weights hold NaN or infinity
    "behind_live_layer",  # freeze_order="prefix": a layer before it is still trained
    "grouped",  # confident, but waits for the next stage in which anything is frozen
    "last_active_layer",  # somebody has to keep learning, in each optimizer
    "by_hand",  # thawed
    "learning_rate_raised",  # thawed
    "moved_while_frozen",  # thawed: the training loop did not respect that it was frozen
]


class Policy:
    """Judges at every freezing stage how ready each layer is to be frozen. The learned predictor is one.

    This one knows nothing, and freezes nothing; others derive from it. What is frozen follows from their
    confidences by `decide`, for every policy alike. A policy object holds settings; each run works on a copy
    of it, which starts with `begin`.

    Where several processes train together, all of them call everything but `confidence`, in the same
    order; that one is called on the first process alone, and must change nothing.

    Attributes:
        name: For messages and reports.
        threshold: Confidence from which a layer is frozen, in (0, 1].
        record_fraction: Fraction of a run between two records; None if that does not follow from
            the run's length.
        decide_every: Records between two freezing stages.
        patience: Freezing stages in a row at which a layer must be confident.
        freeze_order: See `Ordering`.
        scales_learning_rates: Whether `lr_scales` has anything to say; the adapter needs `set_lr_scale`.
        reads_gradients: Whether the adapter needs `gradient_norm`.
    """

    name = "policy"
    threshold = 0.5
    record_fraction: float | None = 1 / 30
    decide_every = 1
    patience = 1
    freeze_order: FreezeOrder = "free"
    scales_learning_rates = False
    reads_gradients = False

    def settings(self) -> dict[str, Any]:
        """What tells this policy from others of its class: plain data."""
        return {}

    @property
    def sha256(self) -> str:
        """Which policy it is, with its settings: a saved run goes on with the same one only."""
        return hashlib.sha256(json.dumps([self.name, self.settings()], sort_keys=True).encode()).hexdigest()

    def record_every(self, total_steps: int | None) -> int | None:
        """Steps between two records in a run of this length; None if it does not follow from that.

        Raises:
            ValueError: If the policy cannot judge a run of unknown length.
        """
        if total_steps is None or self.record_fraction is None:
            return None
        return max(1, round(total_steps * self.record_fraction))

    def begin(self, adapter: Any, layers: Sequence[str], *, total_steps: int | None, seed: int) -> None:
        """Begin a run: set up all that changes in it. Nothing is changed in the model.

        Args:
            adapter: The model, as its framework's adapter shows it.
            layers: Those that may be frozen, in execution order.
            total_steps: Optimizer steps of the whole run, if known.
            seed: Of the run.

        Raises:
            UnsupportedModelError: If the adapter does not offer what the policy needs.
        """

    def record(self, active: list[str], *, ask: bool) -> None:
        """Look at the active layers; `ask` says that a freezing stage follows."""

    def excused(self, active: list[str]) -> dict[str, Reason]:
        """Layers that cannot be judged at this stage, with the reason."""
        return {}

    def confidence(self, layers: list[str], *, step: int) -> dict[str, float]:
        """How sure it is that freezing is right, in [0, 1], for active layers that are not excused.

        A layer that is left out is kept, for want of an answer.

        Args:
            layers: Their names, in execution order.
            step: Optimizer steps taken so far.
        """
        return dict.fromkeys(layers, 0.0)

    def lr_scales(self, active: list[str], *, step: int) -> dict[str, float]:
        """The factor on the learning rate of each of these layers in the step after this one; 1 where none is named."""
        return {}

    def drop(self, layer: str) -> None:
        """Forget a layer that was frozen."""

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """What it has recorded, as one array a layer."""
        return {}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace what it has recorded by what `state_dict` returned."""


def relative_change(now: NDArray[np.float32], before: NDArray[np.float32]) -> NDArray[np.float32]:
    """Relative change of weights, |now - before| / |now| in Euclidean norms over the last axis.

    Args:
        now: Weights, float `[..., n]`.
        before: The same weights, earlier.

    Returns:
        Of the dtype of the weights, `[...]`; large, but finite, where all weights are zero.
    """
    change: NDArray[np.float32] = np.linalg.norm(now - before, axis=-1) / (np.linalg.norm(now, axis=-1) + 1e-12)
    return change


@dataclass(frozen=True)
class FreezeDecision:
    """What was decided for one layer at one freezing stage, and why.

    Attributes:
        step: Optimizer steps taken so far.
        timestamp: Index of the newest record, from 0.
        layer: The layer's name.
        confidence: That freezing is right, in [0, 1], as the policy says; NaN if not asked.
        action: `freeze`, `would_freeze` (dry run), `keep` or `thaw`.
        reason: Why.
        threshold: The confidence that the layer had to reach at this stage; NaN if not asked.
    """

    step: int
    timestamp: int
    layer: str
    confidence: float
    action: Action
    reason: Reason
    threshold: float = float("nan")


def decide(
    active: Sequence[str],
    confidence: Mapping[str, float],
    excused: Mapping[str, Reason],
    streaks: Mapping[str, int],
    *,
    step: int,
    timestamp: int,
    ordering: Ordering,
    patience: int = 1,
    dry_run: bool = False,
    hold: bool = False,
    keep_one_of: Collection[Collection[str]] = (),
) -> tuple[list[FreezeDecision], dict[str, int]]:
    """Decide for every active layer.

    Args:
        active: Active layers in execution order.
        confidence: Of the layers that the policy was asked about and has an answer for, in [0, 1].
        excused: The other layers, with the reason.
        streaks: Stages in a row, before this one, at which a layer was confident.
        step: Optimizer steps taken so far.
        timestamp: Index of the newest record.
        ordering: All layers, and the confidence that each has to reach.
        patience: Stages in a row at which a layer must be confident.
        dry_run: Say `would_freeze` instead of `freeze`.
        hold: Freeze nothing at this stage; who is ready waits.
        keep_one_of: Groups of layers of which one has to stay active, such as those of one optimizer.

    Returns:
        One decision a layer, in the order of `active`, and the new streaks.

    Source:
        Paper, Eq. 4, which freezes where freezing has the higher confidence. Departures: threshold,
        patience and order; and the last active layer in execution order is always kept, as a model
        in which everything is frozen cannot be trained.
    """
    stopped = {layer for layer in ordering.layers if layer not in active}
    chosen: set[str] = set()
    # A frozen layer may lower the bar of another one, so decide again until nothing changes.
    for _ in active:
        bars = ordering.bars(stopped | chosen)
        confident = {layer: confidence.get(layer, -1.0) >= bars[layer] for layer in active}
        new_streaks = {layer: streaks.get(layer, 0) + 1 if confident[layer] else 0 for layer in active}
        kept: dict[str, Reason] = {}
        for layer in active:
            if layer in excused:
                kept[layer] = excused[layer]
            elif layer not in confidence:
                kept[layer] = "no_answer"
            elif not confident[layer]:
                kept[layer] = "below_threshold"
            elif new_streaks[layer] < patience:
                kept[layer] = "patience"
        for group in (active, *keep_one_of):
            members = [layer for layer in active if layer in group]
            if members and not any(layer in kept for layer in members):
                kept[members[-1]] = "last_active_layer"
        for layer in active:
            if layer not in kept and not ordering.may_freeze(layer, stopped | (set(active) - set(kept))):
                kept[layer] = "behind_live_layer"
        ready = set(active) - set(kept)
        if ready == chosen:
            break
        chosen = ready
    if hold:
        kept |= dict.fromkeys(chosen, "grouped")
    decisions = [
        FreezeDecision(
            step,
            timestamp,
            layer,
            confidence.get(layer, float("nan")),
            "keep" if layer in kept else "would_freeze" if dry_run else "freeze",
            kept.get(layer, "confident"),
            bars[layer] if layer in confidence else float("nan"),
        )
        for layer in active
    ]
    return decisions, new_streaks
