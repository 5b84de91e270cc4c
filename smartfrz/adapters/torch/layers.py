"""Finds the layers of a PyTorch model, in the order in which they run, and reads their weights."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from smartfrz.adapters.torch.sharding import locate, sum_shards
from smartfrz.control.grouping import Module, Weight, group_modules
from smartfrz.control.tailoring import split_positions
from smartfrz.errors import StateError, UnsupportedModelError


@dataclass(frozen=True)
class Layer:
    """A unit of freezing: a module that owns weights, with everything that belongs to it.

    Attributes:
        name: The module's name, as in `model.named_modules()`.
        parameters: Names of every parameter that is frozen with the layer.
        weights: The parameters that tailoring reads, with two or more dimensions each.
        norms: Modules of the layer that change in a forward pass in training mode: batch norms with
            running statistics, and the power iteration of a spectral norm.
        output: The module whose output is the layer's output: its batch norm if it has one.
        forward_flops: Floating point operations of one forward pass, at the traced batch size.
    """

    name: str
    parameters: tuple[str, ...]
    weights: tuple[str, ...]
    norms: tuple[str, ...]
    output: str
    forward_flops: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as plain data, for a saved state."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Layer":
        """Make the layer that `to_dict` described."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


class LayerTracer:
    """Watches one forward pass to find the layers in the order in which they run.

    In many models modules are not registered in the order in which they run. Only the latter tells which frozen layers
    form a prefix that the backward pass need not enter.

    Args:
        model: The model. Its modules have hooks until the first forward pass that can be traced has ended.
        training_only: Ignore forward passes in eval mode, since some modules then take other paths, and without
            gradients, since they show no checkpointing.
        on_done: Called once the pass has been watched.

    Attributes:
        total_flops: Floating point operations of the forward pass.
        done: Whether a pass has been watched.
        wrapper: The DistributedDataParallel that ran the model, if any.
        reentrant: Whether parts of the model ran under reentrant checkpointing.
    """

    def __init__(self, model: nn.Module, *, training_only: bool = True, on_done: Callable[[], None] | None = None):
        self._on_done = on_done
        self._model = model
        self._training_only = training_only
        self._ran: list[str] = []
        self._flops: dict[str, int] = {}
        self._stack: list[str] = []
        self._mode: _FlopMode | None = None
        self._depth = 0  # how many calls deep the model calls itself
        self._handles: list[Any] = []
        self.total_flops = 0
        self.done = False
        self.wrapper: nn.Module | None = None
        self.reentrant = False
        for name, module in model.named_modules():
            if module is model:
                continue
            self._handles.append(module.register_forward_pre_hook(Uncopied(self._enter(name))))
            self._handles.append(module.register_forward_hook(Uncopied(self._leave), always_call=True))
        # Prepended, so that the root starts the count before everything else.
        self._handles.append(model.register_forward_pre_hook(Uncopied(self._start), prepend=True))
        self._handles.append(model.register_forward_hook(Uncopied(self._stop), always_call=True))

    def _start(self, module: nn.Module, args: Any) -> None:
        if self._mode is not None:
            self._depth += 1
            return
        if self.done or (self._training_only and not (module.training and torch.is_grad_enabled())):
            return
        self._ran, self._flops, self._stack = [""], {}, [""]
        self._mode = _FlopMode(self._stack, self._flops)
        self._mode.__enter__()

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._mode is None:
            return
        if self._depth:
            self._depth -= 1
            return
        self._mode.__exit__(None, None, None)
        self._mode = None
        if output is None:  # the forward pass raised
            return
        self.total_flops = sum(self._flops.values())
        self.wrapper = DistributedDataParallel._get_active_ddp_module()
        self.reentrant = _is_behind(output, "CheckpointFunctionBackward")
        self.done = True
        self.close()
        if self._on_done is not None:
            self._on_done()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if self._mode is not None:
                self._ran.append(name)
                self._stack.append(name)

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._mode is not None and len(self._stack) > 1:
            self._stack.pop()

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def layers(self) -> list[Layer]:
        """Return the layers in execution order.

        Raises:
            UnsupportedModelError: If no module with weights ran.
        """
        return _group_modules(self._model, self._ran, self._flops)


class Uncopied:
    """A hook that is left out of copies of the model.

    An averaged model is a deep copy, made at any moment. It must neither be traced itself nor end the trace of the model
    that is trained. Besides, a hook that is a closure could not be pickled.
    """

    def __init__(self, hook: Callable[..., Any]):
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        """Call the hook."""
        return self._hook(*args)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _do_nothing

    def __reduce__(self) -> Any:
        return _make_empty_hook, ()


