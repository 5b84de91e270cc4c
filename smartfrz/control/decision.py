"""From confidences to decisions. Pure: nothing here changes a model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smartfrz.control.ordering import Ordering

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
