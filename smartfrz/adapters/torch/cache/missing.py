"""Tensors without values, in place of what skipped modules would have computed."""

from typing import Any, NoReturn, Protocol

import torch
from torch.utils._pytree import tree_leaves, tree_map

from smartfrz.errors import UsageError

_aten = torch.ops.aten
# The results of these operations do not depend on the values of their argument.
_VALUELESS = {
    op.default
    for op in (_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full)
}


class Refusal(UsageError):
    """The reason why a model cannot be cut at some place."""


class Pass(Protocol):
    """The forward pass in which a module was skipped."""

    filled: bool  # whether it has reached the cut

    def refuse(self, reason: str) -> NoReturn:
        """End the pass for this reason."""
        ...


class Missing(torch.Tensor):
    """The output of a module that was not run: a tensor without values.

    Args:
        meta: A tensor of its shape, strides and dtype on the meta device.
        device: The device on which the output would be.
        walk: The pass in which the module was skipped.
    """

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device, walk: Pass) -> "Missing":  # noqa: D102
        return torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device
        )

    def __init__(self, meta: torch.Tensor, device: torch.device, walk: Pass):
        self.meta = meta
        self.walk = walk

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Missing(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        first = next(tensor for tensor in tensors if isinstance(tensor, Missing))
        _check_use(first, func, tensors, args, kwargs)
        if func in _VALUELESS:
            blank = torch.zeros((), dtype=first.dtype, device=first.device).expand(first.shape)
            return func(blank, *args[1:], **kwargs)
        return _run_on_meta(first, func, tensors, args, kwargs)


def _check_use(first: Missing, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: dict[str, Any]) -> None:
    """End the pass if an operation would need values, spoil a real tensor, or be part of what is trained."""
    walk = first.walk
    if walk.filled:
        walk.refuse(f"behind the cut {func} reads a tensor of shape {tuple(first.shape)} from before it")
    real = [tensor for tensor in tensors if not isinstance(tensor, Missing)]
    if any(tensor.requires_grad for tensor in real):
        walk.refuse(f"before the cut {func} uses a parameter that is trained")
    written = [value for value, written in zip(args, func._schema.arguments, strict=False) if _is_written(written)]
    if any(value is tensor for value in (*written, kwargs.get("out")) for tensor in real):
        walk.refuse(f"before the cut {func} writes what a skipped module returned into another tensor")


def _run_on_meta(first: Missing, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the operation's result without values: its shape is computed on the meta device."""
    walk, device = first.walk, kwargs.get("device") or first.device
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    metas: dict[int, torch.Tensor] = {id(t): t.meta if isinstance(t, Missing) else _meta_of(t) for t in tensors}
    args, kwargs = tree_map(lambda value: metas.get(id(value), value), (args, kwargs))
    try:
        output = func(*args, **kwargs)
    # .item(), nonzero and whatever else depends on values
    except (RuntimeError, NotImplementedError) as error:
        walk.refuse(f"between the modules before the cut {func} needs values ({error})")
    given = {id(t.meta): t for t in tensors if isinstance(t, Missing)}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # An operation in place returns its own argument.
        return given.get(id(value)) if id(value) in given else Missing(value, torch.device(device), walk)

    return tree_map(wrapped, output)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _meta_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
