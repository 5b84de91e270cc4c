import dataclasses
import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from numpy_adapter import make_info  # noqa: E402

from smartfrz.errors import PredictorFileError  # noqa: E402
from smartfrz.files import replacing  # noqa: E402
from smartfrz.predictor.runtime import Prediction, Predictor  # noqa: E402
from smartfrz.predictor.training import export as export_module  # noqa: E402
from smartfrz.predictor.training.export import compact, compare, export, restore  # noqa: E402
from smartfrz.predictor.training.model import FreezePredictor  # noqa: E402

EXPORT_AGAIN = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import TINY
from numpy_adapter import make_info
from smartfrz.predictor.training.export import export
from smartfrz.predictor.training.model import FreezePredictor
torch.manual_seed(0)
info = make_info(**TINY, dataset_sha256="d" * 64, metrics={"rule": {"tolerance": 0.01}, "auc": 0.9})
export(FreezePredictor(64, "raw"), info, "again.onnx")
print(hashlib.sha256(open("again.onnx", "rb").read()).hexdigest())
"""


@pytest.fixture(scope="module")
def proto(predictor_file):
    return onnx.load(predictor_file)


def test_the_same_seed_gives_the_same_file_in_another_process_and_folder(predictor_file, tmp_path):
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", EXPORT_AGAIN, str(Path(__file__).parent)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split()[-1] == hashlib.sha256(predictor_file.read_bytes()).hexdigest()


def test_metadata_round_trip(predictor_file, tiny_info, proto):
    assert Predictor(predictor_file).info == tiny_info
    keys = [p.key for p in proto.metadata_props]
    assert keys == sorted(keys)
    assert all(key.startswith("smartfrz.") for key in keys)


def test_no_trace_of_the_machine_is_left(predictor_file, proto):
    content = predictor_file.read_bytes()
    for trace in (
        os.getcwd(),
        os.path.expanduser("~") + "/",
        sys.prefix,
        sys.base_prefix,
        "site-packages",
        ".py",
        "File ",
    ):
        assert trace.encode() not in content
    everything = [proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    for part in [*everything, *proto.graph.initializer]:
        assert not part.metadata_props
        assert not part.doc_string
    assert not proto.doc_string


def test_one_file_that_holds_all_weights(predictor_file, proto, tiny_model):
    assert [p.name for p in predictor_file.parent.iterdir()] == [predictor_file.name]
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in proto.graph.initializer)
    held = sum(int(np.prod(t.dims)) for t in proto.graph.initializer)
    assert held >= sum(p.numel() for p in tiny_model.parameters())


def test_layers_and_window_are_dynamic(predictor_file, proto):
    def dims(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    found = {v.name: dims(v) for v in [*proto.graph.input, *proto.graph.output]}
    assert found == {
        "history": ["layers", "window", 64],
        "lengths": ["layers"],
        "confidence": ["layers", 2],
        "attention": ["layers", "window"],
    }
    predictor = Predictor(predictor_file, device="cpu")
    for num_layers, window in [(1, 1), (1, 10), (2, 2), (300, 3)]:
        answers = predictor.predict(np.ones((num_layers, window, 64), np.float32), np.ones(num_layers, np.int64))
        assert answers.attention.shape == (num_layers, window)


def test_exporting_leaves_the_network_as_it_was(tiny_model, tiny_info, predictor_file, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "serialise", lambda model, info: predictor_file.read_bytes())
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    export(tiny_model, tiny_info, tmp_path / "new folder" / "p.onnx")
    assert (tmp_path / "new folder" / "p.onnx").read_bytes() == predictor_file.read_bytes()
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 256 KiB; the predictor has more than 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_only_the_old_file_is_there(path):
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == b"the old predictor"


def test_a_full_disk_loses_nothing(tiny_model, tiny_info, tiny_disk):
    path = tiny_disk / "p.onnx"
    path.write_bytes(b"the old predictor")
    with pytest.raises(OSError, match="No space left") as caught:
        export(tiny_model, tiny_info, path)
    assert caught.value.errno == errno.ENOSPC
    assert_only_the_old_file_is_there(path)


def test_mock_a_full_disk_loses_nothing(tiny_model, tiny_info, predictor_file, tmp_path, monkeypatch):
    content = predictor_file.read_bytes()
    monkeypatch.setattr(export_module, "serialise", lambda model, info: content)
    path = tmp_path / "p.onnx"
    path.write_bytes(b"the old predictor")

    def half(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        export(tiny_model, tiny_info, path)
    assert_only_the_old_file_is_there(path)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path, error):
    path = tmp_path / "p.onnx"
    path.write_bytes(b"the old predictor")
    seen = []

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            seen.append(temporary)
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert seen[0].parent == path.parent  # a rename within one file system
    assert seen[0].suffix == path.suffix
    assert_only_the_old_file_is_there(path)


def test_replacing_gives_ordinary_permissions(tmp_path):
    path = tmp_path / "p.onnx"
    before = os.umask(0o022)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(b"new")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["p.onnx"]


@pytest.mark.parametrize("representation", ["raw", "trajectory"])
def test_compact_is_small_answers_alike_and_cannot_be_trained_further(representation, tiny_info, tmp_path):
    info = dataclasses.replace(tiny_info, representation=representation)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        export(FreezePredictor(info.tailored_size, representation), info, tmp_path / "whole.onnx")
    difference = compact(tmp_path / "whole.onnx", tmp_path / "small.onnx", "small")
    small, whole = (Predictor(tmp_path / f"{name}.onnx", device="cpu") for name in ("small", "whole"))
    assert 0 < difference < 0.02
    assert (tmp_path / "small.onnx").stat().st_size < 0.45 * (tmp_path / "whole.onnx").stat().st_size
    assert (small.info.name, small.info.threshold) == ("small", info.threshold)
    assert small.info.metrics == info.metrics | {"compact_of": whole.sha256}
    with pytest.raises(PredictorFileError, match="cannot be read back into a network"):
        restore(tmp_path / "small.onnx")


def test_compact_refuses_what_is_no_predictor_and_leaves_nothing(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no onnx")
    with pytest.raises(PredictorFileError, match="is not a SmartFRZ predictor, or is cut"):
        compact(tmp_path / "x.onnx", tmp_path / "small.onnx", "small")
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


class MockPlaced:
    """Answers with the position, times a weight; 0 where it is told none."""

    positional, reads_loss = True, False
    info = make_info(tailored_size=4, window=3, representation="trajectory")

    def __init__(self, weight):
        self.weight = weight

    def predict(self, history, lengths, position=None, loss=None):
        told = np.zeros(len(history), np.float32) if position is None else self.weight * position
        return Prediction(np.stack([-told, told], axis=1), np.zeros(history.shape[:2], np.float32))


def test_mock_files_that_differ_in_what_they_make_of_positions_differ():
    assert compare(MockPlaced(1), MockPlaced(1)) == 0
    assert compare(MockPlaced(1), MockPlaced(2)) > 0.5
