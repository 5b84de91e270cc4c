"""The notebooks, run from top to bottom: each ends with a report, shows no warning, and is kept without outputs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
NEEDS = {"trainer_vit": ["torch", "transformers", "accelerate", "mlxtend"], "keras_fit": ["keras", "torch", "mlxtend"]}
pytestmark = pytest.mark.skipif(not NOTEBOOKS.exists(), reason="the examples are not here")


def test_every_notebook_is_run_and_kept_without_outputs():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == NEEDS.keys()
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            assert cell.get("outputs", []) == []
            assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_a_notebook_runs_and_ends_with_the_report(name, tmp_path):
    missing = [
        module
        for module in [*NEEDS[name], "jinja2", "nbclient", "ipykernel"]
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        pytest.skip(f"needs {missing}")
    shutil.copy(NOTEBOOKS / f"{name}.ipynb", tmp_path)
    quiet = {
        "KERAS_BACKEND": "torch",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    command = [
        sys.executable,
        "-c",
        "from nbclient.cli import main; main()",
        f"{name}.ipynb",
        "--inplace",
        "--timeout=300",
    ]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | quiet, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    cells = json.loads((tmp_path / f"{name}.ipynb").read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"] == []
    (told,) = [
        "".join(output["text"])
        for output in outputs
        if output.get("name") == "stdout" and "test accuracy" in "".join(output["text"])
    ]
    assert "with full training" in told
    page = "".join(outputs[-1]["data"]["text/html"])
    assert "smartfrz-report" in page
    assert "Frozen at the end" in page
    assert "Why nothing froze" not in page
    assert "smartfrz-data" in (tmp_path / "run.html").read_text("utf-8")
