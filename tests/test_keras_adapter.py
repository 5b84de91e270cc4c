"""The Keras adapter on the backend that KERAS_BACKEND names; `test_keras_backends.py` runs it on each."""

import copy
import dataclasses
import inspect
import json
from itertools import pairwise

import numpy as np
import pytest
from adapter_contract import AdapterContract, Case, same
from keras_runs import (
    FREEZE_FIRST,
    FREEZE_TWO,
    LAYERS,
    OPTIMIZERS,
    STEPS,
    WARNINGS,
    Watch,
    compiled,
    data,
    everything,
    fit,
    freezer,
    keras,
    make_model,
    not_on_torch,
    read,
    slow_jit,
)
from numpy_adapter import ChangePredictor, NumpyAdapter, ScriptedPredictor, make_info

from smartfrz.adapters.keras import KerasAdapter, SmartFRZ, trace_layers
from smartfrz.control.controller import FreezeController
from smartfrz.control.options import FreezeOptions
from smartfrz.control.state import sealed
from smartfrz.errors import StateError, UnsupportedModelError, UsageError

pytestmark = WARNINGS


class TestKerasAdapter(AdapterContract):
    @pytest.fixture(params=["sgd", "adamw"])
    def case(self, request):
        model = make_model(request.param)
        x, y = data()
        step = iter(range(1000))

        def train_step():
            part = slice(8 * (i := next(step) % STEPS), 8 * i + 8)
            model.train_on_batch(x[part], y[part])

        def flat_weights(layer):
            kernel = read(model.get_layer(layer).kernel)
            return kernel.transpose(3, 2, 0, 1).ravel() if kernel.ndim == 4 else kernel.T.ravel()

        return Case(
            KerasAdapter(model, trace_layers(model)),
            LAYERS,
            everything=lambda layer: everything(model, layer),
            flat_weights=flat_weights,
            train_step=train_step,
        )

    def half(self, dtype):
        model = keras.Sequential([keras.Input((4,), dtype=dtype), keras.layers.Dense(3, name="a", dtype=dtype)])
        kernel = keras.ops.convert_to_numpy(keras.ops.cast(compiled(model).layers[0].kernel, "float32"))
        assert model.layers[0].kernel.dtype == dtype
        return KerasAdapter(model, trace_layers(model)), "a", np.array(kernel).T.ravel()


@pytest.mark.parametrize(
    ("optimizer", "options", "jit_compile", "stages"),
    [
        ("sgd", {}, False, 3),  # at step 6, in the middle of the first epoch
        pytest.param("sgd", {}, True, 3, marks=slow_jit),
        ("adam", {}, False, 4),  # at step 8, at the end of the first epoch
        ("adamw", {"global_clipnorm": 1.0}, False, 3),
        ("adam", {"use_ema": True, "ema_overwrite_frequency": 5}, False, 3),
    ],
)
def test_frozen_in_fit_means_bit_identical(optimizer, options, jit_compile, stages):
    model, watch = make_model(optimizer, jit_compile=jit_compile, **options), Watch()
    callback = freezer(FREEZE_TWO, decide_every=stages)
    x, y = data()
    fit(model, [callback, watch], epochs=3, validation_data=(x[:8], y[:8]))
    first, second = 2 * stages, 4 * stages
    assert callback.report().frozen == {"conv1": first, "conv2": second}
    for step in range(1, 3 * STEPS):
        frozen = LAYERS[: (step >= first) + (step >= second)]
        assert watch.moved(step) == [layer for layer in LAYERS if layer not in frozen], step
    assert model.optimizer.iterations == 3 * STEPS
    assert all(layer.trainable for layer in model.layers)
    fit(model, [again := Watch()], epochs=1)  # everything is trained again
    assert again.moved(1) == LAYERS


