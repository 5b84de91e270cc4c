"""Weights that are read while a GPU goes on: decisions come one step after the record. Forced on the CPU here.

What only a GPU can show is in test_cuda.py.
"""

import copy
import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
from numpy_adapter import ChangePredictor, NumpyAdapter, ScriptedPredictor

from smartfrz.baselines import LinearFreezing
from smartfrz.control.controller import FreezeController
from smartfrz.control.options import FreezeOptions
from smartfrz.errors import StateError

SIZES = {"a": 40, "b": (5, 4), "c": 3}
SIX = {f"layer{index}": 30 for index in range(6)}


class LaterAdapter(NumpyAdapter):
    """Copies at once what it begins to read, and hands it out when it is asked for, as `TorchAdapter` does on a GPU.

    Attributes:
        asked: How many answers were asked for.
    """

    reads_later = True
    asked = 0

    def tailored_later(self, positions):
        return self._later(self.tailored(positions))

    def disturbed_later(self, layers):
        return self._later(self.disturbed(layers))

    def _later(self, answer):
        def ask():
            self.asked += 1
            return answer

        return ask


def controller_of(adapter, predictor=None, **options):
    defaults = {"record_every": 3, "decide_every": 2, "patience": 2, "threshold": 0.45}
    return FreezeController(adapter, predictor or ChangePredictor(), FreezeOptions(**defaults | options))


def run(controller, adapter, steps):
    found = []
    for _ in range(steps):
        adapter.train_step()
        found.append(controller.step())
    return found


def scripted(*stages, sizes=SIZES, **options):
    """A later adapter under a controller that records every second step and decides at every second record."""
    adapter, predictor = LaterAdapter.random(sizes), ScriptedPredictor(list(stages))
    return controller_of(adapter, predictor, **{"record_every": 2, "patience": 1, "threshold": 0.5} | options), adapter


def restored(adapter):
    fresh = type(adapter)(adapter.arrays)
    fresh.velocity = copy.deepcopy(adapter.velocity)
    return fresh


@pytest.mark.parametrize("record_every", [1, 2, 3])
def test_what_is_recorded_is_the_same_and_each_decision_comes_one_step_later(record_every):
    runs = []
    for make in (NumpyAdapter, LaterAdapter):
        adapter, predictor = make.random(SIX, seed=3), ScriptedPredictor()
        predictor.predict = _noting(ChangePredictor(), predictor.calls)
        controller = controller_of(adapter, predictor, record_every=record_every, dry_run=True)
        returned = run(controller, adapter, 60)
        assert repr([d for decisions in returned for d in decisions]) == repr(controller.events)
        runs.append((controller, predictor.calls))
    (plain, calls), (later, later_calls) = runs
    assert any(event.action == "would_freeze" for event in plain.events)
    moved = [replace(event, step=event.step + 1) for event in plain.events if event.step < 60]
    assert repr(later.events) == repr(moved)  # repr: NaN differs from itself
    for (history, lengths), (others, other_lengths) in zip(calls, later_calls, strict=False):
        np.testing.assert_array_equal(history, others)
        np.testing.assert_array_equal(lengths, other_lengths)


def _noting(predictor, calls):
    def predict(history, lengths):
        calls.append((history.copy(), lengths.copy()))
        return predictor.predict(history, lengths)

    return predict


def test_a_layer_freezes_one_step_after_the_record_and_until_then_nothing_is_asked_for():
    controller, adapter = scripted({"a": 0.9, "b": 0.1, "c": 0.1})
    run(controller, adapter, 4)
    assert (controller.num_records, adapter.asked, controller.events, adapter.frozen) == (2, 1, [], set())
    (decisions,) = run(controller, adapter, 1)
    assert [(d.step, d.timestamp, d.layer, d.action) for d in decisions] == [
        (5, 1, "a", "freeze"),
        (5, 1, "b", "keep"),
        (5, 1, "c", "keep"),
    ]
    assert adapter.frozen == {"a"}
    assert controller.frozen == {"a": 5}


@pytest.mark.parametrize(("record_every", "expected"), [(1, range(2, 11)), (2, [3, 5, 7, 9, 10])])
def test_layers_are_looked_at_once_after_each_record(monkeypatch, record_every, expected):
    controller, adapter = scripted(total_steps=10, record_every=record_every)
    looks, looked = [], []
    monkeypatch.setattr(adapter, "find_layers", lambda: looks.append(controller.num_steps) or list(SIZES))
    for _ in range(10):
        run(controller, adapter, 1)
        looked.append(controller.just_looked)
    assert [step for step, just_looked in enumerate(looked, 1) if just_looked] == list(expected) == looks


