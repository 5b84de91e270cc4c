import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smartfrz

FRAMEWORKS = {"torch", "keras", "tensorflow", "jax"}
NETWORK = {"fsspec", "huggingface_hub", "rich", "filelock", "platformdirs", "kserve", "fastapi", "uvicorn", "grpc"}
FRAMEWORK_FREE = [
    "smartfrz",
    "smartfrz.errors",
    "smartfrz.files",
    "smartfrz.cli",
    "smartfrz.zoo",
    "smartfrz.zoo.cli",
    "smartfrz.zoo.publish",
    "smartfrz.adapters",
    "smartfrz.adapters.base",
    "smartfrz.baselines",
    "smartfrz.dataset_builder",
    "smartfrz.predictor",
    "smartfrz.predictor.contract",
    "smartfrz.control.tailoring",
    "smartfrz.control.history",
    "smartfrz.control.decision",
    "smartfrz.control.learned",
    "smartfrz.control.options",
    "smartfrz.control.controller",
    "smartfrz.control.report",
    "smartfrz.predictor.runtime",
    "smartfrz.predictor.remote",
    "smartfrz.serving",
    "smartfrz.serving.cli",
]
# Who may import whom (design, section 2). What imports nothing of ours is not listed on the right.
MAY_IMPORT = {
    "errors.py": [],
    "files.py": [],
    "commands.py": ["errors"],
    "training.py": ["errors", "predictor.runtime"],
    "control": ["control", "errors"],
    "predictor": ["errors", "files", "predictor", "control"],
    "baselines": ["baselines", "control", "errors", "adapters.torch", "dataset_builder", "training"],
    "zoo": ["zoo", "predictor", "serving.triton", "errors", "files", "__version__"],
    "serving": ["serving", "predictor", "zoo", "errors", "files", "__version__"],
    "adapters/base.py": ["control", "predictor", "zoo", "errors"],
    "adapters/torch": ["adapters.base", "adapters.torch", "control", "predictor", "zoo", "errors", "files"],
    "adapters/keras": ["adapters.base", "adapters.keras", "control", "predictor", "zoo", "errors", "files", "plots"],
    "dataset_builder": [
        "dataset_builder",
        "training",
        "control",
        "predictor",
        "adapters.torch",
        "adapters.keras",  # in keras_models.py only
        "errors",
        "files",
        "plots",
        "commands",
        "zoo",  # to resolve the name of a base
        "__version__",
    ],
}
TRAINING_ONLY = {"model.py", "judging.py", "fit.py", "export.py"}


def loaded_after(statement):
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def imports_of(path):
    """Every module that a source file names in an import, at any depth."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from smartfrz import zoo` imports a package, not only smartfrz
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", FRAMEWORK_FREE)
def test_importing_loads_no_framework_and_no_onnxruntime(module):
    assert loaded_after(f"import {module}") & (FRAMEWORKS | {"onnxruntime", "onnx"}) == set()


@pytest.mark.parametrize("module", ["smartfrz", "smartfrz.cli", "smartfrz.zoo"])
def test_importing_loads_nothing_of_the_network(module):
    assert loaded_after(f"import {module}") & NETWORK == set()


def test_the_check_itself_sees_an_import():
    assert "json.tool" in loaded_after("import json.tool")
    assert "json.tool" not in loaded_after("import json")


def test_onnxruntime_is_loaded_when_a_predictor_is_made(predictor_file):
    loaded = loaded_after(f"from smartfrz.predictor.runtime import Predictor\nPredictor({str(predictor_file)!r})")
    assert "onnxruntime" in loaded
    assert loaded & FRAMEWORKS == set()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_parts_import_only_what_the_design_allows(part):
    root = Path(smartfrz.__file__).parent
    files = sorted((root / part).rglob("*.py")) if (root / part).is_dir() else [root / part]
    assert files
    allowed = tuple(f"smartfrz.{name}." for name in MAY_IMPORT[part])
    wrong = [
        f"{file.name}: {name}"
        for file in files
        for name in imports_of(file)
        if name.partition(".")[0] == "smartfrz" and not f"{name}.".startswith(allowed)
    ]
    assert wrong == []


def test_onnxruntime_and_torch_are_imported_where_the_design_says():
    folder = Path(smartfrz.__file__).parent / "predictor"
    found = {}
    for file in sorted(folder.rglob("*.py")):
        for name in imports_of(file):
            found.setdefault(name.partition(".")[0], set()).add(file.name)
    assert found["onnxruntime"] == {"runtime.py"}
    assert found["torch"] == TRAINING_ONLY


def test_keras_is_imported_by_one_module_of_the_dataset_builder():
    folder = Path(smartfrz.__file__).parent / "dataset_builder"
    found = {f.name for f in folder.glob("*.py") if any(n.partition(".")[0] == "keras" for n in imports_of(f))}
    adapters = {
        f.name for f in folder.glob("*.py") if any(n.startswith("smartfrz.adapters.keras") for n in imports_of(f))
    }
    assert found == adapters == {"keras_models.py"}
    assert "keras" not in loaded_after("import smartfrz.dataset_builder.recording")
