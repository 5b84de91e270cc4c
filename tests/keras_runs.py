"""A small Keras model, its training and scripted freezers, for the tests of the Keras adapter."""

import os

import numpy as np
import pytest
from adapter_contract import same
from numpy_adapter import ScriptedPredictor, script

if "KERAS_BACKEND" not in os.environ:
    pytest.skip("run by test_keras_backends.py; or set KERAS_BACKEND", allow_module_level=True)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
keras = pytest.importorskip("keras")

from smartfrz.adapters.keras import SmartFRZ  # noqa: E402

BACKEND = keras.backend.backend()
LAYERS = ["conv1", "conv2", "head"]
STEPS = 8  # in an epoch
FREEZE_FIRST = [{"conv1": 0.9, "conv2": 0.1, "head": 0.1}]
FREEZE_TWO = [*FREEZE_FIRST, {"conv2": 0.9, "head": 0.1}]
OPTIMIZERS = {
    "sgd": lambda **k: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.01, **k),
    "adam": lambda **k: keras.optimizers.Adam(0.01, **k),
    "adamw": lambda **k: keras.optimizers.AdamW(0.01, weight_decay=0.1, **k),
}
WARNINGS = [
    # Of SmartFRZ, in tests that call fit() several times; test_keras_surroundings.py looks at it.
    pytest.mark.filterwarnings("ignore:fit\\(\\) goes on training:UserWarning"),
    # Of Keras, of a model with a layer that is not used, and of a generator that comes to its end.
    pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning"),
    # Of torch.compile as Keras uses it.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # Of TensorFlow and JAX themselves, with NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not support a `copy` keyword:DeprecationWarning"),
]
not_on_torch = pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on PyTorch")
# PyTorch's first compilation takes minutes: with SMARTFRZ_COMPILE=1 it is done.
slow_jit = pytest.mark.skipif(
    BACKEND == "torch" and "SMARTFRZ_COMPILE" not in os.environ, reason="takes minutes; set SMARTFRZ_COMPILE"
)


def make_model(optimizer="sgd", seed=0, momentum=0.9, jit_compile="auto", steps_per_execution=1, **options):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((7, 7, 2))
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="conv1")(inputs)
    x = keras.layers.ReLU(name="relu1")(keras.layers.BatchNormalization(momentum=momentum, name="norm1")(x))
    x = keras.layers.Conv2D(6, 3, name="conv2")(x)
    x = keras.layers.ReLU(name="relu2")(keras.layers.BatchNormalization(momentum=momentum, name="norm2")(x))
    outputs = keras.layers.Dense(3, name="head")(keras.layers.GlobalAveragePooling2D(name="pool")(x))
    model = keras.Model(inputs, outputs)
    rng = np.random.default_rng(seed)  # the same on every backend
    for name in LAYERS:
        kernel = model.get_layer(name).kernel
        kernel.assign(rng.normal(0.0, np.prod(kernel.shape[:-1]) ** -0.5, kernel.shape).astype(np.float32))
    return compiled(model, optimizer, jit_compile, steps_per_execution, **options)


def compiled(model, optimizer="sgd", jit_compile="auto", steps_per_execution=1, **options):
    if isinstance(optimizer, str):
        optimizer = OPTIMIZERS[optimizer](**options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit_compile, steps_per_execution=steps_per_execution)
    return model


def data(steps=STEPS, shape=(7, 7, 2)):
    rng = np.random.default_rng(0)
    return rng.normal(0.5, 1.0, (8 * steps, *shape)).astype(np.float32), rng.integers(0, 3, 8 * steps)


def fit(model, callbacks, epochs=2, initial_epoch=0, inputs=None, **options):
    x, y = data() if inputs is None else inputs
    return model.fit(
        x, y, 8, epochs, 0, callbacks, shuffle=False, initial_epoch=initial_epoch, **options
    )  # every epoch has the same batches in the same order


def freezer(script=(), **options):
    predictor = options.pop("predictor", None) or ScriptedPredictor(list(script))
    # Nothing pays in runs of a few steps.
    defaults = {"record_every": 2, "decide_every": 3, "patience": 1, "norm_batches": 4, "recompile_steps": 0}
    return SmartFRZ(predictor, **defaults | options)


def read(variable):
    return np.array(keras.ops.convert_to_numpy(variable.value))


def everything(model, layer):
    """Copies of all that one layer of `make_model` holds, the statistics of its norm included."""
    own = {"conv1": ("conv1", "norm1"), "conv2": ("conv2", "norm2"), "head": ("head",)}[layer]
    return [read(v) for name in own for v in model.get_layer(name).weights]


class Watch(keras.callbacks.Callback):
    """What each layer and the optimizer hold after each batch. List it after SmartFRZ."""

    def __init__(self):
        super().__init__()
        self.layers, self.optimizer = [], []

    def on_train_batch_end(self, batch, logs=None):
        model = self.model
        self.layers.append({layer: everything(model, layer) for layer in LAYERS})
        self.optimizer.append([read(v) for v in model.optimizer.variables])

    def moved(self, step):
        """Layers that are not the same after batch `step`, counted from 0, as before it."""
        before, after = self.layers[step - 1], self.layers[step]
        return [layer for layer in LAYERS if not same(before[layer], after[layer])]


def mlp(*sizes, **options):
    """Dense layers "a", "b", "c" and so on with tanh, but none behind the last; not compiled."""
    model = keras.Sequential([keras.Input((sizes[0],))])
    for name, size in zip("abcdefgh", sizes[1:], strict=False):
        model.add(keras.layers.Dense(size, "tanh", name=name, **options))
    model.layers[-1].activation = keras.activations.linear
    return drawn(model)


def drawn(model, seed=0):
    """The model with weights from this seed, the same on every backend."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if len(variable.shape) >= 2:
            scale = np.prod(variable.shape[:-1]) ** -0.5
            variable.assign(rng.normal(0.0, scale, variable.shape).astype(np.float32))
    return model


class Record(keras.callbacks.Callback):
    """All weights of the model, and all variables of its optimizer, after each batch. List it after SmartFRZ."""

    def __init__(self):
        super().__init__()
        self.weights, self.optimizer = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append([read(v) for v in self.model.weights])
        self.optimizer.append([read(v) for v in self.model.optimizer.variables])

    def still(self, first, last=-1):
        """Paths of the weights that are bit for bit the same after the batches `first` and `last`, from 0."""
        pairs = zip(self.model.weights, self.weights[first], self.weights[last], strict=True)
        return {v.path for v, before, after in pairs if before.tobytes() == after.tobytes()}


def paths(*parts):
    """Paths of all weights of these layers."""
    return {v.path for part in parts for v in part.weights}


def attach(layers, *stages, **options):
    """A freezer that decides at every second step, and freezes at each stage the layers named for it."""
    predictor = options.pop("predictor", None) or ScriptedPredictor(script(layers, *stages))
    # In a run that is said to be so short, any stage may freeze something, also where that compiles.
    return freezer(predictor=predictor, **{"record_every": 1, "decide_every": 2, "total_steps": 1} | options)
