"""What the shapes of a graph imply is bounded before ONNX Runtime infers them."""

import re

import numpy as np
import pytest

from smartfrz.errors import PredictorFileError
from smartfrz.predictor.inspection import check_onnx
from smartfrz.predictor.protobuf import Message
from smartfrz.predictor.shapes import MAX_INTEGERS, MAX_NAME, MAX_RANK, check_shapes
from smartfrz.zoo import embedded_folder

onnx = pytest.importorskip("onnx")


def constant(graph, name, values, dtype=np.int64):
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, dtype), name))


def node(graph, operator, inputs, outputs, **attributes):
    graph.node.append(onnx.helper.make_node(operator, inputs, outputs, **attributes))


def repeat(graph, operator, inputs, times, **attributes):
    """Append nodes of which each takes what the one before makes; `*` stands for that in `inputs`."""
    for i in range(times):
        node(graph, operator, [f"t{i}" if name == "*" else name for name in inputs], [f"t{i + 1}"], **attributes)


def long_shape(graph):
    constant(graph, "shape", np.ones(100_000))
    node(graph, "Reshape", ["history", "shape"], ["y"])


def concatenated(graph):
    constant(graph, "ones", np.ones(1000))
    node(graph, "Concat", ["ones"] * 100, ["shape"], axis=0)
    node(graph, "Reshape", ["history", "shape"], ["y"])


def doubled(graph):
    constant(graph, "t0", [1, 1])
    repeat(graph, "Concat", ["*", "*"], 22, axis=0)


def doubled_shape(graph):
    node(graph, "Shape", ["history"], ["t0"])
    repeat(graph, "Concat", ["*", "*"], 22, axis=0)


def shape_of_shape(graph):
    node(graph, "Identity", ["history"], ["x0"])
    for i in range(20):
        node(graph, "Shape", [f"x{i}"], [f"s{i}"])
        node(graph, "Concat", [f"s{i}"] * 2, [f"c{i}"], axis=0)
        node(graph, "Expand", [f"x{i}", f"c{i}"], [f"x{i + 1}"])


def unsqueezed(graph):
    constant(graph, "axes", np.arange(1000))
    node(graph, "Identity", ["history"], ["t0"])
    repeat(graph, "Unsqueeze", ["*", "axes"], 400)


def unsqueezed_by_attribute(graph):
    node(graph, "Identity", ["history"], ["t0"])
    repeat(graph, "Unsqueeze", ["*"], 3, axes=[0, 1, 2])


def unsqueezed_more_than_squeezed(graph):
    constant(graph, "axes", [0, 1])
    constant(graph, "twice", [0, 0])
    node(graph, "Identity", ["history"], ["t0"])
    for i in range(0, 20, 2):
        node(graph, "Unsqueeze", [f"t{i}", "axes"], [f"t{i + 1}"])
        node(graph, "Squeeze", [f"t{i + 1}", "twice"], [f"t{i + 2}"])


def gathered(graph):
    constant(graph, "t0", [[0]])
    repeat(graph, "Gather", ["*", "*"], 23, axis=0)


def gathered_from_history(graph):
    node(graph, "Cast", ["history"], ["t0"], to=7)
    repeat(graph, "Gather", ["*", "*"], 20, axis=0)


def gathered_by_index(graph):
    constant(graph, "t0", [[0]])
    repeat(graph, "GatherND", ["*", "*"], 23)


def filled(graph):
    constant(graph, "shape", np.ones(9))
    node(graph, "ConstantOfShape", ["shape"], ["y"])


def filled_and_filled_again(graph):
    constant(graph, "shape", [200_000])
    node(graph, "ConstantOfShape", ["shape"], ["ones"])
    node(graph, "Cast", ["ones"], ["integers"], to=7)
    node(graph, "ConstantOfShape", ["integers"], ["y"])


def counted(graph):
    for name, value in (("from", 0), ("to", 2**24), ("by", 1)):
        constant(graph, name, value)
    node(graph, "Range", ["from", "to", "by"], ["shape"])
    node(graph, "Expand", ["history", "shape"], ["y"])


def lengths_as_shape(graph):
    node(graph, "Reshape", ["history", "lengths"], ["y"])


def numbers_in_an_attribute(graph):
    node(graph, "Constant", [], ["shape"], value_ints=[1] * 2000)


def a_constant_in_a_node(graph):
    node(graph, "Constant", [], ["shape"], value=onnx.numpy_helper.from_array(np.ones(2000, np.int32)))


def a_packed_constant(graph):
    tensor = graph.initializer.add(name="shape", data_type=7, dims=[1])
    tensor.int64_data.extend([1] * 2000)


def axes_of_a_constant(graph):
    constant(graph, "x", np.ones([1] * 60), np.float32)


def axes_that_are_declared(graph):
    graph.value_info.append(onnx.helper.make_tensor_value_info("v", 1, [1] * 1000))


def axes_of_an_input(graph):
    graph.input[0].type.tensor_type.shape.dim.extend(onnx.TensorShapeProto(dim=[{"dim_value": 1}] * 6).dim)


def a_list_of_tensors(graph):
    graph.value_info.append(onnx.helper.make_tensor_sequence_value_info("v", 1, [1]))


def outputs(graph):
    node(graph, "Split", ["history"], [f"o{i}" for i in range(20_000)], num_outputs=20_000)


def inputs(graph):
    node(graph, "Sum", ["history"] * 20_000, ["y"])


def a_name(graph):
    node(graph, "Identity", ["history"], ["y" * 1001])


