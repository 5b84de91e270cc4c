"""A Keras network as `record` uses it, on the backend that KERAS_BACKEND names. The only module here that loads Keras."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from smartfrz.adapters.keras import KerasAdapter, Layer, trace_layers
from smartfrz.adapters.keras.layers import named_layers
from smartfrz.dataset_builder.recipes import Recipe
from smartfrz.dataset_builder.similarity import Grams, gram, probe_batch
from smartfrz.errors import RecipeError
from smartfrz.hyperparameters import TrainingSpec
from smartfrz.training import check_finite, schedule_factor, training_loader


def seeded(make: Callable[[], Any], seed: int) -> Any:
    """Make a model whose initial weights and layer names are the same at every call."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    return make()


def application(name: str, arguments: dict[str, Any]) -> Any:
    """Make a network of `keras.applications`; by default without pretrained weights, and giving logits.

    Raises:
        RecipeError: If Keras has no such network.
    """
    known = {key: value for key, value in vars(keras.applications).items() if callable(value)}
    if name not in known:
        raise RecipeError(f"Keras has no application {name!r}; expected one of {', '.join(sorted(known))}.")
    return known[name](**{"weights": None, "classifier_activation": None, **arguments})


class KerasNetwork:
    """A `Network` in Keras.

    Keras trains with its own optimizers and losses and `train_on_batch`, on the same batches in the same order as PyTorch.
    The Keras adapter reads the weights, in PyTorch's order of axes.

    Args:
        model: The model; compiled here.
        recipe: How it is trained and measured.
        train_data: Data set to train on. Pictures from a folder get their channels where Keras expects them.
        test_data: Data set to test on; the probe batch is drawn from it.
        layers: Layers of a model of the same recipe; found from the model's graph or by a call if None.

    Raises:
        UnsupportedModelError: If the model has no layer with weights.
    """

    can_branch = False

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        train_data: Dataset[Any],
        test_data: Dataset[Any],
        layers: Sequence[Layer] | None = None,
    ):
        if recipe.data.folder and keras.config.image_data_format() == "channels_last":
            train_data, test_data = _channels_last(train_data), _channels_last(test_data)
        self._model, self._recipe, self._train_data, self._test_data = model, recipe, train_data, test_data
        self._probe = _arrays(probe_batch(test_data, recipe.recording.probe_size))
        model(self._probe)  # a subclassed model has no weights before its first call
        _compile(model, recipe.training)
        if layers is not None:
            self.layers = list(layers)

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers, in execution order."""
        return trace_layers(self._model, self._probe)

    @cached_property
    def _adapter(self) -> KerasAdapter:
        return KerasAdapter(self._model, self.layers)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of Keras and of PyTorch, which orders the data; and the name of the backend."""
        return {"keras": keras.__version__, "backend": keras.backend.backend(), "torch": torch.__version__}

    def train(self, seed: int, on_step: Callable[[int, int, float, float], None]) -> None:
        """Train like `smartfrz.training.train`, with the same batches in the same order."""
        spec = self._recipe.training
        torch.manual_seed(seed)
        loader = training_loader(self._train_data, spec)
        total = max(1, round(len(loader) * spec.epochs))
        encode = _one_hot(self._num_classes()) if spec.label_smoothing else _arrays
        step = 0
        while step < total:
            for inputs, targets in loader:
                rate = spec.learning_rate * schedule_factor(spec, step / total)
                self._model.optimizer.learning_rate = rate
                self._model.reset_metrics()  # else the loss is the mean of all batches so far
                loss = self._model.train_on_batch(_arrays(inputs), encode(targets))
                loss = float(loss[0] if isinstance(loss, (list, tuple)) else loss)
                step += 1
                check_finite(loss, step)
                on_step(step, total, loss, rate)
                if step == total:
                    break

    def branches(self) -> NoReturn:
        """Raise `RecipeError`: a training in Keras cannot be branched."""
        raise RecipeError("What freezing costs is measured on PyTorch models only.")

    def _num_classes(self) -> int:
        return int(self._model(_arrays(default_collate([self._train_data[0][0]]))).shape[-1])

    def accuracy(self) -> float:
        """Return the accuracy on the test data, in [0, 1]."""
        correct = 0
        for inputs, targets in DataLoader(self._test_data, 256):
            answers = np.asarray(self._model.predict_on_batch(_arrays(inputs))).argmax(1)
            correct += int((answers == _arrays(targets)).sum())
        return correct / len(self._test_data)  # type: ignore[arg-type]

    def grams(self) -> Grams:
        """Return the Gram matrix of each layer's output on the probe batch."""
        return layer_grams(self._model, self.layers, self._probe)

    def sizes(self) -> dict[str, int]:
        """Return the number of weights of each layer."""
        return {layer.name: self._adapter.num_weights(layer.name) for layer in self.layers}

    def weights(self, positions: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return each layer's weights at its positions."""
        return np.stack(list(self._adapter.tailored(dict(positions)).values()))

    def save(self, path: Path, facts: dict[str, str]) -> None:
        """Write all variables by their paths."""
        arrays = {name: np.array(keras.ops.convert_to_numpy(v.value)) for name, v in _variables(self._model).items()}
        save_file(arrays, str(path), facts)

    def load(self, path: Path) -> bool:
        """Read what `save` wrote; False if variables are missing or have other shapes."""
        fitting, total = load_fitting(self._model, path)
        return fitting == total


def load_fitting(model: Any, path: Path) -> tuple[int, int]:
    """Load the arrays of a safetensors file that have a variable's path and shape in the model.

    Returns:
        How many variables were loaded, and how many the model has.
    """
    saved, own = load_file(path), _variables(model)
    fitting = [(v, saved[name]) for name, v in own.items() if name in saved and tuple(v.shape) == saved[name].shape]
    for variable, value in fitting:
        variable.assign(value)
    return len(fitting), len(own)


def _variables(model: Any) -> dict[str, Any]:
    """Return weights and statistics by their paths, without the states of random generators."""
    found: dict[str, Any] = {}
    for variable in model.weights:
        name, number = variable.path, 1
        while name in found:
            number += 1
            name = f"{variable.path}#{number}"
        found[name] = variable
    return found


def _compile(model: Any, spec: TrainingSpec) -> None:
    momentum = {"momentum": spec.momentum} if spec.optimizer in ("SGD", "RMSprop") else {}
    optimizer = getattr(keras.optimizers, spec.optimizer)(
        spec.learning_rate, weight_decay=spec.weight_decay or None, **momentum
    )
    # PyTorch's first compilation takes minutes, so it is off there.
    jit = False if keras.backend.backend() == "torch" else "auto"
    model.compile(optimizer, _loss(spec), jit_compile=jit)


def _loss(spec: TrainingSpec) -> Any:
    if spec.label_smoothing:
        return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=spec.label_smoothing)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _one_hot(classes: int) -> Callable[[Any], NDArray[np.float32]]:
    return lambda targets: np.eye(classes, dtype=np.float32)[_arrays(targets)]


def layer_grams(model: Any, layers: list[Layer], probe: Any) -> Grams:
    """Return the centered Gram matrix of each layer's output on the probe batch.

    Like `similarity.layer_grams`: dropout is off, batch norms use the probe batch's own statistics, and the model's
    statistics are restored afterwards.
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
    """Pass every layer's output to `keep` while the block runs; batch norms work as in training."""
    original = keras.layers.Layer.__call__

    # Replaced on the class, since Python does not look up an instance's __call__.
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
    """Convert PyTorch tensors, or a dict of them, to NumPy arrays."""
    return {key: _arrays(item) for key, item in value.items()} if isinstance(value, dict) else value.numpy()


def _channels_last(data: Any) -> TensorDataset:
    images, labels = data.tensors
    return TensorDataset(images.permute(0, 2, 3, 1).contiguous(), labels)
