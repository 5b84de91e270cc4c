"""What the user can choose of the prefix cache."""

from typing import Any

from smartfrz.adapters.torch.cache.store import ROUNDED, StoreDtype, parse_bytes
from smartfrz.adapters.torch.cache.views import IndexedDataset


class PrefixCache:
    """Options for keeping a frozen prefix's outputs; pass it to `SmartFRZ(..., cache=...)`.

    Once layers at the front of a model are frozen, their output for a given input never changes.
    It is computed in the first epoch after that, kept, and read from then on: the modules before
    the cut do not run any more. Where the inputs do not come back (random augmentation), the
    cache notices and switches itself off; nothing stale is ever used.

    Args:
        memory: Bytes of memory for each process: a number, or text such as "2GB".
        disk: Bytes of disk for each process, for what does not fit into memory. They are in a
            temporary file, which vanishes with the process.
        dtype: How activations are kept: `float32` as they are; `float16` and `bfloat16` rounded.
        profile: Start only where a forward pass is measured to be faster with the cache, and stop
            where reading takes longer than computing. False: start wherever it is possible.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        memory: int | str = "2GB",
        disk: int | str = 0,
        dtype: StoreDtype = "float32",
        *,
        profile: bool = True,
    ):
        self.memory = parse_bytes(memory, "memory")
        self.disk = parse_bytes(disk, "disk")
        if dtype not in ROUNDED:
            raise ValueError(f"`dtype` is {dtype!r}; expected one of {', '.join(ROUNDED)}.")
        if not self.memory + self.disk:
            raise ValueError("`memory` and `disk` are both 0; expected room for activations in one of them.")
        self.dtype: StoreDtype = dtype
        self.profile = profile

    @staticmethod
    def indexed(dataset: Any, views: int = 1, *, epoch: int = 0, seed: int = 0) -> IndexedDataset:
        """Return the data set with an id in front of each sample: `(id, *sample)`. Pass the ids to `freezer.batch`.

        Args:
            dataset: A data set with `__len__` and `__getitem__`.
            views: For augmented data: the number of epochs after which a sample's random numbers
                repeat. A random flip that comes first loses nothing with 2.
            epoch: The epoch at which a resumed run continues.
            seed: Seed of the views.

        Raises:
            TypeError: If the data set has no `__len__` and `__getitem__`.
            ValueError: If `views` or `epoch` is out of range.
        """
        return IndexedDataset(dataset, views, epoch, seed)
