"""Baselines that see the same history as the predictor: weight change, and logistic regressions."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from smartfrz.control.weight_change import CHANGE_RECORDS, relative_change
from smartfrz.predictor.contract import READS_LOSS
from smartfrz.predictor.training.judging import (
    Quality,
    Reliability,
    best_accuracy_threshold,
    calibrate,
    measure_quality,
)
from smartfrz.predictor.training.runs import LabelledRun, Scores, TrainingOptions, is_decidable, layer_positions

METHODS = ("weight_change", "weight_change_calibrated", "schedule", "logistic_regression")
Features = Literal["statistics", "statistics+loss", "change", "schedule"]
_LAGS = (1, CHANGE_RECORDS, 10)
_SLOPE_RECORDS = 10
_LEAST = 1e-7  # relative change that float32 weights can show
STATISTICS = (
    "progress",
    *(f"change_{lag}" for lag in _LAGS),
    "change_all",
    "ratio_1_3",
    "ratio_3_10",
    "ratio_10_all",
    "slope",
    "position",
    "position_and_progress",
)
LOSS_STATISTICS = ("loss_fall", *(f"loss_slope_{lag}" for lag in _LAGS[1:]))


def score_weight_change(runs: Sequence[LabelledRun], options: TrainingOptions, records: int = CHANGE_RECORDS) -> Scores:
    """Score runs by the relative change of the weights over the last records.

    Returns:
        -log10(|W_t - W_{t-records}| / |W_t|) per run, float32 `[num_layers, timestamps]`: higher means readier. NaN where
        the predictor decides nothing either.
    """
    scores = []
    for run in runs:
        before = np.maximum(np.arange(run.weights.shape[1]) - records, 0)
        change = _change(run, before)
        scores.append(np.where(is_decidable(run, options), -np.log10(change + 1e-12), np.nan).astype(np.float32))
    return scores


def weight_change_confidence(runs: Sequence[LabelledRun], options: TrainingOptions, threshold: float) -> Scores:
    """Compute the confidences of the policy `smartfrz.baselines.WeightChange` with the limit 10 ** -threshold."""
    limit = np.float32(min(threshold, 30.0))  # the threshold is infinite if freezing nothing is best
    scores = score_weight_change(runs, options)
    return [np.float32(1) / (1 + np.float32(10) ** np.clip(limit - score, -30, 30)) for score in scores]


def compute_statistics(run: LabelledRun, window: int) -> NDArray[np.float64]:
    """Compute simple statistics of the histories that the predictor sees; it has to be better than they are.

    Args:
        run: The run.
        window: Number of records in a history.

    Returns:
        float64 `[num_layers, timestamps, len(STATISTICS)]`: the filled share of the window; log10 of the
        relative change of the weights over 1, 3 and 10 records (or as many as there are) and since the first record of
        the window; their differences; the slope per record of log10 of the steps of the last 10 records; the position of
        the layer in the network, in [0, 1]; and position times filled share.
    """
    timestamps = run.weights.shape[1]
    now = np.arange(timestamps)
    first = np.maximum(now - (window - 1), 0)
    befores = [np.maximum(now - lag, first) for lag in _LAGS] + [first]
    changes = [_log_change(run, before) for before in befores]
    ratios = [earlier - later for earlier, later in itertools.pairwise(changes)]
    progress = np.broadcast_to((now - first + 1) / window, changes[0].shape)
    schedule = _schedule(run, window)
    return np.stack(
        [progress, *changes, *ratios, _slopes(changes[0], first), *np.moveaxis(schedule[..., 1:3], -1, 0)], -1
    )


def compute_loss_statistics(run: LabelledRun, window: int) -> NDArray[np.float64]:
    """Compute simple statistics of the training loss that the predictor sees.

    Args:
        run: The run.
        window: Number of records in a history.

    Returns:
        float64 `[num_layers, timestamps, len(LOSS_STATISTICS)]`: the logarithm of the loss over that at the first record of
        the window, and its mean change per record over 3 and 10 records, or as many as there are. NaN where a loss is not
        known.
    """
    timestamps = run.weights.shape[1]
    now = np.arange(timestamps)
    first = np.maximum(now - (window - 1), 0)
    loss = np.full(timestamps, np.nan) if run.loss is None else run.loss.astype(np.float64)
    level = np.log(np.where(np.isfinite(loss) & (loss > 0), loss, np.nan))
    slopes = [(level - level[np.maximum(now - lag, first)]) / lag for lag in _LAGS[1:]]
    found = np.stack([level - level[first], *slopes], axis=-1)
    return np.broadcast_to(found, (len(run.weights), *found.shape))


def _schedule(run: LabelledRun, window: int) -> NDArray[np.float64]:
    """Compute the features that need no weights, float64 `[num_layers, timestamps, 4]`.

    They are progress, position, their product, and the square of progress.
    """
    shape = run.weights.shape[:2]
    progress = np.broadcast_to(np.minimum(np.arange(shape[1]) + 1, window) / window, shape)
    position = np.broadcast_to(layer_positions(shape[0])[:, None].astype(np.float64), shape)
    return np.stack([progress, position, position * progress, progress**2], axis=-1)


def _change(run: LabelledRun, before: NDArray[np.int64]) -> NDArray[Any]:
    """Compute the relative change of the weights since other records, `[num_layers, timestamps]`."""
    if run.paths is not None:
        return run.paths.relative_change(before)
    # One layer at a time, since pools are large.
    return np.stack([relative_change(weights, weights[before]) for weights in run.weights])


def _log_change(run: LabelledRun, before: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(np.log10(np.maximum(_change(run, before).astype(np.float64), _LEAST)))


def _slopes(steps: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
    """Fit a line to the last steps of each timestamp; return its slope, `[num_layers, timestamps]`, 0 below two steps."""
    slopes = np.zeros_like(steps)
    for now in range(2, steps.shape[1]):
        start = max(int(first[now]) + 1, now - _SLOPE_RECORDS + 1)
        if now - start >= 1:
            x = np.arange(start, now + 1) - (start + now) / 2
            slopes[:, now] = steps[:, start : now + 1] @ x / (x @ x)
    return slopes


@dataclass(frozen=True)
class Regression:
    """Logistic regression on features of each history.

    Attributes:
        features: `statistics`: all of `STATISTICS`, and with `statistics+loss` also all of `LOSS_STATISTICS`. `change`: only
            the relative change of the weights, to turn it into a probability. `schedule`: progress and position without
            weights, which is what a schedule knows.
        mean: Mean of each feature in training, float64 `[n]`.
        scale: Standard deviation of each feature in training, float64 `[n]`.
        coefficients: Coefficients of the standardised features, float64 `[n]`.
        intercept: Intercept of the regression.
    """

    features: Features
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    intercept: float

    @classmethod
    def fit(cls, features: Features, runs: Sequence[LabelledRun], options: TrainingOptions) -> "Regression":
        """Fit a regression; every run has the same weight.

        Args:
            features: See the class.
            runs: Runs to train on.
            options: Window and shortest history.

        Raises:
            ValueError: If all known labels are the same.
        """
        rows, labels, shares = [], [], []
        for run in runs:
            chosen = is_decidable(run, options)
            rows.append(_features(features, run, options)[chosen])
            labels.append(run.labels[chosen])
            shares.append(np.full(len(rows[-1]), 1.0 / max(1, len(rows[-1]))))
        x, y, share = (np.concatenate(parts) for parts in (rows, labels, shares))
        if len(np.unique(y)) < 2:
            raise ValueError(
                f"Logistic regression received labels {np.unique(y).tolist()}; expected layers that are ready and "
                "layers that are not. Change the tolerance, or record longer runs."
            )
        mean, scale = x.mean(0), x.std(0)
        scale[scale < 1e-6] = 1.0  # a feature that is always the same, such as a ratio of a short window
        model = LogisticRegression(max_iter=1000).fit((x - mean) / scale, y, sample_weight=share / share.mean())
        return cls(features, mean, scale, model.coef_[0], float(model.intercept_[0]))

    def score(self, runs: Sequence[LabelledRun], options: TrainingOptions) -> Scores:
        """Compute the probability that freezing is right, in the form of `judging.score`."""
        scores = []
        for run in runs:
            x = (_features(self.features, run, options) - self.mean) / self.scale
            ready = 1.0 / (1.0 + np.exp(-np.clip(x @ self.coefficients + self.intercept, -60, 60)))
            scores.append(np.where(is_decidable(run, options), ready, np.nan).astype(np.float32))
        return scores

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the metadata of a predictor."""
        numbers = {name: getattr(self, name).round(6).tolist() for name in ("mean", "scale", "coefficients")}
        return {"features": self.features, **numbers, "intercept": round(self.intercept, 6)}

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "Regression":
        """Restore a regression from the result of `to_dict`."""
        arrays = [np.array(known[name], np.float64) for name in ("mean", "scale", "coefficients")]
        return cls(known["features"], arrays[0], arrays[1], arrays[2], float(known["intercept"]))


