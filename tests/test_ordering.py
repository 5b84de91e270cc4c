import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz.control.ordering import LayerCost, Ordering, backward_cost, savings

LAYERS = "abcd"
COSTS = {
    "a": LayerCost(1.0, 10.0, 2.0),
    "b": LayerCost(1.0, 3.0, 4.0),
    "c": LayerCost(1.0, 5.0, 6.0),
    "d": LayerCost(1.0, 7.0, 8.0),
}

# frozen layers -> remaining, saved by the prefix, saved in the interior. Nobody asks for the input
# gradient of "a": without freezing 2 + (3 + 4) + (5 + 6) + (7 + 8) = 35.
CASES = {
    "": (35, 0, 0),
    "a": (30, 5, 0),  # its weight gradient, and the input gradient of "b"
    "b": (31, 0, 4),
    "ab": (21, 14, 0),
    "bc": (25, 0, 10),
    "abd": (13, 14, 8),
    "abc": (8, 27, 0),
    "abcd": (0, 35, 0),
}


@pytest.mark.parametrize("stopped", CASES)
def test_cost_of_a_backward_pass_by_hand(stopped):
    assert backward_cost(LAYERS, stopped, COSTS) == CASES[stopped]


costs = st.floats(0, 10)


@given(st.lists(st.tuples(costs, costs, st.booleans()), min_size=1, max_size=8))
def test_savings_are_the_difference_of_two_backward_passes(drawn):
    layers = [str(i) for i in range(len(drawn))]
    table = {layer: LayerCost(1.0, inside, weight) for layer, (inside, weight, _) in zip(layers, drawn, strict=True)}
    stopped = {layer for layer, (_, _, frozen) in zip(layers, drawn, strict=True) if frozen}
    now = backward_cost(layers, stopped, table)
    assert sum(now) == pytest.approx(sum(backward_cost(layers, (), table)))
    saved = savings(layers, stopped, table)
    assert list(saved) == [layer for layer in layers if layer not in stopped]
    for layer, value in saved.items():
        assert value == pytest.approx(now[0] - backward_cost(layers, stopped | {layer}, table)[0], abs=1e-9)


@pytest.mark.parametrize(
    ("stopped", "expected"),
    [
        ("", {"a": 5 + 1, "b": 4, "c": 6, "d": 8}),
        ("b", {"a": 2 + 3 + 5 + 2, "c": 6, "d": 8}),  # and the forward passes of "a" and "b"
        ("abc", {"d": 8 + 1}),
        ("ac", {"b": 4 + 5 + 7 + 2, "d": 8}),
    ],
)
def test_closing_a_prefix_that_is_cached_saves_its_forward_pass_too(stopped, expected):
    assert savings(LAYERS, stopped, COSTS, cached=True) == expected


def test_a_cache_lowers_the_bar_of_the_layer_that_blocks_a_prefix():
    plain, cached = (Ordering(LAYERS, 0.7, "cost_aware", COSTS, cached=cached).bars("b") for cached in (False, True))
    assert cached["a"] < plain["a"]
    assert {layer: cached[layer] for layer in "cd"} == {layer: plain[layer] for layer in "cd"}


def test_bars_stay_near_the_threshold():
    ordering = Ordering(LAYERS, 0.7, "cost_aware", {**COSTS, "c": LayerCost(0.0, 0.0, 0.0)})
    bars = ordering.bars(())
    assert bars["c"] == max(bars.values()) == pytest.approx(0.8638, abs=1e-4)  # logit of 0.7, and 1 more
    assert all(0.46 < bar < 0.87 for bar in bars.values())


@pytest.mark.parametrize("order", ["free", "prefix"])
def test_other_orders_have_one_bar(order):
    assert set(Ordering(LAYERS, 0.7, order, COSTS).bars("b").values()) == {0.7}


@pytest.mark.parametrize(
    "ordering",
    [
        Ordering(LAYERS, 0.7, "cost_aware"),
        Ordering(LAYERS, 1.0, "cost_aware", COSTS),
        Ordering(LAYERS, 0.7, "cost_aware", dict.fromkeys(LAYERS, LayerCost(0.0, 0.0, 0.0))),
    ],
    ids=["not measured", "threshold 1", "nothing costs anything"],
)
def test_cost_aware_without_costs_is_free(ordering):
    assert set(ordering.bars(()).values()) == {ordering.threshold}