@pytest.mark.parametrize("record_every", [1, 2])
def test_at_the_last_step_of_the_run_decisions_come_at_once(record_every):
    adapter = LaterAdapter.random(SIZES)
    script = [dict.fromkeys("abc", 0.1)] * (4 // record_every - 1) + [{"a": 0.9, "b": 0.1, "c": 0.1}]
    controller = controller_of(
        adapter, ScriptedPredictor(script), record_every=record_every, patience=1, threshold=0.5, total_steps=8
    )
    run(controller, adapter, 8)
    assert controller.frozen == {"a": 8}
    assert "due" not in controller.state_dict()


def test_a_policy_that_reads_no_weights_decides_at_once():
    frozen = []
    for make in (NumpyAdapter, LaterAdapter):
        adapter = make.random(SIX, seed=3)
        controller = FreezeController(adapter, LinearFreezing(0.2, anneal=False), FreezeOptions(total_steps=60))
        run(controller, adapter, 60)
        frozen.append(controller.frozen)
    assert frozen[0] == frozen[1] != {}


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 12, 13, 18, 24, 30, 36, 59])
@pytest.mark.parametrize("record_every", [1, 3])
def test_a_run_resumed_between_record_and_decision_decides_as_an_uninterrupted_one(record_every, stop):
    options = {"record_every": record_every, "total_steps": 60}
    whole_adapter, first_adapter = (LaterAdapter.random(SIX, seed=3) for _ in range(2))
    whole, first = (controller_of(adapter, **options) for adapter in (whole_adapter, first_adapter))
    run(whole, whole_adapter, 60)
    assert len(set(whole.frozen.values())) >= 2, "the case shall freeze at several stages"
    run(first, first_adapter, stop)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    assert ("due" in state) == (stop > 0 and stop % record_every == 0)
    second_adapter = restored(first_adapter)
    second = controller_of(second_adapter, **options)
    second.load_state_dict(state)
    run(second, second_adapter, 60 - stop)
    assert repr(second.events) == repr(whole.events)
    assert second.frozen == whole.frozen
    for name, array in whole_adapter.arrays.items():
        np.testing.assert_array_equal(second_adapter.arrays[name], array)
    np.testing.assert_equal(
        {**second.state_dict(), "decision_seconds": 0, "sha256": ""},
        {**whole.state_dict(), "decision_seconds": 0, "sha256": ""},
    )


def test_saving_between_record_and_decision_leaves_the_run_as_it_is():
    runs = []
    for saves in (False, True):
        adapter = LaterAdapter.random(SIX, seed=3)
        controller = controller_of(adapter)
        for _ in range(60):
            run(controller, adapter, 1)
            if saves:
                controller.state_dict()
        runs.append(controller)
    assert repr(runs[0].events) == repr(runs[1].events)
    assert runs[0].frozen


def test_a_state_from_a_gpu_is_decided_about_once_on_a_cpu():
    controller, adapter = scripted({"a": 0.9, "b": 0.1, "c": 0.1})
    run(controller, adapter, 4)
    state = controller.state_dict()
    assert state["due"] == "stage"
    here, predictor = NumpyAdapter(adapter.arrays), ScriptedPredictor([{"a": 0.9, "b": 0.1, "c": 0.1}])
    resumed = controller_of(here, predictor, record_every=2, patience=1, threshold=0.5)
    resumed.load_state_dict(state)
    run(resumed, here, 4)
    assert resumed.frozen == {"a": 5}
    assert sorted({event.step for event in resumed.events}) == [5, 8]


def test_what_was_due_is_forgotten_with_the_records_if_the_pace_changes(caplog):
    controller, adapter = scripted()
    run(controller, adapter, 4)
    state = controller.state_dict()
    resumed, other = scripted(record_every=3)
    resumed.load_state_dict(state)
    run(resumed, other, 1)
    assert resumed.events == []
    assert resumed.state_dict()["history"] == {}


