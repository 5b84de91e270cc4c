"""Layer tailoring: sampling `tailored_size` values from the weights of one layer.

The positions are drawn once per layer and stay the same for a whole run, so that one entry of a
tailored vector follows one weight through training. They depend only on the run seed, the layer's name
and its number of weights: every rank of a distributed run and every restart draws the same positions.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def tailoring_positions(layer: str, num_weights: int, tailored_size: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Draw the positions at which a layer's flattened weights are read.

    Args:
        layer: The layer's name; two layers of one size get different positions.
        num_weights: Number of weights of the layer.
        tailored_size: Number of positions to draw.
        seed: The run seed.

    Returns:
        Positions in `range(num_weights)`, ascending, int64 `[tailored_size]`. They are distinct if
        the layer has at least `tailored_size` weights; otherwise sampled with replacement.

    Raises:
        ValueError: If `num_weights` or `tailored_size` is not positive.

    Source:
        Paper, section 3.2, "Layer Tailoring", which samples at random. Departure: large layers are
        sampled in `tailored_size` strata of equal width (up to rounding), with one random position in
        each. This samples without replacement (uniformly where the width is a whole number),
        needs no permutation of all weights, and covers all output channels. The paper does not say
        how layers smaller than the tailored size are sampled.

    Example:
        >>> tailoring_positions("conv1", 100, 5, seed=0).shape
        (5,)
    """
    if num_weights < 1 or tailored_size < 1:
        raise ValueError(
            f"tailoring_positions draws from at least one weight: received num_weights={num_weights} and "
            f"tailored_size={tailored_size} for layer {layer!r}. Leave out layers without weights."
        )
    digest = hashlib.blake2b(f"{seed}\0{layer}\0{num_weights}".encode(), digest_size=16).digest()
    # NumPy promises stable streams for bit generators, not for Generator's methods (NEP 19).
    raw = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(tailored_size)
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    if num_weights < tailored_size:
        positions = np.sort((uniform * num_weights).astype(np.int64))
    else:
        edges = np.arange(tailored_size + 1, dtype=np.int64) * num_weights // tailored_size
        positions = edges[:-1] + (uniform * np.diff(edges)).astype(np.int64)
    return positions


def tailor(weights: NDArray[np.floating], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """Read one layer's weights at the given positions.

    Args:
        weights: The layer's weights, any shape, any floating dtype; flattened in C order.
        positions: From `tailoring_positions`, int64 `[tailored_size]`.

    Returns:
        A copy, float32 `[tailored_size]`.

    Example:
        >>> tailor(np.arange(6.0).reshape(2, 3), np.array([0, 5]))
        array([0., 5.], dtype=float32)
    """
    return np.ascontiguousarray(weights).reshape(-1)[positions].astype(np.float32)


def split_positions(positions: NDArray[np.int64], sizes: Iterable[int]) -> list[NDArray[np.int64]]:
    """Translate positions in the joined weights of a layer to positions in each of its tensors.

    Args:
        positions: Positions in the layer's flattened weights, ascending, int64 `[n]`.
        sizes: Number of weights of each tensor, in the order in which they are joined.

    Returns:
        For each tensor, the positions inside of it; together `n`.

    Example:
        >>> [part.tolist() for part in split_positions(np.array([0, 3, 4, 9]), [4, 2, 4])]
        [[0, 3], [0], [3]]
    """
    starts = np.cumsum([0, *sizes])[:-1]
    parts = np.split(positions, np.searchsorted(positions, starts[1:]))
    return [part - start for part, start in zip(parts, starts, strict=True)]
