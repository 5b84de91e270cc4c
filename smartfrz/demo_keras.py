"""`smartfrz demo --framework keras`: the network, the data and the comparison of `smartfrz.demo`, on `model.fit`."""

import time
from dataclasses import dataclass
from typing import Any

from smartfrz.adapters.keras import Report, SmartFRZ  # before Keras: it says what to install where that is missing

# isort: split
import keras
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from smartfrz.comparing.engine import Method, Point, Progress, Result, take_turns
from smartfrz.demo import DemoOptions, Split, demo_methods, pretrained_network, training_data

_FORMAT = "channels_last"  # the one that all backends can train on a CPU


@dataclass
class KerasResult(Result):
    """Result of a run with Keras. Backward FLOPs are estimated from shapes, and activations are not counted.

    Attributes:
        first_step_seconds: Time that `fit` took up to the end of its first step, which traces and compiles the
            training function. It is not part of `train_seconds`; later traces are.
    """

    first_step_seconds: float = 0.0


def run_demo(options: DemoOptions, progress: Progress = lambda fraction, text: None) -> list[KerasResult]:
    """Run `smartfrz.demo.run_demo` with Keras, on the backend that KERAS_BACKEND names.

    Returns:
        Results of full training and of SmartFRZ.

    Raises:
        MissingDependencyError: If a package of the `demo` extra is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    train, test = map(as_arrays, training_data(options))
    torch.manual_seed(options.seed)
    network = pretrained_network(int(train[1].max()) + 1)
    runs = [
        KerasRun(method, keras_network(network, options.image_size, options.seed), train, test, options)
        for method in demo_methods(options)
    ]
    take_turns(runs, progress)
    full, freezing = (run.finish() for run in runs)
    report = runs[1].report()
    full.backward_flops = float(options.batch_size * report.backward_flops)
    freezing.backward_flops = full.backward_flops - options.batch_size * report.backward_flops_saved
    return [full, freezing]


def notes(results: list[KerasResult]) -> str:
    """What one has to know to read the table."""
    first = " and ".join(f"{result.first_step_seconds:.1f} s" for result in results)
    return (
        f"Keras on {keras.backend.backend()}. Not counted: what fit took up to the end of its first step ({first}), where "
        "it traces and compiles; doing that again after freezing is counted. Backward FLOPs are estimated from shapes, and "
        "Keras does not tell how much memory activations take."
    )


def as_arrays(data: TensorDataset) -> Split:
    """Turn PyTorch's pictures `[n, 3, height, width]` and labels into arrays `[n, height, width, 3]` and `[n]`."""
    images, labels = data.tensors
    return np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1)), labels.numpy()


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Full batches in an order that depends on the seed alone: with arrays it would depend on the backend."""

    def __init__(self, data: Split, batch_size: int, seed: int):
        super().__init__()
        self._images, self._labels = data
        self._batch_size = batch_size
        self._random = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        return len(self._labels) // self._batch_size

    def __getitem__(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return self._images[chosen], self._labels[chosen]

    def on_epoch_end(self) -> None:
        self._order = self._random.permutation(len(self._labels))


class KerasRun(keras.callbacks.Callback):  # type: ignore[misc]
    """One `fit`, which cannot be interrupted. Implements `smartfrz.comparing.engine.Run`.

    Args:
        method: The method; its `share` scales the steps.
        model: Model to train; not compiled.
        train: Pictures and labels, as `as_arrays` returns them.
        test: Pictures and labels to judge the model on after each epoch.
        options: Epochs, batch size, learning rate and seed are read.
    """

    def __init__(self, method: Method, model: keras.Model, train: Split, test: Split, options: DemoOptions):
        super().__init__()
        self._network, self._test = model, test
        self._batches = _Batches(train, options.batch_size, options.seed)
        full_steps = round(len(self._batches) * options.epochs)
        self.result = KerasResult(method.name, full_steps=full_steps)
        self.total_steps = method.steps(full_steps)
        rate = keras.optimizers.schedules.CosineDecay(options.learning_rate, self.total_steps)
        model.compile(
            keras.optimizers.SGD(rate, momentum=0.9, weight_decay=1e-5),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self._freezer: SmartFRZ | None = None
        if method.policy is not None:
            self._freezer = SmartFRZ(method.policy(self), total_steps=self.total_steps, verbose=False, **method.options)
        self._logs: dict[str, Any] = {}

    def advance(self, steps: int) -> bool:
        """Train to the end, whatever `steps` is."""
        self._start()
        self._network.fit(
            self._batches,
            epochs=-(-self.total_steps // len(self._batches)),
            shuffle=False,  # `_Batches` has done it
            verbose=0,
            callbacks=[callback for callback in (self._freezer, self) if callback is not None],  # the clock is the last
            validation_data=self._test,
            validation_batch_size=250,
        )
        return False

    def finish(self) -> "KerasResult":
        """Return the result; it has no FLOPs."""
        result = self.result
        result.accuracy = result.curve[-1].accuracy
        if self._freezer is not None:
            report = self.report()
            result.decision_seconds, result.frozen = report.decision_seconds, dict(report.frozen)
            result.layers, result.events = [layer.name for layer in report.layers], list(report.changes)
        return result

    def report(self) -> Report:
        """Report of SmartFRZ; empty in full training."""
        return Report() if self._freezer is None else self._freezer.report()

    def _start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def _stop(self) -> None:
        for value in self._logs.values():
            float(value)  # waits for the device
        seconds, cpu_seconds = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        if self.result.steps > 1:
            self.result.train_seconds += seconds
            self.result.cpu_seconds += cpu_seconds
        else:
            self.result.first_step_seconds += seconds

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count the step; after the first one, begin to count time anew."""
        self.result.steps += 1
        self._logs = logs or {}
        if self.result.steps == 1:
            self._stop()
            self._start()
        if self.result.steps == self.total_steps:
            self.model.stop_training = True  # in the middle of an epoch, perhaps

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Stop the clock."""
        self._stop()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Start the clock."""
        self._start()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note the accuracy on the test pictures."""
        result, accuracy = self.result, float((logs or {})["val_accuracy"])
        result.curve.append(Point(result.steps, result.cpu_seconds, result.train_seconds, accuracy))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stop the clock."""
        self._stop()


