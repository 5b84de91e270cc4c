"""Build what a recipe names: its data, and its networks in PyTorch or Keras."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset

from smartfrz.dataset_builder import torch_models
from smartfrz.dataset_builder.branches import Branches
from smartfrz.dataset_builder.pictures import image_folders
from smartfrz.dataset_builder.recipes import Recipe
from smartfrz.dataset_builder.similarity import Grams
from smartfrz.dataset_builder.storage import reference_file
from smartfrz.errors import MissingDependencyError, RecipeError, install_command
from smartfrz.importing import error_of_import, import_callable
from smartfrz.predictor.runtime import Device
from smartfrz.training import torch_device

OnStep = Callable[[int, int, float, float], None]


class TracedLayer(Protocol):
    """A layer as the adapters describe it."""

    @property
    def name(self) -> str:
        """Name, unique in the network."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, stored with a recording."""


class Network(Protocol):
    """A network that can be trained, measured and saved: `TorchNetwork` or `KerasNetwork`."""

    @property
    def layers(self) -> Sequence[TracedLayer]:
        """The layers, in execution order."""

    @property
    def can_branch(self) -> bool:
        """Whether `branches` works."""

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the framework's packages."""

    def train(self, seed: int, on_step: OnStep) -> None:
        """Train as the recipe says, with the data in the order of a seed.

        Args:
            seed: Seed of the order of the data.
            on_step: Called after each step with step (from 1), total steps, loss, learning rate.

        Raises:
            RecipeError: If the loss is not finite.
        """

    def branches(self) -> Branches:
        """Return what branches the training that is going on; call it between two of its steps."""

    def accuracy(self) -> float:
        """Return the accuracy on the test data, in [0, 1]."""

    def grams(self) -> Grams:
        """Return the Gram matrix of each layer's output on the probe batch."""

    def sizes(self) -> dict[str, int]:
        """Return the number of weights of each layer."""

    def weights(self, positions: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return each layer's weights at its positions, float32 `[num_layers, num_positions]`."""

    def save(self, path: Path, facts: dict[str, str]) -> None:
        """Write all tensors to a safetensors file, with facts as its metadata."""

    def load(self, path: Path) -> bool:
        """Read what `save` wrote; False if tensors are missing or have other shapes."""


@dataclass(frozen=True)
class Workbench:
    """Everything that the networks of one recipe are built from.

    Attributes:
        recipe: The recipe.
        runs: Folder of the recordings, with the reference models that `model.init` may name.
        device: Device of a PyTorch network. Keras chooses for itself.
        train_data: Data set to train on; items are `(inputs, target)`.
        test_data: Data set to test on.
    """

    recipe: Recipe
    runs: Path
    device: torch.device
    train_data: Dataset[Any]
    test_data: Dataset[Any]

    @classmethod
    def open(cls, recipe: Recipe, runs: Path, device: Device) -> "Workbench":
        """Read the data of a recipe.

        Raises:
            RecipeError: If the data cannot be found, or CUDA was asked for and is missing.
        """
        chosen = torch_device(device)
        return cls(recipe, runs, chosen, *build_data(recipe))

    def build(self, seed: int, layers: Sequence[Any] | None = None) -> Network:
        """Build a network.

        Args:
            seed: Seed of the initial weights.
            layers: Layers of a network of the same recipe; found by a forward pass if None.

        Raises:
            RecipeError: If the model or its initial weights cannot be found or do not fit.
            MissingDependencyError: If the library that the recipe names is not installed.
        """
        model = build_model(self.recipe, seed, self.runs)
        if is_keras(model):
            from smartfrz.dataset_builder.keras_models import KerasNetwork

            return KerasNetwork(model, self.recipe, self.train_data, self.test_data, layers)
        moved = model.to(self.device)
        return torch_models.TorchNetwork(moved, self.recipe, self.train_data, self.test_data, layers)


def build_data(recipe: Recipe) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return the recipe's (train, test) datasets; items are `(inputs, target)`.

    Raises:
        RecipeError: If the data cannot be found.
    """
    if recipe.data.source:
        return _find(recipe, "data", recipe.data.source)(**recipe.data.arguments)
    return image_folders(recipe.folder / recipe.data.folder, recipe.data.image_size)


def build_model(recipe: Recipe, seed: int, runs: Path | None = None) -> Any:
    """Make the recipe's model, an `nn.Module` or a `keras.Model`, with initial weights from `seed` or `model.init`.

    Args:
        recipe: The recipe.
        seed: Seed of the random initial weights.
        runs: Folder of other recipes' reference models, for an `init` that names a recipe.

    Raises:
        RecipeError: If the model or its initial weights cannot be found or do not fit.
        MissingDependencyError: If the library that the recipe names is not installed.
    """
    make = _maker(recipe)
    torch.manual_seed(seed)
    model = make()
    if is_keras(model):
        from smartfrz.dataset_builder.keras_models import seeded

        model = seeded(make, seed)  # only now is it known that Keras has to be seeded
    if recipe.model.init:
        _load_init(recipe, model, runs)
    return model


def is_keras(model: Any) -> bool:
    """Return whether a model is a `keras.Model`; with the PyTorch backend it is an `nn.Module` as well."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(model, keras.Model)


def _find(recipe: Recipe, section: str, source: str) -> Callable[..., Any]:
    return import_callable(source, recipe.folder, f"Recipe {recipe.name!r}: {section}.source")


def _maker(recipe: Recipe) -> Callable[[], Any]:
    """Return a function that makes the model from nothing but the framework's random state."""
    library, _, name = recipe.model.source.partition(":")
    arguments = recipe.model.arguments
    if library not in _LIBRARIES:
        source = _find(recipe, "model", recipe.model.source)
        return lambda: source(**arguments)

    def make() -> Any:
        try:
            return _LIBRARIES[library](name, arguments)
        except ImportError as error:
            raise MissingDependencyError(
                f"Recipe {recipe.name!r} takes its model from {library}, which cannot be imported ({error}). "
                f"Type: {_install(library)}"
            ) from error
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            raise error_of_import(library, error) from error

    return make


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, **arguments)


