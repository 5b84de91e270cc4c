"""Frozen stays frozen, or it is said: what the controller does when layers are disturbed, join, leave or are not trained."""

import numpy as np
import pytest
from numpy_adapter import NumpyAdapter

from smartfrz.baselines import AutoFreeze, GradES, LinearFreezing, WeightChange
from smartfrz.control.controller import FreezeController
from smartfrz.control.options import FreezeOptions
from smartfrz.control.policy import Policy
from smartfrz.control.report import Report
from smartfrz.control.watch import FrozenWatch

NAMES = "abcd"


class Sure(Policy):
    """Sure about some layers from a step on."""

    name = "sure"

    def __init__(self, layers, after=2):
        self.layers, self.after = layers, after

    def confidence(self, layers, *, step):
        return {layer: float(layer in self.layers and step >= self.after) for layer in layers}


class Costed:
    def __init__(self, name):
        self.name, self.forward_flops = name, 10


def start(policy=None, adapter=None, **options):
    adapter = adapter or NumpyAdapter.random(dict.fromkeys(NAMES, 12))
    options = FreezeOptions(**{"record_every": 1, "decide_every": 1, "patience": 1, "total_steps": 30} | options)
    return FreezeController(adapter, policy or Sure("a"), options), adapter


def run(controller, adapter, steps):
    for _ in range(steps):
        adapter.train_step()
        controller.step()


def report(controller, adapter):
    return Report.of(controller, [Costed(x) for x in adapter.all_layers()], adapter.layers(), 1.0)


def thaws(controller):
    return [(e.step, e.layer, e.reason, e.since) for e in controller.events if e.action == "thaw"]


def test_a_flag_that_comes_back_in_every_step_is_set_back_and_told_once(caplog):
    controller, adapter = start()
    run(controller, adapter, 2)
    for _ in range(6):
        adapter.trainable = {"a"}  # after the training step, so that nothing has moved
        controller.step()
        assert "a" in adapter.frozen
        assert not adapter.trainable
    assert controller.frozen == {"a": 2}
    assert thaws(controller) == []
    assert [r.getMessage().partition(",")[0] for r in caplog.records] == ["SmartFRZ keeps layer 'a' frozen"]


def test_a_flag_that_was_set_once_is_believed_and_told(caplog):
    controller, adapter = start(Sure("a", after=3))
    run(controller, adapter, 3)
    adapter.trainable = {"a"}
    controller.step()
    assert controller.frozen == {"a": 3}
    assert [(d.layer, d.action) for d in controller.step() if d.action != "keep"][:1] == [("a", "thaw")]
    assert thaws(controller) == [(5, "a", "unfrozen_by_user", None)]
    [told] = caplog.records
    assert (
        "SmartFRZ had frozen layer 'a', and requires_grad or trainable was set again before step 5" in told.getMessage()
    )


def test_a_loop_that_switches_now_and_then_is_believed_once_and_held_from_the_second_time_on(caplog):
    controller, adapter = start()
    run(controller, adapter, 2)
    for _ in range(4):
        adapter.trainable = {"a"}
        controller.step()
        controller.step()
        controller.step()
    assert [reason for _, _, reason, _ in thaws(controller)] == ["unfrozen_by_user"]
    assert "a" in controller.frozen
    assert len(caplog.records) == 2


def test_what_was_trained_after_its_flag_was_set_is_thawed_and_the_second_time_for_good():
    controller, adapter = start()
    run(controller, adapter, 5)
    adapter.trainable = {"a"}
    run(controller, adapter, 1)  # freezes again in the same step, since the policy is sure
    assert thaws(controller) == [(6, "a", "unfrozen_by_user", 5)]
    assert controller.frozen == {"a": 6}
    adapter.trainable = {"a"}
    run(controller, adapter, 10)
    assert thaws(controller)[1:] == [(7, "a", "moved_while_frozen", 6)]
    assert controller.frozen == {}


