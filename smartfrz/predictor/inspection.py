"""Check of an ONNX file's bytes before ONNX Runtime loads them.

When ONNX Runtime opens a session it reads external data from other files or, with a tag of its own, from memory. A
predictor needs neither. The check does without the onnx package: it walks the protobuf messages that can contain
tensors and operators, and skips everything else.
"""

from collections.abc import Iterator

from smartfrz.errors import PredictorFileError

MAX_FILE_SIZE = 256 * 2**20  # bytes; smartfrz-base has 1 MiB
_MAX_FIELDS = 1_000_000  # smartfrz-base has 2,186; without a limit a file of empty nodes takes minutes
# Message -> field number -> message, from onnx.proto. A test compares them with the onnx package.
MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
EXTERNAL_DATA = ("TensorProto", 13)
NODE_DOMAIN, FUNCTION_DOMAIN = ("NodeProto", 7), ("FunctionProto", 10)
_DOMAINS = {"", "ai.onnx", "com.microsoft"}  # domains that every build of onnxruntime contains
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_onnx(content: bytes, file: str) -> None:
    """Refuse files with data in other files, or with operators that have to be installed: a predictor needs neither.

    Args:
        content: The whole file.
        file: Name of the file, for the message.

    Raises:
        PredictorFileError: If the file has either, or is no protobuf message.
    """
    used: set[str] = set()
    defined = set(_DOMAINS)  # and the domains of functions that the file itself defines
    view = memoryview(content)
    try:
        for place, value in _fields(view):
            if place == EXTERNAL_DATA:
                raise PredictorFileError(
                    f"{file!r} keeps data outside of the file ({_text(view[value.start : value.stop])!r}), which is not "
                    "read; expected one file with all its weights. Export it again with smartfrz-build train."
                )
            if place == NODE_DOMAIN:
                used.add(_text(view[value.start : value.stop]))
            elif place == FUNCTION_DOMAIN:
                defined.add(_text(view[value.start : value.stop]))
    except (IndexError, ValueError) as error:
        raise PredictorFileError(
            f"{file!r} is not an ONNX file, or is damaged ({error}). Copy the file again."
        ) from error
    if custom := sorted(used - defined):
        raise PredictorFileError(
            f"{file!r} uses custom operators of {', '.join(map(repr, custom))}; expected operators that every onnxruntime "
            "has. Export it again with smartfrz-build train."
        )


def _text(value: memoryview) -> str:
    return bytes(value[:200]).decode("utf-8", "replace")


def _fields(view: memoryview) -> Iterator[tuple[tuple[str, int], range]]:
    """Yield (message, field number) and byte range of every length-delimited field, nested messages included."""
    waiting = [("ModelProto", 0, len(view))]
    visited = 0
    while waiting:
        message, position, end = waiting.pop()
        while position < end:
            visited += 1
            if visited > _MAX_FIELDS:
                raise ValueError(f"more than {_MAX_FIELDS} fields")
            tag, position = _varint(view, position)
            number, kind = tag >> 3, tag & 7
            if tag >= 2**32 or number == 0:
                raise ValueError(f"field {number}")
            if kind == _BYTES:
                length, position = _varint(view, position)
                start, position = position, position + length
                if position > end:
                    raise ValueError(f"field {number} of {message} extends beyond its message")
                yield (message, number), range(start, position)
                if number in MESSAGES[message]:
                    waiting.append((MESSAGES[message][number], start, position))
            elif kind == _VARINT:
                _, position = _varint(view, position)
            elif kind in (_FIXED64, _FIXED32):
                position += 8 if kind == _FIXED64 else 4
            else:
                raise ValueError(f"wire type {kind}")
        if position != end:
            raise ValueError(f"{message} ends inside a field")


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than ten bytes")
