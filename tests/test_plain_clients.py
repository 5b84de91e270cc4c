"""The clients without any of our code, in Python and in JavaScript, against the predictor that is shipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from required import there

from smartfrz import zoo

pytest.importorskip("onnxruntime")
EXAMPLES = Path(__file__).parent.parent / "examples"
PREDICTOR = zoo.embedded_folder() / "smartfrz-base.onnx"
LANGUAGES = {"python": (sys.executable, "plain_onnxruntime.py"), "javascript": ("node", "plain_onnxruntime.mjs")}
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not here")


@pytest.fixture(scope="module")
def request_and_answer(tmp_path_factory):
    return make_request(PREDICTOR, tmp_path_factory.mktemp("request") / "request.json")


def make_request(file, path, **optional):
    """Layers that move more and more slowly, one with a short history; and what the predictor itself says."""
    predictor, rng = zoo.load(file, device="cpu"), np.random.default_rng(0)
    window, size = 10, predictor.info.tailored_size  # early in a run, where answers differ most
    speed = np.logspace(-1, -7, 5)[:, None, None]
    start = 0.05 * rng.normal(size=(5, 1, size))
    history = (start + (speed * rng.normal(size=(5, window, size))).cumsum(axis=1)).astype(np.float32)
    lengths = np.array([window, window, predictor.info.min_records, window, window])
    layers = [f"block.{number}" for number in range(5)]
    asked = {"history": history, "lengths": lengths} | optional
    path.write_text(json.dumps({"layers": layers} | {name: array.tolist() for name, array in asked.items()}))
    return path, layers, predictor.predict(**asked).confidence[:, 1], predictor.info


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_client_without_smartfrz_gets_the_same_answers(language, request_and_answer, tmp_path):
    path, layers, confidence, info = request_and_answer
    rows = ask(language, PREDICTOR, path, info, tmp_path)
    assert [row["layer"] for row in rows] == layers
    # Another build of the same operators: float32 rounding.
    np.testing.assert_allclose([row["confidence"] for row in rows], confidence, atol=1e-4)
    assert [row["freeze"] for row in rows] == [row["confidence"] >= info.threshold for row in rows]
    assert confidence.max() - confidence.min() > 0.3  # else the comparison would say little


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_predictor_of_losses_answers_without_them(language, loss_predictor_file, tmp_path):
    path, _, confidence, info = make_request(loss_predictor_file, tmp_path / "request.json")
    rows = ask(language, loss_predictor_file, path, info, tmp_path)
    np.testing.assert_allclose([row["confidence"] for row in rows], confidence, atol=1e-6)


def test_positions_and_losses_are_passed_where_they_can_be(loss_predictor_file, tmp_path):
    position, loss = np.linspace(0, 1, 5, dtype=np.float32), np.tile(np.linspace(2, 1, 10, dtype=np.float32), (5, 1))
    loss[:, 1] = 0  # not known
    path, _, confidence, info = make_request(
        loss_predictor_file, tmp_path / "request.json", position=position, loss=loss
    )
    _, _, without, _ = make_request(loss_predictor_file, tmp_path / "other.json", position=position)
    rows = ask("python", loss_predictor_file, path, info, tmp_path)
    np.testing.assert_allclose([row["confidence"] for row in rows], confidence, atol=1e-6)
    assert np.abs(confidence - without).max() > 1e-4


def ask(language, predictor, path, info, folder):
    """Run a client and return its answers about the layers."""
    program, script = LANGUAGES[language]
    if language == "javascript" and not there("node"):
        pytest.skip("needs node, and `npm install` in examples")
    # Python isolated: no import path of ours.
    command = [program, *(["-I"] if language == "python" else []), EXAMPLES / script, predictor, path]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    about, *rows = map(json.loads, result.stdout.splitlines())
    assert about == {"predictor": info.name, "threshold": info.threshold}
    return rows


@pytest.mark.parametrize("name", ["plain_onnxruntime.py", "plain_onnxruntime.mjs"])
def test_they_use_nothing_of_ours(name):
    code = [line for line in (EXAMPLES / name).read_text("utf-8").splitlines() if line.startswith(("import", "from"))]
    assert code
    assert not [line for line in code if "smartfrz" in line]