def _do_nothing(*args: Any) -> None:
    """Replace a hook in a copy."""


def _make_empty_hook() -> Callable[..., None]:
    return _do_nothing


def _is_behind(output: Any, node: str) -> bool:
    """Return whether a node of this name is in the graph that made the output."""
    values = [value for leaf in tree_leaves(output) for value in (leaf, *tree_leaves(getattr(leaf, "__dict__", None)))]
    waiting = [value.grad_fn for value in values if isinstance(value, torch.Tensor)]
    seen = set()
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        if function.name() == node:
            return True
        seen.add(function)
        waiting += [following for following, _ in function.next_functions]
    return False


class _FlopMode(TorchDispatchMode):
    """Adds up PyTorch's own operation counts for each innermost running module."""

    def __init__(self, stack: list[str], flops: dict[str, int]):
        super().__init__()
        self._stack = stack
        self._flops = flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            name = self._stack[-1]
            self._flops[name] = self._flops.get(name, 0) + count(*args, **kwargs, out_val=output)
        return output


def trace_layers(model: nn.Module, *example: Any, **keywords: Any) -> list[Layer]:
    """Run the model once, without gradients, and return its layers in execution order.

    Args:
        model: The model, in the mode in which to trace it.
        *example: Positional arguments of its forward pass.
        **keywords: Keyword arguments of its forward pass.

    Returns:
        One `Layer` per unit that can be frozen.

    Raises:
        UnsupportedModelError: If the model has no layer with weights.
    """
    tracer = LayerTracer(model, training_only=False)
    try:
        with torch.no_grad():
            model(*example, **keywords)
        return tracer.layers()
    finally:
        tracer.close()


def _group_modules(model: nn.Module, ran: Iterable[str], flops: Mapping[str, int]) -> list[Layer]:
    """Join the model's modules to layers.

    Args:
        model: The model.
        ran: Names of its modules by first execution.
        flops: Floating point operations of the modules, without the modules inside.
    """
    ran = list(dict.fromkeys(map(strip_parametrizations, ran)))
    units = group_modules(_describe_modules(model, flops), ran)
    if not units:
        raise UnsupportedModelError(
            f"SmartFRZ found no layer to freeze in {type(model).__name__}: none of the {len(ran)} modules that ran in "
            "its forward pass owns a weight of two or more dimensions. Pass the model that holds the layers, and run "
            "its forward pass through the model itself."
        )
    return [
        Layer(
            unit.name,
            tuple(weight.name for weight in unit.weights),
            tuple(weight.name for weight in unit.judged),
            tuple(unit.statistics),
            unit.output,
            unit.flops,
        )
        for unit in units
    ]


def group_later(model: nn.Module, parameters: Collection[nn.Parameter], known: Collection[str]) -> list[Layer]:
    """Join modules that ran for the first time after the layers were learned to layers of their own.

    Their floating point operations are unknown.

    Args:
        model: The model.
        parameters: Parameters of these modules.
        known: Names of parameters that belong to layers already.
    """
    ids = {id(parameter) for parameter in parameters}
    ran = [
        name for name, module in model.named_modules() if any(id(p) in ids for p in module.parameters(recurse=False))
    ]
    if not ran:
        return []
    try:
        layers = _group_modules(model, ran, {})
    except UnsupportedModelError:  # vectors only
        return []
    return [layer for layer in layers if not set(known).intersection(layer.parameters)]


def _describe_modules(model: nn.Module, flops: Mapping[str, int]) -> list[Module]:
    """Describe the model's modules to the grouping rule.

    What computes a module's weight (weight norm, spectral norm, LoRA as a parametrization) is part of that module.
    """
    counts: Counter[str] = Counter()
    for name, count in flops.items():
        counts[strip_parametrizations(name)] += count
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # one for tied parameters
    return [
        Module(
            name,
            name.rpartition(".")[0] if name else None,
            tuple(_list_weights(module, names)),
            tuple(_list_changing_modules(name, module)),
            # A norm over several dimensions has weights with as many.
            is_norm=isinstance(module, (nn.LayerNorm, nn.RMSNorm)),
            ends_layer=isinstance(module, _NormBase),
            is_list=isinstance(module, (nn.ParameterList, nn.ParameterDict)),
            flops=counts[name],
        )
        for name, module in model.named_modules()
        if name == strip_parametrizations(name)
    ]


def strip_parametrizations(name: str) -> str:
    """Return the name of the module whose weight is computed, if `name` is a module that computes it."""
    return f".{name}".partition(".parametrizations.")[0][1:]


