"""Keeps `torch.compile` from what it must not see, and measures what it costs."""

import logging
import sys
import threading
import time
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

logger = logging.getLogger("smartfrz")


class EagerHold:
    """While held, compiled functions run eagerly.

    A model that is traced through hooks and a dispatch mode must not be compiled meanwhile: the
    compiler would silently give up on it for the rest of the process.

    Attributes:
        holders: Number of objects that hold, in this process.
    """

    _lock = threading.RLock()  # the garbage collector may end another hold in this thread while one is taken
    holders = 0
    _stance: Any = None

    def __init__(self) -> None:
        self._held = False

    def acquire(self) -> None:
        """Hold; does nothing if this object holds already."""
        with EagerHold._lock:
            if self._held:
                return
            self._held = True
            EagerHold.holders += 1
            if EagerHold.holders == 1:
                EagerHold._stance = torch.compiler.set_stance("force_eager")

    def release(self) -> None:
        """Let go. When the last object lets go, the compiler is as it was before."""
        with EagerHold._lock:
            if not self._held:
                return
            self._held = False
            EagerHold.holders -= 1
            if EagerHold.holders == 0:
                EagerHold._stance.__exit__(None, None, None)
                EagerHold._stance = None

    def __del__(self) -> None:
        if sys is not None and not sys.is_finalizing():  # None once the interpreter has emptied this module
            self.release()


class EagerOperators(TorchFunctionMode):
    """Runs `torch.cond` and its like as the Python that they stand for.

    Even a model that is not compiled has them compile the functions that they are given. While an `EagerHold` forbids that,
    weights that these functions use make them fail, or get no gradient. Use it as a context manager, around calls of the
    model that is held.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _AS_PYTHON.get(func)
        if run is None:
            return func(*args, **(kwargs or {}))
        with self:  # a branch may have branches of its own
            return run(*args, **(kwargs or {}))


def _run_cond(pred: Any, true_fn: Any, false_fn: Any, operands: Any) -> Any:
    return true_fn(*operands) if pred else false_fn(*operands)


def _run_while_loop(cond_fn: Any, body_fn: Any, carried: Any, others: Any) -> Any:
    while cond_fn(*carried, *others):
        carried = body_fn(*carried, *others)
    return carried


def _run_map(function: Any, inputs: Any, others: Any) -> Any:
    return _stack([function(*rows, *others) for rows in zip(*inputs, strict=True)])


def _run_scan(combine: Any, carried: Any, inputs: Any, others: Any) -> Any:
    size, outputs = len(carried), []
    for rows in zip(*inputs, strict=True):
        result = combine(*carried, *rows, *others)
        carried = result[:size]
        outputs.append(list(result[size:]))
    return (*carried, *_stack(outputs))


def _stack(outputs: list[Any]) -> Any:
    """Return the outputs of all rows as one."""
    return tree_map(lambda *rows: None if rows[0] is None else torch.stack(rows), *outputs)


_AS_PYTHON: dict[Any, Any] = {
    torch.ops.higher_order.cond: _run_cond,
    torch.ops.higher_order.while_loop: _run_while_loop,
    torch.ops.higher_order.map_impl: _run_map,
    torch.ops.higher_order.scan: _run_scan,
}


class _Clock:
    """Counts all compilations in this process, and their seconds."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self._started: float | None = None

    def listen(self) -> None:
        """Register with the compiler; needed again after `torch._dynamo.reset()`."""
        if self._start not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)

    def _start(self, args: Any) -> None:
        self._started = time.perf_counter()
        if args.callback_trigger.name == "DYNAMO":
            self.count += 1

    def _end(self, args: Any) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None


_clock = _Clock()


class CompileWatch:
    """Measures what compiling costs one run, before and after its layers began to freeze."""

    def __init__(self) -> None:
        _clock.listen()
        self._from = (_clock.count, _clock.seconds)
        self._frozen_from: tuple[int, float] | None = None

    @property
    def compiled(self) -> bool:
        """True if anything was compiled since the watch began."""
        return _clock.count > self._from[0]

    @property
    def total(self) -> tuple[int, float]:
        """Number of compilations, and their seconds, since the watch began."""
        return _clock.count - self._from[0], _clock.seconds - self._from[1]

    @property
    def because_of_freezing(self) -> tuple[int, float]:
        """The part of `total` that came after layers first froze or thawed."""
        if self._frozen_from is None:
            return 0, 0.0
        return _clock.count - self._frozen_from[0], _clock.seconds - self._frozen_from[1]

    def frozen_set_changed(self) -> None:
        """Make room for one more compilation of each compiled function.

        The compiler keeps `recompile_limit` variants of a function (8 today) and then runs it
        eagerly from then on. The variants for earlier frozen sets are never used again, so each change
        of the set raises the limit by one: the user's own variants have as much room as before.
        """
        _clock.listen()
        if self._frozen_from is None:
            self._frozen_from = (_clock.count, _clock.seconds)
        if self.compiled:
            torch._dynamo.config.recompile_limit += 1
            logger.info("torch._dynamo.config.recompile_limit raised to %d", torch._dynamo.config.recompile_limit)
