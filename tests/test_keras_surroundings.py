"""What the code around the callback does in real scripts; `test_keras_backends.py` runs it on each backend."""

import copy
import pickle
import warnings

import numpy as np
import pytest
from adapter_contract import same
from keras_runs import (
    BACKEND,
    FREEZE_FIRST,
    FREEZE_TWO,
    LAYERS,
    WARNINGS,
    Watch,
    compiled,
    data,
    everything,
    fit,
    freezer,
    keras,
    make_model,
    mlp,
    not_on_torch,
    read,
)
from numpy_adapter import ScriptedPredictor

from smartfrz.adapters.keras import SmartFRZ
from smartfrz.errors import UnsupportedModelError

pytestmark = WARNINGS


def pickled(callback):
    return pickle.loads(pickle.dumps(callback))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_has_the_options_and_neither_model_nor_run(copied):
    """Keras Tuner copies the callbacks of `search` for every trial."""
    shipped = copied(SmartFRZ(threshold=0.7, record_every=3))
    assert (shipped.options.threshold, shipped.options.record_every) == (0.7, 3)
    assert shipped.predictor.info.name == SmartFRZ().predictor.info.name
    used = freezer(FREEZE_FIRST)
    fit(make_model(), [used], epochs=1)
    fresh = copied(used)
    assert (fresh.options, fresh.layers, fresh.events) == (used.options, [], [])
    assert used.frozen_layers == ["conv1"]
    fit(make_model(), [fresh, watch := Watch()], epochs=1)
    assert len(fresh.events) == 3
    assert watch.moved(1) == ["conv1", "conv2", "head"]
    assert str(fresh.report()).startswith("SmartFRZ froze")


def test_a_copy_continues_the_state_that_was_loaded(tmp_path):
    first = freezer(FREEZE_FIRST)
    fit(make_model(), [first], epochs=1)
    loaded = freezer(predictor=ScriptedPredictor())
    loaded.load_state_dict(first.state_dict())
    again = copy.deepcopy(loaded)
    fit(make_model(), [again], epochs=2, initial_epoch=1)
    assert again.frozen_layers == ["conv1"]
    assert again.report().num_steps == 16


def fit_in_a_loop(model, make, calls=3):
    """Call `fit(epochs=1)` several times; return what was frozen after each call, and the warnings of SmartFRZ."""
    frozen = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(calls):
            callback = make()
            fit(model, [callback], epochs=1)
            frozen.append(callback.frozen_layers)
    return frozen, [str(warning.message) for warning in told if "SmartFRZ" in str(warning.message)]


def test_calls_of_fit_are_one_run_where_its_length_is_given():
    whole = freezer(FREEZE_TWO, total_steps=24)
    fit(first := make_model(), [whole], epochs=3)
    callback = freezer(FREEZE_TWO, total_steps=24)
    frozen, told = fit_in_a_loop(model := make_model(), lambda: callback)
    assert frozen == [["conv1"], ["conv1", "conv2"], ["conv1", "conv2"]]
    assert told == []
    assert repr(callback.events) == repr(whole.events)
    assert callback.report().num_steps == 24
    assert all(same(everything(model, layer), everything(first, layer)) for layer in LAYERS)
    assert all(layer.trainable for layer in model.layers)


def test_calls_of_fit_that_start_over_are_told_once():
    callback = freezer(FREEZE_FIRST)
    _, told = fit_in_a_loop(make_model(), lambda: callback, calls=4)
    assert callback.report().num_steps == 8
    assert len(told) == 1
    assert "without `total_steps` each call of fit() is a run of its own" in told[0]
    _, told = fit_in_a_loop(make_model(), lambda: freezer(FREEZE_FIRST, total_steps=99))
    assert len(told) == 1
    assert "this SmartFRZ did not train it before" in told[0]


@pytest.mark.parametrize("change", ["weights", "optimizer", "trainable", "model"])
def test_another_model_another_optimizer_and_other_weights_begin_another_run(change):
    callback, model = freezer(FREEZE_FIRST, total_steps=24), make_model()
    fit(model, [callback], epochs=1)
    assert callback.frozen_layers == ["conv1"]
    if change == "weights":
        kernel = model.get_layer("conv1").kernel
        kernel.assign(read(kernel) * 2)
    elif change == "optimizer":
        compiled(model)
    elif change == "trainable":
        if BACKEND == "jax":
            pytest.skip("Keras itself needs compile() after a change of `trainable` on JAX")
        model.get_layer("conv2").trainable = model.get_layer("norm2").trainable = False
    else:
        model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, [callback], epochs=1)
    assert callback.report().num_steps == 8
    assert callback.report().user_frozen == ({"conv2"} if change == "trainable" else set())


