"""Files that hold the state of a run: NumPy's `.npz` with arrays and JSON, no pickle."""

import json
import os
import zipfile
from typing import Any, BinaryIO

import numpy as np

from smartfrz.errors import StateError
from smartfrz.files import open_regular, replacing

_ARRAY = "__array__"


def write_state(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state of plain data and arrays."""
    arrays: dict[str, Any] = {}
    text = json.dumps(_pack(state, arrays))
    with replacing(os.path.expanduser(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, state=np.array(text), **arrays)


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        StateError: If the file is of another kind, or damaged.
    """
    with open_regular(os.path.expanduser(path)) as opened:
        try:
            _require_plain(opened)
            with np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return _require_dict(_unpack(json.loads(str(arrays.pop("state"))), arrays))
        except Exception as error:  # zipfile, each of its decompressors, NumPy and json have errors of their own
            raise StateError(
                f"{os.fspath(path)} holds no state of SmartFRZ ({error}); expected a file that SmartFRZ wrote."
            ) from error


def to_json(state: dict[str, Any]) -> str:
    """Return a state of plain data and arrays as text, for places that take nothing else. It is large."""
    arrays: dict[str, Any] = {}
    packed = _pack(state, arrays)
    listed = {name: [array.tolist(), str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    return json.dumps({"state": packed, "arrays": listed})


def from_json(text: str) -> dict[str, Any]:
    """Return the state that `to_json` made a text of.

    Raises:
        StateError: If the text is of another kind, or damaged.
    """
    try:
        content = json.loads(text)
        arrays = {
            name: np.array(values, _numbers(dtype)).reshape(shape)
            for name, (values, dtype, shape) in content["arrays"].items()
        }
        return _require_dict(_unpack(content["state"], arrays))
    except Exception as error:  # of json and NumPy, for a text that was damaged or made by somebody else
        raise StateError(
            f"The text holds no state of SmartFRZ ({error}); expected one that SmartFRZ wrote. Resume from "
            "another checkpoint."
        ) from error


def _require_plain(file: BinaryIO) -> None:
    """Refuse an archive that unfolds to more than its size: `write_state` compresses nothing."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its content is compressed")
    if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
        raise ValueError("its parts are larger than the file")
    file.seek(0)


def _numbers(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.kind not in "biufc":  # text could be of any length
        raise ValueError(f"an array is of {name!r:.50}")
    return dtype


def _require_dict(state: Any) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise ValueError(f"its content is {type(state).__name__}, not a dict")
    return state


def _pack(value: Any, arrays: dict[str, Any]) -> Any:
    """Return the value with a name in the place of each array; the arrays go into `arrays`."""
    if isinstance(value, np.ndarray):
        name = f"array{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, dict):
        return {str(k): _pack(v, arrays) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(v, arrays) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def _unpack(value: Any, arrays: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            return arrays.pop(value[_ARRAY])  # each is there once
        return {k: _unpack(v, arrays) for k, v in value.items()}
    return [_unpack(v, arrays) for v in value] if isinstance(value, list) else value
