"""Recipes: TOML files that say which model is trained on which data, and how."""

import dataclasses
import difflib
import hashlib
import importlib
import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from smartfrz.errors import MissingDependencyError, RecipeError
from smartfrz.training import OPTIMIZERS, SCHEDULES, TrainingSpec

_KINDS: dict[Any, Any] = {str: str, int: int, float: (int, float), bool: bool, dict[str, Any]: dict}


@dataclass(frozen=True)
class ModelSpec:
    """`[model]`: `source` is `module:callable`, or a library (as `timm`), a colon, and a name."""

    source: str
    arguments: dict[str, Any] = field(default_factory=dict)
    init: str = ""  # a safetensors file, or the name of a recipe whose reference model to start from


@dataclass(frozen=True)
class DataSpec:
    """`[data]`: `source` is `module:callable`, returning (train, test) datasets; or `folder` of images."""

    source: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    folder: str = ""  # folder/train/<class>/*.png and folder/test/<class>/*.png
    image_size: int = 64


@dataclass(frozen=True)
class RecordingSpec:
    """`[recording]`: the second training, which is recorded."""

    records: int = 60
    pool_size: int = 2048
    probe_size: int = 96
    seed: int = 1  # data order of the recorded run; the reference uses the recipe's seed
    reinitialize: bool = False  # start from other initial weights than the reference did


@dataclass(frozen=True)
class Recipe:
    """One recipe. `folder` is where import paths and relative files are looked up."""

    name: str
    architecture: str
    model: ModelSpec
    data: DataSpec
    training: TrainingSpec
    recording: RecordingSpec
    seed: int = 0
    folder: Path = Path()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the folder: the same recipe elsewhere is the same recipe."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "folder"}

    @property
    def sha256(self) -> str:
        """Of the recipe's content."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe.

    Args:
        path: The TOML file.

    Returns:
        The recipe.

    Raises:
        RecipeError: If it is missing, not TOML, or has unknown, absent or wrong entries.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"Cannot read recipe {str(path)!r}: {error.strerror}. Pass the path of a TOML file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {str(path)!r} is not valid TOML: {error}. Mend that line.") from error
    sections = {"model": ModelSpec, "data": DataSpec, "training": TrainingSpec, "recording": RecordingSpec}
    values: dict[str, Any] = {"name": path.stem, "recording": {}} | content
    try:
        for key, spec in sections.items():
            values[key] = _section(path, key, spec, values.get(key))
        recipe: Recipe = _section(path, "", Recipe, values | {"folder": path.parent.resolve()})
    except TypeError as error:
        raise RecipeError(f"Recipe {str(path)!r} lacks an entry: {error}. See docs/recipes.md.") from error
    _check(path, recipe)
    return recipe


def _section(path: Path, key: str, spec: Any, values: Any) -> Any:
    where = f"section [{key}]" if key else "the top level"
    if not isinstance(values, dict):
        raise RecipeError(f"Recipe {str(path)!r} lacks {where}. See docs/recipes.md for a commented recipe.")
    known = [f.name for f in dataclasses.fields(spec)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise RecipeError(f"Recipe {str(path)!r}, {where}: unknown entry {unknown[0]!r}. Known: {', '.join(known)}.")
    for f in dataclasses.fields(spec):
        if f.name in values and not isinstance(values[f.name], _KINDS.get(f.type, object)):
            raise RecipeError(
                f"Recipe {str(path)!r}, {where}: {f.name} is {values[f.name]!r}; expected a value of type {f.type}. "
                "Change that entry."
            )
    return spec(**values)


def _check(path: Path, recipe: Recipe) -> None:
    training, recording, data = recipe.training, recipe.recording, recipe.data
    checks = [
        (Path(recipe.name).name == recipe.name, "name", recipe.name, "a file name without folders"),
        (training.optimizer in OPTIMIZERS, "training.optimizer", training.optimizer, f"one of {OPTIMIZERS}"),
        (training.schedule in SCHEDULES, "training.schedule", training.schedule, f"one of {SCHEDULES}"),
        (training.epochs > 0, "training.epochs", training.epochs, "a positive number"),
        (training.batch_size > 0, "training.batch_size", training.batch_size, "a positive integer"),
        (0 <= training.warmup < 1, "training.warmup", training.warmup, "a fraction of the run, in [0, 1)"),
        (recording.pool_size > 0, "recording.pool_size", recording.pool_size, "a positive integer"),
        (recording.records >= 4, "recording.records", recording.records, "at least 4"),
        (recording.probe_size >= 4, "recording.probe_size", recording.probe_size, "at least 4"),
        (bool(data.source) != bool(data.folder), "data", data, "either `source` or `folder`"),
    ]
    for fine, name, received, expected in checks:
        if not fine:
            raise RecipeError(f"Recipe {str(path)!r}: {name} is {received!r}; expected {expected}. Change that entry.")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    # Recipes of two folders may name their modules alike, and be recorded by one process: forget
    # a module of that name that came from another recipe's folder, which is on no path any more.
    for name in {path.stem for path in folder.glob("*.py")} & set(sys.modules):
        loaded = Path(getattr(sys.modules[name], "__file__", None) or "")
        if loaded.name == f"{name}.py" and loaded.parent != folder and str(loaded.parent) not in sys.path:
            del sys.modules[name]
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _resolve(recipe: Recipe, key: str, source: str) -> Callable[..., Any]:
    """The callable behind `module:callable`, looked up in the recipe's folder first."""
    module_name, colon, attribute = source.partition(":")
    if not colon:
        raise RecipeError(
            f"Recipe {recipe.name!r}: {key}.source is {source!r}; expected 'module:callable', for example "
            "'mymodels:resnet20', with mymodels.py beside the recipe."
        )
    try:
        with _importable(recipe.folder):
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(
            f"Recipe {recipe.name!r}: {key}.source names module {module_name!r}, which cannot be imported ({error}). "
            f"Put {module_name}.py beside the recipe or install the package that has it."
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value)]
        close = difflib.get_close_matches(attribute, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"Recipe {recipe.name!r}: {key}.source names {attribute!r}, which module {module_name!r} does not have as "
            f"a callable.{hint} Name a function or class of that module."
        )
    return found


