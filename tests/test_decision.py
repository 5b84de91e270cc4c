import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz.control.decision import decide
from smartfrz.control.ordering import ORDERS, LayerCost, Ordering

KEPT = {"below_threshold", "patience", "history_too_short", "not_finite", "last_active_layer", "behind_live_layer"}
AT = {"step": 30, "timestamp": 2}

# confidence, excused, streaks before, patience -> reason of each layer, streaks after
CASES = {
    "one is ready": ({"a": 0.9, "b": 0.1}, {}, {}, 1, ["confident", "below_threshold"], [1, 0]),
    "the threshold itself is enough": ({"a": 0.5, "b": 0.49}, {}, {}, 1, ["confident", "below_threshold"], [1, 0]),
    "interior and last": ({"a": 0.1, "b": 0.9}, {}, {}, 1, ["below_threshold", "confident"], [0, 1]),
    "never all of them": ({"a": 0.9, "b": 0.9}, {}, {}, 1, ["confident", "last_active_layer"], [1, 1]),
    "patience starts": ({"a": 0.9, "b": 0.1}, {}, {}, 2, ["patience", "below_threshold"], [1, 0]),
    "patience is over": ({"a": 0.9, "b": 0.1}, {}, {"a": 1}, 2, ["confident", "below_threshold"], [2, 0]),
    "patience is lost": ({"a": 0.1, "b": 0.9}, {}, {"a": 2, "b": 1}, 3, ["below_threshold", "patience"], [0, 2]),
    "excused": ({"b": 0.9}, {"a": "not_finite"}, {"a": 2}, 1, ["not_finite", "confident"], [0, 1]),
    "the last is excused": ({"a": 0.9}, {"b": "not_finite"}, {}, 1, ["confident", "not_finite"], [1, 0]),
    "no answer": ({"a": math.nan, "b": 0.9}, {}, {}, 1, ["below_threshold", "confident"], [0, 1]),
    "a single layer": ({"a": 0.9}, {}, {}, 1, ["last_active_layer"], [1]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dry_run", [False, True])
def test_table(case, dry_run):
    confidence, excused, streaks, patience, reasons, expected_streaks = CASES[case]
    active = sorted({*confidence, *excused})
    options = {"patience": patience, "dry_run": dry_run, "ordering": Ordering(active, 0.5)}
    decisions, new = decide(active, confidence, excused, streaks, **options, **AT)
    assert [d.layer for d in decisions] == active
    assert [d.reason for d in decisions] == reasons
    freeze = "would_freeze" if dry_run else "freeze"
    assert [d.action for d in decisions] == [freeze if r == "confident" else "keep" for r in reasons]
    assert list(new.values()) == expected_streaks
    assert {(d.step, d.timestamp) for d in decisions} == {(30, 2)}


def test_confidence_is_reported_and_nan_where_nobody_asked():
    decisions, _ = decide(["a", "b"], {"b": 0.25}, {"a": "history_too_short"}, {}, ordering=Ordering("ab", 0.5), **AT)
    assert math.isnan(decisions[0].confidence)
    assert decisions[1].confidence == 0.25


answers = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=8)


@given(
    answers,
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.integers(1, 3),
    st.floats(0.01, 1),
    st.sampled_from(ORDERS),
)
def test_somebody_keeps_learning_and_nothing_given_is_changed(values, before, patience, threshold, order):
    active = [f"layer{i}" for i in range(len(values))]
    confidence = {layer: v for layer, v in zip(active, values, strict=True) if v is not None}
    excused = {layer: "not_finite" for layer in active if layer not in confidence}
    streaks = dict(zip(active, before, strict=False))
    given_ = [active[:], dict(confidence), dict(excused), dict(streaks)]
    ordering = Ordering(active, threshold, order, {layer: LayerCost(1.0, 1.0, 2.0) for layer in active})
    decisions, _ = decide(active, confidence, excused, streaks, ordering=ordering, patience=patience, **AT)
    assert any(d.action == "keep" for d in decisions)
    for d in decisions:
        assert (d.action == "keep") == (d.reason in KEPT)
        if d.action == "freeze":
            assert d.confidence >= d.threshold
            assert d.threshold == threshold or order == "cost_aware"
            assert streaks[d.layer] + 1 >= patience
    assert [active, confidence, excused, streaks] == given_


def reasons_of(confidence, ordering, active=None, **options):
    active = active or list(ordering.layers)
    decisions, _ = decide(active, confidence, {}, {}, ordering=ordering, **options, **AT)
    return {d.layer: d.reason for d in decisions}


def test_prefix_order_freezes_front_to_back_only():
    ordering = Ordering("abcde", 0.5, "prefix")
    confidence = {"a": 0.9, "b": 0.9, "c": 0.1, "d": 0.9, "e": 0.1}
    assert reasons_of(confidence, ordering) == {
        "a": "confident",
        "b": "confident",
        "c": "below_threshold",
        "d": "behind_live_layer",
        "e": "below_threshold",
    }
    # "a" is frozen already, by whomever
    assert reasons_of({"b": 0.9, "c": 0.1}, Ordering("abc", 0.5, "prefix"), ["b", "c"])["b"] == "confident"


def test_a_layer_kept_for_its_optimizer_ends_the_prefix():
    ordering = Ordering("abcd", 0.5, "prefix")
    confidence = {"a": 0.9, "b": 0.9, "c": 0.9, "d": 0.1}
    assert reasons_of(confidence, ordering, keep_one_of=["ab", "cd"]) == {
        "a": "confident",
        "b": "last_active_layer",
        "c": "behind_live_layer",
        "d": "below_threshold",
    }


def test_a_stage_on_hold_freezes_nothing_and_keeps_counting():
    ordering = Ordering("abc", 0.5)
    decisions, streaks = decide(
        list("abc"), {"a": 0.9, "b": 0.1, "c": 0.1}, {}, {"a": 1}, ordering=ordering, patience=2, hold=True, **AT
    )
    assert [d.reason for d in decisions] == ["grouped", "below_threshold", "below_threshold"]
    assert all(d.action == "keep" for d in decisions)
    assert streaks == {"a": 2, "b": 0, "c": 0}


def test_the_layer_that_blocks_a_frozen_prefix_is_taken_at_a_lower_bar():
    costs = dict.fromkeys("abcdefgh", LayerCost(1.0, 1.0, 1.0))
    active = ["b", "g", "h"]  # all but these are frozen; b blocks a, c, d, e, f
    for order, reason in (("free", "below_threshold"), ("cost_aware", "confident")):
        ordering = Ordering("abcdefgh", 0.7, order, costs)
        reasons = reasons_of({"b": 0.6, "g": 0.6, "h": 0.1}, ordering, active)
        assert reasons["b"] == reason
    # in its own right "g" is an interior layer and needs more than the threshold, until "b" is frozen
    ordering = Ordering("abcdefgh", 0.7, "cost_aware", costs)
    assert reasons_of({"b": 0.1, "g": 0.72, "h": 0.1}, ordering, active)["g"] == "below_threshold"
    assert reasons_of({"b": 0.6, "g": 0.72, "h": 0.1}, ordering, active)["g"] == "confident"


def expected_reasons(active, confidence, excused, streaks, ordering, patience, keep_one_of):
    """The rule of `decide`, written down a second time: literally, one layer after the other, and slowly."""
    before = {layer for layer in ordering.layers if layer not in active}
    frozen = set()
    for _ in range(len(active)):
        bars = ordering.bars(before | frozen)
        reasons = {}
        for layer in active:
            if layer in excused:
                reasons[layer] = excused[layer]
            elif layer not in confidence:
                reasons[layer] = "no_answer"
            elif not confidence[layer] >= bars[layer]:
                reasons[layer] = "below_threshold"
            elif streaks.get(layer, 0) + 1 < patience:
                reasons[layer] = "patience"
            else:
                reasons[layer] = "confident"
        for group in [active, *keep_one_of]:
            members = [layer for layer in active if layer in group]
            if members and {reasons[layer] for layer in members} == {"confident"}:
                reasons[members[-1]] = "last_active_layer"
        if ordering.order == "prefix":
            closed = True
            for layer in ordering.layers:
                if layer in reasons and reasons[layer] == "confident" and not closed:
                    reasons[layer] = "behind_live_layer"
                closed = closed and (layer in before or reasons[layer] == "confident")
        again = {layer for layer in active if reasons[layer] == "confident"}
        if again == frozen:
            break
        frozen = again
    streaks = {
        layer: streaks.get(layer, 0) + 1 if layer in confidence and confidence[layer] >= bars[layer] else 0
        for layer in active
    }
    return reasons, streaks, bars


cost = st.floats(0, 10)


@st.composite
def stages(draw):
    """Arguments of `decide`: some layers are frozen already, some are excused, some have no answer."""
    layers = [f"layer{i}" for i in range(draw(st.integers(1, 10)))]
    active = [layer for layer in layers if draw(st.booleans())] or layers
    some = st.sets(st.sampled_from(layers))
    excused = {layer: "not_finite" for layer in active if layer in draw(some)}
    near = st.one_of(st.just(math.nan), st.sampled_from([0.5, 0.6, 0.7]), st.floats(0, 1))
    unanswered = draw(some)
    confidence = {layer: draw(near) for layer in active if layer not in unanswered and layer not in excused}
    streaks = {layer: draw(st.integers(0, 3)) for layer in active if draw(st.booleans())}
    costs = {layer: LayerCost(draw(cost), draw(cost), draw(cost)) for layer in layers}
    threshold = draw(st.sampled_from([0.3, 0.5, 0.7, 1.0]))
    ordering = Ordering(layers, threshold, draw(st.sampled_from(ORDERS)), costs, draw(st.booleans()))
    groups = draw(st.lists(st.lists(st.sampled_from(layers), unique=True), max_size=3))
    return active, confidence, excused, streaks, ordering, draw(st.integers(1, 3)), groups


@given(stages(), st.booleans(), st.booleans())
def test_the_rule_written_down_a_second_time(stage, dry_run, hold):
    active, confidence, excused, streaks, ordering, patience, groups = stage
    reasons, expected_streaks, bars = expected_reasons(*stage)
    options = {"ordering": ordering, "patience": patience, "keep_one_of": groups, "dry_run": dry_run, "hold": hold}
    decisions, new = decide(active, confidence, excused, streaks, **options, **AT)
    if hold:
        reasons = {layer: "grouped" if reason == "confident" else reason for layer, reason in reasons.items()}
    assert {d.layer: d.reason for d in decisions} == reasons
    assert [d.layer for d in decisions] == active
    assert new == expected_streaks
    freeze = "would_freeze" if dry_run else "freeze"
    for d in decisions:
        assert d.action == (freeze if d.reason == "confident" else "keep")
        if d.layer in confidence:
            assert (d.confidence, d.threshold) == pytest.approx((confidence[d.layer], bars[d.layer]), nan_ok=True)
        else:
            assert math.isnan(d.confidence)
            assert math.isnan(d.threshold)


def test_thresholds_are_reported():
    ordering = Ordering("abc", 0.7, "cost_aware", dict.fromkeys("abc", LayerCost(1.0, 1.0, 1.0)))
    decisions, _ = decide(list("abc"), {"a": 0.1, "b": 0.1}, {"c": "not_finite"}, {}, ordering=ordering, **AT)
    assert decisions[1].threshold > 0.7
    assert math.isnan(decisions[2].threshold)