def _list_parametrizations(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that compute a module's weights, with their names inside of it."""
    if is_parametrized(module):
        yield from module.parametrizations.named_modules(prefix="parametrizations")  # type: ignore[union-attr]


def _list_weights(module: nn.Module, names: Mapping[int, str]) -> Iterator[Weight]:
    """Yield the parameters that a module owns itself, by the names of their ids."""
    for owner in (module, *(inner for _, inner in _list_parametrizations(module))):
        for parameter in owner.parameters(recurse=False):
            # A lazy module that never ran has no shapes.
            shape = () if is_lazy(parameter) else tuple(parameter.shape)
            yield Weight(names[id(parameter)], id(parameter), shape)


def _list_changing_modules(name: str, module: nn.Module) -> Iterator[str]:
    """Yield names of everything in this module that a forward pass in training mode changes."""
    for inner, parametrization in _list_parametrizations(module):
        if isinstance(parametrization, _SpectralNorm):
            yield f"{name}.{inner}" if name else inner
    has_running_statistics = isinstance(module, _NormBase) and module.running_mean is not None
    # The older torch.nn.utils.spectral_norm is a hook.
    if has_running_statistics or any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        yield name


class LayerReader:
    """Reads the weights of a model's layers as NumPy arrays.

    Args:
        model: The model.
        layers: Its layers, in execution order.

    Raises:
        StateError: If the model lacks a parameter that a layer names.
    """

    def __init__(self, model: nn.Module, layers: list[Layer]):
        self._layers = {layer.name: layer for layer in layers}
        known = dict(model.named_parameters())
        missing = [n for layer in layers for n in layer.parameters if n not in known]
        if missing:
            raise StateError(
                f"The layers name parameters that {type(model).__name__} does not have: {missing[:3]}. "
                "Use the state of a run of this same model."
            )
        self._tensors = {layer.name: [known[n] for n in layer.weights] for layer in layers}
        self._parts: dict[str, tuple[NDArray[np.int64], list[Any]]] = {}

    def layers(self) -> list[str]:
        """Return the names of the layers in execution order."""
        return list(self._layers)

    def num_weights(self, layer: str) -> int:
        """Return the number of weights that the layer is judged by."""
        return sum(t.numel() for t in self._tensors[layer])

    def weights(self, layer: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a copy of the layer's flattened weights at `indices`.

        Args:
            layer: Name of the layer.
            indices: Positions in the layer's flattened weights, int64 `[n]`, ascending. Pass the same array at every
                call, so that it is moved to the weights' device only once.

        Returns:
            float32 `[n]`, whatever the dtype of the weights.
        """
        return self.tailored({layer: indices})[layer]

    def tailored(self, positions: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float32]]:
        """Return what `weights` does for several layers, and wait for the GPU only once.

        If the weights are spread over processes, every process has to call it, and it costs one message.
        """
        parts = {layer: self._split(layer, indices) for layer, indices in positions.items()}
        read = {layer: [part.read() for part in of_layer] for layer, of_layer in parts.items()}
        sum_shards((part, v) for layer in parts for part, v in zip(parts[layer], read[layer], strict=True))
        picked = {layer: torch.cat(vectors) for layer, vectors in read.items()}
        if len({vector.device for vector in picked.values()}) > 1:
            return {layer: vector.cpu().numpy() for layer, vector in picked.items()}
        joined = torch.cat(list(picked.values())).cpu().numpy()
        ends = np.cumsum([len(indices) for indices in positions.values()])
        return dict(zip(picked, np.split(joined, ends[:-1]), strict=True))

    def _split(self, layer: str, indices: NDArray[np.int64]) -> list[Any]:
        """Return the positions in each of the layer's tensors."""
        known, parts = self._parts.get(layer, (None, []))
        if known is indices:
            return parts
        tensors = self._tensors[layer]
        inside = split_positions(indices, [tensor.numel() for tensor in tensors])
        parts = [locate(t, torch.from_numpy(where)) for t, where in zip(tensors, inside, strict=True) if len(where)]
        self._parts[layer] = indices, parts
        return parts


@contextmanager
def collect_outputs(model: nn.Module, layers: list[Layer]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the output of each layer during forward passes inside the block.

    Yields:
        A dict that a forward pass fills with a copy of each layer's output on the CPU, by the name of the layer. If a
        module returns several values, the first tensor counts.
    """
    outputs: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())

    def make_hook(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while isinstance(output, (tuple, list)):
                output = output[0]
            # A copy, since an in-place activation after the layer would overwrite its output.
            outputs[name] = output.detach().to("cpu", copy=True)

        return hook

    handles = [modules[layer.output].register_forward_hook(make_hook(layer.name)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
