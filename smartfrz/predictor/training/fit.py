"""Training a predictor offline, and judging it on runs that it has not seen."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn

from smartfrz.control.learned import PATIENCE, RECORDS_PER_STAGE
from smartfrz.control.weight_change import CHANGE_RECORDS, relative_change
from smartfrz.predictor.contract import UNKNOWN_POSITION
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.model import FreezePredictor

logger = logging.getLogger("smartfrz")
Scores = list[NDArray[np.float32]]


@dataclass(frozen=True)
class LabelledRun:
    """One recorded run with its labels.

    Attributes:
        name: The run's name.
        architecture: Architectures are held out together.
        weights: A pool of sampled weights, float32 `[num_layers, timestamps, pool_size]`.
        labels: 1 freeze, 0 keep training, -1 unknown; int8 `[num_layers, timestamps]`.
        targets: What is trained on: how clearly to freeze, in [0, 1], float32 of the same shape.
            Defaults to the labels.
        dataset: Data sets are held out together.
    """

    name: str
    architecture: str
    weights: NDArray[np.float32]
    labels: NDArray[np.int8]
    targets: NDArray[np.float32] | None = None
    dataset: str = "unknown"


@dataclass(frozen=True)
class TrainingOptions:
    """How the predictor is trained.

    Attributes:
        representation: What the MLPs see; see `smartfrz.predictor.training.model.represent`.
        window: Timestamps that it reads.
        tailored_size: Weights a timestamp.
        min_records: Shortest history that it decides on.
        optimizer: `adamw`, or `sgd` with momentum 0.9 as in the paper.
        learning_rate: Peak of a cosine schedule.
        weight_decay: Decoupled for `adamw`.
        dropout: On the context vector.
        jitter: Displacements of a window are scaled by a common random factor, of this standard
            deviation in powers of ten. Not for `raw`.
        jitter_slope: How the target follows: its odds change with this power of the factor. The
            predictor so learns that layers which move more are less ready, in general and not only
            as far as the training runs show it. 0 would teach it that the size does not matter.
        unplaced: Share of the windows whose layer's position is kept from a network that reads it, so that it also
            answers callers that do not know it. With 1 it is never told, here or when it is scored.
        batch_size: Windows a step.
        steps_per_epoch: Steps between two evaluations on the validation runs.
        epochs: At most so many.
        stop_after: Epochs without a better validation result after which training stops.
        precision: Share of right freezes that the threshold is calibrated for on the validation runs.
        pull: Where a network is trained further: how strongly its weights are pulled back to where they were, in the
            place of `weight_decay`. 0 lets them go.
        seed: Of initial weights and sampling; the same seed trains the same predictor.
    """

    representation: str = "trajectory"
    window: int = 30
    tailored_size: int = 1024
    min_records: int = 4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    dropout: float = 0.2
    jitter: float = 0.5
    jitter_slope: float = 2.0
    unplaced: float = 0.15
    batch_size: int = 64
    steps_per_epoch: int = 40
    epochs: int = 10
    stop_after: int = 4
    precision: float = 0.9
    pull: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Quality:
    """How well scores separate labels.

    Attributes:
        auc: Area under the ROC curve, of each run by itself; NaN if there is only one class.
        pooled_auc: The same over the windows of all runs together, as one threshold has to serve all.
        accuracy: At the threshold.
        precision: Share of right ones among the positive answers at the threshold; NaN without any.
        recall: Share of the ready layers that are found at the threshold.
        positive: Share of positive labels.
        freeze_precision: Share of right freezes: one per layer, at the freezing stage at which its
            score has reached the threshold as many times in a row as patience asks.
        frozen_share: How much of all layers' training time lies behind those freezes.
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
        """Rounded to four digits."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


class _Windows:
    """Draws training windows: runs alike, labels alike within a run, positions anew each time."""

    def __init__(self, runs: Sequence[LabelledRun], options: TrainingOptions, rng: np.random.Generator):
        self._runs, self._options, self._rng = runs, options, rng
        self._places = [
            [np.argwhere((run.labels == label) & is_decidable(run, options)) for label in (0, 1)] for run in runs
        ]
        for run, places in zip(runs, self._places, strict=True):
            if not any(map(len, places)):
                raise ValueError(
                    f"run {run.name!r} has no timestamp that can be trained on: expected known labels and finite weights "
                    "at some. Look at it with smartfrz-build label, or leave it out."
                )

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        options, rng = self._options, self._rng
        history = np.zeros((options.batch_size, options.window, options.tailored_size), np.float32)
        lengths = np.empty(options.batch_size, np.int64)
        targets = np.empty((options.batch_size, 2), np.float32)
        places = np.empty(options.batch_size, np.float32)
        for row in range(options.batch_size):
            index = int(rng.integers(len(self._runs)))
            wanted = row % 2 if len(self._places[index][row % 2]) else 1 - row % 2
            layer, timestamp = self._places[index][wanted][rng.integers(len(self._places[index][wanted]))]
            weights = self._runs[index].weights
            hidden = rng.random() < options.unplaced
            places[row] = UNKNOWN_POSITION if hidden else places_of(len(weights))[layer]
            positions = rng.choice(weights.shape[2], options.tailored_size, replace=False)
            lengths[row] = min(timestamp + 1, options.window)
            rows = weights[layer, timestamp + 1 - lengths[row] : timestamp + 1][:, positions]
            soft = self._runs[index].targets
            ready = float(wanted if soft is None else soft[layer, timestamp])
            if options.representation != "raw" and options.jitter:
                decades = rng.normal(scale=options.jitter)
                rows = rows[-1] + (rows - rows[-1]) * np.float32(10.0**decades)
                odds = (1 - ready + 1e-6) / (ready + 1e-6) * 10.0 ** (decades * options.jitter_slope)
                ready = 1.0 / (1.0 + odds)
            history[row, options.window - lengths[row] :] = rows
            targets[row] = 1.0 - ready, ready
        return tuple(map(torch.from_numpy, (history, lengths, places, targets)))  # type: ignore[return-value]


def places_of(num_layers: int) -> NDArray[np.float32]:
    """Where in the network each layer of a run stands: what a network that reads positions is told of them.

    Args:
        num_layers: Of the run; layers are recorded in execution order.

    Returns:
        float32 `[num_layers]`, from 0 for the first one to 1 for the last; 0 for an only one.
    """
    return np.linspace(0.0, 1.0, num_layers, dtype=np.float32)


def is_decidable(run: LabelledRun, options: TrainingOptions) -> NDArray[np.bool_]:
    """At which timestamps of which layers a freezing decision can be judged.

    Args:
        run: The run.
        options: Window and shortest history.

    Returns:
        bool `[num_layers, timestamps]`: where the history is long enough, the label known, and the weights are finite as
        far back as the window reaches.
    """
    old_enough = np.arange(run.labels.shape[1]) >= options.min_records - 1
    bad = np.cumsum(~np.isfinite(run.weights).all(axis=2), axis=1)
    bad_before = np.pad(bad, ((0, 0), (options.window, 0)))[:, : bad.shape[1]]
    return (run.labels >= 0) & old_enough[None, :] & (bad == bad_before)


def fit(
    runs: Sequence[LabelledRun],
    validation: Sequence[LabelledRun],
    options: TrainingOptions,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    base: FreezePredictor | None = None,
) -> FreezePredictor:
    """Train a predictor; keep its best state on the validation runs: by AUC, or by likelihood where there is a base.

    Args:
        runs: To train on.
        validation: Whole runs that are not among `runs`: windows of one run resemble each other.
        options: How.
        progress: Called with the fraction done and the latest result.
        base: A network to train further instead of a new one; left as it is. Its own state counts as the first
            candidate, so that the result is never less likely than it on the validation runs. A base ranks layers well
            already; how sure to be of new ones is what is left to learn, and AUC does not see that.

    Returns:
        The network, in eval mode.

    Raises:
        ValueError: If there are no runs, a pool is smaller than the tailored size, or `base` is of another tailored
            size or representation than `options`.

    Source:
        The pull is L2-SP of Li, Grandvalet and Davoine 2018 (arXiv:1802.01483), applied beside the optimizer's step as
        AdamW does with weight decay, instead of through the gradient.
    """
    _check_runs(runs, validation, options)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model = FreezePredictor(options.tailored_size, options.representation, options.dropout)
    anchors = _start_from(base, model, options) if base is not None else []
    windows = _Windows(runs, options, rng)
    parameters = model.parameters()
    optimizer: torch.optim.Optimizer
    decay = 0.0 if anchors else options.weight_decay
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, options.learning_rate, 0.9, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(parameters, options.learning_rate, weight_decay=decay)
    total = options.epochs * options.steps_per_epoch
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=total, pct_start=0.1, cycle_momentum=False
    )
    measure = "AUC" if base is None else "log likelihood"
    best = -1.0 if base is None else _validate(model, validation, options)[measure]
    best_state, since = copy.deepcopy(model.state_dict()), 0
    for epoch in range(options.epochs):
        model.train()
        for step in range(options.steps_per_epoch):
            history, lengths, places, targets = windows.batch()
            loss = nn.functional.cross_entropy(model.logits(history, lengths, places)[0], targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for parameter, anchor in anchors:
                    parameter.lerp_(anchor, min(1.0, optimizer.param_groups[0]["lr"] * options.pull))
            scheduler.step()
            progress(
                (epoch * options.steps_per_epoch + step + 1) / total,
                f"loss {loss.item():.3f}, best {measure} {best:.3f}",
            )
        reached = _validate(model, validation, options)[measure]
        logger.debug("epoch %d: validation %s %.4f", epoch, measure, reached)
        since += 1
        if reached > best:
            best, best_state, since = reached, copy.deepcopy(model.state_dict()), 0
        if since >= options.stop_after:
            break
    model.load_state_dict(best_state)
    return model.eval()


def _start_from(
    base: FreezePredictor, model: FreezePredictor, options: TrainingOptions
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Give `model` the weights of `base`; each parameter with where it is to be pulled to, if it is."""
    if (base.tailored_size, base.representation) != (options.tailored_size, options.representation):
        raise ValueError(
            f"`base` reads tailored_size={base.tailored_size} as {base.representation!r}, but the options say "
            f"{options.tailored_size} and {options.representation!r}; expected the same. Change the options."
        )
    model.load_state_dict(base.state_dict())
    return [(p, p.detach().clone()) for p in model.parameters()] if options.pull else []


