"""Tasks that need no code: a folder of pictures, or a file of texts, and the name of a network."""

import csv
import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from smartfrz.comparing.own_task import Source
from smartfrz.comparing.pytorch import Task
from smartfrz.dataset_builder.class_folders import class_names
from smartfrz.dataset_builder.pictures import image_folder, image_folders
from smartfrz.dataset_builder.templates import resolve_name
from smartfrz.demo.pytorch import pretrained_network
from smartfrz.errors import RecipeError, not_installed
from smartfrz.importing import import_callable
from smartfrz.training import torch_device

BUNDLED = "efficientnet-lite0"  # its weights come with the extra `demo`
HELD_OUT = 0.2  # share of the samples that are tested on, where nothing says which
LONGEST_TEXT = 128  # tokens
# Mean and deviation of ImageNet's colours, by which the networks of torchvision and timm were trained; ours are in [-1, 1].
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ReadyOptions:
    """How a ready task is trained: AdamW, the learning rate falling to 0 as a cosine, no augmentation.

    Attributes:
        network: For pictures: a name of torchvision or timm, `efficientnet-lite0`, or `module:callable`, which is called
            with the number of classes. For texts: a model of transformers, by its folder or its name on the hub.
        epochs: Length of full training.
        batch_size: Samples a step.
        learning_rate: Peak; None for 2e-4, or 1e-3 from scratch.
        from_scratch: Start from random weights instead of pretrained ones.
        image_size: Height and width to which pictures are resized.
    """

    network: str
    epochs: float = 5.0
    batch_size: int = 32
    learning_rate: float | None = None
    from_scratch: bool = False
    image_size: int = 128


def picture_source(folder: Path, options: ReadyOptions) -> Source:
    """The task of classifying pictures.

    Args:
        folder: Holds train/<class>/ and test/<class>/, or <class>/, of which a fifth is then tested on.
        options: The network, and how it is trained.
    """
    name = f"{options.network} on the pictures in {folder}"
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    seen = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return Source(name, Path.cwd(), lambda: _picture_task(folder, options), _digest(asdict(options), seen))


def text_source(file: Path, options: ReadyOptions) -> Source:
    """The task of classifying texts.

    Args:
        file: CSV with a header and the columns `text` and `label`. A fifth of the rows is tested on.
        options: The network, and how it is trained.
    """
    content = file.read_bytes() if file.is_file() else b""
    name = f"{options.network} on the texts in {file}"
    return Source(name, Path.cwd(), lambda: _text_task(file, options), _digest(asdict(options), content))


