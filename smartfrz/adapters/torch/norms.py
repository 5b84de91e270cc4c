"""Gives batch norms the statistics of the last batches alone: see `smartfrz.control.norms`."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from smartfrz.control.norms import compute_old_share, compute_recent_statistics


class NormSnapshot(NamedTuple):
    """The running statistics of one norm.

    Attributes:
        mean: Running mean `[channels]`, a copy.
        variance: Running variance `[channels]`, a copy.
        batches: Number of batches that they have seen. As the norm counts it on a GPU: reading it waits for the GPU.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    batches: int | torch.Tensor


def take_snapshot(norm: nn.Module) -> NormSnapshot | None:
    """Copy the running statistics of a norm; None if it has none."""
    if not isinstance(norm, _NormBase) or norm.running_mean is None or norm.running_var is None:
        return None
    tracked = getattr(norm, "num_batches_tracked", None)
    batches = tracked.clone() if isinstance(tracked, torch.Tensor) else count_batches(norm)
    return NormSnapshot(norm.running_mean.clone(), norm.running_var.clone(), batches)


def correct_statistics(norm: _NormBase, snapshot: tuple[Any, Any, Any]) -> None:
    """Replace the running statistics of a norm by those of the batches since the snapshot; without one they stay."""
    if norm.running_mean is None or norm.running_var is None:
        return
    mean, variance, before = *snapshot[:2], int(snapshot[2])
    # A momentum of None is a plain average over all batches.
    kept = None if norm.momentum is None else 1.0 - norm.momentum
    old_share = compute_old_share(kept, before=before, since=count_batches(norm) - before)
    running = norm.running_mean, norm.running_var
    recent = compute_recent_statistics(
        (mean.double(), variance.double()), (running[0].double(), running[1].double()), old_share
    )
    if recent is None:
        return
    for statistic, value in zip(running, recent, strict=True):
        # .data: a backward pass in progress has saved the statistics, though it does not use them.
        statistic.data.copy_(value)


def count_batches(norm: nn.Module) -> int:
    """Return how many batches the running statistics of a norm have seen; 0 if it does not count them."""
    tracked = getattr(norm, "num_batches_tracked", None)
    return 0 if tracked is None else int(tracked)


class RecentNorms:
    """The norms of a model that is to be judged with the statistics of its last batches.

    Norms with a small momentum lag behind the weights. A network whose norms froze has statistics of a few batches;
    judged with lagging ones, any other would look worse than it is.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._snapshots: dict[_NormBase, NormSnapshot] = {}

    def note(self) -> None:
        """Remember the running statistics. Call it some batches before the end of training."""
        found = {norm: take_snapshot(norm) for norm in self._model.modules() if isinstance(norm, _NormBase)}
        self._snapshots = {norm: snapshot for norm, snapshot in found.items() if snapshot is not None}

    def correct(self) -> None:
        """Replace the statistics of all norms that are in training mode by those of the batches since `note`.

        Norms that a freezer holds in eval mode stay as they are: it has corrected theirs.
        """
        for norm, snapshot in self._snapshots.items():
            if norm.training:
                correct_statistics(norm, snapshot)
