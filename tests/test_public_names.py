"""What is public, written down twice, so that a change of the API shows in a diff."""

import importlib.util
import inspect
import os
import subprocess
import sys
from types import ModuleType

import pytest

import smartfrz
from smartfrz import errors

ADAPTER_NAMES = ["Layer", "PrefixCache", "Report", "SmartFRZ", "TorchAdapter", "trace_layers"]

KERAS_NAMES = ["KerasAdapter", "Layer", "Report", "SmartFRZ", "trace_layers"]


def test_package():
    # In a process of its own: submodules that others import become attributes of the package.
    code = "import smartfrz; print(*sorted(n for n in vars(smartfrz) if n == '__version__' or n[0] != '_'))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert names == sorted(smartfrz.__all__) == ["__version__"]


def test_torch_adapter():
    pytest.importorskip("torch")
    from smartfrz.adapters import torch as adapter

    public = [n for n, v in vars(adapter).items() if n[0] != "_" and not isinstance(v, ModuleType)]
    assert sorted(public) == sorted(adapter.__all__) == ADAPTER_NAMES


def test_keras_adapter():
    """In a process of its own, with a backend that does not matter here."""
    backend = next((b for b in ("torch", "jax", "tensorflow") if importlib.util.find_spec(b)), None)
    if backend is None or importlib.util.find_spec("keras") is None:
        pytest.skip("needs keras and a backend")
    code = (
        "from smartfrz.adapters import keras as adapter; from types import ModuleType; print(*sorted(adapter.__all__)); "
        "print(*sorted(n for n, v in vars(adapter).items() if n[0] != '_' and not isinstance(v, ModuleType)))"
    )
    environment = os.environ | {"KERAS_BACKEND": backend}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert [line.split() for line in result.stdout.splitlines()] == [KERAS_NAMES] * 2


def test_zoo():
    code = (
        "from smartfrz import zoo; from types import ModuleType as M; print(*sorted(n for n, v in vars(zoo).items() "
        "if n[0] != '_' and not isinstance(v, M) and (getattr(v, '__module__', zoo.__name__)).startswith(zoo.__name__)))"
    )
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    from smartfrz import zoo

    assert sorted(zoo.__all__) == ["DEFAULT", "Entry", "Predictor", "entries", "find", "load", "locate"]
    # What only the commands use stays out of __all__.
    assert sorted({*names} - {*zoo.__all__}) == ["embedded_folder", "file_of", "find_in"]


def test_the_drawn_tree_of_errors_is_the_real_one():
    drawn = {}
    for line in errors.__doc__.splitlines():
        name, _, meaning = line.strip().partition(" ")
        if name.endswith("Error") and line.startswith("    "):
            drawn[name] = meaning
    classes = {n: c for n, c in inspect.getmembers(errors, inspect.isclass)}
    assert sorted(drawn) == sorted(classes)
    assert all(issubclass(c, errors.SmartFRZError) for c in classes.values())
    for builtin in (RuntimeError, ImportError):
        also = {name for name, meaning in drawn.items() if builtin.__name__ in meaning}
        assert also == {name for name, c in classes.items() if issubclass(c, builtin)}
