"""Send a model's forward passes elsewhere for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


class _Slot:
    """Holds what runs in place of a model's forward pass. In a copy of the model it is empty."""

    def __init__(self, run: Callable[..., Any] | None = None):
        self.run = run

    def __deepcopy__(self, memo: Any) -> "_Slot":
        return _Slot()

    def __reduce__(self) -> Any:
        return _Slot, ()


def _run_routed(slot: _Slot, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if slot.run is None:
        return forward(*args, **kwargs)
    return slot.run(forward, args, kwargs)


@contextmanager
def route(model: nn.Module, run: Callable[[Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """Have forward passes of the model go to `run(forward, args, kwargs)` inside the block.

    Copies and pickles of the model that are made meanwhile run as usual.

    Args:
        model: The model; its `forward` is replaced.
        run: What runs instead. It gets the forward pass that was replaced, and its arguments.
    """
    own = model.__dict__
    before, forward = own.get("forward"), model.forward
    slot = _Slot(run)
    routed = partial(_run_routed, slot, forward)
    routed.__wrapped__ = forward  # type: ignore[attr-defined]  # its signature stays the model's
    own["forward"] = routed
    try:
        yield
    finally:
        slot.run = None
        if own.get("forward") is routed:  # else it was wrapped once more meanwhile
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before