@not_on_torch
def test_several_steps_in_one_execution():
    model, watch = make_model(steps_per_execution=2), Watch()
    callback = freezer(FREEZE_TWO)
    x, y = data()
    fit(model, [callback, watch], inputs=(x[:-8], y[:-8]))  # seven steps: the last execution has one
    assert callback.report().num_steps == 14
    assert callback.report().frozen == {"conv1": 6, "conv2": 12}
    for execution in range(1, 8):
        assert watch.moved(execution) == LAYERS[(execution >= 3) + (execution >= 7) :]
    with pytest.raises(ValueError, match="`record_every` is 1, but 2 optimizer steps pass at a time"):
        fit(model, [freezer(record_every=1)])


def test_accumulated_gradients_count_as_one_step():
    model, watch = make_model(gradient_accumulation_steps=2), Watch()
    callback = freezer(FREEZE_FIRST)
    fit(model, [callback, watch])
    assert callback.report().num_steps == STEPS
    assert callback.report().frozen == {"conv1": 6}  # after 12 batches
    kernels = [[layers[name][0] for name in LAYERS] for layers in watch.layers]
    moved = [[not np.array_equal(a, b) for a, b in zip(*pair, strict=True)] for pair in pairwise(kernels)]
    assert moved == [[True] * 3, [False] * 3] * 6 + [[False, True, True], [False] * 3, [False, True, True]]
    assert watch.moved(13) == ["conv2", "head"]  # statistics move with every batch


def test_the_length_of_the_run_is_what_fit_says():
    model = make_model(gradient_accumulation_steps=2)
    callback = SmartFRZ(ScriptedPredictor(info=make_info(record_fraction=0.25)), patience=1)
    fit(model, [callback], epochs=4)
    assert callback.schedule.record_every == 4


