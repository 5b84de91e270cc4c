"""`smartfrz serve`, as a process, over the network."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from serving_process import ServingProcess, binary, command, histories, outputs, question

if not importlib.util.find_spec("kserve"):  # not imported: its protobuf names are those of tritonclient
    pytest.skip("kserve is not installed", allow_module_level=True)

from smartfrz import zoo
from smartfrz.cli import main
from smartfrz.predictor.contract import PredictorInfo
from smartfrz.predictor.runtime import Predictor

HISTORY, LENGTHS = histories(3, 5, 64)
GOOD = question(HISTORY, LENGTHS)
MIB = 2**20


def changed(**changes):
    """A good request with one input's fields changed: `history={...}`, `lengths={...}`."""
    inputs = [entry | changes.get(entry["name"], {}) for entry in GOOD["inputs"]]
    return {"inputs": [{k: v for k, v in entry.items() if v is not ...} for entry in inputs]}


FLAT = HISTORY.ravel().tolist()
# body, what the answer says
BAD_REQUESTS = {
    "no JSON": (b"garbage", "The body is no JSON"),
    "nothing": (b"", "The body is no JSON"),
    "bytes": (bytes(range(256)), "The body is no JSON"),
    "NaN of JSON": (json.dumps(GOOD).replace(str(FLAT[0]), "NaN").encode(), "The body is no JSON"),
    "infinity of JSON": (
        json.dumps(GOOD).replace(str(FLAT[0]), "1e999").encode(),
        "history holds NaN or infinity|no JSON",
    ),
    "beyond float32": (changed(history={"data": [1e300, *FLAT[1:]]}), "history holds NaN or infinity"),
    "lists without end": (b"[" * 100_000, "The body is no JSON"),
    "a list": ([], "holds a list; expected an object with 'inputs'"),
    "no inputs": ({}, r"inputs are 0, \[\]; expected history and lengths, each once"),
    "inputs of another kind": ({"inputs": {"history": 1}}, "'inputs' is an object; expected a list of objects"),
    "inputs of other names": ({"inputs": [{"name": "x"}]}, r"inputs are 1, \[x\]; expected history and lengths"),
    "an input twice": ({"inputs": [GOOD["inputs"][0]] * 2}, "'inputs' names one tensor twice"),
    "an id that is no text": (GOOD | {"id": 7}, "'id' is a number; expected a string"),
    "parameters of another kind": (GOOD | {"parameters": []}, "'parameters' of the request is a list"),
    "another output": (
        GOOD | {"outputs": [{"name": "logits"}]},
        "'outputs' names 'logits'; expected some of confidence",
    ),
    "an output twice": (GOOD | {"outputs": [{"name": "attention"}] * 2}, "'outputs' names one tensor twice"),
    "datatype of history": (
        changed(history={"datatype": "FP64"}),
        r"'history' is FP64 of shape .*; expected FP32 with 3",
    ),
    "datatype of lengths": (
        changed(lengths={"datatype": "INT32"}),
        "'lengths' is INT32 of shape .*; expected INT64 with 1",
    ),
    "no datatype": (changed(history={"datatype": ...}), "'history' is None"),
    "no shape": (changed(history={"shape": ...}), "'shape' of 'history' is nothing; expected a list of integers"),
    "a shape of text": (
        changed(history={"shape": ["3", 5, 64]}),
        "'shape' of 'history' is a list; expected a list of int",
    ),
    "dimensions": (changed(history={"shape": [15, 64]}), "expected FP32 with 3 positive sizes"),
    "a negative size": (changed(history={"shape": [-3, -5, 64]}), "expected FP32 with 3 positive sizes"),
    "no layers": (changed(history={"shape": [0, 5, 64], "data": []}), "expected FP32 with 3 positive sizes"),
    "a huge claim": (
        changed(history={"shape": [10**9, 10**9, 64]}),
        "does not fit; expected 64000000000000000000 numbers",
    ),
    "a claim beyond integers": (changed(history={"shape": [10**30, 5, 64]}), "shape|positive sizes"),
    "other numbers of values": (
        changed(history={"data": FLAT[1:]}),
        r"does not fit; expected 960 numbers.*\[3, 5, 64\]",
    ),
    "tailored size": (
        question(HISTORY[..., :63], LENGTHS),
        r"shape \[3, 5, 63\], but 'tiny' reads \[1 to 40, 1 to 10, 64\]",
    ),
    "window": (question(*histories(2, 11, 64)), r"shape \[2, 11, 64\], but 'tiny' reads"),
    "layers": (question(*histories(41, 1, 64)), r"shape \[41, 1, 64\].*in several requests"),
    "values of text": (changed(history={"data": ["1"] * 960}), "'data' of 'history' does not fit"),
    "one text of a megabyte": (changed(history={"data": ["x" * 10**6, *FLAT[1:]]}), "'data' of 'history' does not fit"),
    "truth values": (
        changed(lengths={"data": [True, True, True]}),
        "'data' of 'lengths' does not fit; expected 3 integ",
    ),
    "fractions": (changed(lengths={"data": [1.5, 1, 1]}), "'data' of 'lengths' does not fit"),
    "objects": (changed(lengths={"data": [{}, {}, {}]}), "'data' of 'lengths' does not fit"),
    "ragged lists": (changed(history={"data": [[FLAT[:320]], FLAT[320:]]}), "'data' of 'history' does not fit"),
    "no data": (changed(history={"data": ...}), "has to have either 'data' or the parameter 'binary_data_size'"),
    "a length of 0": (
        changed(lengths={"data": [5, 0, 1]}),
        "lengths holds 3 values; expected 3, each of them in 1 to 5",
    ),
    "a length beyond the window": (changed(lengths={"data": [5, 6, 1]}), "each of them in 1 to 5"),
    "an integer beyond 64 bits": (changed(lengths={"data": [2**63, 1, 1]}), "64 bits|does not fit"),
    "other number of lengths": (changed(lengths={"data": [5, 1], "shape": [2]}), "lengths holds 2 values; expected 3"),
}


