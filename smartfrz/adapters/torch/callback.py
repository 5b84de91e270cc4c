"""What the callbacks of training frameworks share: one `SmartFRZ` per training run."""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from smartfrz import zoo
from smartfrz.adapters.base import Log
from smartfrz.adapters.torch.cache.options import PrefixCache
from smartfrz.adapters.torch.distributed import RANK_TIMEOUT
from smartfrz.adapters.torch.freezer import SmartFRZ
from smartfrz.adapters.torch.saved import ANNOUNCED, check_saved, seal
from smartfrz.control.learned import AsksPredictor, policy_of
from smartfrz.control.ordering import FreezeOrder
from smartfrz.control.policy import Policy
from smartfrz.control.report import Report
from smartfrz.errors import StateError
from smartfrz.predictor.runtime import Device, Providers


class FreezingCallback:
    """Makes a `SmartFRZ` when training begins and leaves the model as it was found when it ends.

    Args:
        predictor: A predictor or policy, as for `smartfrz.adapters.base.Freezer`.
        allow_missing_state: Whether training may resume from a checkpoint that was made without this callback. It
            then starts to watch at that step. By default that raises a `StateError`.

    The other arguments are those of `smartfrz.adapters.torch.SmartFRZ`. `total_steps` comes from the framework's trainer.

    Attributes:
        freezer: The `SmartFRZ` of the current or the last run; None before the first.

    Raises:
        ValueError: If an argument is out of range, when training begins; and the errors of `Freezer`.
    """

    freezer: SmartFRZ | None = None
    _training = False
    _announced: int | None = None

    def __init__(
        self,
        predictor: str | os.PathLike[str] | AsksPredictor | Policy = zoo.DEFAULT,
        *,
        total_steps: int | None = None,
        record_every: int | None = None,
        decide_every: int | None = None,
        threshold: float | None = None,
        quality: str | None = None,
        patience: int | None = None,
        dry_run: bool = False,
        seed: int = 0,
        device: Device = "auto",
        providers: Providers | None = None,
        norm_batches: int = 24,
        freeze_order: FreezeOrder | None = None,
        thaw_on_restart: bool = False,
        verbose: bool = True,
        rank_timeout: float = RANK_TIMEOUT,
        cache: PrefixCache | None = None,
        log: Log | None = None,
        allow_missing_state: bool = False,
    ):
        # Spelled out, as LightningCLI and editors read the signature.
        given: dict[str, Any] = {
            "total_steps": total_steps,
            "record_every": record_every,
            "decide_every": decide_every,
            "threshold": threshold,
            "quality": quality,
            "patience": patience,
            "dry_run": dry_run,
            "seed": seed,
            "device": device,
            "providers": providers,
            "norm_batches": norm_batches,
            "freeze_order": freeze_order,
            "thaw_on_restart": thaw_on_restart,
            "verbose": verbose,
            "rank_timeout": rank_timeout,
            "cache": cache,
            "log": log,
        }
        defaults = inspect.signature(SmartFRZ).parameters
        policy_of(zoo.load(predictor))  # complain now, not after the model and the data have been loaded
        self._predictor = predictor
        self._options = {name: value for name, value in given.items() if value != defaults[name].default}
        self._allow_missing_state = allow_missing_state

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: the options. A copy has no run, as it has no model."""
        own = self.__dict__
        return {name: own[name] for name in ("_predictor", "_options", "_allow_missing_state")}

    def report(self) -> Report:
        """Report what froze when, what that saved, and what deciding cost."""
        return self.freezer.report() if self.freezer else Report()

    @property
    def _needs_length(self) -> bool:
        """True if the run cannot begin unless the framework knows its length."""
        return self._options.get("total_steps") is None and self._options.get("record_every") is None

    def _state(self) -> dict[str, Any]:
        """Return all that a resumed run needs to continue as an uninterrupted one."""
        if self.freezer is None:
            return {"started": False}
        state = self.freezer.state_dict() | {ANNOUNCED: self._announced}
        return seal(state) if state["started"] else state

    def _length(self, steps_left: int | None, saved: dict[str, Any] | None) -> int | None:
        """Return how long the framework's run is, from the first step that the freezer counts."""
        if saved is None or not saved.get("started") or steps_left is None:
            return steps_left
        if saved.get(ANNOUNCED) == self._announced:
            return None  # as it was: what was saved goes on
        return int(saved["controller"]["num_steps"]) + steps_left

    def _logs(self) -> dict[str, float]:
        """Return what joins the logs of the framework."""
        return self.freezer.scalars() if self.freezer else self.report().scalars()

    def _begin(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        steps_left: int | None,
        announced: int | None,
        saved: dict[str, Any] | None,
        steps_done: int,
        find_entry: Callable[[], nn.Module | None] | None = None,
    ) -> None:
        """Make the freezer of a run that starts, or continues from the state `saved`.

        Args:
            model: The model.
            optimizers: The optimizer of the model, or several.
            steps_left: Steps from now to the end of the run, as the framework knows; None if it does not.
            announced: What the framework says of the length of the whole run, in whatever unit.
            saved: The state of the run that goes on, as `_state` returned it.
            steps_done: Steps before this run, as the framework counts them.
            find_entry: See `SmartFRZ.set_entry`.
        """
        self._end()
        self._announced = announced
        if steps_done and saved is None and not self._allow_missing_state:
            raise StateError(
                f"Training goes on from step {steps_done}, but the checkpoint holds no state of "
                f"{type(self).__name__}; expected one that was saved with it. What had been frozen would be trained "
                "again. Resume from a checkpoint that was made with SmartFRZ, or pass allow_missing_state=True to "
                "watch from here on."
            )
        if saved is not None:
            check_saved(saved)  # before anything is read from it
        options = dict(self._options)
        if options.get("total_steps") is None:
            # Also beside `record_every`: policies, and what pays in the rest of the run, depend on the length.
            options["total_steps"] = self._length(steps_left, saved)
            if options["total_steps"] is None and saved is not None and saved.get("started"):
                options["total_steps"] = saved["controller"]["total_steps"]
        freezer = SmartFRZ(model, optimizers, self._predictor, **options)
        if find_entry is not None:
            freezer.set_entry(find_entry)
        if saved is not None:
            freezer.load_state_dict(saved)
        self.freezer, self._training = freezer, True

    def _finish(self) -> None:
        """End a run that went to its end, and say what became of it."""
        if self._training and self.freezer is not None:
            self.freezer.say_report()
        self._end()

    def _end(self) -> None:
        """Thaw what this callback froze.

        A layer that stayed frozen would pass for one that the user froze in the next run: never trained
        again, and missing from an optimizer that is made for the parameters that require a gradient.
        """
        self._training = False
        if self.freezer is not None:
            self.freezer.close()