def _features(features: str, run: LabelledRun, options: TrainingOptions) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # nothing is decided where weights are not finite
        if features.startswith("statistics"):
            made = compute_statistics(run, options.window)
            if features == "statistics+loss":
                made = np.concatenate([made, compute_loss_statistics(run, options.window)], axis=-1)
        elif features == "schedule":
            made = _schedule(run, options.window)
        else:
            made = -_log_change(run, np.maximum(np.arange(run.weights.shape[1]) - CHANGE_RECORDS, 0))[..., None]
    return np.nan_to_num(made, posinf=0.0, neginf=0.0)


class Judged(NamedTuple):
    """Results of one method on some runs.

    Attributes:
        quality: How well it ranks, and how right it is at its threshold.
        reliability: How right its confidences are.
        confidence: The confidences themselves, one array for each run, in [0, 1].
    """

    quality: Quality
    reliability: Reliability
    confidence: Scores


@dataclass(frozen=True)
class Baselines:
    """Baselines to compare a predictor with, fitted on the runs that it was trained on.

    Attributes:
        weight_change: Threshold of `score_weight_change` with the highest accuracy.
        change: Logistic regression that turns weight change into a probability.
        schedule: Logistic regression on progress and position alone, which is what a fixed schedule can know.
        statistics: Logistic regression on simple statistics.
    """

    weight_change: float
    change: Regression
    schedule: Regression
    statistics: Regression

    @classmethod
    def fit(
        cls, train: Sequence[LabelledRun], everything: Sequence[LabelledRun], options: TrainingOptions
    ) -> "Baselines":
        """Fit all baselines.

        Args:
            train: Runs that the predictor is trained on.
            everything: Runs that it is trained and validated on: the threshold of weight change needs no validation runs.
            options: Options with which the predictor is trained.
        """
        threshold = best_accuracy_threshold(score_weight_change(everything, options), everything, options)
        statistics: Features = "statistics+loss" if options.representation in READS_LOSS else "statistics"
        fitted = [Regression.fit(features, train, options) for features in ("change", "schedule", statistics)]
        return cls(threshold, *fitted)

    def scores(self, method: str, runs: Sequence[LabelledRun], options: TrainingOptions) -> Scores:
        """Score runs by one of `METHODS`; these scores are compared with its threshold."""
        if method in ("schedule", "logistic_regression"):
            return self.confidence(method, runs, options)
        return score_weight_change(runs, options)

    def confidence(self, method: str, runs: Sequence[LabelledRun], options: TrainingOptions) -> Scores:
        """Score runs by one of `METHODS` with confidences in [0, 1], made from weight change by a formula or regression."""
        if method == "weight_change":
            return weight_change_confidence(runs, options, self.weight_change)
        known = {"weight_change_calibrated": self.change, "schedule": self.schedule}
        return known.get(method, self.statistics).score(runs, options)

    def judge(
        self, test: Sequence[LabelledRun], validation: Sequence[LabelledRun], options: TrainingOptions
    ) -> dict[str, Judged]:
        """Judge all baselines. Their thresholds, except for `weight_change`, are calibrated on the validation runs."""
        judged = {}
        for method in METHODS:
            threshold = self.weight_change
            if method != "weight_change":
                scores = self.scores(method, validation, options)
                threshold = calibrate(scores, validation, options, options.precision)
            quality = measure_quality(self.scores(method, test, options), test, threshold, options)
            confidence = self.confidence(method, test, options)
            judged[method] = Judged(quality, Reliability.of(confidence, test, options), confidence)
        return judged