def a_name_of_a_dimension(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "layers" * 50


HOSTILE = {
    long_shape: "an integer constant of 100000 values; expected at most 1024",
    concatenated: "100000 integers that are concatenated; expected at most 1024",
    doubled: "2048 integers that are concatenated",
    doubled_shape: "1536 integers that are concatenated",
    shape_of_shape: r"a tensor of up to \d\d axes \('x\d'\); expected at most 8",
    unsqueezed: r"a tensor of up to 1003 axes \('t1'\)",
    unsqueezed_by_attribute: "a tensor of up to 9 axes",
    unsqueezed_more_than_squeezed: "a tensor of up to 9 axes",
    gathered: "a tensor of up to 9 axes",
    gathered_from_history: "a tensor of up to 9 axes",
    gathered_by_index: "a tensor of up to 9 axes",
    filled: "a tensor of up to 9 axes",
    filled_and_filled_again: "a ConstantOfShape to a shape of an unknown number of axes; expected one made of constants",
    counted: "a Expand to a shape of an unknown number",
    lengths_as_shape: "a Reshape to a shape of an unknown number",
    numbers_in_an_attribute: "an attribute of 2000 numbers",
    a_constant_in_a_node: "an integer constant of 2000 values",
    a_packed_constant: "an integer constant of 2000 values",
    axes_of_a_constant: "a constant of 60 axes",
    axes_that_are_declared: "a tensor of 1000 axes",
    axes_of_an_input: "a tensor of 9 axes",
    a_list_of_tensors: "a tensor that is a list, a map or sparse",
    outputs: "more than 10000 inputs, outputs, constants and attributes",
    inputs: "more than 10000 inputs, outputs, constants and attributes",
    a_name: f"a name of 1001 bytes; expected at most {MAX_NAME}",
    a_name_of_a_dimension: "a name of 300 bytes; expected at most 200",
}


@pytest.fixture(scope="module")
def model():
    return onnx.load(embedded_folder() / "smartfrz-tiny.onnx").SerializeToString()


def changed(model, change):
    model = onnx.load_from_string(model)
    change(model.graph)
    return model.SerializeToString()


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.__name__)
def test_what_would_take_gigabytes_to_load_is_refused_before(case, model):
    with pytest.raises(
        PredictorFileError, match=rf"(?s)'x\.onnx' has ({HOSTILE[case]}).*is not loaded\. Export it again"
    ):
        check_onnx(changed(model, case), "x.onnx")


def within(graph):
    """As much as is allowed."""
    constant(graph, "axes", np.arange(MAX_RANK - 3))
    node(graph, "Unsqueeze", ["history", "axes"], ["t0"])
    repeat(graph, "Identity", ["*"], 20)
    constant(graph, "one", [0])
    for i in range(20, 60, 2):
        node(graph, "Squeeze", [f"t{i}", "one"], [f"t{i + 1}"])
        node(graph, "Unsqueeze", [f"t{i + 1}", "one"], [f"t{i + 2}"])
    constant(graph, "many", np.ones(MAX_INTEGERS))
    node(graph, "Shape", ["history"], ["shape"])
    node(graph, "Mul", ["shape", "shape"], ["product"])
    node(graph, "Where", ["product", "shape", "product"], ["chosen"])
    node(graph, "Reshape", ["history", "chosen"], ["y"])


def test_what_is_within_the_bounds_passes(model):
    check_onnx(changed(model, within), "x.onnx")


@pytest.mark.parametrize("path", sorted(embedded_folder().glob("*.onnx")), ids=lambda path: path.stem)
def test_no_tensor_of_a_shipped_predictor_has_more_axes_than_the_bound_says(path):
    check_axes(path)


def test_no_tensor_of_a_predictor_that_reads_losses_has_more_axes_than_the_bound_says(loss_predictor_file):
    check_axes(loss_predictor_file)


def check_axes(path):
    from smartfrz.predictor import shapes

    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    content = memoryview(path.read_bytes())
    check_shapes(content, "x.onnx")
    graph = shapes._Graph(next(Message(content, [10**6]).messages(7)))
    graph.walk()
    found = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
    assert len(found) > 100
    assert all(rank <= graph._known[name.encode()].rank <= 3 for name, rank in found.items() if name)


def no_order(graph):
    node(graph, "Identity", ["later"], ["y"])


def two_of_a_name(graph):
    constant(graph, "x", [1])
    constant(graph, "x", [1])


def an_attribute_twice(graph):
    node(graph, "Shape", ["history"], ["y"], start=0)
    graph.node[-1].attribute.append(onnx.helper.make_attribute("start", 1))


DAMAGED = {
    no_order: "the input 'later' of a node is made by no node before it",
    two_of_a_name: "two tensors have the name 'x'",
    an_attribute_twice: "the attribute 'start' is there twice",
}


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.__name__)
def test_a_graph_that_can_be_read_in_two_ways_is_refused(case, model):
    with pytest.raises(PredictorFileError, match=rf"is damaged \({re.escape(DAMAGED[case])}"):
        check_onnx(changed(model, case), "x.onnx")


def test_a_graph_in_two_halves_is_refused(model):
    # protobuf merges them
    with pytest.raises(PredictorFileError, match=r"is damaged \(field 7 is there 2 times"):
        check_onnx(model + b"\x3a\x00", "x.onnx")


def test_reading_ends_after_so_many_fields():
    with pytest.raises(ValueError, match="too many fields"):
        Message(memoryview(b"\x08\x01" * 101), [100])


def test_packed_numbers_count_as_others_do():
    message = Message(memoryview(b"\x08\x05\x0a\x03\x96\x01\x07\x15\x00\x00\x80\x3f"), [100])
    assert message.integers(1) == [5, 150, 7]
    assert (message.count(1), message.count(2, 5), message.count(3)) == (3, 1, 0)
    assert Message(memoryview(b"\x08" + b"\xff" * 9 + b"\x01"), [100]).integer(1) == -1
