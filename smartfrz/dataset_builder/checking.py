"""`smartfrz-build check`: take two training steps and one record, and estimate what a recording will take."""

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from smartfrz.adapters.torch.costs import measure_step
from smartfrz.adapters.torch.layers import LayerReader, trace_layers
from smartfrz.dataset_builder.models import build_data, build_model, is_keras
from smartfrz.dataset_builder.recipes import Recipe
from smartfrz.dataset_builder.similarity import layer_grams, probe_batch
from smartfrz.dataset_builder.storage import reference_file
from smartfrz.dataset_builder.templates import has_own_code
from smartfrz.errors import RecipeError
from smartfrz.importing import import_callable
from smartfrz.predictor.runtime import Device
from smartfrz.training import arguments, evaluate, forward, to_device, torch_device, train, training_loader

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Check:
    """What two steps of a recipe show.

    Attributes:
        layers: Number of weights of each layer, by its name, in execution order.
        num_train: Number of training examples.
        num_test: Number of test examples.
        total_steps: Steps in one training; a recording takes two trainings.
        step_seconds: Duration of the second step. The first one also warms up.
        record_seconds: Duration of one timestamp: CKA on the probe batch.
        test_seconds: Duration of measuring the accuracy once.
        weight_bytes: Size of the model's parameters and buffers. Gradients take as much, an optimizer up to twice that.
        activation_bytes: What a step keeps from the forward for the backward pass.
        recording_bytes: Size of the recorded weights, before compression.
        losses: Losses of the two steps.
        init_missing: Whether `model.init` names a recipe that is not recorded yet; random weights were used then.
    """

    layers: dict[str, int]
    num_train: int
    num_test: int
    total_steps: int
    step_seconds: float
    record_seconds: float
    test_seconds: float
    weight_bytes: int
    activation_bytes: int
    recording_bytes: int
    losses: tuple[float, ...]
    init_missing: bool

    def total_seconds(self, records: int) -> float:
        """Estimate the whole recording: two trainings, the records of the second, two accuracies."""
        return 2 * self.total_steps * self.step_seconds + records * self.record_seconds + 2 * self.test_seconds


def check_recipe(recipe: Recipe, runs: Path, device: Device = "auto") -> Check:
    """Take two training steps as the recording would, and measure.

    Args:
        recipe: The recipe.
        runs: Folder of the recordings, in which `model.init` looks for other recipes' reference models.
        device: Where to train, as for `record`.

    Raises:
        RecipeError: If the recipe cannot be run, the loss is not finite, or CUDA was asked for and is missing.
        UnsupportedModelError: If the model has no layer with weights.
    """
    chosen = torch_device(device)
    train_data, test_data = build_data(recipe)
    init_missing = _waits_for_init(recipe, runs)
    if init_missing:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, init=""))
    model, spec = _torch_model(recipe, runs), recipe.training
    loader = training_loader(train_data, spec)
    inputs, targets = next(iter(loader))
    _check_targets(recipe, targets, forward(model.eval(), inputs))
    probe = probe_batch(test_data, recipe.recording.probe_size)
    model, inputs, targets, probe = (to_device(part, chosen) for part in (model, inputs, targets, probe))
    layers = trace_layers(model.eval(), *arguments(probe)[0], **arguments(probe)[1])
    reader = LayerReader(model, layers)
    sizes = {layer.name: reader.num_weights(layer.name) for layer in layers}
    losses, step_seconds = _take_two_steps(recipe, model, train_data, len(loader))
    work = measure_step(
        model, lambda: cross_entropy(forward(model, inputs), targets, label_smoothing=spec.label_smoothing)
    )
    part = torch.utils.data.Subset(test_data, range(min(256, _length(test_data))))
    return Check(
        layers=sizes,
        num_train=_length(train_data),
        num_test=_length(test_data),
        total_steps=max(1, round(len(loader) * spec.epochs)),
        step_seconds=step_seconds,
        record_seconds=_seconds(lambda: layer_grams(model, layers, probe)),
        test_seconds=_seconds(lambda: evaluate(model, part)) * _length(test_data) / len(part),
        weight_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        activation_bytes=work.activation_bytes,
        recording_bytes=4 * len(sizes) * recipe.recording.records * recipe.recording.pool_size,
        losses=losses,
        init_missing=init_missing,
    )


