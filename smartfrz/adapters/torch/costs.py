"""What a training step costs: seconds of each layer, and what a whole step computes and keeps."""

import copy
import logging
import operator
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from smartfrz.adapters.torch.layers import Layer, Uncopied, strip_parametrizations
from smartfrz.control.ordering import LayerCost
from smartfrz.errors import UsageError

_log = logging.getLogger("smartfrz")
SHORT = 0.003  # seconds
_PLAIN = (torch.Tensor, nn.Parameter)


class CostProfiler:
    """Measures each layer in one forward pass of the training that is going on, without touching it.

    When a module of a layer has run, it is run again, alone, on copies of its inputs: its forward
    pass, the gradient with respect to its inputs only, and the gradient with respect to its
    parameters only are timed. A frozen module is timed as if it were trained. Weights, gradients,
    buffers, attributes, random numbers and the modes that are on stay as they were, bit for bit.

    That one forward pass takes about as long as `repeats + 1` training steps and needs memory for
    the graph of one more module. It is the first that runs in training mode with gradients enabled.

    On a busy machine all repeats of a short module may be disturbed, and the module appear a hundred
    times slower than it is. Several passes with few repeats cost as much and are safer.

    What runs between the modules of layers (activations, attention as a function, pooling) is part
    of no layer's cost.

    Args:
        model: The model. Its modules have hooks until that pass has ended.
        layers: The model's layers, in execution order.
        repeats: The fastest of so many runs counts; of up to five times as many where they are short.
        passes: The fastest of so many forward passes counts.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], repeats: int = 3, passes: int = 1):
        if min(repeats, passes) < 1:
            raise ValueError(f"repeats is {repeats} and passes is {passes}; expected 1 or more.")
        self.done = False
        self.estimated: dict[str, str] = {}
        self._layers = layers
        self._repeats = repeats
        self._passes = passes
        self._measuring = False
        self._running: list[_Call] = []
        self._seconds: dict[str, _Seconds] = {}  # of the pass that is under way
        self._best: dict[str, _Seconds] = {}
        self._known: dict[Any, _Seconds] = {}
        # prepend: the root starts and stops around everything else
        self._handles: list[Any] = [model.register_forward_pre_hook(Uncopied(self._start), prepend=True)]
        for module, layer in _modules(model, layers):
            self._handles.append(module.register_forward_pre_hook(Uncopied(self._enter)))
            self._handles.append(module.register_forward_hook(Uncopied(self._leave(layer)), with_kwargs=True))
        self._handles.append(model.register_forward_hook(Uncopied(self._stop), always_call=True))

    def _start(self, module: nn.Module, args: Any) -> None:
        if self.done or torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        self._measuring, self._running, self._seconds, self._known, self.estimated = True, [], {}, {}, {}

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._measuring:
            return
        self._measuring = False
        if output is None:  # the forward pass raised
            return
        for layer, seconds in self._seconds.items():
            self._best[layer] = _each(min, seconds, self._best.get(layer, seconds))
        self._passes -= 1
        if not self._passes:
            self.done = True
            self.close()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._measuring:
            self._running.append(_Call(module))

    def _leave(self, layer: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self._measuring:
                return
            # more than one is left if a module raised and the one around it went on
            while self._running and (call := self._running.pop()).module is not module:
                pass
            if self._running:
                self._running[-1].is_container = True
            if not call.is_container:
                self._measure(layer, module, args, kwargs)

        return hook

    def _measure(self, layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        try:
            # A module that is called many times with alike inputs is measured once.
            key = id(module), *(_signature(value) for value in tree_leaves((args, kwargs)))
            if key not in self._known:
                self._known[key] = _time_module(module, args, kwargs, self._repeats)
            self._seconds[layer] = _each(operator.add, self._known[key], self._seconds.get(layer, (0.0, 0.0, 0.0)))
        # Whatever the module raises when it runs once more: the training goes on.
        except Exception as error:
            self.estimated[layer] = f"{type(error).__name__}: {error}"
            _log.debug("The cost of layer %r is estimated, not measured: %s", layer, self.estimated[layer])

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._running, self._known = [], {}

    def costs(self) -> dict[str, LayerCost]:
        """Seconds in one step, by layer, in execution order.

        A layer that could not be measured (it raised when it was run once more, its parameters
        are not plain tensors, or it did not run) gets its FLOPs times the seconds per FLOP of
        the measured layers, each of the three parts at its own rate. `estimated` names these
        layers and says why. Had no layer been measured, the costs would be FLOPs: as good for
        comparing layers.

        Raises:
            UsageError: If no forward pass has been measured yet.
        """
        if not self.done:
            raise UsageError(
                "No forward pass has been measured yet. Run the model once in training mode, with gradients enabled."
            )
        for layer in self._layers:
            if layer.name not in self._best:
                self.estimated.setdefault(layer.name, "it did not run")
        measured = [layer for layer in self._layers if layer.name not in self.estimated]
        known = [(self._best[layer.name], layer.forward_flops) for layer in measured if layer.forward_flops]
        flops = sum(count for _, count in known)
        rates = [sum(seconds[i] for seconds, _ in known) / flops if flops else float(not measured) for i in range(3)]
        return {
            layer.name: LayerCost(
                *(
                    [rate * layer.forward_flops for rate in rates]
                    if layer.name in self.estimated
                    else self._best[layer.name]
                )
            )
            for layer in self._layers
        }


_Seconds = tuple[float, float, float]  # forward, input gradient, weight gradient


def _each(combine: Callable[[float, float], float], one: _Seconds, other: _Seconds) -> _Seconds:
    return combine(one[0], other[0]), combine(one[1], other[1]), combine(one[2], other[2])


@dataclass
class _Call:
    """One call of a module that is under way; a container if a module of a layer ran inside of it."""

    module: nn.Module
    is_container: bool = False


def profile_layers(model: nn.Module, layers: list[Layer], *example: Any, **keywords: Any) -> dict[str, LayerCost]:
    """Run the model once, in training mode, and return what each layer costs in a step.

    The model is left as it was, but for what a forward pass in training mode changes (the running
    statistics of batch norms, and random numbers drawn).

    Args:
        model: The model.
        layers: Its layers, in execution order.
        *example: Positional arguments of its forward pass, of the batch size that will be trained.
        **keywords: Keyword arguments of its forward pass.

    Returns:
        Seconds by layer.
    """
    modes = [(module, module.training) for module in model.modules()]
    profiler = CostProfiler(model, layers)
    try:
        model.train()
        with torch.enable_grad():
            model(*example, **keywords)
        return profiler.costs()
    finally:
        profiler.close()
        for module, mode in modes:
            module.training = mode


def _modules(model: nn.Module, layers: list[Layer]) -> Iterator[tuple[nn.Module, str]]:
    """Every module that is part of a layer, with the layer's name."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    # By identity, not by name: a tied parameter has one name in its layer, and several modules.
    holder = {id(parameters[n]): layer.name for layer in layers for n in layer.parameters if n in parameters}
    found = {strip_parametrizations(n): layer.name for layer in layers for n in (*layer.norms, layer.name)}
    for name, module in modules.items():
        layer_name = next((holder[id(p)] for p in module.parameters(recurse=False) if id(p) in holder), None)
        if layer_name is not None:
            found.setdefault(strip_parametrizations(name), layer_name)
    return ((modules[name], layer_name) for name, layer_name in found.items() if name in modules)


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device, value.stride()
    return type(value)


