"""Calibrate a predictor: which thresholds cost no, little and some accuracy, by what freezing cost in recorded runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smartfrz.control.learned import PATIENCE, RECORDS_PER_STAGE
from smartfrz.control.quality import TARGETS, Calibration
from smartfrz.dataset_builder.costs import judge, prefix_schedule
from smartfrz.dataset_builder.labelling import labelled_runs, records_of
from smartfrz.dataset_builder.labels import LabelRule
from smartfrz.dataset_builder.storage import RecordedRun
from smartfrz.errors import DatasetFormatError
from smartfrz.predictor.contract import PredictorInfo
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.baselines import Judged
from smartfrz.predictor.training.export import with_info
from smartfrz.predictor.training.judging import first_freezes, score
from smartfrz.predictor.training.runs import TrainingOptions

MIN_RUNS = 3
_THRESHOLDS = 1 / (1 + np.exp(-np.linspace(-4, 7, 111)))  # 0.018 to 0.999, evenly in the logit


@dataclass(frozen=True)
class Outcomes:
    """What a predictor would have cost and saved in recorded runs.

    Attributes:
        thresholds: Thresholds that were tried, float64 `[thresholds]`, rising.
        points: Accuracy that freezing costs, float64 `[runs, thresholds]`, in percentage points.
        computation: Share of full training's operations that is left, of the same shape, in [0, 1].
    """

    thresholds: NDArray[np.float64]
    points: NDArray[np.float64]
    computation: NDArray[np.float64]

    def points_at(self, computation: float) -> float:
        """Return the mean cost, in points, at the threshold that leaves a share of the computation in the mean over runs.

        It is NaN if no threshold does.
        """
        return float(np.interp(computation, self.computation.mean(0), self.points.mean(0), left=np.nan, right=np.nan))


def simulate(
    confidences: Sequence[NDArray[np.float32]],
    runs: Sequence[RecordedRun],
    thresholds: NDArray[np.float64] = _THRESHOLDS,
) -> Outcomes:
    """Find out what freezing by some confidences would have cost in recorded runs, without training again.

    Layers freeze as `LearnedPolicy` has them freeze. A run's cost is read off its cost surface, which was measured for
    the first layers only: a layer behind one that still trains counts neither as cost nor as saving.

    Args:
        confidences: Of each run, float32 `[num_layers, records]`, NaN where nothing is decided.
        runs: The runs, with costs.
        thresholds: Thresholds to try, rising.

    Raises:
        DatasetFormatError: If a run has no costs.
    """
    rows = []
    for confidence, run in zip(confidences, runs, strict=True):
        costs = run.require_costs()
        layers, records = confidence.shape
        progress = np.arange(1, records + 1) / records
        row = []
        for threshold in thresholds:
            frozen = np.zeros((layers, records), bool)
            for layer, record in first_freezes(confidence, threshold, PATIENCE, RECORDS_PER_STAGE):
                frozen[layer, record:] = True
            frozen[-1] = False  # one layer always trains
            judged = judge(costs, prefix_schedule(frozen, progress))
            row.append((min(100 * judged.cost, 100.0), 1 - judged.saved))
        rows.append(row)
    points, computation = np.moveaxis(np.array(rows), 2, 0)
    return Outcomes(thresholds, points, computation)


def simulate_predictor(predictor: Predictor, runs: Sequence[RecordedRun]) -> Outcomes:
    """Find out what freezing by a predictor would have cost in those of the recorded runs that have costs.

    Raises:
        DatasetFormatError: If fewer than three of them have.
    """
    runs = with_costs(runs)
    info = predictor.info
    options = TrainingOptions(window=info.window, tailored_size=info.tailored_size, min_records=info.min_records)
    return simulate(score(predictor, labelled_runs(runs, LabelRule(), records_of(info)), options), runs)


def simulate_held_out(
    held_out: Mapping[str, Mapping[str, Sequence[Judged]]], runs: Sequence[RecordedRun]
) -> dict[str, Outcomes]:
    """Find out what freezing by each method of a cross-validation would have cost in the runs that were held out.

    Args:
        held_out: What was found by holding out each of the runs alone.
        runs: These runs, with costs.

    Returns:
        Method to outcomes, means over seeds.
    """
    found = {}
    for method, seeds in held_out[runs[0].name].items():
        each = [
            simulate([held_out[run.name][method][seed].confidence[0] for run in runs], runs)
            for seed in range(len(seeds))
        ]
        points, computation = (np.mean([getattr(o, key) for o in each], axis=0) for key in ("points", "computation"))
        found[method] = Outcomes(_THRESHOLDS, points, computation)
    return found


def with_costs(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Return the runs that have costs.

    Raises:
        DatasetFormatError: If these are too few to calibrate with.
    """
    found = [run for run in runs if run.costs is not None]
    if len(found) < MIN_RUNS:
        raise DatasetFormatError(
            f"Received {len(found)} recordings with costs; expected at least {MIN_RUNS}, of different models and data. "
            "Record them with: smartfrz-build record --costs RECIPE..."
        )
    return found


def calibrate_qualities(outcomes: Outcomes) -> dict[str, Calibration]:
    """Choose the threshold of each quality, and tell what it means for a run that it was not chosen on.

    The threshold is the lowest from which on the mean cost stays within the quality's target. What it means is found by
    leaving each run out once: its cost at the threshold that the others choose.

    Returns:
        The qualities that some threshold reaches.
    """
    qualities = {}
    for name, target in TARGETS.items():
        chosen = _lowest(outcomes.points.mean(0), target)
        if chosen is None:
            continue
        points, computation = [], []
        for run in range(len(outcomes.points)):
            place = _lowest(np.delete(outcomes.points, run, 0).mean(0), target)
            place = len(outcomes.thresholds) - 1 if place is None else place
            points.append(outcomes.points[run, place])
            computation.append(outcomes.computation[run, place])
        qualities[name] = Calibration(
            threshold=round(float(outcomes.thresholds[chosen]), 4),
            points=round(-float(np.mean(points)), 3),
            spread=round(float(np.std(points, ddof=1)), 3),
            computation=round(float(np.mean(computation)), 4),
            runs=len(points),
        )
    return qualities


def _lowest(cost: NDArray[np.float64], target: float) -> int | None:
    within = np.logical_and.accumulate((cost <= target)[::-1])[::-1]
    return int(np.argmax(within)) if within.any() else None


def calibrate_file(path: Path, runs: Sequence[RecordedRun], output: Path) -> PredictorInfo:
    """Write a predictor file again with its qualities; its answers stay what they were.

    Returns:
        What the new file says of the predictor.

    Raises:
        PredictorFileError: If the predictor cannot be used.
        DatasetFormatError: If too few recordings have costs, or no threshold is good enough in them for any quality.
            Nothing is written then.
        OSError: If the output cannot be written.
    """
    predictor = Predictor(path, device="cpu")
    outcomes = simulate_predictor(predictor, runs)
    qualities = calibrate_qualities(outcomes)
    if not qualities:
        raise DatasetFormatError(
            f"No threshold of {predictor.info.name!r} is good enough for any quality: the highest, "
            f"{outcomes.thresholds[-1]:.3f}, costs {outcomes.points[:, -1].mean():.1f} points in the mean over these "
            f"{len(outcomes.points)} runs; expected at most {max(TARGETS.values()):g}. Nothing was written. Train it on "
            "runs like these first: smartfrz-build train --labels costs."
        )
    info = replace(predictor.info, qualities=qualities)
    with_info(path, info, output)
    return info
