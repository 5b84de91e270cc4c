"""From recorded runs to labelled ones that a predictor can be trained on."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smartfrz.dataset_builder.costs import cost_targets
from smartfrz.dataset_builder.datasets import thinning
from smartfrz.dataset_builder.labels import UNKNOWN, LabelRule, label_layers, soft_targets
from smartfrz.dataset_builder.storage import RecordedRun
from smartfrz.errors import DatasetFormatError
from smartfrz.predictor.contract import PredictorInfo
from smartfrz.predictor.training.runs import LabelledRun

logger = logging.getLogger("smartfrz")


class Labels(NamedTuple):
    """Labels of a run.

    Attributes:
        hard: 1 if freezing is right, 0 if not, -1 where that is not known; int8 `[num_layers, timestamps]`.
        soft: How clearly, in [0, 1]; NaN where it is not known; float32 of the same shape.
    """

    hard: NDArray[np.int8]
    soft: NDArray[np.float32]


def label_run(run: RecordedRun, rule: LabelRule) -> Labels:
    """Label every layer of a recorded run at every timestamp, by CKA, by costs or by both.

    Raises:
        DatasetFormatError: If the rule asks for costs, and they were not measured.
    """
    by_cka = Labels(label_layers(run.cka, rule), soft_targets(run.cka, rule))
    if rule.source == "cka" or (rule.source == "both" and run.costs is None):
        return by_cka
    costs = cost_targets(run.require_costs(), run.progress, rule.cost_limit / 100)
    if rule.source == "costs":
        return Labels(costs.hard, costs.soft.astype(np.float32))
    mean = ((by_cka.soft + costs.soft) / 2).astype(np.float32)
    return Labels(np.where(np.isnan(mean), UNKNOWN, mean >= 0.5).astype(np.int8), mean)


def rule_of(info: PredictorInfo, recorded: Sequence[RecordedRun]) -> LabelRule:
    """Return the rule of the labels that a predictor was trained on.

    If it asks for costs and a run has none, it is CKA's, and a warning says so.
    """
    rule = LabelRule(**info.metrics.get("label_rule", {}))
    without = [run.name for run in recorded if run.costs is None]
    if rule.source != "costs" or not without:
        return rule
    logger.warning(
        "%s was trained on labels by what freezing costs, which %s lack%s. All recordings are labelled by CKA instead; "
        "record with --costs for the others.",
        info.name,
        ", ".join(without),
        "s" if len(without) == 1 else "",
    )
    return replace(rule, source="cka")


def seen_by(info: PredictorInfo) -> dict[str, str]:
    """Return a remark for each run that the predictor or its base has seen."""
    base = info.metrics.get("base", {})
    remarks = (
        (base, "validated_on", " (its base validated on)"),
        (base, "trained_on", " (its base trained on)"),
        (info.metrics, "trained_on", " (trained on)"),
        (info.metrics, "validated_on", " (validated on)"),
    )
    return {name: remark for facts, key, remark in remarks for name in facts.get(key, [])}


def labelled_runs(recorded: Sequence[RecordedRun], rule: LabelRule, records: int) -> list[LabelledRun]:
    """Label recorded runs, and thin them to about `records` timestamps each.

    Labels are made first: they look at every recorded timestamp.

    Raises:
        DatasetFormatError: If the paths of a run are of fewer records, or of others, or the rule asks for costs, and those
            of a run were not measured.
    """
    runs = []
    for run in recorded:
        every = thinning(run.facts, records)
        labels, targets = label_run(run, rule)
        thin = slice(every - 1, None, every)
        weights, dataset, loss = run.weights[:, thin], dataset_of(run.facts), _thin_loss(run, every)
        paths = None
        if run.paths is not None:
            if every % run.paths.every:
                raise DatasetFormatError(
                    f"The dataset keeps one in {run.paths.every} of the {len(run.step)} timestamps of {run.name!r}, but "
                    f"{records} records a run need one in {every}. Choose other --records, or train on the recordings."
                )
            paths = run.paths.unpack().thinned(every // run.paths.every)
        runs.append(
            LabelledRun(run.name, run.architecture, weights, labels[:, thin], targets[:, thin], dataset, paths, loss)
        )
    return runs


def _thin_loss(run: RecordedRun, every: int) -> NDArray[np.float32]:
    """Average the training loss over the timestamps that one of the kept ones stands for."""
    kept = len(run.loss) // every
    return np.asarray(run.loss[: kept * every], np.float64).reshape(kept, every).mean(1).astype(np.float32)


def dataset_of(facts: dict[str, Any]) -> str:
    """Return the name of a recording's data set: the function that makes it, or the folder of pictures."""
    data = facts["recipe"].get("data", {})
    source = str(data.get("source", "")).rpartition(":")[2] or str(data.get("folder", ""))
    name = data.get("arguments", {}).get("name", "")
    return " ".join(part for part in (source, str(name)) if part) or "unknown"


def records_of(info: PredictorInfo) -> int:
    """Return the number of records per run that a predictor was trained at."""
    return round(1 / info.record_fraction)
