"""The notebooks, run from top to bottom: each ends with a report, shows no warning, and is kept without outputs."""

import importlib.util
import json
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
def test_a_notebook_runs_and_ends_with_the_report(name, tmp_path, monkeypatch):
    missing = [module for module in [*NEEDS[name], "jinja2", "ipykernel"] if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {missing}")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    from jupyter_client import KernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisPython(KernelManager):
        """A kernel of this interpreter, whatever kernels are installed beside it; no TCP port is opened."""

        kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    for variable, value in {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    manager = ThisPython(transport="ipc", ip=str(tmp_path / "kernel"))
    nbclient.NotebookClient(
        notebook, km=manager, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    (told,) = [
        output["text"] for output in outputs if output.get("name") == "stdout" and "test accuracy" in output["text"]
    ]
    assert "with full training" in told
    page = outputs[-1]["data"]["text/html"]
    assert "smartfrz-report" in page
    assert "Frozen at the end" in page
    assert "Why nothing froze" not in page
    assert "smartfrz-data" in (tmp_path / "run.html").read_text("utf-8")
