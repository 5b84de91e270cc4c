"""Where a layer stands, over the wire: from `RemotePredictor` through batching to the network."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not importlib.util.find_spec("kserve"):  # not imported: its protobuf names are those of tritonclient
    pytest.skip("kserve is not installed", allow_module_level=True)
pytest.importorskip("onnxscript")

from numpy_adapter import make_info  # noqa: E402
from serving_process import ServingProcess  # noqa: E402

from smartfrz.predictor.remote import RemotePredictor  # noqa: E402
from smartfrz.predictor.runtime import Predictor  # noqa: E402
from smartfrz.predictor.training.export import export  # noqa: E402
from smartfrz.predictor.training.model import FreezePredictor  # noqa: E402

SIZE, WINDOW, LAYERS = 64, 8, 12


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("placed") / "placed.onnx"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FreezePredictor(SIZE, "trajectory")
    export(network, make_info(name="placed", tailored_size=SIZE, window=WINDOW, representation="trajectory"), path)
    return path


@pytest.fixture(scope="module")
def server(file, predictor_file, tmp_path_factory):
    process = ServingProcess(
        tmp_path_factory.mktemp("log") / "log", str(file), str(predictor_file), "--max-delay-ms", 50
    )
    yield process
    process.kill()


@pytest.fixture(scope="module")
def asked():
    walk = np.random.default_rng(0).normal(size=(LAYERS, WINDOW, SIZE)).cumsum(1) * 0.01 + 1.0
    return walk.astype(np.float32), np.full(LAYERS, WINDOW, np.int64), np.linspace(0, 1, LAYERS, dtype=np.float32)


def test_the_answer_is_that_of_the_file(server, file, asked):
    remote, local = RemotePredictor(server.url("placed")), Predictor(file, device="cpu")
    assert remote.positional
    for arguments in (asked, asked[:2]):
        answer, expected = remote.predict(*arguments), local.predict(*arguments)
        np.testing.assert_allclose(answer.confidence, expected.confidence, atol=1e-6)
    assert np.abs(local.predict(*asked).confidence - local.predict(*asked[:2]).confidence).max() > 1e-4


def test_requests_with_and_without_positions_run_together(server, file, asked):
    remote, local = RemotePredictor(server.url("placed")), Predictor(file, device="cpu")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: remote.predict(*asked[: 2 + i % 2]), range(16)))
    for index, answer in enumerate(answers):
        expected = local.predict(*asked[: 2 + index % 2])
        np.testing.assert_allclose(answer.confidence, expected.confidence, atol=1e-6)


def test_metadata_list_the_input_of_those_that_read_it(server):
    _, described = server.get("/v2/models/placed")
    assert described["inputs"][-1] == {"name": "position", "datatype": "FP32", "shape": [-1]}
    assert not RemotePredictor(server.url("tiny")).positional


@pytest.mark.parametrize(
    ("model", "place", "message"),
    [
        ("placed", [0.0, 2.0], "from 0, the first layer, to 1, the last, or -1"),
        ("placed", [0.0], "position holds 1 values; expected 2"),
        ("tiny", [0.0, 1.0], "reads no position"),
    ],
)
def test_wrong_positions_are_refused(server, model, place, message):
    tensor = {"name": "position", "datatype": "FP32", "shape": [len(place)], "data": place}
    history = {"name": "history", "datatype": "FP32", "shape": [2, 3, SIZE], "data": [0.5] * (2 * 3 * SIZE)}
    lengths = {"name": "lengths", "datatype": "INT64", "shape": [2], "data": [3, 3]}
    status, answer = server.ask(model, {"inputs": [history, lengths, tensor]})
    assert status == 400
    assert message in answer["error"]