def test_mixed_precision_with_loss_scaling():
    optimizer = keras.optimizers.LossScaleOptimizer(OPTIMIZERS["sgd"](use_ema=True), initial_scale=64.0)
    model, watch = make_model(optimizer), Watch()
    callback = freezer(FREEZE_TWO)
    fit(model, [callback, watch])
    assert callback.report().frozen == {"conv1": 6, "conv2": 12}
    for step in range(1, 2 * STEPS):
        assert watch.moved(step) == LAYERS[(step >= 6) + (step >= 12) :]
    assert optimizer.iterations == 2 * STEPS


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_momenta_iterations_and_learning_rate_go_on(optimizer):
    decay = keras.optimizers.schedules.CosineDecay(0.05, 40)
    kind = keras.optimizers.SGD if optimizer == "sgd" else keras.optimizers.Adam
    options = {"momentum": 0.9} if optimizer == "sgd" else {}
    runs = []
    for script in (FREEZE_FIRST, []):
        model, watch = make_model(kind(decay, **options)), Watch()
        # the statistics as they are: then both runs compute the same until the first is ahead by a step
        fit(model, [freezer(script, norm_batches=0), watch])
        runs.append((model, watch))
    (model, frozen), (_, plain) = runs
    assert all(same(frozen.optimizer[step], plain.optimizer[step]) for step in range(6))
    names = [v.path for v in model.optimizer.variables]
    for step in range(6, 2 * STEPS):
        before, after = frozen.optimizer[step - 1 : step + 1]
        kept = {name for name, b, a in zip(names, before, after, strict=True) if np.array_equal(b, a)}
        of_frozen = {name for name in names if "conv1" in name or "norm1" in name}
        assert kept >= of_frozen
        assert not any("kernel" in name for name in kept - of_frozen)
    assert model.optimizer.iterations == 2 * STEPS
    np.testing.assert_allclose(float(model.optimizer.learning_rate), float(decay(2 * STEPS)), rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_is_still_trained_steps_as_if_nothing_had_happened(optimizer):
    """The head's next step in the run that froze, and in one that did not: same gradient, same momentum."""
    runs = []
    for script in ([{"conv1": 0.9, "conv2": 0.9, "head": 0.1}], []):
        model = make_model(optimizer)
        for name in ("norm1", "norm2"):  # in inference mode in both runs, else the head's input differs
            model.get_layer(name).trainable = False
        compiled(model, model.optimizer)
        watch = Watch()
        fit(model, [freezer(script), watch], epochs=1)
        runs.append(watch.layers)
    for step in range(7):  # the frozen layers make a difference from the eighth on
        for mine, other in zip(*(run[step]["head"] for run in runs), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)
    assert not same(runs[0][5]["head"], runs[0][6]["head"])


@pytest.mark.parametrize("norm_batches", [4, 24, 0])
def test_statistics_of_a_frozen_batch_norm_are_those_of_the_last_batches(norm_batches):
    model = make_model(keras.optimizers.SGD(1e-9), momentum=0.9)
    x, _ = data()
    features = np.array(keras.ops.convert_to_numpy(model.get_layer("conv1")(x))).reshape(STEPS, -1, 4)
    fit(model, [freezer(FREEZE_FIRST, norm_batches=norm_batches), watch := Watch()], epochs=1)
    _, _, _, mean, variance = watch.layers[-1]["conv1"]
    last = features[6 - min(norm_batches or 6, 6) : 6].astype(np.float64)
    shares = 0.1 * 0.9 ** np.arange(len(last))[::-1]
    if norm_batches:
        shares /= shares.sum()
    started = 1.0 - shares.sum()  # the share that the initial statistics, 0 and 1, still have
    np.testing.assert_allclose(mean, shares @ last.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, shares @ last.var(1) + started, rtol=2e-2)  # TensorFlow's is unbiased
    assert same(watch.layers[5]["conv1"], watch.layers[-1]["conv1"])


def test_the_config_makes_the_same_callback():
    made = SmartFRZ(
        "smartfrz-tiny", threshold=0.8, record_every=3, providers=["CPUExecutionProvider"], recompile_steps=0
    )
    text = json.dumps(keras.saving.serialize_keras_object(made))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is SmartFRZ
    assert again.options == made.options
    assert again.predictor.sha256 == made.predictor.sha256
    assert again.get_config() == made.get_config() == copy.deepcopy(made).get_config()
    assert made.get_config()["recompile_steps"] == 0
    loaded = SmartFRZ(made.predictor)
    assert SmartFRZ.from_config(loaded.get_config()).predictor.sha256 == made.predictor.sha256
    with pytest.raises(UsageError, match=r"was made with a \w+; expected a predictor of the zoo"):
        SmartFRZ(ChangePredictor()).get_config()


def test_layers_of_nested_shared_and_vector_only_models():
    inner_in = keras.Input((6,))
    inner = keras.Model(
        inner_in,
        keras.layers.LayerNormalization(name="ln")(keras.layers.Dense(6, name="dense")(inner_in)),
        name="inner",
    )
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(7, 6, name="words")(inputs)
    x = keras.layers.GRU(6, name="gru")(x)
    first = inner(x)
    shared = keras.layers.Dense(6, name="shared")
    x = keras.layers.Add()([shared(first), shared(inner(first))])
    tail = keras.Sequential([keras.layers.PReLU(name="slope"), keras.layers.Dense(3, name="last")], name="tail")
    model = keras.Model(inputs, tail(x))
    layers = trace_layers(model)
    assert [layer.name for layer in layers] == ["words", "gru", "inner/dense", "shared", "tail/last"]
    by_name = {layer.name: layer for layer in layers}
    assert by_name["inner/dense"].members == ("inner/dense", "inner/ln")
    assert by_name["shared"].members == ("shared", "tail/slope")
    assert by_name["gru"].members == ("gru", "gru/cell")
    counted = sum(len(layer.parameters) for layer in layers)
    assert counted == len(model.trainable_variables)
    compiled(model)
    callback = freezer([{"words": 0.9, "gru": 0.1, "inner/dense": 0.9, "shared": 0.1, "tail/last": 0.1}])
    kept = {}

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kept[batch] = {v.path: read(v) for v in self.model.trainable_variables + self.model.non_trainable_variables}

    words = np.random.default_rng(0).integers(0, 7, (64, 5))
    fit(model, [callback, Keep()], epochs=1, inputs=(words, data()[1]))
    assert callback.frozen_layers == ["words", "inner/dense"]
    still = {name for name in kept[7] if "seed" not in name and np.array_equal(kept[5][name], kept[7][name])}
    assert still == {v.path for v in (*model.get_layer("words").weights, *inner.weights)}


class Block(keras.layers.Layer):
    """Registers its layers from back to front, and scales its output."""

    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = units
        self.second = keras.layers.Dense(units)
        self.norm = keras.layers.BatchNormalization()
        self.first = keras.layers.Dense(units)

    def build(self, shape):
        self.scale = self.add_weight(shape=(self.units,), initializer="ones", name="scale")
        self.first.build(shape)
        self.norm.build((None, self.units))
        self.second.build((None, self.units))

    def call(self, x, training=None):
        return self.second(keras.ops.relu(self.norm(self.first(x), training=training))) * self.scale


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(3)
        self.blocks = [Block(6), Block(6)]
        self.unused = keras.layers.Dense(2)

    def build(self, shape):
        for block in self.blocks:
            block.build(shape)
            shape = (None, 6)
        self.head.build(shape)
        self.unused.build(shape)

    def call(self, x, training=None):
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(x)


SUBCLASSED = ["blocks/0/first", "blocks/0/second", "blocks/1/first", "blocks/1/second", "head"]


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=slow_jit)])
def test_a_subclassed_model_in_the_order_in_which_it_runs(jit_compile):
    keras.utils.set_random_seed(0)
    model = compiled(Subclassed(), jit_compile=jit_compile)
    callback = freezer([{name: 0.9 if "0" in name else 0.1 for name in SUBCLASSED}])
    kept = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            model = self.model
            kept.append([[read(v) for v in part.weights] for part in (*model.blocks, model.head)])

    plain = keras.layers.Layer.__call__
    inputs = data(shape=(5,))
    fit(model, [callback, Keep()], epochs=1, inputs=inputs)
    assert callback.layers == SUBCLASSED
    assert callback.frozen_layers == SUBCLASSED[:2]
    assert keras.layers.Layer.__call__ is plain
    assert [same(a, b) for a, b in zip(kept[5], kept[7], strict=True)] == [True, False, False]
    assert model.jit_compile == jit_compile
    again = freezer()
    fit(model, [again], epochs=1, inputs=inputs)  # traced before: has to be traced once more
    assert again.layers == SUBCLASSED
    assert [layer.name for layer in trace_layers(model, inputs[0][:2])] == SUBCLASSED
    with pytest.raises(UnsupportedModelError, match="Pass an example batch"):
        trace_layers(model)


