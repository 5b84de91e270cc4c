import ast
import re
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
    "smartfrz.comparing.cli",
    "smartfrz.comparing.command",
    "smartfrz.comparing.study",
    "smartfrz.comparing.variants",
    "smartfrz.comparing.verdict",
    "smartfrz.zoo",
    "smartfrz.zoo.cli",
    "smartfrz.zoo.publish",
    "smartfrz.adapters",
    "smartfrz.adapters.base",
    "smartfrz.baselines",
    "smartfrz.dataset_builder",
    "smartfrz.dataset_builder.costs",
    "smartfrz.dataset_builder.pictures",
    "smartfrz.demo.data",
    "smartfrz.demo.printing",
    "smartfrz.demo.weights",
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
ROOT = Path(smartfrz.__file__).parent


def read_table():
    """Part to the parts that it may import, as CONTRIBUTING.md says."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \| ([^|]*)\|", text, re.MULTILINE)
    return {
        part: set(re.findall(r"`([\w.]+)`", allowed))
        for parts, allowed in rows
        for part in re.findall(r"`([\w.]+)`", parts)
    }


MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
MAY_IMPORT = read_table()
TRAINING_ONLY = {"adjusting.py", "model.py", "judging.py", "fit.py", "export.py"}


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


def modules_imported_by(path):
    """Modules of ours that a source file imports, at any depth; a package only where the name is one of its own."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in MODULES or node.module in MODULES:
                    yield name if name in MODULES else node.module


def part_of(module):
    """The longest part in CONTRIBUTING's table that a module belongs to; `smartfrz` itself belongs to none."""
    name = module.removeprefix("smartfrz").lstrip(".")
    return max((part for part in MAY_IMPORT if f"{name}.".startswith(f"{part}.")), key=len, default="")


def find_circle(graph):
    """A list of modules each of which imports the next, and the last the first; empty if there is none."""
    finished, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module in finished:
            return []
        path.append(module)
        found = next((circle for other in graph[module] if (circle := visit(other))), [])
        path.pop()
        finished.add(module)
        return found

    return next((circle for module in graph if (circle := visit(module))), [])


def test_every_module_has_a_row_in_the_table():
    assert [module for module in MODULES if not part_of(module)] == ["smartfrz", "smartfrz.adapters"]


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_the_table_allows(module):
    part = part_of(module)
    allowed = MAY_IMPORT.get(part, set())
    wrong = [
        name
        for name in modules_imported_by(MODULES[module])
        if name != "smartfrz"
        and part_of(name) not in {part, *allowed}
        and name.removeprefix("smartfrz.") not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["accelerate", "datasets", "evaluate", "keras", "peft", "tokenizers"])
def test_no_folder_of_the_repository_passes_for_a_package(package):
    """Trainer of transformers takes a folder `datasets` in the working directory for the package, and ends."""
    assert not (ROOT.parent / package).is_dir()


def test_there_is_no_import_circle():
    assert find_circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    graph = {module: set(modules_imported_by(path)) - {module} for module, path in MODULES.items()}
    assert find_circle(graph) == []


def test_no_module_imports_a_private_name_of_another():
    wrong = [
        f"{module}: {node.module}.{alias.name}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smartfrz")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
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
