import copy
import dataclasses
import json
import math

import numpy as np
import pytest
from numpy_adapter import ChangePredictor, NumpyAdapter, ScriptedPredictor

from smartfrz import baselines
from smartfrz.baselines import AutoFreeze, EarlyStop, FullTraining, GradES, LinearFreezing, WeightChange
from smartfrz.baselines.linear_freezing import annealed, moments
from smartfrz.control.controller import FreezeController
from smartfrz.control.learned import LearnedPolicy, policy_of
from smartfrz.control.options import FreezeOptions, stages_apart
from smartfrz.control.policy import Policy
from smartfrz.control.protocols import OneProcess
from smartfrz.control.tailoring import tailoring_positions
from smartfrz.errors import StateError, UnsupportedModelError

SIZES = {"a": 40, "b": (5, 4), "c": 3, "d": 17}
STEPS = 120
MAKE = {
    "full": FullTraining,
    "linear": lambda: LinearFreezing(0.3),
    "linear scaled cubic": lambda: LinearFreezing(0.7, spacing="cubic", scale_lr=True),
    "linear untouched": lambda: LinearFreezing(0.3, anneal=False),
    "autofreeze": lambda: AutoFreeze(epochs=5),
    "autofreeze by steps": lambda: AutoFreeze(steps_per_epoch=28, percentile=70.0),
    "grades": lambda: GradES(0.4, alpha=0.2),
    "grades relative": lambda: GradES(0.1, relative=True),
    "weight change": lambda: WeightChange(limit=0.05, tailored_size=8),
}
# Layers, t_0, spacing -> moments, by hand
MOMENTS = [
    (1, 0.5, "linear", [0.5]),
    (2, 0.5, "linear", [0.5, 1.0]),
    (5, 0.5, "linear", [0.5, 0.625, 0.75, 0.875, 1.0]),
    (3, 1.0, "linear", [1.0, 1.0, 1.0]),
    (3, 0.8, "cubic", [0.512, 0.729, 1.0]),
]
# Progress, moment, scaled -> factor, by hand
FACTORS = [
    (0.0, 0.5, False, 1.0),
    (0.0, 0.5, True, 2.0),
    (0.25, 0.5, False, 0.5),
    (0.25, 0.5, True, 1.0),
    (1 / 6, 0.5, False, 0.75),
    (0.5, 0.5, False, 0.0),
    (0.9, 0.5, True, 0.0),
]
BAD_ARGUMENTS = [
    (lambda: LinearFreezing(0.0), r"`t_0` is 0\.0; expected a fraction of the run in \(0, 1\]"),
    (lambda: LinearFreezing(1.5), r"`t_0` is 1\.5; expected a fraction"),
    (lambda: LinearFreezing(math.nan), "`t_0` is nan; expected a fraction"),
    (lambda: LinearFreezing(spacing="square"), "`spacing` is 'square'; expected one of linear, cubic"),
    (lambda: LinearFreezing(scale_lr=True, anneal=False), "scale_lr=True and anneal=False; expected .* Leave one"),
    (lambda: AutoFreeze(epochs=3, percentile=0), r"`percentile` is 0; expected a number in \(0, 100\), such as 50"),
    (lambda: AutoFreeze(epochs=3, percentile=100.0), r"`percentile` is 100\.0; expected"),
    (lambda: AutoFreeze(epochs=3, intervals_per_epoch=0), "`intervals_per_epoch` is 0; expected an integer"),
    (lambda: AutoFreeze(epochs=0), "`epochs` is 0; expected an integer of at least 1"),
    (lambda: AutoFreeze(steps_per_epoch=2.5), r"`steps_per_epoch` is 2\.5; expected an integer"),
    (lambda: AutoFreeze(), "received epochs=None and steps_per_epoch=None; expected one of them. Pass epochs="),
    (lambda: AutoFreeze(epochs=3, steps_per_epoch=9), "received epochs=3 and steps_per_epoch=9; expected one of them"),
    (lambda: GradES(0.0), r"`tau` is 0\.0; expected a positive number"),
    (lambda: GradES(math.nan), "`tau` is nan; expected a positive number"),
    (lambda: GradES(math.inf), "`tau` is inf; expected a positive number"),
    (lambda: GradES(1.0, alpha=1.0), r"`alpha` is 1\.0; expected a fraction of the run in \[0, 1\), such as 0\.5"),
    (lambda: GradES(1.0, alpha=-0.1), r"`alpha` is -0\.1; expected a fraction"),
    (lambda: WeightChange(limit=0.0), r"received limit=0\.0, .* expected a positive limit such as 0\.01"),
    (lambda: WeightChange(records=0), "received limit=0.01, records=0"),
]


