import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from smartfrz.predictor.sorting import replace_sorts  # noqa: E402


def sorting_model(length, axis=-1, largest=0, k=None):
    """Sorts by TopK, the last axis of three."""
    helper, kind = onnx.helper, onnx.TensorProto
    values = [helper.make_tensor_value_info(n, kind.FLOAT, ["a", "b", length]) for n in ("doubled", "x", "y")]
    nodes = [
        helper.make_node("Add", ["x", "x"], ["doubled"]),
        helper.make_node("TopK", ["doubled", "k"], ["sorted", "places"], axis=axis, largest=largest, sorted=1),
        helper.make_node("Neg", ["sorted"], ["y"]),
    ]
    sizes = [onnx.numpy_helper.from_array(np.array([k or length], np.int64), "k")]
    graph = helper.make_graph(nodes, "g", values[1:2], values[2:], sizes, value_info=values[:1])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("length", [1, 2, 3, 12, 31, 32, 33, 64, 100, 248, 256, 300])
@pytest.mark.parametrize("axis", [-1, 2])
def test_a_network_sorts_as_numpy_does(length, axis):
    model = sorting_model(length, axis)
    replace_sorts(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert "TopK" not in {node.op_type for node in model.graph.node}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(length)
    for shape in ((2, 3, length), (1, 1, length), (7, 30, length)):
        x = rng.choice([rng.normal(size=shape), rng.integers(-2, 3, shape)]).astype(np.float32)
        x[0, 0, 0] = 1e38
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], -np.sort(2 * x))


@pytest.mark.parametrize("other", [{"axis": 1}, {"largest": 1}, {"k": 3}])
def test_another_topk_is_not_replaced_by_something_else(other):
    with pytest.raises(ValueError, match="is no ascending sort of a last axis of known length"):
        replace_sorts(sorting_model(8, **other).graph)
