"""What the controller needs of a framework's adapter and of the processes that train together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from smartfrz.control.watch import Disturbance

Untrained = Literal[
    "no_optimizer",  # no optimizer that is known trains it
    "unknown_optimizer",  # no optimizer that is known trains it, but it moves
    "learning_rate_zero",
    "never_moved",  # since training began
    "no_update_yet",  # it has not been updated since it was first looked at; nothing to worry about
]


class Adapter(Protocol):
    """A model, as the controller sees it. Weights cross this border as NumPy arrays."""

    def layers(self) -> list[str]:
        """Return the names of the layers that may be frozen, in execution order."""
        ...

    def all_layers(self) -> list[str]:
        """Return the names of all layers in execution order, including layers that the user froze."""
        ...

    def num_weights(self, layer: str) -> int:
        """Return the number of weights of the layer."""
        ...

    def weights(self, layer: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a copy of the layer's flattened weights at `indices`, float32."""
        ...

    def tailored(self, positions: Mapping[str, NDArray[np.int64]]) -> Mapping[str, NDArray[np.float32]]:
        """Return what `weights` returns, for several layers at once: one transfer, or one message, for all."""
        ...

    def freeze(self, layers: list[str]) -> None:
        """Stop training these layers. Freezing a frozen layer changes nothing."""
        ...

    def unfreeze(self, layers: list[str]) -> None:
        """Train these layers again if `freeze` stopped them."""
        ...

    def disturbed(self, layers: list[str]) -> Mapping[str, Disturbance]:
        """Return which of these frozen layers no longer stand still, in the given order. Called at every record.

        A layer counts as trainable if it was made so at any time since it was last passed to `freeze`, even if the
        adapter has set that back itself. Nothing is changed. Only the first process asks.
        """
        ...

    def untrained(self, layers: list[str]) -> Mapping[str, Untrained]:
        """Return which of these active layers are not trained, and why. Only the first process asks.

        Such a layer does not move, and would look converged.
        """
        ...

    def find_layers(self) -> list[str]:
        """Return what `layers` would be if the model were looked at now.

        The user may freeze and unfreeze layers, and layers may run for the first time. Called at every record, on the
        first process; nothing is changed.
        """
        ...

    def set_layers(self, layers: list[str]) -> None:
        """Have `layers` return what `find_layers` returned; layers that are new join `all_layers`, too."""
        ...


class ReadsLater(Adapter, Protocol):
    """An adapter that reads weights from a device without waiting for it; `TorchAdapter` does on a GPU.

    What was begun after one step is asked for after the next one, by which time the device has long been there.
    """

    @property
    def reads_later(self) -> bool:
        """Whether beginning to read waits for nothing, so that waiting a step is worth while."""
        ...

    def tailored_later(
        self, positions: Mapping[str, NDArray[np.int64]]
    ) -> Callable[[], Mapping[str, NDArray[np.float32]]]:
        """Begin what `tailored` does, with the weights of now, and return what waits for it. Every process calls it."""
        ...

    def loss_later(self, loss: Any) -> Callable[[], float]:
        """Begin to read a scalar from the device, and return what waits for it."""
        ...

    def disturbed_later(self, layers: list[str]) -> Callable[[], Mapping[str, Disturbance]]:
        """Begin what `disturbed` does, and return what waits for it.

        Weights and statistics are those of now, flags those of then. What was thawed meanwhile is left out.
        """
        ...


class OptimizerAdapter(Adapter, Protocol):
    """An adapter that reaches into the optimizer's steps, which some policies need."""

    def set_lr_scale(self, layer: str, scale: float) -> None:
        """Multiply the layer's learning rate by `scale`, until another scale is set or the layer freezes."""
        ...

    def gradient_norm(self, layer: str) -> float:
        """Return the L1 norm of the sum of the layer's gradients over the steps since the last call."""
        ...

    def gradient_changes(self, layers: Sequence[str]) -> Mapping[str, float]:
        """Return for each layer the smallest L1 norm, since the last call, of the change of its gradient between two steps.

        Of a layer with several matrices, the one counts whose smallest change is the largest. It is infinite if there was
        no change to measure.
        """
        ...


class Ranks(Protocol):
    """The processes that train one model together and have to decide alike."""

    def meet(self, moment: str, facts: Mapping[str, Any]) -> None:
        """Wait until every process is at this moment with the same facts (plain data).

        Raises:
            DistributedError: If a process does not come, or comes with other facts.
        """
        ...

    def share(self, make: Callable[[], Any]) -> Any:
        """Call `make` on the first process, and return its result, plain data, on every process."""
        ...


class OneProcess:
    """`Ranks` for a process that trains alone."""

    def meet(self, moment: str, facts: Mapping[str, Any]) -> None:
        """Return at once."""

    def share(self, make: Callable[[], Any]) -> Any:
        """Return the result of `make`."""
        return make()