class Parts(keras.Model):
    """Two models, each with an optimizer of its own that asks it for its variables, as in the usual GAN example."""

    def __init__(self):
        super().__init__()
        self.first, self.second = mlp(5, 6, 6), mlp(6, 6, 3)
        self.own = {"first": keras.optimizers.Adam(0.01), "second": keras.optimizers.SGD(0.01)}

    def call(self, inputs):
        return self.second(self.first(inputs))

    def train_step(self, data):
        for name, optimizer in self.own.items():
            self.update(getattr(self, name), optimizer, data[0])
        return {"steps": 0.0}

    def update(self, part, optimizer, x):
        if BACKEND == "torch":
            self.zero_grad()
            keras.ops.mean(self(x) ** 2).backward()
            gradients = [v.value.grad for v in part.trainable_weights]
            assert gradients
            optimizer.apply(gradients, part.trainable_weights)
            return
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = keras.ops.mean(self(x) ** 2)
        gradients = tape.gradient(loss, part.trainable_weights)
        assert gradients
        optimizer.apply_gradients(zip(gradients, part.trainable_weights, strict=True))


@pytest.mark.skipif(BACKEND == "jax", reason="Keras trains with one optimizer on JAX")
@pytest.mark.parametrize("steps_per_execution", [1, pytest.param(4, marks=not_on_torch)])
def test_one_layer_of_each_part_with_an_optimizer_of_its_own_stays_active(steps_per_execution):
    model = Parts()
    model.compile(steps_per_execution=steps_per_execution)
    sure = dict.fromkeys(["first/a", "first/b", "second/a", "second/b"], 0.9)
    script = [sure, {"first/b": 0.9, "second/b": 0.9}]
    callback = freezer(script, record_every=4)
    fit(model, [callback], epochs=4, inputs=data(shape=(5,)))
    assert callback.frozen_layers == ["first/a", "second/a"]
    assert callback.report().num_steps == 32
    reasons = {event.layer: event.reason for event in callback.events if event.action == "keep"}
    assert reasons == {"first/b": "last_active_layer", "second/b": "last_active_layer"}


@pytest.mark.parametrize("eager", [False, True])
def test_weight_regularizers_of_frozen_layers_stay_in_the_loss(eager):
    losses = []
    for script in ([], [{"a": 0.9, "b": 0.9, "c": 0.1}]):
        model = compiled(mlp(5, 4, 4, 3, kernel_regularizer=keras.regularizers.L2(5.0)), keras.optimizers.SGD(1e-9))
        model.run_eagerly = eager
        callback, inputs = freezer(script), data(shape=(5,))
        history = fit(model, [callback], inputs=inputs, validation_data=inputs)
        assert callback.frozen_layers == (["a", "b"] if script else [])
        losses.append([*history.history["loss"], *history.history["val_loss"], model.evaluate(*inputs, 8, 0)])
        assert "_get_regularization_losses" not in vars(model)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.skipif(BACKEND != "torch", reason="only on PyTorch a Keras model is a module")
def test_a_keras_model_in_a_pytorch_loop_is_named_as_such():
    import torch

    from smartfrz.adapters.torch import SmartFRZ as Other

    model = mlp(5, 4, 3)
    with pytest.raises(UnsupportedModelError, match=r"received Sequential, a Keras model.*smartfrz\.adapters\.keras"):
        Other(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=9)


class Sets(keras.callbacks.Callback):
    """Sets `trainable` of layers at the begin of these epochs."""

    def __init__(self, epochs, trainable, *names):
        super().__init__()
        self.epochs, self.trainable, self.names = epochs, trainable, names

    def on_epoch_begin(self, epoch, logs=None):
        if epoch in self.epochs:
            for layer in self.model.layers:
                if not self.names or layer.name in self.names:
                    layer.trainable = self.trainable
            self.model.make_train_function(force=True)


def thaws(callback):
    return [(event.step, event.layer, event.reason) for event in callback.events if event.action == "thaw"]


def test_a_layer_that_a_callback_makes_trainable_once_is_thawed_and_told(caplog):
    callback, watch = freezer(FREEZE_FIRST), Watch()
    fit(make_model(), [callback, watch, Sets([1], True)], epochs=3)
    assert thaws(callback) == [(12, "conv1", "unfrozen_by_user")]
    assert [watch.moved(step) for step in (6, 8, 11)] == [["conv2", "head"]] * 3
    assert watch.moved(12) == LAYERS
    assert "SmartFRZ had frozen layer 'conv1'" in caplog.text
    assert callback.frozen_layers == []


