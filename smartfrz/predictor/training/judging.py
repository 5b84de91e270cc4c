"""Judging predictors on what they have not seen, beside baselines that see the same history."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from smartfrz.control.weight_change import CHANGE_RECORDS, relative_change
from smartfrz.predictor.training import fit as training
from smartfrz.predictor.training.fit import LabelledRun, Quality, Scores, TrainingOptions

Group = Literal["architecture", "dataset"]
METHODS = ("predictor", "weight_change", "weight_change_calibrated", "schedule", "logistic_regression")
Features = Literal["statistics", "change", "schedule"]
NUM_BINS = 10
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


def statistics(run: LabelledRun, window: int) -> NDArray[np.float64]:
    """Simple statistics of each history, as far as the predictor sees it: what it has to be better than.

    Args:
        run: The run.
        window: Records that are looked at.

    Returns:
        float64 `[num_layers, timestamps, len(STATISTICS)]`: the share of the window that is filled; log10 of the
        relative change of the weights over 1, 3 and 10 records (or as many as there are) and since the first record of
        the window; their differences; the slope, a record, of log10 of the steps of the last 10 records; where in the
        network the layer stands, in [0, 1]; and that times the share.
    """
    weights, timestamps = run.weights, run.weights.shape[1]
    now = np.arange(timestamps)
    first = np.maximum(now - (window - 1), 0)
    befores = [np.maximum(now - lag, first) for lag in _LAGS] + [first]
    changes = [_log_change(weights, before) for before in befores]
    ratios = [earlier - later for earlier, later in itertools.pairwise(changes)]
    progress = np.broadcast_to((now - first + 1) / window, changes[0].shape)
    schedule = _schedule(run, window)
    return np.stack(
        [progress, *changes, *ratios, _slopes(changes[0], first), *np.moveaxis(schedule[..., 1:3], -1, 0)], -1
    )


def _schedule(run: LabelledRun, window: int) -> NDArray[np.float64]:
    """What is known without a look at any weight: progress, position, their product, and the square of progress.

    float64 `[num_layers, timestamps, 4]`.
    """
    shape = run.weights.shape[:2]
    progress = np.broadcast_to(np.minimum(np.arange(shape[1]) + 1, window) / window, shape)
    position = np.broadcast_to(training.places_of(shape[0])[:, None].astype(np.float64), shape)
    return np.stack([progress, position, position * progress, progress**2], axis=-1)


def _log_change(weights: NDArray[np.float32], before: NDArray[np.int64]) -> NDArray[np.float64]:
    change = np.stack([relative_change(w, w[before]) for w in weights])  # a layer at a time: pools are large
    return np.asarray(np.log10(np.maximum(change.astype(np.float64), _LEAST)))


def _slopes(steps: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of a straight line through each timestamp's last steps, float64 `[num_layers, timestamps]`; 0 with less than two."""
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
        features: `statistics`; or `change`, the one number that weight change goes by, which makes a probability of it; or
            `schedule`: progress and position, as a schedule from front to back has them, and no weights.
        mean: Of each feature in training, float64 `[n]`.
        scale: Their standard deviations, float64 `[n]`.
        coefficients: Of the standardised features, float64 `[n]`.
        intercept: Of them.
    """

    features: Features
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    intercept: float

    @classmethod
    def fit(cls, features: Features, runs: Sequence[LabelledRun], options: TrainingOptions) -> "Regression":
        """Fit it; every run counts alike.

        Args:
            features: See the class.
            runs: To train on.
            options: Window and shortest history.

        Raises:
            ValueError: If all known labels are the same.
        """
        rows, labels, shares = [], [], []
        for run in runs:
            chosen = training.is_decidable(run, options)
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
        """Probability that freezing is right; as `smartfrz.predictor.training.fit.score`."""
        scores = []
        for run in runs:
            x = (_features(self.features, run, options) - self.mean) / self.scale
            ready = 1.0 / (1.0 + np.exp(-np.clip(x @ self.coefficients + self.intercept, -60, 60)))
            scores.append(np.where(training.is_decidable(run, options), ready, np.nan).astype(np.float32))
        return scores

    def to_dict(self) -> dict[str, Any]:
        """For the metadata of a predictor."""
        numbers = {name: getattr(self, name).round(6).tolist() for name in ("mean", "scale", "coefficients")}
        return {"features": self.features, **numbers, "intercept": round(self.intercept, 6)}

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "Regression":
        """What `to_dict` made."""
        arrays = [np.array(known[name], np.float64) for name in ("mean", "scale", "coefficients")]
        return cls(known["features"], arrays[0], arrays[1], arrays[2], float(known["intercept"]))


def _features(features: str, run: LabelledRun, options: TrainingOptions) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # weights that are not finite are not decided on
        if features == "statistics":
            made = statistics(run, options.window)
        elif features == "schedule":
            made = _schedule(run, options.window)
        else:
            made = -_log_change(run.weights, np.maximum(np.arange(run.weights.shape[1]) - CHANGE_RECORDS, 0))[..., None]
    return np.nan_to_num(made, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class Reliability:
    """How often what was said with some confidence was right: windows by their confidence, in ten equal bins.

    Attributes:
        counts: Windows in each bin, int64 `[10]`.
        said: Sum of their confidences, float64 `[10]`.
        ready: How many of them are labelled ready, int64 `[10]`.
    """

    counts: NDArray[np.int64]
    said: NDArray[np.float64]
    ready: NDArray[np.int64]

    @classmethod
    def of(cls, confidence: Scores, runs: Sequence[LabelledRun], options: TrainingOptions) -> "Reliability":
        """From confidences in [0, 1], of all windows of all runs."""
        pairs = list(training.decided_pairs(confidence, runs, options))
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
        """Mean confidence, share that is ready, and windows of each bin; NaN where there are none."""
        with np.errstate(invalid="ignore"):
            columns = self.said / self.counts, self.ready / self.counts, self.counts
        return [(float(said), float(ready), int(count)) for said, ready, count in zip(*columns, strict=True)]


class Judged(NamedTuple):
    """What one method is worth on some runs."""

    quality: Quality
    reliability: Reliability


def weight_change_confidence(runs: Sequence[LabelledRun], options: TrainingOptions, threshold: float) -> Scores:
    """What the policy `smartfrz.baselines.WeightChange` says whose limit is 10 ** -threshold; as `training.score`."""
    limit = np.float32(min(threshold, 30.0))  # infinite where it is right to freeze nothing
    scores = training.weight_change(runs, options)
    return [np.float32(1) / (1 + np.float32(10) ** np.clip(limit - score, -30, 30)) for score in scores]


@dataclass(frozen=True)
class Baselines:
    """What a predictor is judged beside: fitted on the runs that it was trained on.

    Attributes:
        weight_change: The threshold of `training.weight_change` with the highest accuracy.
        change: Makes a probability of weight change.
        schedule: The logistic regression on progress and position alone: what a fixed schedule can know.
        statistics: The logistic regression on simple statistics.
    """

    weight_change: float
    change: Regression
    schedule: Regression
    statistics: Regression

    @classmethod
    def fit(
        cls, train: Sequence[LabelledRun], everything: Sequence[LabelledRun], options: TrainingOptions
    ) -> "Baselines":
        """Fit them.

        Args:
            train: What the predictor is trained on.
            everything: With what it is validated on: the threshold of weight change needs no other validation.
            options: Those of the predictor.
        """
        threshold = training.best_accuracy_threshold(training.weight_change(everything, options), everything, options)
        fitted = [Regression.fit(features, train, options) for features in ("change", "schedule", "statistics")]
        return cls(threshold, *fitted)

    def scores(self, method: str, runs: Sequence[LabelledRun], options: TrainingOptions) -> Scores:
        """Of one of `METHODS` but the predictor: what is compared with a threshold."""
        if method in ("schedule", "logistic_regression"):
            return self.confidence(method, runs, options)
        return training.weight_change(runs, options)

    def confidence(self, method: str, runs: Sequence[LabelledRun], options: TrainingOptions) -> Scores:
        """The same, in [0, 1]: of calibrated weight change, what its regression says."""
        if method == "weight_change":
            return weight_change_confidence(runs, options, self.weight_change)
        known = {"weight_change_calibrated": self.change, "schedule": self.schedule}
        return known.get(method, self.statistics).score(runs, options)

    def judge(
        self, test: Sequence[LabelledRun], validation: Sequence[LabelledRun], options: TrainingOptions
    ) -> dict[str, Judged]:
        """All of them; thresholds but that of `weight_change` are calibrated on the validation runs, as the predictor's."""
        judged = {}
        for method in METHODS[1:]:
            threshold = self.weight_change
            if method != "weight_change":
                scores = self.scores(method, validation, options)
                threshold = training.calibrate(scores, validation, options, options.precision)
            quality = training.quality(self.scores(method, test, options), test, threshold, options)
            judged[method] = Judged(quality, Reliability.of(self.confidence(method, test, options), test, options))
        return judged


