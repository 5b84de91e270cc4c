import numpy as np
import pytest

from smartfrz.dataset_builder.labels import LabelRule, label_layers

NAN = float("nan")

# curve, tolerance, labels
FORWARD = {
    "rises and stays": ([0.2, 0.6, 0.9, 0.91], 0.05, [0, 0, 1, 1]),
    "flat": ([0.5, 0.5, 0.5], 0.01, [1, 1, 1]),
    "leaves again at the end": ([0.9, 0.9, 0.9, 0.5], 0.05, [0, 0, 0, 1]),
    "drifts in small steps": ([0.80, 0.84, 0.88, 0.92], 0.05, [0, 0, 1, 1]),
    "falls and stays": ([0.9, 0.4, 0.4], 0.05, [0, 1, 1]),
    "equal up to rounding": ([0.86, 0.91], 0.05, [1, 1]),
    "a little more than the tolerance": ([0.86, 0.9101], 0.05, [0, 1]),
    "NaN at the start": ([NAN, 0.9, 0.9], 0.05, [-1, 1, 1]),
    "NaN later": ([0.9, NAN, 0.9], 0.05, [-1, -1, 1]),
    "all NaN": ([NAN, NAN], 0.05, [-1, -1]),
}
# the same with three records looked at
BACKWARD = {
    "rises and stays": ([0.2, 0.6, 0.9, 0.91, 0.91], 0.05, [-1, -1, 0, 0, 1]),
    "does not see the future": ([0.9, 0.9, 0.9, 0.1], 0.05, [-1, -1, 1, 0]),
    "too short": ([0.9, 0.9], 0.05, [-1, -1]),
    "compares with the present": ([0.80, 0.84, 0.88], 0.05, [-1, -1, 0]),
    "NaN leaves the window": ([NAN, 0.9, 0.9, 0.9], 0.05, [-1, -1, -1, 1]),
}

BAD_RULES = {
    "kind": {"kind": "sideways"},
    "no tolerance": {"tolerance": 0.0},
    "tolerance of everything": {"tolerance": 1.0},
    "NaN tolerance": {"tolerance": NAN},
    "one record": {"records": 1},
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward_rule(case):
    curve, tolerance, expected = FORWARD[case]
    assert label_layers(np.array([curve]), LabelRule("forward", tolerance)).tolist() == [expected]


@pytest.mark.parametrize("case", BACKWARD)
def test_backward_rule(case):
    curve, tolerance, expected = BACKWARD[case]
    assert label_layers(np.array([curve]), LabelRule("backward", tolerance, records=3)).tolist() == [expected]


def test_layers_are_labelled_each_for_itself():
    labels = label_layers(np.array([[0.1, 0.9, 0.9], [NAN, NAN, 0.5]]), LabelRule(tolerance=0.05))
    assert labels.tolist() == [[0, 1, 1], [-1, -1, 1]]
    assert labels.dtype == np.int8


def test_curves_are_left_as_they_are():
    curves = np.array([[0.1, NAN, 0.9]])
    before = curves.copy()
    label_layers(curves, LabelRule())
    np.testing.assert_array_equal(curves, before)


@pytest.mark.parametrize("case", BAD_RULES)
def test_bad_rules_are_refused(case):
    with pytest.raises(
        ValueError, match=r"LabelRule received kind=.* expected 'forward' or 'backward', a tolerance in"
    ):
        LabelRule(**BAD_RULES[case])


def test_a_rule_survives_being_stored():
    rule = LabelRule("backward", 0.03, 7)
    assert LabelRule(**rule.to_dict()) == rule
