"""Recipes: TOML files that say which model is trained on which data, and how."""

import dataclasses
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smartfrz.errors import RecipeError
from smartfrz.hyperparameters import OPTIMIZERS, SCHEDULES, TrainingSpec

_KINDS: dict[Any, Any] = {str: str, int: int, float: (int, float), bool: bool, dict[str, Any]: dict}
MANY = 10_000_000
_JSON = "text, numbers, true and false, and lists and tables of them; write dates as text"


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


def load_recipe(path: str | os.PathLike[str], **defaults: Any) -> Recipe:
    """Read and check a recipe.

    Args:
        path: The TOML file.
        **defaults: Entries of the top level that the file may lack.

    Returns:
        The recipe.

    Raises:
        RecipeError: If it is missing, not TOML, or has unknown, absent or wrong entries.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"Cannot read recipe {str(path)!r}: {error.strerror}. Pass the path of a TOML file."
        ) from error
    except UnicodeDecodeError as error:
        raise _no_toml(path, error) from error
    return parse_recipe(text, path, **defaults)


def parse_recipe(text: str, path: Path, **defaults: Any) -> Recipe:
    """Check the text of a recipe.

    Args:
        text: TOML.
        path: The file that it is from or for.
        **defaults: Entries of the top level that the text may lack.

    Returns:
        The recipe.

    Raises:
        RecipeError: If it is not TOML, or has unknown, absent or wrong entries.
    """
    sections = {"model": ModelSpec, "data": DataSpec, "training": TrainingSpec, "recording": RecordingSpec}
    try:
        read = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and lists that nest without end
        raise _no_toml(path, error) from error
    values: dict[str, Any] = {"name": path.stem, "recording": {}} | defaults | read
    try:
        for key, spec in sections.items():
            values[key] = _section(path, key, spec, values.get(key))
        recipe: Recipe = _section(path, "", Recipe, values | {"folder": path.parent.resolve()})
    except TypeError as error:
        raise RecipeError(f"Recipe {str(path)!r} lacks an entry: {error}. See docs/recipes.md.") from error
    _check(path, recipe)
    return recipe


def _no_toml(path: Path, error: Exception) -> RecipeError:
    return RecipeError(f"Recipe {str(path)!r} is not valid TOML: {error}. Correct that line.")


def _section(path: Path, key: str, spec: Any, values: Any) -> Any:
    where = f"section [{key}]" if key else "the top level"
    if not isinstance(values, dict):
        raise RecipeError(f"Recipe {str(path)!r} lacks {where}. See docs/recipes.md for a commented recipe.")
    known = [f.name for f in dataclasses.fields(spec)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise RecipeError(f"Recipe {str(path)!r}, {where}: unknown entry {unknown[0]!r}. Known: {', '.join(known)}.")
    for f in dataclasses.fields(spec):
        if f.name in values and not _has_type(values[f.name], f.type):
            raise RecipeError(
                f"Recipe {str(path)!r}, {where}: {f.name} is {values[f.name]!r}; expected a value of type {f.type}. "
                "Change that entry."
            )
    return spec(**values)


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # which Python takes for an integer
        return kind is bool or kind not in _KINDS
    return isinstance(value, _KINDS.get(kind, object))


def is_name(text: str) -> bool:
    """Return whether files can be called `<text>.parquet` and the like: no path, not hidden, not too long."""
    return is_plain(text) and not text.startswith(".") and not set(text) & set("/\\:") and len(text.encode()) <= 200


def is_plain(text: str) -> bool:
    """Return whether a text is one line of visible characters."""
    return bool(text) and text.isprintable() and text == text.strip()


def _check(path: Path, recipe: Recipe) -> None:
    training, recording, model, data = recipe.training, recipe.recording, recipe.model, recipe.data
    most_seed, name = 2**31 - 1, "a file name without folders that does not begin with a dot"
    one_line = "one line of text"
    checks = [
        (is_name(recipe.name), "name", recipe.name, name),
        (is_plain(recipe.architecture), "architecture", recipe.architecture, one_line),
        (0 <= recipe.seed <= most_seed, "seed", recipe.seed, f"an integer from 0 to {most_seed}"),
        (is_plain(model.source), "model.source", model.source, one_line),
        (_is_init(model.init), "model.init", model.init, f"a path that ends in .safetensors, or {name}"),
        (bool(data.source) != bool(data.folder), "data", data, "either `source` or `folder`"),
        (is_plain(data.source or data.folder), "data", data, f"{one_line} as `source` or `folder`"),
        (
            is_plain(str(data.arguments.get("name", "none"))),
            "data.arguments.name",
            data.arguments.get("name"),
            one_line,
        ),
        (1 <= data.image_size <= 4096, "data.image_size", data.image_size, "an integer from 1 to 4096"),
        (training.optimizer in OPTIMIZERS, "training.optimizer", training.optimizer, f"one of {OPTIMIZERS}"),
        (training.schedule in SCHEDULES, "training.schedule", training.schedule, f"one of {SCHEDULES}"),
        # NaN is within no bounds.
        *(
            (fine, f"training.{entry}", getattr(training, entry), expected)
            for fine, entry, expected in (
                (0 < training.epochs <= MANY, "epochs", f"a positive number up to {MANY}"),
                (0 < training.batch_size <= MANY, "batch_size", f"a positive integer up to {MANY}"),
                (0 < training.learning_rate < math.inf, "learning_rate", "a positive number"),
                (0 <= training.momentum < 1, "momentum", "a number in [0, 1)"),
                (0 <= training.weight_decay < math.inf, "weight_decay", "a finite number from 0"),
                (0 <= training.warmup < 1, "warmup", "a fraction of the run, in [0, 1)"),
                (0 <= training.label_smoothing < 1, "label_smoothing", "a number in [0, 1)"),
            )
        ),
        *(
            (fine, f"recording.{entry}", getattr(recording, entry), expected)
            for fine, entry, expected in (
                (4 <= recording.records <= MANY, "records", f"at least 4, and at most {MANY}"),
                (0 < recording.pool_size <= MANY, "pool_size", f"a positive integer up to {MANY}"),
                (4 <= recording.probe_size <= MANY, "probe_size", f"at least 4, and at most {MANY}"),
                (0 <= recording.seed <= most_seed, "seed", f"an integer from 0 to {most_seed}"),
            )
        ),
        (_is_json(model.arguments), "model.arguments", model.arguments, _JSON),
        (_is_json(data.arguments), "data.arguments", data.arguments, _JSON),
    ]
    for fine, entry, received, expected in checks:
        if not fine:
            raise RecipeError(f"Recipe {str(path)!r}: {entry} is {received!r}; expected {expected}. Change that entry.")


def _is_init(init: str) -> bool:
    return not init or is_name(init) or (is_plain(init) and init.endswith(".safetensors"))


def _is_json(arguments: dict[str, Any]) -> bool:
    """Return whether arguments can be stored with a recording; dates cannot."""
    try:
        json.dumps(arguments)
    except TypeError:
        return False
    return True


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
