"""Reads the tensors of a request and checks every claim about them before it is used.

kserve's own reading is not used for REST: it turns binary tensors into lists of Python numbers, takes text and truth values
for numbers, and trusts sizes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
from kserve import InferInput, InferRequest
from kserve.protocol.infer_type import RequestedOutput
from numpy.typing import NDArray

from smartfrz.predictor.contract import (
    ATTENTION,
    CONFIDENCE,
    HISTORY,
    LENGTHS,
    LOSS,
    POSITION,
    PredictorInfo,
    check_loss,
    check_position,
)


class Spec(NamedTuple):
    """Datatype and number of dimensions of an input."""

    datatype: str
    dtype: Any
    dimensions: int


INPUTS = {
    HISTORY: Spec("FP32", np.float32, 3),
    LENGTHS: Spec("INT64", np.int64, 1),
    POSITION: Spec("FP32", np.float32, 1),
    LOSS: Spec("FP32", np.float32, 2),
}
OUTPUTS = (CONFIDENCE, ATTENTION)
_JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}


def read(body: bytes | bytearray, header_length: str | None, model_name: str) -> InferRequest:
    """Read the body of a REST request. The inputs of the result hold arrays.

    Args:
        body: JSON, followed by the tensors that have a `binary_data_size`.
        header_length: Length of the JSON, from the HTTP header; None if the body is nothing but JSON.
        model_name: Name of the model that is asked.

    Raises:
        ValueError: If the body is not what the protocol demands.
    """
    end = _json_end(header_length, len(body))
    view = memoryview(body)
    try:
        header = orjson.loads(view[:end])  # refuses NaN, and lists that are nested without end
    except ValueError as error:
        raise ValueError(f"The body is no JSON: {error}. Send tensors as binary data, or as numbers.") from error
    header = _expect(header, dict, "The body holds", "an object with 'inputs'")
    request_id = _expect(header.get("id"), str | None, "'id' is", "a string")
    binary = _parameters(header, "the request").get("binary_data_output", False) is True
    inputs, outputs = _read_inputs(header, view[end:]), _read_outputs(header, binary)
    return InferRequest(model_name, inputs, request_id=request_id, request_outputs=outputs)


def _json_end(header_length: str | None, length: int) -> int:
    if header_length is None:
        return length
    if not header_length.isdecimal() or len(header_length) > 12 or int(header_length) > length:
        raise ValueError(
            f"Inference-Header-Content-Length is {header_length[:40]!r}; expected the length of the JSON in a body of "
            f"{length} bytes."
        )
    return int(header_length)


def _expect(value: Any, kind: Any, what: str, expected: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} {_JSON_KINDS.get(type(value), 'a number')}; expected {expected}.")
    return value


def _parameters(part: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] | None = part.get("parameters")
    return _expect(found, dict | None, f"'parameters' of {name} is", "an object") or {}


def _entries(header: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    expected = "a list of objects with a 'name'"
    entries: list[dict[str, Any]] = _expect(header.get(key), list | None, f"{key!r} is", expected) or []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{key!r} is a list; expected {expected}.")
    if len({entry["name"] for entry in entries}) < len(entries):
        raise ValueError(f"{key!r} names one tensor twice; expected each once.")
    return entries


def _read_outputs(header: Mapping[str, Any], binary: bool) -> list[RequestedOutput]:
    entries = _entries(header, "outputs") or [{"name": name} for name in OUTPUTS]
    check_outputs([entry["name"] for entry in entries])
    wanted = {e["name"]: _parameters(e, e["name"]).get("binary_data", binary) is True for e in entries}
    return [RequestedOutput(name, {"binary_data": raw}) for name, raw in wanted.items()]


def _read_inputs(header: Mapping[str, Any], raw: memoryview) -> list[InferInput]:
    entries = _entries(header, "inputs")
    check_names([entry["name"] for entry in entries])
    inputs = []
    for entry in entries:
        name = entry["name"]
        shape = _expect(entry.get("shape"), list, f"'shape' of {name!r} is", "a list of integers")
        if not all(type(size) is int for size in shape):
            raise ValueError(f"'shape' of {name!r} is a list; expected a list of integers.")
        check_claim(name, entry.get("datatype"), shape)
        size = _parameters(entry, name).get("binary_data_size")
        if (size is None) == (entry.get("data") is None):
            raise ValueError(f"{name!r} has to have either 'data' or the parameter 'binary_data_size'.")
        if size is None:
            array = _from_numbers(name, shape, entry["data"])
        else:
            if type(size) is not int or not 0 <= size <= len(raw):
                raise ValueError(
                    f"'binary_data_size' of {name!r} is {str(size)[:40]}; {len(raw)} bytes follow the JSON there."
                )
            array, raw = _from_bytes(name, shape, raw[:size]), raw[size:]
        inputs.append(InferInput(name, shape, INPUTS[name].datatype, array))
    if raw:
        raise ValueError(f"{len(raw)} bytes follow the last tensor; expected none.")
    return inputs


def _from_bytes(name: str, shape: Sequence[int], raw: memoryview) -> NDArray[Any]:
    """Return a tensor from its little-endian bytes, copied only if they are not aligned."""
    dtype = np.dtype(INPUTS[name].dtype).newbyteorder("<")
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise ValueError(f"{name!r} of shape {list(shape)} comes with {len(raw)} bytes; expected {expected}.")
    return np.require(np.frombuffer(raw, dtype).reshape(shape), INPUTS[name].dtype, "A")


def _from_numbers(name: str, shape: Sequence[int], data: Any) -> NDArray[Any]:
    """Return a tensor from numbers in lists, either flat or nested as its shape."""
    flat: Any = data
    for size in shape[1:] if _types(data) == {list} else ():
        if _types(flat) != {list} or {len(part) for part in flat} != {size}:
            break
        flat = [number for part in flat for number in part]
    # Checked before NumPy sees them: for one long string it would give a million numbers the room of that string each.
    real = INPUTS[name].dtype is np.float32
    numbers = (int, float) if real else (int,)
    if not isinstance(flat, list) or len(flat) != math.prod(shape) or not _types(flat).issubset(numbers):
        raise ValueError(
            f"'data' of {name!r} does not fit; expected {math.prod(shape)} {'numbers' if real else 'integers'}, "
            f"flat or nested as {list(shape)}."
        )
    try:
        with np.errstate(over="ignore"):  # infinity is refused later; as a loss it is not known
            array = np.array(flat, np.float64 if real else np.int64).astype(INPUTS[name].dtype)
    except OverflowError as error:
        raise ValueError(f"'data' of {name!r} holds an integer beyond 64 bits; expected smaller ones.") from error
    return array.reshape(shape)


def _types(data: Any) -> set[type]:
    return set(map(type, data)) if isinstance(data, list) else set()


def check_names(names: Sequence[str]) -> None:
    """Check that the names are a predictor's inputs, in any order; all but `history` and `lengths` are optional.

    Raises:
        ValueError: If they are not.
    """
    if len(set(names)) < len(names) or not {HISTORY, LENGTHS} <= set(names) <= set(INPUTS):
        received = ", ".join(name[:40] for name in names[:4])
        raise ValueError(
            f"The inputs are {len(names)}, [{received}]; expected {HISTORY} and {LENGTHS}, each once, and perhaps "
            f"{POSITION} and {LOSS}."
        )


def check_outputs(names: Sequence[str]) -> None:
    """Check that the names are a predictor's outputs, each at most once.

    Raises:
        ValueError: If they are not.
    """
    for name in names:
        if name not in OUTPUTS:
            raise ValueError(f"'outputs' names {name[:40]!r}; expected some of {', '.join(OUTPUTS)}.")
    if len(set(names)) < len(names):
        raise ValueError("'outputs' names one tensor twice; expected each once.")


def check_claim(name: str, datatype: Any, shape: Sequence[int]) -> None:
    """Check the datatype and the number of dimensions that a request claims for an input.

    Raises:
        ValueError: If they are not the input's.
    """
    spec = INPUTS[name]
    if datatype != spec.datatype or len(shape) != spec.dimensions or min(shape) < 1 or max(shape) > 2**31:
        raise ValueError(
            f"{name!r} is {str(datatype)[:40]} of shape {str(list(shape)[:4])[:80]}; expected {spec.datatype} with "
            f"{spec.dimensions} positive sizes."
        )


def check(tensors: Mapping[str, NDArray[Any]], info: PredictorInfo, max_layers: int) -> None:
    """Check that a predictor can answer.

    Args:
        tensors: `history`, `lengths`, and perhaps `position` and `loss`; their claims have been checked.
        info: Facts about the predictor.
        max_layers: Maximum number of layers in a request.

    Raises:
        ValueError: If it cannot.
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
        raise ValueError("history holds NaN or infinity; expected finite weights. Leave layers with such weights out.")
    if POSITION in tensors:
        position = tensors[POSITION]
        if len(position) != num_layers:
            raise ValueError(f"position holds {len(position)} values; expected {num_layers}, one a layer.")
        check_position(position, info)
    if LOSS in tensors:
        check_loss(tensors[LOSS], history.shape, info)