def can_hold_out(groups: Sequence[str]) -> bool:
    """Whether there are two groups, and without each two runs left: to train on and to validate on.

    Args:
        groups: Of each run.

    Example:
        >>> can_hold_out(["cnn", "cnn", "vit", "vit"]), can_hold_out(["cnn", "vit", "vit"])
        (True, False)
    """
    rest = [len(groups) - list(groups).count(group) for group in set(groups)]
    return len(rest) > 1 and min(rest) > 1


def leave_one_out(
    runs: Sequence[LabelledRun],
    options: TrainingOptions,
    group: Group = "architecture",
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    num_seeds: int = 3,
) -> dict[str, dict[str, list[Judged]]]:
    """Train without one architecture, or data set, and judge on it; the same for each.

    Args:
        runs: All of them.
        options: How to train.
        group: What is held out together: an attribute of `LabelledRun`.
        progress: Called with the fraction done, and what is being done.
        num_seeds: Of the predictor and of the split into training and validation runs.

    Returns:
        What was held out to `METHODS` to one judgement a seed.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    groups = sorted({getattr(run, group) for run in runs})
    if len(groups) < 2:
        raise ValueError(
            f"Holding out {'an architecture' if group == 'architecture' else 'a data set'} needs at least two: received "
            f"runs of {groups}. Record another one."
        )
    results: dict[str, dict[str, list[Judged]]] = {}
    for index, held_out in enumerate(groups):
        rest = [run for run in runs if getattr(run, group) != held_out]
        test = [run for run in runs if getattr(run, group) == held_out]
        methods = results[held_out] = {method: [] for method in METHODS}
        for number in range(num_seeds):
            seeded = dataclasses.replace(options, seed=options.seed + number)
            train, validation = training.split(rest, seeded.seed)

            def report(
                done: float, text: str, done_before: int = index * num_seeds + number, a: str = held_out
            ) -> None:
                progress((done_before + done) / len(groups) / num_seeds, f"without {a}: {text}")

            model = training.fit(train, validation, seeded, report)
            scores = training.score(model, validation, seeded)
            threshold = training.calibrate(scores, validation, seeded, seeded.precision)
            said = training.score(model, test, seeded)
            quality = training.quality(said, test, threshold, seeded)
            methods["predictor"].append(Judged(quality, Reliability.of(said, test, seeded)))
            for method, judged in Baselines.fit(train, rest, seeded).judge(test, validation, seeded).items():
                methods[method].append(judged)
    return results


def reliability_table(judged: Mapping[str, Sequence[Reliability]]) -> list[str]:
    """Markdown: of each method and bin, the share of windows that were ready; and the expected calibration error.

    Args:
        judged: Method to what is pooled.
    """
    pooled = {method: sum(found[1:], found[0]) for method, found in judged.items() if found}
    rows = [f"| confidence | {' | '.join(method.replace('_', ' ') for method in pooled)} |"]
    rows.append("|---" * (len(pooled) + 1) + "|")
    for place, cells in enumerate(zip(*(reliability.rows() for reliability in pooled.values()), strict=True)):
        shown = [f"{ready:.2f} ({count:,})" if count else "" for _, ready, count in cells]
        rows.append(f"| {place / NUM_BINS:.1f} to {(place + 1) / NUM_BINS:.1f} | {' | '.join(shown)} |")
    errors = [f"{reliability.error:.3f}" for reliability in pooled.values()]
    return [*rows, f"| expected calibration error | {' | '.join(errors)} |"]
