"""Data sets that name their samples, and whose augmentation repeats."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset


class IndexedDataset(Dataset[tuple[Any, ...]]):
    """A data set whose samples come with an id: `(id, *sample)`.

    With `views`, the random numbers with which a sample is augmented depend only on the seed, the
    sample and its view. The first time a sample is requested it shows view 0, then view 1, and after
    the last one view 0 again. Epoch e therefore shows view e mod `views`, with any number of workers.
    The first random number is in another part of [0, 1) for each view of a sample: where the
    augmentation begins with a flip, two views show both sides of every sample.

    Args:
        dataset: A data set with `__len__` and `__getitem__`.
        views: The number of views of each sample; 1 for data without augmentation.
        epoch: The first epoch; pass it when a run is resumed.
        seed: Seed of the views.

    Raises:
        TypeError: If the data set has no `__len__` and `__getitem__`.
        ValueError: If `views` or `epoch` is out of range.
    """

    def __init__(self, dataset: Any, views: int = 1, epoch: int = 0, seed: int = 0):
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise TypeError(
                f"PrefixCache.indexed received a {type(dataset).__name__}; expected a data set with __len__ and "
                "__getitem__. For other data, yield your own ids: integers that stay the same in every epoch."
            )
        if views < 1 or epoch < 0:
            raise ValueError(
                f"`views` is {views!r} and `epoch` is {epoch!r}; expected 1 or more views, and an epoch of 0 or more."
            )
        self.dataset = dataset
        self.views = views
        self.seed = int(seed)
        # In shared memory, since each epoch of a DataLoader has new workers.
        self._times = torch.full((len(dataset),), epoch, dtype=torch.int32).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        index = int(index)
        if index < 0:
            index += len(self)
        if self.views == 1:
            key, sample = index, self.dataset[index]
        else:
            view = int(self._times[index]) % self.views
            self._times[index] += 1
            key = index * self.views + view
            sample = _draw(self.dataset, index, view, self.views, self.seed)
        return (key, *sample) if isinstance(sample, (tuple, list)) else (key, sample)


def _draw(dataset: Any, index: int, view: int, views: int, seed: int) -> Any:
    """Return one sample, drawn with random numbers of its own; the process's generators stay as they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    part = (int(np.random.default_rng([abs(seed), index]).integers(views)) + view) % views
    numbers = np.random.default_rng([abs(seed), index, view])
    try:
        _seed_within(part, views, numbers, torch.default_generator.manual_seed, lambda: float(torch.rand(())))
        _seed_within(part, views, numbers, random.seed, random.random)
        _seed_within(part, views, numbers, np.random.seed, np.random.random)
        return dataset[index]
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def _seed_within(
    part: int, parts: int, numbers: np.random.Generator, seed: Callable[[int], Any], first: Callable[[], float]
) -> None:
    """Seed a generator so that its first number is in this part of [0, 1)."""
    while True:
        number = int(numbers.integers(2**32))
        seed(number)
        if int(first() * parts) == part:
            seed(number)
            return
