"""Branches of a PyTorch training: what the end is like if the first layers are frozen now."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Subset

from smartfrz.adapters.torch.freezing import TorchAdapter
from smartfrz.adapters.torch.layers import Layer
from smartfrz.control.options import FreezeOptions
from smartfrz.control.ordering import LayerCost, backward_cost
from smartfrz.errors import RecipeError
from smartfrz.training import Training, device_of, random_numbers_kept, validate

MOST_EXAMPLES = 5000
NORM_BATCHES = FreezeOptions().norm_batches


class Branches:
    """Branches one training, between two of its steps, and leaves it as it was.

    Everything is judged with batch norm statistics of the last `NORM_BATCHES` batches, by the adapter's own correction:
    those of a norm with a small momentum lag, and a branch whose norms were frozen would look better than the rest.

    Args:
        training: The training.
        layers: The model's layers, in execution order.
        data: Data to judge on: all of it, or `MOST_EXAMPLES` drawn at random, the same ones each time.
    """

    def __init__(self, training: Training, layers: Sequence[Layer], data: Dataset[Any]):
        self._training, self._layers = training, list(layers)
        size = len(data)  # type: ignore[arg-type]
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:MOST_EXAMPLES].tolist()
        self._data = data if size <= MOST_EXAMPLES else Subset(data, chosen)
        self._device = device_of(training.model)
        self._norms: dict[str, Any] = {}

    @property
    def num_examples(self) -> int:
        """Number of examples that a branch is judged on."""
        return len(self._data)  # type: ignore[arg-type]

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def note_norms(self) -> None:
        """Remember the running statistics of batch norms. Call it `NORM_BATCHES` steps before a branch."""
        adapter = TorchAdapter(self._training.model, [self._training.optimizer], self._layers)
        adapter.snapshot_statistics()
        self._norms = adapter.norm_state()

    def weights_sha256(self) -> str:
        """Return the SHA-256 of all parameters and buffers as they are now."""
        digest = hashlib.sha256()
        for name, tensor in self._training.model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def finish(self, depth: int, on_step: Callable[[float], None] = lambda fraction: None) -> tuple[float, float]:
        """Freeze the first layers in a copy, train the rest of it to the end, and judge it.

        Args:
            depth: Number of layers. With all of them nothing is trained: the network as it is now is judged.
            on_step: Called after each step with the fraction of the whole training that is done, in [0, 1].

        Returns:
            Loss in nats and accuracy in [0, 1]; NaN twice if the training diverged.

        Raises:
            RecipeError: If the model cannot be copied.
        """
        with random_numbers_kept(self._device):
            twin = self._training.branch()
            adapter = TorchAdapter(twin.model, [twin.optimizer], self._layers)
            adapter.load_norm_state(self._norms)
            trained = adapter.layers()
            frozen = [layer.name for layer in self._layers[:depth] if layer.name in trained]
            adapter.freeze(frozen)
            try:
                if rest := [name for name in trained if name not in frozen]:
                    self._train(twin, adapter, on_step)
                    adapter.freeze(rest)
                loss, accuracy = validate(twin.model, self._data)
            except _Diverged:
                return math.nan, math.nan
        return (loss, accuracy) if math.isfinite(loss) else (math.nan, math.nan)

    def _train(self, twin: Training, adapter: TorchAdapter, on_step: Callable[[float], None]) -> None:
        note_at = max(twin.step + 1, twin.total - NORM_BATCHES)

        def after_step(step: int, total: int, loss: float, learning_rate: float) -> None:
            if step == note_at and step < total:
                adapter.snapshot_statistics()
            on_step(step / total)

        try:
            twin.run(after_step)
        except RecipeError as error:
            raise _Diverged from error

    def saved(self) -> NDArray[np.float64]:
        """Return the share of a step's operations that freezing the first 0, 1, 2 ... layers saves.

        Each gradient, of the weights and of the inputs, counts as many floating point operations as the forward pass of
        the layer. What is computed between layers is left out.

        Returns:
            float64 `[num_layers + 1]`, in [0, 1]. The last one is 1: nothing is trained.
        """
        flops = {layer.name: float(layer.forward_flops) for layer in self._layers}
        if not any(flops.values()):
            flops = dict.fromkeys(flops, 1.0)
        costs = {name: LayerCost(count, count, count) for name, count in flops.items()}
        names = list(costs)
        forward = sum(flops.values())
        steps = [forward + backward_cost(names, names[:depth], costs)[0] for depth in range(len(names))]
        return 1 - np.array([*steps, 0.0]) / steps[0]


class _Diverged(Exception):
    """The loss of a branch was not finite."""
