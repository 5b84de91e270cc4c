import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz.errors import PredictorFileError
from smartfrz.predictor.contract import seal
from smartfrz.predictor.inspection import (
    ATTRIBUTE_NAME,
    EXTERNAL_DATA,
    FORBIDDEN,
    MAX_FILE_SIZE,
    MAX_METADATA,
    MAX_NODES,
    MESSAGES,
    NODE_DOMAIN,
    OPERATOR,
    PROPERTY,
    PROPERTY_KEY,
    check_onnx,
)
from smartfrz.predictor.runtime import Predictor

onnx = pytest.importorskip("onnx")


def external(tensor, location="../../secret"):
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location


def in_a_subgraph(graph):
    inner = onnx.GraphProto(name="inner")
    external(inner.initializer.add(name="w"))
    return onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)


def in_a_sparse_tensor(model):
    external(model.graph.sparse_initializer.add().values)


def in_a_constant(model):
    value = onnx.TensorProto(data_type=1, dims=[1])
    external(value)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=value))


def in_a_list_of_graphs(model):
    inner = onnx.GraphProto(name="inner")
    inner.node.append(in_a_subgraph(inner))
    model.graph.node.add(op_type="X").attribute.add(name="graphs", type=10).graphs.append(inner)


EXTERNAL = {
    "initializer": lambda model: external(model.graph.initializer[0]),
    "an address in memory": lambda model: external(model.graph.initializer[0], "*/_ORT_MEM_ADDR_/*"),
    "a tag without a place": lambda model: model.graph.initializer[0].external_data.add(),
    "sparse tensor": in_a_sparse_tensor,
    "constant": in_a_constant,
    "branch": lambda model: model.graph.node.append(in_a_subgraph(model.graph)),
    "list of graphs": in_a_list_of_graphs,
    "function": lambda model: model.functions.add(name="f").node.append(in_a_subgraph(None)),
    "training": lambda model: external(model.training_info.add().algorithm.initializer.add()),
}
DAMAGED = {
    "cut within a field": b"\x3a\x05abc",
    "cut within a number": b"\x08\xff",
    "no such wire type": b"\x0f",
    "field 0": b"\x02\x00",
    "endless number": b"\x08" + b"\xff" * 11,
    "within a nested message": b"\x3a\x02\x0a\x05",
    "cut within fixed64": b"\x09abc",
}


@pytest.fixture
def model(predictor_file):
    return onnx.load(predictor_file)


def test_the_field_numbers_are_those_of_onnx():
    holders = {}
    for name, nested in MESSAGES.items():
        fields = getattr(onnx, name).DESCRIPTOR.fields
        assert {
            f.number: f.message_type.name for f in fields if f.message_type and f.message_type.name in MESSAGES
        } == (nested)
        holders |= {(name, f.name): f.number for f in fields}
    assert holders[EXTERNAL_DATA[0], "external_data"] == EXTERNAL_DATA[1]
    assert holders[NODE_DOMAIN[0], "domain"] == NODE_DOMAIN[1]
    assert holders[OPERATOR[0], "op_type"] == OPERATOR[1]
    assert holders[ATTRIBUTE_NAME[0], "name"] == ATTRIBUTE_NAME[1]
    assert onnx.ModelProto.DESCRIPTOR.fields_by_name["metadata_props"].number == PROPERTY[1]
    assert onnx.StringStringEntryProto.DESCRIPTOR.fields_by_name["key"].number == PROPERTY_KEY[1]
    names = {
        "ModelProto": ("training_info", "functions"),
        "AttributeProto": ("g", "graphs", "sparse_tensor", "sparse_tensors", "strings"),
        "TensorProto": ("string_data",),
        "GraphProto": ("sparse_initializer",),
    }
    assert {(message, holders[message, name]) for message in names for name in names[message]} == set(FORBIDDEN)


def test_a_predictor_passes(predictor_file):
    check_onnx(predictor_file.read_bytes(), "tiny.onnx")


@pytest.mark.parametrize("place", EXTERNAL)
def test_external_data_is_found(place, model):
    EXTERNAL[place](model)
    with pytest.raises(PredictorFileError, match=r"'x\.onnx' keeps data outside of the file.*Export it again"):
        check_onnx(model.SerializeToString(), "x.onnx")


def test_external_data_is_refused_before_a_session_is_made(model, tmp_path, monkeypatch):
    from smartfrz.predictor import runtime

    external(model.graph.initializer[0], "../../etc/passwd")
    properties = {p.key: p for p in model.metadata_props}
    properties["smartfrz.sha256"].value = "0" * 64
    (tmp_path / "evil.onnx").write_bytes(seal(model.SerializeToString()))
    monkeypatch.setattr(runtime, "open_session", None)
    with pytest.raises(PredictorFileError, match=r"outside of the file \(.*etc/passwd"):
        Predictor(tmp_path / "evil.onnx")


