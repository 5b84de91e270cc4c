"""Recording: train a reference model, train again, and keep weights and CKA along the way."""

import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, default_collate

from smartfrz import __version__
from smartfrz.adapters.torch.layers import Layer, LayerReader, layer_outputs, trace_layers
from smartfrz.control.tailoring import tailoring_positions
from smartfrz.dataset_builder.cka import centered_gram, cka_of_grams
from smartfrz.dataset_builder.recipes import Recipe, TrainingSpec, build_data, build_model, is_keras, reference_file
from smartfrz.dataset_builder.storage import RecordedRun, read_run, write_run
from smartfrz.errors import DatasetFormatError, RecipeError
from smartfrz.files import replacing
from smartfrz.predictor.runtime import Device

logger = logging.getLogger("smartfrz")
Progress = Callable[[float, str], None]
Grams = dict[str, NDArray[np.float64]]
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


def layer_grams(model: nn.Module, layers: list[Layer], probe: Any) -> Grams:
    """Centered Gram matrix of each layer's output on the probe batch.

    Dropout is off. Norms with running statistics use the probe batch's own: running statistics lag
    behind the weights, by hundreds of steps where their momentum is small, and CKA would measure
    that lag. The model's mode and statistics are as before afterwards.
    """
    with _probing(model), layer_outputs(model, layers) as outputs, torch.no_grad():
        num_examples = len(forward(model, probe))
    return {name: gram(output.float().numpy(), num_examples) for name, output in outputs.items()}


def gram(output: NDArray[np.float32], num_examples: int) -> NDArray[np.float64]:
    """Centered Gram matrix of a layer's output, float64 `[num_examples, num_examples]`.

    Windows or heads may be folded into the first dimension. An output without examples, such as that of position
    embeddings, has no CKA: NaN.
    """
    if len(output) % num_examples:
        return np.full((num_examples, num_examples), np.nan)
    return centered_gram(output.reshape(num_examples, -1))


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    buffers = [(b, b.clone()) for m in norms for b in m.buffers(recurse=False)]
    model.eval()
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, saved in buffers:
            buffer.copy_(saved)


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


def probe_batch(data: Dataset[Any], size: int) -> Any:
    """The inputs of `size` examples, drawn from the test data with a fixed seed."""
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:size]  # type: ignore[arg-type]
    return default_collate([data[int(i)][0] for i in chosen])


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
