"""From what a request holds to what a predictor reads. Every claim of a request is checked before it is used."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from smartfrz.predictor.contract import (
    ATTENTION,
    CONFIDENCE,
    HISTORY,
    LENGTHS,
    POSITION,
    POSITIONAL,
    PredictorInfo,
    check_position,
)

DTYPES: dict[str, Any] = {"FP32": np.float32, "INT64": np.int64}
DATATYPES = {HISTORY: "FP32", LENGTHS: "INT64", POSITION: "FP32"}
OUTPUTS = (CONFIDENCE, ATTENTION)


@dataclass
class Asked:
    """The body of a REST request.

    Attributes:
        id: Comes back with the answer; None if there was none.
        tensors: By name.
        outputs: Names of the outputs that are wanted, and whether as binary data.
    """

    id: str | None
    tensors: dict[str, NDArray[Any]]
    outputs: dict[str, bool] = field(default_factory=dict)


def inputs_of(info: PredictorInfo) -> list[dict[str, Any]]:
    """Name, datatype and shape of a predictor's inputs; -1 is dynamic. `position` may be left out."""
    inputs = [
        {"name": HISTORY, "datatype": "FP32", "shape": [-1, -1, info.tailored_size]},
        {"name": LENGTHS, "datatype": "INT64", "shape": [-1]},
    ]
    if info.representation in POSITIONAL:
        inputs.append({"name": POSITION, "datatype": "FP32", "shape": [-1]})
    return inputs


def outputs_of() -> list[dict[str, Any]]:
    """Name, datatype and shape of a predictor's outputs; -1 is dynamic."""
    return [
        {"name": CONFIDENCE, "datatype": "FP32", "shape": [-1, 2]},
        {"name": ATTENTION, "datatype": "FP32", "shape": [-1, -1]},
    ]


def read(body: bytes | bytearray, header_length: str | None) -> Asked:
    """Read the body of a REST request.

    Args:
        body: JSON, with the tensors behind it that have a `binary_data_size`.
        header_length: Of the JSON, as the HTTP header says; None if all of the body is JSON.

    Raises:
        ValueError: If it is not what the protocol says.
    """
    end = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or len(header_length) > 12 or int(header_length) > len(body):
            raise ValueError(
                f"Inference-Header-Content-Length is {header_length[:40]!r}; expected the length of the JSON in a body of "
                f"{len(body)} bytes."
            )
        end = int(header_length)
    view = memoryview(body)
    try:
        header = orjson.loads(view[:end])  # refuses NaN, and lists in lists without end
    except ValueError as error:
        raise ValueError(f"The body is no JSON: {error}. Send tensors as binary data, or as numbers.") from error
    if not isinstance(header, dict):
        raise ValueError(f"The body holds {_kind(header)}; expected an object with 'inputs'.")
    request_id = header.get("id")
    if not isinstance(request_id, str | None):
        raise ValueError(f"'id' is {_kind(request_id)}; expected a string.")
    binary = _parameters(header, "the request").get("binary_data_output", False) is True
    return Asked(request_id, _read_inputs(header, view[end:]), _read_outputs(header, binary))


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}.get(
        type(value), "a number"
    )


def _parameters(part: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = part.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"'parameters' of {name} is {_kind(value)}; expected an object.")
    return value


def _entries(header: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = header.get(key)
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries
    ):
        raise ValueError(f"{key!r} is {_kind(entries)}; expected a list of objects with a 'name'.")
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{key!r} names one tensor twice; expected each once.")
    return entries


def _read_outputs(header: Mapping[str, Any], binary: bool) -> dict[str, bool]:
    wanted = {}
    for entry in _entries(header, "outputs"):
        check_outputs([entry["name"]])
        wanted[entry["name"]] = _parameters(entry, entry["name"]).get("binary_data", binary) is True
    return wanted or dict.fromkeys(OUTPUTS, binary)


def _read_inputs(header: Mapping[str, Any], raw: memoryview) -> dict[str, NDArray[Any]]:
    entries = _entries(header, "inputs")
    check_names([entry["name"] for entry in entries])
    tensors, start = {}, 0
    for entry in entries:
        name, shape = entry["name"], entry.get("shape")
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise ValueError(f"'shape' of {name!r} is {_kind(shape)}; expected a list of integers.")
        check_claim(name, entry.get("datatype"), shape)
        size = _parameters(entry, name).get("binary_data_size")
        if (size is None) == (entry.get("data") is None):
            raise ValueError(f"{name!r} has to have either 'data' or the parameter 'binary_data_size'.")
        if size is None:
            tensors[name] = from_numbers(name, shape, entry["data"])
            continue
        if type(size) is not int or not 0 <= size <= len(raw) - start:
            raise ValueError(
                f"'binary_data_size' of {name!r} is {str(size)[:40]}; {len(raw) - start} bytes follow the JSON there."
            )
        tensors[name] = from_bytes(name, shape, raw[start : start + size])
        start += size
    if start < len(raw):
        raise ValueError(f"{len(raw) - start} bytes follow the last tensor; expected none.")
    return tensors