def _time_module(module: nn.Module, args: Any, kwargs: Any, repeats: int) -> _Seconds:
    """Seconds of a module's forward pass, the gradient of its inputs, and that of its parameters."""
    weights = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    tensors = [t for t in tree_leaves((args, kwargs, weights, buffers)) if isinstance(t, torch.Tensor)]
    foreign = {type(t).__name__ for t in tensors if type(t) not in _PLAIN}
    devices = {t.device for t in tensors}
    if foreign or not {d.type for d in devices} <= {"cpu", "cuda"}:
        raise TypeError(f"tensors of type {sorted(foreign)} on {devices}; expected plain tensors on CPU or CUDA")
    cuda = [d for d in devices if d.type == "cuda"]

    with _aside(module, cuda):
        # Aliases take the place of the weights, so that no gradient and no hook is theirs.
        trained = {n: p.detach().requires_grad_(_is_differentiable(p)) for n, p in weights.items()}
        replaced = trained | {n: b.clone() for n, b in buffers.items()}
        positional, keyword = _copies((args, kwargs))

        def measure(forward: Callable[..., Any]) -> _Seconds:
            seconds, output = _fastest(lambda: forward(*positional, **keyword), repeats, cuda)
            outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
            gradients = [torch.ones_like(t) for t in outputs]

            def backward(tensors: list[torch.Tensor]) -> tuple[float, list[bool]]:
                if not tensors or not outputs:
                    return 0.0, [False for _ in tensors]

                def run() -> Any:
                    return torch.autograd.grad(outputs, tensors, gradients, retain_graph=True, allow_unused=True)

                took, found = _fastest(run, repeats, cuda)
                return took, [gradient is not None for gradient in found]

            leaves = tree_leaves((positional, keyword))
            inputs = list({id(t): t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad}.values())
            learned = [t for t in trained.values() if t.requires_grad]
            input_seconds, _ = backward(inputs)
            weight_seconds, reached = backward(learned)
            judged = [got for got, t in zip(reached, learned, strict=True) if t.dim() >= 2] or reached
            if judged and not any(judged):
                # computed outside of forward, as by the old torch.nn.utils.weight_norm
                raise ValueError("no gradient reaches the module's weights")
            return seconds, input_seconds, weight_seconds

        named = {f"module.{name}": tensor for name, tensor in replaced.items()}
        return functional_call(_Bare(module), named, (measure,))


