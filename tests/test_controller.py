import copy
import dataclasses
import logging
import math
import pickle

import numpy as np
import pytest
from adapter_contract import AdapterContract, Case
from numpy_adapter import ChangePredictor, NumpyAdapter, ScriptedPredictor, make_info

from smartfrz.control.controller import FreezeController
from smartfrz.control.learned import RECORDS_PER_STAGE, LearnedPolicy
from smartfrz.control.options import FreezeOptions
from smartfrz.control.ordering import LayerCost
from smartfrz.control.report import Report
from smartfrz.control.tailoring import tailoring_positions
from smartfrz.errors import StateError, UnsupportedModelError

SIZES = {"a": 40, "b": (5, 4), "c": 3}

# total_steps, record_fraction -> steps between two records
SCHEDULES = [
    (1000, 0.02, 20),
    (1000, 0.0125, 12),
    (33, 0.1, 3),
    (10, 0.02, 1),
    (1, 1.0, 1),
]
BAD_ARGUMENTS = [
    ({}, "neither `total_steps` nor `record_every`. Pass total_steps=len"),
    ({"total_steps": 0}, "`total_steps` is 0; expected an integer of at least 1"),
    ({"record_every": 0}, "`record_every` is 0; expected an integer of at least 1"),
    ({"record_every": 1, "decide_every": 0}, "`decide_every` is 0; expected an integer of at least 1"),
    ({"record_every": 1, "patience": 0}, "`patience` is 0; expected an integer of at least 1"),
    ({"record_every": 1, "threshold": 0.0}, r"`threshold` is 0.0; expected a confidence in \(0, 1\]"),
    ({"record_every": 1, "threshold": 50}, r"`threshold` is 50; expected a confidence in \(0, 1\]"),
    ({"record_every": 1, "threshold": math.nan}, "`threshold` is nan; expected"),
]


def controller_of(script=(), adapter=None, **options):
    """A controller on three layers that records at every step and decides at every second one."""
    adapter = adapter or NumpyAdapter.random(SIZES)
    predictor = options.pop("predictor", None) or ScriptedPredictor(list(script))
    return (
        FreezeController(
            adapter, predictor, FreezeOptions(**{"record_every": 1, "decide_every": 2, "patience": 1} | options)
        ),
        adapter,
        predictor,
    )


def run(controller, adapter, steps):
    for _ in range(steps):
        adapter.train_step()
        controller.step()


def actions(controller):
    """Layer to action, for each freezing stage so far."""
    stages = {}
    for event in controller.events:
        stages.setdefault(event.step, {})[event.layer] = event.action
    return stages


class TestNumpyAdapter(AdapterContract):
    @pytest.fixture
    def case(self):
        adapter = NumpyAdapter.random(SIZES)
        return Case(
            adapter,
            list(SIZES),
            everything=lambda layer: [adapter.arrays[layer].copy()],
            flat_weights=lambda layer: adapter.arrays[layer].ravel().copy(),
            train_step=adapter.train_step,
        )

    dtypes = ("float16",)  # NumPy has no bfloat16

    def half(self, dtype):
        array = np.random.default_rng(0).normal(size=(3, 4)).astype(dtype)
        return NumpyAdapter({"a": array}), "a", array.ravel().astype(np.float32)


@pytest.mark.parametrize(("total_steps", "fraction", "expected"), SCHEDULES)
def test_the_schedule_follows_from_total_steps(total_steps, fraction, expected):
    predictor = ScriptedPredictor(info=make_info(record_fraction=fraction))
    options = FreezeOptions(total_steps=total_steps)
    controller = FreezeController(NumpyAdapter.random(SIZES), predictor, options)
    assert controller.record_every == options.schedule(LearnedPolicy(predictor)).record_every == expected
    assert controller.decide_every == RECORDS_PER_STAGE


def test_records_and_stages_come_when_the_schedule_says():
    controller, adapter, predictor = controller_of(record_every=4, decide_every=3, total_steps=10**6)
    run(controller, adapter, 50)
    assert controller.num_steps == 50
    assert controller.num_records == 12
    assert sorted({event.step for event in controller.events}) == [12, 24, 36, 48]
    assert sorted({event.timestamp for event in controller.events}) == [2, 5, 8, 11]
    assert [lengths.tolist() for _, lengths in predictor.calls] == [[3] * 3, [6] * 3, [9] * 3, [10] * 3]


def test_the_predictor_sees_the_sampled_weights_oldest_first():
    controller, adapter, predictor = controller_of(seed=7)
    positions = {n: tailoring_positions(n, adapter.num_weights(n), 8, seed=7) for n in SIZES}
    seen = []
    for _ in range(12):
        adapter.train_step()
        seen.append([adapter.weights(n, positions[n]) for n in SIZES])
        controller.step()
    history, _ = predictor.calls[-1]
    np.testing.assert_array_equal(history, np.array(seen[-10:]).swapaxes(0, 1))