def test_layers_that_the_user_froze_are_respected_and_never_thawed():
    model = make_model()
    for name in ("conv1", "norm1"):
        model.get_layer(name).trainable = False
    compiled(model)
    callback, watch = freezer([{"conv2": 0.9, "head": 0.1}]), Watch()
    fit(model, [callback, watch])
    assert callback.layers == LAYERS[1:]
    assert callback.frozen_layers == ["conv2"]
    assert callback.report().user_frozen == {"conv1"}
    assert watch.moved(1) == ["conv2", "head"]
    assert watch.moved(10) == ["head"]
    assert not model.get_layer("conv1").trainable
    assert not model.get_layer("norm1").trainable
    assert model.get_layer("conv2").trainable


def test_a_partly_frozen_layer_is_thawed_in_its_trainable_part_only():
    model = make_model()
    model.get_layer("conv2").kernel.trainable = False
    compiled(model)
    callback, watch = freezer(FREEZE_TWO), Watch()
    fit(model, [callback, watch])
    assert callback.frozen_layers == ["conv1", "conv2"]
    assert watch.moved(2) == LAYERS
    assert watch.moved(13) == ["head"]
    assert not model.get_layer("conv2").kernel.trainable
    assert model.get_layer("conv2").bias.trainable


def test_a_dry_run_freezes_nothing():
    model, watch = make_model(), Watch()
    callback = freezer(FREEZE_TWO, dry_run=True)
    fit(model, [callback, watch])
    assert callback.frozen_layers == []
    assert callback.report().frozen == {"conv1": 6, "conv2": 12}
    assert watch.moved(15) == LAYERS
    report = str(callback.report())
    assert "would have frozen 2 of 3 layers in 16 steps" in report
    assert "for each example of a batch" in report
    # Two convolutions (5 x 5 and 3 x 3 places) and a matrix; an input gradient costs as much again.
    flops = [layer.forward_flops for layer in callback.report().layers]
    assert flops == [2 * 25 * 72, 2 * 9 * 216, 2 * 18]
    assert callback.report().backward_flops == 16 * (2 * sum(flops) - flops[0])


