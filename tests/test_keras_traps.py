"""What users do to `fit` of Keras, with layers frozen in the middle. `test_keras_backends.py` runs it on each backend."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest
from keras_runs import (
    BACKEND,
    FREEZE_FIRST,
    FREEZE_TWO,
    LAYERS,
    STEPS,
    WARNINGS,
    Record,
    Watch,
    attach,
    compiled,
    data,
    fit,
    freezer,
    keras,
    make_model,
    mlp,
    not_on_torch,
    paths,
    read,
    slow_jit,
)
from numpy_adapter import ChangePredictor, ScriptedPredictor, make_info, script

from smartfrz.adapters.keras import SmartFRZ
from smartfrz.errors import UnknownPredictorError, UnsupportedModelError, UsageError

pytestmark = WARNINGS
MLP = ["a", "b", "c"]
FIVE = {"inputs": data(5, (5,)), "epochs": 1}


def trained(optimizer, *stages, options=FIVE, record_every=1, dry_run=False, **compile_options):
    """A small network after five steps: the model, its freezer, and what was recorded."""
    keras.utils.set_random_seed(0)
    model, record = mlp(5, 6, 7, 3), Record()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **compile_options)
    callback = attach(MLP, *stages, record_every=record_every, dry_run=dry_run)
    fit(model, [callback, record], **options)
    return model, callback, record


# Optimizers

optimizers = keras.optimizers
KINDS = {
    "momentum": lambda **k: optimizers.SGD(0.05, momentum=0.9, **k),
    "nesterov": lambda **k: optimizers.SGD(0.05, momentum=0.9, nesterov=True, weight_decay=0.1, **k),
    "adam": lambda **k: optimizers.Adam(0.01, amsgrad=True, **k),
    "adamw": lambda **k: optimizers.AdamW(0.01, weight_decay=0.1, **k),
    "adamax": lambda **k: optimizers.Adamax(0.01, **k),
    "nadam": lambda **k: optimizers.Nadam(0.01, **k),
    "rmsprop": lambda **k: optimizers.RMSprop(0.01, momentum=0.9, centered=True, **k),
    "adagrad": lambda **k: optimizers.Adagrad(0.01, **k),
    "adadelta": lambda **k: optimizers.Adadelta(0.1, **k),
    "ftrl": lambda **k: optimizers.Ftrl(0.01, **k),
    "lion": lambda **k: optimizers.Lion(0.01, weight_decay=0.1, **k),
    "lamb": lambda **k: optimizers.Lamb(0.01, **k),
    "adafactor": lambda **k: optimizers.Adafactor(0.01, weight_decay=0.1, **k),
    "muon": lambda **k: optimizers.Muon(0.01, exclude_layers=["c"], **k),
    "schedule free": lambda **k: optimizers.ScheduleFreeAdamW(0.01, **k),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_stay_and_slots_are_those_of_an_unfrozen_twin(kind):
    model, callback, record = trained(KINDS[kind](), {"b"})
    _, _, twin = trained(KINDS[kind]())
    assert callback.report().frozen == {"b": 2}
    frozen = paths(model.get_layer("b"))
    for step in range(2, 5):
        assert record.still(step - 1, step) == frozen
    assert twin.still(1, 2) == set()
    # Right after freezing both have the same gradients: slots move as in the twin, or not at all.
    before, after, other = record.optimizer[1], record.optimizer[2], twin.optimizer[2]
    kept = []
    for index, arrays in enumerate(zip(before, after, other, strict=True)):
        if arrays[0].tobytes() == arrays[1].tobytes() != arrays[2].tobytes():
            kept.append(index)
        else:
            np.testing.assert_allclose(arrays[1], arrays[2], rtol=1e-5, atol=1e-7)
    rest = KINDS[kind]()
    rest.build([v for v in model.trainable_variables if v.path not in frozen])
    assert 0 < len(kept) <= len(model.optimizer.variables) - len(rest.variables)
    for index in kept:
        np.testing.assert_array_equal(before[index], record.optimizer[-1][index])
    assert model.optimizer.iterations == 5


# Models

layers = keras.layers


@dataclass
class Case:
    """A model, examples for it, its layers by name in the order in which they run, and which of them freeze.

    Attributes:
        held: Makes a list of the Keras layers that the frozen ones consist of.
        y: Targets; by default classes.
        users: Paths of weights that the user froze.
    """

    model: keras.Model
    x: np.ndarray | dict[str, np.ndarray]
    names: list[str]
    chosen: list[str]
    held: Callable[[], list[keras.layers.Layer]]
    y: np.ndarray | dict[str, np.ndarray] = field(default_factory=lambda: data(4)[1])
    users: set[str] = field(default_factory=set)


def rng():
    return np.random.default_rng(0)


def reals(*shape):
    return rng().normal(0.3, 1.0, (32, *shape)).astype(np.float32)


def words(length=5):
    return rng().integers(0, 9, (32, length)).astype(np.int32)


def convolutions():
    inputs = keras.Input((8, 2))
    x = layers.Conv1D(4, 3, activation="tanh", name="conv1d")(inputs)
    x = layers.SeparableConv1D(4, 3, activation="tanh", padding="same", name="separable")(x)
    x = layers.Conv1DTranspose(4, 3, activation="tanh", name="transposed")(x)
    x = layers.Reshape((8, 4, 1))(x)
    x = layers.DepthwiseConv2D(2, depth_multiplier=2, name="depthwise")(x)
    x = layers.GroupNormalization(2, name="groups")(x)
    x = layers.SpatialDropout2D(0.1)(x)
    x = layers.Reshape((7, 3, 2, 1))(x)
    x = layers.Conv3D(2, 2, activation="tanh", name="conv3d")(x)
    x = layers.Reshape((2, 6, 2))(layers.Flatten()(x)[:, :24])
    x = layers.ConvLSTM1D(2, 2, name="convlstm")(x)
    x = layers.Dense(3, name="head")(layers.Flatten()(x))
    model = keras.Model(inputs, x)
    names = ["conv1d", "separable", "transposed", "depthwise", "conv3d", "convlstm", "head"]
    chosen = ["separable", "depthwise", "convlstm"]
    return Case(model, reals(8, 2), names, chosen, lambda: [model.get_layer(n) for n in [*chosen, "groups"]])


def recurrent():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 6, mask_zero=True, name="words")(inputs)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True, recurrent_dropout=0.1), name="both")(x)
    x = layers.TimeDistributed(layers.Dense(6, "tanh"), name="each")(x)
    x = layers.RNN([layers.GRUCell(5), layers.LSTMCell(4)], return_sequences=True, name="stack")(x)
    x = layers.GRU(4, dropout=0.1, name="gru")(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    names = ["words", "both/forward_layer", "both/backward_layer", "each", "stack", "gru", "head"]
    chosen = ["words", "both/backward_layer", "each", "stack"]
    held = [model.get_layer(n) for n in ("words", "each", "stack")] + [model.get_layer("both").backward_layer]
    return Case(model, words(), names, chosen, lambda: held)


def transformer():
    inputs = keras.Input((5,), dtype="int32")
    table = layers.ReversibleEmbedding(9, 8, name="words")
    x = table(inputs)
    y = layers.MultiHeadAttention(2, 4, dropout=0.1, name="heads")(x, x)
    x = layers.LayerNormalization(name="norm1")(layers.Add()([x, y]))
    y = layers.GroupQueryAttention(4, 4, 2, name="groups")(x, x)
    x = layers.RMSNormalization(name="norm2")(layers.Add()([x, y]))
    y = layers.EinsumDense("abc,cd->abd", (None, 8), bias_axes="d", activation="gelu", name="einsum")(x)
    x = layers.Add()([x, y])
    x = table(x, reverse=True)
    model = keras.Model(inputs, x[:, 0])
    heads, groups = model.get_layer("heads"), model.get_layer("groups")
    parts = ["query", "key", "value", "attention_output"]
    names = ["words", *(f"heads/{p}_dense" if p != "attention_output" else "heads/output_dense" for p in parts)]
    names += [f"groups/{p}_dense" for p in ("query", "key", "value", "output")] + ["einsum"]
    chosen = ["words", "heads/query_dense", "groups/output_dense"]
    held = [table, heads._query_dense, groups._output_dense, model.get_layer("norm2")]
    return Case(model, words(), names, chosen, lambda: held)


def siamese():
    left, right = keras.Input((5,), name="left"), keras.Input((5,), name="right")
    tower = keras.Sequential(
        [layers.Dense(6, name="in"), layers.BatchNormalization(name="bn"), layers.Dense(4, name="out")], name="tower"
    )
    a, b = tower(left), tower(right)
    both = layers.Concatenate()([a, b])
    classes = layers.Dense(3, name="classes")(both)
    distance = layers.Lambda(lambda ab: keras.ops.sum(keras.ops.abs(ab[0] - ab[1]), -1, keepdims=True), name="far")(
        [a, b]
    )
    model = keras.Model(
        {"left": left, "right": right}, {"classes": classes, "far": layers.Dense(1, name="scale")(distance)}
    )
    x = {"left": reals(5), "right": reals(5)[::-1].copy()}
    y = {"classes": data(4)[1], "far": reals(1)}
    names = ["tower/in", "tower/out", "classes", "scale"]
    return Case(model, x, names, ["tower/in"], lambda: [tower.get_layer("in"), tower.get_layer("bn")], y)


class Mixed(keras.Model):
    """Lists, dictionaries and a nested sequential model, and returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.by_name = {"up": layers.Dense(6, "tanh"), "down": layers.Dense(5, "tanh")}
        self.rest = [layers.Dense(5, "tanh") for _ in range(2)]
        self.inner = keras.Sequential([layers.Dense(5, "tanh", name="one"), layers.Dense(4, "tanh", name="two")])
        self.heads = (layers.Dense(3), layers.Dense(3))

    def call(self, x):
        x = self.by_name["down"](self.by_name["up"](x))
        for layer in self.rest:
            x = x + layer(x)
        x = self.inner(x)
        return {"first": self.heads[0](x), "second": self.heads[1](x)}


