"""Saved states: the tensors in them as arrays, and what must hold before a run goes on with one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from smartfrz.adapters.base import require_state
from smartfrz.adapters.torch.layers import Layer
from smartfrz.control.state import ARRAYS, COUNT_OR_NONE, FLAG, PARTS_OF_ARRAYS, check_extent, sealed

# What the callbacks add.
ANNOUNCED = "announced"


def to_arrays(value: Any) -> Any:
    """Return the state with arrays in place of tensors; formats that NumPy lacks become float32, which holds them."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        try:
            leaf = leaf.detach().cpu()
            return (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy()
        except (TypeError, RuntimeError, NotImplementedError):
            return leaf  # no saved state holds tensors of other kinds, so it is refused

    return tree_map(convert, value)


def to_tensors(value: Any) -> Any:
    """Return the state with tensors in place of arrays."""
    return tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, value)


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with its digest, which is that of the state with arrays in place of tensors."""
    return state | {"sha256": sealed(to_arrays(state))["sha256"]}


def check_saved(state: Any) -> dict[str, Any]:
    """Return a saved state with arrays in place of tensors, its values checked. `check_unchanged` is left to do.

    Raises:
        StateError: If `SmartFRZ.state_dict`, or a callback, did not return it, or a value is one that no run has.
    """
    check_extent(state)
    found: Any = to_arrays(state)
    more = {"gradients": ARRAYS, "gradient_changes": PARTS_OF_ARRAYS, "reentrant": FLAG}
    if isinstance(found, Mapping) and "controller" in found:
        found = {"gradients": {}, **found}  # earlier versions saved none
    if isinstance(found, Mapping) and ANNOUNCED in found:
        more[ANNOUNCED] = COUNT_OR_NONE
    require_state(found, Layer, more)
    return dict(found)
