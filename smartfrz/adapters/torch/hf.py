"""SmartFRZ for the `Trainer` of Hugging Face transformers."""

import functools
import inspect
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from torch import nn

from smartfrz.adapters.state_file import from_json, read_state, to_json, write_state
from smartfrz.adapters.torch.callback import FreezingCallback
from smartfrz.adapters.torch.freezing import take_back
from smartfrz.adapters.torch.losses import BatchLosses
from smartfrz.adapters.torch.pictures import send_picture
from smartfrz.adapters.torch.saved import to_arrays, to_tensors
from smartfrz.errors import StateError

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler, ExportableState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    from smartfrz.errors import not_installed

    raise not_installed("smartfrz.adapters.torch.hf", "transformers with accelerate", "hf") from error

__all__ = ["SmartFRZCallback"]
STATE_FILE = "smartfrz_state.npz"


class SmartFRZCallback(FreezingCallback, TrainerCallback, ExportableState):
    """Freezes layers while a `Trainer` trains, when the predictor says that they have converged.

    The Trainer's checkpoints carry its state, in the file `smartfrz_state.npz`, and
    `train(resume_from_checkpoint=...)` restores it. `smartfrz/frozen_layers` and
    `smartfrz/backward_saved` (a share, 0 to 1) join the Trainer's logs. The confidences of single layers, and at the end
    a picture of the run, go to TensorBoard, W&B and MLflow only (`report_to`). When training ends,
    `requires_grad` is again what it was before.

    `smartfrz.adapters.torch.callback.FreezingCallback` documents the arguments and attributes.

    Example:
        >>> callback = SmartFRZCallback()
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> print(callback.report())
        SmartFRZ: no step yet.
    """

    _handler: CallbackHandler | None = None
    _losses: "_TrainingLosses | None" = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Thaw what an interrupted run left frozen: the optimizer only takes parameters that require a gradient."""
        self._go_before_reporters(inspect.currentframe())
        self._end()
        if isinstance(kwargs.get("model"), nn.Module):  # perhaps with another callback, whose run was interrupted
            take_back(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the freezer: model and optimizer exist by now, and are restored if training resumes."""
        self._go_before_reporters(inspect.currentframe())
        name = type(self).__name__
        kept: Any = state.stateful_callbacks  # a dict by now
        entry = kept.get(name) or {}
        self._folder = Path(args.output_dir or ".")
        self._state_of_trainer = state
        self._begin(
            kwargs["model"],
            getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]),  # Accelerate wraps it
            max(1, state.max_steps - state.global_step),
            state.max_steps,
            self._saved(entry, args, state.global_step, inspect.currentframe()) if state.global_step else None,
            state.global_step,
        )
        frame = next(_frames_of_trainers(inspect.currentframe()), None)
        if frame is not None and self.freezer is not None and self.freezer.reads_loss:
            self._losses = _TrainingLosses(frame.f_locals["self"])
        # The Trainer looks itself up here when it saves; a checkpoint made without us has no such key.
        kept.setdefault(name, {})

    def _saved(
        self, entry: dict[str, Any], args: TrainingArguments, step: int, frame: FrameType | None
    ) -> dict[str, Any] | None:
        """Return the state that belongs to the checkpoint from which training resumes, if it has one."""
        if "step" not in entry:
            return None
        if entry["step"] != step:
            # It was carried along by a training without us, in which frozen layers were trained.
            if self._allow_missing_state:
                return None
            raise StateError(
                f"The checkpoint is of step {step}, but the state of {type(self).__name__} in it of step {entry['step']}: "
                "in between, training went on without it. Resume from a checkpoint that was made with SmartFRZ, or pass "
                "allow_missing_state=True to watch from here on."
            )
        if "state" in entry:
            return to_tensors(from_json(entry["state"]))
        places = [Path(place) for place in _folders_of_resumed_training(frame)]
        places += [Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"]
        for place in places:
            file = place / STATE_FILE
            if file.is_file():
                state = read_state(file)
                if state.pop("id", None) == entry["id"]:
                    return to_tensors(state)
        raise StateError(
            f"The state of {type(self).__name__} at step {step} is in the file {STATE_FILE} of the checkpoint, and "
            f"{' and '.join(sorted({str(place) for place in places}))} does not hold it; expected the file that was written "
            "with trainer_state.json. Copy the whole folder of the checkpoint."
        )

    def _go_before_reporters(self, frame: FrameType | None) -> None:
        """Move to the place before TensorBoard, W&B and the like, which read the logs when it is their turn."""
        handler = frame.f_back.f_locals.get("self") if frame is not None and frame.f_back is not None else None
        if not isinstance(handler, CallbackHandler):  # called by hand
            return
        self._handler = handler
        callbacks = handler.callbacks
        for index, callback in enumerate(callbacks):
            if callback is self:
                return
            if _reports(callback):
                # One step on, the loop over this list meets the callback after us, as it would have anyway.
                callbacks.remove(self)
                callbacks.insert(index, self)
                return

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act after each optimizer step, not after each accumulated batch."""
        if self.freezer is None:
            return
        self.freezer.step(self._losses.take(mean=False) if self._losses else None)
        # Only to TensorBoard, W&B and the like: hundreds of numbers would flood the console and the history.
        confidences = self.freezer.confidences()
        for reporter in self._reporters() if confidences else ():
            reporter.on_log(args, state, control, logs=dict(confidences), **kwargs)

    def _reporters(self) -> list[TrainerCallback]:
        callbacks = [] if self._handler is None else self._handler.callbacks
        return [each for each in callbacks if _reports(each)]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the scalars to the training logs: to their history, and for the callbacks after this one."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if self._training and self.freezer is not None and "train_runtime" not in logs:  # else the end's averages
            self.freezer.note_logs(logs)
        if self._training and "loss" in logs:
            logs.update(self._logs())
            state.log_history[-1].update(self._logs())  # a copy of the logs, made before callbacks see them

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was found, and send the picture of the run to TensorBoard, W&B and MLflow."""
        self._finish()
        reporters = self._reporters() if state.is_world_process_zero else []
        for writer in filter(None, map(_writer_of, reporters)):
            send_picture(self.report(), writer)

    def _end(self) -> None:
        super()._end()
        if self._losses is not None:
            self._losses.close()
            self._losses = None

    def state(self) -> dict[str, Any]:
        """Return what the Trainer keeps in `trainer_state.json`, and write the rest beside it."""
        args: dict[str, Any] = {
            k: v.item() if isinstance(v, np.generic) else v for k, v in self._options.items() if k != "log"
        }
        if isinstance(self._predictor, (str, os.PathLike)):
            args["predictor"] = os.fspath(self._predictor)
        args["allow_missing_state"] = self._allow_missing_state
        state: dict[str, Any] = {"args": args, "attributes": {}}
        if self._training and self.freezer is not None:
            state |= self._write(self._state(), self._state_of_trainer.global_step)
        return state

    def _write(self, state: dict[str, Any], step: int) -> dict[str, Any]:
        """Write the state into the folder of the checkpoint, and return what finds it again there."""
        state = to_arrays(state)
        folder = self._folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if not folder.is_dir():  # a hyperparameter search has folders of its own
            return {"step": step, "state": to_json(state)}
        identity = uuid.uuid4().hex
        write_state(state | {"id": identity}, folder / STATE_FILE)
        return {"step": step, "id": identity}


def _reports(callback: TrainerCallback) -> bool:
    return type(callback).__module__.startswith("transformers.integrations")


def _writer_of(reporter: TrainerCallback) -> Any:
    """Return what TensorBoard's, W&B's or MLflow's callback writes with; None for other callbacks."""
    for name in ("tb_writer", "_wandb", "_ml_flow"):
        if getattr(reporter, name, None) is not None:
            return getattr(reporter, name)
    return None


def _folders_of_resumed_training(frame: FrameType | None) -> list[str]:
    """Return what `Trainer.train` was told to resume from.

    Callbacks do not learn it, and the folder may have been moved. Which file is the right one is known by its id.
    """
    found = [frame.f_locals.get("resume_from_checkpoint") for frame in _frames_of_trainers(frame)]
    return list(dict.fromkeys(os.fspath(folder) for folder in found if isinstance(folder, (str, os.PathLike))))


def _frames_of_trainers(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the calls of a Trainer's methods that led here, the latest first. Callbacks are not told their Trainer."""
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            yield frame
        frame = frame.f_back


class _TrainingLosses(BatchLosses):
    """Notes what each training step of a Trainer returns: the loss, wherever it was computed, of one batch.

    A Trainer divides it by the number of accumulated batches, so the sum is the loss of an optimizer step.
    """

    def __init__(self, trainer: Trainer):
        super().__init__()
        self._trainer, self._before = trainer, trainer.__dict__.get("training_step")
        step = trainer.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            self.add(loss)
            return loss

        self._own = training_step
        trainer.__dict__["training_step"] = training_step

    def close(self) -> None:
        """Give the Trainer its own method back."""
        attributes = self._trainer.__dict__
        if attributes.get("training_step") is not self._own:  # somebody wrapped it again
            return
        if self._before is None:
            del attributes["training_step"]
        else:
            attributes["training_step"] = self._before
