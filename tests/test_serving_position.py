"""Where a layer stands, and how the training loss falls, over the wire: from `RemotePredictor` to the network."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not importlib.util.find_spec("kserve"):  # not imported: its protobuf names are those of tritonclient
    pytest.skip("kserve is not installed", allow_module_level=True)
pytest.importorskip("onnxscript")

from numpy_adapter import NumpyAdapter, make_info  # noqa: E402
from serving_process import ServingProcess, outputs  # noqa: E402

from smartfrz.control.controller import FreezeController  # noqa: E402
from smartfrz.control.options import FreezeOptions  # noqa: E402
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
def server(file, loss_predictor_file, predictor_file, tmp_path_factory):
    files = map(str, (file, loss_predictor_file, predictor_file))
    process = ServingProcess(tmp_path_factory.mktemp("log") / "log", *files, "--max-delay-ms", 50)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def asked():
    walk = np.random.default_rng(0).normal(size=(LAYERS, WINDOW, SIZE)).cumsum(1) * 0.01 + 1.0
    return walk.astype(np.float32), np.full(LAYERS, WINDOW, np.int64), np.linspace(0, 1, LAYERS, dtype=np.float32)


@pytest.fixture(scope="module")
def told(asked):
    """Everything that a predictor may read, with losses of which some are not known."""
    falling = np.exp(-0.3 * np.arange(WINDOW) + np.linspace(0, 1, LAYERS)[:, None]).astype(np.float32)
    falling[::3, :2], falling[1::3, 4] = np.nan, 0
    return *asked, falling


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


def test_the_answer_about_losses_is_that_of_the_file(server, loss_predictor_file, told):
    remote, local = RemotePredictor(server.url("hearing")), Predictor(loss_predictor_file, device="cpu")
    assert remote.reads_loss
    history, lengths, position, loss = told
    for place, heard in ((position, loss), (None, loss), (position, None)):
        answer, expected = (predictor.predict(history, lengths, place, heard) for predictor in (remote, local))
        np.testing.assert_allclose(answer.confidence, expected.confidence, atol=1e-6)
    assert np.abs(local.predict(*told).confidence - local.predict(*told[:3]).confidence).max() > 1e-4


def test_many_layers_are_asked_in_parts_with_their_losses(server, loss_predictor_file, told):
    many = [np.concatenate([array] * 6) for array in told]  # 72 layers, of which a request has 64
    answer = RemotePredictor(server.url("hearing")).predict(*many)
    expected = Predictor(loss_predictor_file, device="cpu").predict(*many)
    np.testing.assert_allclose(answer.confidence, expected.confidence, atol=1e-6)


def test_requests_with_and_without_losses_run_together(server, loss_predictor_file, told):
    remote, local = RemotePredictor(server.url("hearing")), Predictor(loss_predictor_file, device="cpu")
    history, lengths, position, loss = told
    short = history[:, 3:], lengths - 3, position, loss[:, 3:]
    questions = [(told, told[:2], (history, lengths, None, loss), short)[i % 4] for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: remote.predict(*question), questions))
    for question, answer in zip(questions, answers, strict=True):
        np.testing.assert_allclose(answer.confidence, local.predict(*question).confidence, atol=1e-6)


@pytest.mark.parametrize("unknown", [0, -1, np.nan, np.inf, -np.inf])
def test_what_is_no_loss_is_not_known(server, told, unknown):
    remote = RemotePredictor(server.url("hearing"))
    answer = remote.predict(*told[:3], np.full(told[3].shape, unknown, np.float32))
    np.testing.assert_array_equal(answer.confidence, remote.predict(*told[:3]).confidence)


def test_a_predictor_that_reads_no_loss_is_sent_none(server, file, told):
    remote = RemotePredictor(server.url("placed"))
    assert (remote.positional, remote.reads_loss) == (True, False)
    expected = Predictor(file, device="cpu").predict(*told[:3])
    np.testing.assert_allclose(remote.predict(*told).confidence, expected.confidence, atol=1e-6)


def decided(predictor, losses):
    """The confidences of a run in which the loss before each step is given."""
    adapter = NumpyAdapter.random({"a": 400, "b": 200, "c": 100})
    controller = FreezeController(
        adapter, predictor, FreezeOptions(record_every=1, decide_every=1, patience=1, threshold=0.9999)
    )
    for loss in losses:
        adapter.train_step()
        controller.note_loss(loss)
        controller.step()
    return [event.confidence for event in controller.events]


def test_a_run_that_asks_the_server_sees_what_the_file_says_about_its_losses(server, loss_predictor_file):
    losses = [4.0, 3.0, float("nan"), 2.0, 1.5, 1.0, 0.8, 0.5]
    local = Predictor(loss_predictor_file, device="cpu")
    expected = decided(local, losses)
    np.testing.assert_allclose(decided(RemotePredictor(server.url("hearing")), losses), expected, atol=1e-6)
    apart = np.abs(np.subtract(expected, decided(local, [1.0] * 8)))
    assert np.nanmax(apart) > 1e-3  # NaN: too few records


def test_metadata_list_the_inputs_of_those_that_read_them(server):
    position = {"name": "position", "datatype": "FP32", "shape": [-1]}
    loss = {"name": "loss", "datatype": "FP32", "shape": [-1, -1]}
    for name, optional in (("tiny", []), ("placed", [position]), ("hearing", [position, loss])):
        _, described = server.get(f"/v2/models/{name}")
        assert described["inputs"][2:] == optional
    remote = RemotePredictor(server.url("tiny"))
    assert (remote.positional, remote.reads_loss) == (False, False)


@pytest.mark.parametrize(
    ("model", "place", "message"),
    [
        ("placed", [0.0, 2.0], "from 0, the first layer, to 1, the last, or -1"),
        ("placed", [0.0], "position holds 1 values; expected 2"),
        ("tiny", [0.0, 1.0], "reads no position"),
    ],
)
def test_wrong_positions_are_refused(server, model, place, message):
    status, answer = ask(server, model, {"name": "position", "datatype": "FP32", "shape": [len(place)], "data": place})
    assert status == 400
    assert message in answer["error"]


def ask(server, model, tensor):
    """Ask about two layers of three records, with one more tensor."""
    history = {"name": "history", "datatype": "FP32", "shape": [2, 3, SIZE], "data": [0.5] * (2 * 3 * SIZE)}
    lengths = {"name": "lengths", "datatype": "INT64", "shape": [2], "data": [3, 3]}
    return server.ask(model, json.dumps({"inputs": [history, lengths, tensor]}).encode())


LOSS = {"name": "loss", "datatype": "FP32", "shape": [2, 3], "data": [3, 2, 1, 3, 2, 1]}
WRONG_LOSSES = {
    "of another window": (
        "hearing",
        {"shape": [2, 2], "data": [1] * 4},
        "loss is float32 (2, 2); expected float32 (2, 3), one value for each row of the history",
    ),
    "of other layers": (
        "hearing",
        {"shape": [3, 3], "data": [1] * 9},
        "loss is float32 (3, 3); expected float32 (2, 3)",
    ),
    "one a layer": ("hearing", {"shape": [2], "data": [1, 1]}, "'loss' is FP32 of shape [2]; expected FP32 with 2 pos"),
    "of another datatype": ("hearing", {"datatype": "FP64"}, "'loss' is FP64 of shape [2, 3]; expected FP32 with 2"),
    "too few values": (
        "hearing",
        {"data": [1, 1]},
        "'data' of 'loss' does not fit; expected 6 numbers, flat or nested",
    ),
    "NaN in JSON": ("hearing", {"data": [np.nan] * 6}, "The body is no JSON"),
    "nothing in JSON": ("hearing", {"data": [None] * 6}, "'data' of 'loss' does not fit; expected 6 numbers"),
    "with a predictor of weights": ("tiny", {}, "'tiny' reads no loss: its representation is 'raw'"),
    "with one of positions": ("placed", {}, "'placed' reads no loss: its representation is 'trajectory'"),
    "of another name": ("hearing", {"name": "losses"}, "and perhaps position and loss"),
}


@pytest.mark.parametrize("case", WRONG_LOSSES)
def test_wrong_losses_are_refused(server, case):
    model, change, message = WRONG_LOSSES[case]
    status, answer = ask(server, model, LOSS | change)
    assert status == 400
    assert message in answer["error"]


def test_losses_in_json_may_be_nested_and_zero_is_unknown(server, loss_predictor_file):
    local = Predictor(loss_predictor_file, device="cpu")
    history, lengths = np.full((2, 3, SIZE), 0.5, np.float32), np.array([3, 3])
    for rows in ([[3, 2, 1], [3, 2, 1]], [[0, 0, 0], [0, 0, 1e300]]):
        status, answer = ask(server, "hearing", LOSS | {"data": rows})
        assert status == 200
        with np.errstate(over="ignore"):
            loss = np.array(rows).astype(np.float32)
        expected = local.predict(history, lengths, None, loss).confidence
        np.testing.assert_allclose(outputs(answer)["confidence"], expected, atol=1e-6)
