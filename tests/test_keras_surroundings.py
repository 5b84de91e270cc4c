"""What the code around the callback does in real scripts; `test_keras_backends.py` runs it on each backend."""

import copy
import pickle

import pytest
from keras_runs import FREEZE_FIRST, WARNINGS, Watch, fit, freezer, make_model
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