@pytest.fixture(scope="module")
def server(predictor_file, tmp_path_factory):
    """Two names of one predictor, small limits, and requests that wait for each other."""
    log = tmp_path_factory.mktemp("server") / "log"
    limits = ("--max-batch", 40, "--max-delay-ms", 20, "--max-request-bytes", 2 * MIB, "--threads", 2)
    process = ServingProcess(log, str(predictor_file), f"other={predictor_file}", *limits)
    yield process
    process.kill()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def predictor(predictor_file):
    return Predictor(predictor_file, device="cpu")


def same(answer, expected):
    for name in ("confidence", "attention"):
        # Batches of other sizes are summed in another order: float32 rounding.
        np.testing.assert_allclose(answer[name], getattr(expected, name), atol=1e-6)


def test_health_and_metadata(server, predictor):
    assert server.get("/v2/health/live") == (200, {"live": True})
    assert server.get("/v2/health/ready") == (200, {"ready": True})
    assert server.get("/v2")[1]["name"] == "smartfrz"
    assert server.get("/v2/models") == (200, {"models": ["tiny", "other"]})
    assert server.get("/v2/models/tiny/ready") == (200, {"name": "tiny", "ready": True})
    status, described = server.get("/v2/models/other")
    assert status == 200
    assert described["inputs"] == [
        {"name": "history", "datatype": "FP32", "shape": [-1, -1, 64]},
        {"name": "lengths", "datatype": "INT64", "shape": [-1]},
    ]
    assert [output["name"] for output in described["outputs"]] == ["confidence", "attention"]
    assert PredictorInfo.from_metadata(described["properties"], "the server") == predictor.info
    assert described["properties"]["smartfrz.sha256"] == predictor.sha256


def test_an_answer_of_json(server, predictor):
    status, answer = server.ask(
        "tiny", GOOD | {"id": "mine", "outputs": [{"name": "attention"}, {"name": "confidence"}]}
    )
    assert status == 200
    assert (answer["id"], answer["model_name"]) == ("mine", "tiny")
    assert answer["parameters"] == {"smartfrz.sha256": predictor.sha256}
    assert [output["name"] for output in answer["outputs"]] == ["attention", "confidence"]
    same(outputs(answer), predictor.predict(HISTORY, LENGTHS))
    assert outputs(server.ask("tiny", GOOD)[1])["confidence"].shape == (3, 2)


def test_numbers_may_be_nested_as_their_shape(server, predictor):
    nested = changed(history={"data": HISTORY.tolist()})
    same(outputs(server.ask("other", nested)[1]), predictor.predict(HISTORY, LENGTHS))


