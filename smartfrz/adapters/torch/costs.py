"""Measure what a training step costs: seconds of each layer, FLOPs and activations of the whole step."""

import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from smartfrz.adapters.torch.layers import RECURRENT_COUNTS, Layer, Uncopied, strip_parametrizations
from smartfrz.adapters.torch.sandbox import run_without_hooks, sandbox, synchronize, unchanged
from smartfrz.control.ordering import LayerCost
from smartfrz.errors import UsageError

_log = logging.getLogger("smartfrz")
SHORT = 0.003  # seconds
_PLAIN = (torch.Tensor, nn.Parameter)
_Seconds = tuple[float, float, float]  # forward, input gradient, weight gradient


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
        repeats: Number of runs of each module, of which the fastest counts; up to five times as many
            where they are short.
        passes: Number of forward passes, of which the fastest counts.

    Attributes:
        done: Whether all passes have been measured.
        estimated: Layers whose costs are estimated, and why.
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
        self._model_is_called = self._succeeded = False
        self._running: list[_Call] = []
        self._seconds: dict[str, _Seconds] = {}  # of the current pass
        self._best: dict[str, _Seconds] = {}
        self._known: dict[Any, _Seconds] = {}
        # The model's own pre-hook comes first, and starts a pass before any layer does.
        self._handles: list[Any] = [model.register_forward_pre_hook(Uncopied(self._start), prepend=True)]
        for module, layer in _modules(model, layers):
            self._handles.append(module.register_forward_pre_hook(Uncopied(self._enter)))
            self._handles.append(module.register_forward_hook(Uncopied(self._leave(layer)), with_kwargs=True))
        self._handles.append(model.register_forward_hook(Uncopied(self._succeed)))
        self._handles.append(model.register_forward_hook(Uncopied(self._stop), always_call=True))

    def _start(self, module: nn.Module, args: Any) -> None:
        self._model_is_called = True
        self._begin(module)

    def _begin(self, module: nn.Module) -> None:
        """Begin a pass, if this call is a part of training."""
        self._succeeded = False
        if self.done or torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        self._measuring, self._running, self._seconds, self._known, self.estimated = True, [], {}, {}, {}

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._measuring:
            return
        self._measuring = False
        if self._succeeded:  # None as output does not tell: the model may return it
            self._end_pass()

    def end_step(self) -> None:
        """End the pass, where the training step never calls the model itself, but its parts."""
        if self._measuring and not self._model_is_called:
            self._measuring = False
            self._end_pass()

    def _succeed(self, module: nn.Module, args: Any, output: Any) -> None:
        self._succeeded = True

    def _end_pass(self) -> None:
        for layer, seconds in self._seconds.items():
            self._best[layer] = _each(min, seconds, self._best.get(layer, seconds))
        self._passes -= 1
        if not self._passes:
            self.done = True
            self.close()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not (self._measuring or self._model_is_called) and torch._C._current_graph_task_id() == -1:
            self._begin(module)
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
            # A module that is called many times with inputs of one shape is measured once.
            key = id(module), *(_signature(value) for value in tree_leaves((args, kwargs)))
            if key not in self._known:
                self._known[key] = _time_module(module, args, kwargs, self._repeats)
            self._seconds[layer] = _each(operator.add, self._known[key], self._seconds.get(layer, (0.0, 0.0, 0.0)))
        # The training goes on, whatever the module raises when it runs once more.
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
        """Return the seconds of each layer in one step, in execution order.

        A layer that could not be measured (it raised when it was run once more, its parameters
        are not plain tensors, or it did not run) gets its FLOPs times the seconds per FLOP of
        the measured layers, each of the three parts at its own rate. `estimated` names these
        layers and says why. If no layer could be measured, the costs are FLOPs, which serve as well
        for comparing layers.

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
        rates = self._seconds_per_flop()
        return {layer.name: LayerCost(*self._cost(layer, rates)) for layer in self._layers}

    def _seconds_per_flop(self) -> _Seconds:
        measured = [layer for layer in self._layers if layer.name not in self.estimated]
        known = [(self._best[layer.name], layer.forward_flops) for layer in measured if layer.forward_flops]
        flops = sum(count for _, count in known)
        if not flops:
            rate = float(not measured)
            return rate, rate, rate
        forward, inputs, weights = (sum(seconds[i] for seconds, _ in known) / flops for i in range(3))
        return forward, inputs, weights

    def _cost(self, layer: Layer, rates: _Seconds) -> _Seconds:
        if layer.name not in self.estimated:
            return self._best[layer.name]
        forward, inputs, weights = (rate * layer.forward_flops for rate in rates)
        return forward, inputs, weights


def _each(combine: Callable[[float, float], float], one: _Seconds, other: _Seconds) -> _Seconds:
    return combine(one[0], other[0]), combine(one[1], other[1]), combine(one[2], other[2])


@dataclass
class _Call:
    """A call of a module that has not returned yet; a container if a module of a layer ran inside it."""

    module: nn.Module
    is_container: bool = False


def _modules(model: nn.Module, layers: list[Layer]) -> Iterator[tuple[nn.Module, str]]:
    """Yield every module that is part of a layer, with the layer's name."""
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
    """Time a module's forward pass, the gradient of its inputs, and the gradient of its parameters."""
    weights, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    cuda = _cuda_devices(_tensors_in((args, kwargs, weights, buffers)))
    with sandbox(module, cuda):
        # Aliases take the place of the weights, which get no gradient then, and whose hooks do not fire.
        trained = {n: p.detach().requires_grad_(_is_differentiable(p)) for n, p in weights.items()}
        replaced = trained | {n: b.clone() for n, b in buffers.items()}
        inputs = _copies((args, kwargs))

        def measure(forward: Callable[..., Any]) -> _Seconds:
            return _time_passes(forward, inputs, list(trained.values()), lambda run: time_fastest(run, repeats, cuda))

        seconds: _Seconds = run_without_hooks(module, replaced, measure)
        return seconds