def test_custom_operators_are_refused(model):
    model.graph.node[0].domain = "com.example"
    with pytest.raises(PredictorFileError, match=r"custom operators of 'com\.example'; expected operators that every"):
        check_onnx(model.SerializeToString(), "x.onnx")


def test_custom_operators_in_a_branch_are_refused(model):
    inner = onnx.GraphProto(name="inner")
    inner.node.add(op_type="Run", domain="com.example")
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))
    with pytest.raises(PredictorFileError, match=r"custom operators of 'com\.example'"):
        check_onnx(model.SerializeToString(), "x.onnx")


def branch(model):
    model.graph.node.append(onnx.helper.make_node("Identity", ["x"], ["y"], body=onnx.GraphProto(name="inner")))


def constant_text(model, **attribute):
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["y"], **attribute))


FORBIDDEN_PARTS = {
    "text in tensors": lambda model: model.graph.initializer.append(
        onnx.helper.make_tensor("y", onnx.TensorProto.STRING, [1], [b"long"])
    ),
    "text in": lambda model: constant_text(model, value_string="long"),
    "text": lambda model: constant_text(model, value_strings=["long"]),
    "operators that no predictor needs: Trilu": lambda model: model.graph.node.add(op_type="Trilu"),
    "functions of its own": lambda model: model.functions.add(name="f", domain=""),
    "subgraphs": branch,
    "subgraphs, as": lambda model: model.graph.node[0].attribute.add(name="graphs", type=10).graphs.add(name="inner"),
    "sparse tensors": lambda model: model.graph.sparse_initializer.add(),
    "sparse": lambda model: model.graph.node[0].attribute.add(name="s", type=11).sparse_tensor.SetInParent(),
    "steps of training": lambda model: model.training_info.add(),
    "operators that no predictor needs: RandomNormal": lambda model: model.graph.node.add(op_type="RandomNormal"),
    "operators that no predictor needs: If, Loop": lambda model: model.graph.node.extend(
        [onnx.NodeProto(op_type="Loop"), onnx.NodeProto(op_type="If")]
    ),
}


@pytest.mark.parametrize("part", FORBIDDEN_PARTS)
def test_a_graph_that_can_do_more_than_a_predictor_is_refused(part, model):
    FORBIDDEN_PARTS[part](model)
    with pytest.raises(PredictorFileError, match=rf"'x\.onnx' contains {part}.*is not run. Export it again"):
        check_onnx(model.SerializeToString(), "x.onnx")


def test_operators_of_microsoft_are_custom_ones(model):
    model.graph.node[0].domain = "com.microsoft"
    with pytest.raises(PredictorFileError, match=r"custom operators of 'com\.microsoft'"):
        check_onnx(model.SerializeToString(), "x.onnx")


def test_a_graph_of_too_many_nodes(model):
    model.graph.node.extend([onnx.helper.make_node("Identity", ["x"], ["y"])] * MAX_NODES)
    with pytest.raises(PredictorFileError, match=rf"has \d{{4}} nodes; expected at most {MAX_NODES}"):
        check_onnx(model.SerializeToString(), "x.onnx")


def test_a_metadata_property_that_is_there_twice(model):
    model.metadata_props.add(key="smartfrz.threshold", value="0.01")
    with pytest.raises(PredictorFileError, match=r"has the metadata property 'smartfrz\.threshold' twice"):
        check_onnx(model.SerializeToString(), "x.onnx")


@pytest.mark.parametrize("parts", [1, 100])
def test_metadata_that_would_take_minutes_to_read(parts, model):
    for number in range(parts):
        model.metadata_props.add(key=f"k{number}", value="[]," * (MAX_METADATA // parts // 3 + 1))
    with pytest.raises(PredictorFileError, match=rf"more than {MAX_METADATA >> 10} KiB of metadata; expected"):
        check_onnx(model.SerializeToString(), "x.onnx")


def test_a_metadata_property_that_is_no_text(model):
    content = model.SerializeToString().replace(b"Apache-2.0", b"Apache\xff2.0")
    with pytest.raises(PredictorFileError, match=r"is damaged \('utf-8' codec can't decode"):
        check_onnx(content, "x.onnx")


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name):
    with pytest.raises(
        PredictorFileError, match=r"'x\.onnx' is not an ONNX file, or is damaged \(.*Copy the file again"
    ):
        check_onnx(DAMAGED[name], "x.onnx")


def test_a_file_of_nothing_but_fields_is_given_up():
    with pytest.raises(PredictorFileError, match="more than 1000000 fields"):
        check_onnx(b"\x08\x01" * 1_000_001, "x.onnx")


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_harmless(content):
    with contextlib.suppress(PredictorFileError):
        check_onnx(content, "x.onnx")


def test_a_file_of_three_gigabytes_is_refused_unread(tmp_path):
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # sparse: takes no room
    with pytest.raises(
        PredictorFileError, match=f"larger than {MAX_FILE_SIZE >> 20} MiB; expected a predictor of a few"
    ):
        Predictor(path)
