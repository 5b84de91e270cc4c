"""Tells whether a `fit` goes on with the run of the `fit` before it, as where `fit(epochs=1)` is called in a loop."""

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from smartfrz.adapters.keras.compiling import CompileClock
from smartfrz.adapters.keras.freezing import KerasAdapter


@dataclass(frozen=True)
class End:
    """How a `fit` ended.

    Attributes:
        adapter: The model, as that run saw it.
        optimizer: The optimizer of the model.
        iterations: The optimizer's iterations.
        trained: The variables that can be trained when nothing is frozen.
        frozen: Values of what was frozen, as `KerasAdapter.read_pieces` returned them.
        state: The state of the run.
        compiling: What compiling took so far.
        given_up: Whether nothing is frozen any more in this run.
    """

    adapter: KerasAdapter
    optimizer: Any
    iterations: int
    trained: list[Any]
    frozen: dict[str, NDArray[np.float32]]
    state: dict[str, Any]
    compiling: CompileClock
    given_up: bool

    def describes(self, model: keras.Model, iterations: int) -> bool:
        """Return whether the model is as the `fit` left it: nobody compiled, trained or changed it since."""
        if self.adapter.model is not model or self.optimizer is not model.optimizer or self.iterations != iterations:
            return False
        if [id(variable) for variable in self.trained] != [id(variable) for variable in model.trainable_variables]:
            return False
        now = self.adapter.read_pieces(list(self.frozen))
        return all(values.tobytes() == now[layer].tobytes() for layer, values in self.frozen.items())


@dataclass
class _Trained:
    """What is known of a model that SmartFRZ has trained."""

    optimizer: Any
    iterations: int
    told: bool = False


# Not an attribute of the model, which may be saved.
_trained: "weakref.WeakKeyDictionary[keras.Model, _Trained]" = weakref.WeakKeyDictionary()


def note_trained(model: keras.Model, iterations: int) -> None:
    """Note that a `fit` with SmartFRZ ended."""
    known = _trained.setdefault(model, _Trained(None, 0))
    known.optimizer, known.iterations = weakref.ref(model.optimizer), iterations


def warn_of_new_run(model: keras.Model, iterations: int, total_steps: int | None) -> None:
    """Say, once for each model, that a `fit` starts over although it goes on training what the one before it trained.

    Args:
        model: The model.
        iterations: The optimizer's iterations.
        total_steps: The length of the run, as the user gave it.
    """
    known = _trained.get(model)
    if known is None or known.told or known.optimizer() is not model.optimizer or known.iterations != iterations:
        return
    known.told = True
    why = (
        "without `total_steps` each call of fit() is a run of its own"
        if total_steps is None
        else f"this SmartFRZ did not train it before, or its total_steps={total_steps} are over"
    )
    warnings.warn(
        f"fit() goes on training {type(model).__name__} {model.name!r}, but SmartFRZ starts over: {why}. What the call "
        "before froze is trained again. Where several calls are one run, make one SmartFRZ before them, with "
        "total_steps=the optimizer steps of all of them, and pass it to each.",
        stacklevel=2,
    )
