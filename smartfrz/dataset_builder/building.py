"""From labelled runs to a predictor file with its card."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from smartfrz.dataset_builder.cards import mean_of, pooled, quality_table, write_card
from smartfrz.dataset_builder.labelling import seen_by
from smartfrz.dataset_builder.labels import LabelRule
from smartfrz.dataset_builder.qualities import MIN_RUNS, Outcomes, calibrate_qualities, simulate_held_out
from smartfrz.dataset_builder.storage import RecordedRun
from smartfrz.files import replacing
from smartfrz.predictor.contract import READS_LOSS, PredictorInfo
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.adjusting import Adjuster
from smartfrz.predictor.training.baselines import (
    Baselines,
    Judged,
    Regression,
    score_weight_change,
    weight_change_confidence,
)
from smartfrz.predictor.training.cross_validation import (
    Group,
    HeldOut,
    adjust_all,
    can_hold_out,
    check_rounds,
    leave_one_out,
    make_adjuster,
)
from smartfrz.predictor.training.export import export
from smartfrz.predictor.training.fit import check_runs, fit
from smartfrz.predictor.training.judging import (
    Quality,
    Reliability,
    calibrate,
    measure_quality,
    reliability_table,
    score,
)
from smartfrz.predictor.training.model import ADJUSTED_BY, FreezePredictor
from smartfrz.predictor.training.runs import LabelledRun, Scores, TrainingOptions, split

Progress = Callable[[float, str], None]
CALIBRATION_SEEDS = 2


@dataclass(frozen=True)
class Base:
    """The predictor that training continues from.

    Attributes:
        info: The contents of its file's metadata.
        sha256: Digest of its file.
        network: Its network.
        runs: Available recordings that the base was made from, labelled. They are mixed with the new ones in equal
            parts. Without any, set `TrainingOptions.pull`.
    """

    info: PredictorInfo
    sha256: str
    network: FreezePredictor
    runs: Sequence[LabelledRun] = ()

    def split(self, runs: Sequence[LabelledRun], seed: int) -> tuple[list[LabelledRun], list[LabelledRun]]:
        """Split into runs to train on and runs to validate on.

        The base has been trained on its runs, so validating on one of them would flatter. The runs that it was validated
        on are used for validation again.
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
        """Return metadata for its successor; `trained_on` and `validated_on` include the runs of its own base."""
        metrics = (self.info.metrics.get("base", {}), self.info.metrics)
        trained, validated = ({name for m in metrics for name in m.get(k, [])} for k in ("trained_on", "validated_on"))
        seen = {"trained_on": sorted(trained), "validated_on": sorted(validated - trained)}
        return {"name": self.info.name, "sha256": self.sha256, **seen}


@dataclass(frozen=True)
class Material:
    """What a predictor is made from.

    Attributes:
        recorded: All recordings, including the available ones of a base.
        runs: The new recordings with labels; all recordings if there is no base.
        sha256: Digest of the recordings.
    """

    recorded: Sequence[RecordedRun]
    runs: Sequence[LabelledRun]
    sha256: str


@dataclass(frozen=True)
class Plan:
    """How a predictor is made.

    Attributes:
        name: The predictor's name.
        rule: The label rule, stored with the predictor.
        options: How to train.
        records: Records per run, to which `labelled_runs` thinned the recordings.
        cross_validate: Also train without each architecture in turn, for the card. Pass False with a base: an
            architecture that the base has seen can no longer be held out.
        base: Predictor to continue from; None to train a new network.
    """

    name: str
    rule: LabelRule
    options: TrainingOptions
    records: int = 30
    cross_validate: bool = True
    base: Base | None = None

    def split(self, runs: Sequence[LabelledRun]) -> tuple[list[LabelledRun], list[LabelledRun]]:
        """Split into runs to train on, including old ones of the base, and runs to validate on."""
        seed = self.options.seed
        return self.base.split(runs, seed) if self.base else split(runs, seed)


@dataclass(frozen=True)
class _Fitted:
    """A trained network, the runs it was trained and validated on, its threshold, and the baselines."""

    model: FreezePredictor
    train: list[LabelledRun]
    validation: list[LabelledRun]
    threshold: float
    baselines: Baselines


