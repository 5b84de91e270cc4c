"""Sets the learning rates of single layers, and reads gradients, inside of an optimizer's step."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from smartfrz.adapters.torch.gradient_changes import GradientChanges
from smartfrz.adapters.torch.sharding import is_sharded
from smartfrz.adapters.torch.updates import unwrap
from smartfrz.errors import UnsupportedModelError, UsageError

_REMEDY = "Or pass a policy that leaves learning rates alone, such as LinearFreezing(anneal=False)."


class OptimizerSteps:
    """Hooks around the steps of optimizers.

    PyTorch has one learning rate for each parameter group. Splitting the user's groups for good would break checkpoints
    and schedulers, which count the groups. So during a step they are replaced by groups of one learning rate each: the
    rate that the user's scheduler has set, times the layer's factor. After the step the user's own groups are back. The
    state of an optimizer belongs to parameters, not to groups. So nothing is copied, and the result is bit-identical to
    that of an optimizer with one group for each layer, whatever its rule.

    Args:
        optimizers: The optimizers of the model's parameters.
        before_step: Called before each step.
        accumulate: Whether to add up gradients from the first step on. This takes memory for a copy of the gradients, in
            float32 at least.
        compare: Whether to measure, from the first step on, how much gradients change from step to step. This takes
            memory for a copy of the gradients.

    Attributes:
        changes: What was measured of the changes of gradients.
    """

    def __init__(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        *,
        before_step: Callable[[], None] | None = None,
        accumulate: bool = False,
        compare: bool = False,
    ):
        self._before_step = before_step
        self._accumulates = accumulate
        self._compares = compare
        self.changes = GradientChanges()
        self._scales: dict[nn.Parameter, float] = {}
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._whole: dict[torch.optim.Optimizer, list[dict[str, Any]]] = {}
        self._seconds = 0.0
        self._handles: list[Any] = []
        for optimizer in map(unwrap, optimizers):
            self._handles += [
                optimizer.register_step_pre_hook(self._enter),
                optimizer.register_step_post_hook(self._leave),
                # No post hook runs after a step that raised or was interrupted, but a checkpoint may be written.
                optimizer.register_state_dict_pre_hook(self._restore),
            ]

    def take_seconds(self) -> float:
        """Return the seconds that reading gradients and splitting groups took since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Remove the hooks. From now on every layer has the learning rate of its group."""
        for optimizer in list(self._whole):
            self._restore(optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        """Forget all factors and gradients."""
        self._scales = {}
        self._sums = {}
        self.changes.clear()

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget the factors and gradients of these parameters."""
        parameters = list(parameters)
        self.changes.forget(parameters)
        for parameter in parameters:
            self._scales.pop(parameter, None)
            self._sums.pop(parameter, None)

    def scale(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply the learning rate of these parameters by a factor, from the next step on."""
        self._scales.update(dict.fromkeys(parameters, factor))

    def take_norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """Return the L1 norm of the gradients that were added up since the last call; 0 without gradients."""
        self._accumulates = True
        sums = [self._sums.pop(parameter) for parameter in parameters if parameter in self._sums]
        norms = [torch.linalg.vector_norm(gradient, 1, dtype=torch.float64) for gradient in sums]
        return float(sum(norm.item() for norm in norms))

    def take_changes(self, layers: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, float]:
        """Return the smallest change of each layer's gradients since the last call; see `GradientChanges`."""
        self._compares = True
        return self.changes.take(layers)

    def sums(self) -> dict[nn.Parameter, torch.Tensor]:
        """Return a copy of the gradients that were added up so far."""
        return {parameter: gradient.clone() for parameter, gradient in self._sums.items()}

    def load_sums(self, sums: dict[nn.Parameter, torch.Tensor]) -> None:
        """Replace the gradients that were added up so far."""
        self._sums = {p: gradient.to(p.device, copy=True) for p, gradient in sums.items()}

    def _enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._before_step is not None:
            self._before_step()
        start = time.perf_counter()
        self._restore(optimizer)  # after an interrupted step, or in a step of a subclass inside of another step
        if self._accumulates or self._compares:
            # Before the step: users may clear gradients afterwards.
            for parameter, gradient, overflowed in self._gradients(optimizer):
                if self._accumulates:
                    self._accumulate(parameter, gradient, overflowed)
                if self._compares:
                    self.changes.note(parameter, gradient, overflowed)
        if self._scales:
            self._split(optimizer)
        self._seconds += time.perf_counter() - start

    def _gradients(
        self, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[nn.Parameter, torch.Tensor, torch.Tensor | None]]:
        """Yield each parameter that is trained, its gradient, and whether that overflowed, if an optimizer looks itself."""
        # A GradScaler leaves unscaling, and skipping a step whose gradients overflowed, to a fused optimizer.
        scale, overflowed = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.requires_grad:
                    continue
                if is_sharded(parameter):
                    # One process saves the whole state, and does not hold the gradients of the others.
                    what = "AutoFreeze adds up gradients" if self._accumulates else "GradES compares gradients"
                    raise UnsupportedModelError(
                        f"{what}, and this model is in fully_shard; expected whole parameters. Use "
                        "DistributedDataParallel, or another policy."
                    )
                gradient = parameter.grad.detach()
                yield parameter, gradient if scale is None else gradient / scale, overflowed

    def _accumulate(self, parameter: nn.Parameter, gradient: torch.Tensor, overflowed: torch.Tensor | None) -> None:
        if overflowed is not None:
            gradient = torch.where(overflowed > 0, 0.0, gradient)
        if parameter not in self._sums:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            self._sums[parameter] = torch.zeros_like(parameter.detach(), dtype=dtype)
        self._sums[parameter] += gradient

    def _split(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError(
                f"LBFGS takes one step for all parameters together, so layers cannot have learning rates of their own; "
                f"expected an optimizer such as SGD or AdamW. {_REMEDY}"
            )
        parts: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            alike: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                alike.setdefault(self._scales.get(parameter, 1.0), []).append(parameter)
            for factor, parameters in alike.items():
                rate = group["lr"] if factor == 1.0 else group["lr"] * factor
                parts.append(_Part(group | {"params": parameters, "lr": rate}))
        self._whole[optimizer] = optimizer.param_groups
        optimizer.param_groups = parts

    def _leave(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parts = optimizer.param_groups
        self._restore(optimizer)
        used = [part for part in parts if isinstance(part, _Part) and any(p.grad is not None for p in part["params"])]
        if not all(part.rate_was_read for part in used) or any(part.was_written for part in used):
            raise UsageError(
                f"{type(optimizer).__name__} took a step without reading the learning rate of each of its parameter "
                "groups, or wrote to them; expected it to read them only, as the optimizers of torch.optim do, since "
                f"layers have learning rates of their own. Pass the optimizer inside of it. {_REMEDY}"
            )

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer in self._whole:
            optimizer.param_groups = self._whole.pop(optimizer)


class _Part(dict[str, Any]):
    """A part of a parameter group that notices what a step does with it."""

    rate_was_read = False
    was_written = False  # anything written would be lost

    def __getitem__(self, key: str) -> Any:
        self.rate_was_read = self.rate_was_read or key == "lr"
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self.was_written = True
        super().__setitem__(key, value)
