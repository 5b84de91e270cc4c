"""What freezing the first layers at some moment costs: measured points, the surface through them, and what it is good for.

Moments are fractions of the run, in [0, 1]. Depths are numbers of layers, counted in execution order. A cost is what the
end of the run loses: accuracy as a fraction of 1 (0.01 is a point), loss in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Measure = Literal["accuracy", "loss", "expected"]
LEAST_EXPLAINED = 0.5
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FreezeCosts:
    """How branches of a run ended whose first layers were frozen in the middle of it.

    Attributes:
        steps: Steps after which was frozen, int64 `[moments]`, increasing.
        depths: Numbers of layers that were frozen, int64 `[depths]`, increasing. For all layers it is how good the network
            was at that moment.
        loss: Validation loss at the end, float64 `[moments, depths]` in nats; NaN if the branch diverged.
        accuracy: Accuracy at the end in [0, 1], of the same shape; NaN if the branch diverged.
        final_loss: Loss of the run itself at its end.
        final_accuracy: Accuracy of the run itself at its end.
        total_steps: Steps of the run.
        num_examples: Number of examples that were judged.
        saved: Share of a step's floating point operations that the first 0, 1, 2 ... layers save once they are frozen,
            float64 `[num_layers + 1]`.
    """

    steps: NDArray[np.int64]
    depths: NDArray[np.int64]
    loss: Floats
    accuracy: Floats
    final_loss: float
    final_accuracy: float
    total_steps: int
    num_examples: int
    saved: Floats

    @property
    def moments(self) -> Floats:
        """The moments as fractions of the run, float64 `[moments]`."""
        return self.steps / self.total_steps

    @property
    def num_layers(self) -> int:
        """Number of layers of the network."""
        return len(self.saved) - 1

    def lost(self, measure: Measure) -> Floats:
        """Return what each branch lost against the run itself, float64 `[moments, depths]`; negative if it gained.

        Args:
            measure: `"accuracy"` as a fraction of 1, `"loss"` in nats, or `"expected"`: the accuracy that branches of this
                run lose in the mean whose loss grows as much. On two thousand examples a loss is far less noisy than an
                accuracy. It is the accuracy itself where all layers are frozen, and in runs whose losses explain less
                than half of what the accuracies vary by.

        Raises:
            ValueError: If there is no such measure.
        """
        if measure not in get_args(Measure):
            raise ValueError(f"`measure` is {measure!r}; expected one of {', '.join(map(repr, get_args(Measure)))}.")
        accuracy, loss = self.final_accuracy - self.accuracy, self.loss - self.final_loss
        if measure != "expected":
            return loss if measure == "loss" else accuracy
        partly = np.broadcast_to(self.depths < self.num_layers, loss.shape)
        known = partly & np.isfinite(loss)
        x, y = loss[known], accuracy[known]
        slope = max(0.0, float((x * y).sum() / max((x * x).sum(), 1e-12)))
        if ((y - slope * x) ** 2).sum() > (1 - LEAST_EXPLAINED) * (y * y).sum():
            return accuracy
        return np.where(partly, slope * loss, accuracy)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data in which None stands for NaN, which JSON lacks."""
        grids = {name: [_plain(row) for row in getattr(self, name)] for name in ("loss", "accuracy")}
        rows = {name: getattr(self, name).tolist() for name in ("steps", "depths", "saved")}
        single = {n: getattr(self, n) for n in ("final_loss", "final_accuracy", "total_steps", "num_examples")}
        return {**rows, **grids, **single}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "FreezeCosts":
        """Make what `to_dict` described.

        Raises:
            ValueError: If entries are missing, or are not what they should be.
        """
        try:
            costs = cls(
                steps=_integers(data["steps"]),
                depths=_integers(data["depths"]),
                loss=np.array(data["loss"], np.float64),
                accuracy=np.array(data["accuracy"], np.float64),
                final_loss=float(data["final_loss"]),
                final_accuracy=float(data["final_accuracy"]),
                total_steps=int(data["total_steps"]),
                num_examples=int(data["num_examples"]),
                saved=np.array(data["saved"], np.float64),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"an entry is missing or of another kind ({type(error).__name__}: {error})") from error
        for wrong in costs._problems():
            raise ValueError(wrong)
        return costs

    def _problems(self) -> Sequence[str]:
        shape = len(self.steps), len(self.depths)
        if self.steps.ndim != 1 or self.depths.ndim != 1 or self.saved.ndim != 1 or not min(*shape, len(self.saved)):
            return ["steps, depths and saved are not three lists of numbers"]
        finite_loss, finite_accuracy = np.isfinite(self.loss), np.isfinite(self.accuracy)
        within = (self.accuracy >= 0) & (self.accuracy <= 1)
        checks = {
            "its losses or accuracies are not one for each moment and depth": self.loss.shape == shape
            and self.accuracy.shape == shape,
            "its steps do not increase from 1 to less than the total": bool(
                self.steps[0] >= 1 and self.steps[-1] < self.total_steps and (np.diff(self.steps) > 0).all()
            ),
            "its depths do not increase from 1 to the number of layers": bool(
                self.depths[0] >= 1 and self.depths[-1] <= self.num_layers and (np.diff(self.depths) > 0).all()
            ),
            "an accuracy is neither NaN nor in [0, 1]": bool((within | np.isnan(self.accuracy)).all()),
            "a loss is neither NaN nor finite": not np.isinf(self.loss).any(),
            "a branch has a loss or an accuracy, and not both": np.array_equal(finite_loss, finite_accuracy),
            "its own loss or accuracy is not finite": bool(
                np.isfinite(self.final_loss) and 0 <= self.final_accuracy <= 1
            ),
            "what is saved does not grow within [0, 1]": bool(
                np.isfinite(self.saved).all()
                and self.saved[0] >= 0
                and self.saved[-1] <= 1
                and (np.diff(self.saved) >= 0).all()
            ),
        }
        return [problem for problem, fine in checks.items() if not fine]


