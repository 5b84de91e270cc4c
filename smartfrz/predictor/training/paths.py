"""Paths of layers through weight space without the weights: all norms and angles, in a hundredth of the room."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smartfrz.errors import DatasetFormatError


@dataclass(frozen=True)
class Paths:
    """Paths of the layers of a run, each for a few draws of its sampled weights.

    The representations `trajectory` and `trajectory+loss` see norms and angles of displacements. A rotation changes none
    of them, and the `records` points of a path, together with the origin, span no more than `records` dimensions. So each
    path is rotated into that many. The one figure that a rotation does change, how evenly a displacement is spread over
    the weights, is kept beside them. Lengths are root mean squares over the weights of a draw: the sum of squares over
    dimensions is the mean of squares over weights.

    Attributes:
        start: Length of the weights at the first record, float32 `[draws, layers]`.
        moved: Displacements since the first record, float32 `[draws, layers, records, dimensions]`. The first dimension is
            the direction of the weights at the first record.
        evenness: Mean magnitude over root mean square of the displacement between two records, float32
            `[draws, layers, records, records]`; 0 where there is none.
        tailored_size: Number of weights in a draw.
    """

    start: NDArray[np.float32]
    moved: NDArray[np.float32]
    evenness: NDArray[np.float32]
    tailored_size: int

    def thinned(self, every: int) -> "Paths":
        """Keep the last of each so many records."""
        kept = slice(every - 1, None, every)
        return Paths(self.start, self.moved[:, :, kept], self.evenness[:, :, kept, kept], self.tailored_size)

    def relative_change(self, before: NDArray[np.int64]) -> NDArray[np.float64]:
        """Compute what `smartfrz.control.weight_change.relative_change` says of the weights of all draws together.

        Args:
            before: Record with which each record is compared, int64 `[records]`.

        Returns:
            float64 `[layers, records]`.
        """
        moved = self.moved.astype(np.float64)
        change = ((moved - moved[:, :, before]) ** 2).sum(-1)
        moved[..., 0] += self.start[..., None]
        size = (moved**2).sum(-1)
        return np.asarray(np.sqrt(change.mean(0)) / (np.sqrt(size.mean(0)) + 1e-12))


@dataclass(frozen=True)
class PackedPaths:
    """Paths as they are stored: each step from record to record has its own scale, so that float16 does for the rest.

    The first step leads from the origin to the weights at the first record. Rounding moves the confidences of a predictor by
    some 1e-5; another draw of weights by some 1e-3.

    Attributes:
        scale: Largest magnitude of a step over its dimensions, float32 `[draws, layers, records]`.
        steps: Steps divided by it, float16 `[draws, layers, records, dimensions]`, with as many dimensions as records; step
            `j` is in the first `j + 1` of them.
        evenness: As in `Paths`, float16.
        tailored_size: As in `Paths`.
        every: Number of timestamps of the recording for each record; the record is the last of them.
    """

    scale: NDArray[np.float32]
    steps: NDArray[np.float16]
    evenness: NDArray[np.float16]
    tailored_size: int
    every: int = 1

    def unpack(self) -> Paths:
        """Return the paths."""
        steps = self.steps.astype(np.float64) * self.scale[..., None]
        start = steps[:, :, 0, 0].astype(np.float32)
        steps[:, :, 0] = 0.0
        moved = steps.cumsum(axis=2).astype(np.float32)
        return Paths(start, moved, self.evenness.astype(np.float32), self.tailored_size)


def make_paths(
    weights: NDArray[np.float32], tailored_size: int, num_draws: int, seed: int, every: int = 1
) -> PackedPaths:
    """Compute the paths of a run's layers.

    Args:
        weights: A pool of sampled weights, float32 `[layers, timestamps, pool_size]`, finite.
        tailored_size: Number of weights in a draw.
        num_draws: Number of draws. The first takes weights at equal distances, as judging does; the others are random.
        seed: Seed of the random draws, which are the same for all layers.
        every: Of so many timestamps the last one is kept.

    Raises:
        ValueError: If the pool is smaller than a draw.
    """
    weights = weights[:, every - 1 :: every]
    layers, records, pool = weights.shape
    if pool < tailored_size:
        raise ValueError(
            f"The pool has {pool} weights a layer, which is less than tailored_size={tailored_size}. Record the run again "
            "with a larger recording.pool_size."
        )
    rng = np.random.default_rng(seed)
    draws = [spread_samples(pool, tailored_size)]
    draws += [rng.choice(pool, tailored_size, replace=False) for _ in range(num_draws - 1)]
    steps = np.empty((num_draws, layers, records, records))
    evenness = np.empty((num_draws, layers, records, records), np.float16)
    for draw, samples in enumerate(draws):
        for layer in range(layers):
            path = weights[layer][:, samples].astype(np.float64)
            steps[draw, layer] = _rotate(path)
            evenness[draw, layer] = _evenness(path)
    scale = np.abs(steps).max(-1).astype(np.float32)
    scaled = np.divide(steps, scale[..., None], out=np.zeros_like(steps), where=scale[..., None] > 0)
    return PackedPaths(scale, scaled.astype(np.float16), evenness, tailored_size, every)


def check_paths(name: str, paths: Paths, representation: str, tailored_size: int) -> None:
    """Refuse paths that a network cannot be trained or judged on.

    Raises:
        DatasetFormatError: If the network reads weights, or another number of weights.
    """
    if representation == "raw":
        raise DatasetFormatError(
            f"Of run {name!r} the dataset has paths only, but the representation {representation!r} reads the weights. Use "
            "the recordings, or a predictor with the representation 'trajectory'."
        )
    if paths.tailored_size != tailored_size:
        raise DatasetFormatError(
            f"The paths of run {name!r} are of {paths.tailored_size} weights; expected {tailored_size}, the tailored size "
            "of the predictor. Use the recordings, or a predictor with that tailored size."
        )


def spread_samples(pool: int, tailored_size: int) -> NDArray[np.int64]:
    """Choose weights of a pool that are spread over the layer, int64 `[tailored_size]`."""
    return np.arange(tailored_size) * pool // tailored_size


def _rotate(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the steps of a path, float64 `[records, weights]`, in as many dimensions as records."""
    records, num_weights = path.shape
    points = path - path[0]
    points[0] = path[0]
    corner = np.linalg.qr(points.T, mode="r") / np.sqrt(num_weights)
    # The signs of a QR decomposition are up to the library.
    corner *= np.where(np.diagonal(corner) < 0, -1.0, 1.0)[:, None]
    turned = np.zeros((records, records))
    turned[:, : len(corner)] = corner.T
    # What rounding leaves where a path has fewer dimensions.
    turned[np.abs(turned) < 1e-13 * np.linalg.norm(turned, axis=1, keepdims=True)] = 0.0
    turned[2:] -= turned[1:-1].copy()  # the second is relative to the first already
    return turned


def _evenness(path: NDArray[np.float64]) -> NDArray[np.float64]:
    found = np.zeros((len(path), len(path)))
    for now in range(1, len(path)):
        away = np.abs(path[:now] - path[now])
        size = np.sqrt((away * away).mean(-1))
        found[now, :now] = found[:now, now] = np.divide(away.mean(-1), size, out=np.zeros(now), where=size > 0)
    return found
