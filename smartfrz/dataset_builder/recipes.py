"""Recipes: TOML files that say which model is trained on which data, and how."""

import dataclasses
import hashlib
import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smartfrz.errors import RecipeError
from smartfrz.hyperparameters import OPTIMIZERS, SCHEDULES, TrainingSpec

_KINDS: dict[Any, Any] = {str: str, int: int, float: (int, float), bool: bool, dict[str, Any]: dict}


@dataclass(frozen=True)
class ModelSpec:
    """The section `[model]`: `source` is `module:callable`, or a library such as `timm`, a colon, and a name."""

    source: str
    arguments: dict[str, Any] = field(default_factory=dict)
    init: str = ""  # a safetensors file, or the name of a recipe whose reference model to start from


@dataclass(frozen=True)
class DataSpec:
    """The section `[data]`: `source` is `module:callable` and returns (train, test) datasets; or a `folder` of images."""

    source: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    folder: str = ""  # folder/train/<class>/*.png and folder/test/<class>/*.png
    image_size: int = 64


@dataclass(frozen=True)
class RecordingSpec:
    """The section `[recording]`: the second training, which is recorded."""

    records: int = 60
    pool_size: int = 2048
    probe_size: int = 96
    seed: int = 1  # data order of the recorded run; the reference uses the recipe's seed
    reinitialize: bool = False  # start from other initial weights than the reference did


@dataclass(frozen=True)
class Recipe:
    """One recipe. Modules and relative files are looked up in `folder`."""

    name: str
    architecture: str
    model: ModelSpec
    data: DataSpec
    training: TrainingSpec
    recording: RecordingSpec
    seed: int = 0
    folder: Path = Path()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without the folder: a recipe does not change when it is moved."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "folder"}

    @property
    def sha256(self) -> str:
        """SHA-256 of the recipe's content."""
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
    sections = {"model": ModelSpec, "data": DataSpec, "training": TrainingSpec, "recording": RecordingSpec}
    values: dict[str, Any] = {"name": path.stem, "recording": {}} | _read(path)
    try:
        for key, spec in sections.items():
            values[key] = _section(path, key, spec, values.get(key))
        recipe: Recipe = _section(path, "", Recipe, values | {"folder": path.parent.resolve()})
    except TypeError as error:
        raise RecipeError(f"Recipe {str(path)!r} lacks an entry: {error}. See docs/recipes.md.") from error
    _check(path, recipe)
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"Cannot read recipe {str(path)!r}: {error.strerror}. Pass the path of a TOML file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {str(path)!r} is not valid TOML: {error}. Correct that line.") from error


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


def check_together(recipes: Sequence[Recipe]) -> None:
    """Check that recipes can be recorded into one folder.

    Raises:
        RecipeError: If two have the same name, or recipes wait for each other's reference model.
    """
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(
            f"Several recipes are named {twice[0]!r}, and would overwrite each other's recording. Give each one another "
            "`name`."
        )
    init_of = {recipe.name: recipe.model.init for recipe in recipes}
    for name in names:
        chain = [name]
        while (init := init_of.get(chain[-1])) in init_of and init not in chain:
            chain.append(str(init))
        if init in chain:
            raise RecipeError(
                f"Recipe {chain[-1]!r} starts from the reference model of {init!r}, which itself waits for "
                f"{chain[-1]!r}. Change model.init of one of them."
            )
