"""Send a model's forward passes elsewhere for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


class _Routed:
    """Runs in place of a model's forward pass. In a copy or a pickle of the model there is only that forward pass."""

    def __init__(self, run: Callable[..., Any], forward: Callable[..., Any]):
        self.run: Callable[..., Any] | None = run
        self._forward = forward
        self.__wrapped__ = forward  # its signature stays the model's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.run is None:
            return self._forward(*args, **kwargs)
        return self.run(self._forward, args, kwargs)

    def __reduce__(self) -> Any:
        # In a file, nothing may name smartfrz.
        return partial, (self._forward,)


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
    routed = _Routed(run, forward)
    own["forward"] = routed
    try:
        yield
    finally:
        routed.run = None
        if own.get("forward") is routed:  # else it was wrapped once more meanwhile
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before
