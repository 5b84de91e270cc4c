"""Sees when the optimizers of a model update it."""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from smartfrz.errors import UsageError

logger = logging.getLogger("smartfrz")
WATCHED_CALLS = 32
_MAY_WAIT = 100  # updates of one optimizer without any of another one, before the log says so


def list_optimizers(given: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers as a list.

    Raises:
        TypeError: If something else was given.
        ValueError: If there is none.
    """
    optimizers = list(given) if isinstance(given, (list, tuple)) else [given]
    if not optimizers:
        raise ValueError("`optimizer` is empty; expected the optimizer of the model's parameters, or several.")
    for optimizer in optimizers:
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
            raise TypeError(f"`optimizer` is {_name(optimizer)}; expected {_EXPECTED}. {_remedy(optimizer)}")
    return optimizers


_EXPECTED = "a torch.optim.Optimizer, or a list of them"


def _name(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _remedy(value: Any) -> str:
    for attribute in ("optimizer", "_optimizer", "base_optimizer", "optim", "inner_optimizer"):
        if isinstance(getattr(value, attribute, None), torch.optim.Optimizer):
            return f"It holds one in its attribute `{attribute}`: pass that."
    return "Make the optimizer first, with the parameters of the model, and pass it: SmartFRZ(model, optimizer, ...)."


def unwrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that takes the steps. Accelerate wraps it in one that has no hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


class UpdateWatch:
    """Notices that `step` is called after batches that update nothing, in the first calls of a run.

    Hooks of the optimizer would know for certain, but a compiled `optimizer.step` would be compiled with them.

    Args:
        parameters: The parameters of the model.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._parameters = list(parameters)
        self._version = self._read()
        self._calls = self._updates = 0

    def _read(self) -> int:
        # Each write in place raises it. It costs no wait for the device.
        return sum(parameter._version for parameter in self._parameters)

    def note_call(self) -> None:
        """Count a call of `step`, and log once if half of the calls or more came without an update."""
        if self._calls >= WATCHED_CALLS:
            return
        version, before = self._read(), self._version
        self._version = version
        self._calls += 1
        self._updates += version != before
        # Optimizers that write to `parameter.data` raise no version at all.
        if self._calls == WATCHED_CALLS and 0 < 2 * self._updates <= WATCHED_CALLS:
            logger.warning(
                "SmartFRZ: the optimizer changed the weights before %d of the first %d calls of freezer.step() only; "
                "expected one call after each optimizer.step(), not one after each batch. Where gradients are "
                "accumulated, call it inside of the `if` that holds optimizer.step(), and count total_steps in "
                "optimizer steps. This is only said once.",
                self._updates,
                WATCHED_CALLS,
            )
        if self._calls == WATCHED_CALLS:
            self._parameters = []


class Rounds:
    """Calls back after each round of optimizer steps: when every optimizer has stepped since the last time.

    In the middle of a round, gradients of the next optimizer may have been prepared already, so that nothing can freeze.

    Args:
        optimizers: The optimizers, wrapped or not.
        on_round: Called after the last step of a round.

    Raises:
        UsageError: If an optimizer has no hooks.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], on_round: Callable[[], None]):
        self._on_round = on_round
        self._optimizers = [unwrap(optimizer) for optimizer in optimizers]
        self._stepped: dict[int, int] = {}
        self._outermost: FrameType | None = None
        self._handles: list[Any] = []
        self._said = False
        for optimizer in self._optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise UsageError(
                    f"`auto_step` needs an optimizer that calls hooks after its steps; received a "
                    f"{type(optimizer).__name__}, expected a torch.optim.Optimizer. {_remedy(optimizer)} Or leave "
                    "auto_step out and call freezer.step() after each step of it."
                )
            self._handles += [
                optimizer.register_step_pre_hook(self._enter),
                optimizer.register_step_post_hook(self._leave),
            ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._outermost = None

    # A step of a subclass that calls the step of its base class runs the hooks twice; only after the outer step is all
    # done. No post hook runs after a step that raised, so the frame of the outer step tells whether it still runs.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        frame = sys._getframe(1)
        if self._outermost is None or not _runs(self._outermost, frame):
            self._outermost = _caller(frame)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _caller(sys._getframe(1)) is not self._outermost:
            return
        self._outermost = None
        self._stepped[id(optimizer)] = self._stepped.get(id(optimizer), 0) + 1
        waiting = [other for other in self._optimizers if id(other) not in self._stepped]
        if not waiting:
            self._stepped.clear()
            self._on_round()
        elif max(self._stepped.values()) == _MAY_WAIT and not self._said:
            self._said = True
            logger.warning(
                "SmartFRZ: %s took %d steps while %s took none; auto_step counts a step when every optimizer has taken "
                "one. Leave auto_step out and call freezer.step() where a training step ends, or leave out the "
                "optimizer that rests.",
                type(optimizer).__name__,
                _MAY_WAIT,
                type(waiting[0]).__name__,
            )


def _caller(frame: FrameType | None) -> FrameType | None:
    """Return the frame in which the optimizer's own hooks are run, outside of what PyTorch may wrap ours in."""
    while frame is not None and frame.f_code.co_name != "wrapper":
        frame = frame.f_back
    return frame


def _runs(wanted: FrameType, frame: FrameType | None) -> bool:
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None