def test_a_second_fit_starts_anew():
    model = make_model()
    callback = freezer([*FREEZE_FIRST, *FREEZE_FIRST])
    fit(model, [callback], epochs=1)
    fit(model, [callback], epochs=1)
    assert callback.frozen_layers == ["conv1"]
    assert callback.report().num_steps == STEPS
    assert [event.step for event in callback.events] == [6] * 3


def test_what_an_interrupted_run_left_frozen_is_thawed():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 6:
                raise KeyboardInterrupt

    model, watch = make_model(), Watch()
    with pytest.raises(KeyboardInterrupt):
        fit(model, [freezer(FREEZE_FIRST), Interrupt()])
    assert not model.get_layer("conv1").trainable
    fresh = freezer()
    fit(model, [fresh, watch], epochs=1)
    assert fresh.layers == LAYERS
    assert watch.moved(1) == LAYERS


def test_a_generator_of_unknown_length():
    x, y = data()

    def batches():
        for i in range(STEPS):
            yield x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]

    with pytest.raises(ValueError, match=r"steps=None and epochs=1, as with a generator.*record_every= to SmartFRZ"):
        make_model().fit(batches(), callbacks=[SmartFRZ(ScriptedPredictor())], verbose=0, shuffle=False)
    callback = freezer(predictor=ScriptedPredictor(list(FREEZE_FIRST), make_info(record_fraction=0.25)))
    make_model().fit(batches(), callbacks=[callback], verbose=0, shuffle=False)
    assert callback.frozen_layers == ["conv1"]


@pytest.mark.parametrize("mid_training", [False, True])
def test_a_resumed_run_goes_on_as_an_uninterrupted_one(mid_training, tmp_path):
    predictor = ChangePredictor(make_info(tailored_size=16), scale=6.0)
    options = {"predictor": predictor, "threshold": 0.8, "decide_every": 2, "patience": 2, "total_steps": 48}

    def new_model():
        return make_model(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.02, 48)))

    whole, watch = freezer(**options), Watch()
    fit(new_model(), [whole, watch], epochs=6)
    steps = list(whole.report().frozen.values())
    assert any(step <= 24 for step in steps)
    assert any(step > 24 for step in steps)

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                with first.thawed():
                    self.model.save(tmp_path / "model.keras")
                first.save(tmp_path / "freezer.npz")

    model, first = new_model(), freezer(**options)
    if mid_training:
        fit(model, [first, Save()], epochs=4)
    else:
        fit(model, [first], epochs=3)
        model.save(tmp_path / "model.keras")
        first.save(tmp_path / "freezer.npz")
    model = keras.saving.load_model(tmp_path / "model.keras")
    resumed, rest = freezer(**options, seed=3), Watch()  # the saved seed goes on
    resumed.load(tmp_path / "freezer.npz")
    fit(model, [resumed, rest], epochs=6, initial_epoch=3)
    assert repr(resumed.events) == repr(whole.events)  # repr: NaN differs from itself
    assert resumed.frozen_layers == whole.frozen_layers
    for mine, other in zip(rest.layers, watch.layers[3 * STEPS :], strict=True):
        assert all(same(mine[layer], other[layer]) for layer in LAYERS)


