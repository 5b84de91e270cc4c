"""The demo on Keras. Each backend needs a process of its own: `keras_demo_worker.py`."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_demo import COLORS, covered
from test_keras_backends import BACKENDS, installed, run

WORKER = Path(__file__).with_name("keras_demo_worker.py")
COMMAND = "from smartfrz.cli import main; main()"


@pytest.fixture(scope="module", params=BACKENDS)
def result(request, eager_predictor, tmp_path_factory):
    """What the worker printed and saved on a backend."""
    if not installed("keras", request.param):
        pytest.skip(f"needs keras and {request.param}")  # what SMARTFRZ_REQUIRED names was looked for before
    output = tmp_path_factory.mktemp(request.param)
    process = run(request.param, str(WORKER), eager_predictor, str(output))
    assert process.returncode == 0, process.stderr[-6000:]
    printed = json.loads(process.stdout.splitlines()[-1])
    figures = json.loads((output / "demo.json").read_text())
    return SimpleNamespace(backend=request.param, output=output, runs=figures["runs"], **printed)


@pytest.mark.slow
def test_the_keras_network_is_the_pytorch_network(result):
    for network in result.networks:  # at 64 px, and at 33 px, where the padding of "same" would be another one
        assert network["largest_logit"] > 0.05
        assert network["logits"] < 1e-4 * network["largest_logit"]
        ours, theirs = network["parameters"]
        assert ours == theirs > 3e6


@pytest.mark.slow
def test_its_batch_norms_move_as_in_pytorch(result):
    for network in result.networks:
        assert network["moved"] > 0.005
        assert network["mean"] < 1e-6
        assert network["variance"] < network["variance_tolerance"]


@pytest.mark.slow
def test_each_convolution_freezes_with_its_batch_norm(result):
    followers = result.networks[0]["followers"]
    assert len(followers) == 49
    assert all(name.endswith("_norm") for name in followers)
    expected = [name.replace("_norm", "_conv") for name in followers] + ["classifier"]
    assert result.runs[1]["layers"] == expected
    assert expected[:4] == ["stem_conv", "block0_depthwise_conv", "block0_project_conv", "block1_expand_conv"]


@pytest.mark.slow
def test_the_run_with_smartfrz_freezes_and_saves(result):
    full, freezing = result.runs
    assert (full["method"], freezing["method"]) == ("full training", "SmartFRZ")
    assert full["steps"] == freezing["steps"] == 11
    assert full["frozen"] == {}
    # Where freezing means to compile anew, only every second stage may.
    assert set(freezing["frozen"].values()) == {6 if result.backend == "torch" else 8}
    assert set(freezing["frozen"]) == set(freezing["layers"]) - {"classifier"}
    assert freezing["backward_flops"] < 0.8 * full["backward_flops"]
    assert 0 < freezing["decision_seconds"] < freezing["train_seconds"]
    assert full["decision_seconds"] == 0
    assert all(run["first_step_seconds"] > 0 < run["cpu_seconds"] for run in result.runs)


@pytest.mark.slow
def test_both_runs_are_measured_at_the_same_steps_and_equal_until_something_freezes(result):
    for run_ in result.runs:
        steps, _, seconds, accuracies = zip(*run_["curve"], strict=True)
        assert steps == (4, 8, 11)  # after each epoch, and in the middle of the last
        assert list(seconds) == sorted(seconds)
        assert all(0 <= value <= 1 for value in accuracies)
    full, freezing = result.losses.values()
    assert full[0] == pytest.approx(freezing[0], rel=1e-4)
    assert full[2] != pytest.approx(freezing[2], rel=1e-4)


@pytest.mark.slow
def test_the_table_leaves_out_what_keras_does_not_tell(result):
    header, full, freezing, difference = result.table
    assert header == ["", "test accuracy", "training seconds", "backward TFLOPs", "deciding"]
    assert full[1] == f"{result.runs[0]['curve'][-1][3]:.2%}"
    assert freezing[2] == f"{result.runs[1]['train_seconds']:.1f}"
    assert difference[1].endswith("points")
    assert f"Keras on {result.backend}." in result.notes
    assert "Backward FLOPs are estimated from shapes" in result.notes


@pytest.mark.slow
def test_progress_is_shown_after_each_of_the_two_fits(result):
    (half, text), (whole, both) = result.progress
    assert (half, whole) == (0.5, 1.0)
    assert text.startswith("full training ")
    assert both.startswith(text)
    assert "   SmartFRZ " in both


@pytest.mark.slow
def test_the_picture(result):
    assert result.files == ["demo.json", "demo.png"]
    with Image.open(result.output / "demo.png") as picture:
        assert picture.format == "PNG"
    assert covered(result.output / "demo.png", COLORS["frozen"]) > 0.05  # without any: 0.03
    assert covered(result.output / "demo.png", COLORS["active"]) > 0.1


@pytest.mark.slow
@pytest.mark.skipif(not installed("keras", "torch"), reason="needs keras and torch")
def test_the_command(tmp_path, eager_predictor):
    arguments = ["demo", "--framework", "keras", "--data", "digits", "--output", str(tmp_path), "--epochs", "4"]
    arguments += ["--num-train", "64", "--num-test", "20", "--predictor", eager_predictor]
    process = run("torch", "-c", COMMAND, *arguments)
    assert process.returncode == 0, process.stderr[-6000:]
    assert "full training" in process.stdout
    assert "activations, " not in process.stdout
    assert "Keras on torch. Not counted:" in process.stdout
    assert f"wrote {tmp_path / 'demo.png'}" in process.stdout
    assert json.loads((tmp_path / "demo.json").read_text())["options"]["data"] == "digits"


def test_without_keras_the_command_says_what_to_install():
    process = run(
        "tensorflow", "-c", f"import sys; sys.modules['keras'] = None; {COMMAND}", "demo", "--framework=keras"
    )
    assert process.returncode == 1
    assert "Error: smartfrz.adapters.keras needs Keras 3" in process.stderr
    assert 'pip install "smartfrz[keras,tensorflow,cpu]"' in process.stderr


@pytest.mark.skipif(not installed("keras"), reason="needs keras")
def test_without_the_backend_the_command_says_what_to_install():
    process = run("jax", "-c", f"import sys; sys.modules['jax'] = None; {COMMAND}", "demo", "--framework=keras")
    assert process.returncode == 1
    assert "the backend that KERAS_BACKEND names (TensorFlow by default), which cannot be imported" in process.stderr


def test_an_unknown_framework_is_a_usage_error():
    process = run("tensorflow", "-c", COMMAND, "demo", "--framework=mxnet")
    assert process.returncode == 2
    assert "'mxnet' is not one of 'torch', 'keras'" in process.stderr


def test_the_demo_on_pytorch_does_not_load_keras():
    process = run("tensorflow", "-c", "import smartfrz.cli, smartfrz.demo.pytorch, sys; print(*sys.modules)")
    assert process.returncode == 0, process.stderr
    assert {"keras", "tensorflow", "jax", "smartfrz.demo.keras"} & set(process.stdout.split()) == set()
