"""One forward pass of the training, and which samples are in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from smartfrz.adapters.torch.cache.cut import is_close, pick
from smartfrz.adapters.torch.cache.missing import Refusal
from smartfrz.adapters.torch.cache.walk import Cut, Walk


@dataclass(frozen=True)
class Batch:
    """One forward pass of the training, and the samples in it.

    Attributes:
        forward: The model's forward pass.
        args: Positional arguments.
        kwargs: Keyword arguments.
        keys: Each sample's key.
        fingerprints: A number for each sample's inputs.
        signature: What the inputs have in common with other batches.
        is_named: Whether the user gave the keys.
    """

    forward: Callable[..., Any]
    args: Any
    kwargs: Any
    keys: list[int]
    fingerprints: list[int]
    signature: Any
    is_named: bool

    def __len__(self) -> int:
        return len(self.keys)

    def wants_gradient(self) -> bool:
        """Whether gradients of the inputs are wanted."""
        return any(
            isinstance(value, torch.Tensor) and value.requires_grad for value in tree_leaves((self.args, self.kwargs))
        )

    def run(self) -> Any:
        """Run the whole model."""
        return self.forward(*self.args, **self.kwargs)

    def run_behind(self, cut: Cut, given: dict[int, torch.Tensor]) -> Any:
        """Run the model without the modules before the cut.

        Args:
            cut: The cut.
            given: What crosses the cut.

        Raises:
            Refusal: If the model does something else than when the cut was checked.
        """
        return Walk(len(self), start=cut, given=given).run(self.forward, self.args, self.kwargs)

    def compute(self, cut: Cut, rows: Sequence[int]) -> dict[int, torch.Tensor]:
        """Run the modules before the cut for some samples, and return what crosses it.

        Args:
            cut: The cut.
            rows: Which samples of the batch.

        Raises:
            Refusal: If the model does something else than when the cut was checked.
        """
        # Many models treat a batch of one sample as something else.
        padded = [*rows, *rows] if len(rows) == 1 < len(self) else list(rows)
        walk = Walk(len(padded), stop=cut)
        walk.run(self.forward, *pick((self.args, self.kwargs), len(self), padded))
        if not all(is_close(walk.captured[index], value) for index, value in cut.constants.items()):
            raise Refusal("a tensor that seemed to be the same for every batch is not")
        return {index: walk.captured[index][: len(rows)] for index in cut.kept}


def list_keys(ids: Any) -> list[int]:
    """Return the keys of a batch.

    Args:
        ids: What the user passed to `freezer.batch`.

    Raises:
        TypeError: If it is not one integer for each sample.
    """
    values = ids.tolist() if isinstance(ids, (torch.Tensor, np.ndarray)) else ids
    if not isinstance(values, Sequence) or not all(isinstance(v, (int, np.integer)) for v in values):
        raise TypeError(
            f"freezer.batch received {ids!r:.80}; expected one integer for each sample of the batch, in a sequence, an "
            "array or a tensor of one dimension."
        )
    return [int(value) for value in values]


def check_number(ids: Sequence[int], inputs: Any) -> None:
    """Check that there is one id for each row of the inputs.

    Args:
        ids: The ids of a batch.
        inputs: Positional and keyword arguments of the model.

    Raises:
        ValueError: If no input has as many rows as there are ids.
    """
    rows = [value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor) and value.dim()]
    if not any(len(value) == len(ids) for value in rows):
        shapes = [tuple(value.shape) for value in rows]
        raise ValueError(
            f"freezer.batch received {len(ids)} ids, but the model's inputs have the shapes {shapes}; expected one id "
            "for each sample. Pass the ids of this batch."
        )
