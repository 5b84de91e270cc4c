"""Finds the layers of a PyTorch model, in the order in which they run, and reads their weights."""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from smartfrz.adapters.torch.compiling import EagerOperators
from smartfrz.adapters.torch.copying import copy_later
from smartfrz.adapters.torch.sharding import count_values, is_sharded, locate, sum_shards
from smartfrz.control.grouping import Module, Weight, group_modules
from smartfrz.control.tailoring import split_positions
from smartfrz.errors import StateError, UnsupportedModelError

_OPERATIONS = (
    nn.Linear,
    nn.Bilinear,
    _ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


@dataclass(frozen=True)
class Layer:
    """A unit of freezing: a module that owns weights, with everything that belongs to it.

    Attributes:
        name: The module's name, as in `model.named_modules()`.
        parameters: Names of every parameter that is frozen with the layer.
        weights: The parameters that tailoring reads: matrices, unless these are a small part of the layer.
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
        named = {field.name: data[field.name] for field in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in named.items()}
        return cls(**values)


class LayerTracer:
    """Watches forward passes to find the layers in the order in which they run.

    In many models modules are not registered in the order in which they run. Only the latter tells which frozen layers
    form a prefix that the backward pass need not enter.

    A pass is a call of the model, or of a part of it: some training steps never call the model itself.

    Args:
        model: The model. Its modules have hooks until `close`, or until one call of the model has ended.
        one_call: Whether to close after one call of the model. Otherwise several passes count together, until `end_step`.
        training_only: Ignore forward passes in eval mode, since some modules then take other paths, and without
            gradients, since they show no checkpointing.
        on_done: Called once the hooks are gone.

    Attributes:
        done: Whether a pass has been watched.
        wrapper: The DistributedDataParallel that ran the model, if any.
        reentrant: Whether parts of the model ran under reentrant checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        one_call: bool = True,
        training_only: bool = True,
        on_done: Callable[[], None] | None = None,
    ):
        self._model = model
        self._one_call = one_call
        self._training_only = training_only
        self._on_done = on_done
        self._ran: dict[str, None] = {"": None}
        self._flops: Counter[str] = Counter()
        # Of the pass that is going on.
        self._stack: list[str] = []
        self._entered: list[str] = []
        self._counted: dict[str, int] = {}
        self._outside = 0  # number of calls around it
        self._mode: _FlopMode | None = None
        self._operators: EagerOperators | None = None  # while any call is going on
        self._thread = 0
        self._succeeded_at = 0  # depth of the latest call that did not raise
        self._last_output: Any = None
        self._handles: list[Any] = []
        self.done = False
        self.wrapper: nn.Module | None = None
        self.reentrant = False
        for name, module in model.named_modules():
            # Prepended, so that the pass begins before anything else.
            self._handles += [
                module.register_forward_pre_hook(Uncopied(self._enter(name)), prepend=True),
                module.register_forward_hook(Uncopied(self._succeed)),
                module.register_forward_hook(Uncopied(self._leave(name)), always_call=True),
            ]

    @property
    def total_flops(self) -> int:
        """Floating point operations of what ran."""
        return self._flops.total()

    def _begins(self, module: nn.Module) -> bool:
        """Return whether a pass begins with this call, which is inside of no other."""
        return not self._training_only or (module.training and torch.is_grad_enabled())

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if self._operators is None:
                if torch._C._current_graph_task_id() != -1:  # checkpointing runs modules again in the backward pass
                    return
                self._operators, self._thread = EagerOperators().__enter__(), threading.get_ident()
            if threading.get_ident() != self._thread:
                return
            if self._mode is None and self._begins(module):
                self._outside = len(self._stack)
                self._entered, self._counted, self._last_output = [], {}, None
                self._mode = _FlopMode(self._stack, self._counted).__enter__()
            self._entered.append(name)
            self._stack.append(name)
            self._succeeded_at = 0

        return hook

    def _succeed(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._operators is not None and threading.get_ident() == self._thread:
            self._succeeded_at = len(self._stack)
            if output is not None:
                self._last_output = output

    def _leave(self, name: str) -> Any:
        # The output cannot tell whether the call raised: it may be None either way.
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._operators is None or threading.get_ident() != self._thread or name not in self._stack:
                return
            succeeded = self._succeeded_at == len(self._stack)
            while self._stack.pop() != name:
                pass
            if self._mode is not None and len(self._stack) <= self._outside:
                self._mode.__exit__(None, None, None)
                self._mode = None
                if succeeded:
                    self._end_pass()
            if not self._stack:
                self._operators.__exit__(None, None, None)
                self._operators = None
                if name == "" and self.done and self._one_call:
                    self.close()

        return hook

    def _end_pass(self) -> None:
        output, self._last_output = self._last_output, None
        self._ran.update(dict.fromkeys(self._entered))
        self._flops.update(self._counted)
        self.wrapper = DistributedDataParallel._get_active_ddp_module() or self.wrapper
        self.reentrant = self.reentrant or _is_behind(output, "CheckpointFunctionBackward")
        self.done = True

    def end_step(self) -> None:
        """Close, if a pass has been watched and none is going on."""
        if self.done and self._operators is None:
            self.close()

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._on_done is not None:
            self._on_done()

    def layers(self) -> list[Layer]:
        """Return the layers in execution order.

        Raises:
            UnsupportedModelError: If no module with weights ran.
        """
        return _group_modules(self._model, self._ran, self._flops)


class Uncopied:
    """A hook that is left out of copies of the model.

    An averaged model is a deep copy, made at any moment. It must neither be traced itself nor end the trace of the model
    that is trained. A pickle of the model has a hook of the standard library instead, which does nothing, so that it
    loads where smartfrz is not installed. (A hook that is a closure could not be pickled at all.)
    """

    def __init__(self, hook: Callable[..., Any]):
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        """Call the hook."""
        return self._hook(*args)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _do_nothing

    def __reduce__(self) -> Any:
        # Whatever the arguments, this bound method returns None.
        return getattr, (nullcontext(), "__exit__")


def _do_nothing(*args: Any) -> None:
    """Replace a hook in a copy."""


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


def _count_recurrent(inputs: torch.Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Count the operations of a recurrent layer: two for each use of a weight, at each place of each sequence."""
    weights = [value for value in tree_leaves(args[:4]) if isinstance(value, torch.Tensor)]
    return 2 * inputs.shape[:-1].numel() * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _count_recurrent_backward(*args: Any, **kwargs: Any) -> int:
    return 2 * _count_recurrent(*args, **kwargs)


#: Operation counts that PyTorch's own counter lacks, for `custom_mapping` of `FlopCounterMode`: recurrent layers, which
#: are one operation each on GPUs and in part on CPUs.
RECURRENT_COUNTS: dict[Any, Any] = {
    torch.ops.aten.mkldnn_rnn_layer: _count_recurrent,
    torch.ops.aten._cudnn_rnn: _count_recurrent,
    torch.ops.aten.miopen_rnn: _count_recurrent,
    torch.ops.aten.mkldnn_rnn_layer_backward: _count_recurrent_backward,
    torch.ops.aten._cudnn_rnn_backward: _count_recurrent_backward,
    torch.ops.aten.miopen_rnn_backward: _count_recurrent_backward,
}
for _count in RECURRENT_COUNTS.values():
    _count._get_raw = True  # FlopCounterMode passes tensors then, not their shapes


class _FlopMode(TorchDispatchMode):
    """Adds up operation counts, PyTorch's own and those of recurrent layers, for each innermost running module."""

    supports_higher_order_operators = True  # torch.cond and the like

    def __init__(self, stack: list[str], flops: dict[str, int]):
        super().__init__()
        self._stack = stack
        self._flops = flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)  # an operator of higher order has none
        count = flop_registry.get(packet) or RECURRENT_COUNTS.get(packet)
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


def list_uncounted(model: nn.Module, layers: Iterable[Layer]) -> list[str]:
    """Return the layers with matrices whose operations nothing could count, such as those of kernels of one's own.

    An embedding only looks rows up. That it has no operations is no gap.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return [
        layer.name
        for layer in layers
        if not layer.forward_flops
        and not isinstance(modules.get(layer.name), (nn.Embedding, nn.EmbeddingBag))
        and any(name in parameters and parameters[name].dim() >= 2 for name in layer.parameters)
    ]


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
            is_operation=isinstance(module, _OPERATIONS),
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


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


class LayerReader:
    """Reads the weights of a model's layers as NumPy arrays.

    Args:
        model: The model.
        layers: Its layers, in execution order.

    Raises:
        StateError: If the model lacks a parameter or a module that a layer names.
    """

    # Tests set it, to have a CPU read later as a GPU does.
    _always_later = False

    def __init__(self, model: nn.Module, layers: list[Layer]):
        self._layers = {layer.name: layer for layer in layers}
        known = dict(model.named_parameters())
        missing = [n for layer in layers for n in (*layer.parameters, *layer.weights) if n not in known]
        lost = [n for layer in layers for n in (*layer.norms, layer.output) if not _has_module(model, n)]
        if missing or lost:
            raise StateError(
                f"The layers name {'parameters' if missing else 'modules'} that {type(model).__name__} does not have: "
                f"{(missing or lost)[:3]}. Use the state of a run of this same model."
            )
        self._tensors = {layer.name: [known[n] for n in layer.weights] for layer in layers}
        self._parts: dict[str, tuple[NDArray[np.int64], list[Any]]] = {}

    def layers(self) -> list[str]:
        """Return the names of the layers in execution order."""
        return list(self._layers)

    def num_weights(self, layer: str) -> int:
        """Return the number of weights that the layer is judged by; a complex one counts as two."""
        return sum(count_values(t) for t in self._tensors[layer])

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
        picked = self._pick(positions)
        if len({vector.device for vector in picked.values()}) > 1:
            return {layer: vector.cpu().numpy() for layer, vector in picked.items()}
        return _cut(picked, torch.cat(list(picked.values())).cpu())

    @property
    def reads_later(self) -> bool:
        """Whether weights are copied while the device goes on computing: all of them are whole, and on one GPU."""
        tensors = [tensor for of_layer in self._tensors.values() for tensor in of_layer]
        on_one_gpu = len({tensor.device for tensor in tensors}) == 1 and tensors[0].is_cuda
        return self._always_later or (on_one_gpu and not any(map(is_sharded, tensors)))

    def tailored_later(
        self, positions: Mapping[str, NDArray[np.int64]]
    ) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin what `tailored` does, and return what waits for it.

        Where `reads_later` is true, beginning does not wait for the GPU. The values are those of the moment at which it
        began.
        """
        picked = self._pick(positions)
        if len({vector.device for vector in picked.values()}) > 1:
            found = {layer: vector.cpu().numpy() for layer, vector in picked.items()}
            return lambda: found
        joined = copy_later(torch.cat(list(picked.values())))
        return lambda: _cut(picked, joined())

    def loss_later(self, loss: torch.Tensor) -> Callable[[], float]:
        """Begin to read a scalar, and return what waits for it."""
        copied = copy_later(loss)
        return lambda: float(copied())

    def _pick(self, positions: Mapping[str, NDArray[np.int64]]) -> dict[str, torch.Tensor]:
        """Return copies of the values at these positions of each layer, float32 `[n]` on the layer's device."""
        parts = {layer: self._split(layer, indices) for layer, indices in positions.items()}
        read = {layer: [part.read() for part in of_layer] for layer, of_layer in parts.items()}
        sum_shards((part, v) for layer in parts for part, v in zip(parts[layer], read[layer], strict=True))
        return {layer: torch.cat(vectors) for layer, vectors in read.items()}

    def _split(self, layer: str, indices: NDArray[np.int64]) -> list[Any]:
        """Return the positions in each of the layer's tensors."""
        known, parts = self._parts.get(layer, (None, []))
        if known is indices:
            return parts
        tensors = self._tensors[layer]
        inside = split_positions(indices, [count_values(tensor) for tensor in tensors])
        parts = [locate(t, torch.from_numpy(where)) for t, where in zip(tensors, inside, strict=True) if len(where)]
        self._parts[layer] = indices, parts
        return parts


def _cut(picked: Mapping[str, torch.Tensor], joined: torch.Tensor) -> dict[str, NDArray[np.float32]]:
    """Cut the joined values of several layers, on the CPU, into those of each layer."""
    ends = np.cumsum([len(vector) for vector in picked.values()])
    return dict(zip(picked, np.split(joined.numpy(), ends[:-1]), strict=True))


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
