"""Check of an ONNX file's bytes before ONNX Runtime loads them.

When ONNX Runtime opens a session it reads external data from other files or, with a tag of its own, from memory. It
also runs whatever the graph says, loops without an end included. A predictor needs neither. The check does without the
onnx package: it walks the protobuf messages that can contain tensors, operators and metadata, and skips everything else.

What the allowed operators can still cost is bounded where they run: see `MAX_MEMORY` and `DEADLINE` in
`smartfrz.predictor.runtime`. What it costs to load them is bounded by their shapes: see `smartfrz.predictor.shapes`.
"""

from collections import Counter
from collections.abc import Iterator

from smartfrz.errors import PredictorFileError
from smartfrz.predictor.protobuf import BYTES, read_fields
from smartfrz.predictor.shapes import check_shapes

MAX_FILE_SIZE = 256 * 2**20  # bytes; smartfrz-base has 1 MiB
MAX_NODES = 1000  # smartfrz-base has 208
MAX_METADATA = 2**20  # bytes of all properties; smartfrz-base has 11,000, and Python takes seconds for many MiB of JSON
_MAX_FIELDS = 1_000_000  # smartfrz-base has 2,186; without a limit a file of empty nodes takes minutes
# What the exporter writes, and what other versions of it write for the same network. None of them branches, loops,
# draws random numbers, or keeps a state, and none takes time for a tensor of no elements, as Trilu does.
OPERATORS = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "CumSum",
        "DequantizeLinear",
        "Div",
        "Dropout",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "IsInf",
        "IsNaN",
        "LayerNormalization",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "MatMul",
        "Max",
        "Mean",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "QuantizeLinear",
        "Range",
        "Reciprocal",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "Round",
        "Shape",
        "Sigmoid",
        "Sign",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "Transpose",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)
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
OPERATOR, NODE_DOMAIN = ("NodeProto", 4), ("NodeProto", 7)
PROPERTY = ("ModelProto", 14)
PROPERTY_KEY = ("StringStringEntryProto", 1)
ATTRIBUTE_NAME = ("AttributeProto", 1)
# What a predictor has none of, as a message names it.
FORBIDDEN = {
    ("ModelProto", 20): "steps of training",
    ("ModelProto", 25): "functions of its own",
    ("AttributeProto", 6): "subgraphs, as of loops and branches",
    ("AttributeProto", 11): "subgraphs, as of loops and branches",
    ("GraphProto", 15): "sparse tensors",
    ("AttributeProto", 22): "sparse tensors",
    ("AttributeProto", 23): "sparse tensors",
    # A tensor of text takes 32 bytes a value of the memory that is limited, and any amount of the rest.
    ("TensorProto", 6): "text in tensors",
    ("AttributeProto", 9): "text in tensors",
}
_DOMAINS = {"", "ai.onnx"}


def check_onnx(content: bytes, file: str) -> None:
    """Refuse files that ONNX Runtime should not be given: a predictor has none of what is refused here.

    Args:
        content: The whole file.
        file: Name of the file, for the message.

    Raises:
        PredictorFileError: If the file has data in other files, operators that are not in `OPERATORS`, subgraphs,
            functions, text in tensors, more than `MAX_NODES` nodes, shapes that `check_shapes` refuses, more than
            `MAX_METADATA` bytes of metadata, or a property twice or not in UTF-8; or if it is no protobuf message.
    """
    operators: Counter[str] = Counter()
    domains, forbidden = set(), set()
    properties: Counter[str] = Counter()
    metadata = 0
    view = memoryview(content)
    try:
        for place, value in _fields(view):
            text = view[value.start : value.stop]
            if place == EXTERNAL_DATA:
                raise PredictorFileError(
                    f"{file!r} keeps data outside of the file ({_text(text)!r}), which is not "
                    "read; expected one file with all its weights. Export it again with smartfrz-build train."
                )
            if place == OPERATOR:
                operators[_text(text)] += 1
            elif place == NODE_DOMAIN:
                domains.add(_text(text))
            elif place == ATTRIBUTE_NAME and _text(text) == "value_string":  # a constant
                forbidden.add(FORBIDDEN["TensorProto", 6])
            elif place in FORBIDDEN:
                forbidden.add(FORBIDDEN[place])
            elif place == PROPERTY:
                metadata += len(text)
                if metadata > MAX_METADATA:
                    raise PredictorFileError(
                        f"{file!r} has more than {MAX_METADATA >> 10} KiB of metadata; expected a few KiB. Export it "
                        "again with smartfrz-build train."
                    )
                for part, where in _fields(text, PROPERTY_KEY[0]):
                    words = str(text[where.start : where.stop], "utf-8")
                    properties[words] += part == PROPERTY_KEY
    except (IndexError, ValueError) as error:
        raise _damaged(file, error) from error
    if custom := sorted(domains - _DOMAINS):
        raise PredictorFileError(
            f"{file!r} uses custom operators of {', '.join(map(repr, custom))}; expected operators that every onnxruntime "
            "has. Export it again with smartfrz-build train."
        )
    _check_cost(operators, forbidden, file)
    if doubled := sorted(key for key, count in properties.items() if count > 1):
        raise PredictorFileError(
            f"{file!r} has the metadata property {doubled[0][:80]!r} twice; expected each once. Export it again with "
            "smartfrz-build train."
        )
    try:
        check_shapes(view, file)
    except (IndexError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: str, error: Exception) -> PredictorFileError:
    return PredictorFileError(f"{file!r} is not an ONNX file, or is damaged ({error}). Copy the file again.")


def _check_cost(operators: Counter[str], forbidden: set[str], file: str) -> None:
    """Refuse a graph that can do more than a predictor has to."""
    if unknown := sorted(set(operators) - OPERATORS):
        forbidden = forbidden | {"operators that no predictor needs: " + ", ".join(unknown)[:200]}
    if forbidden:
        raise PredictorFileError(
            f"{file!r} contains {'; '.join(sorted(forbidden))}. Such a graph could run for ever, and is not "
            "run. Export it again with smartfrz-build train."
        )
    if operators.total() > MAX_NODES:
        raise PredictorFileError(
            f"{file!r} has {operators.total()} nodes; expected at most {MAX_NODES}. Export it again with smartfrz-build "
            "train."
        )


def _text(value: memoryview) -> str:
    return bytes(value[:200]).decode("utf-8", "replace")


def _fields(view: memoryview, root: str = "ModelProto") -> Iterator[tuple[tuple[str, int], range]]:
    """Yield (message, field number) and byte range of every length-delimited field, nested messages included."""
    waiting = [(root, 0, len(view))]
    visited = 0
    while waiting:
        message, start, end = waiting.pop()
        for number, kind, first, last in read_fields(view, start, end, message):
            visited += 1
            if visited > _MAX_FIELDS:
                raise ValueError(f"more than {_MAX_FIELDS} fields")
            if kind != BYTES:
                continue
            yield (message, number), range(first, last)
            if nested := MESSAGES.get(message, {}).get(number):
                waiting.append((nested, first, last))