def test_states_that_do_not_fit(tmp_path):
    callback = freezer(FREEZE_FIRST)
    assert callback.state_dict() == {"started": False}
    fit(make_model(), [callback], epochs=1)
    state = callback.state_dict()
    with pytest.raises(StateError, match=r"received a dict with keys \['a'\]"):
        freezer().load_state_dict({"a": 1})
    (tmp_path / "other.npz").write_text("no state")
    with pytest.raises(StateError, match="holds no state of SmartFRZ"):
        freezer().load(tmp_path / "other.npz")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with pytest.raises(StateError, match="holds no state of SmartFRZ"):
        freezer().load(tmp_path / "arrays.npz")

    other = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, name="a"), keras.layers.Dense(3, name="b")])
    wrong = freezer()
    wrong.load_state_dict(state)
    with pytest.raises(StateError, match="3 layers, this one has 2"):
        fit(compiled(other), [wrong], inputs=data(shape=(5,)))
    wrong = freezer(predictor=ScriptedPredictor(sha256="00" * 32))
    wrong.load_state_dict(state)
    with pytest.raises(StateError, match="Resume with the same predictor file"):
        fit(make_model(), [wrong])

    model = make_model()
    model.get_layer("conv1").trainable = model.get_layer("norm1").trainable = False
    wrong = freezer()
    wrong.load_state_dict(state)
    with pytest.raises(StateError, match=r"\['conv1'\] were trained or frozen.*inside of `with freezer.thawed"):
        fit(compiled(model), [wrong])


def test_a_damaged_state_is_refused_when_it_is_loaded():
    callback = freezer(FREEZE_FIRST)
    fit(make_model(), [callback], epochs=1)
    whole = callback.state_dict()
    assert whole["norms"]
    norm = next(iter(whole["norms"]))
    changes = {
        "seconds": lambda s: s.update(seconds="3"),
        "layers": lambda s: s["layers"][0].update(members="conv1"),
        "norms": lambda s: s["norms"][norm].pop(),
        "controller": lambda s: s["controller"].update(num_steps=-1),
        "sha256": lambda s: s["norms"][norm][0].__setitem__(0, 9.0),
    }
    for name, change in changes.items():
        state = copy.deepcopy(whole)
        change(state)
        target = freezer()
        with pytest.raises(StateError, match=rf"damaged: .*{name}.*; expected"):
            target.load_state_dict(state)
        assert target.state_dict() == {"started": False}
    state = copy.deepcopy(whole)
    state["norms"][norm][:2] = [np.zeros(2), np.zeros(2)]
    target = freezer()
    target.load_state_dict(sealed(state))
    with pytest.raises(
        StateError, match=rf"statistics of shape \(2,\) of the layer '{norm}', which has statistics of shape"
    ):
        fit(make_model(), [target])


def test_wrong_moments_and_models():
    with pytest.raises(UsageError, match="called outside of fit"):
        freezer().on_train_batch_end(0)
    with pytest.raises(UsageError, match="given several SmartFRZ callbacks; expected one"):
        fit(make_model(), [freezer(), freezer()])
    with pytest.raises(UnsupportedModelError, match="has no optimizer"):
        KerasAdapter(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), [])
    model = compiled(keras.Sequential([keras.Input((5,)), keras.layers.LayerNormalization(), keras.layers.ReLU()]))
    with pytest.raises(UnsupportedModelError, match="found no layer to freeze in Sequential"):
        fit(model, [freezer()], inputs=data(shape=(5,)))
    model = make_model()
    model.trainable = False
    with pytest.raises(UnsupportedModelError, match="has 0 layers that can be trained"):
        fit(compiled(model), [freezer()])


