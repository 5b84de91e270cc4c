"""What is kept at one cut, and whether it still is what the model computes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from smartfrz.adapters.torch.cache.batch import Batch
from smartfrz.adapters.torch.cache.fingerprints import content
from smartfrz.adapters.torch.cache.store import ActivationStore, Field
from smartfrz.adapters.torch.cache.walk import Cut, layout_of


class KeptRows:
    """A cut and the rows kept at it.

    Args:
        cut: The cut.
        signature: Signature of the batches whose rows are kept.
        **limits: Limits and dtype of the `ActivationStore`.
    """

    def __init__(self, cut: Cut, signature: Any, **limits: Any):
        self.cut = cut
        self.signature = signature
        fields = [Field(leaf.shape[1:], leaf.dtype) for leaf in cut.leaves if leaf.dtype is not None]
        self.store = ActivationStore(fields, **limits)
        self._numbers: dict[int, tuple[int, int, int]] = {}  # of tensors: address, version, content
        self._state = _state_of(cut)
        self._content = self._content_of(cut.parameters), self._content_of(cut.buffers())

    def is_valid(self) -> bool:
        """Whether the prefix still is the one that the rows were computed with."""
        state = _state_of(self.cut)
        if state == self._state:
            return True
        if any(p.requires_grad for p in self.cut.parameters) or any(norm.training for norm in self.cut.norms):
            return False
        # Values that were written may be the same: weights that were swapped for their average and back,
        # or buffers under DistributedDataParallel, which writes them at every step.
        if state[0] != self._state[0] and self._content_of(self.cut.parameters) != self._content[0]:
            return False
        if self._content_of(self.cut.buffers()) != self._content[1]:
            return False
        self._state = state
        return True

    def _content_of(self, tensors: Iterable[torch.Tensor]) -> list[int]:
        """Return a number for the values of each tensor, computed again only where it was written to."""
        numbers = []
        for tensor in tensors:
            known = self._numbers.get(id(tensor))
            if known is None or known[:2] != (tensor.data_ptr(), tensor._version):
                known = tensor.data_ptr(), tensor._version, content([tensor])
                self._numbers[id(tensor)] = known
            numbers.append(known[2])
        return numbers

    def find(self, batch: Batch) -> list[int]:
        """Return the positions of the samples whose rows are kept."""
        pairs = zip(batch.keys, batch.fingerprints, strict=True)
        return [row for row, (key, number) in enumerate(pairs) if self.store.has(key, number)]

    def put(self, batch: Batch, rows: Sequence[int], tensors: dict[int, torch.Tensor]) -> None:
        """Keep what crosses the cut, as far as there is room.

        Args:
            batch: The batch.
            rows: Positions of the samples.
            tensors: What crosses the cut for them.
        """
        keys, numbers = [batch.keys[row] for row in rows], [batch.fingerprints[row] for row in rows]
        self.store.put(keys, [tensors[index] for index in self.cut.kept], numbers)

    def read(self, batch: Batch, rows: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return what is kept of these samples of a batch, on the device of the model."""
        tensors = self.store.get([batch.keys[row] for row in rows])
        leaves = zip(self.cut.kept, self.cut.leaves, tensors, strict=True)
        return {
            index: tensor.to(leaf.device).contiguous(memory_format=layout_of(leaf)) for index, leaf, tensor in leaves
        }

    def join(self, parts: list[tuple[list[int], dict[int, torch.Tensor]]], batch: int) -> dict[int, torch.Tensor]:
        """Return all that crosses the cut for a batch.

        Args:
            parts: Positions of samples, and what crosses the cut for them.
            batch: Number of samples.
        """
        constants = self.cut.copied_constants()
        if len(parts) == 1:
            return parts[0][1] | constants
        joined = {}
        for index, leaf in zip(self.cut.kept, self.cut.leaves, strict=True):
            shape = (batch, *leaf.shape[1:])
            whole = torch.empty(shape, dtype=leaf.dtype, device=leaf.device, memory_format=layout_of(leaf))
            for rows, tensors in parts:
                whole[torch.tensor(rows, device=leaf.device)] = tensors[index]
            joined[index] = whole
        return joined | constants


def _state_of(cut: Cut) -> Any:
    """Return what changes when a weight or a statistic of the prefix is written to, or trained again."""
    return (
        [(p.data_ptr(), p._version, p.requires_grad) for p in cut.parameters],
        [(b.data_ptr(), b._version) for b in cut.buffers()],
        [norm.training for norm in cut.norms],
    )
