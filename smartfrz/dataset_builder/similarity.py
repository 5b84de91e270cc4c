"""CKA between a PyTorch model's layers and those of a finished reference: Gram matrices of outputs on a probe batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import Dataset, default_collate

from smartfrz.adapters.torch.layers import Layer, collect_outputs
from smartfrz.dataset_builder.cka import centered_gram
from smartfrz.training import forward

Grams = dict[str, NDArray[np.float64]]


def layer_grams(model: nn.Module, layers: list[Layer], probe: Any) -> Grams:
    """Centered Gram matrix of each layer's output on the probe batch.

    Dropout is off. Norms with running statistics use the probe batch's own: running statistics lag
    behind the weights, by hundreds of steps where their momentum is small, and CKA would measure
    that lag. The model's mode and statistics are as before afterwards.
    """
    with _probing(model), collect_outputs(model, layers) as outputs, torch.no_grad():
        num_examples = len(forward(model, probe))
    return {name: gram(output.float().numpy(), num_examples) for name, output in outputs.items()}


def gram(output: NDArray[np.float32], num_examples: int) -> NDArray[np.float64]:
    """Centered Gram matrix of a layer's output, float64 `[num_examples, num_examples]`.

    Windows or heads may be folded into the first dimension. An output without examples, such as that of position
    embeddings, has no CKA: NaN.
    """
    if len(output) % num_examples:
        return np.full((num_examples, num_examples), np.nan)
    return centered_gram(output.reshape(num_examples, -1))


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    buffers = [(b, b.clone()) for m in norms for b in m.buffers(recurse=False)]
    model.eval()
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, saved in buffers:
            buffer.copy_(saved)


def probe_batch(data: Dataset[Any], size: int) -> Any:
    """The inputs of `size` examples, drawn from the test data with a fixed seed."""
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:size]  # type: ignore[arg-type]
    return default_collate([data[int(i)][0] for i in chosen])