def controller_of(policy, adapter=None, ranks=None, **options):
    """A controller on a model whose front layers converge first."""
    adapter = adapter or NumpyAdapter.random(SIZES)
    controller = FreezeController(adapter, policy, FreezeOptions(**{"total_steps": STEPS} | options), ranks=ranks)
    controller.set_lr_scales()
    return controller, adapter


def run(controller, adapter, steps):
    for _ in range(steps):
        adapter.train_step()
        controller.step()


class NormsAdapter(NumpyAdapter):
    """Its gradient norms are listed, not computed: one mapping a call of the first layer."""

    def __init__(self, arrays, norms):
        super().__init__(arrays)
        self.norms = {layer: list(values) for layer, values in norms.items()}

    def gradient_norm(self, layer):
        return self.norms[layer].pop(0)


class TakesNoRates(NumpyAdapter):
    """An adapter that cannot reach into the optimizer's steps, as that of Keras."""

    set_lr_scale = gradient_norm = gradient_changes = property()


# Linear freezing


@pytest.mark.parametrize(("num_layers", "t_0", "spacing", "expected"), MOMENTS)
def test_moments_by_hand(num_layers, t_0, spacing, expected):
    assert moments(num_layers, t_0, spacing) == pytest.approx(expected)


@pytest.mark.parametrize(("progress", "moment", "scale_lr", "expected"), FACTORS)
def test_equation_6_by_hand(progress, moment, scale_lr, expected):
    assert annealed(progress, moment, scale_lr=scale_lr) == pytest.approx(expected)


@pytest.mark.parametrize("moment", [0.2, 0.5, 1.0])
def test_scaled_layers_travel_as_far_and_others_in_proportion_to_their_moment(moment):
    middles = (np.arange(20_000) + 0.5) / 20_000
    assert np.mean([annealed(t, moment, scale_lr=True) for t in middles]) == pytest.approx(0.5, abs=1e-4)
    assert np.mean([annealed(t, moment) for t in middles]) == pytest.approx(0.5 * moment, abs=1e-4)


def test_layers_freeze_front_to_back_at_their_moments():
    controller, adapter = controller_of(LinearFreezing(0.4), record_every=1)
    rates = []
    for step in range(STEPS):
        rates.append({layer: adapter.lr_scales[layer] for layer in controller.active})
        adapter.train_step()
        controller.step()
        expected = {layer for layer, t in zip(SIZES, (0.4, 0.6, 0.8, 1.0), strict=True) if (step + 1) / STEPS >= t}
        assert adapter.frozen == expected - {"d"}, f"after step {step + 1}"
    assert controller.frozen == {"a": 48, "b": 72, "c": 96}
    for step, of_step in enumerate(rates):
        for layer, rate in of_step.items():
            t_i = {"a": 0.4, "b": 0.6, "c": 0.8, "d": 1.0}[layer]
            assert rate == pytest.approx(0.5 * (1 + math.cos(math.pi * step / (t_i * STEPS))), abs=1e-12)