def test_an_answer_of_binary_data(server, predictor):
    body, headers = binary(HISTORY, LENGTHS, parameters={"binary_data_output": True})
    status, headers, content = server.request("POST", "/v2/models/tiny/infer", body, headers)
    assert status == 200
    end = int(headers["Inference-Header-Content-Length"])
    described = json.loads(content[:end])["outputs"]
    assert [o["parameters"]["binary_data_size"] for o in described] == [3 * 2 * 4, 3 * 5 * 4]
    expected = predictor.predict(HISTORY, LENGTHS)
    confidence = np.frombuffer(content[end : end + 24], np.float32).reshape(3, 2)
    same({"confidence": confidence, "attention": np.frombuffer(content[end + 24 :], "<f4").reshape(3, 5)}, expected)


def test_kserves_own_clients(server, predictor, tmp_path):
    np.savez(tmp_path / "asked.npz", history=HISTORY, lengths=LENGTHS)
    script = Path(__file__).with_name("serving_kserve_client.py")
    arguments = map(str, (server.port, server.grpc_port, "tiny", tmp_path / "asked.npz"))
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    told = json.loads(result.stdout)
    expected = predictor.predict(HISTORY, LENGTHS)
    for way in ("rest json", "rest binary", "grpc json", "grpc binary"):
        answer = told.pop(way)
        same({name: np.array(answer[name], np.float32) for name in ("confidence", "attention")}, expected)
        assert answer["id"] == "a-request"
    assert told.pop("inputs") == {"history": ["FP32", -1, -1, 64], "lengths": ["INT64", -1]}
    assert told.pop("outputs") == ["confidence"]
    assert told.pop("server") == "smartfrz"
    for what in ("live", "ready", "model ready", "rest live", "rest ready", "rest model ready", "grpc ready"):
        assert told.pop(what) is True
    codes = {case: said.partition(":")[0] for case, said in told.items()}
    assert {case for case, code in codes.items() if code == "NOT_FOUND"} == {
        "another model",
        "metadata of another",
        "readiness of another",
    }
    assert codes.pop("load") == codes.pop("unload") == "UNIMPLEMENTED"
    assert codes.pop("too large") == "RESOURCE_EXHAUSTED"
    assert set(codes.values()) == {"NOT_FOUND", "INVALID_ARGUMENT"}
    assert len(codes) == 18
    assert "history holds NaN or infinity; expected finite weights" in told["nan"]
    assert "'tiny' reads [1 to 40, 1 to 10, 64]" in told["other shape"]


_TRITON = """
import sys
import numpy as np
import tritonclient.grpc as over_grpc

client = over_grpc.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}")
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
asked = dict(np.load(sys.argv[2]))
tensors = []
for name, datatype in (("history", "FP32"), ("lengths", "INT64")):
    tensors.append(over_grpc.InferInput(name, asked[name].shape, datatype))
    tensors[-1].set_data_from_numpy(asked[name])
answer = client.infer("tiny", tensors, outputs=[over_grpc.InferRequestedOutput("confidence")])
print(answer.as_numpy("confidence").ravel().tolist())
"""


