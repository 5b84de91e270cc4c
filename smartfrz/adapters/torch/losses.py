"""The training loss that the user's loop, or a trainer, passes on."""

from numbers import Real
from typing import Any

import torch


def is_loss(value: Any) -> bool:
    """Return whether this is a number, or a tensor that holds one."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def check_loss(loss: Any) -> None:
    """Refuse what is no loss.

    Raises:
        TypeError: If it is neither a number, nor a tensor that holds one, nor None.
    """
    if loss is None or is_loss(loss):
        return
    if isinstance(loss, torch.Tensor):
        received = f"a tensor of shape {tuple(loss.shape)} and type {loss.dtype}"
    else:
        received = f"{loss!r:.60}, a {type(loss).__name__}"
    raise TypeError(
        f"freezer.step() received {received}; expected the training loss of the step: a float, or a tensor that holds one "
        "number. Pass the mean, loss.mean() for example, or leave it out."
    )


def plain_loss(loss: Any) -> Any:
    """Return a loss that holds no graph: a float, or a float32 scalar on a device, which is not waited for."""
    if not isinstance(loss, torch.Tensor):
        return float(loss)
    value = loss.detach().reshape(())
    value = value.to_local() if hasattr(value, "to_local") else value  # of a DTensor
    return float(value) if value.device.type == "cpu" else value.float()


class BatchLosses:
    """Adds up the losses of the batches that a trainer trains on before the optimizer steps."""

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._count = 0

    def add(self, loss: Any) -> None:
        """Add the loss of a batch. What is no loss, which a trainer's user may return, is left out."""
        if is_loss(loss):
            self._sum = self._sum + plain_loss(loss)
            self._count += 1

    def take(self, *, mean: bool) -> Any:
        """Return the mean, or the sum, of what was added since the last call; None if nothing was."""
        total, count = self._sum, self._count
        self._sum, self._count = 0.0, 0
        return (total / count if mean else total) if count else None