def test_between_its_moment_and_the_freezing_stage_a_layer_stands_still():
    controller, adapter = controller_of(LinearFreezing(0.4), record_every=50)
    run(controller, adapter, 48)
    before = adapter.arrays["a"].copy()
    run(controller, adapter, 60)
    assert controller.frozen == {"a": 50, "b": 100, "c": 100}
    np.testing.assert_array_equal(adapter.arrays["a"], before)


def test_without_annealing_layers_freeze_at_the_same_moments_and_no_rate_is_touched():
    controller, adapter = controller_of(LinearFreezing(0.4, anneal=False), TakesNoRates.random(SIZES), record_every=1)
    run(controller, adapter, STEPS)
    assert controller.frozen == {"a": 48, "b": 72, "c": 96}
    assert adapter.lr_scales == {}


def test_a_dry_run_touches_no_rate():
    controller, adapter = controller_of(LinearFreezing(), dry_run=True)
    run(controller, adapter, STEPS)
    assert len(controller.frozen) == 3
    assert adapter.lr_scales == {}


def test_a_thawed_layer_has_no_learning_rate_left_and_freezes_again():
    controller, adapter = controller_of(LinearFreezing(0.4))
    run(controller, adapter, 60)
    controller.thaw(["a"])
    before = adapter.arrays["a"].copy()
    run(controller, adapter, 3)
    np.testing.assert_array_equal(adapter.arrays["a"], before)
    run(controller, adapter, 1)
    assert controller.frozen["a"] == 64


# AutoFreeze


def test_a_layer_below_the_percentile_freezes_only_behind_a_frozen_prefix():
    # changes at the second evaluation: 0.1, 0.5, 0.2, 0.9: the median is 0.35
    norms = {"a": [10, 11, 33], "b": [10, 15, 16], "c": [10, 12, 12], "d": [10, 19, 60]}
    adapter = NormsAdapter(NumpyAdapter.random(SIZES).arrays, norms)
    controller, _ = controller_of(AutoFreeze(steps_per_epoch=4), adapter)
    assert (controller.record_every, controller.decide_every, controller.patience) == (1, 1, 1)
    run(controller, adapter, 2)
    reasons = ["confident", "below_threshold", "behind_live_layer", "below_threshold"]
    assert [event.reason for event in controller.events] == ["history_too_short"] * 4 + reasons
    # then of b, c and d 1/15, 0, 41/19: the median is 1/15, which b reaches
    run(controller, adapter, 1)
    assert controller.frozen == {"a": 2}
    assert [e.reason for e in controller.events[8:]] == ["below_threshold", "behind_live_layer", "below_threshold"]


def autofreeze_of_the_authors(norms, percentile):
    """Their rule as published: norms of all layers, `[evaluations][layers]` -> first trained layer after each."""
    start, previous, starts = 0, None, []
    for current in norms:
        if previous is not None:
            ratios = [abs(before - now) / before for before, now in zip(previous, current, strict=True)]
            limit = np.percentile(ratios[start:], percentile)
            start = next(i for i in range(start, len(ratios)) if ratios[i] >= limit)
        previous = current
        starts.append(start)
    return starts


@pytest.mark.parametrize("percentile", [20.0, 50.0, 77.0])
def test_the_rule_is_that_of_the_authors(percentile):
    most = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        layers = [f"layer{i}" for i in range(9)]
        norms = np.exp(rng.normal(size=(12, 9)) * rng.uniform(0.1, 2.0, 9))
        adapter = NormsAdapter(dict.fromkeys(layers, np.ones(3)), dict(zip(layers, norms.T.tolist(), strict=True)))
        controller, _ = controller_of(AutoFreeze(steps_per_epoch=4, percentile=percentile), adapter)
        for start in autofreeze_of_the_authors(norms.tolist(), percentile):
            if start == len(layers) - 1:
                break  # where theirs trains the last layer alone, ours has nothing to decide any more
            run(controller, adapter, 1)
            assert controller.active == layers[start:]
        most = max(most, start)
    assert most > 3, "the case shall freeze some"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norms_that_are_not_finite_or_zero(bad):
    norms = {"a": [1, bad, 1, 1, 1], "b": [0, 0, 0, 0, 0], "c": [1, 2, 4, 8, 16], "d": [0, 1, 3, 1, 9]}
    adapter = NormsAdapter(NumpyAdapter.random(SIZES).arrays, norms)
    controller, _ = controller_of(AutoFreeze(steps_per_epoch=4), adapter)
    run(controller, adapter, 3)
    assert controller.frozen == {}  # a is undefined, though b does not change at all
    run(controller, adapter, 1)  # 0, 0, 1, 2/3: the median is 1/3
    assert controller.frozen == {"a": 4, "b": 4}


