"""What the callbacks of training frameworks share: one `SmartFRZ` per training run."""

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from smartfrz import zoo
from smartfrz.adapters.torch import Report, SmartFRZ
from smartfrz.control.learned import AsksPredictor
from smartfrz.control.policy import Policy
from smartfrz.errors import StateError


class FreezingCallback:
    """Makes a `SmartFRZ` when training begins and leaves the model as it was found when it ends.

    Args:
        predictor: As for `SmartFRZ`.
        allow_missing_state: Whether training may resume from a checkpoint that holds no state.
        **options: Keyword arguments of `SmartFRZ`.

    Attributes:
        freezer: The `SmartFRZ` of the current or the last run; None before the first.
    """

    freezer: SmartFRZ | None = None
    _training = False

    def __init__(
        self,
        predictor: str | os.PathLike[str] | AsksPredictor | Policy = zoo.DEFAULT,
        *,
        allow_missing_state: bool = False,
        **options: Any,
    ):
        # What is misspelled is an error now, not after the model and the data have been loaded.
        try:
            inspect.signature(SmartFRZ).bind(None, None, predictor, **options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__} {error}; expected keyword arguments of SmartFRZ.") from None
        zoo.load(predictor)
        self._predictor = predictor
        self._options = options
        self._allow_missing_state = allow_missing_state

    def report(self) -> Report:
        """What froze when, what that saved, and what deciding cost."""
        return self.freezer.report() if self.freezer else Report()

    def _logs(self) -> dict[str, float]:
        """What joins the logs of the framework."""
        return self.report().scalars()

    def _begin(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        total_steps: int | None,
        saved: dict[str, Any] | None,
        steps_done: int,
    ) -> SmartFRZ:
        """The freezer of a run that starts, or goes on from what was `saved`."""
        self._end()
        if steps_done and saved is None and not self._allow_missing_state:
            raise StateError(
                f"Training goes on from step {steps_done}, but the checkpoint holds no state of "
                f"{type(self).__name__}; expected one that was saved with it. What had been frozen would be trained "
                "again. Resume from a checkpoint that was made with SmartFRZ, or pass allow_missing_state=True to "
                "watch from here on."
            )
        schedule = {} if "record_every" in self._options else {"total_steps": total_steps}
        freezer = SmartFRZ(model, optimizers, self._predictor, **schedule | self._options)
        if saved is not None:
            freezer.load_state_dict(saved)
        self.freezer, self._training = freezer, True
        return freezer

    def _end(self) -> None:
        """Thaw what this callback froze.

        A layer that stayed frozen would pass for the user's own in the next run: never trained
        again, and missing from an optimizer that is made of what requires a gradient.
        """
        self._training = False
        if self.freezer is None:
            return
        self.freezer.close()
        if self.freezer._adapter is not None:
            self.freezer._adapter.unfreeze(self.freezer.frozen_layers)