def check_names(names: Sequence[str]) -> None:
    """Whether these are the inputs of a predictor, in any order.

    Raises:
        ValueError: If not.
    """
    if sorted(names) not in ([HISTORY, LENGTHS], [HISTORY, LENGTHS, POSITION]):
        received = ", ".join(name[:40] for name in names[:4])
        raise ValueError(
            f"The inputs are {len(names)}, [{received}]; expected {HISTORY} and {LENGTHS}, each once, and perhaps "
            f"{POSITION}."
        )


def check_outputs(names: Sequence[str]) -> None:
    """Whether these are outputs of a predictor.

    Raises:
        ValueError: If not.
    """
    for name in names:
        if name not in OUTPUTS:
            raise ValueError(f"'outputs' names {name[:40]!r}; expected some of {', '.join(OUTPUTS)}.")
    if len(set(names)) < len(names):
        raise ValueError("'outputs' names one tensor twice; expected each once.")


def check_claim(name: str, datatype: Any, shape: Sequence[int]) -> None:
    """Whether datatype and number of dimensions are those of that input.

    Raises:
        ValueError: If not.
    """
    dimensions = {HISTORY: 3, LENGTHS: 1, POSITION: 1}[name]
    if datatype != DATATYPES[name] or len(shape) != dimensions or min(shape) < 1 or max(shape) > 2**31:
        raise ValueError(
            f"{name!r} is {str(datatype)[:40]} of shape {str(list(shape)[:4])[:80]}; expected {DATATYPES[name]} with "
            f"{dimensions} positive sizes."
        )


def from_bytes(name: str, shape: Sequence[int], raw: bytes | memoryview) -> NDArray[Any]:
    """A tensor from its little-endian bytes, without a copy if they lie where numbers may; its claim must have been checked.

    Raises:
        ValueError: If they are not as many as the shape says.
    """
    dtype = np.dtype(DTYPES[DATATYPES[name]]).newbyteorder("<")
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name!r} of shape {list(shape)} comes with {len(raw)} bytes; expected {math.prod(shape) * dtype.itemsize}."
        )
    return np.require(np.frombuffer(raw, dtype).reshape(shape), DTYPES[DATATYPES[name]], "A")


def from_numbers(name: str, shape: Sequence[int], data: Any) -> NDArray[Any]:
    """A tensor from numbers in lists, flat or nested as its shape; its claim must have been checked.

    Raises:
        ValueError: If they are not as many as the shape says, or no numbers of its datatype.
    """
    flat: Any = data
    for size in shape[1:] if _types(data) == {list} else ():
        if _types(flat) != {list} or {len(part) for part in flat} != {size}:
            break
        flat = [number for part in flat for number in part]
    # Before NumPy sees them: it would give a million numbers the room of the longest string among them.
    real = DATATYPES[name] == "FP32"
    numbers = (int, float) if real else (int,)
    if not isinstance(flat, list) or len(flat) != math.prod(shape) or not _types(flat).issubset(numbers):
        raise ValueError(
            f"'data' of {name!r} does not fit; expected {math.prod(shape)} {'numbers' if real else 'integers'}, "
            f"flat or nested as {list(shape)}."
        )
    try:
        with np.errstate(over="ignore"):  # infinity is refused later
            array = np.array(flat, np.float64 if real else np.int64).astype(DTYPES[DATATYPES[name]])
    except OverflowError as error:
        raise ValueError(f"'data' of {name!r} holds an integer beyond 64 bits; expected smaller ones.") from error
    return array.reshape(shape)


def _types(data: Any) -> set[type]:
    return set(map(type, data)) if isinstance(data, list) else set()


def check(tensors: Mapping[str, NDArray[Any]], info: PredictorInfo, max_layers: int) -> None:
    """Whether a predictor can be asked about these.

    Args:
        tensors: `history`, `lengths`, and perhaps `position`, whose claims have been checked.
        info: Of the predictor.
        max_layers: Of one request.

    Raises:
        ValueError: If not.
    """
    history, lengths = tensors[HISTORY], tensors[LENGTHS]
    num_layers, window, size = history.shape
    if num_layers > max_layers or window > info.window or size != info.tailored_size:
        raise ValueError(
            f"history has shape {list(history.shape)}, but {info.name!r} reads [1 to {max_layers}, 1 to {info.window}, "
            f"{info.tailored_size}]. Ask about many layers in several requests."
        )
    if len(lengths) != num_layers or lengths.min() < 1 or lengths.max() > window:
        raise ValueError(f"lengths holds {len(lengths)} values; expected {num_layers}, each of them in 1 to {window}.")
    if not np.isfinite(history).all():
        raise ValueError(
            "history holds NaN or infinity; expected finite weights. Do not ask about a layer whose weights are not."
        )
    if POSITION in tensors:
        position = tensors[POSITION]
        if len(position) != num_layers:
            raise ValueError(f"position holds {len(position)} values; expected {num_layers}, one a layer.")
        check_position(position, info)
