"""Training of a predictor on labelled runs."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from smartfrz.control.learned import RECORDS_PER_STAGE
from smartfrz.predictor.contract import READS_LOSS, UNKNOWN_LOSS, UNKNOWN_POSITION
from smartfrz.predictor.training.judging import mean_auc, score
from smartfrz.predictor.training.model import FreezePredictor, describe_path, real_rows
from smartfrz.predictor.training.paths import check_paths
from smartfrz.predictor.training.runs import (
    LabelledRun,
    TrainingOptions,
    decided_pairs,
    has_both_labels,
    is_decidable,
    layer_positions,
)

logger = logging.getLogger("smartfrz")


def fit(
    runs: Sequence[LabelledRun],
    validation: Sequence[LabelledRun],
    options: TrainingOptions,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    base: FreezePredictor | None = None,
) -> FreezePredictor:
    """Train a predictor, and keep the state that is best on the validation runs.

    Best means the highest AUC, or the highest likelihood if there is a base: a base already ranks layers well. What it
    has left to learn is how sure to be about new ones, which AUC does not measure.

    Args:
        runs: Runs to train on.
        validation: Whole runs that are not among `runs`, since windows of one run resemble each other.
        options: How to train.
        progress: Called with the fraction done and the latest result.
        base: A network to train further instead of a new one; it is not changed. Its own state is the first candidate,
            so the result is never less likely than the base on the validation runs.

    Returns:
        The network, in eval mode.

    Raises:
        ValueError: If `check_runs` refuses the runs, `base` differs from `options` in its tailored size or
            representation, or training diverges.

    Source:
        The pull is L2-SP of Li, Grandvalet and Davoine 2018 (arXiv:1802.01483), applied apart from the gradient, as
        AdamW applies weight decay.
    """
    check_runs(runs, validation, options)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model = FreezePredictor(options.tailored_size, options.representation, options.dropout)
    anchors = _start_from(base, model, options) if base is not None else []
    windows = _Windows(runs, options, rng)
    optimizer = _make_optimizer(model, options, 0.0 if anchors else options.weight_decay)
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
            loss = _train_step(model, optimizer, windows.draw())
            _pull(anchors, optimizer.param_groups[0]["lr"] * options.pull)
            scheduler.step()
            done = (epoch * options.steps_per_epoch + step + 1) / total
            progress(done, f"loss {loss:.3f}, best {measure} {best:.3f}")
        reached = _validate(model, validation, options)[measure]
        logger.debug("epoch %d: validation %s %.4f", epoch, measure, reached)
        since += 1
        if reached > best:
            best, best_state, since = reached, copy.deepcopy(model.state_dict()), 0
        if since >= options.stop_after:
            break
    model.load_state_dict(best_state)
    return model.eval()


def _make_optimizer(model: FreezePredictor, options: TrainingOptions, weight_decay: float) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), options.learning_rate, 0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=weight_decay)


def _train_step(model: FreezePredictor, optimizer: torch.optim.Optimizer, batch: "_Batch") -> float:
    if batch.evenness is None:
        logits, _ = model.logits(batch.history, batch.lengths, batch.position, batch.loss)
    else:
        real = real_rows(batch.history, batch.lengths)
        seen = describe_path(batch.start, batch.history, batch.evenness, real)
        logits, _ = model.judge(seen, real, batch.lengths, batch.position, batch.loss)
    loss = nn.functional.cross_entropy(logits, batch.targets)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _pull(anchors: list[tuple[nn.Parameter, torch.Tensor]], strength: float) -> None:
    for parameter, anchor in anchors:
        parameter.lerp_(anchor, min(1.0, strength))


def _start_from(
    base: FreezePredictor, model: FreezePredictor, options: TrainingOptions
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Copy the weights of `base` to `model`; return each parameter with the values that it is pulled to, if it is."""
    if (base.tailored_size, base.representation) != (options.tailored_size, options.representation):
        raise ValueError(
            f"`base` reads tailored_size={base.tailored_size} as {base.representation!r}, but the options say "
            f"{options.tailored_size} and {options.representation!r}; expected the same. Change the options."
        )
    model.load_state_dict(base.state_dict())
    return [(p, p.detach().clone()) for p in model.parameters()] if options.pull else []


def _validate(model: FreezePredictor, validation: Sequence[LabelledRun], options: TrainingOptions) -> dict[str, float]:
    """Compute means over the validation runs, at the freezing stages."""
    scores = score(model, validation, options, every=RECORDS_PER_STAGE)
    auc = mean_auc(scores, validation, options)
    if np.isnan(auc):
        raise ValueError(
            f"The network answers with NaN after training at a learning rate of {options.learning_rate:g}; expected "
            "confidences. Lower the learning rate."
        )
    likely = [
        np.log(np.where(y == 1, s, 1 - s) + 1e-6).mean()
        for s, y in decided_pairs(scores, validation, options)
        if len(y)
    ]
    return {"AUC": auc, "log likelihood": float(np.mean(likely))}