def build_predictor(
    material: Material, plan: Plan, output: Path, progress: Progress = lambda fraction, text: None
) -> str:
    """Train, evaluate, export and describe a predictor.

    Args:
        material: Recorded and labelled runs.
        plan: How to make the predictor.
        output: The ONNX file; the card is written next to it, with the ending `.md`.
        progress: Called with the fraction done and what is being done.

    Returns:
        The card, Markdown.

    Raises:
        ValueError: If the runs are too few or too small, lack one of the labels, or do not fit the base. What can be
            known of that before training is.
        PredictorFileError: If the exported file answers differently from the trained network.
    """
    check_runs(*plan.split(material.runs), plan.options)
    known = [run for run in material.recorded if run.costs is not None]
    calibrates = plan.cross_validate and len(known) >= MIN_RUNS
    if calibrates:
        check_rounds(material.runs, plan.options, "name", CALIBRATION_SEEDS, [run.name for run in known])
    held_out: HeldOut = {}
    outcomes: dict[str, Outcomes] = {}
    adjuster: Adjuster | None = None
    if calibrates:
        adjuster, outcomes = _find_costs(material.runs, known, plan.options, _part(progress, 0.0, 0.45))
    if plan.cross_validate:
        held_out = _hold_out(material.runs, plan.options, adjuster, _part(progress, 0.45, 0.5))
    qualities = calibrate_qualities(outcomes["predictor"]) if outcomes else {}
    done = 0.95 if plan.cross_validate else 0.0
    fitted = _fit(material.runs, plan, adjuster, _part(progress, done, 1 - done, "final: "))
    # Right freezes of a few validation runs say less than what freezing cost in all runs. A confidence of exactly 0 or 1
    # would freeze everything or nothing; that of a quality is neither.
    threshold = qualities["fast"].threshold if "fast" in qualities else float(np.clip(fitted.threshold, 0.01, 0.99))
    fitted = replace(fitted, threshold=threshold)
    on_validation = _judge(fitted, plan)
    info = PredictorInfo(
        name=plan.name,
        tailored_size=plan.options.tailored_size,
        window=plan.options.window,
        representation=plan.options.representation,
        threshold=threshold,
        record_fraction=1.0 / plan.records,
        dataset_sha256=material.sha256,
        metrics=_metrics(fitted, plan, on_validation, held_out),
        min_records=plan.options.min_records,
        qualities=qualities,
    )
    difference = export(fitted.model, info, output)
    card = write_card(info, material.recorded, on_validation, held_out, outcomes, difference, plan.options)
    with replacing(output.with_suffix(".md")) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return card


def _part(progress: Progress, start: float, share: float, prefix: str = "") -> Progress:
    """Return a progress callback for a part of the work."""
    return lambda done, text: progress(start + share * done, prefix + text)


def _hold_out(
    runs: Sequence[LabelledRun], options: TrainingOptions, adjuster: Adjuster | None, progress: Progress
) -> HeldOut:
    kinds: list[Group] = ["architecture"]
    if can_hold_out([run.dataset for run in runs]):
        kinds.append("dataset")
    for kind in kinds:
        check_rounds(runs, options, kind)
    part = 1 / len(kinds)
    return {
        kind: leave_one_out(runs, options, kind, _part(progress, index * part, part), adjuster=adjuster)
        for index, kind in enumerate(kinds)
    }


def _find_costs(
    runs: Sequence[LabelledRun], known: Sequence[RecordedRun], options: TrainingOptions, progress: Progress
) -> tuple[Adjuster | None, dict[str, Outcomes]]:
    """Find out what freezing costs in each of the runs with costs, by networks that have not seen it.

    Returns:
        What adjusts networks by the loss, if they read it, and what was found.
    """
    names = [run.name for run in known]
    held_out = leave_one_out(runs, options, "name", progress, CALIBRATION_SEEDS, names)
    if options.representation not in READS_LOSS:
        return None, simulate_held_out(held_out, known)
    adjuster = make_adjuster(runs, held_out, options)
    with_loss, without = (simulate_held_out(adjust_all(adjuster, held_out, loss=loss), known) for loss in (True, False))
    return adjuster, with_loss | {"predictor without the loss": without["predictor"]}


def _fit(runs: Sequence[LabelledRun], plan: Plan, adjuster: Adjuster | None, progress: Progress) -> _Fitted:
    options = plan.options
    train, validation = plan.split(runs)
    model = fit(train, validation, options, progress, plan.base.network if plan.base else None)
    factors = adjuster.without([]) if adjuster else None
    if factors is not None:
        model.adjust(factors)
    threshold = calibrate(score(model, validation, options), validation, options, options.precision)
    return _Fitted(model, train, validation, threshold, Baselines.fit(train, train, options))


def _judge(fitted: _Fitted, plan: Plan) -> dict[str, Quality]:
    """Judge the predictor, the baselines and the base on the runs to validate on."""
    options, runs = plan.options, fitted.validation
    judged = {"predictor": measure_quality(score(fitted.model, runs, options), runs, fitted.threshold, options)}
    judged |= {method: one.quality for method, one in fitted.baselines.judge(runs, runs, options).items()}
    if plan.base:
        before = score(plan.base.network, runs, options)
        judged[plan.base.info.name] = measure_quality(before, runs, plan.base.info.threshold, options)
    return judged


