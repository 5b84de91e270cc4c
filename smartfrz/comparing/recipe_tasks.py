"""The task that a TOML file of names describes: the recipe of a recording, trained with PyTorch."""

import functools
import hashlib
from pathlib import Path

from smartfrz.comparing.own_task import Source
from smartfrz.comparing.pytorch import Task
from smartfrz.dataset_builder.models import build_data, build_model, is_keras
from smartfrz.dataset_builder.recipes import Recipe, load_recipe
from smartfrz.errors import RecipeError
from smartfrz.training import classification_loss, optimizer_of, schedule_factor, torch_device


def recipe_source(path: Path) -> Source:
    """The task of a TOML file with the sections `[model]`, `[data]` and `[training]` (docs/recipes.md).

    Args:
        path: The file. Its modules, data and weights are looked up in its folder.

    Raises:
        RecipeError: If it cannot be read, or an entry is unknown, absent or wrong.
    """
    recipe = load_recipe(path, architecture=path.stem)  # the name of the architecture matters to recordings only
    content = [path.read_bytes()]
    if recipe.data.folder:
        folder = recipe.folder / recipe.data.folder
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        content += [
            f"{file.relative_to(folder)} {file.stat().st_size} {file.stat().st_mtime_ns}".encode() for file in files
        ]
    content += [file.read_bytes() for file in _modules(recipe)]
    version = hashlib.sha256(b"\n".join(content)).hexdigest()[:12]
    return Source(str(path), recipe.folder, lambda: _task(recipe), version)


def _modules(recipe: Recipe) -> list[Path]:
    """Files of the modules that the recipe names in its folder."""
    names = {source.partition(":")[0].partition(".")[0] for source in (recipe.model.source, recipe.data.source)}
    return sorted(file for name in names if (file := recipe.folder / f"{name}.py").is_file())


def _task(recipe: Recipe) -> Task:
    spec, device = recipe.training, torch_device("auto")
    train, test = build_data(recipe)
    number = len(train)  # type: ignore[arg-type]

    def model(seed: int) -> object:
        made = build_model(recipe, seed)
        if is_keras(made):
            raise RecipeError(
                f"{recipe.model.source!r} is a Keras model; a TOML file is compared with PyTorch. Write a function that "
                "returns a smartfrz.comparing.keras.Task, and name it; docs/compare.md has an example."
            )
        return made.to(device)

    return Task(
        model=model,  # type: ignore[arg-type]
        optimizer=lambda network: optimizer_of(network, spec),
        train=train,
        validation=test,
        test=test,
        steps=max(1, round(number // spec.batch_size * spec.epochs)),
        batch_size=spec.batch_size,
        schedule=lambda progress: schedule_factor(spec, progress),
        loss=functools.partial(classification_loss, label_smoothing=spec.label_smoothing),
    )
