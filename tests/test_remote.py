"""A predictor on a server, and training when the server goes away."""

import contextlib
import http.server
import importlib.util
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy_adapter import NumpyAdapter, make_info
from serving_process import ServingProcess, histories

from smartfrz import zoo
from smartfrz.control.controller import FreezeController
from smartfrz.control.options import FreezeOptions
from smartfrz.errors import DownloadError, ServerError
from smartfrz.predictor.remote import HEADER_LENGTH, RemotePredictor
from smartfrz.predictor.runtime import Predictor

needs_kserve = pytest.mark.skipif(importlib.util.find_spec("kserve") is None, reason="kserve is not installed")
INFO = make_info()
SHA256 = "ab" * 32
SIZES = {"a": 40, "b": (5, 4), "c": 3}


class Impostor(http.server.ThreadingHTTPServer):
    """Describes a predictor as a real server does, and answers as `mode` says.

    Attributes:
        mode: One of the keys of `ANSWERS`; `confident` answers as it should.
        times: How often it was asked for decisions.
        described: Names of inputs in its metadata; None for metadata without inputs.
        received: For each question, its inputs and their shapes.
        hung_up: Set when the client closes a connection on which an answer without end is sent.
    """

    daemon_threads = True

    def __init__(self, properties=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.times = "confident", 0
        self.hung_up = threading.Event()
        self.properties = INFO.to_metadata() | {"smartfrz.sha256": SHA256} if properties is None else properties
        self.layers, self.described, self.received = [], None, []
        self.url = f"http://127.0.0.1:{self.server_port}/scripted"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        names = self.server.described
        inputs = {} if names is None else {"inputs": [{"name": name} for name in names]}
        self.answer(200, json.dumps({"name": "scripted", "properties": self.server.properties} | inputs).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        header = json.loads(body[: int(self.headers["Inference-Header-Content-Length"])])
        shape = header["inputs"][0]["shape"]
        self.server.times += 1
        self.server.layers.append(shape[0])
        self.server.received.append({given["name"]: given["shape"] for given in header["inputs"]})
        ANSWERS[self.server.mode](self, *shape[:2])

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def tensors(self, confidence, attention, **more):
        outputs = [
            {"name": n, "datatype": "FP32", "shape": list(np.shape(a)), "data": np.ravel(a).tolist()}
            for n, a in (("confidence", confidence), ("attention", attention))
        ]
        self.answer(200, json.dumps({"outputs": outputs, "parameters": {"smartfrz.sha256": SHA256}} | more).encode())

    def log_message(self, *arguments):
        pass


def confident(layers):
    return np.tile([0.1, 0.9], (layers, 1))


def drip(handler, layers, window):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def drip_headers(handler, layers, window):
    with contextlib.suppress(OSError):  # the client hangs up
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(200):
            handler.wfile.write(b"a")
            time.sleep(0.02)
        return
    handler.server.hung_up.set()


def continue_without_end(handler, layers, window):
    with contextlib.suppress(OSError):
        for _ in range(200):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.02)
        return
    handler.server.hung_up.set()


def break_off(handler, layers, window):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")


ANSWERS = {
    "confident": lambda h, n, w: h.tensors(confident(n), np.zeros((n, w))),
    "once busy": lambda h, n, w: (
        h.answer(503, b"busy") if h.server.times == 1 else h.tensors(confident(n), np.zeros((n, w)))
    ),
    "busy": lambda h, n, w: h.answer(503, b"busy"),
    "refuses": lambda h, n, w: h.answer(400, b'{"error": "no"}'),
    "redirects": lambda h, n, w: h.answer(302, b"", Location="http://127.0.0.1:1/"),
    "hangs": lambda h, n, w: time.sleep(3),
    "drips": drip,
    "drips headers": drip_headers,
    "continues without end": continue_without_end,
    "breaks off": break_off,
    "hangs up": lambda h, n, w: h.connection.shutdown(socket.SHUT_RDWR),
    "garbage": lambda h, n, w: h.answer(200, bytes(range(256))),
    "lists without end": lambda h, n, w: h.answer(200, b"[" * 10**6),
    "a list": lambda h, n, w: h.answer(200, b"[]"),
    "without end": lambda h, n, w: h.answer(200, b" " * (8 * 2**20)),
    "NaN": lambda h, n, w: h.tensors(np.full((n, 2), np.nan), np.zeros((n, w))),
    "no confidence": lambda h, n, w: h.tensors(confident(n) * 7, np.zeros((n, w))),
    "beyond float32": lambda h, n, w: h.tensors(confident(n) * 1e300, np.zeros((n, w))),
    "a sum beyond float32": lambda h, n, w: h.tensors(np.full((n, 2), 3e38), np.zeros((n, w))),
    "what a terminal obeys": lambda h, n, w: h.answer(400, b"\x1b[2J\x07no"),
    "another shape": lambda h, n, w: h.tensors(confident(n + 1), np.zeros((n, w))),
    "no outputs": lambda h, n, w: h.answer(200, b'{"outputs": null}'),
    "outputs of another kind": lambda h, n, w: h.answer(200, b'{"outputs": [1, {"name": []}]}'),
    "sizes that cannot be": lambda h, n, w: h.answer(
        200, b'{"outputs": [{"name": "confidence", "shape": [1], "parameters": {"binary_data_size": "x"}}]}'
    ),
    "a length of many digits": lambda h, n, w: h.answer(200, b"[]", **{HEADER_LENGTH: "9" * 5000}),
    "another predictor": lambda h, n, w: h.tensors(
        confident(n), np.zeros((n, w)), parameters={"smartfrz.sha256": "cd" * 32}
    ),
}
FAILURES = {
    "busy": r"does not answer \(status 503: busy\)",
    "refuses": r"refuses, with status 400: {\"error\": \"no\"}",
    "redirects": "refuses, with status 302",
    "hangs": r"does not answer \((TimeoutError|not within)",
    "drips": r"does not answer \((TimeoutError|not within)",
    "drips headers": r"does not answer \(not within 0.6 s",
    "continues without end": r"does not answer \(not within 0.6 s",
    "breaks off": r"does not answer \((IncompleteRead|the answer breaks off)",
    "hangs up": "does not answer",
    "garbage": "does not answer with JSON",
    "lists without end": "does not answer with JSON",
    "a list": "answers with list; expected an object",
    "without end": "answers with more than 4 MiB",
    "NaN": "with values from 0 to 1",
    "no confidence": "with values from 0 to 1",
    "beyond float32": "with values from 0 to 1",
    "a sum beyond float32": "with values from 0 to 1",
    "what a terminal obeys": r"with status 400: \[2Jno",
    "another shape": r"answers with {'confidence': \(4, 2\).*expected {'confidence': \(3, 2\)",
    "no outputs": r"answers with {}; expected",
    "outputs of another kind": "answers with a tensor that cannot be read",
    "sizes that cannot be": "answers with a tensor that cannot be read",
    "a length of many digits": "answers with list; expected an object",
    "another predictor": "answers with another predictor than when this run began",
}


@pytest.fixture
def impostor():
    server = Impostor()
    yield server
    server.shutdown()
    server.server_close()


def controller_of(predictor, **options):
    adapter = NumpyAdapter.random(SIZES)
    settings = {"record_every": 1, "decide_every": 2, "patience": 1, **options}
    return FreezeController(adapter, predictor, FreezeOptions(**settings)), adapter


def run(controller, adapter, steps):
    for _ in range(steps):
        adapter.train_step()
        controller.step()


def test_facts_come_from_the_servers_metadata(impostor):
    predictor = zoo.load(impostor.url)
    assert isinstance(predictor, RemotePredictor)
    assert predictor.info == INFO
    assert predictor.sha256 == SHA256
    assert zoo.load(predictor) is predictor
    assert repr(predictor) == f"RemotePredictor({impostor.url!r}, 'scripted', threshold=0.5)"


@pytest.mark.parametrize("end", ["/scripted", "/scripted/", "/v2/models/scripted"])
def test_addresses(impostor, end):
    predictor = RemotePredictor(f"http://127.0.0.1:{impostor.server_port}{end}")
    assert predictor.url == impostor.url
    assert RemotePredictor(f"http://127.0.0.1:{impostor.server_port}/a/prefix/x").url.endswith("/a/prefix/x")


@pytest.mark.parametrize("url", ["ftp://host/x", "http://host", "http:///x", "nonsense"])
def test_what_is_no_address(url):
    with pytest.raises(ServerError, match="expected http://host:port/NAME"):
        RemotePredictor(url)


def test_an_address_with_a_password_is_not_asked():
    with pytest.raises(DownloadError, match="holds a user name or password"):
        zoo.load("http://user:secret@127.0.0.1/x")


def test_mock_no_server_elsewhere_is_asked_offline(impostor, monkeypatch):
    asked = []
    monkeypatch.setattr("smartfrz.predictor.remote.RemotePredictor", asked.append)
    monkeypatch.setenv("SMARTFRZ_OFFLINE", "1")
    with pytest.raises(ServerError, match="SMARTFRZ_OFFLINE is set, so that https://host/x is not asked"):
        zoo.load("https://host/x")
    zoo.load(impostor.url)  # on this machine
    monkeypatch.setenv("SMARTFRZ_OFFLINE", "0")
    zoo.load("https://host/x")
    assert asked == [impostor.url, "https://host/x"]


@pytest.mark.parametrize(("option", "value"), [("timeout", 0), ("timeout", float("inf")), ("retries", -1)])
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"`{option}` is"):
        RemotePredictor("http://127.0.0.1:1/x", **{option: value})


