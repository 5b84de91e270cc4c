"""Run parts of a model a second time without a trace in the training that is going on."""

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def sandbox(module: nn.Module, cuda: Iterable[torch.device] = ()) -> Iterator[None]:
    """Enable gradients, and undo at the end of the block what it changed.

    Restores attributes of modules, the content of lists, dicts and sets among them, and the states
    of random number generators. Parameters and buffers are the caller's business: see
    `run_without_hooks`. Warnings are not shown.

    Args:
        module: The module that runs inside the block.
        cuda: CUDA devices whose random numbers are restored, too.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(cuda),
            torch.inference_mode(False),
            torch.enable_grad(),
            # Activation checkpointing counts what is saved, FLOP counters what is computed.
            torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged),
            _disable_current_modes(),
            _without_autocast_cache(),
            _attributes_restored(module),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Have autocast cast each weight again: a step casts each once, and the cache would keep our copies."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def _attributes_restored(module: nn.Module) -> Iterator[None]:
    attributes = [(vars(m), dict(vars(m))) for m in module.modules()]
    # An auxiliary loss that a module appends to a list, say
    contents = [(v, copy.copy(v)) for _, held in attributes for v in held.values() if type(v) in (list, dict, set)]
    try:
        yield
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)
        for value, content in contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


def run_without_hooks(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], run: Callable[[Callable[..., Any]], Any]
) -> Any:
    """Return `run(forward)`, where `forward` is the module's own forward pass, without its hooks.

    Args:
        module: The module.
        tensors: By name, what takes the place of parameters and buffers meanwhile.
        run: What to do with the forward pass.
    """
    named = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_Bare(module), named, (run,))


class _Bare(nn.Module):
    """A wrapper that hands out a module's forward pass."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, run: Callable[[Callable[..., Any]], Any]) -> Any:
        return run(self.module.forward)


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor: a hook for saved tensors that does nothing."""
    return tensor


def synchronize(cuda: Iterable[torch.device]) -> None:
    """Wait for everything that runs on these devices."""
    for device in cuda:
        torch.cuda.synchronize(device)