def test_a_layer_that_is_made_trainable_again_and_again_is_held(caplog):
    callback, watch = freezer(FREEZE_FIRST, record_every=8, decide_every=1, total_steps=8), Watch()
    fit(make_model(), [callback, watch, Sets(range(1, 9), True)], epochs=9)
    assert callback.frozen_layers == ["conv1"]
    assert thaws(callback) == []
    assert {tuple(watch.moved(step)) for step in range(33, 72)} == {("conv2", "head")}
    assert "SmartFRZ keeps layer 'conv1' frozen" in caplog.text


class Writes(keras.callbacks.Callback):
    """Writes to a variable at the end of every batch from the tenth on."""

    def __init__(self, variable):
        super().__init__()
        self.variable, self.batches = variable, 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.batches > 9:
            assert self.model is not None  # on JAX, asking for it gives the variables their values back
            self.variable.assign(self.variable.value + 0.25)


@pytest.mark.parametrize("what", ["weights", "statistics"])
def test_a_frozen_layer_that_moves_later_is_thawed_for_good(what, caplog):
    model = make_model()
    variable = model.get_layer("conv1").kernel if what == "weights" else model.get_layer("norm1").moving_mean
    callback = freezer(FREEZE_FIRST)
    fit(model, [callback, Writes(variable)], epochs=3)
    assert [(layer, why) for _, layer, why in thaws(callback)] == [("conv1", "moved_while_frozen")]
    assert callback.report().moved == ["conv1"]
    assert callback.frozen_layers == []
    assert "SmartFRZ thaws layer 'conv1' and freezes no more of that" in caplog.text


def test_a_layer_that_the_training_script_unfreezes_later_joins():
    model = make_model()
    model.optimizer.build(model.trainable_variables)  # Keras trains no variable that the optimizer was not built with
    model.get_layer("conv1").trainable = model.get_layer("norm1").trainable = False
    callback = freezer(record_every=4)
    if BACKEND == "jax":
        pytest.skip("Keras itself needs compile() after a change of `trainable` on JAX")
    fit(model, [callback, watch := Watch(), Sets([2], True)], epochs=4)
    assert [watch.moved(step) for step in (10, 17)] == [["conv2", "head"], LAYERS]
    assert callback.report().layer_changes == [(20, "joined", "conv1")]
    assert callback.report().user_frozen == set()


def test_flags_that_are_switched_in_every_batch_are_named_where_they_cannot_be_held():
    class Switches(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.trainable = False
            self.model.trainable = True

    if BACKEND == "jax":
        pytest.skip("Keras itself needs compile() after a change of `trainable` on JAX")
    callback = freezer(FREEZE_FIRST)
    with pytest.warns(UserWarning, match="set `trainable` again after the batch had begun"):
        fit(make_model(), [callback, Switches()], epochs=3)
    assert callback.frozen_layers == []
    assert callback.report().moved == ["conv1"]


def test_a_layer_that_joins_at_a_freezing_stage_is_not_said_to_stand_still(caplog):
    model = make_model()
    model.optimizer.build(model.trainable_variables)
    model.get_layer("conv1").trainable = model.get_layer("norm1").trainable = False
    callback = freezer(record_every=12, decide_every=2)
    if BACKEND == "jax":
        pytest.skip("Keras itself needs compile() after a change of `trainable` on JAX")
    fit(model, [callback, Sets([2], True)], epochs=4)
    assert callback.report().layer_changes == [(24, "joined", "conv1")]
    assert {event.layer for event in callback.events if event.reason == "not_trained"} == {"conv1"}
    assert "have not moved" not in caplog.text


def test_what_the_learning_rate_does_not_train_is_never_frozen_as_converged(caplog):
    callback = freezer([dict.fromkeys(LAYERS, 0.9)])
    fit(make_model(keras.optimizers.SGD(0.0)), [callback])
    assert callback.frozen_layers == []
    assert {event.reason for event in callback.events} == {"not_trained"}
    assert caplog.text.count("the learning rate of these weights is 0") == 1


def test_what_has_never_moved_is_never_frozen_as_converged(caplog):
    layers = mlp(5, 4, 4, 3).layers
    stop = keras.layers.Lambda(lambda x: keras.ops.stop_gradient(x))
    model = compiled(keras.Sequential([keras.Input((5,)), layers[0], stop, *layers[1:]]), keras.optimizers.SGD(0.05))
    callback = freezer([{"b": 0.9, "c": 0.1}])
    fit(model, [callback], inputs=data(shape=(5,)))
    assert callback.frozen_layers == ["b"]
    assert {event.reason for event in callback.events if event.layer == "a"} == {"not_trained"}
    assert caplog.text.count("layer 'a' as converged, since these weights have not moved") == 1


def test_a_model_with_one_layer_trains_and_nothing_freezes():
    callback = freezer()
    fit(compiled(mlp(5, 3)), [callback], inputs=data(shape=(5,)))
    assert (callback.frozen_layers, callback.report().num_steps) == ([], 16)