def subclassed():
    keras.utils.set_random_seed(0)
    model = Mixed()
    names = ["by_name/up", "by_name/down", "rest/0", "rest/1", "inner/one", "inner/two", "heads/0", "heads/1"]
    chosen = ["by_name/down", "rest/1", "inner/one", "heads/0"]
    y = {"first": data(4)[1], "second": data(4)[1]}
    return Case(
        model,
        reals(5),
        names,
        chosen,
        lambda: [model.by_name["down"], model.rest[1], model.inner.layers[0], model.heads[0]],
        y,
    )


class Counting(layers.Layer):
    """Counts its calls, has weights of 0 and 1 element, and adds to the loss."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")
        self.one = self.add_weight(shape=(1, 1), initializer="ones", name="one")
        self.none = self.add_weight(shape=(0, 3), name="none")
        self.count = self.add_weight(shape=(), dtype="int32", trainable=False, initializer="zeros", name="count")

    def call(self, x):
        if self.trainable:
            self.count.assign_add(1)
        self.add_loss(0.01 * keras.ops.mean(keras.ops.square(x)))
        return keras.ops.tanh(keras.ops.matmul(x, self.kernel)) * self.one


def odd_layers():
    normal = layers.Normalization(name="normal")
    normal.adapt(reals(5))
    model = keras.Sequential(
        [
            keras.Input((5,)),
            normal,
            layers.Dense(
                6,
                activity_regularizer="l2",
                kernel_regularizer="l2",
                kernel_constraint=keras.constraints.UnitNorm(),
                name="dense",
            ),
            layers.PReLU(name="slope"),
            layers.Dropout(0.2, name="dropout"),
            Counting(name="counting"),
            layers.GaussianNoise(0.1),
            layers.Dense(1, kernel_regularizer="l1", name="narrow"),
            layers.Dense(3, name="head"),
        ]
    )
    names = ["dense", "counting", "narrow", "head"]
    chosen = ["dense", "counting"]
    held = [model.get_layer(n) for n in ("dense", "slope", "counting", "normal")]
    return Case(model, reals(5), names, chosen, lambda: held)


def with_lora():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 8, name="words")(inputs)
    attention = layers.MultiHeadAttention(2, 4, name="heads")
    x = layers.GlobalAveragePooling1D()(attention(x, x))
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Dense(8, "tanh", name="dense")(x)))
    model.get_layer("words").enable_lora(2)
    attention._query_dense.enable_lora(2)
    attention._output_dense.enable_lora(2)
    model.get_layer("dense").enable_lora(2)
    names = ["words", *(f"heads/{p}_dense" for p in ("query", "key", "value", "output")), "dense", "head"]
    chosen = ["words", "heads/query_dense", "dense"]
    held = [model.get_layer("words"), attention._query_dense, model.get_layer("dense")]
    return Case(model, words(), names, chosen, lambda: held, users={attention._output_dense._kernel.path})


MODELS = {f.__name__: f for f in (convolutions, recurrent, transformer, siamese, subclassed, odd_layers, with_lora)}


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind):
    keras.utils.set_random_seed(0)
    case = MODELS[kind]()
    callback, record = attach(case.names, case.chosen), Record()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if isinstance(case.y, dict):
        loss = {name: loss if targets.ndim == 1 else "mse" for name, targets in case.y.items()}
    case.model.compile(optimizers.AdamW(0.01, weight_decay=0.1), loss)
    fit(case.model, [callback, record], epochs=1, inputs=(case.x, case.y))
    assert callback.layers == case.names
    assert callback.frozen_layers == case.chosen
    assert record.still(1) == paths(*case.held()) | case.users


# Options of compile(), of the optimizer, and of precision


def excluding(optimizer, *names):
    optimizer.exclude_from_weight_decay(var_names=list(names))
    return optimizer


EMA = {"use_ema": True, "ema_momentum": 0.5}
# With averages, Keras itself cannot call a compiled fit() twice on JAX.
NOT_COMPILED = {"jit_compile": False}
WAYS = {  # optimizer, options of compile(), batches in a step
    "clipped by norm": lambda: (KINDS["adam"](clipnorm=0.1), {}, 1),
    "clipped by value": lambda: (KINDS["momentum"](clipvalue=0.01), {"run_eagerly": True}, 1),
    "no decay of biases": lambda: (excluding(KINDS["adamw"](global_clipnorm=0.1), "bias"), {}, 1),
    "overwritten by averages": lambda: (KINDS["nesterov"](ema_overwrite_frequency=2, **EMA), NOT_COMPILED, 1),
    "averages of accumulated": lambda: (KINDS["adam"](gradient_accumulation_steps=2, **EMA), NOT_COMPILED, 2),
    "compilation as Keras likes": lambda: (KINDS["muon"](), {"jit_compile": "auto"}, 1),
    "compiled": lambda: (KINDS["lion"](), {"jit_compile": True}, 1),
}


@pytest.mark.parametrize("way", [pytest.param(w, marks=slow_jit) if w == "compiled" else w for w in WAYS])
def test_ways_to_train(way):
    optimizer, compile_options, batches = WAYS[way]()
    options = FIVE | {"inputs": data(5 * batches, (5,))}
    model, callback, record = trained(optimizer, {"b"}, options=options, **compile_options)
    assert callback.report().frozen == {"b": 2}
    assert callback.report().num_steps == 5
    frozen = paths(model.get_layer("b"))
    for step in range(2, 5):
        first, second = batches * step - 1, batches * (step + 1) - 1
        assert record.still(first, second) == frozen
    assert model.optimizer.iterations == 5
    # at the end of fit Keras puts the averages in the place of the weights: not of frozen ones
    last = dict(zip([v.path for v in model.weights], record.weights[-1], strict=True))
    assert {v.path for v in model.weights if np.array_equal(read(v), last[v.path])} >= frozen
    fit(model, [again := Record()], **FIVE)
    assert again.still(0, batches) == set()


@not_on_torch
@pytest.mark.parametrize("count", [2, 3])
def test_steps_per_execution(count):
    options = FIVE | {"inputs": data(4 * count, (5,))}
    model, callback, record = trained(
        KINDS["adam"](), {"b"}, options=options, record_every=count, steps_per_execution=count
    )
    assert callback.report().num_steps == model.optimizer.iterations == 4 * count
    assert callback.report().frozen == {"b": 2 * count}
    assert record.still(0, 1) == set()
    assert record.still(1) == paths(model.get_layer("b"))


POLICIES = ["mixed_bfloat16", "mixed_float16", "bfloat16", "float64"]


@pytest.fixture
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("policy", POLICIES, indirect=True)
def test_precisions(policy):
    if policy == "float64" and BACKEND == "jax":
        pytest.skip("JAX has no float64, unless the whole process is set to it")
    # 1 - 0.999 is 0 in bfloat16, so Adam's steps are.
    model, watch = make_model("sgd" if policy == "bfloat16" else "adamw"), Watch()
    dtype = policy if "mixed" not in policy else "float32"
    assert {v.dtype for v in model.trainable_variables} == {dtype}
    callback = freezer(FREEZE_TWO)
    fit(model, [callback, watch])
    assert callback.report().frozen == {"conv1": 6, "conv2": 12}
    # Not all of the live ones move at every step: bfloat16 is too coarse for small ones.
    for first, last, live in ((6, 11, LAYERS[1:]), (12, 15, LAYERS[2:])):
        moved = [watch.moved(step) for step in range(first, last + 1)]
        assert set().union(*moved) == set(live)
    # What the predictor gets are samples of the weights themselves, in float32.
    history, _ = callback.predictor.calls[0]
    seen, kernel = history[0, -1], watch.layers[5]["conv1"][0].astype(np.float32)
    assert seen.dtype == np.float32
    assert np.isin(seen, kernel).all()
    assert len(np.unique(seen)) > 4


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_batches_that_overflow_under_loss_scaling(policy):
    optimizer = optimizers.LossScaleOptimizer(KINDS["adam"](), initial_scale=2.0**20)
    model, watch = make_model(optimizer), Watch()
    callback = freezer(FREEZE_FIRST)
    fit(model, [callback, watch])
    skipped = 2 * STEPS - int(optimizer.iterations)
    assert 0 < skipped < STEPS
    assert callback.report().num_steps == 2 * STEPS - skipped
    assert callback.report().frozen == {"conv1": 6}
    for step in range(6 + skipped, 2 * STEPS):
        assert "conv1" not in watch.moved(step)


def test_several_optimizers_in_one():
    averaging = KINDS["adam"](ema_overwrite_frequency=2, **EMA)
    several = optimizers.MultiOptimizer(optimizers.OptimizerMap(KINDS["momentum"](), {"a|b": averaging}))
    options = FIVE | {"inputs": data(7, (5,))}
    model, callback, record = trained(several, {"b"}, {"a"}, options=options, **NOT_COMPILED)
    assert callback.frozen_layers == ["b", "a"]
    assert record.still(1, 3) == paths(model.get_layer("b"))
    assert record.still(3) == paths(model.get_layer("a"), model.get_layer("b"))
    fit(model, [again := Record()], **FIVE)
    assert again.still(0) == set()
    assert several.iterations == 12


# Callbacks of Keras beside ours


def test_learning_rates_go_on_whatever_sets_them():
    schedule = optimizers.schedules.PiecewiseConstantDecay([3, 6], [0.1, 0.05, 0.01])
    model, callback, _ = trained(optimizers.SGD(schedule, momentum=0.9), {"b"})
    assert callback.frozen_layers == ["b"]
    np.testing.assert_allclose(float(model.optimizer.learning_rate), 0.05, rtol=1e-6)

    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    model = compiled(mlp(5, 6, 7, 3), KINDS["adam"]())
    callbacks = [
        attach(MLP, {"b"}),
        record := Record(),
        Rates(),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.02 if epoch == 1 else rate),
        keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=0, min_delta=100.0, factor=0.5),
    ]
    fit(model, callbacks, epochs=3, inputs=data(3, (5,)))
    np.testing.assert_allclose(rates, [0.01] * 3 + [0.02] * 3 + [0.01] * 3, rtol=1e-6)
    assert record.still(1) == paths(model.get_layer("b"))


def test_early_stopping_restores_all_weights_and_leaves_nothing_frozen():
    model, record = compiled(mlp(5, 6, 7, 3), optimizers.SGD(0.5)), Record()
    x, y = data(3, (5,))
    stop = keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True, mode="max", start_from_epoch=0)
    callback = attach(MLP, {"b"}, {"a"})
    fit(model, [callback, record, stop], epochs=5, inputs=(x, y))
    assert callback.frozen_layers == ["b", "a"]
    assert stop.stopped_epoch == 2
    assert record.still(1) == paths(model.get_layer("b"))
    assert record.still(3) == paths(model.get_layer("b"), model.get_layer("a"))
    # what it restores is of before the second layer froze: on_train_end is later
    for variable, best in zip(model.weights, record.weights[2], strict=True):
        np.testing.assert_array_equal(read(variable), best)
    assert all(layer.trainable for layer in model.layers)
    fit(model, [again := Record()], epochs=1, inputs=(x, y))
    assert again.still(0) == set()


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")  # `fresh` has none yet
def test_files_written_while_layers_are_frozen(tmp_path):
    model, record = compiled(mlp(5, 6, 7, 3), KINDS["adam"]()), Record()
    ours = attach(MLP, {"b"})
    checkpoint = keras.callbacks.ModelCheckpoint
    callbacks = [
        ours,
        record,
        checkpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
        checkpoint(tmp_path / "{epoch}.keras"),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
    ]
    inputs = data(3, (5,))
    fit(model, callbacks, epochs=3, inputs=inputs)
    assert ours.frozen_layers == ["b"]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4
    for epoch in (1, 2, 3):
        expected = record.weights[3 * epoch - 1]
        fresh = compiled(mlp(5, 6, 7, 3), KINDS["adam"]())
        fresh.load_weights(tmp_path / f"{epoch}.weights.h5")
        whole = keras.saving.load_model(tmp_path / f"{epoch}.keras")
        for loaded in (fresh, whole):
            arrays = [read(v) for v in loaded.weights]
            assert all(np.array_equal(a, b) for a, b in zip(arrays, expected, strict=True))
        assert whole.get_layer("b").trainable
        assert whole.optimizer.iterations == 3 * epoch
    model.load_weights(tmp_path / "1.weights.h5")
    fit(model, [again := attach(MLP, {"c"}), record := Record()], epochs=1, inputs=inputs)
    assert again.frozen_layers == ["c"]
    assert record.still(1) == paths(model.get_layer("c"))


def test_averages_that_are_swapped_in_for_validation():
    # On PyTorch Keras' swap would need copies; see below.
    model, record = compiled(mlp(5, 6, 7, 3), KINDS["adam"](**EMA)), Record()
    seen = []

    class AtTest(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen.append([read(v) for v in self.model.weights])

    inputs = data(3, (5,))
    swap = keras.callbacks.SwapEMAWeights()
    callback = attach(MLP, {"b"})
    fit(model, [callback, record, swap, AtTest()], epochs=3, inputs=inputs, validation_data=inputs)
    assert callback.frozen_layers == ["b"]
    assert record.still(1) == paths(model.get_layer("b"))
    for epoch, arrays in enumerate(seen):
        trained_ = record.weights[3 * epoch + 2]
        swapped = {v.path for v, a, b in zip(model.weights, arrays, trained_, strict=True) if not np.array_equal(a, b)}
        assert swapped == paths(*model.layers) - paths(model.get_layer("b"))


def test_weights_read_evaluated_and_predicted_in_the_middle_of_an_epoch():
    model = compiled(mlp(5, 6, 7, 3), KINDS["adam"]())
    x, y = data(5, (5,))
    norms, losses = [], []

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            norms.append(float(np.linalg.norm(self.model.get_layer("a").get_weights()[0])))

        def on_epoch_end(self, epoch, logs=None):
            losses.append(self.model.evaluate(x, y, verbose=0))
            assert self.model.predict(x[:3], verbose=0).shape == (3, 3)

    look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: norms.append(logs["loss"]))
    callback = attach(MLP, {"b"})
    fit(model, [look, callback, Look(), record := Record()], epochs=2, inputs=(x, y))
    assert callback.frozen_layers == ["b"]
    assert record.still(1) == paths(model.get_layer("b"))
    assert len(set(norms)) == 20
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), losses[-1], rtol=1e-6)


# Data, and what happens around fit()


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__(workers=2, use_multiprocessing=False)
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x) // 8

    def __getitem__(self, index):
        part = slice(8 * index, 8 * index + 8)
        return self.x[part], self.y[part]


def tf_dataset(x, y):
    tensorflow = pytest.importorskip("tensorflow")
    return tensorflow.data.Dataset.from_tensor_slices((x, y)).batch(8)


def torch_loader(x, y):
    torch = pytest.importorskip("torch")
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)), 8)


@pytest.mark.parametrize("source", [Batches, tf_dataset, torch_loader])
def test_sources_of_data(source):
    x, y = data(5, (5,))
    model, record = compiled(mlp(5, 6, 7, 3)), Record()
    predictor = ScriptedPredictor(script(MLP, {"b"}), info=make_info(record_fraction=0.2))
    callback = SmartFRZ(predictor, patience=1, recompile_steps=0)  # the length of the run is known: five steps
    model.fit(source(x, y), callbacks=[callback, record], verbose=0, shuffle=False)
    assert callback.report().frozen == {"b": 2}
    assert record.still(1) == paths(model.get_layer("b"))


def test_validation_split_and_weights_of_classes_and_samples():
    x, y = data(5, (5,))
    model, record = compiled(mlp(5, 6, 7, 3)), Record()
    callback = attach(MLP, {"b"})
    history = fit(model, [callback, record], inputs=(x, y), epochs=2, validation_split=0.2, class_weight={1: 2.0})
    assert callback.report().num_steps == 8
    assert record.still(1) == paths(model.get_layer("b"))
    assert len(history.history["val_loss"]) == 2
    fit(model, [again := attach(MLP, {"a"})], inputs=(x, y), epochs=1, sample_weight=np.linspace(0, 1, len(x)))
    assert again.frozen_layers == ["a"]


def test_a_loop_of_train_on_batch_is_refused_with_a_hint():
    model, callback = compiled(mlp(5, 6, 7, 3)), attach(MLP, {"b"})
    x, y = data(1, (5,))
    callbacks = keras.callbacks.CallbackList([callback], model=model)
    model.train_on_batch(x, y)
    with pytest.raises(UsageError, match=r"called outside of fit\(\)\. Pass it to fit\(callbacks="):
        callbacks.on_train_batch_end(0)
    assert callback.frozen_layers == []
    assert str(callback.report())


class Stop(keras.callbacks.Callback):
    """Ends the run with this error after so many batches."""

    def __init__(self, error, batches=3):
        super().__init__()
        self.error, self.left = error, batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("of another callback")])
@pytest.mark.parametrize("compile_again", [False, True])
def test_a_run_after_an_interrupted_one(error, compile_again):
    model, first = compiled(mlp(5, 6, 7, 3), KINDS["adam"]()), attach(MLP, {"b"})
    with pytest.raises(type(error)):
        fit(model, [first, Stop(error)], **FIVE)
    assert first.frozen_layers == ["b"]
    assert not model.get_layer("b").trainable  # until the next run with SmartFRZ
    if compile_again:
        compiled(model, KINDS["adam"]())
        # Its optimizer was built without the frozen layers, before a callback could do anything about it.
        with pytest.raises(
            UsageError, match=r"compile\(\) was called while \['b'\] were still frozen.*call compile\(\) again"
        ):
            fit(model, [attach(MLP, {"a"})], **FIVE)
        compiled(model, KINDS["adam"]())
    again, record = attach(MLP, {"a"}), Record()
    fit(model, [again, record], **FIVE)
    assert record.still(0, 1) == set()
    assert record.still(1) == paths(model.get_layer("a"))
    assert all(layer.trainable for layer in model.layers)


def test_one_callback_and_one_model_again_and_again():
    model, callback = (
        compiled(mlp(5, 6, 7, 3), KINDS["adam"]()),
        freezer(predictor=ChangePredictor(), threshold=0.01, record_every=1, decide_every=2),
    )
    x, y = data(3, (5,))
    functions, sizes = [], []
    for _ in range(5):
        fit(model, [callback], epochs=1, inputs=(x, y))
        assert callback.frozen_layers
        functions.append(weakref.ref(model.train_function))
        sizes.append((len(model.optimizer.variables), len(model.variables)))
    assert len(set(sizes)) == 1
    gc.collect()
    assert sum(function() is not None for function in functions) == 1  # those of earlier runs are gone
    other = compiled(mlp(5, 8, 3))
    fit(other, [callback], epochs=1, inputs=(x, y))
    assert callback.layers == ["a", "b"]


def test_weights_set_and_model_compiled_between_two_runs():
    model, callback = compiled(mlp(5, 6, 7, 3), KINDS["adam"]()), attach(MLP, {"b"})
    started = model.get_weights()
    fit(model, [callback], **FIVE)
    model.set_weights(started)
    compiled(model, KINDS["momentum"]())
    fit(model, [callback := attach(MLP, {"c"}), record := Record()], **FIVE)
    assert callback.frozen_layers == ["c"]
    assert record.still(1) == paths(model.get_layer("c"))


def test_two_models_that_share_layers_and_what_a_summary_says():
    """One is trained after the other: what froze in the first is trained in the second."""
    inputs = keras.Input((5,))
    trunk = mlp(5, 6, 7)
    first = compiled(keras.Model(inputs, keras.layers.Dense(3, name="one")(trunk(inputs))))
    second = compiled(keras.Model(inputs, keras.layers.Dense(3, name="two")(trunk(inputs))))
    counts = []

    class Summary(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            lines = []
            self.model.summary(print_fn=lines.append, expand_nested=True)
            counts.append(next(line for line in "\n".join(lines).splitlines() if "Non-trainable params" in line))

    names = [f"{trunk.name}/a", f"{trunk.name}/b", "one"]
    fit(first, [attach(names, {names[0]}), record := Record(), Summary()], **FIVE)
    assert record.still(1) == paths(trunk.get_layer("a"))
    assert ["36" in count for count in counts] == [False, True, True, True, True]  # 5 * 6 + 6
    fit(second, [again := Record()], **FIVE)
    assert again.still(0, 1) == set()


def test_a_clone_made_while_layers_are_frozen():
    clones = []

    class Clone(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                clones.append(keras.models.clone_model(self.model))
                with callback.thawed():
                    clones.append(keras.models.clone_model(self.model))

    model, callback = compiled(mlp(5, 6, 7, 3)), attach(MLP, {"b"})
    fit(model, [callback, Clone(), record := Record()], **FIVE)
    assert record.still(1) == paths(model.get_layer("b"))
    assert [clone.get_layer("b").trainable for clone in clones] == [False, True]


# Models that cannot be frozen, or not wholly


def test_a_model_of_one_layer_and_one_that_the_user_froze():
    for names, match in (
        ([], None),  # one layer alone is trained, and others may join it
        (["a", "b"], None),
        (MLP, "has 0 layers"),
    ):
        model = mlp(5, 6, 7, 3) if names else mlp(5, 3)
        for name in names:
            model.get_layer(name).trainable = False
        compiled(model)
        with nullcontext() if match is None else pytest.raises(UnsupportedModelError, match=match):
            fit(model, [attach(MLP)], **FIVE)
        assert [layer.name for layer in model.layers if not layer.trainable] == names


def test_models_that_are_not_built_or_not_compiled():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Dense(6, "tanh", name="a"),
            keras.layers.Dense(7, "tanh", name="b"),
            keras.layers.Dense(3, name="c"),
        ]
    )
    with pytest.raises(ValueError, match="compile"):
        fit(model, [attach(MLP, {"b"})], **FIVE)
    callback, record = attach(MLP, {"b"}), Record()
    fit(compiled(model), [callback, record], **FIVE)
    assert callback.layers == MLP
    assert record.still(1) == paths(model.get_layer("b"))


def test_a_quantized_layer_is_not_one_of_ours():
    model = mlp(5, 6, 7, 3)
    model.get_layer("b").quantize("int8")
    callback, record = attach(["a", "c"], {"a"}), Record()
    fit(compiled(model), [callback, record], **FIVE)
    assert callback.layers == ["a", "c"]
    b = model.get_layer("b")
    assert record.still(1) == paths(model.get_layer("a"), b)


def test_dropout_goes_on_drawing_as_in_an_unfrozen_twin():
    x, y = data(1, (5,))
    inputs = np.tile(x, (5, 1)), np.tile(y, 5)
    losses = []
    for stages in ([{"a"}], []):
        keras.utils.set_random_seed(0)
        dropout = keras.layers.Dropout(0.5, seed=1, name="dropout")
        model = keras.Sequential(
            [keras.Input((5,)), keras.layers.Dense(6, name="a"), dropout, keras.layers.Dense(3, name="b")]
        )
        compiled(model, optimizers.SGD(1e-9))
        note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
        fit(model, [attach(["a", "b"], *stages), note], epochs=1, inputs=inputs)
    np.testing.assert_allclose(losses[:5], losses[5:], rtol=1e-6)
    assert len(set(losses[:5])) == 5


def test_weights_that_are_not_numbers(caplog):
    model = compiled(mlp(5, 6, 7, 3), optimizers.SGD(0.1))
    x, y = data(5, (5,))
    x[20] = np.nan  # in the third batch
    callback = freezer(predictor=ChangePredictor(), record_every=1, decide_every=2, threshold=1.0)
    fit(model, [callback], epochs=1, inputs=(x, y))
    assert callback.frozen_layers == []
    assert {event.reason for event in callback.events if event.step == 4} == {"not_finite"}
    assert "hold NaN or infinity at step 4" in caplog.text
    fit(compiled(mlp(5, 6, 7, 3)), [callback, keras.callbacks.TerminateOnNaN()], epochs=1, inputs=(x, y))
    assert callback.report().num_steps == 3


# Arguments


def test_lengths_that_are_not_those_of_the_run():
    for options, steps in (({"record_every": 100}, 5), ({"total_steps": 1}, 5), ({"total_steps": 10**6}, 5)):
        callback = SmartFRZ(ChangePredictor(), **options)
        fit(compiled(mlp(5, 6, 7, 3)), [callback], **FIVE)
        assert callback.report().num_steps == steps
        assert bool(callback.events) == (options == {"total_steps": 1})
        assert str(callback.report())


@pytest.mark.parametrize("window", [2, 40])
def test_a_predictor_with_another_window(window):
    callback = attach(MLP, {"b"}, predictor=ScriptedPredictor(script(MLP, {"b"}), info=make_info(window=window)))
    fit(compiled(mlp(5, 6, 7, 3)), [callback], **FIVE)
    assert callback.predictor.calls[-1][0].shape[1] <= window
    assert callback.frozen_layers == ["b"]


def test_wrong_arguments():
    with pytest.raises(TypeError, match="unexpected keyword argument 'model'"):
        SmartFRZ(model=1)
    with pytest.raises(UnknownPredictorError, match="smartfrz-bse"):
        SmartFRZ("smartfrz-bse")
    for name, value in (("record_every", 0), ("decide_every", 1.5), ("patience", 0), ("total_steps", -3)):
        with pytest.raises(ValueError, match=f"`{name}` is {value}; expected an integer of at least 1"):
            SmartFRZ(ScriptedPredictor(), **{name: value})


def test_dry_runs_leave_no_trace():
    _, callback, record = trained(KINDS["adam"](), {"b"}, dry_run=True)
    _, _, plain = trained(KINDS["adam"]())
    assert callback.report().frozen == {"b": 2}
    for mine, other in zip(record.weights[-1], plain.weights[-1], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


# Training steps and loops of the user's own


def loss_of(y, logits):
    return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))


class Stepping(keras.Model):
    """The `train_step` of Keras' guides, for each backend.

    Args:
        remember: Whether it gathers what it trains once and for all, as some write it.
    """

    def __init__(self, remember=False):
        super().__init__()
        self.a = keras.layers.Dense(6, "tanh")
        self.b = keras.layers.Dense(7, "tanh")
        self.c = keras.layers.Dense(3)
        self.remember = remember

    def build(self, shape):
        for layer, size in ((self.a, shape[-1]), (self.b, 6), (self.c, 7)):
            layer.build((None, size))
        self.remembered = self.trainable_variables if self.remember else []

    def call(self, x):
        return self.c(self.b(self.a(x)))

    def train_step(self, *arguments):
        return getattr(self, BACKEND)(*arguments)

    def tensorflow(self, batch):
        import tensorflow

        x, y = batch
        with tensorflow.GradientTape() as tape:
            loss = loss_of(y, self(x))
        trained_ = self.remembered or self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, trained_), trained_)
        return {"loss": loss}

    def torch(self, batch):
        x, y = batch
        self.zero_grad()
        loss = loss_of(y, self(x))
        loss.backward()
        trained_ = self.remembered or self.trainable_variables
        self.optimizer.apply([v.value.grad for v in trained_], trained_)
        return {"loss": loss}

    def jax(self, state, batch):
        import jax

        trainable, rest, own, metrics = state
        x, y = batch

        def stateless(trainable):
            logits, new_rest = self.stateless_call(trainable, rest, x)
            return loss_of(y, logits), new_rest

        (loss, rest), gradients = jax.value_and_grad(stateless, has_aux=True)(trainable)
        trainable, own = self.optimizer.stateless_apply(own, gradients, trainable)
        return {"loss": loss}, (trainable, rest, own, metrics)


def test_a_train_step_of_the_users_own():
    keras.utils.set_random_seed(0)
    model, callback, record = compiled(Stepping(), KINDS["adam"]()), attach(MLP, {"b"}), Record()
    fit(model, [callback, record], **FIVE)
    assert callback.layers == MLP
    assert callback.frozen_layers == ["b"]
    for step in range(2, 5):
        assert record.still(step - 1, step) == paths(model.b)
    assert model.optimizer.iterations == 5


@pytest.mark.skipif(BACKEND == "jax", reason="a train_step is given its variables on JAX")
def test_a_train_step_that_remembers_its_variables():
    keras.utils.set_random_seed(0)
    model, callback, record = compiled(Stepping(remember=True), KINDS["adam"]()), attach(MLP, {"b"}), Record()
    if BACKEND == "tensorflow":  # it goes on training them
        with pytest.warns(UserWarning, match="SmartFRZ froze 'b', but the step after that changed it all the same"):
            fit(model, [callback, record], **FIVE)
        assert callback.frozen_layers == []
        return
    fit(model, [callback, record], **FIVE)
    assert callback.frozen_layers == ["b"]
    assert record.still(1) == paths(model.b)


class Adversaries(keras.Model):
    """A generator and a discriminator, each with an optimizer."""

    def __init__(self):
        super().__init__()
        self.generator = mlp(2, 6, 5)
        self.judge = mlp(5, 7, 1)

    def compile(self, first, second):
        super().compile()
        self.first, self.second = first, second

    def call(self, x):
        return self.judge(self.generator(x[:, :2]))

    def losses_of(self, x):
        made, real = self(x), self.judge(x)
        both = keras.ops.concatenate([keras.ops.zeros_like(made), keras.ops.ones_like(real)])
        judged = keras.losses.binary_crossentropy(both, keras.ops.concatenate([made, real]), from_logits=True)
        fooled = keras.losses.binary_crossentropy(keras.ops.ones_like(made), made, from_logits=True)
        return keras.ops.mean(judged), keras.ops.mean(fooled)

    def train_step(self, x):
        pairs = (self.judge, self.first), (self.generator, self.second)
        if BACKEND == "tensorflow":
            import tensorflow

            with tensorflow.GradientTape(persistent=True) as tape:
                losses = self.losses_of(x)
            for loss, (part, optimizer) in zip(losses, pairs, strict=True):
                optimizer.apply(tape.gradient(loss, part.trainable_variables), part.trainable_variables)
        else:
            for number, (part, optimizer) in enumerate(pairs):
                self.zero_grad()
                losses = self.losses_of(x)
                losses[number].backward()
                optimizer.apply([v.value.grad for v in part.trainable_variables], part.trainable_variables)
        return {"judged": losses[0], "fooled": losses[1]}


@pytest.mark.skipif(BACKEND == "jax", reason="Keras hands a train_step on JAX the state of one optimizer only")
def test_two_networks_with_an_optimizer_each():
    keras.utils.set_random_seed(0)
    model, record = Adversaries(), Record()
    model.compile(KINDS["adam"](), KINDS["adam"]())
    names = ["generator/a", "generator/b", "judge/a", "judge/b"]
    callback = attach(names, {"generator/a", "judge/b"})
    x = data(5, (5,))[0]
    model.fit(x, batch_size=8, verbose=0, callbacks=[callback, record], shuffle=False)
    assert callback.layers == names
    assert record.still(1) == paths(model.generator.get_layer("a"), model.judge.get_layer("b"))
    assert record.still(0, 1) == set()
    assert model.first.iterations == model.second.iterations == 5


def test_a_backup_that_is_loaded_after_our_start(tmp_path):
    """It sets the optimizer's count, which is looked at where gradients are accumulated."""
    inputs = data(12, (5,))

    def run(*others):
        model = compiled(mlp(5, 6, 7, 3), KINDS["adam"](gradient_accumulation_steps=2))
        fit(model, [callback := attach(MLP), *others], epochs=2, inputs=inputs)
        return callback.report().num_steps

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(KeyboardInterrupt):
        run(backup(), Stop(KeyboardInterrupt(), batches=13))
    assert run(backup()) == 12  # those of the first epoch come with the state beside the backup