def _timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, **arguments)


def _transformers(name: str, arguments: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(name, **arguments)


def _keras(name: str, arguments: dict[str, Any]) -> Any:
    from smartfrz.dataset_builder.keras_models import application

    return application(name, arguments)


def _keras_hub(name: str, arguments: dict[str, Any]) -> Any:
    import keras_hub

    # Inputs come from the recipe's own data, as tensors.
    return keras_hub.models.Task.from_preset(name, **{"preprocessor": None, **arguments})


_LIBRARIES: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
    "keras": _keras,
    "keras_hub": _keras_hub,
}


def _install(library: str) -> str:
    if library == "keras":
        return install_command("build", "keras")
    return f"pip install {library.replace('_', '-')}"


def _load_init(recipe: Recipe, model: Any, runs: Path | None) -> None:
    path = recipe.folder / recipe.model.init
    if path.suffix != ".safetensors" and runs is not None:
        path = reference_file(runs, recipe.model.init)
    try:
        fitting, total = _load_fitting(model, path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"Recipe {recipe.name!r}: model.init is {recipe.model.init!r}, but {path.name!r} cannot be read ({error}). "
            "Record the recipe it names first, or give a safetensors file relative to the recipe."
        ) from error
    if 2 * fitting < total:
        raise RecipeError(
            f"Recipe {recipe.name!r}: only {fitting} of the model's {total} tensors are in {path.name!r} with "
            "the same name and shape. Give a checkpoint of this architecture."
        )


def _load_fitting(model: Any, path: Path) -> tuple[int, int]:
    # A head for other classes stays as initialised: that is what fine-tuning means.
    if is_keras(model):
        from smartfrz.dataset_builder.keras_models import load_fitting

        return load_fitting(model, path)
    return torch_models.load_fitting(model, path)