@pytest.mark.parametrize("due", ["now", "", None, 1])
def test_a_state_with_something_else_due_is_refused(due):
    controller, adapter = scripted()
    run(controller, adapter, 4)
    with pytest.raises(StateError, match=r"controller\['due'\].*expected one of look, stage"):
        controller.check_state(controller.state_dict() | {"due": due})


def test_a_thaw_drops_the_decision_that_was_due():
    stages = {"a": 0.9, "b": 0.1, "c": 0.1}, {"b": 0.9, "c": 0.1}, {"a": 0.1, "b": 0.9, "c": 0.1}
    controller, adapter = scripted(*stages)
    run(controller, adapter, 8)  # a froze at step 5; b would at step 9, from what was recorded while a was frozen
    controller.thaw(["a"])
    run(controller, adapter, 4)
    assert (controller.frozen, adapter.frozen) == ({}, set())
    assert [(event.step, event.action) for event in controller.acts] == [(5, "freeze"), (8, "thaw")]


@pytest.mark.parametrize("layers", [None, ["a"]])
def test_a_thaw_drops_the_decision_that_was_due_where_nothing_is_frozen_yet(layers):
    controller, adapter = scripted({"a": 0.9, "b": 0.1, "c": 0.1}, dict.fromkeys("abc", 0.1))
    run(controller, adapter, 4)
    assert controller.thaw(layers) == []
    run(controller, adapter, 3)
    assert (controller.events, adapter.frozen, controller.num_records) == ([], set(), 3)


@pytest.mark.parametrize("raised_at", [3, 4, 5])
def test_a_learning_rate_that_is_raised_before_the_first_decision_drops_it(raised_at):
    """Without reading later: a layer that froze at the step at which the rate is raised is thawed at that step."""
    acts = []
    for make in (NumpyAdapter, LaterAdapter):
        adapter = make.random(SIZES)
        predictor = ScriptedPredictor([{"a": 0.9, "b": 0.1, "c": 0.1}, dict.fromkeys("abc", 0.1)])
        controller = controller_of(
            adapter, predictor, record_every=2, patience=1, threshold=0.5, thaw_on_restart=True, total_steps=100
        )
        for step in range(1, 8):
            run(controller, adapter, 1)
            controller.observe_learning_rates([1.0 if step >= raised_at else 0.01])
        acts.append([event.action for event in controller.acts])
        assert adapter.frozen == ({"a"} if raised_at == 3 else set())
    assert acts == {3: [["freeze"]] * 2, 4: [["freeze", "thaw"], []], 5: [["freeze", "thaw"]] * 2}[raised_at]


def test_layers_that_come_and_go_between_record_and_decision():
    adapter = LaterAdapter({name: np.ones(size, np.float32) for name, size in SIZES.items()} | {"d": np.ones(3)}, "abc")
    predictor = ScriptedPredictor([{"b": 0.9, "c": 0.1}])
    controller = controller_of(adapter, predictor, record_every=2, patience=1, threshold=0.5)
    run(controller, adapter, 4)
    adapter.trained = set("bcd")  # the user freezes a, and unfreezes d
    run(controller, adapter, 1)
    found = {event.layer: (event.action, event.reason) for event in controller.events}
    assert found == {"b": ("freeze", "confident"), "c": ("keep", "below_threshold"), "d": ("keep", "history_too_short")}
    assert controller.layer_changes == [(5, "joined", "d"), (5, "left", "a")]
    assert set(controller.state_dict()["history"]) == {"c"}


@pytest.mark.parametrize("thawed", [False, True])
def test_a_frozen_layer_that_moves_is_found_as_it_was_at_the_record(thawed, caplog):
    controller, adapter = scripted({"a": 0.9, "b": 0.1, "c": 0.1})
    run(controller, adapter, 6)
    adapter.decays = {"a"}  # from the seventh step on, after the record
    run(controller, adapter, 2)
    assert controller.frozen == {"a": 5}
    if not thawed:
        run(controller, adapter, 1)
        assert [(e.step, e.action, e.since) for e in controller.acts] == [(5, "freeze", None), (9, "thaw", 6)]
        assert "between step 6 and step 9" in caplog.text
        return
    controller.thaw()  # before what was found is asked for
    with caplog.at_level(logging.WARNING):
        run(controller, adapter, 1)
    assert [(event.step, event.action, event.reason) for event in controller.acts[1:]] == [(8, "thaw", "by_hand")]
    assert not caplog.records
