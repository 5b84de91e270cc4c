"""Labelled runs, and how a predictor is trained on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smartfrz.predictor.training.paths import Paths

Scores = list[NDArray[np.float32]]  # one array `[num_layers, timestamps]` per run, NaN where nothing is decided


@dataclass(frozen=True)
class LabelledRun:
    """A recorded run with its labels.

    Attributes:
        name: The run's name.
        architecture: Name of the architecture; cross-validation holds out all runs of one together.
        weights: A pool of sampled weights, float32 `[num_layers, timestamps, pool_size]`; of size 0 if there are `paths`.
        labels: 1 freeze, 0 keep training, -1 unknown; int8 `[num_layers, timestamps]`.
        targets: Training targets: how clearly to freeze, in [0, 1], float32 of the same shape.
            Defaults to the labels.
        dataset: Name of the data set; cross-validation holds out all runs of one together.
        paths: What the representation `trajectory` needs to know of the weights, instead of them; None if there are
            weights.
        loss: Mean training loss since the timestamp before, float32 `[timestamps]`, NaN where it is not known; None if it
            never is.
    """

    name: str
    architecture: str
    weights: NDArray[np.float32]
    labels: NDArray[np.int8]
    targets: NDArray[np.float32] | None = None
    dataset: str = "unknown"
    paths: Paths | None = None
    loss: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class TrainingOptions:
    """Options of training a predictor.

    Attributes:
        representation: What the MLPs see; see `smartfrz.predictor.training.model.represent`.
        window: Number of timestamps that the predictor reads.
        tailored_size: Number of weights per timestamp.
        min_records: Length of the shortest history that it judges.
        optimizer: `adamw`, or `sgd` with momentum 0.9 as in the paper.
        learning_rate: Peak of a cosine schedule.
        weight_decay: Weight decay; decoupled for `adamw`.
        dropout: Dropout rate of the context vector.
        jitter: The displacements of a window are scaled by a common random factor; this is its standard deviation in
            powers of ten. Not used for `raw`.
        jitter_slope: Effect of that factor on the target, whose odds change with this power of it. It teaches the
            predictor that layers which move more are less ready, beyond what the training runs show. 0 would teach it
            that the size of a displacement does not matter.
        unplaced: Share of the windows that hide the layer's position from a network that reads it, so that it can also
            answer callers that do not know positions. With 1 they are hidden always, also when it is scored.
        batch_size: Windows per step.
        steps_per_epoch: Steps between two evaluations on the validation runs.
        epochs: Maximum number of epochs.
        stop_after: Number of epochs without a better validation result after which training stops.
        precision: Share of right freezes on the validation runs for which the threshold is calibrated.
        pull: When a network is trained further: how strongly its weights are pulled back to their old values, instead of
            `weight_decay`. 0 disables it.
        seed: Seed of initial weights and sampling; the same seed trains the same predictor.
    """

    representation: str = "trajectory+loss"
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


def layer_positions(num_layers: int) -> NDArray[np.float32]:
    """Return the position of each layer of a run, as networks that read positions get it.

    Args:
        num_layers: Number of layers of the run; layers are recorded in execution order.

    Returns:
        float32 `[num_layers]`, from 0 for the first layer to 1 for the last; 0 for a single layer.
    """
    return np.linspace(0.0, 1.0, num_layers, dtype=np.float32)


def is_decidable(run: LabelledRun, options: TrainingOptions) -> NDArray[np.bool_]:
    """Find the timestamps of each layer at which a freezing decision can be judged.

    Args:
        run: The run.
        options: Window and shortest history.

    Returns:
        bool `[num_layers, timestamps]`: True where the history is long enough, the label is known, and the weights are
        finite as far back as the window reaches.
    """
    old_enough = np.arange(run.labels.shape[1]) >= options.min_records - 1
    bad = np.cumsum(~np.isfinite(run.weights).all(axis=2), axis=1)
    bad_before = np.pad(bad, ((0, 0), (options.window, 0)))[:, : bad.shape[1]]
    return (run.labels >= 0) & old_enough[None, :] & (bad == bad_before)


def has_both_labels(run: LabelledRun, options: TrainingOptions, every: int = 1) -> bool:
    """Return whether both labels occur among the decisions of a run that can be judged.

    Args:
        run: The run.
        options: Window and shortest history.
        every: Number of timestamps between two decisions, as between two freezing stages.
    """
    stages = slice(every - 1, None, every)
    return len(np.unique(run.labels[:, stages][is_decidable(run, options)[:, stages]])) == 2


def decided_pairs(scores: Scores, runs: Sequence[LabelledRun], options: TrainingOptions) -> Iterator[tuple[Any, Any]]:
    """Yield scores and labels of one run after the other.

    Args:
        scores: Scores of each run, float32 `[num_layers, timestamps]`; NaN where there is none.
        runs: The runs that were scored.
        options: Window and shortest history.

    Yields:
        Scores, float32 `[n]`, and labels, 0 or 1, int8 `[n]`, of everything that `is_decidable` and has a score.
    """
    for confidence, run in zip(scores, runs, strict=True):
        chosen = is_decidable(run, options) & ~np.isnan(confidence)
        yield confidence[chosen], run.labels[chosen]


def split(runs: Sequence[LabelledRun], seed: int = 0) -> tuple[list[LabelledRun], list[LabelledRun]]:
    """Split runs into runs to train on and runs to validate on: one of each architecture that has several.

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
