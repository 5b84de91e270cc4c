"""Recordings of Keras reference models, on the backend that KERAS_BACKEND names. The only module here that loads Keras.

What is recorded is as in `recording.py`: the same file, the same order of the data, the same CKA. Keras trains, with its own
optimizers and losses and `train_on_batch`; the Keras adapter reads the weights, in PyTorch's order of axes.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from smartfrz import __version__
from smartfrz.adapters.keras import KerasAdapter, Layer, trace_layers
from smartfrz.adapters.keras.layers import named_layers
from smartfrz.dataset_builder.recipes import Recipe, reference_file
from smartfrz.dataset_builder.recording import Positions, Progress, Recorder, read_reference, write_reference
from smartfrz.dataset_builder.similarity import Grams, gram, probe_batch
from smartfrz.dataset_builder.storage import write_run
from smartfrz.errors import RecipeError
from smartfrz.training import TrainingSpec, check_finite, schedule_factor, training_loader


def seeded(make: Callable[[], Any], seed: int) -> Any:
    """A model whose initial weights, and the names that Keras gives its layers, are the same at every call."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    return make()


def application(name: str, arguments: dict[str, Any]) -> Any:
    """A network of `keras.applications`, without pretrained weights and giving logits unless told otherwise.

    Raises:
        RecipeError: If there is none of that name.
    """
    known = {key: value for key, value in vars(keras.applications).items() if callable(value)}
    if name not in known:
        raise RecipeError(f"Keras has no application {name!r}; expected one of {', '.join(sorted(known))}.")
    return known[name](**{"weights": None, "classifier_activation": None, **arguments})