def test_nobody_at_the_address():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        begin = time.monotonic()
        with pytest.raises(ServerError, match=r"/x does not answer \(ConnectionRefusedError"):
            zoo.load(f"http://127.0.0.1:{unused.getsockname()[1]}/x")
    assert time.monotonic() - begin > 0.2  # it has tried again


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ([], "no 'properties' of a SmartFRZ predictor. Serve it with smartfrz serve"),
        ({"x": 1}, "no 'properties' of a SmartFRZ predictor"),
        ({}, "does not describe a predictor that this version can use: .* it has no metadata"),
        (INFO.to_metadata(), "reports the checksum '0{64}' and max_layers 64; expected"),  # a file that was not sealed
        (INFO.to_metadata() | {"smartfrz.threshold": "7", "smartfrz.sha256": SHA256}, "out of range"),
        (INFO.to_metadata() | {"smartfrz.sha256": "../../x"}, r"reports the checksum '../../x' and max_layers 64"),
        (
            INFO.to_metadata() | {"smartfrz.sha256": SHA256, "smartfrz.max_layers": "0"},
            "max_layers 0; expected 64 hexadecimal digits, not all zero, and a positive number",
        ),
        (INFO.to_metadata() | {"smartfrz.sha256": SHA256, "smartfrz.format_version": "9"}, "has format_version 9"),
    ],
)
def test_a_server_that_describes_something_else(properties, message):
    server = Impostor(properties)
    with pytest.raises(ServerError, match=message):
        RemotePredictor(server.url)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mode", FAILURES)
