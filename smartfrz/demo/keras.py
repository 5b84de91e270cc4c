"""The demo's task in Keras, on the backend that KERAS_BACKEND names. PyTorch is not needed."""

from collections.abc import Mapping
from typing import Any

from smartfrz.comparing.keras import KerasResult, Task  # before Keras: it says what to install where that is missing

# isort: split
import keras
import numpy as np
from numpy.typing import NDArray

from smartfrz.comparing.engine import Progress, take_turns
from smartfrz.demo.data import DemoOptions, demo_methods, needing, training_arrays
from smartfrz.demo.weights import read_weights, with_new_head

EXTRAS = "demo-keras", "tensorflow"  # the backend that Keras takes by default
_FORMAT = "channels_last"  # the one that all backends can train on a CPU
# Of each stage: blocks, size of the depthwise kernel, stride of the first block, expansion, filters.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD, _DROP = 32, 1280, 0.2


def run_demo(
    options: DemoOptions, progress: Progress = lambda fraction, text: None, task: Task | None = None
) -> list[KerasResult]:
    """Fine-tune EfficientNet-Lite0 twice from the same seed.

    Args:
        options: What is trained, and how long.
        progress: Called with the fraction that is done, and the accuracies so far.
        task: `demo_task(options)`, if it has been made.

    Returns:
        Results of full training and of SmartFRZ.

    Raises:
        MissingDependencyError: If a package of the `demo-keras` extra is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    start = (task or demo_task(options)).start(options.seed)
    runs = [start(method) for method in demo_methods(options)]
    take_turns(runs, progress)
    full, freezing = (run.finish() for run in runs)
    full.backward_flops = float(options.batch_size * runs[1].report().backward_flops)
    return [full, freezing]


def notes(results: list[KerasResult]) -> str:
    """What one has to know to read the table."""
    first = " and ".join(f"{result.first_step_seconds:.1f} s" for result in results)
    return (
        f"Keras on {keras.backend.backend()}. Not counted: what fit took up to the end of its first step ({first}), where "
        "it traces and compiles; doing that again after freezing is counted. Backward FLOPs are estimated from shapes, and "
        "Keras does not tell how much memory activations take. Norms remember a hundred steps, but a frozen one gets "
        "statistics of the last 24 batches, which flatters SmartFRZ in runs of fewer than some 300 steps."
    )


def demo_task(options: DemoOptions) -> Task:
    """The task that the options describe. It is followed and judged on the same test pictures.

    Raises:
        MissingDependencyError: If a package of the `demo-keras` extra is not installed.
        RecipeError: If the data cannot be found, or is less than a batch.
    """
    with needing(*EXTRAS):
        train, test = training_arrays(options)
        weights = read_weights()
    num_classes = int(train[1].max()) + 1

    def model(seed: int, steps: int) -> keras.Model:
        network = keras_network(with_new_head(weights, num_classes, seed), options.image_size, seed)
        rate = keras.optimizers.schedules.CosineDecay(options.learning_rate, steps)
        optimizer = keras.optimizers.SGD(rate, momentum=0.9, weight_decay=1e-5)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        network.compile(optimizer, loss, metrics=["accuracy"])
        return network

    steps = round(len(train[1]) // options.batch_size * options.epochs)
    return Task(model, train, test, test, steps, options.batch_size)


def keras_network(weights: Mapping[str, NDArray[Any]], image_size: int, seed: int = 0) -> keras.Model:
    """EfficientNet-Lite0 as a functional Keras model.

    Args:
        weights: By their names in PyTorch, of any shape; `_fc.bias` says how many classes there are.
        image_size: Height and width of the pictures.
        seed: Of dropout, in `fit`.

    Returns:
        A model from float32 `[n, image_size, image_size, 3]` to logits float32 `[n, num_classes]`.
    """
    inputs = keras.Input((image_size, image_size, 3), name="pictures")
    x = _convolution(inputs, weights, ("_conv_stem", "_bn0"), "stem", _STEM, 3, stride=2)
    blocks = [
        (kernel, stride if first else 1, expansion, filters)
        for repeats, kernel, stride, expansion, filters in _STAGES
        for first in [True] + [False] * (repeats - 1)
    ]
    # Without a seed of its own a layer draws from a generator that all models share, on the PyTorch backend.
    seeds = np.random.default_rng(seed).integers(2**31, size=len(blocks) + 1).tolist()
    for index, (kernel, stride, expansion, filters) in enumerate(blocks):
        name, place, start = f"block{index}", f"_blocks.{index}.", x
        if expansion > 1:
            parts = f"{place}_expand_conv", f"{place}_bn0"
            x = _convolution(x, weights, parts, f"{name}_expand", expansion * start.shape[-1])
        parts = f"{place}_depthwise_conv", f"{place}_bn1"
        x = _convolution(x, weights, parts, f"{name}_depthwise", None, kernel, stride)
        parts = f"{place}_project_conv", f"{place}_bn2"
        x = _convolution(x, weights, parts, f"{name}_project", filters, activation=False)
        if start.shape == x.shape:
            rate = _DROP * index / len(blocks)
            # whole pictures at a time: stochastic depth
            drop = keras.layers.Dropout(rate, (None, 1, 1, 1), seeds.pop(), name=f"{name}_drop")
            x = keras.layers.Add(name=f"{name}_add")([drop(x), start])
    x = _convolution(x, weights, ("_conv_head", "_bn1"), "head", _HEAD)
    x = keras.layers.GlobalAveragePooling2D(_FORMAT, name="pool")(x)
    x = keras.layers.Dropout(_DROP, seed=seeds.pop(), name="dropout")(x)
    num_classes = weights["_fc.bias"].size
    classifier = keras.layers.Dense(num_classes, name="classifier")
    outputs = classifier(x)
    classifier.set_weights([weights["_fc.weight"].reshape(num_classes, _HEAD).T.copy(), weights["_fc.bias"].copy()])
    return keras.Model(inputs, outputs, name="efficientnet_lite0")


def _convolution(
    x: Any,
    weights: Mapping[str, NDArray[Any]],
    parts: tuple[str, str],
    name: str,
    filters: int | None,
    kernel_size: int = 1,
    stride: int = 1,
    *,
    activation: bool = True,
) -> Any:
    """A convolution without bias, its batch norm, and ReLU6. Without a number of filters it is depthwise."""
    conv, norm = parts
    padding = "same"
    if stride > 1:  # Keras' "same" depends on the size of the picture, the network's padding does not
        around = (kernel_size - 2) // 2, (kernel_size - 1) // 2
        x = keras.layers.ZeroPadding2D((around, around), _FORMAT, name=f"{name}_pad")(x)
        padding = "valid"
    options: dict[str, Any] = {
        "strides": stride,
        "padding": padding,
        "data_format": _FORMAT,
        "use_bias": False,
        "name": f"{name}_conv",
    }
    convolution: Any
    if filters is None:
        convolution, axes = keras.layers.DepthwiseConv2D(kernel_size, **options), (2, 3, 0, 1)
    else:
        convolution, axes = keras.layers.Conv2D(filters, kernel_size, **options), (2, 3, 1, 0)
    normalization = keras.layers.BatchNormalization(
        momentum=0.99,  # the share of the old value
        epsilon=1e-3,
        name=f"{name}_norm",
    )
    x = normalization(convolution(x))
    kernel = weights[f"{conv}.weight"].reshape(filters or x.shape[-1], -1, kernel_size, kernel_size)
    convolution.set_weights([kernel.transpose(axes).copy()])
    statistics = ("weight", "bias", "running_mean", "running_var")
    normalization.set_weights(
        [weights[f"{norm}.{name}"].copy() for name in statistics]
    )  # JAX may keep the array itself
    return keras.layers.Activation("relu6", name=f"{name}_relu6")(x) if activation else x
