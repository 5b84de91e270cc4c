"""Runs the other `test_keras_*.py` on every backend of Keras that is installed: one process can have one only."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BACKENDS = ["tensorflow", "jax", "torch"]
ALONE = ["test_keras_backends.py", "test_keras_distribution.py"]
# Most of the time would go into making tiny models fast.
CHEAP = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


def installed(*modules):
    return all(importlib.util.find_spec(module) for module in modules)


def run(backend, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | CHEAP | {"KERAS_BACKEND": backend} | environment,
        capture_output=True,
        text=True,
    )


class OnBackend:
    """One class for each backend: `pytest --dist loadscope` runs them side by side."""

    backend: str

    @pytest.mark.slow
    def test_adapter(self):
        tests = sorted(path.name for path in HERE.glob("test_keras_*.py") if path.name not in ALONE)
        run_tests(self.backend, *tests)


class OnTwoDevices(OnBackend):
    @pytest.mark.slow
    def test_two_devices(self):
        devices = {"SMARTFRZ_DEVICES": "2", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        run_tests(self.backend, "test_keras_distribution.py", **devices)


class TestOnTensorFlow(OnTwoDevices):
    backend = "tensorflow"


class TestOnJax(OnTwoDevices):
    backend = "jax"


class TestOnTorch(OnBackend):
    backend = "torch"


def run_tests(backend, *tests, **environment):
    if not installed("keras", backend):
        pytest.skip(f"needs keras and {backend}")  # what SMARTFRZ_REQUIRED names was looked for before
    paths = [str(HERE / name) for name in tests]
    result = run(backend, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, **environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(not installed("keras", "jax"), reason="needs keras and jax")
def test_importing_the_adapter_loads_no_other_framework():
    result = run("jax", "-c", "import smartfrz.adapters.keras, sys; print(*sys.modules)")
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "keras" in loaded
    assert loaded & {"torch", "tensorflow", "onnxruntime", "smartfrz.adapters.torch"} == set()


def test_without_keras_the_error_says_what_to_install():
    code = "import sys; sys.modules['keras'] = None; import smartfrz.adapters.keras"
    result = run("tensorflow", "-c", code)
    assert result.returncode == 1
    assert "MissingDependencyError: smartfrz.adapters.keras needs Keras 3" in result.stderr
    assert 'pip install "smartfrz[keras,tensorflow,cpu]"' in result.stderr
