"""Model cards of predictors: Markdown for people who decide whether to use one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smartfrz.control.quality import TARGETS
from smartfrz.dataset_builder.qualities import Outcomes
from smartfrz.dataset_builder.storage import RecordedRun
from smartfrz.predictor.contract import READS_LOSS, PredictorInfo
from smartfrz.predictor.training.baselines import Judged
from smartfrz.predictor.training.cross_validation import HeldOut, can_hold_out
from smartfrz.predictor.training.judging import Quality, Reliability, reliability_table
from smartfrz.predictor.training.runs import TrainingOptions

_SHARES = (0.9, 0.8, 0.7, 0.6)  # of full training's computation
_COLUMNS = ("AUC", "pooled AUC", "accuracy", "precision", "recall", "ready", "right freezes", "time frozen")


def quality_table(results: dict[str, dict[str, Quality]], first: str) -> list[str]:
    """Return a Markdown table with a row per group and method."""
    lines = [f"| {first} | judged by | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 2) + "|"]
    for name, methods in results.items():
        for method, q in methods.items():
            values = dataclasses.astuple(q)
            lines.append(f"| {name} | {method.replace('_', ' ')} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    return lines


def mean_quality(results: Sequence[Quality]) -> Quality:
    """Return the mean of each figure over architectures or seeds; NaN is left out."""
    table = np.array([dataclasses.astuple(q) for q in results], dtype=float)
    return Quality(*(float(np.nanmean(c)) if np.isfinite(c).any() else float("nan") for c in table.T))


def mean_of(judged: Sequence[Judged]) -> Quality:
    """Return the mean quality over seeds."""
    return mean_quality([one.quality for one in judged])


def pooled(methods: dict[str, dict[str, list[Judged]]]) -> dict[str, Reliability]:
    """Return each method's reliability on the windows of all groups and seeds together."""
    found: dict[str, Reliability] = {}
    for by in methods.values():
        for method, judged in by.items():
            for one in judged:
                found[method] = found[method] + one.reliability if method in found else one.reliability
    return found


def few_recordings(architectures: Sequence[str]) -> str:
    """Return what to say of a predictor that was made from few recordings; "" if there are enough.

    Args:
        architectures: The architecture of each recording.
    """
    kinds = sorted(set(architectures))
    if len(architectures) >= 4 and can_hold_out(architectures):
        return ""
    return (
        f"This predictor was made from few recordings: {len(architectures)} of {', '.join(kinds)}. Use it for trainings "
        "like these only, and compare whole trainings first (smartfrz compare): so few say little about other networks. "
        "With four recordings or more, two each of two architectures, a card can judge that; smartfrz-base was made from 17."
    )


def write_card(
    info: PredictorInfo,
    recorded: Sequence[RecordedRun],
    validation: dict[str, Quality],
    held_out: HeldOut,
    outcomes: Mapping[str, Outcomes],
    difference: float,
    options: TrainingOptions,
) -> str:
    """Return the card of a predictor, Markdown."""
    threshold = (
        "that of the quality `fast`"
        if "fast" in info.qualities
        else f"the lowest at which {options.precision:.0%} of the freezes of the validation runs are right"
    )
    few = "" if "base" in info.metrics else few_recordings([run.architecture for run in recorded])
    lines = [
        f"# {info.name}",
        "",
        f"Reads the last {info.window} records of {info.tailored_size} sampled weights of a layer, at "
        f"{round(1 / info.record_fraction)} records per run, as `{info.representation}`. Freezes a layer at a confidence of "
        f"{info.threshold:.3f} or more. License: {info.license}.",
        "",
        *([_adjusted(info.metrics["adjustment"]), ""] if "adjustment" in info.metrics else []),
        *([f"**{few}**", ""] if few else []),
        f"Labels: {_labels(info.metrics['label_rule'], recorded)}. Threshold: {threshold}. PyTorch and ONNX Runtime "
        f"differ by at most {difference:.1g}.",
        "",
    ]
    if outcomes:
        lines += _costs(info, outcomes, [run.name for run in recorded if run.costs is not None])
    for group, methods in held_out.items():
        lines += _never_seen(group, methods, info.representation in READS_LOSS)
    if "base" in info.metrics:
        lines += _continued(info, options)
    lines += [
        "## Runs that it was validated on",
        "",
        "These runs decided when training stopped and which threshold was chosen, so the figures flatter.",
        "",
        *quality_table({", ".join(info.metrics["validated_on"]): validation}, "runs"),
        "",
        "`ready`: share of labels that say freeze. A layer freezes at the second freezing stage in a row at which it "
        "reaches the threshold. `right freezes`: share of these freezes that were right. `time frozen`: share of all "
        "layers' training that comes after them.",
        "",
        "## Recordings",
        "",
        "| run | architecture | layers | records | accuracy of reference, recorded | used for |",
        "|---|---|---|---|---|---|",
    ]
    for run in recorded:
        accuracies = run.facts["accuracies"]
        used = "training" if run.name in info.metrics["trained_on"] else "validation"
        lines.append(
            f"| {run.name} | {run.architecture} | {len(run.layers)} | {len(run.step)} | "
            f"{accuracies['reference']:.3f}, {accuracies['recorded']:.3f} | {used} |"
        )
    return "\n".join([*lines, "", f"SHA-256 of the recordings: `{info.dataset_sha256}`.", ""])