def _plain(row: Floats) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in row]


def _integers(values: Any) -> NDArray[np.int64]:
    numbers = np.array(values)
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"received {values!r}, expected integers")
    return numbers.astype(np.int64)


class CostSurface:
    """What freezing the first layers costs at any moment and depth.

    It is the monotone surface with the least squared distance to what was measured: no later moment costs more, and no
    greater depth costs less. In between it is bilinear. Freezing nothing, or at the end of the run, costs nothing, so that
    no cost is negative: a gain counts as no cost. Before the first moment the first two are continued, beyond the greatest
    depth its cost stays. A branch that diverged costs infinity, and so does freezing more, or earlier.

    Args:
        moments: Measured moments, `[moments]`, increasing, in (0, 1).
        depths: Measured depths, `[depths]`, increasing, from 1.
        cost: What was lost, `[moments, depths]`; NaN where the branch diverged.

    Raises:
        ValueError: If the shapes do not fit, or moments or depths do not increase.
    """

    def __init__(self, moments: Any, depths: Any, cost: Any):
        moments, depths, cost = (np.asarray(values, np.float64) for values in (moments, depths, cost))
        if (
            cost.shape != (len(moments), len(depths))
            or not cost.size
            or not (np.diff(moments, prepend=0.0, append=1.0) > 0).all()
            or not (np.diff(depths, prepend=0.0) > 0).all()
        ):
            raise ValueError(
                f"The cost surface received moments {moments}, depths {depths} and costs of shape {cost.shape}; expected "
                "increasing moments in (0, 1), increasing depths from 1, and a cost for each of both."
            )
        failed = np.isnan(cost)
        failed = np.logical_or.accumulate(failed, axis=1)  # deeper
        failed = np.logical_or.accumulate(failed[::-1], axis=0)[::-1]  # earlier
        fitted = np.maximum(fit_monotone(np.where(np.isnan(cost), 0.0, cost), ~np.isnan(cost)), 0.0)
        first = fitted[0]
        if len(moments) > 1:
            slope = (fitted[0] - fitted[1]) / (moments[1] - moments[0])
            first = np.maximum.accumulate(first + slope * moments[0])  # it may rise with depth less steeply, or fall
        self._moments = np.array([0.0, *moments, 1.0])
        self._depths = np.array([0.0, *depths])
        self._cost = np.zeros((len(self._moments), len(self._depths)))
        self._cost[:-1, 1:] = [first, *fitted]
        self._failed = np.zeros(self._cost.shape, bool)
        self._failed[:-1, 1:] = [failed[0], *failed]

    @classmethod
    def of(cls, costs: FreezeCosts, measure: Measure = "expected") -> "CostSurface":
        """Fit a surface to the costs of one recording."""
        return cls(costs.moments, costs.depths, costs.lost(measure))

    def __call__(self, moment: Any, depth: Any) -> Floats:
        """Return the cost of freezing `depth` layers at `moment`.

        Args:
            moment: Fractions of the run; beyond [0, 1] as at its ends.
            depth: Numbers of layers, which need not be whole; both are broadcast.

        Returns:
            float64 of the broadcast shape; infinity where training would diverge.
        """
        moment, depth = np.broadcast_arrays(np.asarray(moment, np.float64), np.asarray(depth, np.float64))
        row, down = _place(self._moments, moment)
        column, right = _place(self._depths, depth)
        cost, failed = np.zeros(moment.shape), np.zeros(moment.shape, bool)
        for i, weight_i in ((row, 1 - down), (row + 1, down)):
            for j, weight_j in ((column, 1 - right), (column + 1, right)):
                weight = weight_i * weight_j
                cost += weight * self._cost[i, j]
                failed |= (weight > 0) & self._failed[i, j]
        return np.where(failed, np.inf, cost)


