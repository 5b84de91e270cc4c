"""Scores of a predictor on labelled runs, how good they are, and thresholds chosen from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from smartfrz.control.learned import PATIENCE, RECORDS_PER_STAGE
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.export import restore
from smartfrz.predictor.training.model import FreezePredictor, describe_path, real_rows
from smartfrz.predictor.training.paths import Paths, check_paths, spread_samples
from smartfrz.predictor.training.runs import (
    LabelledRun,
    Scores,
    TrainingOptions,
    decided_pairs,
    is_decidable,
    layer_positions,
)

NUM_BINS = 10


def score(
    model: FreezePredictor | Predictor,
    runs: Sequence[LabelledRun],
    options: TrainingOptions,
    every: int = 1,
) -> Scores:
    """Ask a predictor, for every layer and timestamp of every run, how sure it is that freezing is right.

    Args:
        model: The network, or a loaded predictor file.
        runs: The runs.
        options: Window, tailored size and shortest history.
        every: Number of timestamps between two scores, as between two freezing stages.

    Returns:
        One float32 `[num_layers, timestamps]` per run, NaN where nothing is decided.

    Raises:
        DatasetFormatError: If `check_paths` refuses the paths of a run.
        PredictorFileError: If the network cannot be read out of a predictor file, as paths demand.
    """
    found = {run.name: run.paths for run in runs if run.paths is not None}
    if found:
        model = restore(model.path) if isinstance(model, Predictor) else model  # a file reads weights
        for name, paths in found.items():
            check_paths(name, paths, model.representation, options.tailored_size)
    return [_score_run(model, run, options, every) for run in runs]


def _score_run(
    model: FreezePredictor | Predictor, run: LabelledRun, options: TrainingOptions, every: int
) -> NDArray[np.float32]:
    decidable = is_decidable(run, options)
    confidence = np.full(run.labels.shape, np.nan, np.float32)
    places = layer_positions(len(run.labels)) if model.positional and options.unplaced < 1 else None
    losses = run.loss if model.reads_loss else None
    samples = spread_samples(run.weights.shape[2], options.tailored_size)  # any fixed ones will do
    for timestamp in range(options.min_records - 1, run.labels.shape[1]):
        layers = np.flatnonzero(decidable[:, timestamp])
        if (timestamp + 1) % every or not len(layers):
            continue
        length = min(timestamp + 1, options.window)
        lengths = np.full(len(layers), length, np.int64)
        past = slice(timestamp + 1 - length, timestamp + 1)
        position = None if places is None else places[layers]
        loss = None if losses is None else np.tile(losses[past], (len(layers), 1))
        if run.paths is not None and isinstance(model, FreezePredictor):
            told = _ask_about_paths(model, run.paths, layers, past, lengths, position, loss)
        else:
            rows = run.weights[layers, past][:, :, samples]
            told = _ask(model, np.ascontiguousarray(rows), lengths, position, loss)
        confidence[layers, timestamp] = told[:, 1]
    return confidence


def _ask_about_paths(
    model: FreezePredictor,
    paths: Paths,
    layers: NDArray[np.int64],
    past: slice,
    lengths: NDArray[np.int64],
    position: NDArray[np.float32] | None,
    loss: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Ask a network about the first draw, which has the weights that are asked about where there are weights."""
    moved = torch.from_numpy(paths.moved[0, layers, past])
    evenness = torch.from_numpy(paths.evenness[0, layers, past.stop - 1, past])
    known = torch.from_numpy(lengths)
    real = real_rows(moved, known)
    with torch.no_grad():
        seen = describe_path(torch.from_numpy(paths.start[0, layers]), moved, evenness, real)
        logits, _ = model.eval().judge(seen, real, known, _tensor(position), _tensor(loss))
    answer: NDArray[np.float32] = logits.softmax(-1).numpy()
    return answer


