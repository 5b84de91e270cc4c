"""Measures how much gradients change from one optimizer step to the next."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


class GradientChanges:
    """Compares the gradient of each parameter with its gradient at the step before.

    It keeps a copy of every gradient, in the gradient's own dtype, and one number for each parameter. Nothing is
    transferred from a GPU before `take`.
    """

    def __init__(self) -> None:
        self._latest: dict[nn.Parameter, torch.Tensor] = {}
        self._smallest: dict[nn.Parameter, torch.Tensor] = {}

    def note(self, parameter: nn.Parameter, gradient: torch.Tensor, overflowed: torch.Tensor | None = None) -> None:
        """Measure the change since the gradient of this parameter that came before, and keep this one.

        Args:
            parameter: The parameter.
            gradient: Its gradient, unscaled.
            overflowed: Greater than 0 if the optimizer skips this step; the gradient then does not count.
        """
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        counted = gradient if overflowed is None else torch.where(overflowed > 0, torch.nan, gradient)
        latest = self._latest.get(parameter)
        if latest is None:
            self._latest[parameter] = counted.clone()
            return
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        if overflowed is None and gradient.dtype == latest.dtype == dtype:
            difference = latest.sub_(gradient)  # without memory for another copy
        else:
            difference = counted.to(dtype) - latest.to(dtype)
        change = torch.linalg.vector_norm(difference, 1).float()
        smallest = self._smallest.get(parameter)
        # Of a number and NaN, fmin returns the number.
        self._smallest[parameter] = change if smallest is None else torch.fmin(smallest, change)
        latest.copy_(gradient if overflowed is None else torch.where(overflowed > 0, latest, gradient))

    def take(self, layers: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, float]:
        """Return the smallest change of each layer since the last call, as `TorchAdapter.gradient_changes` does."""
        taken = {name: [self._smallest.pop(p, None) for p in parameters] for name, parameters in layers.items()}
        measured = [change for changes in taken.values() for change in changes if change is not None]
        values = iter(torch.stack([change.to(measured[0].device) for change in measured]).tolist() if measured else [])
        read = {name: [None if c is None else next(values) for c in changes] for name, changes in taken.items()}
        return {name: _largest(changes) for name, changes in read.items()}

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget the gradients of these parameters."""
        for parameter in parameters:
            self._latest.pop(parameter, None)
            self._smallest.pop(parameter, None)

    def clear(self) -> None:
        """Forget all gradients."""
        self._latest, self._smallest = {}, {}

    def state(self, names: Mapping[str, nn.Parameter]) -> dict[str, dict[str, torch.Tensor]]:
        """Return copies of what was kept, by the names of the parameters; nothing if that is nothing."""
        parts = {"latest": self._latest, "smallest": self._smallest}
        if not self._latest:
            return {}
        return {part: {name: kept[p].clone() for name, p in names.items() if p in kept} for part, kept in parts.items()}

    def load(self, state: Mapping[str, Mapping[str, Any]], names: Mapping[str, nn.Parameter]) -> None:
        """Replace what was kept by what `state` returned."""
        self._latest, self._smallest = (
            {names[name]: value.to(names[name].device, copy=True) for name, value in state.get(part, {}).items()}
            for part in ("latest", "smallest")
        )


def _largest(changes: list[float | None]) -> float:
    """Return the largest of a layer's changes: infinity if one is missing, or is not a number."""
    numbers = [float("inf") if change is None or change != change else change for change in changes]
    return max(numbers, default=float("inf"))
