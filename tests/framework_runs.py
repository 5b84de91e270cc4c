"""What the tests of every training framework ask of a finished run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent


def kept(module):
    """Copies of all parameters and buffers, and which of the parameters have a gradient."""
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return state, {n for n, p in module.named_parameters() if p.requires_grad or p.grad is not None}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def assert_frozen_means_bit_identical(snapshots, report):
    """`snapshots` maps steps to what `kept` returned after them."""
    assert report.frozen
    last = max(snapshots)
    end, _ = snapshots[last]
    layers = {layer.name: layer for layer in report.layers}
    assert any(step < last - 1 for step in report.frozen.values())
    for name, step in report.frozen.items():
        names = [*layers[name].parameters]
        names += [f"{n}.{s}" for n in layers[name].norms for s in ("running_mean", "running_var")]
        for later in range(step, last + 1):
            state, with_gradient = snapshots[later]
            assert_same_weights({n: state[n] for n in names}, {n: end[n] for n in names})
            assert with_gradient.isdisjoint(names)
    active = [layer for layer in layers.values() if layer.name not in report.frozen | dict.fromkeys(report.user_frozen)]
    assert active
    before, _ = snapshots[last - 1]
    for layer in active:
        assert any(not torch.equal(before[n], end[n]) for n in layer.parameters)


def run_until_killed(call):
    """Run a line of Python, which kills its own process, in the folder of the tests."""
    code = f"import torch; torch.set_num_threads(1)\n{call}"
    result = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def without(module, name):
    """What importing `module` prints in a process in which `name` is not installed, and whether ours needs it."""
    code = f"""
import sys
import smartfrz.adapters.torch
loaded = {{"transformers", "lightning", "pytorch_lightning", "accelerate"}} & sys.modules.keys()
for hidden in {name!r}:
    sys.modules[hidden] = None
try:
    import {module}
except ImportError as error:
    print(sorted(loaded), type(error).__name__, error)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
