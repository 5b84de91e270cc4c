"""Check of what the shapes in a graph imply, before ONNX Runtime infers them.

ONNX Runtime infers the shape of every tensor while it loads a file, outside of the limits on what a decision may cost. A
few bytes can make that take gigabytes: a tensor of a hundred thousand axes, or a list of numbers that each node doubles.
The check walks the graph once and keeps, for each tensor, bounds of two sizes: its axes, and the integers in it where
they can become the shape of another tensor. Nothing is computed with the values.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from smartfrz.errors import PredictorFileError
from smartfrz.predictor.protobuf import FIXED32, Message

MAX_RANK = 8  # axes of a tensor; smartfrz-base has 3
MAX_INTEGERS = 1024  # integers in a constant, and in what is concatenated of them; smartfrz-base has 3
MAX_NAMES = 10_000  # inputs and outputs of all nodes, constants and declared shapes; smartfrz-base has 966
MAX_NAME = 1000  # bytes
MAX_DIMENSION_NAME = 200  # bytes; shapes hand them on from node to node
_MAX_FIELDS = 2_000_000  # smartfrz-base has 7,000
_INTEGERS = {6: 4, 7: 8}  # TensorProto.DataType and bytes of int32 and int64, of which shapes are made
# Operators whose second input, or attribute in old versions, holds the shape of the output.
_SHAPED = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}
_REDUCING = {
    "Squeeze",
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
}
# Operators with as many values in the output as in the first input, or fewer.
_KEEPING = {
    "CumSum",
    "Dropout",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Transpose",
    "Unsqueeze",
    *_REDUCING,
}
_COMPARING = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor"}
_BROADCASTING = {
    "Abs",
    "Add",
    "Cast",
    "CastLike",
    "Clip",
    "Div",
    "Max",
    "Min",
    "Mul",
    "Neg",
    "Sub",
    "Where",
    *_COMPARING,
}


class Sizes(NamedTuple):
    """Bounds of a tensor.

    Attributes:
        rank: The most axes that it can have.
        integers: The most values that it can have, if it is made of integer constants and of shapes; else None.
    """

    rank: int
    integers: int | None = None


class _Fault(Exception):
    """What a graph implies, for a message."""


def check_shapes(model: memoryview, file: str) -> None:
    """Refuse a graph whose shapes would cost ONNX Runtime more than a predictor's while they are inferred.

    Args:
        model: The file, which `check_onnx` has found to have only operators that are allowed, and no subgraphs.
        file: Name of the file, for the message.

    Raises:
        PredictorFileError: If a tensor can have more than `MAX_RANK` axes, a shape is made of a number of values that is
            not known, or there are more or longer names and lists than a predictor has.
        ValueError: If it is no protobuf message, or a field that may be there once is there twice.
        IndexError: If it ends within a number.
    """
    try:
        _Graph(Message(model, [_MAX_FIELDS]).message(7)).walk()
    except _Fault as fault:
        raise PredictorFileError(
            f"{file!r} has {fault}. ONNX Runtime could take minutes and gigabytes to load it, so that it is not loaded. "
            "Export it again with smartfrz-build train."
        ) from None


class _Graph:
    """A GraphProto, and what is known of its tensors so far."""

    def __init__(self, graph: Message):
        self._graph = graph
        self._names = 0
        self._known: dict[bytes, Sizes] = {b"": Sizes(0, 0)}  # an input that is left out

    def walk(self) -> None:
        """Go through the nodes in their order.

        Raises:
            _Fault: If sizes are not within the limits.
        """
        for tensor in self._graph.messages(5):
            self._add(self._name(tensor.text(8)), self._tensor(tensor))
        for value in self._graph.messages(11):
            name, rank = self._name(value), self._declared_rank(value)
            default = self._known.get(name, Sizes(0))  # constants may be the defaults of inputs
            self._known[name] = Sizes(max(rank, default.rank))
        for number in (12, 13):
            for value in self._graph.messages(number):
                self._name(value)
                self._declared_rank(value)
        for node in self._graph.messages(1):
            self._node(node)

    def _node(self, node: Message) -> None:
        for number in (3, 8):  # name, overload
            self._short(node.text(number))
        inputs = [self._name(name) for name in node.texts(1)]
        attributes: dict[bytes, Message] = {}
        for name, attribute in self._attributes(node):
            if name in attributes:
                raise ValueError(f"the attribute {_text(name)} is there twice")
            attributes[name] = attribute
        missing = [name for name in inputs if name not in self._known]
        if missing:
            raise ValueError(f"the input {_text(missing[0])} of a node is made by no node before it")
        operator = bytes(node.text(4)).decode("utf-8", "replace")
        sizes = self._output(operator, [self._known[name] for name in inputs], attributes)
        outputs = [self._name(name) for name in node.texts(2)]
        if sizes.rank > MAX_RANK:
            raise _Fault(
                f"a tensor of up to {sizes.rank} axes ({_text(outputs[0]) if outputs else ''}); expected at most {MAX_RANK}"
            )
        for name in filter(None, outputs):
            self._add(name, sizes)

    def _add(self, name: bytes, sizes: Sizes) -> None:
        if name in self._known:
            raise ValueError(f"two tensors have the name {_text(name)}")
        self._known[name] = sizes

    def _output(self, operator: str, inputs: list[Sizes], attributes: dict[bytes, Message]) -> Sizes:
        """Return the bounds of a node's outputs."""
        first = inputs[0] if inputs else Sizes(0)
        rank = max((sizes.rank for sizes in inputs), default=0)
        if operator == "Constant":
            return self._constant(attributes)
        if operator == "Shape":
            start, end = _integer(attributes, b"start"), _integer(attributes, b"end")
            within = end - start if start is not None and end is not None and 0 <= start <= end else first.rank
            return Sizes(1, min(first.rank, within))
        if operator == "Size":
            return Sizes(0, 1)
        if operator == "Range":
            return Sizes(1)
        if operator == "Flatten":
            return Sizes(2, first.integers)
        if operator == "Concat":
            return Sizes(rank, _concatenated([sizes.integers for sizes in inputs]))
        if operator in ("Gather", "GatherND"):
            indices = inputs[1] if len(inputs) > 1 else Sizes(0)
            chosen = operator == "Gather" and first.integers is not None and first.rank <= 1
            return Sizes(max(0, first.rank + indices.rank - 1), indices.integers if chosen else None)
        if operator in _SHAPED:
            axes = self._listed(operator, inputs, _SHAPED[operator], attributes)
            return Sizes(
                max(axes, first.rank if operator == "Expand" else 0), first.integers if operator == "Reshape" else None
            )
        if operator == "Unsqueeze":
            return Sizes(first.rank + self._listed(operator, inputs, 1, attributes), first.integers)
        if operator in _REDUCING:
            return Sizes(first.rank - _removed(operator, inputs, attributes), first.integers)
        return Sizes(rank, _integers(operator, rank, inputs))

    def _listed(self, operator: str, inputs: list[Sizes], index: int, attributes: dict[bytes, Message]) -> int:
        """Return how many numbers a node's list of axes or sizes has."""
        if len(inputs) <= index:
            return max((attribute.count(8) for attribute in attributes.values()), default=0)
        count = inputs[index].integers
        if count is None:
            raise _Fault(
                f"a {operator} to a shape of an unknown number of axes; expected one made of constants and shapes"
            )
        return count

    def _constant(self, attributes: dict[bytes, Message]) -> Sizes:
        if len(attributes) != 1:
            raise ValueError(f"a constant of {len(attributes)} values")
        ((name, attribute),) = attributes.items()
        if name == b"value":
            return self._tensor(attribute.message(5))
        if name == b"value_ints":
            return Sizes(1, attribute.count(8))
        return Sizes(1 if name == b"value_floats" else 0, 1 if name == b"value_int" else None)

    def _tensor(self, tensor: Message) -> Sizes:
        """Return the bounds of a constant."""
        rank = tensor.count(1)
        if rank > MAX_RANK:
            raise _Fault(f"a constant of {rank} axes; expected at most {MAX_RANK}")
        dims, dtype = tensor.integers(1), tensor.integer(2)
        if min(dims, default=0) < 0:
            raise ValueError(f"a constant of shape {dims}")
        if dtype not in _INTEGERS:
            return Sizes(rank)
        stored = max(len(tensor.text(9)) // _INTEGERS[dtype], tensor.count(5), tensor.count(7))
        count = max(math.prod(dims), stored)
        if count > MAX_INTEGERS:
            raise _Fault(f"an integer constant of {count} values; expected at most {MAX_INTEGERS}")
        return Sizes(rank, count)

    def _attributes(self, node: Message) -> Iterator[tuple[bytes, Message]]:
        for attribute in node.messages(5):
            count = max(attribute.count(7, FIXED32), attribute.count(8))
            if count > MAX_INTEGERS:
                raise _Fault(f"an attribute of {count} numbers; expected at most {MAX_INTEGERS}")
            for number in (4, 21):  # its text, and the name of another one
                self._short(attribute.text(number))
            yield self._name(attribute), attribute

    def _declared_rank(self, value: Message) -> int:
        """Return the axes in a ValueInfoProto; 0 if it has no shape, which a predictor's inputs have."""
        kind = value.message(2)
        others = kind.numbers - {1, 6}
        if others:
            raise _Fault("a tensor that is a list, a map or sparse")
        dimensions = list(kind.message(1).message(2).messages(1))
        if len(dimensions) > MAX_RANK:
            raise _Fault(f"a tensor of {len(dimensions)} axes; expected at most {MAX_RANK}")
        for dimension in dimensions:
            self._short(dimension.text(2), MAX_DIMENSION_NAME)
            self._short(dimension.text(3), MAX_DIMENSION_NAME)
        return len(dimensions)

    def _name(self, holder: Message | memoryview) -> bytes:
        """Return a name, and count it. It is field 1 of attributes and of declared shapes."""
        self._names += 1
        if self._names > MAX_NAMES:
            raise _Fault(f"more than {MAX_NAMES} inputs, outputs, constants and attributes")
        return self._short(holder.text(1) if isinstance(holder, Message) else holder)

    def _short(self, text: memoryview, most: int = MAX_NAME) -> bytes:
        if len(text) > most:
            raise _Fault(f"a name of {len(text)} bytes; expected at most {most}")
        return bytes(text)


def _concatenated(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    total = sum(known)
    if total > MAX_INTEGERS:
        raise _Fault(f"{total} integers that are concatenated; expected at most {MAX_INTEGERS}")
    return total if len(known) == len(counts) else None


def _integers(operator: str, rank: int, inputs: list[Sizes]) -> int | None:
    """Return how many integers an operator makes that has no rule of its own."""
    if operator in _KEEPING:
        return inputs[0].integers if inputs else None
    if operator not in _BROADCASTING or rank > 1:
        return None
    counts = [sizes.integers for sizes in inputs]
    return None if None in counts else max((count for count in counts if count is not None), default=None)


def _removed(operator: str, inputs: list[Sizes], attributes: dict[bytes, Message]) -> int:
    """Return how many axes are taken away at least: lists may name an axis twice."""
    listed = inputs[1].integers if len(inputs) > 1 else attributes[b"axes"].count(8) if b"axes" in attributes else 0
    keeps = operator != "Squeeze" and _integer(attributes, b"keepdims") != 0
    return 0 if keeps or not listed or not inputs or not inputs[0].rank else 1


def _integer(attributes: dict[bytes, Message], name: bytes) -> int | None:
    return attributes[name].integer(3) if name in attributes else None


def _text(name: bytes | memoryview) -> str:
    return repr(bytes(name[:80]).decode("utf-8", "replace"))
