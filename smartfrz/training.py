"""Training PyTorch models: the loop of recordings, and the step that comparisons share with it."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from smartfrz.errors import RecipeError
from smartfrz.hyperparameters import TrainingSpec
from smartfrz.predictor.runtime import Device

Loss = Callable[[nn.Module, Any, Any], torch.Tensor]


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
    on_step: Callable[[int, int, float, float], None],
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
    torch.manual_seed(seed)
    device = device_of(model)
    loader = training_loader(data, spec)
    total = max(1, round(len(loader) * spec.epochs))
    optimizer = optimizer_of(model, spec)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(spec, step / total))
    model.train()
    smoothed_loss = functools.partial(classification_loss, label_smoothing=spec.label_smoothing)
    for step, batch in zip(range(1, total + 1), endless(loader), strict=False):
        inputs, targets = to_device(batch, device)
        loss = train_step(model, inputs, targets, smoothed_loss, optimizer).item()
        check_finite(loss, step)
        on_step(step, total, loss, optimizer.param_groups[0]["lr"])
        scheduler.step()


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
    model.eval()
    device, correct = device_of(model), 0
    with torch.no_grad():
        for batch in DataLoader(data, batch_size):
            inputs, targets = to_device(batch, device)
            correct += int((forward(model, inputs).argmax(1) == targets).sum())
    return correct / len(data)  # type: ignore[arg-type]
