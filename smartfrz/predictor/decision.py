"""From confidences to decisions. Pure: nothing here changes a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Action = Literal["freeze", "would_freeze", "keep"]
Reason = Literal[
    "confident",  # frozen
    "below_threshold",
    "patience",  # confident, but not yet for as many stages in a row as asked
    "history_too_short",
    "not_finite",  # the layer's weights hold NaN or infinity
    "last_active_layer",  # somebody has to keep learning
]


@dataclass(frozen=True)
class FreezeDecision:
    """What was decided for one layer at one freezing stage, and why.

    Attributes:
        step: Optimizer steps taken so far.
        timestamp: Index of the newest record, from 0.
        layer: The layer's name.
        confidence: The predictor's confidence that freezing is right, in [0, 1]; NaN if not asked.
        action: `freeze`, `would_freeze` (dry run) or `keep`.
        reason: Why.
    """

    step: int
    timestamp: int
    layer: str
    confidence: float
    action: Action
    reason: Reason


def decide(
    active: Sequence[str],
    confidence: Mapping[str, float],
    excused: Mapping[str, Reason],
    streaks: Mapping[str, int],
    *,
    step: int,
    timestamp: int,
    threshold: float,
    patience: int = 1,
    dry_run: bool = False,
) -> tuple[list[FreezeDecision], dict[str, int]]:
    """Decide for every active layer.

    Args:
        active: Active layers in execution order.
        confidence: Of the layers that the predictor was asked about, in [0, 1].
        excused: The other layers, with the reason.
        streaks: Stages in a row, before this one, at which a layer was confident.
        step: Optimizer steps taken so far.
        timestamp: Index of the newest record.
        threshold: Confidence from which a layer is ready.
        patience: Stages in a row at which it must be.
        dry_run: Say `would_freeze` instead of `freeze`.

    Returns:
        One decision a layer, in the order of `active`, and the new streaks.

    Source:
        Paper, Eq. 4, which freezes where freezing has the higher confidence. Departure: threshold
        and patience; and the last active layer in execution order is always kept, as a model in
        which everything is frozen cannot be trained.
    """
    new_streaks = {
        layer: streaks.get(layer, 0) + 1 if confidence.get(layer, -1.0) >= threshold else 0 for layer in active
    }
    decisions: list[FreezeDecision] = []
    for layer in active:
        reason: Reason
        if layer in excused:
            reason = excused[layer]
        elif not new_streaks[layer]:
            reason = "below_threshold"
        elif new_streaks[layer] < patience:
            reason = "patience"
        elif layer == active[-1] and all(d.action != "keep" for d in decisions):
            reason = "last_active_layer"
        else:
            reason = "confident"
        action: Action = "keep"
        if reason == "confident":
            action = "would_freeze" if dry_run else "freeze"
        decisions.append(FreezeDecision(step, timestamp, layer, confidence.get(layer, float("nan")), action, reason))
    return decisions, new_streaks