def test_a_server_that_fails(impostor, mode):
    predictor = RemotePredictor(impostor.url, timeout=0.6, retries=1)
    impostor.mode = mode
    begin = time.monotonic()
    with pytest.raises(ServerError, match=FAILURES[mode]) as error:
        predictor.predict(*histories(3, 4, 8))
    assert time.monotonic() - begin < 3
    assert str(error.value).isprintable()


@pytest.mark.parametrize("mode", ["drips headers", "continues without end"])
def test_the_deadline_is_that_of_the_whole_answer_and_leaves_no_thread(impostor, mode):
    predictor = RemotePredictor(impostor.url, timeout=0.3, retries=0)
    impostor.mode = mode
    begin = time.monotonic()
    with pytest.raises(ServerError, match=r"does not answer \(not within 0.3 s\)"):
        predictor.predict(*histories(3, 4, 8))
    assert time.monotonic() - begin < 2  # the answer lasts 4
    assert impostor.hung_up.wait(2)
    until = time.monotonic() + 2
    while any(thread.name == "smartfrz-remote" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_predictor_can_be_copied_to_another_process(impostor):
    predictor = pickle.loads(pickle.dumps(RemotePredictor(impostor.url)))
    assert predictor.predict(*histories(3, 4, 8)).confidence.shape == (3, 2)


def test_another_attempt(impostor):
    impostor.mode = "once busy"
    confidence, _ = RemotePredictor(impostor.url).predict(*histories(3, 4, 8))
    np.testing.assert_allclose(confidence, confident(3), atol=1e-6)
    assert impostor.times == 2


def test_many_layers_are_asked_about_in_parts():
    server = Impostor(INFO.to_metadata() | {"smartfrz.sha256": SHA256, "smartfrz.max_layers": "4"})
    confidence, attention = RemotePredictor(server.url).predict(*histories(10, 3, 8))
    assert confidence.shape == (10, 2)
    assert attention.shape == (10, 3)
    assert server.layers == [4, 4, 2]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("described", [None, ["history", "lengths"], ["history", "lengths", "position"]])
def test_a_server_that_lists_no_loss_is_sent_none(impostor, described):
    impostor.described = described
    predictor = RemotePredictor(impostor.url)
    assert not predictor.reads_loss
    predictor.predict(*histories(3, 4, 8), loss=np.ones((3, 4), np.float32))
    assert impostor.received == [{"history": [3, 4, 8], "lengths": [3]}]


def test_a_loss_goes_to_a_server_that_lists_it_in_the_same_parts():
    server = Impostor(INFO.to_metadata() | {"smartfrz.sha256": SHA256, "smartfrz.max_layers": "4"})
    server.described = ["history", "lengths", "position", "loss"]
    predictor = RemotePredictor(server.url)
    assert predictor.reads_loss
    predictor.predict(*histories(6, 3, 8), loss=np.ones((6, 3), np.float32))
    assert [sent["loss"] for sent in server.received] == [[4, 3], [2, 3]]
    server.shutdown()
    server.server_close()


def test_training_goes_on_without_freezing_and_the_server_is_asked_again(impostor, caplog):
    controller, adapter = controller_of(RemotePredictor(impostor.url, timeout=2, retries=2))
    impostor.mode = "busy"
    with caplog.at_level(logging.INFO, "smartfrz"):
        run(controller, adapter, 6)
    assert controller.frozen == {}
    assert {event.reason for event in controller.events} == {"no_answer"}
    assert all(np.isnan(event.confidence) for event in controller.events)
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # one, for three stages
    assert "does not answer (status 503: busy). Training goes on, and nothing freezes" in caplog.text
    assert impostor.times == 3 + 1 + 1  # no further attempts while it is known to be away
    impostor.mode = "confident"
    with caplog.at_level(logging.INFO, "smartfrz"):
        run(controller, adapter, 2)
    assert list(controller.frozen) == ["a", "b"]
    assert "answers again" in caplog.text


def test_what_training_draws_does_not_depend_on_the_server(impostor):
    import random

    random.seed(0)
    state = random.getstate()
    predictor = RemotePredictor(impostor.url)
    impostor.mode = "once busy"
    predictor.predict(*histories(3, 4, 8))
    assert random.getstate() == state


@pytest.fixture(scope="module")
def server(predictor_file, tmp_path_factory):
    process = ServingProcess(tmp_path_factory.mktemp("server") / "log", str(predictor_file), "--max-batch", 8)
    yield process
    process.kill()


@pytest.fixture
def start(tmp_path):
    """Starts servers, which end with the test."""
    started = []

    def start(*arguments, **options):
        started.append(ServingProcess(tmp_path / f"log{len(started)}", *arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@needs_kserve
def test_a_real_server_answers_as_the_file(server, predictor_file):
    remote, local = zoo.load(server.url("tiny")), Predictor(predictor_file, device="cpu")
    assert remote.info == local.info
    assert remote.sha256 == local.sha256
    history, lengths = histories(20, 10, 64)
    for one, other in zip(remote.predict(history, lengths), local.predict(history, lengths), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(ServerError, match=r"/none refuses, with status 404.*Model with name none does not exist"):
        zoo.load(server.url("none"))


@needs_kserve
def test_weights_that_a_real_server_refuses(server):
    history, lengths = histories(2, 4, 64)
    history[0, 0, 0] = np.nan
    with pytest.raises(ServerError, match=r"refuses, with status 400: .*history holds NaN or infinity"):
        zoo.load(server.url("tiny")).predict(history, lengths)


@needs_kserve
def test_a_server_that_is_killed_while_pytorch_trains_and_comes_back(eager_predictor, start, caplog):
    pytest.importorskip("torch")
    from torch_runs import NET, Net, train

    from smartfrz.adapters.torch import SmartFRZ

    torch = sys.modules["torch"]
    server = start(f"eager={eager_predictor}")
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    # It freezes whatever it is asked about, and is asked at each fourth step.
    freezer = SmartFRZ(
        model,
        optimizer,
        server.url("eager"),
        record_every=2,
        decide_every=2,
        patience=2,
        threshold=0.01,
        total_steps=40,
    )
    train(model, optimizer, freezer, 0, 11)
    assert {event.reason for event in freezer.events} == {"history_too_short", "patience"}
    server.kill()
    with caplog.at_level(logging.WARNING, "smartfrz"):
        train(model, optimizer, freezer, 11, 25)
    assert {event.reason for event in freezer.events if event.step > 11} == {"no_answer"}
    assert freezer.frozen_layers == []
    assert len(caplog.records) == 1
    assert "ConnectionRefusedError" in caplog.text
    start(f"eager={eager_predictor}", port=server.port)
    train(model, optimizer, freezer, 25, 40)
    assert freezer.frozen_layers == NET[:-1]
    assert {event.reason for event in freezer.events if event.step > 25} >= {"patience", "confident"}


_KERAS = """
import json, os, signal, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy as np
from smartfrz.adapters.keras import SmartFRZ

keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(3))])
model.compile(keras.optimizers.SGD(0.01), "mse")
x = np.random.default_rng(0).normal(size=(80, 4)).astype("float32")

class Kill(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            os.kill(int(sys.argv[2]), signal.SIGKILL)

# It would freeze at step 12, the fifth stage with enough records.
options = {"record_every": 1, "decide_every": 2, "patience": 5, "threshold": 0.01, "recompile_steps": 0}
freezer = SmartFRZ(sys.argv[1], **options)
model.fit(x, x, 8, epochs=3, verbose=0, callbacks=[freezer, Kill()])
print(json.dumps([[event.step, event.reason] for event in freezer.events]))
"""


@needs_kserve
def test_a_server_that_is_killed_while_keras_trains(eager_predictor, start):
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    server = start(f"eager={eager_predictor}")
    arguments = [sys.executable, "-c", _KERAS, server.url("eager"), str(server.pid)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    events = json.loads(result.stdout.splitlines()[-1])
    assert {reason for step, reason in events if step <= 10} >= {"patience"}
    late = [reason for step, reason in events if step > 10]
    assert late
    assert set(late) == {"no_answer"}
    assert result.stderr.count("does not answer") == 1
