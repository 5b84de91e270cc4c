"""`smartfrz-build new`: a commented recipe from the name of a model."""

import difflib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from smartfrz.dataset_builder.class_folders import class_names, picture_files
from smartfrz.dataset_builder.picture_sizes import choose_size
from smartfrz.errors import MissingDependencyError, RecipeError

# Beginnings of model names, and the architecture family that the recipes of smartfrz-base put them into.
FAMILIES = {
    "transformer": (
        "vit",
        "deit",
        "swin",
        "beit",
        "bert",
        "roberta",
        "distilbert",
        "minilm",
        "electra",
        "albert",
        "gpt",
    ),
    "inverted-residual-cnn": ("mobilenet", "efficientnet", "mnasnet", "tf_efficientnet", "fbnet", "mixnet"),
    "residual-cnn": ("resnet", "resnext", "wide_resnet", "regnet", "seresnet"),
    "plain-cnn": ("vgg", "alexnet", "squeezenet"),
}
_IMAGE_DATA = "pictures"
# What the recipes of `--family` differ in, by what is added to the name: seed, and a factor of the learning rate.
_VARIANTS = {"-high-1": (0, 1.0), "-high-2": (2, 1.0), "-low-1": (0, 0.3), "-low-2": (2, 0.3)}
_USUAL_SIZE = 64  # of networks whose data are no folder
_MIN_STEPS = 120  # two for each of the 60 records
_TEMPLATE = """\
# Written by smartfrz-build new. docs/recipes.md explains every entry; what is not here has its default.
#   smartfrz-build check {file}     # two steps: layers, memory, time
#   smartfrz-build run {file} ...   # record, label, train, evaluate, export

name = {name}                  # the recording is <name>.parquet
architecture = {architecture}  # a guess from the model's name; recipes of one family are held out together
seed = {seed}                  # initial weights, and data order of the reference

[model]
source = {source}
arguments = {arguments}
# init = "other-recipe"        # start from the finished reference model of another recipe, or from a .safetensors file

[data]
{data}

[training]
{training}

[recording]
records = 60                   # timestamps; training a predictor thins them to its own
pool_size = 2048               # sampled weights a layer, at least the predictor's tailored size
probe_size = 96                # test examples on which CKA is taken
seed = {recording_seed}        # data order of the recorded run
reinitialize = false           # true: record from other initial weights than the reference's; for training from scratch
"""
_FOLDER = """\
folder = {folder}              # folder/train/<class>/ and folder/test/<class>/, .png or .jpg
image_size = {image_size}      # {reason}
# source = "my_data:pictures"  # instead: my_data.py beside this file, whose function returns (train, test) datasets of
#                              # (inputs, target)"""
_FUNCTION = """\
source = {data_source}         # module:callable, looked up beside this file first; returns (train, test) datasets of
#                              # (inputs, target); a dict as inputs is passed to the model as keyword arguments
# arguments = {{ num_train = 3000 }}"""
_FROM_SCRATCH = """\
epochs = {epochs}              # may be a fraction{why_epochs}
batch_size = 64
optimizer = "SGD"              # SGD, Adam, AdamW, RMSprop, Adagrad
learning_rate = {rate:g}
momentum = 0.9
weight_decay = 5e-4
schedule = "cosine"            # cosine, linear, constant, step"""
_FINE_TUNING = """\
epochs = {epochs}              # may be a fraction{why_epochs}
batch_size = 32
optimizer = "AdamW"            # SGD, Adam, AdamW, RMSprop, Adagrad
learning_rate = {rate:g}
weight_decay = 0.01
schedule = "linear"            # cosine, linear, constant, step
warmup = 0.1                   # fraction of the run"""


