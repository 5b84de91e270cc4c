"""What a run says by itself: a line at each freezing stage, warnings, and at the end why nothing froze."""

import contextlib
import logging
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from smartfrz.control.decision import FreezeDecision
from smartfrz.control.options import FreezeOptions, Schedule
from smartfrz.control.protocols import Untrained
from smartfrz.control.watch import Disturbance

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


# Why a frozen layer probably moved.
_LIKELY: dict[Disturbance, str] = {
    "trained": "the training loop sets requires_grad or trainable again and again, where SmartFRZ cannot set it back",
    "moved": "the optimizer changes weights that have no gradient, as some do with weight decay, or the loop writes to them",
    "statistics": "a norm updates its statistics even in eval mode, or the loop writes to its buffers",
}
_WHY_UNTRAINED: dict[Untrained, str] = {
    "no_optimizer": "no optimizer that it was given holds these weights",
    "unknown_optimizer": "an optimizer that it was not given trains these weights; pass every optimizer of the model",
    "learning_rate_zero": "the learning rate of these weights is 0",
    "never_moved": "these weights have not moved since training began",
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


def warn_held(layers: Sequence[str]) -> None:
    """Warn that these layers are made trainable again and again, and stay frozen."""
    logger.warning(
        "SmartFRZ keeps %s frozen, although the training loop sets requires_grad or trainable again and again, as "
        "loops do that switch a whole model off and on. Call thaw() to train what is frozen.",
        _enumerate(layers),
    )


def warn_unfrozen(layers: Sequence[str], step: int) -> None:
    """Warn that these layers were made trainable again before this step, and are thawed."""
    logger.warning(
        "SmartFRZ had frozen %s, and requires_grad or trainable was set again before step %d: this counts as a "
        "call of thaw(). What was thawed may freeze again later.",
        _enumerate(layers),
        step,
    )


def warn_moved(layers: Sequence[str], what: Disturbance, since: int, step: int) -> None:
    """Warn that these layers moved while they were frozen, after the step `since`, and are thawed for good."""
    logger.warning(
        "SmartFRZ thaws %s and freezes no more of that: frozen, but moved all the same between step %d and step "
        "%d. Probably %s. From step %d on this counts as trained.",
        _enumerate(layers),
        since,
        step,
        _LIKELY[what],
        since,
    )


def warn_untrained(layers: Sequence[str], why: Untrained, step: int) -> None:
    """Warn that these layers are not trained, unless that is nothing to worry about."""
    if why in _WHY_UNTRAINED:
        logger.warning(
            "SmartFRZ does not freeze %s as converged, since %s (step %d).",
            _enumerate(layers),
            _WHY_UNTRAINED[why],
            step,
        )


def warn_differences(state: Mapping[str, Any], chosen: Mapping[str, Any], options: FreezeOptions) -> None:
    """Log in one line what a saved run did otherwise, and which of both counts.

    Args:
        state: The saved state of the controller.
        chosen: How the run goes on: the fields of its schedule, and `total_steps`.
        options: What the user chose for the run that goes on.
    """
    saved = {"total_steps": state["total_steps"], **state["schedule"]}
    names = ("total_steps", *Schedule._fields, "dry_run", "thaw_on_restart")
    told = [f"{name} is now {chosen[name]!r} (saved: {saved[name]!r})" for name in names if chosen[name] != saved[name]]
    if chosen["record_every"] != saved["record_every"]:
        told.append("the weights recorded so far are forgotten, as they were recorded at other distances")
    if saved["dry_run"] and not chosen["dry_run"] and state["frozen"]:
        told.append(f"{len(state['frozen'])} layers that the dry run would have frozen are trained")
    if chosen["thaw_on_restart"] != options.thaw_on_restart:
        told.append("thaw_on_restart stays True, as saved")
    if options.seed != saved["seed"]:
        told.append(f"seed stays {saved['seed']!r} (received: {options.seed!r}), as the history was made with it")
    if told:
        logger.warning("SmartFRZ goes on from step %d with other options: %s.", state["num_steps"], "; ".join(told))


def _enumerate(layers: Sequence[str]) -> str:
    """Return `layer 'a'`, or `layers 'a', 'b'`, for a message."""
    return f"{'layer' if len(layers) == 1 else 'layers'} {_shorten([repr(layer) for layer in layers])}"