def _ask(
    model: FreezePredictor | Predictor,
    history: NDArray[np.float32],
    lengths: NDArray[np.int64],
    position: NDArray[np.float32] | None,
    loss: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    if isinstance(model, Predictor):
        return model.predict(history, lengths, position, loss).confidence
    known = torch.from_numpy(history), torch.from_numpy(lengths), _tensor(position), _tensor(loss)
    with torch.no_grad():
        confidence, _ = model.eval()(*known)
    answer: NDArray[np.float32] = confidence.numpy()
    return answer


def _tensor(array: NDArray[np.float32] | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)


@dataclass(frozen=True)
class Quality:
    """Measures of how well scores separate labels.

    Attributes:
        auc: Area under the ROC curve, mean of the runs; NaN if no run has both classes.
        pooled_auc: Area under the ROC curve of the windows of all runs together, since one threshold has to serve all.
        accuracy: Accuracy at the threshold.
        precision: Share of right answers among the positive answers at the threshold; NaN without any.
        recall: Share of the ready layers that are found at the threshold.
        positive: Share of positive labels.
        freeze_precision: Share of right freezes. A layer freezes once, at the freezing stage at which its
            score has reached the threshold for the number of times in a row that patience demands.
        frozen_share: Share of all layers' training time that comes after these freezes.
    """

    auc: float
    pooled_auc: float
    accuracy: float
    precision: float
    recall: float
    positive: float
    freeze_precision: float
    frozen_share: float

    def to_dict(self) -> dict[str, float]:
        """Return the measures by name, rounded to four digits."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def measure_quality(
    scores: Scores,
    runs: Sequence[LabelledRun],
    threshold: float,
    options: TrainingOptions,
    stage: int = RECORDS_PER_STAGE,
    patience: int = PATIENCE,
) -> Quality:
    """Measure how good scores are; every run has the same weight.

    Args:
        scores: Scores, for example from `score`.
        runs: The runs that were scored.
        threshold: Lowest score that counts as positive.
        options: Window and shortest history.
        stage: Records between two freezing stages, for `freeze_precision` and `frozen_share`.
        patience: Stages in a row at which a layer must be confident, for the same two.
    """
    rows = []
    for confidence, run in zip(scores, runs, strict=True):
        ((s, y),) = decided_pairs([confidence], [run], options)
        positive = s >= threshold
        frozen = first_freezes(confidence, threshold, patience, stage)
        rows.append(
            (
                _auc(s, y),
                (positive == y).mean() if len(y) else np.nan,
                y[positive].mean() if positive.any() else np.nan,
                positive[y == 1].mean() if (y == 1).any() else np.nan,
                y.mean() if len(y) else np.nan,
                np.mean([run.labels[place] == 1 for place in frozen]) if frozen else np.nan,
                sum(run.labels.shape[1] - t - 1 for _, t in frozen) / run.labels.size,
            )
        )
    table = np.array(rows, dtype=float)
    means = [float(np.nanmean(c)) if np.isfinite(c).any() else float("nan") for c in table.T]
    pooled = [np.concatenate(parts) for parts in zip(*decided_pairs(scores, runs, options), strict=True)]
    return Quality(means[0], _auc(*pooled), *means[1:])


def mean_auc(scores: Scores, runs: Sequence[LabelledRun], options: TrainingOptions) -> float:
    """Compute the mean of the AUCs of the runs, without runs that have only one class."""
    aucs = [_auc(s, y) for s, y in decided_pairs(scores, runs, options)]
    return float(np.nanmean(aucs)) if np.isfinite(aucs).any() else float("nan")


def _auc(scores: NDArray[np.float32], labels: NDArray[np.int8]) -> float:
    return float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else float("nan")


def first_freezes(
    confidence: NDArray[np.float32], threshold: float, patience: int, stage: int
) -> list[tuple[int, int]]:
    """Find out when each layer would freeze: (layer, timestamp) of each layer that ever would.

    Args:
        confidence: float32 `[num_layers, timestamps]`, NaN where nothing is decided.
        threshold: Confidence from which a layer is ready.
        patience: Freezing stages in a row at which a layer must be ready.
        stage: Records between two freezing stages.
    """
    stages = np.arange(stage - 1, confidence.shape[1], stage)
    with np.errstate(invalid="ignore"):
        ready = confidence[:, stages] >= threshold
    frozen = []
    for layer, row in enumerate(ready):
        streak = 0
        for timestamp, positive in zip(stages, row, strict=True):
            streak = streak + 1 if positive else 0
            if streak == patience:
                frozen.append((layer, int(timestamp)))
                break
    return frozen


def calibrate(scores: Scores, runs: Sequence[LabelledRun], options: TrainingOptions, precision: float) -> float:
    """Find the lowest threshold at which the share of right freezes reaches the precision.

    Every run has the same weight. Only the moment at which a layer freezes counts, not every window: a confidence
    that is right nine times out of ten still freezes most layers too early, at the first error.

    Args:
        scores: Scores of the runs.
        runs: The runs that were scored.
        options: Window and shortest history.
        precision: Share of freezes that have to be right, in [0, 1].

    Returns:
        The threshold; if none reaches the precision, the one with the highest precision.
    """
    values = np.concatenate([s for s, _ in decided_pairs(scores, runs, options)])
    best, best_precision = float(values.max()), -1.0
    for threshold in np.unique(np.quantile(values, np.linspace(0, 0.99, 100), method="nearest")):
        rights = []
        for confidence, run in zip(scores, runs, strict=True):
            frozen = first_freezes(confidence, threshold, PATIENCE, RECORDS_PER_STAGE)
            rights += [np.mean([run.labels[place] == 1 for place in frozen])] if frozen else []
        reached = float(np.mean(rights)) if 2 * len(rights) >= len(runs) else -1.0  # too few runs mean nothing
        if reached >= precision:
            return float(threshold)
        if reached > best_precision:
            best, best_precision = float(threshold), reached
    return best


def best_accuracy_threshold(scores: Scores, runs: Sequence[LabelledRun], options: TrainingOptions) -> float:
    """Find the threshold with the highest accuracy on the given runs; infinite if freezing nothing is best."""
    pairs = list(decided_pairs(scores, runs, options))
    values, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    order = np.argsort(-values, kind="stable")
    gain = np.where(_ends_of_ties(values[order]), np.cumsum(np.where(labels[order] == 1, 1, -1)), -len(order))
    best = int(np.argmax(gain))
    return float(values[order][best]) if gain[best] > 0 else float("inf")


def _ends_of_ties(descending: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Mark where a threshold can be: it takes all equal scores or none."""
    return np.append(np.diff(descending) != 0, True)


@dataclass(frozen=True)
class Reliability:
    """Share of right answers by confidence, with the windows in ten equal bins of confidence.

    Attributes:
        counts: Number of windows in each bin, int64 `[10]`.
        said: Sum of their confidences, float64 `[10]`.
        ready: Number of windows in each bin that are labelled ready, int64 `[10]`.
    """

    counts: NDArray[np.int64]
    said: NDArray[np.float64]
    ready: NDArray[np.int64]

    @classmethod
    def of(cls, confidence: Scores, runs: Sequence[LabelledRun], options: TrainingOptions) -> "Reliability":
        """Sort the windows of all runs by confidences in [0, 1]."""
        pairs = list(decided_pairs(confidence, runs, options))
        said, ready = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        places = np.minimum((said * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        total = np.bincount(places, said, NUM_BINS).astype(np.float64)
        return cls(np.bincount(places, minlength=NUM_BINS), total, np.bincount(places[ready == 1], minlength=NUM_BINS))

    def __add__(self, other: "Reliability") -> "Reliability":
        return Reliability(self.counts + other.counts, self.said + other.said, self.ready + other.ready)

    @property
    def error(self) -> float:
        """Expected calibration error: mean over windows of |share that is ready - mean confidence| of their bin."""
        return float(np.abs(self.ready - self.said).sum() / max(1, self.counts.sum()))

    def rows(self) -> list[tuple[float, float, int]]:
        """Return mean confidence, share of ready windows and number of windows of each bin; NaN in empty bins."""
        with np.errstate(invalid="ignore"):
            columns = self.said / self.counts, self.ready / self.counts, self.counts
        return [(float(said), float(ready), int(count)) for said, ready, count in zip(*columns, strict=True)]


def reliability_table(judged: Mapping[str, Sequence[Reliability]]) -> list[str]:
    """Make a Markdown table: the share of ready windows in each bin, and the expected calibration error.

    Args:
        judged: Reliabilities of each method, which are pooled.
    """
    pooled = {method: sum(found[1:], found[0]) for method, found in judged.items() if found}
    rows = [f"| confidence | {' | '.join(method.replace('_', ' ') for method in pooled)} |"]
    rows.append("|---" * (len(pooled) + 1) + "|")
    for place, cells in enumerate(zip(*(reliability.rows() for reliability in pooled.values()), strict=True)):
        shown = [f"{ready:.2f} ({count:,})" if count else "" for _, ready, count in cells]
        rows.append(f"| {place / NUM_BINS:.1f} to {(place + 1) / NUM_BINS:.1f} | {' | '.join(shown)} |")
    errors = [f"{reliability.error:.3f}" for reliability in pooled.values()]
    return [*rows, f"| expected calibration error | {' | '.join(errors)} |"]