def test_tritons_client(server, predictor, tmp_path):
    if importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed")
    np.savez(tmp_path / "asked.npz", history=HISTORY, lengths=LENGTHS)
    arguments = [sys.executable, "-c", _TRITON, str(server.grpc_port), str(tmp_path / "asked.npz")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    confidence = predictor.predict(HISTORY, LENGTHS).confidence
    np.testing.assert_allclose(json.loads(result.stdout), confidence.ravel(), atol=1e-6)


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests(server, case):
    body, message = BAD_REQUESTS[case]
    status, answer = server.ask("tiny", body)
    assert status == 400
    assert len(answer["error"]) < 500
    assert re.search(message, answer["error"]), answer["error"]


BAD_BINARY = {
    "no number": ({}, "x", "Inference-Header-Content-Length is 'x'"),
    "negative": ({}, "-1", "Inference-Header-Content-Length is '-1'"),
    "beyond the body": ({}, "999999999", "expected the length of the JSON in a body of"),
    "of a thousand digits": ({}, "9" * 1000, "Inference-Header-Content-Length is '9999"),
    "size beyond the body": ({"binary_data_size": 10**12}, None, "'binary_data_size' of 'history' is 1000000000000"),
    "negative size": ({"binary_data_size": -1}, None, "'binary_data_size' of 'history' is -1"),
    "size of text": ({"binary_data_size": "3840"}, None, "'binary_data_size' of 'history' is 3840"),
    "size of another shape": (
        {"binary_data_size": 3836},
        None,
        r"shape \[3, 5, 64\] comes with 3836 bytes; expected 3840",
    ),
}


@pytest.mark.parametrize("case", BAD_BINARY)
def test_bad_binary_data(server, case):
    parameters, length, message = BAD_BINARY[case]
    body, headers = binary(HISTORY, LENGTHS)
    if parameters:
        end = int(headers["Inference-Header-Content-Length"])
        header = json.loads(body[:end])
        header["inputs"][0]["parameters"] = parameters
        text = json.dumps(header).encode()
        body, length = text + body[end:], str(len(text))
    status, answer = server.ask("tiny", body, headers | {"Inference-Header-Content-Length": length})
    assert status == 400
    assert re.search(message, answer["error"]), answer["error"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_binary_data(server, bad):
    history = HISTORY.copy()
    history[1, 2, 3] = bad
    status, answer = server.ask("tiny", *binary(history, LENGTHS))
    assert status == 400
    assert answer["error"].startswith("history holds NaN or infinity; expected finite weights.")


def test_weights_at_which_the_network_overflows_are_trained_on(server, predictor):
    history = HISTORY.copy()
    history[1] *= np.float32(1e37)
    assert not np.isfinite(predictor.predict(history, LENGTHS).confidence[1]).all()
    status, answer = server.ask("tiny", *binary(history, LENGTHS))
    assert status == 200
    confidence = outputs(answer)["confidence"]
    assert confidence[1].tolist() == [1, 0]
    np.testing.assert_allclose(confidence[[0, 2]], predictor.predict(HISTORY, LENGTHS).confidence[[0, 2]], atol=1e-6)


def test_bytes_behind_the_last_tensor(server):
    body, headers = binary(HISTORY, LENGTHS)
    assert server.ask("tiny", body + b"x", headers)[1] == {"error": "1 bytes follow the last tensor; expected none."}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/none/ready", 404),
        ("POST", "/v2/models/none/infer", 404),
        ("GET", "/v2/models/tiny/infer", 405),
        ("POST", "/v2/models/tiny", 405),
        ("POST", "/v2/repository/models/tiny/unload", 404),
        ("POST", "/v1/models/tiny:predict", 404),
        ("GET", "/v2/models/..%2f..%2fetc", 404),
        ("GET", "/docs", 404),
        ("GET", "/v2/models/tiny/ready?model_version=1", 501),
        ("BREW", "/v2", 405),
    ],
)
def test_what_there_is_not(server, method, path, status):
    received, _, body = server.request(method, path, b"{}" if method == "POST" else None)
    assert received == status
    assert isinstance(json.loads(body)["error"], str)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_40_mb_is_refused_before_it_is_parsed(server, announced):
    before = server.metrics()['smartfrz_rejected_total{reason="size"}'] if announced is False else None
    chunks = (b" " * 10**6 for _ in range(40))
    begin = time.monotonic()
    status, headers, body = server.request(
        "POST", "/v2/models/tiny/infer", chunks, {"Content-Length": "40000000"} if announced else {}
    )
    assert status == 413
    assert headers["Connection"] == "close"
    what = "40000000 bytes long" if announced else "longer"
    assert json.loads(body)["error"].startswith(
        f"The body is {what}; expected at most {2 * MIB} bytes. Send tensors as b"
    )
    assert time.monotonic() - begin < 20
    assert before is None or server.metrics()['smartfrz_rejected_total{reason="size"}'] == before + 1
    assert server.ask("tiny", GOOD)[0] == 200


def test_a_compressed_body_is_refused(server):
    status, _, body = server.request("POST", "/v2/models/tiny/infer", b"\x1f\x8b", {"Content-Encoding": "gzip"})
    assert status == 415
    assert "compressed; expected it uncompressed" in json.loads(body)["error"]


def test_clients_that_hang_up_in_the_middle_change_nothing(server):
    head = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
    for sent in (
        b"",
        b"\x16\x03\x01\x02",
        head,
        head + b"{" * 10**6,
        head.replace(b"2000000", b"-1"),
        b"GET /\x00 HTTP/9\r\n\r\n",
    ):
        for _ in range(20):  # more than there is room for at once, if it were not given back
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(sent)
    assert server.ask("tiny", GOOD)[0] == 200


