"""What is no regular file is refused where a file is expected: a pipe must not be waited for, nor a device read for ever."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("onnxruntime")

PLACES = {
    "a predictor": "Predictor('x.onnx')",
    "an address": "zoo.load(Path('x.onnx').absolute().as_uri() + '#sha256=' + '0' * 64)",
    "a registry": "zoo.find('none', ['x.json'])",
    "a state": "read_state('x.onnx')",
}
CODE = """
from pathlib import Path
from smartfrz import zoo
from smartfrz.adapters.state_file import read_state
from smartfrz.errors import SmartFRZError
from smartfrz.predictor.runtime import Predictor
for what in {places}:
    try:
        eval(what)
    except (SmartFRZError, OSError) as error:
        print("REFUSED", error)
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "hole"])
def test_it_is_refused_at_once_everywhere(kind, tmp_path):
    path = tmp_path / "x.onnx"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**42)  # takes no room
    (tmp_path / "x.json").symlink_to(path)
    code = CODE.format(places=list(PLACES.values()))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("REFUSED") == len(PLACES), done.stdout + done.stderr