def test_what_moves_all_the_same_is_thawed_for_good_and_counts_as_saved_only_while_it_stood_still(caplog):
    controller, adapter = start(Sure("ab"))
    adapter.decays = {"a"}
    run(controller, adapter, 3)
    assert thaws(controller) == [(3, "a", "moved_while_frozen", 2)]
    run(controller, adapter, 7)
    assert controller.frozen == {"b": 2}
    assert {(e.action, e.reason) for e in controller.events if e.layer == "a" and e.step > 3} == {
        ("keep", "moved_while_frozen")
    }
    [told] = caplog.records
    assert "SmartFRZ thaws layer 'a' and freezes no more of that" in told.getMessage()
    assert (
        "between step 2 and step 3. Probably the optimizer changes weights that have no gradient" in told.getMessage()
    )
    result = report(controller, adapter)
    assert result.frozen == {"b": 2}
    assert result.frozen_spans() == {"a": [(2, 2)], "b": [(2, 10)]}
    assert result.backward_flops_saved == 8 * 10  # b's weight gradient alone
    assert result.moved == ["a"]
    assert "Moved although they were frozen, and therefore thawed for good: a." in str(result)


def test_savings_count_up_to_the_last_record_at_which_a_layer_stood_still():
    controller, adapter = start(record_every=2)
    run(controller, adapter, 8)
    adapter.decays = {"a"}
    run(controller, adapter, 2)
    assert report(controller, adapter).frozen_spans() == {"a": [(2, 8)]}


def test_a_checkpoint_does_not_call_frozen_what_has_moved_since_the_last_record():
    controller, adapter = start(Sure("ab"), record_every=5)
    run(controller, adapter, 6)
    adapter.decays = {"a"}
    run(controller, adapter, 1)
    state = controller.state_dict()
    assert controller.frozen == {"a": 5, "b": 5}  # the run itself looks at its next record
    assert state["frozen"] == {"b": 5}
    assert state["watch"]["barred"] == ["a"]
    resumed, other = start(Sure("ab"), NumpyAdapter(adapter.arrays))
    resumed.load_state_dict(state)
    assert other.frozen == {"b"}
    run(resumed, other, 10)
    assert resumed.frozen == {"b": 5}
    assert thaws(resumed) == [(7, "a", "moved_while_frozen", 5)]


def test_a_resumed_run_knows_what_was_held():
    controller, adapter = start()
    run(controller, adapter, 2)
    for _ in range(3):
        adapter.trainable = {"a"}
        controller.step()
    resumed, other = start(adapter=NumpyAdapter(adapter.arrays))
    resumed.load_state_dict(controller.state_dict())
    for _ in range(3):
        resumed.step()
        other.trainable = {"a"}
    resumed.step()
    assert thaws(resumed) == []


def test_thawing_by_hand_ends_the_doubt():
    watch = FrozenWatch()
    assert watch.judge({"a": "trainable"}, ["a"]).set_back == ["a"]
    watch.thawed(["a"])
    assert watch.judge({}, ["a"]).believed == []


def test_a_dry_run_looks_at_nothing_that_it_did_not_freeze(caplog):
    controller, adapter = start(dry_run=True)
    adapter.decays = {"a"}
    run(controller, adapter, 10)
    assert controller.frozen == {"a": 2}
    assert caplog.records == []


