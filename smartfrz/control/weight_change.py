"""The relative change of weights: the heuristic with which the predictor is compared."""

import numpy as np
from numpy.typing import NDArray

# Number of records over which the heuristic measures the change. 3 of 30 are a tenth of a run; between 3 and 10 of 60 it
# makes little difference.
CHANGE_RECORDS = 3


def relative_change(now: NDArray[np.float32], before: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the relative change of weights, |now - before| / |now| in Euclidean norms over the last axis.

    Args:
        now: Weights, float `[..., n]`.
        before: The same weights, earlier.

    Returns:
        An array `[...]` of the weights' dtype; large, but finite, where all weights are zero.
    """
    change: NDArray[np.float32] = np.linalg.norm(now - before, axis=-1) / (np.linalg.norm(now, axis=-1) + 1e-12)
    return change
