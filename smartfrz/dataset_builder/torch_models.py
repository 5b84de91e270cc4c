"""A PyTorch network as `record` uses it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_model
from torch import nn
from torch.utils.data import Dataset

from smartfrz.adapters.torch.layers import Layer, LayerReader, trace_layers
from smartfrz.dataset_builder.branches import Branches
from smartfrz.dataset_builder.recipes import Recipe
from smartfrz.dataset_builder.similarity import Grams, layer_grams, probe_batch
from smartfrz.training import Training, arguments, device_of, evaluate, to_device


class TorchNetwork:
    """A `Network` in PyTorch.

    Args:
        model: The model, on its device.
        recipe: How it is trained and measured.
        train_data: Data set to train on.
        test_data: Data set to test on; the probe batch is drawn from it.
        layers: Layers of a model of the same class; found by a forward pass if None.
    """

    can_branch = True

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        train_data: Dataset[Any],
        test_data: Dataset[Any],
        layers: Sequence[Layer] | None = None,
    ):
        self._model, self._recipe, self._train_data, self._test_data = model, recipe, train_data, test_data
        self._probe = to_device(probe_batch(test_data, recipe.recording.probe_size), device_of(model))
        if layers is not None:
            self.layers = list(layers)

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers, in execution order."""
        args, keywords = arguments(self._probe)
        return trace_layers(self._model.eval(), *args, **keywords)

    @cached_property
    def _reader(self) -> LayerReader:
        return LayerReader(self._model, self.layers)

    @property
    def versions(self) -> dict[str, str]:
        """Version of PyTorch."""
        return {"torch": torch.__version__}

    def train(self, seed: int, on_step: Any) -> None:
        """Train with `smartfrz.training.Training`."""
        self._training = Training(self._model, self._train_data, self._recipe.training, seed=seed)
        self._training.run(on_step)

    def branches(self) -> Branches:
        """Return what branches the training that is going on. Call it from `on_step`."""
        return Branches(self._training, self.layers, self._test_data)

    def accuracy(self) -> float:
        """Return the accuracy on the test data, in [0, 1]."""
        return evaluate(self._model, self._test_data)

    def grams(self) -> Grams:
        """Return the Gram matrix of each layer's output on the probe batch."""
        return layer_grams(self._model, self.layers, self._probe)

    def sizes(self) -> dict[str, int]:
        """Return the number of weights of each layer."""
        return {layer.name: self._reader.num_weights(layer.name) for layer in self.layers}

    def weights(self, positions: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return each layer's weights at its positions."""
        return np.stack([self._reader.weights(name, p) for name, p in positions.items()])

    def save(self, path: Path, facts: dict[str, str]) -> None:
        """Write parameters and buffers; tied ones are written once."""
        save_model(self._model, str(path), facts)

    def load(self, path: Path) -> bool:
        """Read what `save` wrote."""
        self._model.load_state_dict(load_file(path), strict=False)  # tied tensors have one name in the file
        return True


def load_fitting(model: nn.Module, path: Path) -> tuple[int, int]:
    """Load the tensors of a safetensors file that have a tensor's name and shape in the model.

    Returns:
        How many tensors were loaded, and how many the model has.
    """
    saved, own = load_file(path), model.state_dict()
    fitting = {key: value for key, value in saved.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    return len(fitting), len(own)
