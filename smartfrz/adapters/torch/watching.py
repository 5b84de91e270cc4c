"""Sees whether parameters of a PyTorch model are trained, and whether what is frozen stands still."""

import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from smartfrz.adapters.torch.copying import copy_later
from smartfrz.adapters.torch.layers import Uncopied
from smartfrz.adapters.torch.sharding import is_sharded
from smartfrz.adapters.torch.updates import unwrap

_BLOCK = 256  # the number of values of each tensor that are looked at
# A plain attribute of what SmartFRZ froze: a later run can take back what an interrupted one left frozen.
_MARK = "_frozen_by_layer_freezing"  # a file of the model names nothing of smartfrz


class Samples:
    """Copies of some values of tensors, on their devices, to see later whether the tensors have moved.

    Looking waits for the device once, whatever the number of tensors.

    Args:
        spread: Take values from all over a tensor instead of a block in its middle. Some parts of a trained weight do not
            move, such as the rows of an embedding that no batch used. An optimizer that moves frozen weights moves them
            everywhere, and a block is read in less time.
    """

    def __init__(self, *, spread: bool = False):
        self._spread = spread
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._views: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def keep(self, key: str, tensors: Iterable[torch.Tensor]) -> None:
        """Copy values of these tensors."""
        views = [view for tensor in tensors for view in self._view(tensor)]
        self._kept[key] = [torch.cat(of_device) for of_device in _by_device(views)]

    def forget(self, key: str) -> None:
        """Drop the copies."""
        self._kept.pop(key, None)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def moved(self, tensors: Mapping[str, Sequence[torch.Tensor]]) -> set[str]:
        """Return the keys whose tensors have moved, to the last bit, since their values were kept."""
        now = {key: [view for tensor in each for view in self._view(tensor)] for key, each in tensors.items()}
        then, joined = self._join(now)
        if len(then) == len(joined) and all(map(_same, then, joined)):
            return set()
        return {key for key, views in now.items() if not self._is_same(key, views)}

    def moved_later(self, tensors: Mapping[str, Sequence[torch.Tensor]]) -> Callable[[], set[str]]:
        """Begin to look whether tensors have moved, and return what waits for the answer.

        Where all of them are on one GPU, beginning does not wait for it. Which of them have moved is looked up only if
        any had, by then, and without those that were forgotten since.
        """
        now = {key: [view for tensor in each for view in self._view(tensor)] for key, each in tensors.items()}
        then, joined = self._join(now)
        if not then and not joined:
            return set

        def look() -> set[str]:
            return self.moved({key: each for key, each in tensors.items() if key in self._kept})

        if len(then) != 1 or len(joined) != 1 or _differ(then[0], joined[0]):
            found = look()
            return lambda: found
        differs = copy_later(torch.ne(then[0], joined[0]).any())
        return lambda: look() if differs() else set()

    def _join(self, now: Mapping[str, list[torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the values that were kept and those of now: for each device, those of all keys in one."""
        then = _by_device([kept for key in now for kept in self._kept[key]])
        joined = _by_device([view for views in now.values() for view in views])
        return [torch.cat(of_device) for of_device in then], [torch.cat(of_device) for of_device in joined]

    def _is_same(self, key: str, views: list[torch.Tensor]) -> bool:
        now, then = [torch.cat(of_device) for of_device in _by_device(views)], self._kept[key]
        return len(now) == len(then) and all(_same(a, b) for a, b in zip(now, then, strict=True))

    def _view(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the bytes of the values to look at; nothing if there are none."""
        owner, address, known = self._views.get(id(tensor), (None, 0, None))
        if owner is tensor and known is not None and address == tensor.data_ptr():
            return [known]
        data: Any = tensor.detach()
        if is_sharded(tensor):
            data = data.to_local()
        if data.numel() == 0 or data.is_meta:
            return []
        flat, shares_memory = _flatten(data)
        if self._spread:
            flat = flat[:: max(1, len(flat) // _BLOCK)][:_BLOCK].contiguous()
            shares_memory = False
        else:
            start = max(0, (len(flat) - _BLOCK) // 2)
            flat = flat[start : start + _BLOCK]
        view = flat.view(torch.uint8)
        if shares_memory and not is_sharded(tensor):
            self._views[id(tensor)] = (tensor, data.data_ptr(), view)
        return [view]


def _flatten(data: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return the values as a vector, in any order, and whether it shares the memory."""
    if data.is_contiguous():
        return data.view(-1), True
    if data.dim() == 4 and data.is_contiguous(memory_format=torch.channels_last):
        return data.permute(0, 2, 3, 1).reshape(-1), True
    return data.reshape(-1), False


def _by_device(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return list(groups.values())


def _differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two vectors cannot be compared value by value."""
    return first.device != second.device or first.shape != second.shape


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return not _differ(first, second) and torch.equal(first, second)


class StepGuard:
    """Looks at the flags of parameters just before each optimizer step, which is when they count.

    Training loops switch whole models off and on between steps, so that at other moments the flags may say anything. A
    frozen parameter that requires a gradient again is set back, and loses its gradient: every optimizer then skips it.

    Args:
        model: The model.
        optimizers: Its optimizers.

    Attributes:
        frozen: Frozen parameters, by id, with their layers.
        flagged: Layers of which a parameter was set back since they were last frozen.
        strangers: Parameters that belong to no known layer.
        arrived: Strangers that have had a gradient at a step.
        idle: Ids of parameters that had no gradient at some step of their optimizer, such as those of an expert.
        updated: The latest step, as `num_steps` counts, at which each parameter had a gradient and a learning rate.
        rested: Ids of parameters that had a learning rate, but no gradient, at some step.
        num_steps: Steps that were seen, of all optimizers.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]):
        self.frozen: dict[int, tuple[nn.Parameter, str]] = {}
        self.flagged: set[str] = set()
        self.strangers: list[nn.Parameter] = []
        self.arrived: list[nn.Parameter] = []
        self.idle: set[int] = set()
        self.updated: dict[int, int] = {}
        self.rested: set[int] = set()
        self.num_steps = 0
        self._model = model
        self._flagged_before: set[str] = set()
        self._live: dict[int, set[int]] = {}  # by the id of the optimizer
        self._forward_hook: Any = None
        self._compiled_before = _count_compiled()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step)
            for optimizer in map(unwrap, optimizers)
            if hasattr(optimizer, "register_step_pre_hook")
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.num_steps += 1
        self.set_back()
        live = self._live[id(optimizer)] = set()
        for group in optimizer.param_groups:
            rate = group.get("lr", 1.0)
            moves = isinstance(rate, torch.Tensor) or rate != 0  # a tensor is not read: it may be on a device
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                key = id(parameter)
                live.add(key)
                if parameter.grad is None:
                    self.idle.add(key)
                    if moves:
                        self.rested.add(key)
                elif moves:
                    self.updated[key] = self.num_steps
        if self.strangers:
            self.arrived += [p for p in self.strangers if p.grad is not None]
            self.strangers = [p for p in self.strangers if p.grad is None]

    def set_back(self) -> None:
        """Set back the flags of frozen parameters."""
        for parameter, layer in self.frozen.values():
            if parameter.requires_grad and _MARK in vars(parameter):  # else a later run has taken it back
                parameter.requires_grad_(False)
                parameter.grad = None
                if layer in self._flagged_before:
                    self._watch_forward()
                self.flagged.add(layer)
        self._flagged_before |= self.flagged

    def _watch_forward(self) -> None:
        """Set flags back before forward passes, too, so that no gradients are computed in vain.

        Not in a compiled model: a hook would break its graph.
        """
        compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in self._model.modules())
        if self._forward_hook is None and not compiled and _count_compiled() == self._compiled_before:
            self._forward_hook = self._model.register_forward_pre_hook(Uncopied(self._before_forward))

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.set_back()

    def is_live(self, parameter: nn.Parameter) -> bool:
        """Return whether the parameter requires a gradient, now or at the latest step of an optimizer that holds it."""
        return parameter.requires_grad or any(id(parameter) in live for live in self._live.values())

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None


def _count_compiled() -> int:
    """Return how many functions this process has compiled so far."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(sum(dynamo.counters["frames"].values()))


def mark(parameter: nn.Parameter, frozen: bool) -> None:
    """Mark a parameter as frozen by SmartFRZ, or remove the mark."""
    if frozen:
        setattr(parameter, _MARK, True)
    else:
        vars(parameter).pop(_MARK, None)


def thaw_leftovers(model: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Train again what an interrupted run has left frozen. Otherwise the user would seem to have frozen it.

    Args:
        model: The model.
        is_ours: Whether a function that hangs at a module is one of the functions with which SmartFRZ freezes.
    """
    left = [parameter for parameter in model.parameters() if vars(parameter).pop(_MARK, False)]
    if not left:
        return
    for parameter in left:
        parameter.requires_grad_(True)
    for module in model.modules():
        if is_ours(vars(module).get("train")):
            del vars(module)["train"]
            module.train(model.training)
        for key in [key for key, hook in module._forward_hooks.items() if is_ours(hook)]:
            del module._forward_hooks[key]


def owned_by(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    """Return the ids of the parameters that the optimizers hold."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def sample_of_foreign(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Samples | None:
    """Return samples of a model none of whose parameters the optimizers hold; None for every other model."""
    parameters = [p for p in model.parameters() if not is_lazy(p) and not p.is_meta]
    if not parameters or owned_by(optimizers) & {id(p) for p in parameters}:
        return None
    samples = Samples(spread=True)
    samples.keep("", parameters)
    return samples


def find_optimizers(parameters: Iterable[nn.Parameter]) -> list[str]:
    """Return the class names of all optimizers in this process that hold one of these parameters."""
    ids = {id(parameter) for parameter in parameters}
    every = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer)]
    return sorted({type(optimizer).__name__ for optimizer in every if owned_by([optimizer]) & ids})
