"""Tell whether a sample is the same as last time: a description of a model's inputs, and numbers for their content."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

_PLAIN_VALUES = (type(None), bool, int, float, str)
# Keyword arguments that models use only for their loss, behind every cut. They differ from batch to batch.
LOSS_ONLY = frozenset({"num_items_in_batch"})


def signature(inputs: Any, batch: int) -> Any:
    """Describe what the inputs of all batches have in common; compare the result with ==.

    Args:
        inputs: Positional and keyword arguments of a model.
        batch: Number of samples. Tensors with that many rows belong to the samples.

    Returns:
        Shapes without the batch, dtypes, other values, and the state of autocast.

    Raises:
        TypeError: If there is a value whose content cannot be compared.
    """
    args, kwargs = inputs
    leaves, spec = tree_flatten((args, {name: value for name, value in kwargs.items() if name not in LOSS_ONLY}))
    described: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            rows = _has_rows(leaf, batch)
            described.append((leaf.shape[1:] if rows else leaf.shape, leaf.dtype, leaf.device.type, leaf.device.index))
            described.append("rows" if rows else _numbers(leaf[None]).tolist())
        elif isinstance(leaf, _PLAIN_VALUES):
            described.append((type(leaf), leaf))
        else:
            raise TypeError(f"the model receives a {type(leaf).__name__}, whose content cannot be compared")
    kinds = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)} | {"cpu"})
    casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return spec, described, casts


def batch_size(inputs: Any) -> int:
    """Return the length of the first tensor among the inputs; 0 if there is none."""
    leaves = tree_flatten(inputs)[0]
    return next((len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), 0)


def fingerprints(inputs: Any, batch: int, which: int = 0) -> list[int]:
    """Return a number for the content of each sample's inputs, the same on every device.

    Two samples with different content have the same number with a chance of about 2^-30.

    Args:
        inputs: Positional and keyword arguments of a model.
        batch: Number of samples.
        which: Which of several independent numbers.
    """
    total: torch.Tensor | None = None
    for leaf in tree_flatten(inputs)[0]:
        if isinstance(leaf, torch.Tensor) and _has_rows(leaf, batch):
            numbers = _numbers(leaf, which)
            total = numbers if total is None else total.to(numbers.device) * 1_000_003 + numbers
    found: list[int] = [] if total is None else total.tolist()
    return found


def content(tensors: Iterable[torch.Tensor]) -> int:
    """Return a number for the values of all these tensors."""
    total = 0
    for tensor in tensors:
        total = (total * 1_000_003 + int(_numbers(tensor.detach()[None]))) % 2**63
    return total


def _has_rows(tensor: torch.Tensor, batch: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == batch


def _numbers(tensor: torch.Tensor, which: int = 0) -> torch.Tensor:
    """Return int64 `[rows]`: a sum of products modulo 2^64, which does not depend on the order of the terms."""
    flat = tensor.detach().contiguous().reshape(len(tensor), -1)
    if not flat.shape[1]:
        return torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    flat = flat.view(torch.uint8)
    if flat.shape[1] % 8 == 0 and flat.storage_offset() % 8 == 0:
        words = flat.view(torch.int64)
        words = words ^ (words >> 32)  # changes of high bits alone could cancel out
    elif flat.shape[1] % 4 == 0 and flat.storage_offset() % 4 == 0:
        words = flat.view(torch.int32).long()
    else:
        words = flat.long()
    return (words * _multipliers(words.shape[1], words.device, which)).sum(1)


@lru_cache(maxsize=32)
def _multipliers(count: int, device: torch.device, which: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(20240117 + which)
    limits = -(2**63), 2**63 - 1
    return (torch.randint(*limits, (count,), generator=generator, dtype=torch.int64) | 1).to(device)
