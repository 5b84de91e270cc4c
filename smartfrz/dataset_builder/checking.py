"""`smartfrz-build check`: two training steps and one record of a recipe, and what a recording will take."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from smartfrz.adapters.torch.costs import measure_step
from smartfrz.adapters.torch.layers import LayerReader, trace_layers
from smartfrz.dataset_builder.recipes import Recipe, build_data, build_model, is_keras, reference_file
from smartfrz.dataset_builder.similarity import layer_grams, probe_batch
from smartfrz.errors import RecipeError
from smartfrz.predictor.runtime import Device
from smartfrz.training import arguments, evaluate, forward, to_device, torch_device, train, training_loader

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Check:
    """What two steps of a recipe tell.

    Attributes:
        layers: Names of the layers, in execution order, and how many weights each has.
        num_train: Training examples.
        num_test: Test examples.
        total_steps: Of one training; a recording takes two.
        step_seconds: Of the second step. The first one also warms up.
        record_seconds: Of one timestamp: CKA on the probe batch, and reading weights.
        test_seconds: Of measuring the accuracy once.
        weight_bytes: Of the model's parameters and buffers. Gradients take as much, and an optimizer up to twice that.
        activation_bytes: Kept in a step from the forward for the backward pass.
        recording_bytes: Of the recorded weights, before compression.
        losses: Of the two steps.
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
        """Of the whole recording: two trainings, the records of the second, two accuracies."""
        return 2 * self.total_steps * self.step_seconds + records * self.record_seconds + 2 * self.test_seconds


def check_recipe(recipe: Recipe, runs: Path, device: Device = "auto") -> Check:
    """Take two training steps as the recording would, and measure.

    Args:
        recipe: The recipe.
        runs: Where the recordings will be; `model.init` looks for other recipes' reference models there.
        device: As `record`.

    Raises:
        RecipeError: If the recipe cannot be run, the loss is not finite, or CUDA was asked for and is not there.
        UnsupportedModelError: If the model has no layer with weights.
    """
    chosen = torch_device(device)
    train_data, test_data = build_data(recipe)
    init = recipe.model.init
    init_missing = bool(init) and not init.endswith(".safetensors") and not reference_file(runs, init).exists()
    if init_missing:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, init=""))
    model = build_model(recipe, recipe.seed, runs)
    if is_keras(model):
        raise RecipeError(
            f"Recipe {recipe.name!r} has a model of Keras, of which nothing is measured here; expected one of PyTorch. "
            "Record it with a few epochs instead."
        )
    loader = training_loader(train_data, recipe.training)
    inputs, targets = next(iter(loader))
    _check_targets(recipe, targets, forward(model.eval(), inputs))
    probe = probe_batch(test_data, recipe.recording.probe_size)
    model, inputs, targets, probe = (to_device(part, chosen) for part in (model, inputs, targets, probe))
    layers = trace_layers(model.eval(), *arguments(probe)[0], **arguments(probe)[1])
    reader = LayerReader(model, layers)
    sizes = {layer.name: reader.num_weights(layer.name) for layer in layers}

    moments, losses = [time.perf_counter()], []

    def on_step(step: int, total: int, loss: float, learning_rate: float) -> None:
        losses.append(loss)
        moments.append(time.perf_counter())

    two_steps = dataclasses.replace(recipe.training, epochs=2 / len(loader))
    train(model, train_data, two_steps, seed=recipe.seed, on_step=on_step)
    spec = recipe.training
    work = measure_step(
        model, lambda: cross_entropy(forward(model, inputs), targets, label_smoothing=spec.label_smoothing)
    )
    start = time.perf_counter()
    layer_grams(model, layers, probe)
    recorded = time.perf_counter()
    part = torch.utils.data.Subset(test_data, range(min(256, _length(test_data))))
    evaluate(model, part)
    evaluated = time.perf_counter()
    tensors = (*model.parameters(), *model.buffers())
    return Check(
        sizes,
        _length(train_data),
        _length(test_data),
        max(1, round(len(loader) * spec.epochs)),
        moments[2] - moments[1],
        recorded - start,
        (evaluated - recorded) * _length(test_data) / len(part),
        sum(t.nbytes for t in tensors),
        work.activation_bytes,
        4 * len(sizes) * recipe.recording.records * recipe.recording.pool_size,
        tuple(losses),
        init_missing,
    )


def _length(data: Dataset[Any]) -> int:
    return len(data)  # type: ignore[arg-type]


def _check_targets(recipe: Recipe, targets: torch.Tensor, logits: torch.Tensor) -> None:
    """PyTorch's own message for a label out of range names neither labels nor classes."""
    if int(targets.max()) >= logits.shape[1] or int(targets.min()) < 0:
        raise RecipeError(
            f"Recipe {recipe.name!r}: the first batch has labels from {int(targets.min())} to {int(targets.max())}, but "
            f"the model gives {logits.shape[1]} classes; expected labels from 0 to {logits.shape[1] - 1}. Change the number "
            "of classes in model.arguments."
        )


def describe(recipe: Recipe, check: Check) -> str:
    """The figures as text."""
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