def _cuda_devices(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """Return the CUDA devices of these tensors; refuse any but plain tensors on CPU or CUDA."""
    foreign = {type(t).__name__ for t in tensors if type(t) not in _PLAIN}
    devices = {t.device for t in tensors}
    if foreign or not {d.type for d in devices} <= {"cpu", "cuda"}:
        raise TypeError(f"tensors of type {sorted(foreign)} on {devices}; expected plain tensors on CPU or CUDA")
    return [d for d in devices if d.type == "cuda"]


def _time_passes(
    forward: Callable[..., Any],
    inputs: tuple[Any, Any],
    weights: list[torch.Tensor],
    timed: Callable[[Callable[[], Any]], tuple[float, Any]],
) -> _Seconds:
    args, kwargs = inputs
    forward_seconds, output = timed(lambda: forward(*args, **kwargs))
    outputs = [t for t in _tensors_in(output) if t.requires_grad]
    wanted = list({id(t): t for t in _tensors_in(inputs) if t.requires_grad}.values())
    input_seconds, _ = _time_gradients(outputs, wanted, timed)
    learned = [t for t in weights if t.requires_grad]
    weight_seconds, reached = _time_gradients(outputs, learned, timed)
    matrices = [got for got, t in zip(reached, learned, strict=True) if t.dim() >= 2] or reached
    if matrices and not any(matrices):
        # computed outside of forward, as by the old torch.nn.utils.weight_norm
        raise ValueError("no gradient reaches the module's weights")
    return forward_seconds, input_seconds, weight_seconds


def _time_gradients(
    outputs: list[torch.Tensor],
    tensors: list[torch.Tensor],
    timed: Callable[[Callable[[], Any]], tuple[float, Any]],
) -> tuple[float, list[bool]]:
    """Return the seconds that the gradients of these tensors take, and which tensors got one."""
    if not tensors or not outputs:
        return 0.0, [False for _ in tensors]
    ones = [torch.ones_like(t) for t in outputs]

    def run() -> Any:
        return torch.autograd.grad(outputs, tensors, ones, retain_graph=True, allow_unused=True)

    seconds, found = timed(run)
    return seconds, [gradient is not None for gradient in found]


def _tensors_in(tree: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, torch.Tensor)]


def _is_differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _copies(tree: Any) -> Any:
    """Return the tree with detached copies of its tensors; a tensor that occurs twice is copied once."""
    made: dict[int, torch.Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = value.detach().clone().requires_grad_(_is_differentiable(value))
        return made[id(value)]

    return tree_map(copied, tree)


def time_fastest(run: Callable[[], Any], repeats: int, cuda: list[torch.device]) -> tuple[float, Any]:
    """Return the seconds of the fastest of several runs, and what the last one returned.

    Args:
        run: What to time.
        repeats: Number of runs; up to five times as many where a run takes less than `SHORT`, since
            what disturbs such a run takes longer than the run itself.
        cuda: CUDA devices to wait for.
    """
    best, count, result = float("inf"), 0, None
    while count < repeats or (count * best < SHORT and count < 5 * repeats):
        result = None  # free its memory first
        synchronize(cuda)
        start = time.perf_counter()
        result = run()
        synchronize(cuda)
        best, count = min(best, time.perf_counter() - start), count + 1
    return best, result


@dataclass(frozen=True)
class StepWork:
    """What one training step computes and keeps.

    Attributes:
        forward_flops: Floating point operations of the forward pass.
        backward_flops: Floating point operations of the backward pass.
        activation_bytes: Bytes kept from the forward pass for the backward pass; weights do not count.
    """

    forward_flops: int
    backward_flops: int
    activation_bytes: int


def measure_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> StepWork:
    """Count one step's FLOPs, with PyTorch's own counter, and the bytes of activations that it keeps.

    Args:
        model: The model. The step adds to its gradients, and updates its batch norms.
        loss: Runs the model's forward pass and returns the loss.
    """
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    with FlopCounterMode(display=False, custom_mapping=RECURRENT_COUNTS) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, unchanged):
            value = loss()
        forward = counter.get_total_flops()
        value.backward()
        total = counter.get_total_flops()
    return StepWork(forward, total - forward, sum(n for p, n in kept.items() if p not in weights))
