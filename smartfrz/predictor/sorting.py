"""Sorting in an ONNX graph by a network of Min and Max, several times as fast as TopK on a CPU."""

from typing import Any

import numpy as np
import onnx

_ROWS = 32


def replace_sorts(graph: onnx.GraphProto) -> None:
    """Put a sorting network in the place of every TopK that sorts its whole last axis ascending.

    ONNX Runtime's TopK sorts each vector by itself, a branch a comparison. A network compares the same
    two positions of all vectors at once. Its values are the same, but for NaN.

    Raises:
        ValueError: If a TopK does something else.
    """
    sizes = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    nodes = list(graph.node)
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    del graph.node[:]
    for node in nodes:
        if node.op_type != "TopK":
            graph.node.append(node)
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        axes = _axes(graph, node.input[0])
        whole = axes and node.input[1] in sizes and axes[-1].dim_value == int(sizes[node.input[1]][0])
        last = attributes.get("axis", -1) in (-1, len(axes) - 1)
        if attributes.get("largest", 1) or not whole or not last or node.output[1] in used:
            raise ValueError(f"Node {node.name!r} ({attributes}) is no ascending sort of a last axis of known length.")
        network = _Network(graph, f"sort_{len(graph.node)}")
        network.sort(node.input[0], node.output[0], int(sizes[node.input[1]][0]))


def _axes(graph: onnx.GraphProto, name: str) -> list[onnx.TensorShapeProto.Dimension]:
    found = [v.type.tensor_type.shape.dim for v in (*graph.value_info, *graph.input) if v.name == name]
    return list(found[0]) if found else []


class _Network:
    """Appends nodes to a graph.

    Source:
        Batcher 1968, Sorting networks and their applications: odd-even merging of up to 32 rows, each
        a tensor; then bitonic merging, within one tensor, of what that sorted.
    """

    def __init__(self, graph: onnx.GraphProto, prefix: str):
        self._graph, self._prefix, self._count = graph, prefix, 0

    def sort(self, values: str, result: str, length: int) -> None:
        """Sort the last axis, of that length, ascending."""
        size = 1 << (length - 1).bit_length()
        rows = min(size, _ROWS)
        runs = size // rows
        by_position = self._op("Transpose", self._op("Reshape", values, self._ints(-1, length)), perm=[1, 0])
        highest = self._constant(np.array(np.finfo(np.float32).max, np.float32))
        padded = self._op("Pad", by_position, self._ints(0, 0, size - length, 0), highest)
        split = self._ops("Split", rows, padded, axis=0, num_outputs=rows) if rows > 1 else [padded]
        # Position in the first axis, and the runs to be merged in the second.
        x = self._op("Concat", *self._sorted(split), axis=0)
        while runs > 1:
            runs //= 2
            x = self._merged(x, rows, runs)
            rows *= 2
        x = self._op("Reshape", x, self._ints(size, -1))
        x = self._op("Transpose", self._op("Slice", x, *map(self._ints, (0, length, 0))), perm=[1, 0])
        self._node("Reshape", [x, self._op("Shape", values)], [result])

    def _merged(self, x: str, rows: int, runs: int) -> str:
        """Runs of `rows` in pairs, the first ascending and the second turned round, to half as many."""
        first, second = self._ops(
            "Split", 2, self._op("Reshape", x, self._ints(rows, runs, 2, -1)), axis=2, num_outputs=2
        )
        turned = self._op("Slice", second, *map(self._ints, (-1, np.iinfo(np.int64).min, 0, -1)))
        x = self._op("Concat", *self._compared(first, turned), axis=0)
        distance = rows // 2
        while distance:
            # Unlike Min and Max, these do not look for NaN, and need no halves cut out.
            pairs = self._op("Reshape", x, self._ints(rows // distance, 2, -1))
            halves = [self._op(kind, pairs, self._ints(1), keepdims=0) for kind in ("ReduceMin", "ReduceMax")]
            x = self._op("Concat", *halves, axis=1)
            distance //= 2
        return x

    def _sorted(self, rows: list[str]) -> list[str]:
        middle = len(rows) // 2
        return self._zipped(self._sorted(rows[:middle]), self._sorted(rows[middle:])) if middle else rows

    def _zipped(self, a: list[str], b: list[str]) -> list[str]:
        """Odd-even merge of two sorted lists of the same length."""
        if len(a) == 1:
            return self._compared(a[0], b[0])
        even, odd = self._zipped(a[::2], b[::2]), self._zipped(a[1::2], b[1::2])
        between = [self._compared(*pair) for pair in zip(odd[:-1], even[1:], strict=True)]
        return [even[0], *(row for pair in between for row in pair), odd[-1]]

    def _compared(self, a: str, b: str) -> list[str]:
        return [self._op("Min", a, b), self._op("Max", a, b)]

    def _ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _constant(self, value: np.ndarray) -> str:
        name = f"{self._prefix}_{value.dtype}_{'_'.join(map(str, value.ravel()))}"
        if name not in (t.name for t in self._graph.initializer):
            self._graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    def _op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self._ops(kind, 1, *inputs, **attributes)[0]

    def _ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        names = [f"{self._prefix}_{self._count + i}" for i in range(count)]
        self._count += count
        self._node(kind, list(inputs), names, **attributes)
        return names

    def _node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self._graph.node.append(onnx.helper.make_node(kind, inputs, outputs, **attributes))
