"""The statistics that a batch norm would have had, had it seen only the last batches.

The running statistics of a slow norm lag hundreds of batches behind its weights. Frozen with them, the layer suddenly
computes something else, and training on top of it suffers. A running average that was `old` and is `new` after n more
batches is

    new = share * old + (1 - share) * recent,    share = kept ** n

where `kept` is what one batch leaves of the average. So two snapshots give the recent average, at no cost in the forward
pass. The functions take NumPy arrays and tensors of any framework with the same operators.
"""

from typing import Any


def compute_old_share(kept: float | None, *, before: int, since: int) -> float:
    """Return the share of a running average that it owes to what it was at the snapshot.

    Args:
        kept: The share that one batch leaves of the average: `1 - momentum` in PyTorch, `momentum` in Keras. None for a
            plain average over all batches.
        before: Number of batches before the snapshot; read for a plain average only.
        since: Number of batches since.

    Example:
        >>> compute_old_share(0.9, before=100, since=2)
        0.81
        >>> compute_old_share(None, before=30, since=10)
        0.75
    """
    if since <= 0:
        return 1.0
    return before / (before + since) if kept is None else kept**since


def compute_recent_statistics(old: tuple[Any, Any], new: tuple[Any, Any], old_share: float) -> tuple[Any, Any] | None:
    """Return mean and variance over the batches since the snapshot.

    Args:
        old: Running mean and variance at the snapshot, float64.
        new: Running mean and variance now, float64.
        old_share: From `compute_old_share`.

    Returns:
        None if there was no batch since that could tell.
    """
    if not 0.0 <= old_share < 1.0:
        return None
    mean, variance = ((now - old_share * then) / (1.0 - old_share) for then, now in zip(old, new, strict=True))
    return mean, variance.clip(min=0.0)  # rounding may leave it below zero
