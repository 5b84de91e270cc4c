"""What the code around the callback does in real scripts; `test_keras_backends.py` runs it on each backend."""

import copy
import pickle
import warnings

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
    everything,
    fit,
    freezer,
    make_model,
    read,
)
from numpy_adapter import ScriptedPredictor

from smartfrz.adapters.keras import SmartFRZ

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
