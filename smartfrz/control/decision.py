"""`decide`: turns confidences into decisions. Pure: nothing here changes a model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smartfrz.control.ordering import Ordering

Action = Literal["freeze", "would_freeze", "keep", "thaw"]
Reason = Literal[
    "confident",  # frozen
    "below_threshold",
    "patience",  # confident, but not yet at enough stages in a row
    "history_too_short",
    "no_answer",  # the predictor's server did not answer
    "not_finite",  # the layer's weights hold NaN or infinity
    "behind_live_layer",  # freeze_order="prefix": a layer before it is still trained
    "grouped",  # ready, but nothing is frozen at this stage
    "last_active_layer",  # one layer of each optimizer has to keep learning
    "by_hand",  # thawed
    "learning_rate_raised",  # thawed
    "moved_while_frozen",  # thawed, and not frozen again: the training loop changed it although it was frozen
    "unfrozen_by_user",  # thawed: somebody set requires_grad or trainable again
    "not_trained",  # no optimizer trains it, its learning rate is 0, or it has never moved
]


@dataclass(frozen=True)
class FreezeDecision:
    """What was decided for one layer at one freezing stage, and why.

    Attributes:
        step: Optimizer steps taken so far.
        timestamp: Index of the newest record, from 0.
        layer: The layer's name.
        confidence: The policy's confidence that freezing is right, in [0, 1]; NaN if it was not asked.
        action: `freeze`, `would_freeze` (dry run), `keep` or `thaw`.
        reason: Why.
        threshold: The confidence that the layer had to reach at this stage; NaN if the policy was not asked.
        since: Where a layer is thawed that was trained or moved while it counted as frozen: the last step at which it
            was seen to stand still. From there on it counts as trained.
    """

    step: int
    timestamp: int
    layer: str
    confidence: float
    action: Action
    reason: Reason
    threshold: float = float("nan")
    since: int | None = None


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
        confidence: The policy's confidence, in [0, 1], in each layer that it judged.
        excused: Layers that the policy could not judge, with the reason.
        streaks: Number of stages in a row, before this one, at which each layer was confident.
        step: Optimizer steps taken so far.
        timestamp: Index of the newest record.
        ordering: All layers, and the confidence that each has to reach.
        patience: Number of stages in a row at which a layer must be confident.
        dry_run: Say `would_freeze` instead of `freeze`.
        hold: Freeze nothing at this stage; layers that are ready wait.
        keep_one_of: Groups of layers, such as the layers of one optimizer. One layer of each group stays active.

    Returns:
        One decision for each layer, in the order of `active`, and the new streaks.

    Source:
        Paper, Eq. 4, which freezes where freezing has the higher confidence. Departures: threshold,
        patience and order; and the last active layer in execution order is always kept, as a model
        in which everything is frozen cannot be trained.
    """
    stage = _Stage(active, confidence, excused, streaks, ordering, patience, keep_one_of)
    verdict = _settle(stage.judge, rounds=len(active))
    kept = verdict.kept | (dict.fromkeys(verdict.ready, "grouped") if hold else {})
    decisions = [
        FreezeDecision(
            step,
            timestamp,
            layer,
            confidence.get(layer, float("nan")),
            "keep" if layer in kept else "would_freeze" if dry_run else "freeze",
            kept.get(layer, "confident"),
            verdict.bars[layer] if layer in confidence else float("nan"),
        )
        for layer in active
    ]
    return decisions, verdict.streaks


@dataclass(frozen=True)
class _Verdict:
    """What a stage decides, given the layers that are assumed to freeze at it.

    Attributes:
        bars: The confidence that each layer has to reach.
        streaks: Number of stages in a row, including this one, at which each layer was confident.
        kept: The layers that stay active, with the reason.
        ready: The layers that freeze.
    """

    bars: Mapping[str, float]
    streaks: dict[str, int]
    kept: dict[str, Reason]
    ready: frozenset[str]


def _settle(judge: Callable[[frozenset[str]], _Verdict], rounds: int) -> _Verdict:
    """Judge until the verdict no longer changes: a layer that freezes may lower the bar of another one.

    The verdict of the last round counts where it goes on changing.
    """
    verdict = judge(frozenset())
    for _ in range(rounds - 1):
        before, verdict = verdict, judge(verdict.ready)
        if verdict.ready == before.ready:
            break
    return verdict


@dataclass(frozen=True)
class _Stage:
    """What is known at one freezing stage: the arguments of `decide` that bear on which layers freeze."""

    active: Sequence[str]
    confidence: Mapping[str, float]
    excused: Mapping[str, Reason]
    streaks: Mapping[str, int]
    ordering: Ordering
    patience: int
    keep_one_of: Collection[Collection[str]]

    def judge(self, freezing: frozenset[str]) -> _Verdict:
        """Return the verdict if the layers `freezing` freeze at this stage."""
        stopped = set(self.ordering.layers).difference(self.active)
        bars = self.ordering.bars(stopped | freezing)
        streaks = {layer: self._streak(layer, bars[layer]) for layer in self.active}
        kept = self._not_ready(streaks)
        for group in (self.active, *self.keep_one_of):
            kept |= self._last_of(group, kept)
        kept |= self._blocked(stopped, kept)
        return _Verdict(bars, streaks, kept, frozenset(self.active).difference(kept))

    def _streak(self, layer: str, bar: float) -> int:
        return self.streaks.get(layer, 0) + 1 if self.confidence.get(layer, -1.0) >= bar else 0

    def _not_ready(self, streaks: Mapping[str, int]) -> dict[str, Reason]:
        """Return the layers that cannot freeze for a reason of their own."""
        reasons = {layer: self._reason_to_wait(layer, streaks[layer]) for layer in self.active}
        return {layer: reason for layer, reason in reasons.items() if reason is not None}

    def _reason_to_wait(self, layer: str, streak: int) -> Reason | None:
        if layer in self.excused:
            return self.excused[layer]
        if layer not in self.confidence:
            return "no_answer"
        if streak == 0:
            return "below_threshold"
        return "patience" if streak < self.patience else None

    def _last_of(self, group: Collection[str], kept: Mapping[str, Reason]) -> dict[str, Reason]:
        """Return the last active layer of a group all of whose layers would freeze."""
        members = [layer for layer in self.active if layer in group]
        if not members or any(layer in kept for layer in members):
            return {}
        return {members[-1]: "last_active_layer"}

    def _blocked(self, stopped: Collection[str], kept: Mapping[str, Reason]) -> dict[str, Reason]:
        """Return the layers that the order forbids to freeze before others."""
        blocked: dict[str, Reason] = {}
        for layer in self.active:
            frozen = {*stopped, *self.active} - kept.keys() - blocked.keys()
            if layer not in kept and not self.ordering.may_freeze(layer, frozen):
                blocked[layer] = "behind_live_layer"
        return blocked
