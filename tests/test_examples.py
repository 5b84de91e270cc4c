import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What each needs, arguments for a short run, and the test accuracy that it exceeds, in %.
RUNS = {
    "hf_trainer": (["torch", "transformers", "accelerate"], ["--model=", "--steps=150"], 90),
    "lightning_fit": (["torch", "lightning", "sklearn"], ["--epochs=6"], 90),
    # A MobileNetV2 from scratch, for eight epochs: 86 %, by chance it would be 10.
    "keras_fit": (["keras", "torch", "sklearn"], ["--width=0.35", "--epochs=8"], 50),
    "accelerate_loop": (["torch", "accelerate", "sklearn"], ["--epochs=20"], 90),
}
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not here")


def test_every_example_is_run():
    elsewhere = {"ddp", "plain_onnxruntime", "compare_digits"}  # test_distributed, test_plain_clients, test_compare
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUNS.keys() | elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_example(name, tmp_path):
    needs, arguments, accuracy = RUNS[name]
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {missing}")
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        cwd=tmp_path,
        # Where Keras compiles, how much is frozen depends on how long that takes.
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert float(re.search(r"test accuracy ([\d.]+)%", result.stdout)[1]) > accuracy
    assert int(re.search(r"SmartFRZ froze (\d+) of", result.stdout)[1]) > 0


def test_a_framework_that_must_be_there_cannot_be_skipped():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", __file__],
        env=os.environ | {"SMARTFRZ_REQUIRED": "os, no_such_framework"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "not installed: no_such_framework" in result.stderr