def test_requests_of_many_jobs_are_run_together_and_get_their_own_answers(server, predictor):
    def ask(number):
        history, lengths = histories(1 + number % 7, 1 + number % 10, 64, seed=number)
        status, answer = server.ask("tiny", *binary(history, lengths))
        return status, outputs(answer), predictor.predict(history, lengths)

    def counted():
        found = server.metrics()
        return [
            found[f'smartfrz_batch_{what}{{model="tiny"}}'] for what in ("requests_sum", "requests_count", "layers_sum")
        ]

    before = counted()
    with ThreadPoolExecutor(16) as pool:
        for status, answer, expected in pool.map(ask, range(200)):
            assert status == 200
            same(answer, expected)
    requests, runs, layers = np.subtract(counted(), before)
    assert requests == 200
    assert layers == sum(1 + number % 7 for number in range(200))
    assert runs < 150


def test_metrics(server):
    def found():
        return server.metrics()

    server.ask("tiny", GOOD)
    server.ask("tiny", b"x")
    server.ask("none", GOOD)
    before = found()
    server.ask("tiny", GOOD)
    server.ask("tiny", b"x")
    server.ask("none", GOOD)
    after = found()
    grown = {name: after[name] - before[name] for name in after if after[name] != before.get(name)}
    assert grown['smartfrz_requests_total{model="tiny",protocol="rest",status="200"}'] == 1
    assert grown['smartfrz_requests_total{model="tiny",protocol="rest",status="400"}'] == 1
    assert grown['smartfrz_requests_total{model="unknown",protocol="rest",status="404"}'] == 1
    assert grown['smartfrz_rejected_total{reason="invalid"}'] == 1
    assert grown['smartfrz_rejected_total{reason="unknown_model"}'] == 1
    assert grown['smartfrz_layers_total{model="tiny"}'] == 3
    assert grown['smartfrz_request_seconds_count{model="tiny",protocol="rest"}'] == 1
    assert grown['smartfrz_batch_layers_sum{model="tiny"}'] == 3
    assert after['smartfrz_waiting_requests{model="tiny"}'] == 0


def test_sigterm_answers_what_is_in_flight(predictor_file, tmp_path):
    server = ServingProcess(tmp_path / "log", str(predictor_file), "--max-delay-ms", 1000)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(server.ask("tiny", GOOD)))
    asking.start()
    time.sleep(0.5)  # it waits for others to be run with
    try:
        assert server.terminate() == 0
    finally:
        server.kill()
    asking.join()
    assert answers[0][0] == 200
    assert "Traceback" not in (tmp_path / "log").read_text()
    with pytest.raises(OSError):  # noqa: PT011 - whichever way the system says so
        server.get("/v2")


def test_ports_that_are_taken(server, predictor_file):
    taken = {"REST": ("--port", server.port, "--grpc-port"), "gRPC": ("--grpc-port", server.grpc_port, "--port")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    tries = {
        told: subprocess.Popen(command(predictor_file, option, port, free, 0), **options)
        for told, (option, port, free) in taken.items()
    }
    for told, process in tries.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert f"Error: {told} cannot listen at 127.0.0.1, port {taken[told][1]}" in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["smartfrz-bse"], "Did you mean 'smartfrz-base'"),
        (["smartfrz-base", "smartfrz-base"], "two predictors are called 'smartfrz-base'"),
        (["a=smartfrz-base", "a=smartfrz-base"], "two predictors are called 'a'"),
        ([], "Missing argument"),
    ],
)
def test_names_that_cannot_be_served(names, message):
    result = CliRunner().invoke(main, ["serve", *names])
    assert result.exit_code != 0
    assert message in result.output


def test_a_server_does_not_serve_what_another_one_serves(server):
    result = CliRunner().invoke(main, ["serve", server.url("tiny")])
    assert result.exit_code == 2
    assert "is a server; expected a predictor" in result.output


def test_mock_without_kserve(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["serve", zoo.DEFAULT])
    assert result.exit_code == 1
    assert 'Serving needs kserve, which is not installed. Type: pip install "smartfrz[serve,cpu]"' in result.output


def test_this_process_has_not_loaded_kserve():
    # Else tests of tritonclient could not run in it: both register the same protobuf names.
    assert "kserve" not in sys.modules
