"""What happens inside of an optimizer's step: learning rates of single layers, and gradients added up."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from smartfrz.adapters.torch.sharding import is_sharded
from smartfrz.errors import UnsupportedModelError, UsageError

_REMEDY = "Or pass a policy that leaves learning rates alone, such as LinearFreezing(anneal=False)."


class OptimizerSteps:
    """Hooks around the steps of some optimizers.

    PyTorch has one learning rate for each parameter group. Splitting the user's groups for good would break
    schedulers, which count them, and checkpoints. So groups of one learning rate each take their place for the
    duration of a step, with the rate that the user's scheduler has set times the layer's factor; after it the
    user's own groups are back. An optimizer's state belongs to parameters, not to groups: nothing is copied,
    and the result is bit for bit that of an optimizer with one group a layer, whatever its rule.

    Args:
        optimizers: Those of the model's parameters.
        before_step: Called before each step.
        accumulate: Whether to add up gradients from the first step on: a copy of the gradients, in float32 at least.
    """

    def __init__(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        *,
        before_step: Callable[[], None] | None = None,
        accumulate: bool = False,
    ):
        self._before_step = before_step
        self._accumulates = accumulate
        self._scales: dict[nn.Parameter, float] = {}
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._whole: dict[torch.optim.Optimizer, list[dict[str, Any]]] = {}
        self._seconds = 0.0
        self._handles: list[Any] = []
        for optimizer in map(_inside, optimizers):
            self._handles += [
                optimizer.register_step_pre_hook(self._enter),
                optimizer.register_step_post_hook(self._leave),
                # No post hook runs after a step that raised, or was interrupted; a checkpoint may be written then.
                optimizer.register_state_dict_pre_hook(self._restore),
            ]

    def take_seconds(self) -> float:
        """Return the seconds that accumulating gradients and splitting groups took since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Remove the hooks: from now on every layer has its group's learning rate."""
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

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget factors and gradients of these parameters."""
        for parameter in parameters:
            self._scales.pop(parameter, None)
            self._sums.pop(parameter, None)

    def scale(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply the learning rate of these parameters by the factor, from the next step on."""
        self._scales.update(dict.fromkeys(parameters, factor))

    def take_norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """L1 norm of the gradients added up since this was last asked; 0 without gradients."""
        self._accumulates = True
        sums = [self._sums.pop(parameter) for parameter in parameters if parameter in self._sums]
        norms = [torch.linalg.vector_norm(gradient, 1, dtype=torch.float64) for gradient in sums]
        return float(sum(norm.item() for norm in norms))

    def sums(self) -> dict[nn.Parameter, torch.Tensor]:
        """The gradients added up so far, as they are now."""
        return {parameter: gradient.clone() for parameter, gradient in self._sums.items()}

    def load_sums(self, sums: dict[nn.Parameter, torch.Tensor]) -> None:
        """Replace what was added up."""
        self._sums = {p: gradient.to(p.device, copy=True) for p, gradient in sums.items()}

    def _enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._before_step is not None:
            self._before_step()
        start = time.perf_counter()
        self._restore(optimizer)  # a step inside of a step, of a subclass, or one that was interrupted
        if self._accumulates:
            self._accumulate(optimizer)
        if self._scales:
            self._split(optimizer)
        self._seconds += time.perf_counter() - start

    def _accumulate(self, optimizer: torch.optim.Optimizer) -> None:
        """Here, and not after the step, when the user may have dropped the gradients."""
        # A GradScaler leaves it to a fused optimizer to unscale, and to skip a step whose gradients overflowed.
        scale, overflowed = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.requires_grad:
                    continue
                if is_sharded(parameter):
                    # One process could not save the sums of all, as it does everything else.
                    raise UnsupportedModelError(
                        "Gradients of a model in fully_shard were to be added up, for AutoFreeze; expected whole "
                        "parameters. Use DistributedDataParallel, or another policy."
                    )
                gradient = parameter.grad.detach()
                if scale is not None:
                    gradient = gradient / scale
                if overflowed is not None:
                    gradient = torch.where(overflowed > 0, 0.0, gradient)
                if parameter not in self._sums:
                    dtype = torch.promote_types(gradient.dtype, torch.float32)
                    self._sums[parameter] = torch.zeros_like(parameter.detach(), dtype=dtype)
                self._sums[parameter] += gradient

    def _split(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError(
                f"LBFGS takes one step for all parameters together, and layers were to have learning rates of their own; "
                f"expected one such as SGD or AdamW. {_REMEDY}"
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
                f"layers were to have learning rates of their own. Pass the optimizer inside of it. {_REMEDY}"
            )

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer in self._whole:
            optimizer.param_groups = self._whole.pop(optimizer)


def _inside(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that takes the steps: that of Accelerate is a shell around it, and has no hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


class _Part(dict[str, Any]):
    """A part of a parameter group, which notices what a step does with it."""

    rate_was_read = False
    was_written = False  # what is written would be lost

    def __getitem__(self, key: str) -> Any:
        self.rate_was_read = self.rate_was_read or key == "lr"
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self.was_written = True
        super().__setitem__(key, value)
