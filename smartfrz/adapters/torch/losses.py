"""The training loss that the user's loop, or a trainer, passes on."""

from numbers import Real
from typing import Any

import torch


def check_loss(loss: Any) -> None:
    """Refuse what is no loss.

    Raises:
        TypeError: If it is neither a number, nor a tensor that holds one, nor None.
    """
    if loss is None or (isinstance(loss, Real) and not isinstance(loss, bool)):
        return
    if isinstance(loss, torch.Tensor):
        if loss.numel() == 1 and not loss.is_complex():
            return
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
