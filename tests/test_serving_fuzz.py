"""Garbage at every endpoint of a server: it answers all of it, lives, and does not grow."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_process import ServingProcess, binary, histories, outputs, question

from smartfrz.predictor.runtime import Predictor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("kserve") is None, reason="kserve is not installed")
REQUESTS = int(os.environ.get("SMARTFRZ_FUZZ", "1000"))  # 10000 takes minutes


@pytest.fixture(scope="module")
def server(predictor_file, loss_predictor_file, tmp_path_factory):
    log, files = tmp_path_factory.mktemp("server") / "log", map(str, (predictor_file, loss_predictor_file))
    process = ServingProcess(log, *files, "--max-request-bytes", 2 * 2**20, "--max-delay-ms", 0)
    yield process
    process.kill()


def alive(server, predictor_file):
    history, lengths = histories(3, 5, 64)
    status, answer = server.ask("tiny", question(history, lengths))
    expected = Predictor(predictor_file, device="cpu").predict(history, lengths)
    np.testing.assert_allclose(outputs(answer)["confidence"], expected.confidence, atol=1e-6)
    return status == 200 and server.process.poll() is None


def fuzz(server, number, seed):
    script = Path(__file__).with_name("fuzz_serving.py")
    arguments = map(str, (server.port, server.grpc_port, "tiny", number, seed))
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:] + server.log.read_text()[-3000:]
    return json.loads(result.stdout)


def test_garbage_at_every_endpoint(server, predictor_file):
    fuzz(server, REQUESTS // 2, 0)
    before = server.rss()
    counts = fuzz(server, REQUESTS // 2, 1)
    assert sum(counts["rest"].values()) + sum(counts["grpc"].values()) == REQUESTS // 2
    assert counts["rest"]["400"] > REQUESTS // 10
    print(json.dumps(counts | {"rss_mib": [round(before), round(server.rss())]}))
    assert server.rss() < before + 30
    assert alive(server, predictor_file)
    assert "Traceback" not in server.log.read_text()


@settings(max_examples=40)
@given(body=st.binary(max_size=2000), length=st.none() | st.text("0123456789-x", max_size=8))
def test_bytes_of_any_kind(server, body, length):
    status, answer = server.ask("tiny", body, {} if length is None else {"Inference-Header-Content-Length": length})
    assert status == 400
    assert answer["error"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=60)
@given(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), st.sampled_from([0, 1, 2]), values)
def test_any_value_in_the_place_of_another(server, field, tensor, value):
    request = question(*histories(2, 3, 64))
    request["inputs"].append({"name": "loss", "datatype": "FP32", "shape": [2, 3], "data": [3, 2, 1, 3, 2, 1]})
    if request["inputs"][tensor].get(field) == value:
        return
    request["inputs"][tensor][field] = value
    status, answer = server.ask("hearing", request)
    # Parameters may hold anything but the size of binary data.
    assert status in ((200, 400) if field == "parameters" else (400,))
    assert "error" in answer or field == "parameters"


@settings(max_examples=30)
@given(st.lists(st.integers(-3, 2**70), max_size=5), st.integers(-(2**70), 2**70))
def test_any_claim_of_sizes(server, shape, size):
    body, headers = binary(*histories(2, 3, 64))
    end = int(headers["Inference-Header-Content-Length"])
    header = json.loads(body[:end])
    header["inputs"][0] |= {"shape": shape, "parameters": {"binary_data_size": size}}
    text = json.dumps(header).encode()
    headers["Inference-Header-Content-Length"] = str(len(text))
    assert server.ask("tiny", text + body[end:], headers)[0] == 400


def test_after_all_that(server, predictor_file):
    assert alive(server, predictor_file)
    assert "Traceback" not in server.log.read_text()