class _Bare(nn.Module):
    """Hands on a module's forward pass without its hooks, which are the user's."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, measure: Callable[[Callable[..., Any]], _Seconds]) -> _Seconds:
        return measure(self.module.forward)


@contextmanager
def _aside(module: nn.Module, cuda: list[torch.device]) -> Iterator[None]:
    """Gradients on, and nothing that happens inside the block is seen outside of it."""
    attributes = [(vars(m), dict(vars(m))) for m in module.modules()]
    # An auxiliary loss that a module appends to a list, say
    contents = [(v, copy.copy(v)) for _, held in attributes for v in held.values() if type(v) in (list, dict, set)]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    cached = torch.is_autocast_cache_enabled()
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(cuda),
            torch.inference_mode(False),
            torch.enable_grad(),
            # Activation checkpointing counts what is saved, FLOP counters what is computed.
            torch.autograd.graph.saved_tensors_hooks(_same, _same),
            _disable_current_modes(),
        ):
            warnings.simplefilter("ignore")
            # A step casts each weight once; and the cache would keep the aliases.
            torch.set_autocast_cache_enabled(False)
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for now, before in attributes:
            now.clear()
            now.update(before)
        for value, content in contents:
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _is_differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _copies(tree: Any) -> Any:
    """Detached copies of all tensors; what was one tensor twice is one copy twice (self-attention)."""
    made: dict[int, torch.Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = value.detach().clone().requires_grad_(_is_differentiable(value))
        return made[id(value)]

    return tree_map(copied, tree)


def _fastest(run: Callable[[], Any], repeats: int, cuda: list[torch.device]) -> tuple[float, Any]:
    """Seconds of the fastest of several runs, and what the last one returned."""
    best, count, result = float("inf"), 0, None
    # Short runs are repeated more often: what disturbs them costs more than they do.
    while count < repeats or (count * best < SHORT and count < 5 * repeats):
        result = None  # its memory first
        _synchronize(cuda)
        start = time.perf_counter()
        result = run()
        _synchronize(cuda)
        best, count = min(best, time.perf_counter() - start), count + 1
    return best, result


def _synchronize(cuda: list[torch.device]) -> None:
    for device in cuda:
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class StepWork:
    """What one training step computes and keeps.

    Attributes:
        forward_flops: Floating point operations of the forward pass.
        backward_flops: Those of the backward pass.
        activation_bytes: Kept from the forward pass for the backward pass; weights do not count.
    """

    forward_flops: int
    backward_flops: int
    activation_bytes: int


def measure_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> StepWork:
    """Count one step's FLOPs, with PyTorch's own counter, and the activations that it keeps.

    Args:
        model: The model; its gradients are added to, its batch norms and random numbers advance.
        loss: Runs the model's forward pass and returns the loss.
    """
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, _same):
            value = loss()
        forward = counter.get_total_flops()
        value.backward()
        total = counter.get_total_flops()
    return StepWork(forward, total - forward, sum(n for p, n in kept.items() if p not in weights))
