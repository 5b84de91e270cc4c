"""`smartfrz demo --framework keras`: the network, the data and the comparison of `smartfrz.demo`, on `model.fit`.

Each `fit` runs in a thread of its own, and a callback has it wait for its turn. At any moment one
thread works and all others wait, so the backends need not be thread-safe.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from smartfrz.adapters.keras import Report, SmartFRZ  # before Keras: it says what to install where that is missing

# isort: split
import keras
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from smartfrz.demo import FREEZING, FULL, DemoOptions, Run, Split, pretrained_network, take_turns, training_data

_FORMAT = "channels_last"  # the one that all backends can train on a CPU


@dataclass
class KerasRun(Run):
    """As `Run`; its backward FLOPs are estimated from shapes, and its `activation_bytes` are empty.

    Attributes:
        first_step_seconds: What `fit` took up to the end of its first step, which traces and
            compiles the training function. Not part of `seconds`; later traces are.
        cpu_seconds: Processor time of the process during `seconds`.
    """

    first_step_seconds: float = 0.0
    cpu_seconds: float = 0.0


def run_demo(options: DemoOptions, progress: Callable[[float, str], None] = lambda fraction, text: None) -> list[Run]:
    """As `smartfrz.demo.run_demo`, with Keras on the backend that KERAS_BACKEND names.

    Returns:
        The full run and the run with SmartFRZ, each a `KerasRun`.

    Raises:
        MissingDependencyError: If a package of the `demo` extra is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    train, test = map(as_arrays, training_data(options))
    torch.manual_seed(options.seed)
    network = pretrained_network(int(train[1].max()) + 1)
    with ExitStack() as stack:
        trainers = []
        for method in (FULL, FREEZING):
            model = keras_network(network, options.image_size, options.seed)
            trainers.append(stack.enter_context(Trainer(method, model, train, test, options)))
        take_turns(trainers, progress)
        runs = [trainer.run for trainer in trainers]
        report = trainers[1].report()
    for run in runs:
        run.backward_flops = float(options.batch_size * report.backward_flops)
    runs[1].backward_flops -= options.batch_size * report.backward_flops_saved
    return list(runs)


def notes(runs: list[Run]) -> str:
    """What one has to know to read the table."""
    first = " and ".join(f"{run.first_step_seconds:.1f} s" for run in runs if isinstance(run, KerasRun))
    return (
        f"Keras on {keras.backend.backend()}. Not counted: what fit took up to the end of its first step ({first}), where "
        "it traces and compiles; doing that again after freezing is counted. Backward FLOPs are estimated from shapes, and "
        "Keras does not tell how much memory activations take."
    )


def as_arrays(data: TensorDataset) -> Split:
    """Pictures float32 `[n, height, width, 3]` and labels int64 `[n]`, of PyTorch's `[n, 3, height, width]`."""
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


class _Closed(Exception):
    """Raised inside of a `fit` that nobody waits for any more."""


class Trainer(keras.callbacks.Callback):  # type: ignore[misc]
    """One `fit`, a few steps at a time. A context manager: leaving it ends the `fit`, finished or not.

    Args:
        method: `full training` or `SmartFRZ`.
        model: What to train; not compiled.
        train: Pictures and labels as from `as_arrays`.
        test: As `train`.
        options: Of the run; `data`, `num_train`, `num_test` and `image_size` are not read.
    """

    def __init__(self, method: str, model: keras.Model, train: Split, test: Split, options: DemoOptions):
        super().__init__()
        self.run = KerasRun(method)
        batches = _Batches(train, options.batch_size, options.seed)
        self.total_steps = round(len(batches) * options.epochs)
        rate = keras.optimizers.schedules.CosineDecay(options.learning_rate, self.total_steps)
        model.compile(
            keras.optimizers.SGD(rate, momentum=0.9, weight_decay=1e-5),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._closing = self._done = False
        self._error: BaseException | None = None
        self._steps_left = 0
        self._freezer: SmartFRZ | None = None
        if method == FREEZING:
            self._freezer = SmartFRZ(options.predictor, total_steps=self.total_steps, threshold=options.threshold)
        callbacks = [callback for callback in (self._freezer, self) if callback is not None]  # the clock is the last

        def train_all() -> None:
            self._go.acquire()
            try:
                if not self._closing:
                    self._start()
                    epochs = -(-self.total_steps // len(batches))
                    model.fit(
                        batches,
                        epochs=epochs,
                        shuffle=False,  # `_Batches` has done it
                        verbose=0,
                        callbacks=callbacks,
                        validation_data=test,
                        validation_batch_size=250,
                    )
            except _Closed:
                pass
            except BaseException as error:  # it belongs to the thread that waits
                self._error = error
            self._done = True
            self._paused.release()

        self._thread = threading.Thread(target=train_all, name=method, daemon=True)
        self._thread.start()

    def advance(self, steps: int) -> bool:
        """Train up to so many steps; whether there are more to come."""
        if not self._done:
            self._steps_left = steps
            self._go.release()
            self._paused.acquire()
            if self._error is not None:
                raise self._error
        return not self._done

    def report(self) -> Report:
        """Of SmartFRZ; empty in full training."""
        return Report() if self._freezer is None else self._freezer.report()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._go.release()
        self._thread.join()

    def _start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def _stop(self) -> None:
        seconds, cpu_seconds = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        if self.run.num_steps:
            self.run.seconds += seconds
            self.run.cpu_seconds += cpu_seconds
        else:
            self.run.first_step_seconds += seconds

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Wait, where the turn ends."""
        run = self.run
        self._steps_left -= 1
        last = run.num_steps + 1 == self.total_steps
        if self._steps_left and run.num_steps and not last:
            run.num_steps += 1
            return
        for value in (logs or {}).values():
            float(value)  # waits for the device
        self._stop()
        run.num_steps += 1
        if last:
            self.model.stop_training = True  # in the middle of an epoch, perhaps
        elif not self._steps_left:
            self._paused.release()
            self._go.acquire()
            if self._closing:
                raise _Closed
        self._start()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Stop the clock."""
        self._stop()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Start it again."""
        self._start()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note the accuracy on the test pictures."""
        self.run.curve.append((self.run.num_steps, self.run.seconds, float((logs or {})["val_accuracy"])))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Note what SmartFRZ did."""
        self._stop()
        if self._freezer is not None:
            report = self._freezer.report()
            self.run.decision_seconds, self.run.frozen = report.decision_seconds, report.frozen
            self.run.layers = [layer.name for layer in report.layers]


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