def _digest(*facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _task(train: Dataset[Any], test: Dataset[Any], model: Callable[[int], nn.Module], options: ReadyOptions) -> Task:
    rate = options.learning_rate or (1e-3 if options.from_scratch else 2e-4)
    number = len(train)  # type: ignore[arg-type]
    return Task(
        model=model,
        optimizer=lambda network: torch.optim.AdamW(network.parameters(), rate),
        train=train,
        validation=test,
        test=test,
        steps=max(1, round(number // options.batch_size * options.epochs)),
        batch_size=options.batch_size,
        schedule=lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    )


def _hold_out(data: Dataset[Any]) -> tuple[Dataset[Any], Dataset[Any]]:
    number = len(data)  # type: ignore[arg-type]
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0)).tolist()
    cut = number - max(1, round(HELD_OUT * number))
    return Subset(data, order[:cut]), Subset(data, order[cut:])


def _picture_task(folder: Path, options: ReadyOptions) -> Task:
    if not folder.is_dir():
        raise RecipeError(
            f"--pictures is {str(folder)!r}, which is no folder; expected one with train/<class>/ and test/<class>/, or "
            "with <class>/, of pictures."
        )
    train: Dataset[Any]
    test: Dataset[Any]
    if {"train", "test"} <= set(class_names(folder)):
        train, test = image_folders(folder, options.image_size)
        classes = len(class_names(folder / "train"))
    else:
        (train, test), classes = _hold_out(image_folder(folder, options.image_size)), len(class_names(folder))
    make = picture_network(options.network, classes, pretrained=not options.from_scratch)
    device = torch_device("auto")
    return _task(train, test, lambda seed: make().to(device), options)


def picture_network(name: str, classes: int, pretrained: bool) -> Callable[[], nn.Module]:
    """Return a function that makes a network for pictures whose colours are in [-1, 1].

    Raises:
        RecipeError: If there is no such network, or its last layer cannot be replaced.
        MissingDependencyError: If its library is not installed.
    """
    if name == BUNDLED:
        if not pretrained:
            raise RecipeError(f"{BUNDLED} comes with weights only; expected no --from-scratch. Leave it out.")
        return functools.partial(pretrained_network, classes)
    source = resolve_name(name)
    library, _, model = source.partition(":")
    if library in ("transformers", "keras", "keras_hub"):
        raise RecipeError(
            f"--network is {name!r}; expected a network of torchvision or timm for pictures, {BUNDLED}, or module:callable."
        )
    if library not in ("torchvision", "timm"):
        made = import_callable(source, Path.cwd(), "--network")
        return lambda: made(classes)
    make = _torchvision if library == "torchvision" else _timm

    def normalized() -> nn.Module:
        try:
            return nn.Sequential(_Normalize(), make(model, classes, pretrained))
        except OSError as error:
            raise RecipeError(
                f"The pretrained weights of {source} cannot be fetched ({error}). Give --from-scratch, or go online once."
            ) from error

    return normalized


class _Normalize(nn.Module):
    """Turns colours in [-1, 1] into those of mean 0 and deviation 1 over ImageNet."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        mean, deviation = (pictures.new_tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
        return (pictures / 2 + 0.5 - mean) / deviation


def _timm(name: str, classes: int, pretrained: bool) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    return network


def _torchvision(name: str, classes: int, pretrained: bool) -> nn.Module:
    from torchvision.models import get_model

    if not pretrained:
        network: nn.Module = get_model(name, weights=None, num_classes=classes)
        return network
    network = get_model(name, weights="DEFAULT")
    heads = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not heads or heads[-1][1].out_features != 1000:
        raise RecipeError(
            f"The last layer of torchvision's {name} is no linear one of 1000 classes, and cannot be replaced. Write a "
            "function that builds the network, and name it: --network module:callable."
        )
    parent, _, last = heads[-1][0].rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Linear(heads[-1][1].in_features, classes))
    return network


def _text_task(file: Path, options: ReadyOptions) -> Task:
    try:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise not_installed("A task of texts", "transformers", "hf") from error
    texts, labels = read_texts(file)
    names = sorted(set(labels))
    device, classes = torch_device("auto"), len(names)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.network)
        config = AutoConfig.from_pretrained(options.network, num_labels=classes)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"--network is {options.network!r}, which transformers cannot read ({str(error).splitlines()[0]}). Give the "
            "folder of a saved model with its tokenizer, or the name of a model of the hub."
        ) from error
    tokens = tokenizer(texts, truncation=True, max_length=LONGEST_TEXT, padding=True, return_tensors="pt")
    targets = torch.tensor([names.index(label) for label in labels])

    def model(seed: int) -> nn.Module:
        if options.from_scratch:
            network = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
        else:
            network = AutoModelForSequenceClassification.from_pretrained(
                options.network, config=config, ignore_mismatched_sizes=True
            )
        return network.to(device)  # type: ignore[no-any-return]

    train, test = _hold_out(_Texts(tokens["input_ids"], tokens["attention_mask"], targets))
    return _task(train, test, model, options)


class _Texts(Dataset[tuple[dict[str, torch.Tensor], torch.Tensor]]):
    """Items `({"input_ids", "attention_mask"}, label)`."""

    def __init__(self, *tensors: torch.Tensor):
        self._data = TensorDataset(*tensors)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        ids, mask, target = self._data[index]
        return {"input_ids": ids, "attention_mask": mask}, target


def read_texts(file: Path) -> tuple[list[str], list[str]]:
    """Read the columns `text` and `label` of a CSV file.

    Raises:
        RecipeError: If there is no such file, it lacks a column or a value, or has fewer than two labels.
    """
    if not file.is_file():
        raise RecipeError(f"--texts is {str(file)!r}, which is no file; expected CSV with the columns text and label.")
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            columns, rows = reader.fieldnames or [], list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise RecipeError(f"{str(file)!r} cannot be read ({error}). Save it as CSV in UTF-8.") from error
    if not {"text", "label"} <= set(columns):
        raise RecipeError(
            f"{str(file)!r} has the columns {list(columns)}; expected text and label. Rename them in its first line."
        )
    for number, row in enumerate(rows, 1):
        if not row["text"] or not row["label"]:
            raise RecipeError(f"Row {number} of {str(file)!r} lacks a text or a label. Fill it in, or remove the row.")
    labels = [row["label"] for row in rows]
    if len(set(labels)) < 2:
        raise RecipeError(
            f"{str(file)!r} has {len(set(labels))} different labels in {len(rows)} rows; expected at least two."
        )
    return [row["text"] for row in rows], labels
