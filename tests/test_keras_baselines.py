"""Baselines in Keras, those that leave the optimizer alone; `test_keras_backends.py` runs it on each backend."""

import numpy as np
import pytest
from adapter_contract import same
from keras_runs import LAYERS, WARNINGS, Watch, everything, fit, keras, make_model

from smartfrz.adapters.keras import SmartFRZ
from smartfrz.baselines import AutoFreeze, FullTraining, GradES, LinearFreezing, WeightChange
from smartfrz.errors import UnsupportedModelError

pytestmark = WARNINGS
STEPS = 32  # four epochs


def run(policy, model=None, epochs=4, **options):
    model = model or make_model()
    callback = SmartFRZ(policy, recompile_steps=0, **options)
    watch = Watch()
    history = fit(model, [callback, watch], epochs=epochs).history
    return callback, watch, history["loss"]


def test_full_training_is_training_without_a_callback():
    callback, _, losses = run(FullTraining())
    plain = make_model()
    assert losses == fit(plain, [], epochs=4).history["loss"]
    assert all(same(everything(callback.model, layer), everything(plain, layer)) for layer in LAYERS)
    assert callback.report().frozen == {}
    assert len(callback.events) == STEPS * len(LAYERS)


def test_layers_that_change_little_freeze_and_stay_as_they_are():
    limit = 0.15
    policy = WeightChange(limit=limit, tailored_size=72)
    callback, watch, losses = run(policy, record_every=2, decide_every=2, patience=1)
    frozen = callback.report().frozen
    assert frozen
    assert np.isfinite(losses).all()
    for event in callback.events:
        if event.reason in ("confident", "below_threshold"):
            assert (event.confidence >= 0.5) == (event.reason == "confident")
    for layer, step in frozen.items():
        assert same(watch.layers[step][layer], watch.layers[-1][layer])
        assert not same(watch.layers[step - 2][layer], watch.layers[step - 1][layer])


def test_layers_freeze_at_their_moments_under_the_learning_rate_of_fit():
    callback, watch, _ = run(LinearFreezing(0.25, anneal=False), record_every=1)
    # On a backend that compiles, four stages of the run may freeze: every eighth step.
    grouped = {event.reason for event in callback.events} & {"grouped"}
    assert callback.report().frozen == ({"conv1": 8, "conv2": 24} if grouped else {"conv1": 8, "conv2": 20})
    assert same(watch.layers[8]["conv1"], watch.layers[-1]["conv1"])


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("policy", [WeightChange(limit=0.15, tailored_size=72), LinearFreezing(0.3, anneal=False)])
def test_a_resumed_run(policy, stop):
    options = {"record_every": 2, "decide_every": 2, "patience": 1, "total_steps": STEPS, "recompile_steps": 0}
    model, whole, watch = make_model(), SmartFRZ(policy, **options), Watch()
    fit(model, [whole, watch], epochs=4)

    model, first, states = make_model(), SmartFRZ(policy, **options), []
    save = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: states.append(first.state_dict()))
    fit(model, [first, save], epochs=stop)
    second = SmartFRZ(policy, **options)
    second.load_state_dict(states[-1])
    fit(model, [second], epochs=4, initial_epoch=stop)
    assert repr(second.events) == repr(whole.events)  # repr: NaN differs from itself
    assert second.report().frozen == whole.report().frozen != {}
    assert all(same(everything(model, layer), watch.layers[-1][layer]) for layer in LAYERS)


@pytest.mark.parametrize(
    ("policy", "method"),
    [
        (LinearFreezing(), "set_lr_scale"),
        (AutoFreeze(epochs=2), "gradient_norm"),
        (GradES(1.0), "gradient_changes"),
    ],
)
def test_policies_that_reach_into_the_optimizers_steps_are_refused(policy, method):
    with pytest.raises(UnsupportedModelError, match=rf"`{method}`, which KerasAdapter does not have"):
        run(policy)