def _validate(model: FreezePredictor, validation: Sequence[LabelledRun], options: TrainingOptions) -> dict[str, float]:
    """Means over the validation runs, at the freezing stages."""
    scores = score(model, validation, options, every=RECORDS_PER_STAGE)
    auc = mean_auc(scores, validation, options)
    if np.isnan(auc):
        raise ValueError(
            f"No validation run has both labels: received {[run.name for run in validation]}; expected layers that "
            "are ready and layers that are not. Change the tolerance, or record longer runs."
        )
    likely = [
        np.log(np.where(y == 1, s, 1 - s) + 1e-6).mean()
        for s, y in decided_pairs(scores, validation, options)
        if len(y)
    ]
    return {"AUC": auc, "log likelihood": float(np.mean(likely))}


def _check_runs(runs: Sequence[LabelledRun], validation: Sequence[LabelledRun], options: TrainingOptions) -> None:
    if not runs or not validation:
        raise ValueError(
            f"Training needs runs to train on and others to validate on: received {len(runs)} and {len(validation)}. "
            "Record more runs."
        )
    for run in (*runs, *validation):
        if run.weights.shape[2] < options.tailored_size:
            raise ValueError(
                f"run {run.name!r} was recorded with pool_size={run.weights.shape[2]}, which is less than "
                f"tailored_size={options.tailored_size}. Record it again with a larger recording.pool_size."
            )


