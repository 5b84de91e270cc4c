"""Recording: train a reference model, train again, and keep weights and CKA along the way."""

import logging
import platform
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from smartfrz import __version__
from smartfrz.adapters.torch.layers import LayerReader, trace_layers
from smartfrz.control.tailoring import tailoring_positions
from smartfrz.dataset_builder.cka import cka_of_grams
from smartfrz.dataset_builder.recipes import Recipe, build_data, build_model, is_keras, reference_file
from smartfrz.dataset_builder.similarity import Grams, layer_grams, probe_batch
from smartfrz.dataset_builder.storage import RecordedRun, read_run, write_run
from smartfrz.errors import DatasetFormatError
from smartfrz.files import replacing
from smartfrz.predictor.runtime import Device
from smartfrz.training import arguments, evaluate, to_device, torch_device, train

logger = logging.getLogger("smartfrz")
Progress = Callable[[float, str], None]
Positions = dict[str, NDArray[np.int64]]


def record(
    recipe: Recipe, output: Path, progress: Progress = lambda fraction, text: None, device: Device = "auto"
) -> Path:
    """Record one recipe; what is already finished is not done again.

    Args:
        recipe: What to train.
        output: Folder of the recorded runs and of the reference models.
        progress: Called with the fraction done, in [0, 1], and what is being done.
        device: Where PyTorch trains: `"cpu"`, `"cuda"`, or `"auto"` for CUDA where it is. Keras chooses for itself.

    Returns:
        The Parquet file.

    Raises:
        RecipeError: If the recipe cannot be run, or CUDA was asked for and is not there.
        OSError: If the output cannot be written.
    """
    target = output / f"{recipe.name}.parquet"
    if is_recorded(recipe, output):
        return target
    chosen = torch_device(device)
    train_data, test_data = build_data(recipe)
    reference = build_model(recipe, recipe.seed, output)
    if is_keras(reference):
        from smartfrz.dataset_builder.keras_recording import record_keras

        return record_keras(
            recipe, target, lambda seed: build_model(recipe, seed, output), (train_data, test_data), progress
        )
    accuracy = _reference(recipe, output, reference.to(chosen), train_data, test_data, progress)
    probe = to_device(probe_batch(test_data, recipe.recording.probe_size), chosen)
    layers = trace_layers(reference.eval(), *arguments(probe)[0], **arguments(probe)[1])
    grams = layer_grams(reference, layers, probe)
    del reference

    model = build_model(recipe, recipe.seed + 1 if recipe.recording.reinitialize else recipe.seed, output).to(chosen)
    reader = LayerReader(model, layers)

    def measure(positions: Positions) -> tuple[Grams, NDArray[np.float32]]:
        weights = np.stack([reader.weights(name, p) for name, p in positions.items()])
        return layer_grams(model, layers, probe), weights

    recorder = Recorder(recipe, {layer.name: reader.num_weights(layer.name) for layer in layers}, grams, measure)

    def on_step(step: int, total: int, loss: float, learning_rate: float) -> None:
        recorder.after_step(step, total, loss, learning_rate)
        progress(0.5 + 0.5 * step / total, "recording")

    train(model, train_data, recipe.training, seed=recipe.recording.seed, on_step=on_step)
    facts = {
        "name": recipe.name,
        "architecture": recipe.architecture,
        "recipe": recipe.to_dict(),
        "recipe_sha256": recipe.sha256,
        "accuracies": {"reference": accuracy, "recorded": evaluate(model, test_data)},
        "layer_facts": [layer.to_dict() for layer in layers],
        "versions": {"smartfrz": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_run(target, recorder.run(facts))
    return target


def is_recorded(recipe: Recipe, output: Path) -> bool:
    """Whether the folder holds a complete recording of this very recipe."""
    target = output / f"{recipe.name}.parquet"
    if not target.exists():
        return False
    try:
        recorded = read_run(target).facts.get("recipe_sha256")
    except DatasetFormatError as error:
        logger.warning("Recording %s again: %s", recipe.name, error)
        return False
    if recorded != recipe.sha256:
        logger.warning("Recording %s again: its recipe has changed.", recipe.name)
    return bool(recorded == recipe.sha256)


def _reference(
    recipe: Recipe,
    output: Path,
    model: nn.Module,
    train_data: Dataset[Any],
    test_data: Dataset[Any],
    progress: Progress,
) -> float:
    """Make a new model the finished reference: read if an interrupted recording left it, else trained and kept."""
    from safetensors.torch import save_model

    path = reference_file(output, recipe.name)
    known = read_reference(recipe, path, "pt")
    if known is not None:
        model.load_state_dict(known[0], strict=False)
        return known[1]
    train(
        model,
        train_data,
        recipe.training,
        seed=recipe.seed,
        on_step=lambda step, total, *_: progress(0.5 * step / total, "reference"),
    )
    accuracy = evaluate(model, test_data)
    write_reference(recipe, path, accuracy, partial(save_model, model))
    return accuracy


def read_reference(recipe: Recipe, path: Path, framework: str) -> tuple[dict[str, Any], float] | None:
    """Tensors and accuracy of a recipe's finished reference model, if there is one.

    Args:
        recipe: The file has to be of this very recipe.
        path: The safetensors file.
        framework: What the tensors shall be: `pt` or `numpy`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework=framework) as file:
            facts = file.metadata() or {}
            if facts.get("recipe_sha256") == recipe.sha256:
                return {key: file.get_tensor(key) for key in file.keys()}, float(facts["accuracy"])  # noqa: SIM118
    except SafetensorError as error:
        logger.warning("Training the reference of %s again: %s cannot be read (%s)", recipe.name, path.name, error)
    return None


def write_reference(recipe: Recipe, path: Path, accuracy: float, save: Callable[[str, dict[str, str]], None]) -> None:
    """Keep a recipe's finished reference model, so that `read_reference` finds it.

    Args:
        recipe: Of the model.
        path: The safetensors file; replaced only when it is complete.
        accuracy: On the test data, in [0, 1].
        save: Writes the tensors to a file of that name, with that metadata.

    Raises:
        OSError: If the file cannot be written.
    """
    with replacing(path) as temporary:
        save(str(temporary), {"recipe_sha256": recipe.sha256, "accuracy": repr(accuracy)})


class Recorder:
    """Collects tailored weights and CKA at evenly spaced steps of one training run.

    Args:
        recipe: What is recorded.
        sizes: How many weights each layer has, by its name, in execution order.
        reference: Of the finished reference model.
        measure: Gives what is now: the layers' Gram matrices, and their weights at positions, float32
            `[num_layers, pool_size]`. It gets the same positions at every call.
    """

    def __init__(
        self,
        recipe: Recipe,
        sizes: Mapping[str, int],
        reference: Grams,
        measure: Callable[[Positions], tuple[Grams, NDArray[np.float32]]],
    ):
        self._layers, self._reference, self._measure = list(sizes), reference, measure
        self._records = recipe.recording.records
        pool = recipe.recording.pool_size
        self._positions = {
            name: tailoring_positions(name, size, pool, seed=recipe.seed) for name, size in sizes.items()
        }
        self._rows: list[tuple[int, float, float, float]] = []
        self._cka: list[list[float]] = []
        self._weights: list[NDArray[np.float32]] = []
        self._losses: list[float] = []

    def after_step(self, step: int, total: int, loss: float, learning_rate: float) -> None:
        """Measure, if it is time. `step` counts from 1 to `total`."""
        self._losses.append(loss)
        if step % max(1, round(total / self._records)) != 0:
            return
        grams, weights = self._measure(self._positions)
        self._cka.append([cka_of_grams(self._reference[name], grams[name]) for name in self._layers])
        self._weights.append(weights)
        self._rows.append((step, step / total, float(np.mean(self._losses)), learning_rate))
        self._losses = []

    def run(self, facts: dict[str, Any]) -> RecordedRun:
        """All that was collected."""
        steps, fractions, losses, rates = (np.array(column) for column in zip(*self._rows, strict=True))
        return RecordedRun(
            facts,
            self._layers,
            steps.astype(np.int64),
            fractions,
            losses,
            rates,
            cka=np.array(self._cka).T,
            weights=np.stack(self._weights, axis=1),
        )
