"""Recording: train a reference model, train again, and keep weights and CKA along the way."""

import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from smartfrz import __version__
from smartfrz.control.tailoring import tailoring_positions
from smartfrz.dataset_builder.cka import cka_of_grams
from smartfrz.dataset_builder.cost_recording import CostRecorder
from smartfrz.dataset_builder.costs import FreezeCosts
from smartfrz.dataset_builder.models import Network, TracedLayer, Workbench
from smartfrz.dataset_builder.recipes import Recipe
from smartfrz.dataset_builder.similarity import Grams
from smartfrz.dataset_builder.storage import (
    RecordedRun,
    branches_file,
    read_run,
    reference_file,
    run_file,
    write_run,
)
from smartfrz.errors import DatasetFormatError, RecipeError
from smartfrz.files import replacing
from smartfrz.predictor.runtime import Device

logger = logging.getLogger("smartfrz")
Progress = Callable[[float, str], None]


def record(
    recipe: Recipe,
    output: Path,
    progress: Progress = lambda fraction, text: None,
    device: Device = "auto",
    *,
    costs: bool = False,
) -> Path:
    """Record one recipe. Finished recordings, reference models and branches are kept.

    Args:
        recipe: What to train.
        output: Folder of the recorded runs and of the reference models.
        progress: Called with the fraction done, in [0, 1], and what is being done.
        device: Where PyTorch trains: `"cpu"`, `"cuda"`, or `"auto"` for CUDA if available. Keras chooses for itself.
        costs: Whether to measure what freezing costs, too (PyTorch only). A recording without costs is made again then,
            from the same reference model.

    Returns:
        The Parquet file.

    Raises:
        RecipeError: If the recipe cannot be run, or CUDA was asked for and is missing.
        UnsupportedModelError: If the model has no layer with weights.
        OSError: If the output cannot be written.
    """
    target = run_file(output, recipe.name)
    if is_recorded(recipe, output, costs=costs):
        return target
    before = read_run(target) if costs and is_recorded(recipe, output) else None
    bench = Workbench.open(recipe, output, device)
    first = bench.build(recipe.seed)
    if costs and not first.can_branch:
        raise RecipeError(
            f"Recipe {recipe.name!r} has a Keras model; what freezing costs is measured on PyTorch models only. Record it "
            "without --costs."
        )
    share = 0.1 if costs else 0.5
    reference = _finish_reference(bench, first, lambda done: progress(share * done, "reference"))
    network = bench.build(recipe.seed + 1 if recipe.recording.reinitialize else recipe.seed, reference.layers)
    recorder = Recorder(recipe, network, reference.grams)
    branches = branches_file(output, recipe.name)

    def advance(fraction: float, text: str) -> None:
        progress(share + (1 - share) * fraction, text)

    branching = CostRecorder(recipe, network, branches, advance) if costs else None

    def on_step(step: int, total: int, loss: float, learning_rate: float) -> None:
        recorder.after_step(step, total, loss, learning_rate)
        if branching:
            branching.after_step(step, total)
        else:
            advance(step / total, "recording")

    network.train(recipe.recording.seed, on_step)
    facts = {
        "name": recipe.name,
        "architecture": recipe.architecture,
        "recipe": recipe.to_dict(),
        "recipe_sha256": recipe.sha256,
        "accuracies": {"reference": reference.accuracy, "recorded": network.accuracy()},
        "layer_facts": [layer.to_dict() for layer in reference.layers],
        "versions": {"smartfrz": __version__, **network.versions, "python": platform.python_version()},
    }
    run = recorder.run(facts, branching.costs() if branching else None)
    if before is not None and not before.has_same_values(run):
        logger.warning(
            "The recording %s came out otherwise than before, as it does on another machine or with other --threads. It "
            "is replaced by the one whose costs were measured.",
            recipe.name,
        )
    write_run(target, run)
    branches.unlink(missing_ok=True)
    return target


def is_recorded(recipe: Recipe, output: Path, *, costs: bool = False) -> bool:
    """Return whether the folder holds a complete recording of this very recipe, with its costs if these are wanted."""
    target = run_file(output, recipe.name)
    if not target.exists():
        return False
    try:
        run = read_run(target)
    except DatasetFormatError as error:
        logger.warning("Recording %s again: %s", recipe.name, error)
        return False
    if run.facts.get("recipe_sha256") != recipe.sha256:
        logger.warning("Recording %s again: its recipe has changed.", recipe.name)
        return False
    return not costs or run.costs is not None


@dataclass(frozen=True)
class _Reference:
    """What a recording needs of the finished reference model."""

    accuracy: float
    layers: Sequence[TracedLayer]
    grams: Grams


def _finish_reference(bench: Workbench, network: Network, progress: Callable[[float], None]) -> _Reference:
    """Read the reference model if an earlier call finished it; else train and keep it."""
    recipe = bench.recipe
    path = reference_file(bench.runs, recipe.name)
    accuracy = _kept_accuracy(recipe, path)
    if accuracy is None or not network.load(path):
        network.train(recipe.seed, lambda step, total, *_: progress(step / total))
        accuracy = network.accuracy()
        with replacing(path) as temporary:
            network.save(temporary, {"recipe_sha256": recipe.sha256, "accuracy": repr(accuracy)})
    return _Reference(accuracy, network.layers, network.grams())


def _kept_accuracy(recipe: Recipe, path: Path) -> float | None:
    """Return the accuracy in a reference file; None if the file is missing, damaged, or made from another recipe."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
    except SafetensorError as error:
        logger.warning("Training the reference of %s again: %s cannot be read (%s)", recipe.name, path.name, error)
        return None
    return float(facts["accuracy"]) if facts.get("recipe_sha256") == recipe.sha256 else None


class Recorder:
    """Collects tailored weights and CKA at evenly spaced steps of one training run.

    Args:
        recipe: What is recorded.
        network: The network that is trained.
        reference: Gram matrices of the finished reference model.
    """

    def __init__(self, recipe: Recipe, network: Network, reference: Grams):
        self._network, self._reference = network, reference
        self._records = recipe.recording.records
        pool = recipe.recording.pool_size
        self._positions = {
            name: tailoring_positions(name, size, pool, seed=recipe.seed) for name, size in network.sizes().items()
        }
        self._rows: list[tuple[int, float, float, float]] = []
        self._cka: list[list[float]] = []
        self._weights: list[NDArray[np.float32]] = []
        self._losses: list[float] = []

    def after_step(self, step: int, total: int, loss: float, learning_rate: float) -> None:
        """Record the network if a timestamp is due. `step` counts from 1 to `total`."""
        self._losses.append(loss)
        if step % max(1, round(total / self._records)) != 0:
            return
        grams = self._network.grams()
        self._cka.append([cka_of_grams(self._reference[name], grams[name]) for name in self._positions])
        self._weights.append(self._network.weights(self._positions))
        self._rows.append((step, step / total, float(np.mean(self._losses)), learning_rate))
        self._losses = []

    def run(self, facts: dict[str, Any], costs: FreezeCosts | None = None) -> RecordedRun:
        """Return everything that was collected, with what freezing costs if that was measured."""
        steps, fractions, losses, rates = (np.array(column) for column in zip(*self._rows, strict=True))
        return RecordedRun(
            facts,
            list(self._positions),
            steps.astype(np.int64),
            fractions,
            losses,
            rates,
            cka=np.array(self._cka).T,
            weights=np.stack(self._weights, axis=1),
            costs=costs,
        )