def test_arguments():
    with pytest.raises(ValueError, match="`freeze_order` is 'back'; expected one of free, prefix, cost_aware"):
        freezer(freeze_order="back")
    with pytest.raises(ValueError, match="`threshold` is 2"):
        freezer(threshold=2)
    with pytest.raises(ValueError, match="`norm_batches` is -1"):
        freezer(norm_batches=-1)
    with pytest.raises(ValueError, match="`total_steps` is 0"):
        freezer(total_steps=0)


def test_prefix_order():
    model = make_model()
    script = [{"conv1": 0.1, "conv2": 0.9, "head": 0.1}, {"conv1": 0.9, "conv2": 0.9, "head": 0.1}]
    callback = freezer(script, freeze_order="prefix")
    fit(model, [callback])
    assert callback.report().frozen == {"conv1": 12, "conv2": 12}
    assert [e.reason for e in callback.events][1] == "behind_live_layer"


def test_one_trajectory_gives_the_same_samples_and_decisions_in_numpy_torch_and_keras():
    torch = pytest.importorskip("torch")
    from smartfrz.adapters.torch import TorchAdapter
    from smartfrz.adapters.torch import trace_layers as trace_torch

    modules = {
        "conv": torch.nn.Conv2d(3, 6, 3, bias=False),
        "depthwise": torch.nn.Conv2d(6, 12, 3, groups=6, bias=False),
        "grouped": torch.nn.Conv2d(12, 8, (1, 2), groups=4, bias=False),
        "transposed": torch.nn.ConvTranspose2d(8, 5, 2, bias=False),
        "flatten": torch.nn.Flatten(),
        "dense": torch.nn.Linear(5 * 5 * 4, 7, bias=False),
    }
    net = torch.nn.Sequential()
    for name, module in modules.items():
        net.add_module(name, module)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(6, 3, use_bias=False, name="conv"),
            keras.layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, name="depthwise"),
            keras.layers.Conv2D(8, (1, 2), groups=4, use_bias=False, name="grouped"),
            keras.layers.Conv2DTranspose(5, 2, use_bias=False, name="transposed"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(7, use_bias=False, name="dense"),
        ]
    )
    compiled(model)
    axes = {"depthwise": (2, 3, 0, 1), "dense": (1, 0)}
    in_torch = dict(net.named_parameters())
    # A depthwise weight has another shape in PyTorch, [in * multiplier, 1, h, w], and the same order.
    arrays = {
        layer.name: np.random.default_rng(i).normal(size=in_torch[f"{layer.name}.weight"].shape).astype(np.float32)
        for i, layer in enumerate(trace_layers(model))
    }
    reference = NumpyAdapter(arrays)
    adapters = [
        reference,
        TorchAdapter(net, [], trace_torch(net, torch.zeros(1, 3, 8, 8))),
        KerasAdapter(model, trace_layers(model)),
    ]
    options = {"record_every": 1, "decide_every": 2, "threshold": 0.75, "seed": 5, "patience": 1}
    predictors = [ChangePredictor(make_info(tailored_size=24)) for _ in adapters]
    controllers = [FreezeController(a, p, FreezeOptions(**options)) for a, p in zip(adapters, predictors, strict=True)]
    for _ in range(40):
        reference.train_step()
        with torch.no_grad():
            for name, array in reference.arrays.items():
                in_torch[f"{name}.weight"].copy_(torch.from_numpy(array))
                kernel = model.get_layer(name).weights[0]
                order = axes.get(name, (3, 2, 0, 1))
                kernel.assign(array.reshape([kernel.shape[a] for a in order]).transpose(np.argsort(order)))
        for controller in controllers:
            controller.step()
        samples = [c.state_dict()["history"] for c in controllers]
        for layer in samples[0]:
            np.testing.assert_array_equal(samples[0][layer], samples[1][layer])
            np.testing.assert_array_equal(samples[0][layer], samples[2][layer])
    assert len(controllers[0].frozen) >= 2
    assert repr(controllers[0].events) == repr(controllers[1].events) == repr(controllers[2].events)
    frozen = {layer.name for layer in model.layers if layer.weights and not layer.trainable}
    assert frozen == set(reference.frozen)


