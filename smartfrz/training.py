"""Training PyTorch models: the loop of recordings, and the step that comparisons share with it."""

import contextlib
import copy
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from smartfrz.errors import RecipeError
from smartfrz.hyperparameters import TrainingSpec
from smartfrz.predictor.runtime import Device

Loss = Callable[[nn.Module, Any, Any], torch.Tensor]
OnStep = Callable[[int, int, float, float], None]


def torch_device(name: Device) -> torch.device:
    """The device called `name`; for `"auto"`, CUDA if there is a GPU, else the CPU.

    Raises:
        RecipeError: If CUDA was asked for, and PyTorch has none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RecipeError(
            "device='cuda' was asked for, but PyTorch sees no GPU (torch.cuda.is_available() is False). Install a CUDA "
            "build of PyTorch, or record with device='cpu'."
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move all tensors of a nested structure to a device."""
    return tree_map(lambda value: value.to(device), batch)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward pass: a dict is spread, as transformers models expect."""
    return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


def forward(model: nn.Module, inputs: Any) -> torch.Tensor:
    """The model's logits, float `[batch, classes]`."""
    args, keywords = arguments(inputs)
    output = model(*args, **keywords)
    return output if isinstance(output, torch.Tensor) else output.logits


def train(
    model: nn.Module,
    data: Dataset[Any],
    spec: TrainingSpec,
    *,
    seed: int,
    on_step: OnStep,
) -> None:
    """Train a classifier as a recipe says.

    Args:
        model: Model, trained in place on its own device.
        data: Items `(inputs, target)`.
        spec: Optimizer, schedule, epochs.
        seed: Seed of the order of the data, dropout and augmentation.
        on_step: Called after each optimizer step with step (from 1), total steps, loss, learning rate.

    Raises:
        RecipeError: If the loss is not finite.
    """
    Training(model, data, spec, seed=seed).run(on_step)


class Training:
    """One training of a classifier. In the middle of it, `branch` makes another that goes on by itself.

    Args:
        model: Model, trained in place on its own device.
        data: Items `(inputs, target)`.
        spec: Optimizer, schedule, epochs.
        seed: Seed of the order of the data, dropout and augmentation.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        step: Optimizer steps taken.
        total: Optimizer steps of the whole training.
    """

    def __init__(self, model: nn.Module, data: Dataset[Any], spec: TrainingSpec, *, seed: int):
        torch.manual_seed(seed)
        self.model, self._spec = model, spec
        loader = training_loader(data, spec)
        self.step, self.total = 0, max(1, round(len(loader) * spec.epochs))
        self.optimizer = optimizer_of(model, spec)
        self._batches = _Batches(loader, device_of(model))

    def run(self, on_step: OnStep) -> None:
        """Train to the end.

        Args:
            on_step: Called after each optimizer step with step (from 1), total steps, loss, learning rate.

        Raises:
            RecipeError: If the loss is not finite, or there are no batches.
        """
        spec, device = self._spec, device_of(self.model)
        self.model.train()
        smoothed_loss = functools.partial(classification_loss, label_smoothing=spec.label_smoothing)
        while self.step < self.total:
            rate = spec.learning_rate * schedule_factor(spec, self.step / self.total)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            inputs, targets = to_device(self._batches.take(), device)
            loss = train_step(self.model, inputs, targets, smoothed_loss, self.optimizer).item()
            self.step += 1
            check_finite(loss, self.step)
            on_step(self.step, self.total, loss, rate)

    def branch(self) -> "Training":
        """Return a training with copies of model and optimizer, which goes on from here as this one would.

        Batches, their augmentation, dropout and learning rates are the same. Call it between two steps, such as in
        `on_step`, and run the branch in `random_numbers_kept`.

        Raises:
            RecipeError: If the model cannot be copied.
        """
        twin = copy.copy(self)
        try:
            twin.model = copy.deepcopy(self.model)
        # Whatever a model of the user's raises when it is copied.
        except Exception as error:
            raise RecipeError(
                f"A branch of the training needs a copy of {type(self.model).__name__}, and copy.deepcopy raised "
                f"{type(error).__name__}: {error}. Keep no tensor that has a gradient in an attribute, or record without "
                "--costs."
            ) from error
        twin.optimizer = optimizer_of(twin.model, self._spec)
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))  # else both share its tensors
        twin._batches = self._batches.branch()
        return twin