def score(
    model: FreezePredictor | Predictor,
    runs: Sequence[LabelledRun],
    options: TrainingOptions,
    every: int = 1,
    *,
    placed: bool = True,
) -> Scores:
    """Confidence that freezing is right, for every layer and timestamp of every run.

    Args:
        model: The network, or a loaded predictor file.
        runs: The runs.
        options: Window, tailored size and shortest history.
        every: Score only every so many timestamps, as freezing stages do.
        placed: Tell a model that reads it where in the network each layer stands.

    Returns:
        One float32 `[num_layers, timestamps]` a run, NaN where nothing is decided.
    """
    scores = []
    for run in runs:
        decidable = is_decidable(run, options)
        confidence = np.full(run.labels.shape, np.nan, np.float32)
        # Any fixed positions do; a stride keeps them spread over the layer.
        pool = run.weights.shape[2]
        positions = np.arange(options.tailored_size) * pool // options.tailored_size
        for timestamp in range(options.min_records - 1, run.labels.shape[1]):
            layers = np.flatnonzero(decidable[:, timestamp])
            if (timestamp + 1) % every or not len(layers):
                continue
            length = min(timestamp + 1, options.window)
            rows = run.weights[layers, timestamp + 1 - length : timestamp + 1][:, :, positions]
            lengths = np.full(len(layers), length, np.int64)
            places = (
                places_of(len(run.labels))[layers] if model.positional and placed and options.unplaced < 1 else None
            )
            answer = _ask(model, np.ascontiguousarray(rows), lengths, places)
            confidence[layers, timestamp] = answer[:, 1]
        scores.append(confidence)
    return scores