def _adjusted(factors: Mapping[str, float]) -> str:
    if not factors["loss_fall"]:
        return (
            "It takes the training loss as an input, but makes nothing of it: that is fitted where three recordings or more "
            "have costs, and runs are held out (`--cross-validate`)."
        )
    heard = {
        name: factors[name] + factors[more]
        for name, more in (("margin", "margin_if_loss_known"), ("one", "loss_known"))
    }
    return (
        "Where the training loss is known, its answer is adjusted by it: the logit of the confidence is "
        f"{heard['margin']:.2f} times that of the layer's weights alone, plus {heard['one']:.2f}, plus "
        f"{factors['loss_fall']:.2f} times the logarithm of the loss relative to that at the oldest record. Without the "
        f"loss it is {factors['margin']:.2f} times that of the weights, plus {factors['one']:.2f}. This was fitted on runs "
        "that networks had not seen."
    )


def _labels(rule: Mapping[str, Any], recorded: Sequence[RecordedRun]) -> str:
    by_cka = f"CKA to a finished reference model, `{rule['kind']}` rule, tolerance {rule['tolerance']}"
    source = rule.get("source", "cka")
    if source == "cka":
        return by_cka
    by_costs = f"whether freezing everything up to the layer costs at most {rule['cost_limit']:g} points, as measured"
    if source == "costs":
        return by_costs
    without = [run.name for run in recorded if run.costs is None]
    alone = f" (CKA alone without costs: {', '.join(without)})" if without else ""
    return f"the mean of two targets, {by_cka}, and {by_costs}{alone}"