def test_gradients_that_all_vanish_freeze_nothing():
    adapter = NormsAdapter(NumpyAdapter.random(SIZES).arrays, dict.fromkeys(SIZES, [0.0] * 5))
    controller, _ = controller_of(AutoFreeze(steps_per_epoch=4), adapter)
    run(controller, adapter, 5)
    assert controller.frozen == {}


@pytest.mark.parametrize(
    ("policy", "total_steps", "expected"),
    [
        (AutoFreeze(epochs=10), 4000, 100),
        (AutoFreeze(epochs=10, intervals_per_epoch=5), 4000, 80),
        (AutoFreeze(epochs=10), 20, 1),
        (AutoFreeze(steps_per_epoch=100), None, 25),
        (AutoFreeze(steps_per_epoch=100), 4000, 25),
        (AutoFreeze(steps_per_epoch=2), None, 1),
        (LinearFreezing(), 4000, 133),
        (FullTraining(), 4000, 133),
    ],
)
def test_when_layers_are_judged(policy, total_steps, expected):
    assert FreezeOptions(total_steps=total_steps).schedule(policy) == (expected, 1, 0.5, 1, policy.freeze_order)


def test_with_a_compiler_stages_are_grouped_if_anything_tells_how_many_there_are():
    assert stages_apart(AutoFreeze(epochs=10), None, 25, 1) == 10
    assert stages_apart(AutoFreeze(steps_per_epoch=100), 4000, 25, 1) == 40
    assert stages_apart(AutoFreeze(steps_per_epoch=100), None, 25, 1) == 1


# GradES


class ChangesAdapter(NumpyAdapter):
    """Its changes of gradients are listed, not computed: one of each layer a call."""

    def __init__(self, changes):
        super().__init__(NumpyAdapter.random(SIZES).arrays)
        self.changes = {layer: list(values) for layer, values in changes.items()}

    def gradient_changes(self, layers):
        return {layer: self.changes[layer].pop(0) for layer in layers}


