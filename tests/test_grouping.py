"""The rule that joins modules to layers, without any framework."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz.control.grouping import Module, Weight, find_containers, group_modules

MATRIX, VECTOR = (4, 3), (4,)


def module(name, *shapes, **facts):
    """A module whose weights have these shapes. Its parent is what its name has before the last dot; '' is the root."""
    weights = tuple(Weight(f"{name}:{i}", (name, i), shape) for i, shape in enumerate(shapes))
    return Module(name, name.rpartition(".")[0] if name else None, weights, **facts)


def norm(name, *shapes, **facts):
    return module(name, *shapes, is_norm=True, ends_layer=True, statistics=(name,), **facts)


def group(*modules, ran=None):
    root = [] if any(m.name == "" for m in modules) else [module("")]
    everything = [*root, *modules]
    return group_modules(everything, [m.name for m in everything] if ran is None else ran)


def names(units):
    return {unit.name: [weight.name for weight in unit.weights] for unit in units}


def test_layers_come_in_execution_order():
    units = group(
        module("head", MATRIX), module("body", MATRIX), module("stem", MATRIX), ran=["", "stem", "body", "head"]
    )
    assert [unit.name for unit in units] == ["stem", "body", "head"]


def test_a_module_that_did_not_run_is_no_layer():
    assert names(group(module("used", MATRIX), module("extra", MATRIX), ran=["", "used"])) == {"used": ["used:0"]}


def test_a_norm_joins_the_layer_before_it_and_ends_it():
    units = group(module("conv1", MATRIX, flops=7), norm("norm1", VECTOR, flops=2), module("conv2", MATRIX, flops=5))
    assert names(units) == {"conv1": ["conv1:0", "norm1:0"], "conv2": ["conv2:0"]}
    assert [unit.members for unit in units] == [["conv1", "norm1"], ["conv2"]]
    assert [unit.statistics for unit in units] == [["norm1"], []]
    assert [unit.output for unit in units] == ["norm1", "conv2"]
    assert [unit.flops for unit in units] == [9, 5]


def test_what_runs_before_the_first_layer_joins_it_but_does_not_end_it():
    [unit] = group(norm("first", VECTOR), module("slope", VECTOR), module("conv", MATRIX))
    assert names([unit]) == {"conv": ["first:0", "slope:0", "conv:0"]}
    assert unit.statistics == ["first"]
    assert unit.output == "conv"


def test_a_norm_of_several_dimensions_is_no_layer():
    assert list(names(group(module("conv", MATRIX), norm("norm", MATRIX)))) == ["conv"]


def test_a_norm_without_weights_counts_for_its_statistics():
    [unit] = group(module("conv", MATRIX), norm("norm"), module("activation", ends_layer=True))
    assert unit.members == ["conv", "norm"]
    assert unit.output == "norm"


def test_statistics_may_be_named_as_often_as_they_change():
    [unit] = group(module("conv", MATRIX), module("norm", statistics=("norm", "norm")))
    assert unit.statistics == ["norm", "norm"]


def test_biases_of_two_dimensions_make_no_layer():
    bias = Weight("odd:0", 1, MATRIX, is_bias=True)
    units = group(module("conv", MATRIX), Module("odd", "", (bias,)))
    assert names(units) == {"conv": ["conv:0", "odd:0"]}
    assert [weight.name for weight in units[0].judged] == ["conv:0"]


def test_weights_of_a_container_join_the_next_layer_which_is_not_judged_by_them():
    units = group(
        module("stem", MATRIX), module("blocks", MATRIX, VECTOR), module("blocks.0", MATRIX), module("head", MATRIX)
    )
    assert names(units) == {
        "stem": ["stem:0"],
        "blocks.0": ["blocks:0", "blocks:1", "blocks.0:0"],
        "head": ["head:0"],
    }
    assert [[weight.name for weight in unit.judged] for unit in units] == [["stem:0"], ["blocks.0:0"], ["head:0"]]


def test_weights_of_a_container_behind_every_layer_join_the_last_one():
    units = group(module("conv", MATRIX), module("tail", VECTOR), module("tail.norm", VECTOR))
    assert names(units) == {"conv": ["conv:0", "tail.norm:0", "tail:0"]}


def test_containers_are_the_modules_around_those_that_run_with_weights():
    modules = [
        module(""),
        module("a"),
        module("a.b"),
        module("a.b.c", MATRIX),
        module("d"),
        module("d.e"),
        module("d.f", VECTOR),
    ]
    known = {m.name: m for m in modules}
    assert find_containers(known, ["", "a", "a.b", "a.b.c", "d", "d.e"]) == {"", "a", "a.b"}  # d.f did not run


def test_a_module_that_is_used_without_being_called_joins_the_module_around_it():
    units = group(module("attention", MATRIX), module("attention.out", MATRIX, VECTOR), ran=["", "attention"])
    assert names(units) == {"attention": ["attention:0", "attention.out:0", "attention.out:1"]}
    assert [weight.name for weight in units[0].judged] == ["attention:0", "attention.out:0"]
    assert units[0].members == ["attention", "attention.out"]


def test_a_list_of_weights_is_used_by_the_module_around_it_even_if_that_is_a_container():
    units = group(
        module("net.scales", MATRIX, is_list=True), module("net"), module("net.fc", MATRIX), ran=["", "net", "net.fc"]
    )
    assert names(units) == {"net.fc": ["net.scales:0", "net.fc:0"]}


def test_tied_modules_are_one_layer():
    shared = Weight("embedding:0", "shared", MATRIX)
    decoder = Module("decoder", "", (shared, Weight("decoder:1", "bias", VECTOR)), flops=3)
    units = group(Module("embedding", "", (shared,)), module("middle", MATRIX), decoder)
    assert names(units) == {"embedding": ["embedding:0", "decoder:1"], "middle": ["middle:0"]}
    assert units[0].members == ["embedding", "decoder"]
    assert units[0].output == "embedding"
    assert units[0].flops == 3


def test_one_module_may_be_tied_to_two_layers():
    one, two = Weight("one:0", 1, MATRIX), Weight("two:0", 2, MATRIX)
    units = group(Module("one", "", (one,)), Module("two", "", (two,)), Module("both", "", (two, one)))
    assert names(units) == {"one": ["one:0"], "two": ["two:0"]}
    assert units[1].members == ["two", "both"]


def test_a_container_that_is_tied_keeps_the_rest_for_the_next_layer():
    shared = Weight("first:0", 1, MATRIX)
    container = Module("net", "", (shared, Weight("net:1", 2, VECTOR)))
    units = group(Module("first", "", (shared,)), container, module("net.fc", MATRIX))
    assert names(units) == {"first": ["first:0"], "net.fc": ["net:1", "net.fc:0"]}


def test_norms_join_the_layers_that_feed_them_where_the_graph_is_known():
    units = group(
        module("conv", MATRIX),
        module("shortcut", MATRIX),
        module("pad", source="conv"),
        norm("norm", VECTOR, source="pad"),
        norm("other", VECTOR, source="shortcut"),
    )
    assert {unit.name: unit.members for unit in units} == {"conv": ["conv", "norm"], "shortcut": ["shortcut", "other"]}


def test_a_norm_that_a_container_feeds_joins_the_last_layer():
    units = group(module("a"), module("a.x", MATRIX), module("a.y", MATRIX), norm("norm", VECTOR, source="a"))
    assert units[1].members == ["a.y", "norm"]


@pytest.mark.parametrize(
    "modules", [[], [module("a", VECTOR)], [norm("a", MATRIX)], [module("a"), module("b", VECTOR)]]
)
def test_no_layer(modules):
    assert group(*modules) == []


SHAPES = st.lists(st.sampled_from([MATRIX, VECTOR]), max_size=2)


@st.composite
def networks(draw):
    """Modules with random nesting, weights, ties and sources, and the order in which some of them ran."""
    modules = [module("", *draw(SHAPES))]
    for number in range(draw(st.integers(1, 8))):
        parent = draw(st.sampled_from(modules)).name
        name = f"{parent}.{number}" if parent else str(number)
        others = [w for m in modules for w in m.weights]
        tied = tuple(draw(st.lists(st.sampled_from(others), max_size=1))) if others else ()
        own = module(name, *draw(SHAPES)).weights
        source = draw(st.sampled_from([None, *(m.name for m in modules)]))
        modules.append(Module(name, parent, own + tied, is_norm=draw(st.booleans()), source=source))
    order = draw(st.permutations([m.name for m in modules[1:]]))
    return modules, ["", *order[: draw(st.integers(0, len(order)))]]


@given(networks())
def test_each_weight_of_what_ran_is_in_exactly_one_layer(network):
    modules, ran = network
    units = group_modules(modules, ran)
    keys = [weight.key for unit in units for weight in unit.weights]
    assert len(keys) == len(set(keys))
    if units:
        assert {w.key for m in modules if m.name in ran for w in m.weights} <= set(keys)


@given(networks())
def test_layers_are_named_after_what_ran_in_its_order_and_judged_by_matrices_of_theirs(network):
    modules, ran = network
    units = group_modules(modules, ran)
    assert [unit.name for unit in units] == [name for name in ran if name in {unit.name for unit in units}]
    for unit in units:
        assert unit.judged
        assert all(weight.is_matrix for weight in unit.judged)
        assert {weight.key for weight in unit.judged} <= {weight.key for weight in unit.weights}


@given(networks())
def test_running_again_changes_nothing(network):
    modules, ran = network
    assert group_modules(modules, ran) == group_modules(modules, [*ran, *reversed(ran)])


def test_an_operation_that_holds_its_norm_is_a_layer_with_it():
    units = group(
        module("a", MATRIX, is_operation=True, flops=5),
        norm("a.norm", VECTOR, flops=2),
        module("b", MATRIX, flops=7),
        norm("b.norm", VECTOR),
        module("head", MATRIX),
    )
    assert names(units) == {"a": ["a:0", "a.norm:0"], "b": ["b:0", "b.norm:0"], "head": ["head:0"]}
    assert [unit.members for unit in units] == [["a", "a.norm"], ["b", "b.norm"], ["head"]]
    assert [unit.statistics for unit in units] == [["a.norm"], ["b.norm"], []]
    assert [unit.output for unit in units] == ["a", "b", "head"]
    assert [unit.flops for unit in units] == [7, 7, 0]


def test_an_operation_is_a_layer_whatever_it_holds():
    units = group(
        module("linear", MATRIX, is_operation=True),
        module("linear.down", MATRIX),
        module("linear.up", MATRIX),
        module("linear.unused", MATRIX),
        ran=["", "linear", "linear.down", "linear.up"],
    )
    assert [unit.members for unit in units] == [["linear", "linear.down", "linear.up", "linear.unused"]]


def test_expert_weights_and_the_router_beside_them_are_one_layer():
    units = group(
        module("stem", MATRIX),
        module("experts", (4, 3, 5), (4, 5, 3), flops=100),
        module("experts.router", (4, 3), VECTOR, flops=10),
        module("head", MATRIX),
    )
    assert names(units)["experts"] == ["experts:0", "experts:1", "experts.router:0", "experts.router:1"]
    assert [unit.flops for unit in units] == [0, 110, 0]


def test_a_table_that_is_added_makes_no_layer_of_what_is_around_the_patches():
    for shape, flops in ((1, 50, 4), 9), ((50, 4), 0):
        units = group(module("embeddings", shape, flops=flops), module("embeddings.patches", (4, 12)))
        assert [unit.name for unit in units] == ["embeddings.patches"]


def test_a_wrapper_that_lists_the_weight_of_what_is_inside_is_a_container():
    kernel = Weight("dense:0", 1, MATRIX)
    units = group(Module("wrapper", "", (kernel,)), Module("wrapper.dense", "wrapper", (kernel,)))
    assert [unit.name for unit in units] == ["wrapper.dense"]


def test_a_layer_is_not_judged_by_a_small_part_of_it():
    units = group(
        module("net", (50, 40), flops=30), module("net.small", MATRIX, VECTOR), module("net.large", (40, 50), flops=5)
    )
    assert [[weight.name for weight in unit.judged] for unit in units] == [["net:0", "net.small:0"], ["net.large:0"]]
    assert [unit.flops for unit in units] == [30, 5]  # what the container computes with its own weights


def test_vectors_judge_a_layer_whose_matrices_are_a_small_part():
    [unit] = group(module("a", (1, 2), (40,)))
    assert [weight.name for weight in unit.judged] == ["a:0", "a:1"]


def test_a_kernel_of_one_input_with_its_bias_and_two_norms_is_judged_by_the_kernel():
    [unit] = group(module("a", (64, 1), (64,)), norm("b", (64,), (64,)), norm("c", (64,), (64,)))
    assert [weight.name for weight in unit.judged] == ["a:0"]


def test_empty_weights_judge_nothing_but_freeze():
    units = group(module("none", (4, 0), VECTOR), module("a", MATRIX))
    assert names(units) == {"a": ["none:0", "none:1", "a:0"]}
    assert [weight.name for weight in units[0].judged] == ["a:0"]
