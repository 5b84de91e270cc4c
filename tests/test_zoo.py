import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from smartfrz import zoo
from smartfrz.errors import ChecksumError, PredictorFileError, UnknownPredictorError
from smartfrz.predictor.contract import PredictorInfo
from smartfrz.predictor.runtime import Predictor
from smartfrz.zoo import publish, registry

FOLDER = Path(str(files("smartfrz.zoo")))


@pytest.fixture(scope="module")
def base():
    return zoo.load("smartfrz-base", device="cpu")


def test_the_default_predictor_loads_and_says_what_it_is(base):
    assert isinstance(base, Predictor)
    assert isinstance(base.info, PredictorInfo)
    assert (base.info.name, base.info.window, base.info.tailored_size) == ("smartfrz-base", 30, 1024)
    assert len(base.info.metrics["trained_on"]) + len(base.info.metrics["validated_on"]) >= 8
    assert len(base.info.metrics["leave_one_architecture_out"]) >= 4


def test_the_card_gives_the_threshold_of_the_file(base):
    card = (FOLDER / "smartfrz-base.md").read_text(encoding="utf-8")
    assert f"a confidence of {base.info.threshold:.3f} or more" in card


def test_it_prefers_a_layer_that_stands_still(base):
    rng = np.random.default_rng(0)
    start = rng.normal(size=1024) * 0.05
    moving = start + rng.normal(size=(30, 1024)).cumsum(axis=0) * 0.05
    still = start + rng.normal(size=(30, 1024)).cumsum(axis=0) * 1e-6
    answer = base.predict(np.stack([moving, still]).astype(np.float32), np.array([30, 30])).confidence[:, 1]
    assert answer[0] < base.info.threshold < answer[1]


def test_the_registry_describes_the_files_that_are_there():
    for entry in registry.embedded():
        path = FOLDER / entry.file
        described = publish.describe(path, version=entry.version, domains=entry.domains, file=entry.file)
        assert described == entry
        card = (FOLDER / entry.card).read_text()
        assert card.startswith(f"# {entry.name}\n")
        assert "weight change" in card


def test_a_path_or_a_loaded_predictor_is_taken_as_well(base, tmp_path):
    copy = shutil.copy(FOLDER / "smartfrz-base.onnx", tmp_path / "copy.onnx")
    assert zoo.load(copy).sha256 == zoo.load(str(copy)).sha256 == base.sha256
    assert zoo.load(base) is base


def test_what_ships_with_the_package_needs_no_package_for_downloads():
    absent = ["fsspec", "huggingface_hub", "filelock", "platformdirs", "rich"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from smartfrz import zoo; zoo.load(device='cpu')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_name_gets_a_hint():
    with pytest.raises(UnknownPredictorError, match=r"Did you mean 'smartfrz-base'\? Known predictors: smartfrz-base"):
        zoo.load("smartfrz-bse")
    with pytest.raises(PredictorFileError, match=r"Cannot read predictor 'nowhere\.onnx'"):
        zoo.load("nowhere.onnx")


def test_a_damaged_installation_is_noticed(tmp_path, monkeypatch):
    damaged = bytearray((FOLDER / "smartfrz-base.onnx").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "smartfrz-base.onnx").write_bytes(damaged)
    shutil.copy(FOLDER / "registry.json", tmp_path)
    monkeypatch.setattr(zoo, "files", lambda package: tmp_path)
    with pytest.raises(ChecksumError, match="pip install --force-reinstall smartfrz"):
        zoo.load("smartfrz-base")
    (tmp_path / "smartfrz-base.onnx").unlink()
    with pytest.raises(ChecksumError, match=r"SHA-256 missing"):
        zoo.load("smartfrz-base")
