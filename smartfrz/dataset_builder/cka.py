"""Centered Kernel Alignment: how similar two layers' outputs are on the same examples."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MIN_EXAMPLES = 4
_ROUNDING = 1e-12  # relative; well above float64's and below float32's, in which features come


def centered_gram(features: ArrayLike) -> NDArray[np.float64]:
    """Gram matrix of a layer's features, with the features centered over the examples.

    Args:
        features: A layer's output on the probe batch, `[num_examples, ...]`; flattened here.

    Returns:
        float64 `[num_examples, num_examples]`.

    Raises:
        ValueError: If there are fewer than 4 examples.
    """
    matrix = np.asarray(features, dtype=np.float64)
    if matrix.ndim < 2 or len(matrix) < _MIN_EXAMPLES:
        raise ValueError(
            f"centered_gram compares at least {_MIN_EXAMPLES} examples: received features of shape {matrix.shape}. "
            "Use a larger probe batch."
        )
    matrix = matrix.reshape(len(matrix), -1)
    # Features that are not finite, or overflow when squared, shall give NaN and no warning.
    with np.errstate(over="ignore", invalid="ignore"):
        mean = matrix.mean(axis=0, keepdims=True)
        centered = matrix - mean
        # The mean of equal numbers is off by a rounding error, which would pass for a signal.
        centered[np.abs(centered) <= _ROUNDING * np.abs(mean)] = 0.0
        return centered @ centered.T


def cka_of_grams(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Linear CKA from two centered Gram matrices.

    Args:
        x: From `centered_gram`, float64 `[num_examples, num_examples]`.
        y: The same for the other layer, on the same examples.

    Returns:
        Similarity in [0, 1]; NaN if either layer is constant over the examples or not finite,
        since CKA is undefined there.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Paper, Eq. 5, after Kornblith et al. 2019 (arXiv 1905.00414). Two departures: features are
        centered, which Kornblith's definition needs and Eq. 5 omits; and it is computed from Gram
        matrices, <X X^T, Y Y^T> / (|X X^T| |Y Y^T|), equal to Eq. 5 and cheaper when a layer has
        more features than there are examples.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(8, 3))
        >>> round(cka_of_grams(centered_gram(x), centered_gram(2 * x + 1)), 6)
        1.0
    """
    if x.shape != y.shape:
        raise ValueError(
            f"CKA compares the same examples in both layers: received {len(x)} and {len(y)} examples. "
            "Pass features taken from one shared probe batch."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(x) * np.linalg.norm(y)
    if not np.isfinite(norms) or norms <= 0:
        return float("nan")
    return float(np.clip(np.vdot(x, y) / norms, 0.0, 1.0))