def _place(grid: Floats, values: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Return the interval of the grid that each value is in, and how far into it, in [0, 1]."""
    index = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, len(grid) - 2)
    return index, np.clip((values - grid[index]) / (grid[index + 1] - grid[index]), 0.0, 1.0)


def fit_monotone(values: Any, known: Any = None) -> Floats:
    """Return the matrix with the least squared distance that falls along the first axis and rises along the second.

    Args:
        values: Matrix, finite.
        known: Boolean matrix; where it is False the value counts for nothing. Default: all are known.

    Source:
        Dykstra's alternating projections (Dykstra 1983), each onto isotonic rows or columns by pooling adjacent violators
        (Ayer et al. 1955).
    """
    values = np.asarray(values, np.float64)
    weight = np.ones(values.shape) if known is None else np.where(known, 1.0, 1e-9)
    fitted, left, right = values.copy(), np.zeros(values.shape), np.zeros(values.shape)
    for _ in range(1000):
        rows = np.stack([_rising(*pair) for pair in zip(fitted + left, weight, strict=True)])
        left = fitted + left - rows
        pairs = zip((rows + right).T[:, ::-1], weight.T[:, ::-1], strict=True)
        columns = np.stack([_rising(*pair)[::-1] for pair in pairs]).T
        right = rows + right - columns
        moved, fitted = np.abs(columns - fitted).max(), columns
        if moved <= 1e-12 * max(1.0, np.abs(values).max()):
            break
    # What is left of violations after so many turns
    fitted = np.maximum.accumulate(fitted, axis=1)
    result: Floats = np.maximum.accumulate(fitted[::-1], axis=0)[::-1]
    return result


def _rising(values: Floats, weight: Floats) -> Floats:
    """Pool adjacent violators of a sequence until it does not fall."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, share in zip(values.tolist(), weight.tolist(), strict=True):
        mean, total, length = value, share, 1
        while blocks and blocks[-1][0] > mean:
            before, its_weight, its_length = blocks.pop()
            mean = (mean * total + before * its_weight) / (total + its_weight)
            total, length = total + its_weight, length + its_length
        blocks.append((mean, total, length))
    return np.repeat([mean for mean, _, _ in blocks], [length for _, _, length in blocks])


@dataclass(frozen=True)
class CostTargets:
    """Whether freezing everything up to a layer now costs at most a limit.

    Attributes:
        cost: The cost itself, float64 `[num_layers, timestamps]`; infinity where training would diverge.
        hard: 1 if it is at most the limit, else 0; int8 of the same shape.
        soft: The same as a share in [0, 1], 0.5 at the limit; float64 of the same shape.
    """

    cost: Floats
    hard: NDArray[np.int8]
    soft: Floats


def cost_targets(
    costs: FreezeCosts, progress: Any, limit: float, *, measure: Measure = "expected", softness: float = 0.005
) -> CostTargets:
    """Say for each layer and record whether freezing everything up to this layer now costs at most `limit`.

    Args:
        costs: What was measured.
        progress: The records as fractions of the run, `[timestamps]`.
        limit: Largest cost, from 0: accuracy as a fraction of 1, or loss in nats.
        measure: See `FreezeCosts.lost`.
        softness: How far from the limit the soft target is 0.73 or 0.27, in the same unit: a logistic function. About the
            noise of a measured cost.

    Raises:
        ValueError: If limit or softness are out of range.
    """
    if not 0 <= limit < np.inf or not 0 < softness < np.inf:
        raise ValueError(
            f"cost_targets received limit={limit!r} and softness={softness!r}; expected a finite limit from 0 and a "
            "positive softness."
        )
    depths = np.arange(1, costs.num_layers + 1)
    cost = CostSurface.of(costs, measure)(np.asarray(progress)[None], depths[:, None])
    soft = 0.5 * (1 + np.tanh((limit - cost) / (2 * softness)))  # the logistic function, without overflow
    return CostTargets(cost, (cost <= limit).astype(np.int8), soft)


@dataclass(frozen=True)
class Judgement:
    """What a schedule of freezing is expected to do.

    Attributes:
        cost: Expected cost at the end: accuracy as a fraction of 1, or loss in nats.
        saved: Share of the floating point operations of the whole run that are saved, in [0, 1].
    """

    cost: float
    saved: float


def judge(costs: FreezeCosts, schedule: Sequence[tuple[float, int]], *, measure: Measure = "expected") -> Judgement:
    """Judge a schedule that freezes more and more of the first layers, without training.

    Each stage costs what freezing to its depth costs at that moment, less what freezing to the depth of the stage before
    would cost then: a layer costs what it had still to learn when it was frozen.

    Args:
        costs: What was measured on this run.
        schedule: Stages `(moment, depth)` in the order of time, moments in [0, 1], depths not falling. `(0.5, L)`, with all
            L layers, is to stop half way.
        measure: See `FreezeCosts.lost`.

    Raises:
        ValueError: If moments or depths are out of range, or fall.
    """
    moments = np.array([moment for moment, _ in schedule], np.float64)
    depths = np.array([depth for _, depth in schedule], np.float64)
    # NaN is within no bounds.
    in_range = (moments >= 0) & (moments <= 1) & (depths >= 0) & (depths <= costs.num_layers)
    if not in_range.all() or (np.diff(moments) < 0).any() or (np.diff(depths) < 0).any():
        raise ValueError(
            f"The schedule is {list(schedule)}; expected (moment, depth) with moments in [0, 1] and depths from 0 to "
            f"{costs.num_layers}, neither of which falls."
        )
    surface = CostSurface.of(costs, measure)
    before = np.concatenate([[0.0], depths[:-1]]) if len(depths) else depths
    now, then = surface(moments, depths), surface(moments, before)
    added = np.where(depths > before, np.where(np.isfinite(now), now - np.where(np.isfinite(then), then, 0), now), 0.0)
    saved = np.interp(depths, np.arange(costs.num_layers + 1), costs.saved)
    lasts = np.diff(moments, append=1.0)
    return Judgement(float(added.sum()), float((saved * lasts).sum()))


def prefix_schedule(frozen: Any, progress: Any) -> list[tuple[float, int]]:
    """Return the stages `(moment, depth)` of what a policy has frozen, for `judge`.

    Only layers count before which everything is frozen: those behind save little, and what they cost was not measured.

    Args:
        frozen: Boolean `[num_layers, timestamps]`: which layers are frozen from each record on.
        progress: The records as fractions of the run, `[timestamps]`.

    Returns:
        A stage for each record at which the prefix grows. A prefix that is thawed counts as frozen still.
    """
    depths = np.logical_and.accumulate(np.asarray(frozen, bool), axis=0).sum(0)
    stages: list[tuple[float, int]] = []
    for moment, depth in zip(np.asarray(progress).tolist(), depths.tolist(), strict=True):
        if depth > (stages[-1][1] if stages else 0):
            stages.append((moment, depth))
    return stages