def test_layers_freeze_in_any_order_once_below_tau_after_the_grace_period():
    tau = 0.3
    above = math.nextafter(tau, 1.0)
    changes = {
        "a": [0.0, 0.0, tau, above, 9.0],  # below tau in the grace period only
        "b": [9.0, 9.0, math.nextafter(tau, 0.0)],
        "c": [9.0, 9.0, 9.0, 0.0],
        "d": [9.0] * 5,
    }
    controller, adapter = controller_of(GradES(tau, alpha=0.5), ChangesAdapter(changes), total_steps=6, record_every=1)
    run(controller, adapter, 5)
    assert controller.frozen == {"b": 3, "c": 4}
    assert controller.freeze_order == "free"
    assert controller.events[8].confidence < 0.5, "a change of tau is not below tau"
    assert controller.events[9].confidence >= 0.5
    assert {e.confidence for e in controller.events[:8]} == {0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("relative", [False, True])
def test_changes_that_are_not_finite_freeze_nothing(bad, relative):
    changes = {"a": [bad, bad, bad], "b": [2.0, bad, 0.5], "c": [2.0, 2.0, 2.0], "d": [0.0, 2.0, 2.0]}
    policy = GradES(0.5 if relative else 1.0, alpha=0, relative=relative)
    controller, adapter = controller_of(policy, ChangesAdapter(changes), record_every=1)
    run(controller, adapter, 3)
    # relative to a change of 0 nothing is less
    assert controller.frozen == ({"b": 3} if relative else {"b": 3, "d": 1})


def test_relative_to_its_own_largest_change():
    changes = {"a": [10.0, 100.0, 49.0], "b": [1.0, 0.6, 0.4], "c": [3.0, 1.4], "d": [1.0, 2.0, 1.0]}
    policy = GradES(0.5, alpha=0, relative=True)
    controller, adapter = controller_of(policy, ChangesAdapter(changes), record_every=1)
    run(controller, adapter, 3)
    assert controller.frozen == {"a": 3, "b": 3, "c": 2}


def test_without_a_grace_period_the_length_of_the_run_need_not_be_known():
    controller, adapter = controller_of(GradES(0.4, alpha=0), total_steps=None, record_every=4)
    run(controller, adapter, 60)
    assert controller.frozen


def test_between_stages_the_smallest_change_counts():
    tau, every = 0.3, 4
    twin, changes, latest = NumpyAdapter.random(SIZES), [], {}
    for _ in range(STEPS):
        before = {name: array.astype(np.float64) for name, array in twin.arrays.items()}
        twin.train_step()
        gradients = {n: (w - 1) / (i + 1) + 0.1 * w for i, (n, w) in enumerate(before.items())}
        changes.append({n: np.abs(g - latest[n]).sum() for n, g in gradients.items()} if latest else {})
        latest = gradients
    controller, adapter = controller_of(GradES(tau, alpha=0.1))
    run(controller, adapter, STEPS)
    assert controller.record_every == every
    expected = {}
    for end in range(12, STEPS + 1, every):
        for layer in SIZES:
            if layer not in expected and min(c[layer] for c in changes[end - every : end]) < tau:
                expected[layer] = end
    # Layers do not depend on each other in this model.
    assert controller.frozen == dict(list(sorted(expected.items(), key=lambda item: item[1]))[: len(SIZES) - 1])
    assert len(set(controller.frozen.values())) > 1, "the case shall freeze at several stages"


# Weight change


def test_the_change_by_hand():
    history = np.array([[[0, 0], [3, 0], [3, 3.9], [3, 4]], [[9, 9], [9, 9], [0, 0], [0, 0]]], np.float32)
    policy = WeightChange(limit=0.5, records=2, tailored_size=2)
    confidence, attention = policy.predict(history, np.array([4, 4]))
    # |(3, 4) - (3, 0)| / |(3, 4)| = 0.8; the other layer's weights are all zero, and were not
    np.testing.assert_allclose(confidence[:, 1], [0.5 / 1.3, 0.0], atol=1e-6)
    np.testing.assert_allclose(confidence.sum(axis=1), 1.0)
    np.testing.assert_array_equal(attention, [[0, 1, 0, 0]] * 2)
    confidence, attention = policy.predict(history[:1], np.array([2]))  # a short history: from its first record on
    np.testing.assert_allclose(confidence[:, 1], 0.5 / (0.5 + 0.02), rtol=1e-4)
    np.testing.assert_array_equal(attention, [[0, 0, 1, 0]])


def test_layers_freeze_whose_weights_changed_less_than_the_limit_at_two_stages_in_a_row():
    limit = 0.05
    controller, adapter = controller_of(WeightChange(limit=limit, tailored_size=400), seed=1)
    assert (controller.record_every, controller.decide_every, controller.patience) == (4, 2, 2)
    kept, changes, expected = {layer: [] for layer in SIZES}, {layer: [] for layer in SIZES}, {}
    for step in range(1, STEPS + 1):
        adapter.train_step()
        if step % 4 == 0:
            for layer in SIZES:
                positions = tailoring_positions(layer, adapter.num_weights(layer), 400, seed=1)
                kept[layer].append(adapter.weights(layer, positions).astype(np.float64))
        if step % 8 == 0 and step >= 16:
            for layer, rows in kept.items():
                changes[layer].append(math.dist(rows[-1], rows[-4]) / math.hypot(*rows[-1]))
                ready = len(changes[layer]) > 1 and max(changes[layer][-2:]) <= limit
                if ready and layer not in expected and len(expected) < len(SIZES) - 1:
                    expected[layer] = step
        controller.step()
        assert controller.frozen == expected
    assert len(set(expected.values())) > 1, "the case shall freeze at several stages"


# All policies


@pytest.mark.parametrize("name", MAKE)
def test_a_run_freezes_something_but_full_training(name):
    controller, adapter = controller_of(MAKE[name]())
    run(controller, adapter, STEPS)
    assert bool(controller.frozen) == (name != "full")
    assert {event.reason for event in controller.events} - {"history_too_short"}


@pytest.mark.parametrize("stop", [0, 1, 7, 48, 61, 119])
@pytest.mark.parametrize("name", MAKE)
def test_a_resumed_run_is_an_uninterrupted_one(name, stop):
    whole, whole_adapter = controller_of(MAKE[name]())
    run(whole, whole_adapter, STEPS)

    first, first_adapter = controller_of(MAKE[name]())
    run(first, first_adapter, stop)
    state = copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(state)
    fresh = NumpyAdapter(first_adapter.arrays)
    fresh.velocity = copy.deepcopy(first_adapter.velocity)
    fresh.latest, fresh.smallest = copy.deepcopy((first_adapter.latest, first_adapter.smallest))
    fresh.gradient_sums = copy.deepcopy(first_adapter.gradient_sums)
    second, _ = controller_of(MAKE[name](), fresh, seed=5)  # the saved seed goes on
    second.load_state_dict(state)
    second.set_lr_scales()
    run(second, fresh, STEPS - stop)

    assert repr(second.events) == repr(whole.events)  # repr: NaN differs from itself
    assert (second.frozen, fresh.frozen) == (whole.frozen, whole_adapter.frozen)
    for layer, array in whole_adapter.arrays.items():
        np.testing.assert_array_equal(fresh.arrays[layer], array)
    np.testing.assert_equal(state, kept)


@pytest.mark.parametrize("name", MAKE)
def test_the_first_process_decides_for_all(name):
    """The second one is never asked, and has the same state all the same."""
    words = []

    class First(OneProcess):
        def share(self, make):
            words.append(json.loads(json.dumps(make())))
            return words[-1]

    class Second(OneProcess):
        def share(self, make):
            return words.pop(0)

    policies = [MAKE[name](), MAKE[name]()]
    pairs = [controller_of(p, ranks=ranks) for p, ranks in zip(policies, (First(), Second()), strict=True)]
    for _ in range(STEPS):
        for controller, adapter in pairs:
            run(controller, adapter, 1)
    # The digest is over the seconds as well.
    states = [controller.state_dict() | {"decision_seconds": 0.0, "sha256": ""} for controller, _ in pairs]
    np.testing.assert_equal(*states)


@pytest.mark.parametrize("name", MAKE)
def test_runs_that_share_a_policy_do_not_disturb_each_other(name):
    alone, adapter = controller_of(MAKE[name]())
    run(alone, adapter, STEPS)
    shared = MAKE[name]()
    first, first_adapter = controller_of(shared)
    run(first, first_adapter, 55)
    second, second_adapter = controller_of(shared, total_steps=2 * STEPS)
    run(second, second_adapter, 30)
    run(first, first_adapter, STEPS - 55)
    assert repr(first.events) == repr(alone.events)


def test_a_state_of_another_policy_or_of_other_settings_is_refused():
    controllers = [controller_of(MAKE[name]())[0] for name in MAKE]
    controllers += [controller_of(p)[0] for p in (LinearFreezing(), WeightChange(), AutoFreeze(epochs=6), GradES(0.4))]
    assert len({controller.state_dict()["predictor"] for controller in controllers}) == len(controllers)
    with pytest.raises(StateError, match=r"this run has 'linear-freezing' \(.*policy with the same settings"):
        controllers[1].load_state_dict(controllers[0].state_dict())
    for make in MAKE.values():
        assert policy_of(make()).sha256 == policy_of(make()).sha256


@pytest.mark.parametrize(("make", "message"), BAD_ARGUMENTS)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_run_whose_length_is_not_known():
    adapter = NumpyAdapter.random(SIZES)
    for policy, options, message in [
        (LinearFreezing(), {"record_every": 5}, "LinearFreezing .*received no `total_steps`; expected the optimizer"),
        (
            GradES(1.0),
            {"record_every": 5},
            "GradES freezes nothing in the first 50% of the run, and received no `total_",
        ),
        (AutoFreeze(epochs=4), {}, r"AutoFreeze\(epochs=4\) received no `total_steps`, .*steps_per_epoch=len"),
        (FullTraining(), {}, "received neither `total_steps` nor `record_every`"),
    ]:
        with pytest.raises(ValueError, match=message):
            FreezeController(adapter, policy, FreezeOptions(**options))


@pytest.mark.parametrize(
    ("policy", "method"),
    [
        (LinearFreezing(), "set_lr_scale"),
        (AutoFreeze(epochs=2), "gradient_norm"),
        (GradES(1.0), "gradient_changes"),
    ],
)
def test_an_adapter_that_does_not_reach_into_the_optimizer(policy, method):
    message = rf"'{policy.name}' needs an adapter with the method `{method}`, which TakesNoRates does not have"
    with pytest.raises(UnsupportedModelError, match=message):
        controller_of(policy, TakesNoRates.random(SIZES))


def test_what_the_user_gives_comes_before_what_the_policy_says():
    options = FreezeOptions(4000, 7, 3, 0.9, 4, freeze_order="free")
    given = options.schedule(AutoFreeze(epochs=10))
    assert given == (7, 3, 0.9, 4, "free")


def test_a_predictor_is_a_policy_with_the_schedule_it_had():
    policy = policy_of(ScriptedPredictor())
    assert isinstance(policy, LearnedPolicy)
    assert FreezeOptions(total_steps=1000).schedule(policy) == (20, 2, 0.5, 2, "free")
    assert policy_of(FullTraining()).sha256 != policy_of(ChangePredictor()).sha256 == "c4" * 32


def test_a_policy_that_only_says_its_confidence_is_enough():
    class Second(Policy):
        name = "second"

        def confidence(self, layers, *, step):
            return {layer: float(layer == "b") for layer in layers}

    controller, adapter = controller_of(Second())
    run(controller, adapter, STEPS)
    assert controller.frozen == {"b": 4}


def test_public_names():
    names = ["AutoFreeze", "EarlyStop", "FullTraining", "GradES", "LinearFreezing", "WeightChange"]
    public = [n for n, v in vars(baselines).items() if n[0] != "_" and isinstance(v, type)]
    assert sorted(public) == baselines.__all__ == names
    assert dataclasses.is_dataclass(WeightChange)


def test_stopping_early_shortens_what_is_counted_in_steps():
    early = EarlyStop.at_time_of(30.0, 50.0)
    assert early == EarlyStop(0.6)
    assert (early.steps(1000), early.steps(50), early.steps(1)) == (600, 30, 1)
    assert EarlyStop(1.0).steps(77) == 77
    # a method that was slower than full training is compared with full training
    assert EarlyStop.at_time_of(60.0, 50.0) == EarlyStop(1.0)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_a_share_of_training_lies_between_nothing_and_all_of_it(share):
    with pytest.raises(ValueError, match=r"`share` is .*; expected a share of the steps of full training in \(0, 1\]"):
        EarlyStop(share)


@pytest.mark.parametrize(("seconds", "full"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_times_are_positive(seconds, full):
    with pytest.raises(ValueError, match="expected positive numbers"):
        EarlyStop.at_time_of(seconds, full)
