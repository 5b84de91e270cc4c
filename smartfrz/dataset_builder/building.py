"""From labelled runs to a predictor file with its card."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smartfrz.dataset_builder.labels import LabelRule, label_layers, soft_targets
from smartfrz.dataset_builder.storage import RecordedRun
from smartfrz.files import replacing
from smartfrz.predictor.contract import PredictorInfo
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.baselines import (
    Baselines,
    Judged,
    Regression,
    score_weight_change,
    weight_change_confidence,
)
from smartfrz.predictor.training.cross_validation import can_hold_out, leave_one_out
from smartfrz.predictor.training.export import export
from smartfrz.predictor.training.fit import fit
from smartfrz.predictor.training.judging import (
    Quality,
    Reliability,
    calibrate,
    measure_quality,
    reliability_table,
    score,
)
from smartfrz.predictor.training.model import FreezePredictor
from smartfrz.predictor.training.runs import LabelledRun, Scores, TrainingOptions, split

Progress = Callable[[float, str], None]
HeldOut = dict[str, dict[str, dict[str, list[Judged]]]]  # what is held out, which one, method, a judgement a seed


def labelled_runs(recorded: Sequence[RecordedRun], rule: LabelRule, records: int) -> list[LabelledRun]:
    """Label recorded runs, and thin them to about `records` timestamps each.

    Labels are made first: they look at every recorded timestamp.
    """
    runs = []
    for run in recorded:
        every = max(1, round(run.facts["recipe"]["recording"]["records"] / records))
        labels, targets = label_layers(run.cka, rule), soft_targets(run.cka, rule)
        thin = slice(every - 1, None, every)
        weights, dataset = run.weights[:, thin], dataset_of(run.facts)
        runs.append(LabelledRun(run.name, run.architecture, weights, labels[:, thin], targets[:, thin], dataset))
    return runs


def dataset_of(facts: dict[str, Any]) -> str:
    """The data set of a recording, by its recipe: the function that makes it, or the folder of pictures."""
    data = facts["recipe"].get("data", {})
    source = str(data.get("source", "")).rpartition(":")[2] or str(data.get("folder", ""))
    name = data.get("arguments", {}).get("name", "")
    return " ".join(part for part in (source, str(name)) if part) or "unknown"


@dataclass(frozen=True)
class Base:
    """The predictor that training goes on from.

    Attributes:
        info: What its file says.
        sha256: Of its file.
        network: Its network.
        runs: Those of the recordings it was made from that are at hand, labelled; they are trained on beside the new ones,
            as often as all of those together. Without any, set `TrainingOptions.pull`.
    """

    info: PredictorInfo
    sha256: str
    network: FreezePredictor
    runs: Sequence[LabelledRun] = ()

    def split(self, runs: Sequence[LabelledRun], seed: int) -> tuple[list[LabelledRun], list[LabelledRun]]:
        """Runs to train on and runs to validate on.

        The base has been trained on its runs: validating on one of them would flatter. Those that it was validated on
        go on doing that.
        """
        held = self.facts()["validated_on"]
        old_train = [run for run in self.runs if run.name not in held]
        validation = [run for run in self.runs if run.name in held]
        train = list(runs)
        if len(runs) > 1 or not validation:
            train, new_validation = split(runs, seed)
            validation += new_validation
        return train * max(1, round(len(old_train) / max(1, len(train)))) + old_train, validation

    def facts(self) -> dict[str, Any]:
        """For the metadata of what is made from it; `trained_on` and `validated_on` tell of its own base, too."""
        metrics = (self.info.metrics.get("base", {}), self.info.metrics)
        trained, validated = ({name for m in metrics for name in m.get(k, [])} for k in ("trained_on", "validated_on"))
        seen = {"trained_on": sorted(trained), "validated_on": sorted(validated - trained)}
        return {"name": self.info.name, "sha256": self.sha256, **seen}


def build_predictor(
    recorded: Sequence[RecordedRun],
    runs: Sequence[LabelledRun],
    rule: LabelRule,
    options: TrainingOptions,
    output: Path,
    name: str,
    dataset_sha256: str,
    *,
    records: int = 30,
    cross_validate: bool = True,
    progress: Progress = lambda fraction, text: None,
    base: Base | None = None,
) -> str:
    """Train, evaluate, export and describe a predictor.

    Args:
        recorded: The recorded runs, those of `base` included.
        runs: The new ones of them with labels; all of them without a `base`.
        rule: The label rule, stored with the predictor.
        options: How to train.
        output: The ONNX file; the card goes beside it, with the ending `.md`.
        name: The predictor's name.
        dataset_sha256: Of the recordings.
        records: Records a run, to which `labelled_runs` thinned the recordings.
        cross_validate: Also train without each architecture in turn, for the card.
        progress: Called with the fraction done and what is being done.
        base: Go on from this predictor instead of training a new network. An architecture that it saw cannot be held
            out any more: pass `cross_validate=False`.

    Returns:
        The card, Markdown.

    Raises:
        ValueError: If the runs are too few or too small, or do not fit the base.
        PredictorFileError: If the exported file answers differently from the trained network.
    """
    share = 0.8 if cross_validate else 0.0
    held_out: HeldOut = {}
    if cross_validate:
        by_dataset = can_hold_out([run.dataset for run in runs])
        part = share / 2 if by_dataset else share
        held_out["architecture"] = leave_one_out(
            runs, options, "architecture", lambda done, text: progress(part * done, text)
        )
        if by_dataset:
            held_out["dataset"] = leave_one_out(
                runs, options, "dataset", lambda done, text: progress(part * (1 + done), text)
            )
    train, validation = base.split(runs, options.seed) if base else split(runs, options.seed)
    network = base.network if base else None

    def report(done: float, text: str) -> None:
        progress(share + (1 - share) * done, f"final: {text}")

    model = fit(train, validation, options, report, network)
    scores = score(model, validation, options)
    threshold = calibrate(scores, validation, options, options.precision)
    baselines = Baselines.fit(train, train, options)
    on_validation = {"predictor": measure_quality(scores, validation, threshold, options)} | {
        method: judged.quality for method, judged in baselines.judge(validation, validation, options).items()
    }
    if base:
        before = score(base.network, validation, options)
        on_validation[base.info.name] = measure_quality(before, validation, base.info.threshold, options)
    said = baselines.scores("logistic_regression", validation, options)
    regression_threshold = calibrate(said, validation, options, options.precision)
    metrics = {
        "label_rule": rule.to_dict(),
        "trained_on": sorted({run.name for run in train}),
        "validated_on": sorted(run.name for run in validation),
        "validation": _plain(on_validation),
        "leave_one_architecture_out": _means(held_out.get("architecture", {})),
        "leave_one_dataset_out": _means(held_out.get("dataset", {})),
        "calibration_error": {
            group: {method: round(reliability.error, 4) for method, reliability in _pooled(methods).items()}
            for group, methods in held_out.items()
        },
        "weight_change_threshold": baselines.weight_change,
        "weight_change_calibrated_threshold": calibrate(
            baselines.scores("weight_change", validation, options), validation, options, options.precision
        ),
        "logistic_regression": baselines.statistics.to_dict() | {"threshold": regression_threshold},
    }
    if base:
        everything = {run.name: run for run in (*train, *validation)}.values()
        metrics["base"] = base.facts() | {"moved": answers_moved(model, base.network, list(everything), options)}
    info = PredictorInfo(
        name=name,
        tailored_size=options.tailored_size,
        window=options.window,
        representation=options.representation,
        # A confidence of exactly 0 or 1 would freeze everything or nothing.
        threshold=float(np.clip(threshold, 0.01, 0.99)),
        record_fraction=1.0 / records,
        dataset_sha256=dataset_sha256,
        metrics=metrics,
        min_records=options.min_records,
    )
    difference = export(model, info, output)
    card = write_card(info, recorded, on_validation, held_out, difference, options)
    with replacing(output.with_suffix(".md")) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return card


def answers_moved(
    model: FreezePredictor, base: FreezePredictor, runs: Sequence[LabelledRun], options: TrainingOptions
) -> dict[str, float]:
    """Mean absolute difference of the confidences that two networks give on each run, by its name; four digits."""
    pairs = zip(runs, score(model, runs, options), score(base, runs, options), strict=True)
    return {run.name: round(float(np.nanmean(np.abs(ours - theirs))), 4) for run, ours, theirs in pairs}


def _means(methods: dict[str, dict[str, list[Judged]]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Of each group that was held out: means over seeds."""
    return {group: _plain({m: _mean_of(found) for m, found in by.items()}) for group, by in methods.items()}


