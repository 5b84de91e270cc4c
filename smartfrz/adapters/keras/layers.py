"""Finds the layers of a Keras model, in the order in which they run, and the axes of their weights."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import wraps
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from smartfrz.control.grouping import Module, Weight, find_containers, group_modules
from smartfrz.errors import StateError, UnsupportedModelError

# Their scales may have several dimensions, but they are no layers of their own.
_NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
    keras.layers.PReLU,
)

_OPERATIONS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Embedding,
    keras.layers.RNN,
    *(kind for name, kind in vars(keras.layers).items() if re.fullmatch(r"\w*Conv[123]D(Transpose)?", name)),
)


@dataclass(frozen=True)
class Layer:
    """A unit of freezing: a Keras layer that owns weights, with everything that belongs to it.

    Attributes:
        name: The layer's name, in a nested model after the names of the models around it: `backbone/conv1`.
        members: Names of the Keras layers that are frozen with it, itself included.
        parameters: Every variable that is frozen with it: a layer's name, a colon, and an index.
        weights: The variables that tailoring reads: matrices, unless these are a small part of the layer.
        norms: Members that are batch norms with moving statistics, each as often as it runs in a step.
        forward_flops: Floating point operations of the forward pass of one example.
    """

    name: str
    members: tuple[str, ...]
    parameters: tuple[str, ...]
    weights: tuple[str, ...]
    norms: tuple[str, ...]
    forward_flops: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as plain data, for a saved state."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Layer":
        """Make the layer that `to_dict` described."""
        named = {field.name: data[field.name] for field in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in named.items()}
        return cls(**values)


@dataclass
class Run:
    """The layers that ran in a forward pass.

    Attributes:
        calls: How often each Keras layer ran, in the order in which they first did.
        shapes: Shape of each layer's first output, batch included, by the layer's id. Unknown sizes are None.
        inputs: Shape of each layer's first input, in the same way.
        sources: The operation that feeds each layer, by the layer's id, if it is a single one and the graph is known.
    """

    calls: dict[Any, float]
    shapes: dict[int, tuple[int | None, ...]]
    inputs: dict[int, tuple[int | None, ...]] = field(default_factory=dict)
    sources: dict[int, Any] = field(default_factory=dict)


def named_layers(model: keras.Model) -> dict[str, Any]:
    """Return every Keras layer inside of the model by its name. The model itself has the empty name.

    Layers of sequential and functional models have their own names. Layers inside of a subclassed layer are named after
    the attribute that holds them, since the names that Keras makes up differ between processes.
    """
    names: dict[str, Any] = {"": model}
    seen = {id(model)}

    def visit(parent: Any, prefix: str) -> None:
        for name, child in _children(parent):
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = unique = f"{prefix}{name}"
            number = 1
            while unique in names:
                number += 1
                unique = f"{path}#{number}"
            names[unique] = child
            visit(child, f"{unique}/")

    visit(model, "")
    return names


def _children(parent: Any) -> Iterator[tuple[str, Any]]:
    if _is_graph(parent):
        yield from ((layer.name, layer) for layer in parent.layers)
        return
    attributes: dict[int, str] = {}
    # On the PyTorch backend a layer is an nn.Module, which keeps what is assigned to it in `_modules`.
    for name, value in {**vars(parent), **vars(parent).get("_modules", {})}.items():
        if name in ("_layers", "_modules"):
            continue
        if isinstance(value, keras.layers.Layer):
            attributes.setdefault(id(value), name.lstrip("_"))
        elif isinstance(value, (list, tuple, dict)) and not name.startswith("_"):  # private ones are the backend's
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in pairs:
                if isinstance(item, keras.layers.Layer):
                    attributes.setdefault(id(item), f"{name}/{key}")
    for layer in getattr(parent, "_layers", []):
        yield attributes.get(id(layer), layer.name), layer


def _is_graph(layer: Any) -> bool:
    """Return whether the layer is a sequential or functional model that runs as its graph says."""
    kind: Any = type(layer)
    if isinstance(layer, keras.Sequential):
        return kind.call is keras.Sequential.call
    functional = next(
        (c for c in kind.__mro__ if c.__name__ == "Functional" and c.__module__.startswith("keras")), None
    )
    return functional is not None and kind.call is functional.call


def trace_graph(model: keras.Model) -> Run | None:
    """Return the layers in the order in which they run, if a graph shows it.

    Returns:
        None if the model is not built yet, subclassed, or has a subclassed layer with layers inside.
    """
    run = Run({}, {})
    return run if model.built and _walk(model, run, 1) else None


def _walk(model: Any, run: Run, times: int) -> bool:
    run.calls[model] = run.calls.get(model, 0) + times
    graph = getattr(model, "_functional", None) or model
    if not hasattr(graph, "operations"):
        return False
    uses: Counter[int] = Counter()
    for nodes in graph._nodes_by_depth.values():
        for node in nodes:
            uses[id(node.operation)] += 1
            run.shapes.setdefault(id(node.operation), tuple(node.outputs[0].shape))
            if node.input_tensors:
                run.inputs.setdefault(id(node.operation), tuple(node.input_tensors[0].shape))
            if len(node.parent_nodes) == 1:
                run.sources.setdefault(id(node.operation), node.parent_nodes[0].operation)
    for layer in graph.operations:  # in execution order
        if not isinstance(layer, keras.layers.Layer):
            continue
        if _is_graph(layer):
            if not _walk(layer, run, times * uses[id(layer)]):
                return False
        elif getattr(layer, "_layers", None) and not isinstance(layer, keras.layers.RNN):
            return False  # only its code knows in which order it calls them
        else:
            run.calls[layer] = run.calls.get(layer, 0) + times * uses[id(layer)]
    return True


class CallRecorder:
    """Records which layers run, if no graph shows it. Use it as a context manager, or call `start` and `stop`.

    TensorFlow and JAX run Python code only while they trace a function, so record a step that is traced.

    Args:
        model: The model. The calls of a layer are counted for each call of the model.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._calls: dict[Any, int] = {}
        self._shapes: dict[int, tuple[int | None, ...]] = {}
        self._inputs: dict[int, tuple[int | None, ...]] = {}
        self._original: Callable[..., Any] | None = None

    def start(self) -> "CallRecorder":
        """Begin to record."""
        original = self._original = keras.layers.Layer.__call__
        recorder = self

        # The class is patched: layers may be made as late as in build(), and Python ignores an instance's __call__.
        @wraps(original)
        def recording(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if recorder._original is None:
                return original(layer, *args, **kwargs)
            recorder._calls[layer] = recorder._calls.get(layer, 0) + 1
            if args and hasattr(args[0], "shape"):
                recorder._inputs.setdefault(id(layer), tuple(args[0].shape))
            output = original(layer, *args, **kwargs)
            first = output[0] if isinstance(output, (list, tuple)) and output else output
            if id(layer) not in recorder._shapes and hasattr(first, "shape"):
                recorder._shapes[id(layer)] = tuple(first.shape)
            return output

        self._recording = recording
        keras.layers.Layer.__call__ = recording
        return self

    def stop(self) -> None:
        """Stop recording."""
        if self._original is not None and keras.layers.Layer.__call__ is self._recording:
            keras.layers.Layer.__call__ = self._original
        self._original = None  # if the method has been wrapped again since, ours only passes calls on

    def run(self) -> Run:
        """Return what has run since `start`."""
        passes = max(1, self._calls.get(self._model, 1))
        return Run({layer: calls / passes for layer, calls in self._calls.items()}, self._shapes, self._inputs)

    def __enter__(self) -> "CallRecorder":
        return self.start()

    def __exit__(self, *error: Any) -> None:
        self.stop()


def trace_layers(model: keras.Model, *example: Any, **keywords: Any) -> list[Layer]:
    """Return the model's layers in execution order.

    Args:
        model: The model.
        *example: Positional arguments of a call, such as an example batch. Needed for subclassed models and models that
            are not built, which are then called once in inference mode.
        **keywords: Keyword arguments of that call.

    Returns:
        One `Layer` per unit that can be frozen.

    Raises:
        UnsupportedModelError: If the model has no layer with weights, or its order is unknown
            without an example.
    """
    run = trace_graph(model)
    if run is None:
        if not example and not keywords:
            raise UnsupportedModelError(
                f"The order in which the layers of {type(model).__name__} run is known only from a call: it is "
                "subclassed, or not built. Pass an example batch."
            )
        with CallRecorder(model) as recorder:
            model(*example, **keywords)
        run = recorder.run()
    return group_layers(model, run)


def own_variables(layer: Any) -> list[Any]:
    """Return the variables that a layer itself holds and that can be trained, frozen ones included."""
    return list(getattr(layer, "_trainable_variables", []))


def _is_bias(layer: Any, variable: Any) -> bool:
    """Return whether the variable is the layer's bias. Biases of attention and of a GRU have two dimensions in Keras."""
    return variable is getattr(layer, "bias", None)


def find_variable(layers: dict[str, Any], name: str) -> Any:
    """Return the variable that `Layer.parameters` names.

    Raises:
        StateError: If the model does not have it.
    """
    path, _, index = name.rpartition(":")
    try:
        return own_variables(layers[path])[int(index)]
    except LookupError:
        raise StateError(
            f"The layers name variable {name!r}, which the model does not have. Use the state of a run of this same "
            "model; build it first, and give its layers names: the ones that Keras makes up differ between processes."
        ) from None


def group_layers(model: keras.Model, run: Run) -> list[Layer]:
    """Join Keras layers to units that are frozen together.

    Raises:
        UnsupportedModelError: If no layer with weights ran.
    """
    layers = named_layers(model)
    ran = list(_list_run_layers(layers, run))
    units = group_modules(_leave_variables_inside(_describe_layers(layers, run), ran), ran)
    if not units:
        raise UnsupportedModelError(
            f"SmartFRZ found no layer to freeze in {type(model).__name__} {model.name!r}: none of the "
            f"{len(ran)} layers that ran owns a weight of two or more dimensions. Pass the callback to fit() of "
            "the model that holds the layers."
        )
    return [
        Layer(
            unit.name,
            tuple(unit.members),
            tuple(weight.name for weight in unit.weights),
            tuple(weight.name for weight in unit.judged),
            tuple(unit.statistics),
            unit.flops,
        )
        for unit in units
    ]


def _list_run_layers(layers: Mapping[str, Any], run: Run) -> Iterator[str]:
    """Yield the names of the layers that ran, in execution order."""
    names = {id(layer): name for name, layer in layers.items()}
    for layer in run.calls:
        name = names.get(id(layer))
        # A recurrent layer may or may not call its cell, as the backend likes: the two are one layer.
        if name is not None and not any(isinstance(layers[a], keras.layers.RNN) for a in _ancestors(name, layers)):
            yield name


def _describe_layers(layers: Mapping[str, Any], run: Run) -> list[Module]:
    """Describe a model's Keras layers to the grouping rule."""
    names = {id(layer): name for name, layer in layers.items()}
    return [
        Module(
            name,
            next(_ancestors(name, layers), None),
            tuple(
                Weight(f"{name}:{index}", id(variable), tuple(variable.shape), is_bias=_is_bias(layer, variable))
                for index, variable in enumerate(own_variables(layer))
            ),
            # Each as often as it runs in a step.
            (name,) * round(run.calls.get(layer, 0)) if isinstance(layer, keras.layers.BatchNormalization) else (),
            is_norm=isinstance(layer, _NORMS),
            is_operation=isinstance(layer, _OPERATIONS),
            flops=_count_flops(layer, run) if layer in run.calls else 0,
            source=_find_source(layer, run, names),
        )
        for name, layer in layers.items()
    ]


def _leave_variables_inside(modules: list[Module], ran: list[str]) -> list[Module]:
    """Take from containers the variables that belong to layers inside of them.

    Keras tracks the kernel that `SpectralNormalization` assigns to an attribute of its own as the wrapper's, too, and
    variables that a model keeps in a list as the model's.
    """
    known = {module.name: module for module in modules}
    containers = find_containers(known, ran)
    inside = {weight.key for name in ran if name not in containers for weight in known[name].weights}
    return [
        replace(module, weights=tuple(weight for weight in module.weights if weight.key not in inside))
        if module.name in containers
        else module
        for module in modules
    ]


def _find_source(layer: Any, run: Run, names: Mapping[int, str]) -> str | None:
    """Return the name of the layer that feeds this one, by way of operations that are no layers; None if unknown."""
    source = run.sources.get(id(layer))
    while source is not None and id(source) not in names:
        source = run.sources.get(id(source))
    return None if source is None else names[id(source)]


def _ancestors(name: str, layers: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the layers around a layer, the nearest first, the model last."""
    while name:
        name = name.rpartition("/")[0]
        if name in layers:
            yield name


def _count_flops(layer: Any, run: Run) -> int:
    """Estimate the operations of a layer for one example, in all its calls of a step."""
    if isinstance(layer, keras.layers.RNN):
        # Its cell owns the weights, and may or may not be called. The first axis is the batch, the second one time.
        shape = run.inputs.get(id(layer), ())
        steps = (shape[1] if len(shape) > 2 else None) or 1
        cells = [inner for inner in layer._flatten_layers() if inner is not layer]
        once = steps * sum(_estimate_flops(cell, None) for cell in cells)
    else:
        once = _estimate_flops(layer, run.shapes.get(id(layer)))
    return round(once * run.calls[layer])


def _estimate_flops(layer: Any, shape: tuple[int | None, ...] | None) -> int:
    """Estimate the operations for one example: two for each use of a weight. Unknown sizes count as one."""
    matrices = [v for v in own_variables(layer) if len(v.shape) >= 2 and not _is_bias(layer, v)]
    if not matrices or isinstance(layer, keras.layers.Embedding):
        return 0
    places = 1
    if shape is not None and len(matrices) == 1:
        sizes = math.prod(size or 1 for size in shape[1:])
        kernel = matrices[0].shape
        if isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
            channels = kernel[-1] * kernel[-2]
        elif isinstance(layer, keras.layers.EinsumDense):
            channels = math.prod(kernel[axis] for axis in _output_axes(layer))
        else:
            channels = kernel[-1]
        places = max(1, sizes // max(1, channels))
    return 2 * places * sum(math.prod(v.shape) for v in matrices)


def _output_axes(layer: Any) -> list[int]:
    """Return the axes of the kernel of an `EinsumDense` that its output has, too."""
    output = layer.equation.partition("->")[2]
    return [axis for axis, letter in enumerate(_kernel_letters(layer)) if letter in output]


def _kernel_letters(layer: Any) -> str:
    return str(layer.equation.partition("->")[0].partition(",")[2].replace(" ", ""))


def torch_axes(layer: Any, rank: int) -> tuple[int, ...]:
    """Return the axes of a weight in the order that PyTorch would have them.

    Outputs come last in Keras and first in PyTorch. The predictor was trained on PyTorch's order: the sampled positions
    are spread over the output channels, in their order.
    """
    axes = list(range(rank))
    name = type(layer).__name__
    if isinstance(layer, keras.layers.EinsumDense):
        # The factors that LoRA adds have different axes from the kernel.
        outputs = _output_axes(layer) if rank == len(_kernel_letters(layer)) else axes[-1:]
        return (*outputs, *(axis for axis in axes if axis not in outputs))
    if isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
        return (*axes[-2:], *axes[:-2])
    if "Conv" in name or isinstance(layer, keras.layers.Dense) or name.endswith("Cell"):
        return (*reversed(axes[-2:]), *axes[:-2])
    return tuple(axes)


def from_torch_positions(
    positions: NDArray[np.int64], shape: tuple[int, ...], axes: tuple[int, ...]
) -> NDArray[np.int64]:
    """Translate positions in a weight that is flattened in PyTorch's order of axes to Keras' order."""
    coordinates = np.unravel_index(positions, [shape[axis] for axis in axes])
    by_axis = dict(zip(axes, coordinates, strict=True))
    return np.ravel_multi_index([by_axis[axis] for axis in range(len(shape))], shape).astype(np.int64)
