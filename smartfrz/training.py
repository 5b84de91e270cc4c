"""How a PyTorch model is trained here: the loop of recordings, comparisons and benchmarks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from smartfrz.errors import RecipeError
from smartfrz.hyperparameters import TrainingSpec
from smartfrz.predictor.runtime import Device


def torch_device(name: Device) -> torch.device:
    """The device of that name, or for `"auto"` the best there is.

    Raises:
        RecipeError: If CUDA was asked for, and PyTorch has none.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise RecipeError(
            "device='cuda' was asked for, but PyTorch sees no GPU (torch.cuda.is_available() is False). Install a CUDA "
            "build of PyTorch, or record with device='cpu'."
        )
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is; the CPU for one that has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Tensors, in whatever they are."""
    return tree_map(lambda value: value.to(device), batch)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as the arguments of a forward pass: a dict is spread, as transformers models expect."""
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
    """Train a classifier as the recipe says.

    Args:
        model: Trained in place, on the device that it is on.
        data: Items `(inputs, target)`.
        spec: Optimizer, schedule, epochs.
        seed: For the order of the data, dropout and augmentation.
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
    step = 0
    while step < total:
        for batch in loader:
            inputs, targets = to_device(batch, device)
            loss = cross_entropy(forward(model, inputs), targets, label_smoothing=spec.label_smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            check_finite(loss.item(), step)
            on_step(step, total, loss.item(), optimizer.param_groups[0]["lr"])
            scheduler.step()
            if step == total:
                break


def check_finite(loss: float, step: int) -> None:
    """Whether training makes sense still.

    Raises:
        RecipeError: If not.
    """
    if not math.isfinite(loss):
        raise RecipeError(f"The loss is {loss} at step {step}. Lower training.learning_rate.")


def optimizer_of(model: nn.Module, spec: TrainingSpec) -> torch.optim.Optimizer:
    """The spec's optimizer, of the parameters that are trained."""
    momentum = {"momentum": spec.momentum} if spec.optimizer in ("SGD", "RMSprop") else {}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, spec.optimizer)(
        [p for p in model.parameters() if p.requires_grad],
        lr=spec.learning_rate,
        weight_decay=spec.weight_decay,
        **momentum,
    )
    return optimizer


def training_loader(data: Dataset[Any], spec: TrainingSpec) -> DataLoader[Any]:
    """Shuffled batches of one size."""
    return DataLoader(data, spec.batch_size, shuffle=True, drop_last=len(data) >= spec.batch_size)  # type: ignore[arg-type]


def schedule_factor(spec: TrainingSpec, progress: float) -> float:
    """Learning rate as a fraction of its peak, at `progress` in [0, 1] of the run."""
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
