"""Saved states that something damaged: each is refused, or goes on exactly as it was saved, and nothing changes before."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_adapter import ScriptedPredictor
from test_controller import controller_of, run

from smartfrz.control.state import check_extent, sealed
from smartfrz.errors import StateError


class HalfSure(ScriptedPredictor):
    """Is sure of the first layer that it is asked about, and of no other one."""

    def predict(self, history, lengths):
        confidence = np.array([[0.1, 0.9]] + [[0.9, 0.1]] * (len(history) - 1))
        return confidence, np.zeros(history.shape[:2])


def new_controller():
    return controller_of(predictor=HalfSure([]))


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "a", "zzz", "freeze", "free"])
    | st.just([])
    | st.just({})
    | st.just(np.zeros((2, 3), np.float32))
    | st.just(np.array(["text"]))
)


def saved_state():
    controller, adapter, _ = new_controller()
    run(controller, adapter, 6)
    controller.observe_learning_rates([0.1, 0.2])
    return controller.state_dict()


STATE = saved_state()


def places(value, place=()):
    """Every place of a state, from its keys inwards."""
    if place:
        yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*place, key))


PLACES = [place for place in places(STATE) if place != ("sha256",)]


def changed(place, change, state=STATE):
    """A copy of the state in which `change(container, key)` was called for one place."""
    state = copy.deepcopy(state)
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    change(inner, place[-1])
    return state


@st.composite
def mutated(draw):
    place = draw(st.sampled_from(PLACES))
    if draw(st.integers(0, 4)) == 0:
        return changed(place, lambda container, key: container.pop(key))
    value = draw(VALUES)
    return changed(place, lambda container, key: container.__setitem__(key, value))


def assert_refused_without_a_change(state):
    controller, adapter, _ = new_controller()
    before = controller.state_dict(), set(adapter.frozen)
    with pytest.raises(StateError):
        controller.load_state_dict(state)
    np.testing.assert_equal((controller.state_dict(), adapter.frozen), before)


def same(one, other):
    """Whether two states are equal, where lists may be tuples; NaN equals NaN, but 1 is not True and not 1.0."""
    return repr_of(one) == repr_of(other)


def repr_of(value):
    return json.dumps(
        value, default=lambda array: [array.dtype.str, array.shape, array.tobytes().hex()], sort_keys=True
    )


@settings(max_examples=1000, deadline=None)
@given(mutated())
def test_a_change_is_noticed_and_changes_nothing(state):
    if same(state, STATE):
        controller, *_ = new_controller()
        controller.load_state_dict(state)
        assert same(controller.state_dict(), STATE)
    else:
        assert_refused_without_a_change(state)


@settings(max_examples=500, deadline=None)
@given(mutated())
def test_a_change_under_a_new_digest_is_refused_or_can_be_trained_on(state):
    state = sealed(state)
    controller, adapter, _ = new_controller()
    before = controller.state_dict(), set(adapter.frozen)
    try:
        controller.load_state_dict(state)
    except StateError:
        np.testing.assert_equal((controller.state_dict(), adapter.frozen), before)
        return
    assert adapter.frozen == set(controller.frozen) or controller.dry_run
    run(controller, adapter, 3)
    controller.state_dict()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("events", 0, "step"), r"\['events'\]\[0\]\['step'\] is 7; expected at most 6"),
        (("frozen", "a"), r"\['frozen'\]\['a'\] is 7; expected \d, as its events say"),
    ],
)
def test_steps_that_have_not_come_yet_are_refused_under_a_new_digest(place, message):
    state = sealed(changed(place, lambda container, key: container.__setitem__(key, 7)))
    with pytest.raises(StateError, match=message):
        new_controller()[0].load_state_dict(state)
    assert_refused_without_a_change(state)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("frozen",), {}, r"\['frozen'\] is \[\]; expected 'a' among these, as its events say"),
        (("events", 0, "action"), "thaw", r"\['frozen'\]\['a'\] is \d; expected None, as its events say"),
        (("num_records",), 7, r"\['num_records'\] is 7; expected at most 6, the steps so far"),
        (("num_records",), 3, r"\['events'\]\[3\]\['timestamp'\] is 3; expected less than 3, the records so far"),
        (("looked_at",), 7, r"\['looked_at'\] is 7; expected at most 6"),
    ],
)
def test_what_does_not_go_together_is_refused_under_a_new_digest(place, value, message):
    state = sealed(changed(place, lambda container, key: container.__setitem__(key, value)))
    with pytest.raises(StateError, match=message):
        new_controller()[0].load_state_dict(state)
    assert_refused_without_a_change(state)


@pytest.mark.parametrize("bit", [0, 7, 77, 200])
def test_a_flipped_bit_of_the_history_is_noticed(bit):
    state = copy.deepcopy(STATE)
    content = state["history"]["c"].view(np.uint8).reshape(-1)
    content[bit // 8] ^= 1 << bit % 8
    assert_refused_without_a_change(state)


def test_a_detour_over_json_is_no_change():
    history = STATE["history"]
    state = json.loads(json.dumps({key: value for key, value in STATE.items() if key != "history"}))
    controller, *_ = new_controller()
    controller.load_state_dict(state | {"history": dict(reversed(history.items()))})
    assert same(controller.state_dict(), STATE)


# place, value, part of the message
MESSAGES = [
    (("num_steps",), -1, r"damaged: controller\['num_steps'\] is -1; expected an integer from 0\. Resume from another"),
    (("num_steps",), "6", r"\['num_steps'\] is '6'; expected an integer"),
    (("num_steps",), True, r"\['num_steps'\] is True; expected an integer"),
    (("total_steps",), 0, r"\['total_steps'\] is 0; expected None, or an integer from 1"),
    (("schedule", "threshold"), math.nan, r"\['schedule'\]\['threshold'\] is nan; expected a confidence in \(0, 1\]"),
    (("schedule", "freeze_order"), "back", r"is 'back'; expected one of free, prefix, cost_aware"),
    (
        ("events", 0, "confidence"),
        1.5,
        r"\['events'\]\[0\]\['confidence'\] is 1\.5; expected NaN, or a number from 0 to 1",
    ),
    (("events", 0, "action"), "melt", r"\['action'\] is 'melt'; expected one of freeze, "),
    (("frozen",), {"zzz": 1}, r"\['frozen'\] is \['zzz'\]; expected names of its layers"),
    (("learning_rates",), [[0.1]], r"\['learning_rates'\] is \[\[0\.1\]\]; expected a list of 2"),
    (("decision_seconds",), math.inf, r"\['decision_seconds'\] is inf; expected a number"),
    (("decision_seconds",), 10**400, r"\['decision_seconds'\] is 10+; expected a number"),
    (("learning_rates",), [[-(10**400)], []], r"\['learning_rates'\]\[0\]\[0\] is -10+; expected a number"),
    (("num_records",), 5, r"\['sha256'\] is '[0-9a-f]{64}'; expected the SHA-256 of the values that were saved"),
    (("sha256",), None, r"\['sha256'\] is None; expected the SHA-256"),
]


@pytest.mark.parametrize(("place", "value", "message"), MESSAGES)
def test_the_message_names_what_is_wrong(place, value, message):
    state = changed(place, lambda container, key: container.__setitem__(key, value))
    with pytest.raises(StateError, match=message):
        new_controller()[0].load_state_dict(state)


def test_a_missing_value_is_named():
    state = {key: value for key, value in STATE.items() if key != "frozen"}
    with pytest.raises(StateError, match=r"controller is \['costs', .*; expected the key 'frozen' among these"):
        new_controller()[0].load_state_dict(state)


@pytest.mark.parametrize("place", [("schedule",), ("events", 0), ()])
@pytest.mark.parametrize("name", ["colour", "_policy", "check_state"])
def test_what_a_later_version_adds_is_left_alone(place, name):
    state = copy.deepcopy(STATE)
    inner = state
    for key in place:
        inner = inner[key]
    inner[name] = "red"
    controller, adapter, _ = new_controller()
    controller.load_state_dict(sealed(state))
    assert same(controller.state_dict(), STATE)
    run(controller, adapter, 3)


def endless(kind):
    value = []
    if kind == "holds itself":
        value.append({"a": [value]})
        return value
    rows = [value]
    for _ in range(40 if kind == "shared" else 60):
        value = [value, value] if kind == "shared" else [value]
        rows.append(value)
    return rows if kind == "known before it is deep" else value


@pytest.mark.parametrize("kind", ["holds itself", "shared", "deep", "known before it is deep"])
def test_what_unfolds_without_end_is_refused(kind):
    for state in (endless(kind), {"started": endless(kind)}, {"controller": {"later": endless(kind)}}):
        with pytest.raises(StateError, match="hold themselves, that are nested more than 50 deep, or"):
            check_extent(state)
    check_extent(STATE)


@pytest.mark.parametrize("kind", ["holds itself", "shared"])
def test_pytorch_reads_what_unfolds_without_end_and_it_is_refused(kind, tmp_path):
    torch = pytest.importorskip("torch")
    from smartfrz.adapters.torch.saved import check_saved

    torch.save({"started": True, "later": endless(kind)}, tmp_path / "state.pt")
    with pytest.raises(StateError, match="hold themselves"):
        check_saved(torch.load(tmp_path / "state.pt", weights_only=True))
