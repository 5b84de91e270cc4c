"""Copies tensors from a GPU while it goes on computing."""

from collections.abc import Callable

import torch


def copy_later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the host, and return what waits for the copy.

    The copy is queued behind what computes the tensor. The host waits neither here nor, once the GPU has come so far, for
    the copy.

    Args:
        tensor: A tensor that nothing changes any more.

    Returns:
        A function that returns the values on the CPU: of a tensor on a GPU a copy in pinned memory, since only to such
        memory does a GPU copy by itself, and of one on the CPU the tensor itself. They belong to the caller.
    """
    if not tensor.is_cuda:
        copied = tensor.cpu()
        return lambda: copied
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    buffer.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return buffer

    return wait