POLICIES = {
    "sure": lambda: Sure("ab"),
    "linear": lambda: LinearFreezing(t_0=0.2),
    "weight change": lambda: WeightChange(limit=10.0, records=1),
    "autofreeze": lambda: AutoFreeze(epochs=10, intervals_per_epoch=2, percentile=99.0),
    "grades": lambda: GradES(9.0, alpha=0.2),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_layers_that_the_user_unfreezes_join_whatever_the_policy(policy):
    adapter = NumpyAdapter(NumpyAdapter.random(dict.fromkeys(NAMES, 12)).arrays, trained="cd")
    controller, adapter = start(POLICIES[policy](), adapter)
    assert controller.active == ["c", "d"]
    run(controller, adapter, 5)
    assert report(controller, adapter).user_frozen == {"a", "b"}
    adapter.trained = set(NAMES)
    run(controller, adapter, 25)
    assert controller.layer_changes == [(6, "joined", "a"), (6, "joined", "b")]
    assert "a" in controller.frozen
    result = report(controller, adapter)
    assert result.user_frozen == set()
    assert "Unfrozen by the training script, and watched since: a, b." in str(result)
    state = controller.state_dict()
    resumed, _ = start(POLICIES[policy](), NumpyAdapter(adapter.arrays))
    resumed.load_state_dict(state)
    assert resumed.state_dict() | {"history": None} == state | {"history": None}


def test_savings_follow_the_trainable_layers():
    adapter = NumpyAdapter(NumpyAdapter.random(dict.fromkeys(NAMES, 12)).arrays, trained="bcd")
    controller, adapter = start(Sure("a", after=8), adapter, total_steps=12)
    run(controller, adapter, 4)
    adapter.trained = set(NAMES)
    run(controller, adapter, 8)
    result = report(controller, adapter)
    # b, c and d with two input gradients for 5 steps (the change is seen at the fifth), then a, with three, for 7.
    assert result.backward_flops == 5 * 50 + 7 * 70
    # From step 8 on neither the gradient of a's weights nor that of b's input.
    assert result.backward_flops_saved == 4 * 20
    assert result.frozen_spans() == {"a": [(0, 5), (8, 12)]}


def test_layers_that_the_user_freezes_leave():
    controller, adapter = start()
    run(controller, adapter, 4)
    adapter.trained = {"b", "c"}
    run(controller, adapter, 2)
    assert controller.active == ["b", "c"]
    assert controller.frozen == {}
    assert [change[1:] for change in controller.layer_changes] == [("left", "a"), ("left", "d")]
    assert report(controller, adapter).user_frozen == {"a", "d"}
    adapter.trained = set(NAMES)
    run(controller, adapter, 2)
    assert controller.active == ["b", "c", "d"]
    assert controller.frozen == {"a": 7}


def test_layers_that_run_later_join_and_are_not_called_frozen_before():
    adapter = NumpyAdapter(NumpyAdapter.random(dict.fromkeys(NAMES, 12)).arrays, ran="acd")
    controller, adapter = start(Sure("b"), adapter)
    run(controller, adapter, 5)
    adapter.ran.add("b")
    run(controller, adapter, 5)
    assert controller.layer_changes == [(6, "appeared", "b")]
    assert controller.frozen == {"b": 6}
    assert report(controller, adapter).frozen_spans() == {"b": [(6, 10)]}


def test_one_layer_alone_is_left_in_peace_until_there_are_more():
    adapter = NumpyAdapter(NumpyAdapter.random(dict.fromkeys(NAMES, 12)).arrays, trained="d")
    controller, adapter = start(Sure("ad"), adapter)
    run(controller, adapter, 5)
    assert controller.events == []
    adapter.trained = set(NAMES)
    run(controller, adapter, 5)
    assert controller.frozen == {"a": 6, "d": 6}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_not_trained_does_not_freeze_as_converged_and_that_is_said_once(policy, caplog):
    controller, adapter = start(POLICIES[policy](), total_steps=20)
    adapter.rates = {"a": 0.0, "b": 0.0}
    run(controller, adapter, 15)
    assert not {"a", "b"} & set(controller.frozen)
    assert {e.reason for e in controller.events if e.layer == "a"} == {"not_trained"}
    assert [r.getMessage() for r in caplog.records] == [
        "SmartFRZ does not freeze layers 'a', 'b' as converged, since the learning rate of these weights is 0 (step "
        f"{controller.events[0].step})."
    ]


def test_a_schedule_that_ends_at_zero_is_no_reason_to_warn(caplog):
    controller, adapter = start(total_steps=10)
    run(controller, adapter, 9)
    adapter.rates = dict.fromkeys(NAMES, 0.0)
    run(controller, adapter, 1)
    assert caplog.records == []


def test_numpy_arrays_of_frozen_layers_really_stand_still_in_these_tests():
    controller, adapter = start()
    run(controller, adapter, 2)
    before = adapter.arrays["a"].copy()
    with np.errstate(all="raise"):
        run(controller, adapter, 3)
    np.testing.assert_array_equal(adapter.arrays["a"], before)
