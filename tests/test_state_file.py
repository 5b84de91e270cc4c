"""Files that hold the state of a run."""

import struct
import zipfile

import numpy as np
import pytest

from smartfrz.adapters.state_file import read_state, write_state
from smartfrz.errors import StateError


def test_a_path_with_a_tilde_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_state({"rows": np.arange(3)}, "~/state.npz")
    assert (tmp_path / "state.npz").is_file()
    assert read_state("~/state.npz")["rows"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_whose_content_is_damaged(tmp_path, method):
    path = tmp_path / "state.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("state.npy", np.random.default_rng(0).bytes(2000))
    content = bytearray(path.read_bytes())
    content[50:1000] = bytes(950)
    path.write_bytes(content)
    with pytest.raises(StateError, match="holds no state of SmartFRZ"):
        read_state(path)


@pytest.mark.parametrize("text", [b"{'descr': '<f4', 'x': (", b"(", b"[" * 3000, b"0"])
def test_an_array_whose_header_is_damaged(tmp_path, text):
    path = tmp_path / "state.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("state.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n")
    with pytest.raises(StateError, match="holds no state of SmartFRZ"):
        read_state(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "state.npz")