def _metrics(fitted: _Fitted, plan: Plan, on_validation: dict[str, Quality], held_out: HeldOut) -> dict[str, Any]:
    """Return what the predictor's file says of its training."""
    baselines = fitted.baselines

    def calibrated(method: str) -> float:
        scores = baselines.scores(method, fitted.validation, plan.options)
        return calibrate(scores, fitted.validation, plan.options, plan.options.precision)

    metrics = {
        "label_rule": plan.rule.to_dict(),
        "trained_on": sorted({run.name for run in fitted.train}),
        "validated_on": sorted(run.name for run in fitted.validation),
        "validation": _plain(on_validation),
        "leave_one_architecture_out": _means(held_out.get("architecture", {})),
        "leave_one_dataset_out": _means(held_out.get("dataset", {})),
        "calibration_error": {
            group: {method: round(reliability.error, 4) for method, reliability in pooled(methods).items()}
            for group, methods in held_out.items()
        },
        "weight_change_threshold": baselines.weight_change,
        "weight_change_calibrated_threshold": calibrated("weight_change"),
        "logistic_regression": baselines.statistics.to_dict() | {"threshold": calibrated("logistic_regression")},
    }
    if fitted.model.reads_loss:
        factors = fitted.model.adjustment.weight[0].tolist()
        metrics["adjustment"] = {name: round(factor, 4) for name, factor in zip(ADJUSTED_BY, factors, strict=True)}
    if plan.base:
        runs = list({run.name: run for run in (*fitted.train, *fitted.validation)}.values())
        moved = answers_moved(fitted.model, plan.base.network, runs, plan.options)
        metrics["base"] = plan.base.facts() | {"moved": moved}
    return metrics


def answers_moved(
    model: FreezePredictor, base: FreezePredictor, runs: Sequence[LabelledRun], options: TrainingOptions
) -> dict[str, float]:
    """Return the mean absolute difference of two networks' confidences for each run, rounded to four digits."""
    pairs = zip(runs, score(model, runs, options), score(base, runs, options), strict=True)
    return {run.name: round(float(np.nanmean(np.abs(ours - theirs))), 4) for run, ours, theirs in pairs}


def _means(methods: dict[str, dict[str, list[Judged]]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the means over seeds for each group that was held out."""
    return {group: _plain({m: mean_of(found) for m, found in by.items()}) for group, by in methods.items()}


def _plain(results: dict[str, Quality]) -> dict[str, dict[str, float | None]]:
    """Return plain data in which None stands for NaN, which JSON lacks."""
    return {key: {k: None if np.isnan(v) else v for k, v in value.to_dict().items()} for key, value in results.items()}


def evaluate_predictor(predictor: Predictor, runs: Sequence[LabelledRun]) -> str:
    """Judge a predictor file and the baselines run by run.

    Returns:
        A Markdown table; runs that the predictor was trained on are marked.
    """
    return evaluation_text(predictor.info, judge_predictor(predictor, runs))


def judge_predictor(predictor: Predictor, runs: Sequence[LabelledRun]) -> dict[str, dict[str, Judged]]:
    """Judge a predictor file and the baselines run by run.

    Returns:
        Names of runs, and in each the methods: `predictor` and the baselines.
    """
    info = predictor.info
    options = TrainingOptions(window=info.window, tailored_size=info.tailored_size, min_records=info.min_records)
    return {
        run.name: {
            method: Judged(
                measure_quality(scores, [run], threshold, options),
                Reliability.of(confidence, [run], options),
                confidence,
            )
            for method, (scores, confidence, threshold) in _answers(predictor, [run], options).items()
        }
        for run in runs
    }


def evaluation_text(info: PredictorInfo, judged: Mapping[str, Mapping[str, Judged]]) -> str:
    """Return what `judge_predictor` found as Markdown tables; runs that the predictor was trained on are marked."""
    seen = seen_by(info)
    results = {
        name + seen.get(name, " (held out)"): {method: one.quality for method, one in methods.items()}
        for name, methods in judged.items()
    }
    lines = quality_table(results, "run")
    unseen = [methods for name, methods in judged.items() if name not in seen]
    if unseen:
        known: dict[str, list[Reliability]] = {}
        for methods in unseen:
            for method, one in methods.items():
                known.setdefault(method, []).append(one.reliability)
        lines += ["", f"Confidence, and share that was ready, of the {len(unseen)} runs that are held out:", ""]
        lines += reliability_table(known)
    return "\n".join(lines)


def _answers(
    predictor: Predictor, runs: Sequence[LabelledRun], options: TrainingOptions
) -> dict[str, tuple[Scores, Scores, float]]:
    """Return scores, confidences and threshold of a predictor and of the baselines in its file."""
    metrics, threshold = predictor.info.metrics, predictor.info.metrics.get("weight_change_threshold", 2.0)
    own = score(predictor, runs, options)
    change = score_weight_change(runs, options), weight_change_confidence(runs, options, threshold)
    answers = {"predictor": (own, own, predictor.info.threshold), "weight_change": (*change, threshold)}
    if "logistic_regression" in metrics:  # older files have none
        fitted = metrics["logistic_regression"]
        probability = Regression.from_dict(fitted).score(runs, options)
        answers["logistic_regression"] = probability, probability, fitted["threshold"]
    return answers