def is_keras(model: Any) -> bool:
    """Whether a model is one of Keras. On its PyTorch backend it is an `nn.Module` as well."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(model, keras.Model)


def build_model(recipe: Recipe, seed: int, runs: Path | None = None) -> Any:
    """Make the recipe's model, an `nn.Module` or a `keras.Model`, with initial weights from `seed` or `model.init`.

    Args:
        recipe: The recipe.
        seed: For the random initial weights.
        runs: Where the reference models of other recipes are, for `init` by recipe name.

    Raises:
        RecipeError: If the model or its initial weights cannot be found or do not fit.
        MissingDependencyError: If the library that the recipe names is not installed.
    """
    make = _maker(recipe)
    torch.manual_seed(seed)
    model = make()
    if is_keras(model):
        from smartfrz.dataset_builder.keras_recording import seeded

        model = seeded(make, seed)  # only now one knows that Keras has to be seeded
    if recipe.model.init:
        _load_init(recipe, model, runs)
    return model


def _maker(recipe: Recipe) -> Callable[[], Any]:
    """What makes the model, from nothing but PyTorch's or Keras's random state."""
    library, _, name = recipe.model.source.partition(":")
    arguments = recipe.model.arguments
    if library not in _LIBRARIES:
        source = _resolve(recipe, "model", recipe.model.source)
        return lambda: source(**arguments)

    def make() -> Any:
        try:
            return _LIBRARIES[library](name, arguments)
        except ImportError as error:
            raise MissingDependencyError(
                f"Recipe {recipe.name!r} takes its model from {library}, which cannot be imported ({error}). "
                f"Install it with: pip install {_PACKAGES.get(library, library)}"
            ) from error

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
    from smartfrz.dataset_builder.keras_recording import application

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
_PACKAGES = {"keras": '"smartfrz[keras]"', "keras_hub": "keras-hub"}


def reference_file(runs: Path, name: str) -> Path:
    """Where the finished reference model of a recipe is kept."""
    return runs / f"{name}.reference.safetensors"


def _load_init(recipe: Recipe, model: Any, runs: Path | None) -> None:
    from safetensors import SafetensorError, numpy
    from safetensors.torch import load_file

    path = recipe.folder / recipe.model.init
    if path.suffix != ".safetensors" and runs is not None:
        path = reference_file(runs, recipe.model.init)
    try:
        saved = numpy.load_file(path) if is_keras(model) else load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"Recipe {recipe.name!r}: model.init is {recipe.model.init!r}, but {path.name!r} cannot be read ({error}). "
            "Record the recipe it names first, or give a safetensors file relative to the recipe."
        ) from error
    fitting, own = _load(model, saved)
    if 2 * fitting < own:
        raise RecipeError(
            f"Recipe {recipe.name!r}: only {fitting} of the model's {own} tensors are in {path.name!r} with "
            "the same name and shape. Give a checkpoint of this architecture."
        )


def _load(model: Any, saved: dict[str, Any]) -> tuple[int, int]:
    """Load the tensors that fit; how many those are, and how many the model has."""
    # A head for other classes stays as initialised: that is what fine-tuning means.
    if is_keras(model):
        from smartfrz.dataset_builder.keras_recording import load_weights, num_variables

        return load_weights(model, saved), num_variables(model)
    own = model.state_dict()
    fitting = {k: v for k, v in saved.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    return len(fitting), len(own)


def build_data(recipe: Recipe) -> tuple[Dataset[Any], Dataset[Any]]:
    """The recipe's (train, test) datasets; items are `(inputs, target)`.

    Raises:
        RecipeError: If the data cannot be found.
    """
    if recipe.data.source:
        return _resolve(recipe, "data", recipe.data.source)(**recipe.data.arguments)
    return image_folders(recipe.folder / recipe.data.folder, recipe.data.image_size)


def image_folders(folder: Path, image_size: int) -> tuple[TensorDataset, TensorDataset]:
    """`image_folder` of `folder/train` and of `folder/test`.

    Raises:
        RecipeError: As `image_folder`, or if the two have different classes.
    """
    train, test = (image_folder(folder / split, image_size) for split in ("train", "test"))
    if _classes(folder / "train") != _classes(folder / "test"):
        raise RecipeError(
            f"{str(folder)!r} has the classes {_classes(folder / 'train')} in train, but {_classes(folder / 'test')} in "
            "test; expected the same. Classes are numbered by name, so labels would not agree."
        )
    return train, test


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def image_folder(folder: Path, image_size: int) -> TensorDataset:
    """Pictures in `folder/<class>/`, resized to a square and scaled to [-1, 1].

    Returns:
        Items `(float32 [3, image_size, image_size], int64)`; classes are numbered by name.

    Raises:
        RecipeError: If there are fewer than two classes with pictures, or a picture is damaged.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    endings = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
    files = [(f, i) for i, name in enumerate(_classes(folder)) for f in sorted((folder / name).iterdir())]
    files = [(f, i) for f, i in files if f.suffix.lower() in endings]
    if len({i for _, i in files}) < 2:
        raise RecipeError(
            f"{str(folder)!r} holds pictures of {len({i for _, i in files})} classes; expected at least two folders, "
            "one a class, with .png or .jpg files in each."
        )
    pictures = []
    for file, _ in files:
        try:
            with Image.open(file) as picture:
                small = picture.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
        except (UnidentifiedImageError, OSError) as error:
            raise RecipeError(
                f"{str(file)!r} is no picture that can be read ({error}). Remove it, or save it again as .png or .jpg."
            ) from error
        pictures.append(np.asarray(small))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return TensorDataset(images, torch.tensor([i for _, i in files]))