def test_steps_return_the_decisions_of_a_stage_and_nothing_between():
    controller, _, _ = controller_of([{"a": 0.9, "b": 0.2, "c": 0.1}])
    assert controller.step() == []
    decisions = controller.step()
    assert [(d.layer, d.action, d.confidence) for d in decisions] == [
        ("a", "freeze", pytest.approx(0.9)),
        ("b", "keep", pytest.approx(0.2)),
        ("c", "keep", pytest.approx(0.1)),
    ]
    assert controller.events == decisions


@pytest.mark.parametrize(("steps_per_change", "frozen"), [(0.0, {"a": 2}), (1.9, {"a": 2}), (2.1, {}), (100.0, {})])
def test_nothing_freezes_that_saves_less_than_changing_the_frozen_set_costs(steps_per_change, frozen):
    script = [{"a": 0.9, "b": 0.2, "c": 0.1}]
    controller, adapter, _ = controller_of(script, total_steps=10)
    controller.set_costs({"a": LayerCost(1, 1, 1), "b": LayerCost(1, 1, 1), "c": LayerCost(1, 1, 1)})
    controller.set_change_cost(steps_per_change)
    run(controller, adapter, 2)
    # Of 3 forward and 5 backward, two are saved (the gradients of a and of b's input) in each of 8 steps: 2 steps.
    assert controller.frozen == frozen
    assert controller.events[0].reason == ("confident" if frozen else "grouped")


def test_without_costs_or_a_length_of_the_run_everything_pays():
    for options, costs in (({}, dict.fromkeys("abc", LayerCost(1, 1, 1))), ({"total_steps": 10}, {})):
        controller, adapter, _ = controller_of([{"a": 0.9, "b": 0.2, "c": 0.1}], **options)
        controller.set_costs(costs)
        controller.set_change_cost(1000.0)
        run(controller, adapter, 2)
        assert controller.frozen == {"a": 2}


def test_frozen_layers_are_neither_recorded_nor_asked_about():
    script = [{"a": 0.1, "b": 0.9, "c": 0.1}, {"a": 0.1, "c": 0.1}]
    controller, adapter, predictor = controller_of(script)
    run(controller, adapter, 4)
    assert controller.active == ["a", "c"]
    assert controller.frozen == {"b": 2}
    assert adapter.frozen == {"b"}
    assert len(predictor.calls) == 2
    assert set(controller.state_dict()["history"]) == {"a", "c"}


def test_the_threshold_of_the_file_and_the_users():
    script = [{"a": 0.6, "b": 0.4, "c": 0.1}]
    for options, frozen in (({}, {"a"}), ({"threshold": 0.3}, {"a", "b"}), ({"threshold": 0.7}, set())):
        controller, adapter, _ = controller_of(script, **options)
        run(controller, adapter, 2)
        assert adapter.frozen == frozen


def test_patience_counts_stages_in_a_row():
    script = [
        {"a": 0.9, "b": 0.9, "c": 0.0},
        {"a": 0.9, "b": 0.1, "c": 0.0},
        {"a": 0.9, "b": 0.9, "c": 0.0},
        {"b": 0.9, "c": 0.0},
        {"b": 0.9, "c": 0.0},
    ]
    controller, adapter, _ = controller_of(script, patience=3)
    run(controller, adapter, 10)
    assert controller.frozen == {"a": 6, "b": 10}


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_last_active_layer_is_kept_and_then_nobody_is_asked_any_more(dry_run):
    script = [{"a": 0.9, "b": 0.9, "c": 0.9}, {"c": 0.9}]
    controller, adapter, predictor = controller_of(script, dry_run=dry_run)
    run(controller, adapter, 20)
    assert controller.active == ["c"]
    assert [e.reason for e in controller.events] == ["confident", "confident", "last_active_layer"]
    assert len(predictor.calls) == 1
    assert controller.num_records == 2


def test_a_dry_run_decides_and_logs_but_freezes_nothing(caplog):
    script = [{"a": 0.9, "b": 0.1, "c": 0.1}, {"b": 0.9, "c": 0.1}]
    controller, adapter, _ = controller_of(script, dry_run=True)
    before = adapter.arrays["a"].copy()
    with caplog.at_level(logging.INFO, "smartfrz"):
        run(controller, adapter, 4)
    assert controller.frozen == {"a": 2, "b": 4}
    assert actions(controller) == {
        2: {"a": "would_freeze", "b": "keep", "c": "keep"},
        4: {"b": "would_freeze", "c": "keep"},
    }
    assert adapter.frozen == set()
    assert not np.array_equal(adapter.arrays["a"], before)
    assert [r.getMessage() for r in caplog.records] == [
        "would_freeze a at step 2 (confidence 0.900)",
        "would_freeze b at step 4 (confidence 0.900)",
    ]


