"""Reading single weights of parameters that are spread over processes (`fully_shard`, tensor parallelism)."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from smartfrz.errors import UnsupportedModelError


class Positions:
    """Positions of a flattened weight.

    Args:
        tensor: The weight.
        indices: int64 `[n]`, on any device.
    """

    def __init__(self, tensor: torch.Tensor, indices: torch.Tensor):
        self._tensor = tensor
        where = indices.to(tensor.device)
        # .view needs no copy of the whole weight; channels_last kernels are not viewable flat
        self._where = (where,) if tensor.is_contiguous() else torch.unravel_index(where, tensor.shape)

    def read(self) -> torch.Tensor:
        """What lies there now: float32 `[n]`, a copy on the weight's device."""
        data = self._tensor.detach()
        picked = data.view(-1)[self._where[0]] if len(self._where) == 1 else data[self._where]
        return picked.float()


class ShardPositions:
    """Positions of a flattened weight of which each process holds a part; no process gathers all of it.

    Args:
        tensor: The weight, a DTensor.
        indices: int64 `[n]`.

    Raises:
        UnsupportedModelError: If the weight is not divided as PyTorch documents it.
    """

    def __init__(self, tensor: Any, indices: torch.Tensor):
        from torch.distributed.tensor import Replicate, Shard

        self._tensor = tensor
        self.mesh = tensor.device_mesh
        self.dims: tuple[int, ...] = ()  # of the mesh: over these `read` is to be summed
        # Of this exact type: a strided shard, from tensor parallelism below fully_shard, lies elsewhere.
        self._gathered = not all(type(p) in (Shard, Replicate) for p in tensor.placements)
        if self._gathered:
            self._indices = indices
            return
        sizes, starts = list(tensor.shape), [0] * tensor.dim()
        for dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                self.dims += (dim,)
                axis = placement.dim % tensor.dim()
                chunk = -(-sizes[axis] // self.mesh.size(dim))  # the last ones are smaller, or empty
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

    def read(self) -> torch.Tensor:
        """What lies there now, float32 `[n]`: 0 where another process holds it, so that the sum is the answer."""
        data = self._tensor.detach()
        if self._gathered:
            return Positions(data.full_tensor(), self._indices).read()
        local = data.to_local()
        values = torch.zeros(len(self._owned), device=local.device)
        values[self._owned] = local[self._where].float()
        return values


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    sharded: Any = sys.modules.get("torch.distributed.tensor")  # no tensor is a DTensor if nobody imported it
    return sharded is not None and isinstance(tensor, sharded.DTensor)


def locate(tensor: torch.Tensor, indices: torch.Tensor) -> Positions | ShardPositions:
    """Positions of a weight of either kind."""
    if is_sharded(tensor):
        return ShardPositions(tensor, indices)
    return Positions(tensor, indices)


def sum_shards(read: Iterable[tuple[Positions | ShardPositions, torch.Tensor]]) -> None:
    """Complete what was read in part, in place: one message for everything that is divided alike.

    Args:
        read: Positions, and what `read` returned for them; in the same order on every process.
    """
    alike: dict[Any, list[torch.Tensor]] = {}
    for where, values in read:
        if isinstance(where, ShardPositions) and where.dims:
            alike.setdefault((where.mesh, where.dims), []).append(values)
    for (mesh, dims), vectors in alike.items():
        joined = torch.cat(vectors).to(mesh.device_type)  # offloaded weights lie on the CPU, and are sent from the GPU
        for dim in dims:
            dist.all_reduce(joined, group=mesh.get_group(dim))
        for vector, whole in zip(vectors, joined.split([len(vector) for vector in vectors]), strict=True):
            vector.copy_(whole)


class GradientWatch:
    """Calls a hook when any of the parameters gets a gradient.

    Args:
        parameters: Parameters that require one.
        hook: What to call, with a tensor.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], hook: Callable[[torch.Tensor], None]):
        plain: list[torch.Tensor] = []
        divided: list[torch.Tensor] = []
        for parameter in parameters:
            (divided if is_sharded(parameter) else plain).append(parameter)
        # fully_shard computes with whole copies and sets the gradients of the shards: only these hooks see them
        self._handles: list[Any] = [p.register_post_accumulate_grad_hook(hook) for p in divided]
        if plain:
            self._handles.append(torch.autograd.graph.register_multi_grad_hook(tuple(plain), hook, mode="any"))

    def remove(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
