"""Reads single weights of parameters that are spread over processes (`fully_shard`, tensor parallelism)."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from smartfrz.errors import UnsupportedModelError


def count_values(tensor: torch.Tensor) -> int:
    """Return the number of real values in a tensor: two for each element of a complex one."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


class Positions:
    """Positions in a flattened weight. In a complex one each element's real part is followed by its imaginary part.

    Args:
        tensor: The weight.
        indices: int64 `[n]`, on any device.
    """

    def __init__(self, tensor: torch.Tensor, indices: torch.Tensor):
        self._tensor = tensor
        where = indices.to(tensor.device)
        shape = (*tensor.shape, 2) if tensor.is_complex() else tensor.shape
        # .view copies nothing, but a channels_last kernel has no flat view.
        self._where = (where,) if tensor.is_contiguous() else torch.unravel_index(where, shape)

    def read(self) -> torch.Tensor:
        """Return a copy of the values at the positions, float32 `[n]` on the weight's device."""
        data = self._tensor.detach()
        if data.is_complex():
            data = torch.view_as_real(data.resolve_conj())
        picked = data.view(-1)[self._where[0]] if len(self._where) == 1 else data[self._where]
        return picked.float()


class ShardPositions:
    """Positions in a flattened weight of which each process holds a part. No process gathers all of it.

    Args:
        tensor: The weight, a DTensor.
        indices: int64 `[n]`.

    Raises:
        UnsupportedModelError: If the weight is not divided as PyTorch documents it.

    Attributes:
        mesh: The processes over which the weight is spread.
        dims: Dimensions of the mesh over which the values that `read` returns have to be summed.
    """

    def __init__(self, tensor: Any, indices: torch.Tensor):
        from torch.distributed.tensor import Replicate, Shard

        self._tensor = tensor
        self.mesh = tensor.device_mesh
        self.dims: tuple[int, ...] = ()
        # The exact type counts: a strided shard, from tensor parallelism below fully_shard, holds other positions.
        self._gathered = not all(type(p) in (Shard, Replicate) for p in tensor.placements)
        if self._gathered:
            self._indices = indices
            return
        self._imaginary = indices % 2 == 1 if tensor.is_complex() else None
        if tensor.is_complex():
            indices = indices // 2
        sizes, starts = list(tensor.shape), [0] * tensor.dim()
        for dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                self.dims += (dim,)
                axis = placement.dim % tensor.dim()
                chunk = -(-sizes[axis] // self.mesh.size(dim))  # the last chunks are smaller, or empty
                start = min(chunk * self.mesh.get_local_rank(dim), sizes[axis])
                sizes[axis] = min(chunk, sizes[axis] - start)
                starts[axis] += start
        local = tensor.detach().to_local()
        if list(local.shape) != sizes:
            raise UnsupportedModelError(
                f"A weight of shape {list(tensor.shape)} with placements {tensor.placements} on {self.mesh} has a local "
                f"part of shape {list(local.shape)} on this process; expected {sizes}. SmartFRZ cannot read it."
            )
        inside = torch.ones(len(indices), dtype=torch.bool)
        where = []
        for axis, start, size in zip(torch.unravel_index(indices, tensor.shape), starts, sizes, strict=True):
            inside &= (axis >= start) & (axis < start + size)
            where.append(axis - start)
        self._owned = inside.to(local.device)
        self._where = tuple(axis[inside].to(local.device) for axis in where)
        if self._imaginary is not None:
            self._imaginary = self._imaginary[inside].to(local.device)

    def read(self) -> torch.Tensor:
        """Return the values at the positions, float32 `[n]`.

        A value that another process holds is 0 here, so that the sum over the processes is the answer.
        """
        data = self._tensor.detach()
        if self._gathered:
            return Positions(data.full_tensor(), self._indices).read()
        local = data.to_local()
        values = torch.zeros(len(self._owned), device=local.device)
        picked = local[self._where]
        if self._imaginary is not None:
            picked = torch.where(self._imaginary, picked.imag, picked.real)
        values[self._owned] = picked.float()
        return values


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is a DTensor."""
    # If the module was never imported, no tensor is a DTensor.
    sharded: Any = sys.modules.get("torch.distributed.tensor")
    return sharded is not None and isinstance(tensor, sharded.DTensor)


def locate(tensor: torch.Tensor, indices: torch.Tensor) -> Positions | ShardPositions:
    """Make the positions in a weight, which may be sharded."""
    if is_sharded(tensor):
        return ShardPositions(tensor, indices)
    return Positions(tensor, indices)


def sum_shards(read: Iterable[tuple[Positions | ShardPositions, torch.Tensor]]) -> None:
    """Complete values that were read in part, in place, with one message for all that are divided alike.

    Args:
        read: Positions with what `read` returned for them, in the same order on every process.
    """
    alike: dict[Any, list[torch.Tensor]] = {}
    for where, values in read:
        if isinstance(where, ShardPositions) and where.dims:
            alike.setdefault((where.mesh, where.dims), []).append(values)
    for (mesh, dims), vectors in alike.items():
        joined = torch.cat(vectors).to(mesh.device_type)  # offloaded weights are on the CPU, but are sent from the GPU
        for dim in dims:
            dist.all_reduce(joined, group=mesh.get_group(dim))
        for vector, whole in zip(vectors, joined.split([len(vector) for vector in vectors]), strict=True):
            vector.copy_(whole)


class GradientWatch:
    """Calls a hook when any of the parameters gets a gradient.

    Args:
        parameters: Parameters that require a gradient.
        hook: Called with a tensor.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], hook: Callable[[torch.Tensor], None]):
        plain: list[torch.Tensor] = []
        divided: list[torch.Tensor] = []
        for parameter in parameters:
            (divided if is_sharded(parameter) else plain).append(parameter)
        # fully_shard computes with whole copies and sets the gradients of the shards, which only these hooks see.
        self._handles: list[Any] = [p.register_post_accumulate_grad_hook(hook) for p in divided]
        if plain:
            self._handles.append(torch.autograd.graph.register_multi_grad_hook(tuple(plain), hook, mode="any"))

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