def check_callables(recipe: Recipe, data_given: bool) -> tuple[str, ...]:
    """Import the functions of the user that a recipe names, and build the model where that takes no arguments.

    Args:
        recipe: The recipe.
        data_given: Whether `data.source` is the user's; else it is a placeholder that may not exist.

    Returns:
        What is left to fill in.

    Raises:
        RecipeError: If a module cannot be imported, lacks the callable, or building fails or gives no model.
    """
    if data_given and recipe.data.source:
        _import(recipe, "data.source", recipe.data.source)
    source = recipe.model.source
    if not has_own_code(source):
        return ()
    make = _import(recipe, "model.source", source)
    with contextlib.suppress(ValueError, TypeError):  # some callables have no signature: then try
        missing = [
            name
            for name, parameter in inspect.signature(make).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and name not in recipe.model.arguments
        ]
        if missing:
            return (f"model.arguments of {source}: {', '.join(missing)}",)
    try:
        model = build_model(recipe, recipe.seed)
    except Exception as error:  # it is the user's code
        raise RecipeError(
            f"{source} cannot be built: it raises {type(error).__name__}: {error}. Expected a callable that returns a "
            "PyTorch or Keras model when it is called with model.arguments."
        ) from error
    if not isinstance(model, nn.Module) and not is_keras(model):
        raise RecipeError(
            f"{source} returns {type(model).__name__}; expected a callable that returns a PyTorch or Keras model. Name the "
            "function that builds the network."
        )
    return ()


def _import(recipe: Recipe, entry: str, source: str) -> Callable[..., Any]:
    try:
        return import_callable(source, recipe.folder, f"Recipe {recipe.name!r}: {entry}")
    except RecipeError:
        raise
    except Exception as error:  # it is the user's code
        raise RecipeError(
            f"Module {source.partition(':')[0]!r} cannot be imported: it raises {type(error).__name__}: {error}. Correct "
            "that first."
        ) from error


def _waits_for_init(recipe: Recipe, runs: Path) -> bool:
    init = recipe.model.init
    return bool(init) and not init.endswith(".safetensors") and not reference_file(runs, init).exists()


def _torch_model(recipe: Recipe, runs: Path) -> nn.Module:
    model = build_model(recipe, recipe.seed, runs)
    if is_keras(model):
        raise RecipeError(
            f"Recipe {recipe.name!r} has a Keras model, but this command measures PyTorch models only. Record it with a "
            "few epochs instead."
        )
    return model


def _take_two_steps(
    recipe: Recipe, model: nn.Module, data: Dataset[Any], steps_per_epoch: int
) -> tuple[tuple[float, ...], float]:
    """Train for two steps; return their losses and the seconds that the second one took."""
    moments, losses = [], []

    def on_step(step: int, total: int, loss: float, learning_rate: float) -> None:
        losses.append(loss)
        moments.append(time.perf_counter())

    two_steps = dataclasses.replace(recipe.training, epochs=2 / steps_per_epoch)
    train(model, data, two_steps, seed=recipe.seed, on_step=on_step)
    return tuple(losses), moments[1] - moments[0]


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _length(data: Dataset[Any]) -> int:
    return len(data)  # type: ignore[arg-type]


def _check_targets(recipe: Recipe, targets: torch.Tensor, logits: torch.Tensor) -> None:
    """Check the labels, since PyTorch's own message names neither labels nor classes."""
    if int(targets.max()) >= logits.shape[1] or int(targets.min()) < 0:
        raise RecipeError(
            f"Recipe {recipe.name!r}: the first batch has labels from {int(targets.min())} to {int(targets.max())}, but "
            f"the model gives {logits.shape[1]} classes; expected labels from 0 to {logits.shape[1] - 1}. Change the number "
            "of classes in model.arguments."
        )


def describe(recipe: Recipe, check: Check) -> str:
    """Return the figures as text."""
    records = min(recipe.recording.records, check.total_steps)
    per_layer = [f"  {name or '(the model)':50s} {size:>12,d}" for name, size in check.layers.items()]
    losses = ", ".join(f"{loss:.3f}" for loss in check.losses)
    lines = [
        f"{recipe.name}: {recipe.model.source}, {check.num_train:,d} training and {check.num_test:,d} test examples",
        f"  {'layer':50s} {'weights':>12s}",
        *per_layer,
        f"layers           {len(check.layers)}",
        f"loss             {losses} in the first two steps",
        f"memory           weights {check.weight_bytes / MEBIBYTE:.1f} MiB (gradients the same, optimizer up to twice "
        f"that), activations {check.activation_bytes / MEBIBYTE:.1f} MiB a step, recording "
        f"{check.recording_bytes / MEBIBYTE:.1f} MiB",
        f"time             {1000 * check.step_seconds:.3g} ms a step, {1000 * check.record_seconds:.3g} ms a record",
        f"a recording      2 x {check.total_steps:,d} steps, {records} records: about "
        f"{_duration(check.total_seconds(records))} on this machine",
    ]
    if check.init_missing:
        lines.append(f"model.init       {recipe.model.init!r} is not recorded yet: checked with random weights")
    if check.total_steps < recipe.recording.records:
        lines.append(
            f"few steps        {check.total_steps} steps are fewer than the {recipe.recording.records} records: train longer"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
