"""What a run says by itself: a line at each freezing stage, and at the end why nothing froze."""

import contextlib
import logging
import math
import sys
from collections.abc import Collection, Sequence

from smartfrz.control.decision import FreezeDecision

logger = logging.getLogger("smartfrz")
# From the one that came closest to freezing to the one that was farthest from it.
_WHY = {
    "does_not_pay": "ready, but it does not pay: compiling anew costs more than the rest of the run saves",
    "grouped": "ready, but grouped: the model is compiled, so that layers freeze at a few stages only",
    "last_active_layer": "ready, but the last active layer of the model or of its optimizer, which is always kept",
    "behind_live_layer": "ready, but behind a layer that is trained (freeze_order='prefix')",
    "patience": "above the threshold, but not yet at `patience` stages in a row",
    "below_threshold": "below the threshold",
    "no_answer": "not judged: the predictor's server did not answer",
    "not_finite": "not judged: the weights hold NaN or infinity",
    "not_trained": "not judged: no optimizer trains it, its learning rate is 0, or it has never moved",
    "history_too_short": "not judged: too few records so far; the run is short, or `record_every` large",
}


def say(text: str) -> None:
    """Show a text: through the logger if it shows messages of level INFO, else on standard error.

    Progress bars of tqdm, such as that of the Trainer of transformers, make room for it.
    """
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(text)
        return
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # no bar is shown where nobody has loaded it
    with bars.external_write_mode(file=sys.stderr) if bars else contextlib.nullcontext():
        print(text, file=sys.stderr, flush=True)


def describe_stage(decisions: Sequence[FreezeDecision], total_steps: int | None, frozen: int, layers: int) -> str:
    """Return one line about a freezing stage.

    Args:
        decisions: The decisions of the stage; at least one.
        total_steps: Optimizer steps of the whole run, if known.
        frozen: Number of layers that are frozen now (in a dry run: would be).
        layers: Number of layers that can be frozen.
    """
    step = decisions[-1].step
    parts = []
    for action, verb in (("freeze", "froze"), ("would_freeze", "would have frozen"), ("thaw", "thawed")):
        names = [decision.layer for decision in decisions if decision.action == action]
        if names:
            parts.append(f"{verb} {_shorten(names)}")
    if not parts:
        parts = [_closest(decisions)]
    length = f" of {total_steps}" if total_steps else ""
    return f"SmartFRZ, step {step}{length}: {'; '.join(parts)}; {frozen} of {layers} layers frozen."


def _closest(decisions: Sequence[FreezeDecision]) -> str:
    judged = [d for d in decisions if d.reason == "below_threshold" and not math.isnan(d.confidence)]
    if not judged or len({d.reason for d in decisions}) > 1:
        return "nothing new"
    best = max(judged, key=lambda d: d.confidence - d.threshold)
    return f"nothing new, {_distance(best)}"


def _distance(decision: FreezeDecision) -> str:
    missing = decision.threshold - decision.confidence
    return f"{decision.layer} is closest: {decision.confidence:.3f}, {missing:.3f} below its threshold"


def explain_nothing_frozen(
    events: Sequence[FreezeDecision], unpaid_steps: Collection[int] = (), trained: Collection[str] = ()
) -> list[str]:
    """Return why no layer froze, one line for each reason: how many layers, and which came closest.

    A layer counts for the reason at which it was closest to being frozen.

    Args:
        events: Every decision of the run; none of them freezes anything.
        unpaid_steps: Steps of the stages at which layers were ready, but freezing them did not pay.
        trained: The layers that may be frozen.
    """
    if not events and len(trained) == 1:
        return [
            f"{_shorten(list(trained)) or 'the model itself'}: the only layer that is trained, which is always kept"
        ]
    if not events:
        return ["there was no freezing stage yet: the run has fewer steps than record_every * decide_every"]
    ranks = {reason: rank for rank, reason in enumerate(_WHY)}
    closest: dict[str, tuple[int, float, str, FreezeDecision]] = {}
    for event in events:
        unpaid = event.reason == "grouped" and event.step in unpaid_steps
        reason: str = "does_not_pay" if unpaid else event.reason
        missing = event.threshold - event.confidence
        found = ranks.get(reason, len(ranks)), 0.0 if math.isnan(missing) else missing, reason, event
        if event.layer not in closest or found[:2] <= closest[event.layer][:2]:
            closest[event.layer] = found
    groups: dict[str, list[FreezeDecision]] = {}
    for _, _, reason, event in sorted(closest.values(), key=lambda found: found[0]):
        groups.setdefault(reason, []).append(event)
    lines = []
    for reason, members in groups.items():
        line = f"{_shorten([m.layer for m in members])}: {_WHY.get(reason, reason.replace('_', ' '))}"
        if reason == "below_threshold":
            best = min(members, key=lambda m: m.threshold - m.confidence)
            line += f" ({_distance(best)}, at step {best.step})"
        lines.append(line)
    return lines


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