@pytest.mark.slow
def test_with_the_predictor_that_ships():
    pytest.importorskip("onnxruntime")
    callback = SmartFRZ("smartfrz-base", threshold=0.01, patience=1, recompile_steps=0)
    fit(make_model(), [callback], epochs=10)
    assert callback.report().num_steps == 80
    assert callback.frozen_layers
    assert all(0 <= event.confidence <= 1 for event in callback.events if event.reason == "below_threshold")


def test_all_options_are_taken_with_their_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(FreezeOptions)}
    parameters = inspect.signature(SmartFRZ).parameters
    assert {name: parameters[name].default for name in defaults} == defaults


def test_dense_layers_that_hold_a_norm_are_layers_and_freeze_with_it():
    class DenseWithNorm(keras.layers.Dense):
        def __init__(self, units, **options):
            super().__init__(units, **options)
            self.norm = keras.layers.BatchNormalization()

        def build(self, shape):
            super().build(shape)
            self.norm.build((None, self.units))

        def call(self, x, training=None):
            return keras.ops.relu(self.norm(super().call(x), training=training))

    inputs = keras.Input((7, 7, 2))
    x = DenseWithNorm(8, name="first")(keras.layers.Flatten()(inputs))
    x = DenseWithNorm(8, name="second")(x)
    model = compiled(keras.Model(inputs, keras.layers.Dense(3, name="head")(x)))
    layers = trace_layers(model, data()[0][:2])
    assert [layer.name for layer in layers] == ["first", "second", "head"]
    assert layers[0].members == ("first", "first/norm")
    assert len(layers[0].weights) == 1
    callback = freezer([{"first": 0.9, "second": 0.1, "head": 0.1}])
    kept = {}

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kept[batch] = {v.path: read(v) for v in self.model.weights}

    fit(model, [callback, Keep()], epochs=1)
    assert callback.frozen_layers == ["first"]
    still = {name for name in kept[7] if np.array_equal(kept[5][name], kept[7][name])}
    assert still == {v.path for v in model.get_layer("first").weights}


@pytest.mark.parametrize("wrapped", [False, True])
def test_flops_of_recurrent_layers_are_counted_for_each_place_of_the_sequence(wrapped):
    inputs = keras.Input((11, 5))
    lstm = keras.layers.LSTM(7, name="lstm")
    x = keras.layers.Bidirectional(lstm, name="both")(inputs) if wrapped else lstm(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    layers = trace_layers(model, np.zeros((2, 11, 5), np.float32))
    assert len(layers) == (3 if wrapped else 2)
    assert [layer.forward_flops for layer in layers[:-1]] == [2 * 11 * 4 * 7 * (5 + 7)] * (len(layers) - 1)


def test_flops_count_every_call_of_a_layer():
    shared = keras.layers.Dense(5, name="shared")
    inputs = keras.Input((5,))
    layers = trace_layers(keras.Model(inputs, keras.layers.Dense(2)(shared(shared(inputs)))))
    assert layers[0].forward_flops == 2 * 2 * 5 * 5


def test_complex_weights_are_read_whole():
    class Spectral(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(3, 4), dtype="complex64", initializer="zeros", name="kernel")

        def call(self, x):
            return keras.ops.real(keras.ops.matmul(keras.ops.cast(x, "complex64"), self.kernel))

    model = compiled(keras.Sequential([keras.Input((3,)), Spectral(name="a"), keras.layers.Dense(2)]))
    values = np.arange(12, dtype=np.float32).reshape(3, 4) * np.complex64(1 + 100j)
    model.get_layer("a").kernel.assign(values)
    adapter = KerasAdapter(model, trace_layers(model))
    assert adapter.num_weights("a") == 24
    expected = np.stack([values.real, values.imag], axis=-1).ravel()
    np.testing.assert_array_equal(adapter.weights("a", np.arange(24)), expected)
    np.testing.assert_array_equal(adapter.weights("a", np.array([3, 10])), expected[[3, 10]])
