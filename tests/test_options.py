import dataclasses
import inspect

import numpy as np
import pytest

from smartfrz.baselines import FullTraining
from smartfrz.control.options import FreezeOptions


def test_options_cannot_be_altered():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FreezeOptions().seed = 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 2.5}, "`total_steps` is 2.5; expected an integer of at least 1"),
        ({"record_every": 0}, "`record_every` is 0; expected an integer"),
        ({"threshold": 1.5}, r"`threshold` is 1.5; expected a confidence in \(0, 1\]"),
        ({"freeze_order": "backwards"}, "`freeze_order` is 'backwards'; expected one of free, prefix, cost_aware"),
        ({"norm_batches": -1}, "`norm_batches` is -1; expected 0 or more"),
        ({"total_steps": True}, "`total_steps` is True; expected an integer of at least 1"),
        ({"threshold": "0.9"}, r"`threshold` is '0.9'; expected a confidence in \(0, 1\]"),
        ({"norm_batches": None}, "`norm_batches` is None; expected 0 or more"),
        ({"norm_batches": 2.5}, "`norm_batches` is 2.5; expected 0 or more"),
        ({"seed": None}, "`seed` is None; expected an integer of at least 0"),
        ({"seed": -1}, "`seed` is -1; expected an integer of at least 0"),
    ],
)
def test_bad_values_are_refused_before_there_is_a_policy(options, message):
    with pytest.raises(ValueError, match=message):
        FreezeOptions(**options)


def test_what_a_policy_says_is_checked_too():
    policy = FullTraining()
    policy.threshold = 0.0
    with pytest.raises(ValueError, match=r"`threshold` is 0\.0"):
        FreezeOptions(total_steps=10).schedule(policy)


def test_a_schedule_holds_no_numbers_of_numpy():
    options = FreezeOptions(record_every=np.int64(3), threshold=np.float32(0.5))
    schedule = options.schedule(FullTraining())
    assert {type(value) for value in schedule} == {int, float, str}


def test_all_options_are_taken_with_their_defaults():
    """The signature is spelled out in each adapter; `test_keras_adapter.py` has the same test."""
    defaults = {field.name: field.default for field in dataclasses.fields(FreezeOptions)}
    torch_adapter = pytest.importorskip("smartfrz.adapters.torch", exc_type=ImportError)
    parameters = inspect.signature(torch_adapter.SmartFRZ).parameters
    assert {name: parameters[name].default for name in defaults} == defaults