def check_runs(runs: Sequence[LabelledRun], validation: Sequence[LabelledRun], options: TrainingOptions) -> None:
    """Refuse before training what cannot be trained on.

    Args:
        runs: Runs to train on.
        validation: Runs to validate on.
        options: How to train.

    Raises:
        ValueError: If there are no runs, a pool is smaller than the tailored size, there are weights of some runs and paths
            of others, or no validation run has both labels at the freezing stages.
        DatasetFormatError: If `check_paths` refuses the paths of a run.
    """
    if not runs or not validation:
        raise ValueError(
            f"Training needs runs to train on and others to validate on: received {len(runs)} and {len(validation)}. "
            "Record more runs."
        )
    for run in (*runs, *validation):
        if run.paths is not None:
            check_paths(run.name, run.paths, options.representation, options.tailored_size)
        elif run.weights.shape[2] < options.tailored_size:
            raise ValueError(
                f"run {run.name!r} was recorded with pool_size={run.weights.shape[2]}, which is less than "
                f"tailored_size={options.tailored_size}. Record it again with a larger recording.pool_size."
            )
    kinds = {run.paths is None: run.name for run in (*runs, *validation)}
    if len(kinds) > 1:
        raise ValueError(
            f"There are weights of run {kinds[True]!r} and paths of run {kinds[False]!r}; expected the same of all. Make "
            "paths of all runs."
        )
    if not any(has_both_labels(run, options, RECORDS_PER_STAGE) for run in validation):
        raise ValueError(
            f"No validation run has both labels: received {[run.name for run in validation]}; expected layers that "
            "are ready and layers that are not. Change the tolerance, or record longer runs."
        )


class _Batch(NamedTuple):
    """Windows: of weights, or of displacements with the `start` and `evenness` that belong to them."""

    history: torch.Tensor
    lengths: torch.Tensor
    position: torch.Tensor
    targets: torch.Tensor
    start: torch.Tensor
    evenness: torch.Tensor | None
    loss: torch.Tensor | None


class _Window(NamedTuple):
    rows: NDArray[np.float32]
    position: float
    ready: float
    start: float
    evenness: NDArray[np.float32] | None
    loss: NDArray[np.float32] | None


class _Windows:
    """Draws training windows: all runs equally often, both labels equally often within a run, new samples each time."""

    def __init__(self, runs: Sequence[LabelledRun], options: TrainingOptions, rng: np.random.Generator):
        self._runs, self._options, self._rng = runs, options, rng
        # Apart from the other random numbers, of which weights and paths need the same.
        self._samples_rng = np.random.default_rng([options.seed, 1])
        dimensions = [options.tailored_size if run.paths is None else run.paths.moved.shape[3] for run in runs]
        self._dimensions = max(dimensions)
        self._places = [
            [np.argwhere((run.labels == label) & is_decidable(run, options)) for label in (0, 1)] for run in runs
        ]
        for run, places in zip(runs, self._places, strict=True):
            if not any(map(len, places)):
                raise ValueError(
                    f"run {run.name!r} has no timestamp to train on: expected known labels and finite weights at some. "
                    "Look at it with smartfrz-build label, or leave it out."
                )

    def draw(self) -> _Batch:
        options = self._options
        windows = [self._draw_window(row % 2) for row in range(options.batch_size)]
        history = np.zeros((options.batch_size, options.window, self._dimensions), np.float32)
        evenness = None if windows[0].evenness is None else np.zeros(history.shape[:2], np.float32)
        loss = np.full(history.shape[:2], UNKNOWN_LOSS, np.float32) if options.representation in READS_LOSS else None
        for row, window in enumerate(windows):
            real = slice(options.window - len(window.rows), None)
            history[row, real, : window.rows.shape[1]] = window.rows
            if evenness is not None:
                evenness[row, real] = window.evenness
            if loss is not None and window.loss is not None:
                loss[row, real] = window.loss
        return _Batch(
            torch.from_numpy(history),
            torch.tensor([len(window.rows) for window in windows]),
            torch.tensor([window.position for window in windows], dtype=torch.float32),
            torch.tensor([[1.0 - window.ready, window.ready] for window in windows], dtype=torch.float32),
            torch.tensor([window.start for window in windows], dtype=torch.float32),
            None if evenness is None else torch.from_numpy(evenness),
            None if loss is None else torch.from_numpy(loss),
        )

    def _draw_window(self, label: int) -> _Window:
        """Draw a window with that label, if the run has it."""
        options, rng = self._options, self._rng
        index = int(rng.integers(len(self._runs)))
        run, places = self._runs[index], self._places[index]
        label = label if len(places[label]) else 1 - label
        layer, timestamp = places[label][rng.integers(len(places[label]))]
        hidden = rng.random() < options.unplaced
        position = UNKNOWN_POSITION if hidden else layer_positions(len(run.weights))[layer]
        past = slice(max(0, timestamp + 1 - options.window), timestamp + 1)
        start, evenness, loss = 0.0, None, None
        if options.representation in READS_LOSS and run.loss is not None:
            loss = run.loss[past]
        if run.paths is None:
            samples = self._samples_rng.choice(run.weights.shape[2], options.tailored_size, replace=False)
            rows = run.weights[layer, past][:, samples]
        else:
            draw = self._samples_rng.integers(len(run.paths.start))
            rows, start = run.paths.moved[draw, layer, past], float(run.paths.start[draw, layer])
            evenness = run.paths.evenness[draw, layer, timestamp, past]
        ready = float(label if run.targets is None else run.targets[layer, timestamp])
        if options.representation != "raw" and options.jitter:
            rows, ready = self._jitter(rows, ready)
        return _Window(rows, position, ready, start, evenness, loss)

    def _jitter(self, rows: NDArray[np.float32], ready: float) -> tuple[NDArray[np.float32], float]:
        decades = self._rng.normal(scale=self._options.jitter)
        odds = (1 - ready + 1e-6) / (ready + 1e-6) * 10.0 ** (decades * self._options.jitter_slope)
        return rows[-1] + (rows - rows[-1]) * np.float32(10.0**decades), 1.0 / (1.0 + odds)