def _costs(info: PredictorInfo, outcomes: Mapping[str, Outcomes], names: Sequence[str]) -> list[str]:
    """Describe what freezing by confidences would have cost in the runs that were held out."""
    lines = [
        "## What freezing by it costs",
        "",
        f"From {len(names)} recordings with costs (`record --costs`), each judged by networks that had not seen it. Each "
        "quality's threshold is the lowest that costs no more than its target in the "
        "mean over these runs. What it then means for a new run was found by leaving each run out once, and choosing "
        "thresholds on the others. Nothing was trained again for that: costs are read off what was measured when the first "
        "layers were frozen at some moments, with linear interpolation between.",
        "",
    ]
    missing = [f"`{name}` ({target:g} points)" for name, target in TARGETS.items() if name not in info.qualities]
    if missing:
        lines += [f"No threshold costs little enough in the mean for {', '.join(missing)}.", ""]
    if info.qualities:
        lines += [
            "| quality | target, points | threshold | accuracy, points | standard deviation over runs | computation |",
            "|---|---|---|---|---|---|",
        ]
    for name, one in info.qualities.items():
        lines.append(
            f"| {name} | {-TARGETS[name]:+.1f} | {one.threshold:.3f} | {one.points:+.2f} | {one.spread:.2f} | "
            f"{one.computation:.0%} |"
        )
    lines += [""] if info.qualities else []
    lines += [
        "Points lost in the mean over runs, at the threshold that leaves such a share of the computation in the mean over "
        "runs; less is better. A cell is empty where no threshold leaves so little or so much:",
        "",
        f"| frozen by | {' | '.join(f'{share:.0%}' for share in _SHARES)} |",
        "|---" * (len(_SHARES) + 1) + "|",
    ]
    for method, found in outcomes.items():
        if method == "weight_change":
            continue  # ranks as the calibrated one does
        cells = ("" if np.isnan(points) else f"{points:.2f}" for points in map(found.points_at, _SHARES))
        lines.append(f"| {method.replace('_', ' ').replace(' calibrated', '')} | {' | '.join(cells)} |")
    if info.qualities:
        lines += ["", "Each run, at the thresholds of the qualities:", ""]
        lines += [f"| run | {' | '.join(info.qualities)} |", "|---" * (len(info.qualities) + 1) + "|"]
    found = outcomes["predictor"]
    for place, name in enumerate(names if info.qualities else ()):
        cells = (
            f"{-np.interp(one.threshold, found.thresholds, found.points[place]):+.1f} points in "
            f"{np.interp(one.threshold, found.thresholds, found.computation[place]):.0%}"
            for one in info.qualities.values()
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _never_seen(group: str, by_seed: dict[str, dict[str, list[Judged]]], reads_loss: bool) -> list[str]:
    """Describe architectures or data sets that were held out."""
    what = {"architecture": "architecture", "dataset": "data set"}[group]
    groups = {name: {m: mean_of(found) for m, found in by.items()} for name, by in by_seed.items()}
    methods = list(next(iter(groups.values())))
    means = {m: mean_quality([q[m] for q in groups.values()]) for m in methods}
    seeds = range(len(next(iter(by_seed.values()))["predictor"]))
    each = [mean_quality([q["predictor"][seed].quality for q in by_seed.values()]) for seed in seeds]
    return [
        f"## {'An' if what[0] == 'a' else 'A'} {what} that it never saw",
        "",
        f"A new network was trained without each {what}, with {len(each)} seeds, and judged on that {what}'s runs. "
        "Figures are means over seeds and runs; pooled AUC is over the windows of all its runs together. The baseline, "
        "weight change, is the relative change over the last 3 records, with the threshold that was most accurate on the "
        "training runs; calibrated, its threshold is chosen like the predictor's. Schedule is a logistic regression on "
        "what a schedule from front to back knows: the progress of the run and the position of the layer. "
        "Logistic regression also reads the change over 1, 3, 10 and all records of the same history, their "
        f"ratios and slope{', and the fall of the loss' if reads_loss else ''}.",
        "",
        *quality_table(groups | {"mean": means}, "held out"),
        "",
        f"Mean AUC of the predictor by seed: {', '.join(f'{q.auc:.3f}' for q in each)} (pooled: "
        f"{', '.join(f'{q.pooled_auc:.3f}' for q in each)}); of the baselines: "
        + "; ".join(
            f"{m.replace('_', ' ')} {means[m].auc:.3f} (pooled: {means[m].pooled_auc:.3f})"
            for m in methods
            if m not in ("predictor", "weight_change_calibrated")
        )
        + ".",
        "",
        "How far to trust a confidence: for each range of confidences the share of windows that were ready, and their "
        "number, over everything that was held out.",
        "",
        *reliability_table({m: [reliability] for m, reliability in pooled(by_seed).items()}),
        "",
    ]


def _continued(info: PredictorInfo, options: TrainingOptions) -> list[str]:
    """Describe the base."""
    base = info.metrics["base"]
    seen = {*base["trained_on"], *base["validated_on"]}
    old = [name for name in base["moved"] if name in seen]
    kept = (
        f"{len(old)} of its {len(seen)} recordings were trained on or validated on again, together with the new ones."
        if old
        else f"None of its {len(seen)} recordings was at hand; the weights were kept near its own "
        f"(`pull` {options.pull:g})."
    )
    return [
        f"## Continued from {base['name']}",
        "",
        f"The base's SHA-256 is `{base['sha256']}`. {kept} Mean change of its confidences over layers and timestamps:",
        "",
        "| run | known to the base | confidence moved by |",
        "|---|---|---|",
        *(
            f"| {name} | {'yes' if name in seen else 'no'} | {moved:.4f} |"
            for name, moved in sorted(base["moved"].items())
        ),
        "",
    ]