def _ask(
    model: FreezePredictor | Predictor,
    history: NDArray[np.float32],
    lengths: NDArray[np.int64],
    places: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    if isinstance(model, Predictor):
        return model.predict(history, lengths, places).confidence
    model.eval()
    position = None if places is None else torch.from_numpy(places)
    with torch.no_grad():
        logits = model.logits(torch.from_numpy(history), torch.from_numpy(lengths), position)[0]
    answer: NDArray[np.float32] = logits.softmax(-1).numpy()
    return answer


def weight_change(runs: Sequence[LabelledRun], options: TrainingOptions, records: int = CHANGE_RECORDS) -> Scores:
    """The baseline: minus the relative change of the weights over the last records.

    Returns:
        log10 of |W_t - W_{t-records}| / |W_t|, negated so that more means readier; NaN where
        the predictor decides nothing either. Shapes as in `score`.
    """
    scores = []
    for run in runs:
        weights = run.weights
        before = np.maximum(np.arange(weights.shape[1]) - records, 0)
        change = relative_change(weights, weights[:, before])
        scores.append(np.where(is_decidable(run, options), -np.log10(change + 1e-12), np.nan).astype(np.float32))
    return scores


def decided_pairs(scores: Scores, runs: Sequence[LabelledRun], options: TrainingOptions) -> Iterator[tuple[Any, Any]]:
    """Scores beside labels, of one run after the other.

    Args:
        scores: Of each run, float32 `[num_layers, timestamps]`; NaN where there is none.
        runs: Those that were scored.
        options: Window and shortest history.

    Yields:
        Scores, float32 `[n]`, and labels, 0 or 1, int8 `[n]`, of what `is_decidable` and has a score.
    """
    for confidence, run in zip(scores, runs, strict=True):
        chosen = is_decidable(run, options) & ~np.isnan(confidence)
        yield confidence[chosen], run.labels[chosen]


def mean_auc(scores: Scores, runs: Sequence[LabelledRun], options: TrainingOptions) -> float:
    """Mean over the runs of each run's AUC; runs with one class are left out."""
    aucs = [_auc(s, y) for s, y in decided_pairs(scores, runs, options)]
    return float(np.nanmean(aucs)) if np.isfinite(aucs).any() else float("nan")


def _auc(scores: NDArray[np.float32], labels: NDArray[np.int8]) -> float:
    return float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else float("nan")


def quality(
    scores: Scores,
    runs: Sequence[LabelledRun],
    threshold: float,
    options: TrainingOptions,
    stage: int = RECORDS_PER_STAGE,
    patience: int = PATIENCE,
) -> Quality:
    """Judge scores; every run counts alike.

    Args:
        scores: From `score` or `weight_change`.
        runs: The runs they belong to.
        threshold: From which a score counts as positive.
        options: As for `score`.
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


def first_freezes(
    confidence: NDArray[np.float32], threshold: float, patience: int, stage: int
) -> list[tuple[int, int]]:
    """When each layer would freeze: (layer, timestamp), layers that never would are left out.

    Args:
        confidence: float32 `[num_layers, timestamps]`, NaN where nothing is decided.
        threshold: Confidence from which a layer is ready.
        patience: Freezing stages in a row at which it must be.
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
    """The lowest threshold at which that share of freezes is right; every run counts alike.

    What counts is the moment at which a layer freezes, not every window by itself: a confidence
    that is right nine times of ten still freezes most layers too early, at the first error.

    Returns:
        The threshold. Where none reaches the precision: the one with the highest.
    """
    values = np.concatenate([s for s, _ in decided_pairs(scores, runs, options)])
    best, best_precision = float(values.max()), -1.0
    for threshold in np.unique(np.quantile(values, np.linspace(0, 0.99, 100), method="nearest")):
        rights = []
        for confidence, run in zip(scores, runs, strict=True):
            frozen = first_freezes(confidence, threshold, PATIENCE, RECORDS_PER_STAGE)
            rights += [np.mean([run.labels[place] == 1 for place in frozen])] if frozen else []
        reached = float(np.mean(rights)) if 2 * len(rights) >= len(runs) else -1.0  # of enough runs to mean something
        if reached >= precision:
            return float(threshold)
        if reached > best_precision:
            best, best_precision = float(threshold), reached
    return best


def best_accuracy_threshold(scores: Scores, runs: Sequence[LabelledRun], options: TrainingOptions) -> float:
    """The threshold with the highest accuracy on the given runs; infinite if that is to freeze nothing."""
    pairs = list(decided_pairs(scores, runs, options))
    values, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    order = np.argsort(-values, kind="stable")
    gain = np.where(_ends_of_ties(values[order]), np.cumsum(np.where(labels[order] == 1, 1, -1)), -len(order))
    best = int(np.argmax(gain))
    return float(values[order][best]) if gain[best] > 0 else float("inf")


def _ends_of_ties(descending: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a threshold can be: it takes all equal scores or none."""
    return np.append(np.diff(descending) != 0, True)


def split(runs: Sequence[LabelledRun], seed: int = 0) -> tuple[list[LabelledRun], list[LabelledRun]]:
    """Runs to train on and runs to validate on: one of each architecture that has several.

    With one run of each architecture, the last run validates.
    """
    rng = np.random.default_rng(seed)
    held: list[str] = []
    for architecture in sorted({run.architecture for run in runs}):
        names = sorted(run.name for run in runs if run.architecture == architecture)
        if len(names) > 1:
            held.append(names[int(rng.integers(len(names)))])
    if not held:
        held = [sorted(run.name for run in runs)[-1]]
    return [r for r in runs if r.name not in held], [r for r in runs if r.name in held]


def leave_one_architecture_out(
    runs: Sequence[LabelledRun],
    options: TrainingOptions,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    num_seeds: int = 3,
) -> dict[str, dict[str, list[Quality]]]:
    """Train without one architecture and judge on it; the same for each. See `smartfrz.predictor.training.judging`.

    Returns:
        Architecture to method to one result a seed. The threshold of `weight_change` is the most accurate one on the
        training runs; the others are calibrated on the validation runs.

    Raises:
        ValueError: If there are fewer than two architectures.
    """
    from smartfrz.predictor.training.judging import leave_one_out  # which builds on this module

    judged = leave_one_out(runs, options, "architecture", progress, num_seeds)
    return {
        held_out: {method: [one.quality for one in found] for method, found in methods.items()}
        for held_out, methods in judged.items()
    }