def _mean_of(judged: Sequence[Judged]) -> Quality:
    return mean_quality([one.quality for one in judged])


def _pooled(methods: dict[str, dict[str, list[Judged]]]) -> dict[str, Reliability]:
    """Of each method, the windows of all groups and seeds together."""
    found: dict[str, Reliability] = {}
    for by in methods.values():
        for method, judged in by.items():
            for one in judged:
                found[method] = found[method] + one.reliability if method in found else one.reliability
    return found


def _plain(results: dict[str, Quality]) -> dict[str, dict[str, float | None]]:
    """Without NaN, which JSON lacks."""
    return {key: {k: None if np.isnan(v) else v for k, v in value.to_dict().items()} for key, value in results.items()}


_COLUMNS = ("AUC", "pooled AUC", "accuracy", "precision", "recall", "ready", "right freezes", "time frozen")


def _table(results: dict[str, dict[str, Quality]], first: str) -> list[str]:
    lines = [f"| {first} | judged by | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 2) + "|"]
    for name, methods in results.items():
        for method, q in methods.items():
            values = dataclasses.astuple(q)
            lines.append(f"| {name} | {method.replace('_', ' ')} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    return lines


def mean_quality(results: Sequence[Quality]) -> Quality:
    """Mean of each figure, over architectures or seeds; NaN is left out."""
    table = np.array([dataclasses.astuple(q) for q in results], dtype=float)
    return Quality(*(float(np.nanmean(c)) if np.isfinite(c).any() else float("nan") for c in table.T))


def write_card(
    info: PredictorInfo,
    recorded: Sequence[RecordedRun],
    validation: dict[str, Quality],
    held_out: HeldOut,
    difference: float,
    options: TrainingOptions,
) -> str:
    """The card of a predictor, Markdown."""
    rule = info.metrics["label_rule"]
    lines = [
        f"# {info.name}",
        "",
        f"Reads the last {info.window} records of {info.tailored_size} sampled weights of a layer, at "
        f"{round(1 / info.record_fraction)} records a run, as `{info.representation}`; freezes from a confidence of "
        f"{info.threshold:.3f}. License: {info.license}.",
        "",
        f"Labels: CKA to a finished reference model, `{rule['kind']}` rule, tolerance {rule['tolerance']}. Threshold: "
        f"the lowest at which {options.precision:.0%} of the freezes of the validation runs are right. PyTorch and ONNX "
        f"Runtime differ by at most {difference:.1g}.",
        "",
    ]
    for group, methods in held_out.items():
        lines += _never_seen(group, methods)
    if "base" in info.metrics:
        lines += _continued(info, options)
    lines += [
        "## Runs that it was validated on",
        "",
        "Training was stopped, and the threshold chosen, on these: better than an unseen run would be.",
        "",
        *_table({", ".join(info.metrics["validated_on"]): validation}, "runs"),
        "",
        "`ready`: share of labels that say freeze. `right freezes`: at the second freezing stage in a row at which a layer "
        "reaches the threshold. `time frozen`: share of all layers' training that lies behind that moment.",
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


def _never_seen(group: str, by_seed: dict[str, dict[str, list[Judged]]]) -> list[str]:
    """What a card says of architectures or data sets that were held out."""
    what = {"architecture": "architecture", "dataset": "data set"}[group]
    groups = {name: {m: _mean_of(found) for m, found in by.items()} for name, by in by_seed.items()}
    methods = list(next(iter(groups.values())))
    means = {m: mean_quality([q[m] for q in groups.values()]) for m in methods}
    seeds = range(len(next(iter(by_seed.values()))["predictor"]))
    each = [mean_quality([q["predictor"][seed].quality for q in by_seed.values()]) for seed in seeds]
    return [
        f"## {'An' if what[0] == 'a' else 'A'} {what} that it never saw",
        "",
        f"Trained anew without each {what}, with {len(each)} seeds, judged on that {what}'s runs (means over"
        " seeds and runs; pooled AUC: over the windows of all its runs together). The baseline, "
        "weight change, is the relative change over the last 3 records, with the threshold of the highest accuracy "
        "on the training runs; calibrated, with one chosen as the predictor's is. Schedule is a logistic regression on "
        "what a schedule from front to back knows: how far the run is, and where the layer stands. Logistic regression "
        "reads that, and the change over 1, 3, 10 and all records of the same history, their ratios and slope.",
        "",
        *_table(groups | {"mean": means}, "held out"),
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
        "How sure to be of a confidence: the share of windows with it that were ready, and how many those are, over "
        "everything that was held out.",
        "",
        *reliability_table({m: [reliability] for m, reliability in _pooled(by_seed).items()}),
        "",
    ]


def _continued(info: PredictorInfo, options: TrainingOptions) -> list[str]:
    """What a card says of the base."""
    base = info.metrics["base"]
    seen = {*base["trained_on"], *base["validated_on"]}
    old = [name for name in base["moved"] if name in seen]
    kept = (
        f"{len(old)} of its {len(seen)} recordings were trained on or validated on again, beside the new ones."
        if old
        else f"None of its {len(seen)} recordings was at hand; its weights were kept near where they were "
        f"(`pull` {options.pull:g})."
    )
    return [
        f"## Continued from {base['name']}",
        "",
        f"The base's SHA-256 is `{base['sha256']}`. {kept} Its answers moved by so much, in the mean over layers and "
        "timestamps:",
        "",
        "| run | known to the base | confidence moved by |",
        "|---|---|---|",
        *(
            f"| {name} | {'yes' if name in seen else 'no'} | {moved:.4f} |"
            for name, moved in sorted(base["moved"].items())
        ),
        "",
    ]


def evaluate_predictor(predictor: Predictor, runs: Sequence[LabelledRun]) -> str:
    """Judge a predictor file run by run, beside the baseline.

    Returns:
        A Markdown table; runs that the predictor was trained on are marked.
    """
    info = predictor.info
    options = TrainingOptions(window=info.window, tailored_size=info.tailored_size, min_records=info.min_records)
    base = info.metrics.get("base", {})
    seen: dict[str, Any] = dict.fromkeys(base.get("validated_on", []), " (its base validated on)")
    seen |= dict.fromkeys(base.get("trained_on", []), " (its base trained on)")
    seen |= dict.fromkeys(info.metrics.get("trained_on", []), " (trained on)")
    seen |= dict.fromkeys(info.metrics.get("validated_on", []), " (validated on)")
    results: dict[str, dict[str, Quality]] = {}
    known: dict[str, list[Reliability]] = {}
    for run in runs:
        judged = {
            method: Judged(
                measure_quality(scores, [run], threshold, options), Reliability.of(confidence, [run], options)
            )
            for method, (scores, confidence, threshold) in _said(predictor, [run], options).items()
        }
        results[run.name + seen.get(run.name, " (held out)")] = {m: one.quality for m, one in judged.items()}
        if run.name not in seen:
            for method, one in judged.items():
                known.setdefault(method, []).append(one.reliability)
    lines = _table(results, "run")
    if known:
        unseen = [run for run in runs if run.name not in seen]
        lines += ["", f"Confidence, and share that was ready, of the {len(unseen)} runs that are held out:", ""]
        lines += reliability_table(known)
    return "\n".join(lines)


def _said(
    predictor: Predictor, runs: Sequence[LabelledRun], options: TrainingOptions
) -> dict[str, tuple[Scores, Scores, float]]:
    """Scores, confidences and threshold of a predictor, and of the baselines that its file holds."""
    metrics, threshold = predictor.info.metrics, predictor.info.metrics.get("weight_change_threshold", 2.0)
    own = score(predictor, runs, options)
    change = score_weight_change(runs, options), weight_change_confidence(runs, options, threshold)
    said = {"predictor": (own, own, predictor.info.threshold), "weight_change": (*change, threshold)}
    if "logistic_regression" in metrics:  # older files have none
        fitted = metrics["logistic_regression"]
        probability = Regression.from_dict(fitted).score(runs, options)
        said["logistic_regression"] = probability, probability, fitted["threshold"]
    return said
