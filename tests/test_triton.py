"""`smartfrz zoo export -o`: what Triton's own protobuf parser reads, and what ONNX Runtime answers to it."""

import importlib.util
import shutil
import warnings

import numpy as np
import pytest
from click.testing import CliRunner

from smartfrz import zoo
from smartfrz.cli import main
from smartfrz.errors import PredictorFileError, RegistryError
from smartfrz.predictor.runtime import Predictor
from smartfrz.serving import triton
from smartfrz.zoo import embedded_folder

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tritonclient") is None, reason="needs tritonclient[grpc]")
BASE = embedded_folder() / "smartfrz-base.onnx"
NUMPY = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}


def invoke(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def parsed(place):
    from google.protobuf import text_format

    with warnings.catch_warnings():
        # Its generated code is one version of protobuf older than what may be installed.
        warnings.filterwarnings("ignore", "Protobuf gencode version", UserWarning)
        from tritonclient.grpc import model_config_pb2

    return text_format.Parse((place / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())


def dtype_name(tensor):
    return tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name


def test_the_default_predictor_as_a_model_repository(tmp_path):
    result = invoke(main, "zoo", "export", "smartfrz-base", "-o", tmp_path / "models")
    assert result.exit_code == 0, result.output
    place = tmp_path / "models" / "smartfrz-base"
    assert result.stdout == f"wrote {place}: tritonserver --model-repository={tmp_path / 'models'}\n"
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()) == [
        "1/model.onnx",
        "config.pbtxt",
    ]
    assert (place / "1" / "model.onnx").read_bytes() == BASE.read_bytes()

    config, info = parsed(place), Predictor(BASE, device="cpu").info
    assert (config.name, config.backend, config.default_model_filename) == (place.name, "onnxruntime", "model.onnx")
    assert config.max_batch_size == 1024
    assert config.HasField("dynamic_batching")
    history, lengths = config.input
    assert (history.name, dtype_name(history), list(history.dims)) == ("history", "TYPE_FP32", [-1, info.tailored_size])
    assert (lengths.name, dtype_name(lengths), list(lengths.dims)) == ("lengths", "TYPE_INT64", [1])
    assert lengths.HasField("reshape")
    assert list(lengths.reshape.shape) == []
    assert [(o.name, list(o.dims)) for o in config.output] == [("confidence", [2]), ("attention", [-1])]
    assert float(config.parameters["smartfrz.threshold"].string_value) == info.threshold
    assert config.parameters["smartfrz.sha256"].string_value == Predictor(BASE).sha256


@pytest.mark.parametrize("max_layers", [0, 64])
def test_the_tensors_are_those_of_the_graph(tmp_path, max_layers):
    check_tensors(BASE, tmp_path, max_layers)


def test_the_optional_inputs_of_a_graph_are_left_out(tmp_path, loss_predictor_file):
    assert Predictor(loss_predictor_file, device="cpu").reads_loss
    check_tensors(loss_predictor_file, tmp_path, 64)


def check_tensors(path, folder, max_layers):
    import onnxruntime

    place = triton.export(path, folder, max_layers=max_layers)
    config = parsed(place)
    session = onnxruntime.InferenceSession(place / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    # As Triton does it: no further required input, and with batching a first dimension is put before all.
    assert [tensor.name for tensor in config.input] == [tensor.name for tensor in session.get_inputs()]
    known = {tensor.name: tensor for tensor in (*session.get_inputs(), *session.get_outputs())}
    for tensor in (*config.input, *config.output):
        dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
        graph = [size if isinstance(size, int) else -1 for size in known[tensor.name].shape]
        assert ([-1, *dims] if max_layers else dims) == graph
        assert NUMPY[dtype_name(tensor)] == known[tensor.name].type
    assert config.max_batch_size == max_layers
    assert config.HasField("dynamic_batching") == (max_layers > 0)


def test_rows_of_several_requests_may_share_a_run():
    predictor, rng = zoo.load("smartfrz-base", device="cpu"), np.random.default_rng(0)
    shape = (3, 6, predictor.info.tailored_size)
    requests = [(rng.normal(size=shape).cumsum(1).astype(np.float32), np.array([6, 2, 4])) for _ in range(3)]
    together = predictor.predict(*(np.concatenate(part) for part in zip(*requests, strict=True)))
    for number, request in enumerate(requests):
        alone = predictor.predict(*request)
        np.testing.assert_allclose(together.confidence[3 * number : 3 * number + 3], alone.confidence, atol=1e-5)


def test_a_file_by_path_with_another_name_beside_other_models(tmp_path, predictor_file):
    shutil.copy(predictor_file, tmp_path / "mine.onnx")
    (tmp_path / "models" / "other").mkdir(parents=True)
    for arguments in ((), ("--max-layers", "8")):  # the second time over what is there
        result = invoke(
            main, "zoo", "export", tmp_path / "mine.onnx", "-o", tmp_path / "models", "--name", "mine", *arguments
        )
        assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["mine", "other"]
    assert parsed(tmp_path / "models" / "mine").max_batch_size == 8


def test_what_is_no_name_or_no_predictor_is_refused(tmp_path, predictor_file):
    with pytest.raises(RegistryError, match=r"'\.\./x' is no name of a model; expected up to 64 .*--name"):
        triton.export(predictor_file, tmp_path / "models", name="../x")
    (tmp_path / "text.onnx").write_text("no predictor\n")
    with pytest.raises(PredictorFileError, match="is not a SmartFRZ predictor"):
        triton.export(tmp_path / "text.onnx", tmp_path / "models")
    assert not (tmp_path / "models").exists()
    result = invoke(main, "zoo", "export", "smartfrz-base")
    assert (result.exit_code, "Missing option '--output'" in result.stderr) == (2, True)