def test_the_log_is_silent_when_nothing_happens(caplog):
    controller, adapter, _ = controller_of()
    with caplog.at_level(logging.DEBUG, "smartfrz"):
        run(controller, adapter, 10)
    assert caplog.records == []


def test_nobody_is_asked_before_the_shortest_history():
    predictor = ScriptedPredictor([{"a": 0.9, "b": 0.1, "c": 0.1}], info=make_info(min_records=5))
    controller, adapter, _ = controller_of(predictor=predictor)
    run(controller, adapter, 6)
    assert [e.reason for e in controller.events[:6]] == ["history_too_short"] * 6
    assert controller.frozen == {"a": 6}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_layer_with_bad_weights_is_not_frozen_one_warning_and_training_goes_on(bad, caplog):
    script = [{"a": 0.9, "c": 0.1}, *[{"c": 0.1}] * 2]
    controller, adapter, predictor = controller_of(script)
    adapter.arrays["b"][:] = bad
    with np.errstate(invalid="ignore"), caplog.at_level(logging.WARNING, "smartfrz"):
        run(controller, adapter, 8)
    assert [r.name for r in caplog.records] == ["smartfrz"]
    message = caplog.records[0].getMessage()
    assert "layer 'b' hold NaN or infinity at step 2" in message
    assert "Look at the loss and the learning rate" in message
    assert {(e.action, e.reason) for e in controller.events if e.layer == "b"} == {("keep", "not_finite")}
    assert adapter.frozen == {"a"}
    assert controller.num_steps == 8
    assert all(np.isfinite(history).all() for history, _ in predictor.calls)


def test_only_bad_weights_anywhere(caplog):
    controller, adapter, predictor = controller_of()
    for array in adapter.arrays.values():
        array[:] = np.nan
    run(controller, adapter, 6)
    assert predictor.calls == []
    assert {e.reason for e in controller.events} == {"not_finite"}
    assert len(caplog.records) == 3  # one a layer


def test_a_layer_that_recovered_can_be_frozen(caplog):
    info = make_info(window=4)
    predictor = ScriptedPredictor([{"a": 0.1, "c": 0.1}] * 2 + [{"a": 0.1, "b": 0.9, "c": 0.1}], info=info)
    controller, adapter, _ = controller_of(predictor=predictor)
    good = adapter.arrays["b"].copy()
    adapter.arrays["b"][:] = np.nan
    run(controller, adapter, 2)
    adapter.arrays["b"], adapter.velocity["b"] = good, np.zeros_like(good)
    run(controller, adapter, 4)
    assert controller.frozen == {"b": 6}
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FreezeController(NumpyAdapter.random(SIZES), ScriptedPredictor(), FreezeOptions(**options))


def test_a_model_in_which_nothing_can_be_frozen():
    with pytest.raises(UnsupportedModelError, match=r"has 0 layers .*at least two.*Train without it"):
        FreezeController(NumpyAdapter({}), ScriptedPredictor(), FreezeOptions(record_every=1))


def change_controller(adapter=None, **options):
    """Decides from the whole history, so that a resumed run is right only if all of it came back."""
    adapter = adapter or NumpyAdapter.random({f"layer{i}": 30 for i in range(6)}, seed=3)
    return controller_of(adapter=adapter, predictor=ChangePredictor(), **{"patience": 2, "threshold": 0.75} | options)


def restored(adapter):
    """A fresh adapter of the same model, its weights as in a checkpoint; nothing frozen yet."""
    fresh = NumpyAdapter(adapter.arrays)
    fresh.velocity = copy.deepcopy(adapter.velocity)
    return fresh


@pytest.mark.parametrize("stop", [0, 1, 7, 14, 31, 32, 59])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_resumed_run_decides_as_an_uninterrupted_one(stop, dry_run):
    whole, whole_adapter, _ = change_controller(dry_run=dry_run, seed=4)
    run(whole, whole_adapter, 60)
    assert len(set(whole.frozen.values())) >= 2, "the case shall freeze at several stages"

    first, first_adapter, _ = change_controller(dry_run=dry_run, seed=4)
    run(first, first_adapter, stop)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    # Made with another seed: the saved one wins.
    second, second_adapter, _ = change_controller(adapter=restored(first_adapter), dry_run=dry_run, seed=1)
    second.load_state_dict(state)
    run(second, second_adapter, 60 - stop)

    # repr: NaN differs from itself
    assert repr(second.events) == repr(whole.events)
    assert second.frozen == whole.frozen
    assert second_adapter.frozen == whole_adapter.frozen
    for name, array in whole_adapter.arrays.items():
        np.testing.assert_array_equal(second_adapter.arrays[name], array)


