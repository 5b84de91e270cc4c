"""Files that hold the state of a run."""

import json
import struct
import zipfile

import numpy as np
import pytest

from smartfrz.adapters.state_file import from_json, read_state, to_json, write_state
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


def test_an_archive_that_unfolds_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    np.savez_compressed(path, state=np.array("{}"), array0=np.zeros(2**20))
    with pytest.raises(StateError, match="its content is compressed"):
        read_state(path)


def test_parts_that_share_their_bytes_are_refused(tmp_path):
    path = tmp_path / "state.npz"
    write_state({"rows": np.zeros(10_000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(1, 50):
            entry = zipfile.ZipInfo(f"array{number}.npy")
            known = archive.getinfo("array0.npy")
            entry.file_size, entry.compress_size, entry.CRC = known.file_size, known.compress_size, known.CRC
            entry.header_offset = known.header_offset
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
            archive._didModify = True
    with pytest.raises(StateError, match="its parts are larger than the file"):
        read_state(path)


def test_an_array_that_is_named_again_and_again_is_refused(tmp_path):
    text = '{"rows": [' + ", ".join(['{"__array__": "array0"}'] * 3) + "]}"
    np.savez(tmp_path / "state.npz", state=np.array(text), array0=np.zeros(3))
    with pytest.raises(StateError, match="holds no state of SmartFRZ"):
        read_state(tmp_path / "state.npz")


@pytest.mark.parametrize("dtype", ["U100000000", "S9", "O", "M8[s]", "x"])
def test_arrays_in_a_text_hold_numbers(dtype):
    text = json.dumps({"state": {"a": {"__array__": "n"}}, "arrays": {"n": [[""], dtype, [1]]}})
    with pytest.raises(StateError, match="The text holds no state of SmartFRZ"):
        from_json(text)


def test_arrays_in_a_text_are_read_as_they_were():
    assert from_json(to_json({"a": np.arange(3), "b": [np.ones(2, bool)]}))["b"][0].tolist() == [True, True]
