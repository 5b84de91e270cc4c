"""No dependency looks up a host, or writes outside of our cache, when the network is not asked for."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
TESTS = Path(__file__).parent
UNSHARE = ["unshare", "--map-root-user", "--net", "--mount"]
CLI = "from smartfrz.cli import main; main({arguments!r}, prog_name='smartfrz')"
LOAD = """

import numpy as np
from smartfrz import zoo
predictor = zoo.load("smartfrz-base", device="cpu")
predictor.predict(np.zeros((1, 5, predictor.info.tailored_size), np.float32), np.array([5]))
"""
SERVE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from serving_process import ServingProcess
from smartfrz import zoo
server = ServingProcess(Path("server.log"), "smartfrz-base")
try:
    print(zoo.load(server.url("smartfrz-base")).info.name)
    server.terminate()
finally:
    server.kill()
"""
TRAIN = """
import torch
from smartfrz.adapters.torch import SmartFRZ
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
freezer = SmartFRZ(model, optimizer, total_steps=60, record_every=2)
for _ in range(60):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    freezer.step()
print(freezer.report())
freezer.report().save("run.html")
"""
DOCTOR = """
import json
from smartfrz import doctor
doctor._IMPORTS = {"onnxruntime": doctor._IMPORTS["onnxruntime"]}  # the other programs import the frameworks
print(json.dumps(doctor.examine()))
"""
TASK = """
import torch
from smartfrz.comparing.pytorch import Task
def network(seed):
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
def task():
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 2, (64,)))
    sgd = lambda model: torch.optim.SGD(model.parameters(), 0.05)
    return Task(model=network, optimizer=sgd, train=data, validation=data, test=data, steps=40, batch_size=8)
"""
COMPARE = f"open('mine.py', 'w').write({TASK!r})\n" + CLI.format(
    arguments=["compare", "mine.py:task", "--fewer-steps", "", "-o", "compared"]
)
DEMO = ["demo", "--data", "digits", "--num-train", "64", "--num-test", "10", "--epochs", "1", "-o", "out"]
# name: (modules that it needs, code)
PROGRAMS = {
    "load": ((), LOAD),
    "train": (("torch",), TRAIN),
    "demo": (("torch", "sklearn"), CLI.format(arguments=DEMO)),
    "compare": (("torch", "sklearn", "matplotlib"), COMPARE),
    "doctor": ((), DOCTOR),
    "serve": (("kserve",), SERVE.format(tests=str(TESTS))),
    "zoo list": ((), CLI.format(arguments=["zoo", "list"])),
    "zoo verify": ((), CLI.format(arguments=["zoo", "verify"])),
}
# What a library that the user asked for keeps for itself; it sends nothing.
ALLOWED = ("matplotlib/",)


@pytest.fixture(scope="module")
def unshared():
    """Skip where this machine gives a test no network of its own."""
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("needs Linux with user namespaces, for a network of its own")


def run(code, folder, **variables):
    """Run a program in a network of its own and an empty home. Return the names looked up and the files in the home."""
    home, looked_up = folder / "home", folder / "names.json"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env.pop("ORT_DISABLE_TELEMETRY", None)
    env |= {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "XDG_CONFIG_HOME": str(home / ".config"),
    } | variables
    work = folder / "work"
    work.mkdir()
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(TESTS / "watched_network.py"), str(looked_up), sys.executable, "-c", code],
        env=env,
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    return json.loads(looked_up.read_text()), files


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "compare" else []) for name in PROGRAMS]
)
def test_nothing_calls_home(name, unshared, tmp_path):
    modules, code = PROGRAMS[name]
    if absent := [module for module in modules if importlib.util.find_spec(module) is None]:
        pytest.skip(f"needs {', '.join(absent)}")
    names, files = run(code, tmp_path)
    assert names == []
    strange = [file for file in files if not file.startswith(".cache/smartfrz/")]
    assert [file for file in strange if not any(allowed in file for allowed in ALLOWED)] == []


def test_the_watch_sees_look_ups_and_files(unshared, tmp_path):
    code = "import socket, os\nopen(os.path.expanduser('~/id'), 'w').close()\n"
    code += "try: socket.getaddrinfo('telemetry.example', 443)\nexcept OSError: pass"
    assert run(code, tmp_path) == (["telemetry.example"], ["id"])
