import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz.predictor.decision import decide

KEPT = {"below_threshold", "patience", "history_too_short", "not_finite", "last_active_layer"}
AT = {"step": 30, "timestamp": 2, "threshold": 0.5}

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
    decisions, new = decide(active, confidence, excused, streaks, patience=patience, dry_run=dry_run, **AT)
    assert [d.layer for d in decisions] == active
    assert [d.reason for d in decisions] == reasons
    freeze = "would_freeze" if dry_run else "freeze"
    assert [d.action for d in decisions] == [freeze if r == "confident" else "keep" for r in reasons]
    assert list(new.values()) == expected_streaks
    assert {(d.step, d.timestamp) for d in decisions} == {(30, 2)}


def test_confidence_is_reported_and_nan_where_nobody_asked():
    decisions, _ = decide(["a", "b"], {"b": 0.25}, {"a": "history_too_short"}, {}, **AT)
    assert math.isnan(decisions[0].confidence)
    assert decisions[1].confidence == 0.25


answers = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=8)


@given(answers, st.lists(st.integers(0, 3), min_size=8, max_size=8), st.integers(1, 3), st.floats(0.01, 1))
def test_somebody_keeps_learning_and_nothing_given_is_changed(values, before, patience, threshold):
    active = [f"layer{i}" for i in range(len(values))]
    confidence = {layer: v for layer, v in zip(active, values, strict=True) if v is not None}
    excused = {layer: "not_finite" for layer in active if layer not in confidence}
    streaks = dict(zip(active, before, strict=False))
    given_ = [active[:], dict(confidence), dict(excused), dict(streaks)]
    decisions, _ = decide(
        active, confidence, excused, streaks, step=1, timestamp=0, threshold=threshold, patience=patience
    )
    assert any(d.action == "keep" for d in decisions)
    for d in decisions:
        assert (d.action == "keep") == (d.reason in KEPT)
        if d.action == "freeze":
            assert d.confidence >= threshold
            assert streaks[d.layer] + 1 >= patience
    assert [active, confidence, excused, streaks] == given_