class _Batches:
    """The loader's batches, epoch after epoch.

    Args:
        loader: The loader.
        device: Device whose random numbers belong to the training.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device):
        self._loader, self._device = loader, device
        self._epoch: Iterator[Any] | None = None
        self._epoch_began: _RandomState | None = None
        self._taken = 0  # batches of the epoch
        self._branched: _RandomState | None = None

    def take(self) -> Any:
        """Return the next batch.

        Raises:
            RecipeError: If the loader has none.
        """
        if self._branched is not None:
            self._catch_up(self._branched)
            self._branched = None
        batch = None if self._epoch is None else next(self._epoch, None)
        if batch is None:
            self._epoch_began = _random_state(self._device)
            self._epoch, self._taken = iter(self._loader), 0
            batch = next(self._epoch, None)
        if batch is None:
            raise RecipeError("The training data have no examples. Check [data].")
        self._taken += 1
        return batch

    def branch(self) -> "_Batches":
        """Return batches that go on from here, with the same random numbers."""
        twin = copy.copy(self)
        twin._epoch, twin._branched = None, _random_state(self._device)
        return twin

    def _catch_up(self, now: "_RandomState") -> None:
        """Begin the epoch as it began, which shuffles the data the same, and pass over what was taken of it."""
        if self._epoch_began is not None:
            _set_random_state(self._epoch_began, self._device)
            self._epoch = iter(self._loader)
            for _ in range(self._taken):
                next(self._epoch)
        _set_random_state(now, self._device)


class _RandomState(NamedTuple):
    torch: torch.Tensor
    cuda: torch.Tensor | None
    numpy: Any
    python: Any


def _random_state(device: torch.device) -> _RandomState:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return _RandomState(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())  # noqa: NPY002


def _set_random_state(state: _RandomState, device: torch.device) -> None:
    torch.set_rng_state(state.torch)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, device)
    np.random.set_state(state.numpy)  # noqa: NPY002
    random.setstate(state.python)


@contextlib.contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Restore the random number generators of PyTorch, NumPy and Python after the block."""
    state = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(state, device)


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the loader's batches, epoch after epoch; a loader without batches never yields."""
    while True:
        yield from loader


def train_step(
    model: nn.Module, inputs: Any, targets: Any, loss: Loss, optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """Run both passes and one optimizer step, and return the loss."""
    value = loss(model, inputs, targets)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value


def classification_loss(model: nn.Module, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross entropy of a classifier."""
    return cross_entropy(forward(model, inputs), targets, label_smoothing=label_smoothing)


def check_finite(loss: float, step: int) -> None:
    """Check that training still makes sense.

    Raises:
        RecipeError: If the loss is not finite.
    """
    if not math.isfinite(loss):
        raise RecipeError(f"The loss is {loss} at step {step}. Lower training.learning_rate.")


def optimizer_of(model: nn.Module, spec: TrainingSpec) -> torch.optim.Optimizer:
    """Make the spec's optimizer for the parameters that require gradients."""
    momentum = {"momentum": spec.momentum} if spec.optimizer in ("SGD", "RMSprop") else {}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, spec.optimizer)(
        [p for p in model.parameters() if p.requires_grad],
        lr=spec.learning_rate,
        weight_decay=spec.weight_decay,
        **momentum,
    )
    return optimizer


def training_loader(data: Dataset[Any], spec: TrainingSpec) -> DataLoader[Any]:
    """Make a loader of shuffled batches of equal size."""
    return DataLoader(data, spec.batch_size, shuffle=True, drop_last=len(data) >= spec.batch_size)  # type: ignore[arg-type]


def schedule_factor(spec: TrainingSpec, progress: float) -> float:
    """Learning rate as a fraction of its peak, when `progress` in [0, 1] of the run is done."""
    if progress < spec.warmup:
        return (progress + 1e-3) / spec.warmup
    progress = (progress - spec.warmup) / (1 - spec.warmup)
    match spec.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "step":
            return 0.1 ** (int(progress >= 0.5) + int(progress >= 0.75))
        case _:
            return 1.0


def evaluate(model: nn.Module, data: Dataset[Any], batch_size: int = 256) -> float:
    """Accuracy in [0, 1]; the model is in eval mode afterwards."""
    correct = sum(int((logits.argmax(1) == targets).sum()) for logits, targets in _answers(model, data, batch_size))
    return correct / len(data)  # type: ignore[arg-type]


def validate(model: nn.Module, data: Dataset[Any], batch_size: int = 256) -> tuple[float, float]:
    """Return the mean cross entropy in nats and the accuracy in [0, 1]; the model is in eval mode afterwards."""
    loss, correct = 0.0, 0
    for logits, targets in _answers(model, data, batch_size):
        loss += float(cross_entropy(logits.float(), targets, reduction="sum"))
        correct += int((logits.argmax(1) == targets).sum())
    examples = len(data)  # type: ignore[arg-type]
    return loss / examples, correct / examples


def _answers(model: nn.Module, data: Dataset[Any], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield logits and targets of each batch."""
    model.eval()
    device = device_of(model)
    for batch in DataLoader(data, batch_size):
        inputs, targets = to_device(batch, device)
        with torch.no_grad():
            logits = forward(model, inputs)
        yield logits, targets
