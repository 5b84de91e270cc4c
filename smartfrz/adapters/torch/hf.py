"""SmartFRZ for the `Trainer` of Hugging Face transformers."""

import base64
import io
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from smartfrz.adapters.torch.callback import FreezingCallback
from smartfrz.adapters.torch.freezing import take_back

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    from smartfrz.errors import MissingDependencyError

    raise MissingDependencyError(
        "smartfrz.adapters.torch.hf needs transformers and accelerate, which are not installed. Install them with: "
        'pip install "smartfrz[hf]"'
    ) from error

__all__ = ["SmartFRZCallback"]


class SmartFRZCallback(FreezingCallback, TrainerCallback, ExportableState):
    """Freezes layers while a `Trainer` trains, when the predictor says that they have converged.

    The Trainer's checkpoints carry its state, in `trainer_state.json`, and
    `train(resume_from_checkpoint=...)` restores it. `smartfrz/frozen_layers` and
    `smartfrz/backward_saved` (a share, 0 to 1) join the Trainer's logs. When training ends,
    `requires_grad` is again what it was before.

    Args:
        predictor: A predictor or policy, as for `SmartFRZ`.
        allow_missing_state: Whether training may resume from a checkpoint that was made without this callback. It
            then starts to watch at that step. By default that raises a `StateError`.
        **options: Other keyword arguments of `SmartFRZ`. `total_steps` comes from the Trainer.

    Attributes:
        freezer: The `SmartFRZ` of the current or the last run; None before the first.

    Raises:
        TypeError: If an option is unknown.
        UnknownPredictorError: If the zoo has no predictor of that name.

    Example:
        >>> callback = SmartFRZCallback()
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> print(callback.report())
        SmartFRZ: no step yet.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Thaw what an interrupted run left frozen: the optimizer only takes parameters that require a gradient."""
        self._end()
        if isinstance(kwargs.get("model"), nn.Module):  # perhaps with another callback, whose run was interrupted
            take_back(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the freezer: model and optimizer exist by now, and are restored if training resumes."""
        name = type(self).__name__
        kept: Any = state.stateful_callbacks  # a dict by now
        entry = kept.get(name) or {}
        packed = entry.get("freezer") if state.global_step else None
        self._begin(
            kwargs["model"],
            getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]),  # Accelerate wraps it
            state.max_steps - state.global_step,
            _unpack(packed) if packed else None,
            state.global_step,
        )
        # The Trainer looks itself up here when it saves; a checkpoint made without us has no such key.
        kept.setdefault(name, {})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act after each optimizer step, not after each accumulated batch."""
        if self.freezer is not None:
            self.freezer.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the scalars to the training logs: to their history, and for the callbacks after this one."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if self._training and "loss" in logs:
            logs.update(self._logs())
            state.log_history[-1].update(self._logs())  # a copy of the logs, made before callbacks see them

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was found."""
        self._end()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer keeps in `trainer_state.json`.

        A callback does not learn which folder training resumes from, and that folder may have been
        moved. What is part of the Trainer's own state is found wherever the Trainer finds that.
        """
        args = {k: v.item() if isinstance(v, np.generic) else v for k, v in self._options.items()}
        if isinstance(self._predictor, (str, os.PathLike)):
            args["predictor"] = os.fspath(self._predictor)
        args["allow_missing_state"] = self._allow_missing_state
        state: dict[str, Any] = {"args": args, "attributes": {}}
        if self._training and self.freezer is not None:
            state["freezer"] = _pack(self.freezer.state_dict())
        return state


def _pack(state: dict[str, Any]) -> str:
    """Return the state as text for JSON: about 160 KB for each layer."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _unpack(text: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)
    return state