@dataclass(frozen=True)
class NewRecipe:
    """What `smartfrz-build new` is asked for.

    Attributes:
        model: As for `resolve_name`.
        data: A folder of pictures, relative to the current one, or `module:callable`; empty for a folder `pictures` or, for
            texts, `my_data:texts`.
        num_classes: Of the model's head; 0 to count the classes in the folder, or else 10.
        name: Of the recipe; empty for one from the model's name.
        architecture: Family; empty for a guess.
        image_size: Of the pictures in a folder; None to choose one, see `choose_size`.
        seed: Of the initial weights and of the order of the data in the reference; the recorded run has the next one.
        rate: Factor of the usual learning rate.
    """

    model: str
    data: str = ""
    num_classes: int = 0
    name: str = ""
    architecture: str = ""
    image_size: int | None = None
    seed: int = 0
    rate: float = 1.0


def resolve_name(model: str) -> str:
    """The `model.source` that a name means.

    Args:
        model: `torchvision:NAME`, `timm:NAME`, `transformers:NAME_OR_FOLDER`, `keras:NAME`, `keras_hub:PRESET` (these
            two are looked up when the model is built), `module:callable`, the bare name of a torchvision or timm model
            (torchvision's, if both have it), `organisation/name` of the Hugging Face hub, or the folder of a saved
            transformers model.

    Raises:
        RecipeError: If torchvision and timm do not have the name, or the folder holds no saved model.
        MissingDependencyError: If the library is not installed.
    """
    library, colon, name = model.partition(":")
    if colon and library == "transformers":
        return f"transformers:{_transformers_name(name)}"
    if colon and library not in ("torchvision", "timm"):
        return model
    if not colon and "/" in model:
        return f"transformers:{_transformers_name(model)}"
    wanted = name if colon else model
    known = _known_names((library,) if colon else ("torchvision", "timm"))
    for found, names in known.items():
        # timm takes a tag of pretrained weights behind a dot.
        if wanted in names or (found == "timm" and wanted.partition(".")[0] in names):
            return f"{found}:{wanted}"
    raise _unknown(wanted, " nor ".join(known), [n for names in known.values() for n in names])


def has_own_code(source: str) -> bool:
    """Return whether a `model.source` names code of the user, and no model of a library."""
    return source.partition(":")[0] not in ("torchvision", "timm", "transformers", "keras", "keras_hub")


def _known_names(libraries: Iterable[str]) -> dict[str, list[str]]:
    known, absent = {}, []
    for library in libraries:
        try:
            if library == "torchvision":
                from torchvision.models import list_models
            else:
                from timm import list_models
        except ImportError:
            absent.append(library)
            continue
        known[library] = sorted(list_models())
    if not known:
        raise MissingDependencyError(
            f"Model names are looked up in {' and '.join(absent)}, which cannot be imported. Install one with: pip install "
            f"{absent[0]}, or name the model as module:callable or transformers:NAME."
        )
    return known


