"""`smartfrz-build new`, `check` and `run` on real handwritten digits, in processes that are killed."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from builder_fixtures import DIGIT_RUNS, invoke, write_digit_recipes, write_recipe

from smartfrz import zoo
from smartfrz.dataset_builder.cli import main as build
from smartfrz.dataset_builder.storage import reference_file
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.cross_validation import can_hold_out

COMMAND = [sys.executable, "-c", "from smartfrz.dataset_builder.cli import main; main()"]
SMALL = ("--window", "8", "--tailored-size", "32", "--records", "16", "--epochs", "6", "--threads", "1")


class Started:
    """The command in a process and a process group of its own, its output in a file."""

    def __init__(self, folder, *arguments, **environment):
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        with self.log.open("w") as output:
            self._process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
            )  # fmt: skip

    def kill_when(self, moment):
        """SIGKILL to the command alone, not to its workers."""
        try:
            while not moment():
                assert self._process.poll() is None, self.log.read_text()
                time.sleep(0.005)
            os.kill(self._process.pid, signal.SIGKILL)
            assert self._process.wait() == -signal.SIGKILL
            self._wait_for_workers()
        finally:
            self._end()

    def _wait_for_workers(self):
        """Workers have to end by themselves: they would record beside those of the next call."""
        for _ in range(2000):
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)
        pytest.fail("workers outlive the command")

    def finish(self):
        try:
            assert self._process.wait() == 0, self.log.read_text()
        finally:
            self._end()
        return self.log.read_text()

    def _end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.slow
def test_a_run_killed_while_it_records_and_while_it_trains_gives_the_file_of_an_undisturbed_one(tmp_path):
    recipes = write_digit_recipes(tmp_path, DIGIT_RUNS[::2])
    first, second = (path.stem for path in recipes)
    runs, output = tmp_path / "runs", tmp_path / "killed" / "mine.onnx"
    arguments = ("run", *recipes, "-o", output, "--runs", runs, *SMALL)

    # In the middle of `record`: the first is finished, of the second there is the reference.
    finished, begun = runs / f"{first}.parquet", reference_file(runs, second)
    process = Started(tmp_path, *arguments, WAIT_AFTER=str(begun))
    process.kill_when(lambda: finished.exists() and begun.exists())
    kept = times(runs)
    assert f"{first}.parquet" in kept
    assert f"{second}.parquet" not in kept

    # In the middle of `train`: it begins once the labels are shown.
    again = Started(tmp_path, *arguments)
    again.kill_when(lambda: again.log.read_text().count(" of the labels say freeze\n") == 2)
    assert not output.exists()
    recorded = times(runs)
    assert {name: recorded[name] for name in kept} == kept  # nothing is recorded, and no reference trained, twice
    assert f"{second}.parquet" in recorded

    text = Started(tmp_path, *arguments).finish()
    assert times(runs) == recorded
    assert f"| {second} (validated on) | predictor |" in text

    undisturbed = tmp_path / "undisturbed"
    Started(tmp_path, "run", *recipes, "-o", undisturbed / "mine.onnx", "--runs", undisturbed / "runs", *SMALL).finish()
    for name in ("mine.onnx", "mine.md"):
        assert (output.parent / name).read_bytes() == (undisturbed / name).read_bytes()
    for name in (f"{first}.parquet", f"{second}.parquet"):
        assert (runs / name).read_bytes() == (undisturbed / "runs" / name).read_bytes()
    assert Predictor(output).info.window == 8


@pytest.mark.slow
def test_from_a_name_to_a_predictor_that_goes_on_from_the_default_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digit_recipes(tmp_path)
    for number in (0, 1):
        made = ("digit_parts:perceptron", "--data", "digit_parts:digits", "-o", f"new{number}.toml")
        assert invoke(build, "new", *made, "--architecture", "perceptron").exit_code == 0
    path = tmp_path / "new1.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 5"))

    result = invoke(build, "check", "new1.toml")
    assert result.exit_code == 0, result.output
    assert re.search(r"^  1 +4,096$", result.stdout, re.MULTILINE)
    assert "2 x 180 steps, 60 records: about" in result.stdout

    result = invoke(
        build, "run", "new0.toml", "new1.toml", "-o", "fine.onnx", "--base", "smartfrz-base", "--epochs", 1, "--threads", 1
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "The recordings of smartfrz-base are not at hand (--base-runs)" in result.stderr
    assert "## Continued from smartfrz-base" in result.stdout
    assert "| smartfrz-base | " in result.stdout.replace("| new0, new1 ", "").replace("| new1 ", "")
    info = Predictor("fine.onnx").info
    assert (info.window, info.tailored_size, info.representation) == (30, 1024, "trajectory+loss")
    assert info.metrics["base"]["name"] == "smartfrz-base"
    base = zoo.load("smartfrz-base", device="cpu").info.metrics
    assert info.metrics["base"]["trained_on"] == base["trained_on"]
    assert info.metrics["base"]["validated_on"] == base["validated_on"]


def test_a_family_becomes_a_predictor_that_says_it_is_of_few_recordings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digit_recipes(tmp_path)
    result = invoke(
        build, "new", "digit_parts:perceptron", "--data", "digit_parts:digits", "--family", "-o", "mine.toml"
    )
    assert result.exit_code == 0, result.output
    program, *arguments = shlex.split(result.stdout.splitlines()[-1])
    assert program == "smartfrz-build"
    for path in tmp_path.glob("mine-*.toml"):  # a shorter run than what is usual
        text = path.read_text()
        for old, new in (("epochs = 10", "epochs = 4"), ("records = 60", "records = 16"), ("= 2048", "= 64")):
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)

    result = invoke(build, *arguments, *SMALL, "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1].startswith("This predictor was made from few recordings: 4 of perceptron. ")
    assert "**This predictor was made from few recordings: 4 of perceptron. " in (tmp_path / "my.md").read_text()
    assert len(Predictor("my.onnx").info.metrics["trained_on"]) == 3


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    recipes = [write_recipe(tmp_path, name, learning_rate=1e30) for name in ("wild", "wilder")]
    result = invoke(build, "run", *recipes, "-o", tmp_path / "x.onnx", "--runs", tmp_path / "runs", *SMALL)
    assert result.exit_code == 1
    assert re.search(r"Not recorded:\nwild(er)?: The loss is (nan|inf) at step \d+\. Lower training", result.stderr)
    assert not list((tmp_path / "runs").glob("*.parquet"))
    assert not (tmp_path / "x.onnx").exists()


def test_what_training_would_refuse_is_said_before_recording(tmp_path):
    one, other = write_recipe(tmp_path, "one"), write_recipe(tmp_path, "other")
    runs = tmp_path / "runs"
    common = ("-o", tmp_path / "x.onnx", "--runs", runs)
    result = invoke(build, "run", one, *common, "--tailored-size", "32")
    assert (result.exit_code, "One recipe, 'one', is too few" in result.stderr) == (1, True)
    result = invoke(build, "run", one, other, *common)
    assert "recording.pool_size = 64, but the predictor reads 1024 weights a layer" in result.stderr
    assert result.exit_code == 1
    assert not runs.exists()


@pytest.mark.parametrize(
    ("architectures", "possible"), [("aabb", True), ("aaab", False), ("abc", True), ("aaa", False), ("ab", False)]
)
def test_holding_out_needs_two_runs_besides(architectures, possible):
    assert can_hold_out(list(architectures)) is possible