def test_a_state_is_plain_data_and_does_not_change_when_the_run_goes_on():
    controller, adapter, _ = change_controller()
    run(controller, adapter, 20)
    state = controller.state_dict()
    kept = copy.deepcopy(state)
    run(controller, adapter, 20)
    np.testing.assert_equal(state, kept)
    assert all(isinstance(event, dict) for event in state["events"])


def test_loading_does_not_change_or_keep_the_callers_state():
    controller, adapter, _ = change_controller()
    run(controller, adapter, 20)
    state = controller.state_dict()
    kept = copy.deepcopy(state)
    other, other_adapter, _ = change_controller()
    other.load_state_dict(state)
    run(other, other_adapter, 20)
    np.testing.assert_equal(state, kept)


def test_going_back_to_an_earlier_state_thaws_what_froze_since():
    controller, adapter, _ = change_controller()
    while len(controller.frozen) < 1:
        run(controller, adapter, 1)
    state, frozen = controller.state_dict(), set(controller.frozen)
    while len(controller.frozen) < 3:
        run(controller, adapter, 1)
    controller.load_state_dict(state)
    assert adapter.frozen == set(controller.frozen) == frozen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99; this version of smartfrz reads 3"),
        ({"predictor": "ab" * 32}, r"predictor abababababab\.\.\..*Resume with the same predictor file"),
        ({"layers": ["a", "b", "x"]}, r"they differ in \['c', 'x'\].*Resume with the same model"),
        ({"layers": ["a", "b"]}, r"2 layers, this one has 3; they differ in \['c'\]"),
        ({"layers": ["b", "a", "c"]}, "they differ in their order"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(change, message):
    controller, adapter, _ = controller_of([{"a": 0.9, "b": 0.1, "c": 0.1}])
    run(controller, adapter, 3)
    before = copy.deepcopy(controller.state_dict())
    with pytest.raises(StateError, match=message):
        controller.load_state_dict(before | change)
    np.testing.assert_equal(controller.state_dict(), before)


def test_what_is_passed_when_a_run_is_resumed_counts_and_each_difference_is_said_once(caplog):
    first, adapter, _ = change_controller(dry_run=True, total_steps=90)
    run(first, adapter, 30)
    assert first.frozen
    second, second_adapter, _ = change_controller(
        adapter=restored(adapter), threshold=0.7, patience=1, total_steps=600, thaw_on_restart=True, seed=5
    )
    second.load_state_dict(first.state_dict())
    assert (second.threshold, second.patience, second.total_steps) == (0.7, 1, 600)
    assert (second.dry_run, second.thaw_on_restart, second.seed) == (False, True, 0)
    assert second.num_steps == 30
    assert second.frozen == {}
    assert not second_adapter.frozen
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    for difference in (
        "total_steps is now 600 (saved: 90)",
        "threshold is now 0.7 (saved: 0.75)",
        "patience is now 1 (saved: 2)",
        "dry_run is now False (saved: True)",
        "thaw_on_restart is now True (saved: False)",
        "seed stays 0 (received: 5)",
    ):
        assert difference in said
    report = Report.of(second, [], second.active, 1.0)
    assert report.changes == [], "what a dry run would have frozen is no saving of this run"


def test_options_left_out_go_on_as_they_were_saved_without_a_word(caplog):
    first, adapter, _ = controller_of(record_every=3, decide_every=2, threshold=0.6, patience=3, total_steps=90)
    left_out = dict.fromkeys(("record_every", "decide_every", "patience"))
    second, _, _ = controller_of(adapter=restored(adapter), total_steps=90, **left_out)
    caplog.clear()
    second.load_state_dict(first.state_dict())
    assert second.schedule == first.schedule
    assert not caplog.records


@pytest.mark.parametrize(("record_every", "expected"), [(None, 12), (3, 3)])
def test_a_longer_run_is_recorded_anew_at_its_own_pace_unless_that_was_chosen(record_every, expected):
    first, adapter, _ = controller_of(record_every=record_every, total_steps=60)
    run(first, adapter, 12)
    second, _, _ = controller_of(adapter=restored(adapter), record_every=None, total_steps=600)
    second.load_state_dict(first.state_dict())
    assert second.record_every == expected
    assert bool(second.state_dict()["history"]) == (record_every is not None)


def test_a_dict_that_is_no_state():
    with pytest.raises(StateError, match=r"version None.*Pass what state_dict\(\) returned"):
        controller_of()[0].load_state_dict({"weights": 1})


def test_decisions_cannot_be_altered():
    controller, adapter, _ = controller_of()
    run(controller, adapter, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        controller.events[0].action = "freeze"