def record_keras(
    recipe: Recipe,
    target: Path,
    build: Callable[[int], Any],
    data: tuple[Dataset[Any], Dataset[Any]],
    progress: Progress,
) -> Path:
    """Record one recipe.

    Args:
        recipe: What to train.
        target: The Parquet file; the reference model is kept beside it.
        build: Makes the model, with the initial weights of a seed.
        data: Datasets to train on and to test on. Pictures of a folder have their channels moved last.
        progress: As for `recording.record`.

    Returns:
        `target`.

    Raises:
        RecipeError: If the recipe cannot be run.
        UnsupportedModelError: If the model has no layer with weights.
        OSError: If the output cannot be written.
    """
    if recipe.data.folder and keras.config.image_data_format() == "channels_last":
        data = _channels_last(data[0]), _channels_last(data[1])
    train_data, test_data = data
    probe = _arrays(probe_batch(test_data, recipe.recording.probe_size))
    model = build(recipe.seed)
    accuracy = _reference(recipe, reference_file(target.parent, recipe.name), model, data, probe, progress)
    layers = trace_layers(model, probe)
    grams = layer_grams(model, layers, probe)

    model = build(recipe.seed + 1 if recipe.recording.reinitialize else recipe.seed)
    model(probe)  # a subclassed model has no weights before its first call
    _compile(model, recipe.training)
    adapter = KerasAdapter(model, layers)
    sizes = {layer.name: adapter.num_weights(layer.name) for layer in layers}

    def measure(positions: Positions) -> tuple[Grams, NDArray[np.float32]]:
        return layer_grams(model, layers, probe), np.stack(list(adapter.tailored(positions).values()))

    recorder = Recorder(recipe, sizes, grams, measure)

    def on_step(step: int, total: int, loss: float, learning_rate: float) -> None:
        recorder.after_step(step, total, loss, learning_rate)
        progress(0.5 + 0.5 * step / total, "recording")

    _train(model, train_data, recipe.training, seed=recipe.recording.seed, on_step=on_step)
    versions = {"smartfrz": __version__, "keras": keras.__version__, "backend": keras.backend.backend()}
    facts = {
        "name": recipe.name,
        "architecture": recipe.architecture,
        "recipe": recipe.to_dict(),
        "recipe_sha256": recipe.sha256,
        "accuracies": {"reference": accuracy, "recorded": _evaluate(model, test_data)},
        "layer_facts": [layer.to_dict() for layer in layers],
        "versions": {**versions, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_run(target, recorder.run(facts))
    return target


def load_weights(model: Any, saved: dict[str, NDArray[Any]]) -> int:
    """Assign arrays to the variables of the same name and shape; how many that were."""
    fitting = [(v, saved[name]) for name, v in _variables(model).items() if _fits(v, saved.get(name))]
    for variable, value in fitting:
        variable.assign(value)
    return len(fitting)


def num_variables(model: Any) -> int:
    """How many variables a checkpoint of the model has."""
    return len(_variables(model))


def _fits(variable: Any, value: NDArray[Any] | None) -> bool:
    return value is not None and tuple(variable.shape) == value.shape


def _variables(model: Any) -> dict[str, Any]:
    """Weights and statistics by their paths, without the states of random generators."""
    found: dict[str, Any] = {}
    for variable in model.weights:
        name, number = variable.path, 1
        while name in found:
            number += 1
            name = f"{variable.path}#{number}"
        found[name] = variable
    return found


def _reference(
    recipe: Recipe, path: Path, model: Any, data: tuple[Dataset[Any], Dataset[Any]], probe: Any, progress: Progress
) -> float:
    """Make `model` the finished reference model; read if an interrupted recording left it, else trained and kept."""
    from safetensors.numpy import save_file

    model(probe)
    known = read_reference(recipe, path, "numpy")
    if known is not None and load_weights(model, known[0]) == num_variables(model):
        return known[1]
    _compile(model, recipe.training)
    _train(
        model,
        data[0],
        recipe.training,
        seed=recipe.seed,
        on_step=lambda step, total, *_: progress(0.5 * step / total, "reference"),
    )
    accuracy = _evaluate(model, data[1])
    arrays = {name: np.array(keras.ops.convert_to_numpy(v.value)) for name, v in _variables(model).items()}
    write_reference(recipe, path, accuracy, partial(save_file, arrays))
    return accuracy


def _compile(model: Any, spec: TrainingSpec) -> None:
    momentum = {"momentum": spec.momentum} if spec.optimizer in ("SGD", "RMSprop") else {}
    optimizer = getattr(keras.optimizers, spec.optimizer)(
        spec.learning_rate, weight_decay=spec.weight_decay or None, **momentum
    )
    # PyTorch's first compilation takes minutes: no jit_compile there unless Keras is told so elsewhere.
    jit = False if keras.backend.backend() == "torch" else "auto"
    model.compile(optimizer, _loss(spec), jit_compile=jit)


def _loss(spec: TrainingSpec) -> Any:
    if spec.label_smoothing:
        return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=spec.label_smoothing)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _train(
    model: Any,
    data: Dataset[Any],
    spec: TrainingSpec,
    *,
    seed: int,
    on_step: Callable[[int, int, float, float], None],
) -> None:
    """As `smartfrz.training.train`, with the same batches in the same order."""
    torch.manual_seed(seed)
    loader = training_loader(data, spec)
    total = max(1, round(len(loader) * spec.epochs))
    classes = int(model(_arrays(default_collate([data[0][0]]))).shape[-1]) if spec.label_smoothing else 0
    step = 0
    while step < total:
        for inputs, targets in loader:
            rate = spec.learning_rate * schedule_factor(spec, step / total)
            model.optimizer.learning_rate = rate
            labels = _arrays(targets)
            model.reset_metrics()  # else the loss is the mean of all batches so far
            loss = model.train_on_batch(
                _arrays(inputs), np.eye(classes, dtype=np.float32)[labels] if classes else labels
            )
            loss = float(loss[0] if isinstance(loss, (list, tuple)) else loss)
            step += 1
            check_finite(loss, step)
            on_step(step, total, loss, rate)
            if step == total:
                break


def _evaluate(model: Any, data: Dataset[Any], batch_size: int = 256) -> float:
    """Accuracy in [0, 1]."""
    correct = 0
    for inputs, targets in DataLoader(data, batch_size):
        correct += int((np.asarray(model.predict_on_batch(_arrays(inputs))).argmax(1) == _arrays(targets)).sum())
    return correct / len(data)  # type: ignore[arg-type]


def layer_grams(model: Any, layers: list[Layer], probe: Any) -> Grams:
    """As `similarity.layer_grams`: dropout is off, and batch norms use the probe batch's own statistics.

    The model's statistics are as before afterwards.
    """
    outputs: dict[str, NDArray[np.float32]] = {}
    names = {id(layer): name for name, layer in named_layers(model).items()}
    wanted = {layer.name for layer in layers}

    def keep(layer: Any, output: Any) -> None:
        if (name := names.get(id(layer))) in wanted:
            while isinstance(output, (tuple, list)):
                output = output[0]
            value = keras.ops.convert_to_numpy(keras.ops.stop_gradient(keras.ops.cast(output, "float32")))
            outputs[str(name)] = np.array(value)

    statistics = [
        variable
        for layer in named_layers(model).values()
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.non_trainable_variables
    ]
    saved = [np.array(keras.ops.convert_to_numpy(variable.value)) for variable in statistics]
    try:
        with _watched(keep):
            answer = model(probe, training=False)
    finally:
        for variable, value in zip(statistics, saved, strict=True):
            variable.assign(value)
    num_examples = int(answer.shape[0])
    return {layer.name: gram(outputs[layer.name], num_examples) for layer in layers}


@contextmanager
def _watched(keep: Callable[[Any, Any], None]) -> Iterator[None]:
    """Show every layer's output during a call of a model, with batch norms as in training."""
    original = keras.layers.Layer.__call__

    # On the class: an instance's __call__ is not looked up.
    @wraps(original)
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, keras.layers.BatchNormalization):
            kwargs["training"] = True
        output = original(layer, *args, **kwargs)
        keep(layer, output)
        return output

    keras.layers.Layer.__call__ = call
    try:
        yield
    finally:
        keras.layers.Layer.__call__ = original


def _arrays(value: Any) -> Any:
    """Tensors of PyTorch as NumPy arrays, also those in a dict."""
    return {key: _arrays(item) for key, item in value.items()} if isinstance(value, dict) else value.numpy()


def _channels_last(data: Any) -> TensorDataset:
    images, labels = data.tensors
    return TensorDataset(images.permute(0, 2, 3, 1).contiguous(), labels)