def _transformers_name(name: str) -> str:
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    if folder.is_dir():
        raise RecipeError(
            f"Folder {name!r} has no config.json; expected a model that save_pretrained saved. Name that folder, or a "
            "model of the Hugging Face hub."
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        beside = folder.parent.iterdir() if folder.parent.is_dir() else iter(())
        raise _unknown(name, "the folders there", [str(p) for p in beside if (p / "config.json").is_file()])
    return name  # of the hub, which is asked when the model is built


def _unknown(name: str, where: str, names: list[str]) -> RecipeError:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return RecipeError(
        f"Unknown model {name!r}: not in {where}.{hint} Expected torchvision:NAME, timm:NAME, transformers:NAME_OR_FOLDER "
        "or module:callable."
    )


def recipe_text(new: NewRecipe, file: Path) -> str:
    """A recipe, TOML with comments.

    Raises:
        RecipeError: As `resolve_name`, or if `data` is a folder without the classes of a training split.
        MissingDependencyError: As `resolve_name`.
    """
    source = resolve_name(new.model)
    library, _, model_name = source.partition(":")
    short = model_name.rstrip("/").rpartition("/")[2]
    architecture = new.architecture or _family(short)
    data = new.data or ("my_data:texts" if library == "transformers" else _IMAGE_DATA)
    classes, image_size, reason = new.num_classes, new.image_size, "as you asked for"
    if new.data and ":" not in new.data:
        data = os.path.relpath(new.data, file.parent)
    if ":" not in data:
        folder = Path(os.path.normpath(file.parent / data))
        classes = classes or (_count_classes(folder) if new.data or folder.exists() else 0)
        if not image_size:
            image_size, reason = choose_size(source, folder)
    heads = {
        "torchvision": "{{ num_classes = {} }}",
        "timm": "{{ num_classes = {}, pretrained = false }}  # true: start from weights of the timm hub",
        "transformers": "{{ num_labels = {}, ignore_mismatched_sizes = true }}",
        "keras": "{{ classes = {0}, input_shape = [{1}, {1}, 3] }}",
        "keras_hub": "{{ num_classes = {} }}  # and load_weights = false to start from random weights",
    }
    section = (
        _FUNCTION.format(data_source=_quoted(data))
        if ":" in data
        else _FOLDER.format(folder=_quoted(data), image_size=image_size, reason=reason)
    )
    num_pictures = 0 if ":" in data else _count_pictures(file.parent / data)
    text = _TEMPLATE.format(
        file=file.name,
        name=_quoted(new.name or file.stem),
        architecture=_quoted(architecture),
        source=_quoted(source),
        arguments=heads.get(library, "{{}}").format(classes or 10, image_size or _USUAL_SIZE),
        seed=new.seed,
        recording_seed=new.seed + 1,
        data=section,
        training=_training(architecture, num_pictures, new.rate),
    )
    return _aligned(text)


def family(new: NewRecipe, file: Path) -> dict[Path, NewRecipe]:
    """Return four recipes of one model and their files: two orders of the data, each with two learning rates.

    Args:
        new: What they have in common.
        file: Its name, and the name in `new`, get an ending for each of the four.
    """
    return {
        file.with_name(file.stem + ending + file.suffix): replace(
            new, name=new.name and new.name + ending, seed=seed, rate=rate
        )
        for ending, (seed, rate) in _VARIANTS.items()
    }


def _training(architecture: str, num_pictures: int, rate: float) -> str:
    """Return the entries of `[training]`, with as many epochs as records need, if the number of pictures is known."""
    fine_tuning = architecture == "transformer"
    template, epochs, batch_size, usual_rate = (
        (_FINE_TUNING, 3, 32, 5e-5) if fine_tuning else (_FROM_SCRATCH, 10, 64, 0.05)
    )
    needed = math.ceil(_MIN_STEPS / max(1, num_pictures // batch_size)) if num_pictures else 0
    why = f"; {num_pictures} pictures need so many for two steps a record" if needed > epochs else ""
    return template.format(epochs=max(epochs, needed), why_epochs=why, rate=usual_rate * rate)


def _aligned(text: str) -> str:
    """Comments behind entries in one column."""
    rows = [re.match(r"(\S.*?\S) {2,}(#.*)", line) for line in text.splitlines()]
    return "".join(
        f"{row[1]:30s} {row[2]}\n" if row and not line.startswith("#   ") else f"{line}\n"
        for row, line in zip(rows, text.splitlines(), strict=True)
    )


def default_file(model: str) -> Path:
    """Return the default file for the recipe of a model: `<name>.toml` in the current directory."""
    short = model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return Path(re.sub(r"[^\w.-]+", "-", short) + ".toml")


def _family(name: str) -> str:
    lowered = name.lower()
    for family, beginnings in FAMILIES.items():
        if any(re.search(rf"(^|[^a-z]){beginning}", lowered) for beginning in beginnings):
            return family
    return re.split(r"[^a-z]", lowered)[0] or "other"


def _count_classes(folder: Path) -> int:
    train = folder / "train"
    classes = class_names(train)
    if len(classes) < 2:
        raise RecipeError(
            f"{str(train)!r} holds {len(classes)} folders; expected at least two, one a class. Pass as --data the folder "
            "that holds train/<class>/ and test/<class>/, or module:callable."
        )
    return len(classes)


def _count_pictures(folder: Path) -> int:
    train = folder / "train"
    return sum(len(picture_files(train / name)) for name in class_names(train))


def _quoted(text: str) -> str:
    return json.dumps(text)  # a JSON string is a TOML basic string