def keras_network(network: nn.Module, image_size: int, seed: int = 0) -> keras.Model:
    """The EfficientNet-Lite0 of `smartfrz.demo.pretrained_network` as a functional Keras model, with its weights.

    Args:
        network: The PyTorch network.
        image_size: Height and width of the pictures.
        seed: Of dropout, in `fit`.

    Returns:
        A model from float32 `[n, image_size, image_size, 3]` to logits float32 `[n, num_classes]`.
        Its weights are copies.
    """
    parts: Any = network
    inputs = keras.Input((image_size, image_size, 3), name="pictures")
    x = _convolution(inputs, parts._conv_stem, parts._bn0, "stem")
    # Without a seed of its own a layer draws from a generator that all models share, on the PyTorch backend.
    seeds = np.random.default_rng(seed).integers(2**31, size=len(parts._blocks) + 1).tolist()
    drop_rate = parts._global_params.drop_connect_rate
    for index, block in enumerate(parts._blocks):
        name, start = f"block{index}", x
        if hasattr(block, "_expand_conv"):
            x = _convolution(x, block._expand_conv, block._bn0, f"{name}_expand")
        x = _convolution(x, block._depthwise_conv, block._bn1, f"{name}_depthwise")
        x = _convolution(x, block._project_conv, block._bn2, f"{name}_project", activation=False)
        if start.shape == x.shape:
            rate = drop_rate * index / len(parts._blocks)
            # whole pictures at a time: stochastic depth
            drop = keras.layers.Dropout(rate, (None, 1, 1, 1), seeds.pop(), name=f"{name}_drop")
            x = keras.layers.Add(name=f"{name}_add")([drop(x), start])
    x = _convolution(x, parts._conv_head, parts._bn1, "head")
    x = keras.layers.GlobalAveragePooling2D(_FORMAT, name="pool")(x)
    x = keras.layers.Dropout(parts._dropout.p, seed=seeds.pop(), name="dropout")(x)
    classifier = keras.layers.Dense(parts._fc.out_features, name="classifier")
    outputs = classifier(x)
    classifier.set_weights([_array(parts._fc.weight).T, _array(parts._fc.bias)])
    return keras.Model(inputs, outputs, name="efficientnet_lite0")


def _convolution(x: Any, conv: Any, norm: Any, name: str, *, activation: bool = True) -> Any:
    """A convolution without bias, its batch norm, and ReLU6."""
    (kernel_size, _), (stride, _) = conv.kernel_size, conv.stride
    padding = "same"
    if stride > 1:  # Keras' "same" depends on the size of the picture, the network's padding does not
        left, right, top, bottom = conv.static_padding.padding
        x = keras.layers.ZeroPadding2D(((top, bottom), (left, right)), _FORMAT, name=f"{name}_pad")(x)
        padding = "valid"
    options: dict[str, Any] = {
        "strides": stride,
        "padding": padding,
        "data_format": _FORMAT,
        "use_bias": False,
        "name": f"{name}_conv",
    }
    convolution: Any
    if conv.groups > 1:
        convolution, axes = keras.layers.DepthwiseConv2D(kernel_size, **options), (2, 3, 0, 1)
    else:
        convolution, axes = keras.layers.Conv2D(conv.out_channels, kernel_size, **options), (2, 3, 1, 0)
    normalization = keras.layers.BatchNormalization(
        momentum=1 - norm.momentum,  # Keras' is the share of the old value, PyTorch's that of the new
        epsilon=norm.eps,
        name=f"{name}_norm",
    )
    x = normalization(convolution(x))
    convolution.set_weights([_array(conv.weight).transpose(axes)])
    normalization.set_weights([_array(w) for w in (norm.weight, norm.bias, norm.running_mean, norm.running_var)])
    return keras.layers.Activation("relu6", name=f"{name}_relu6")(x) if activation else x


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().numpy().copy()  # JAX may keep the array itself
