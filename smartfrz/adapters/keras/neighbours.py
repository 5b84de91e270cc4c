"""Helps the other callbacks of a `fit` to deal with frozen layers: callbacks that save, and `TensorBoard`."""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import keras
import numpy as np

from smartfrz.control.decision import FreezeDecision
from smartfrz.control.report import Report

logger = logging.getLogger("smartfrz")
_SAVE = "_save_model"


def come_first(callback: keras.callbacks.Callback) -> list[Any]:
    """Move a callback to the front of the callbacks of the `fit` that is calling it.

    At the end of a batch the others then save, log and read the model after this one froze layers, and
    all of them see what it adds to the logs.

    Returns:
        All callbacks of this `fit`; only this one if the caller is not Keras.
    """
    # Keras gives a callback its model, but not the other callbacks. Their list is what calls us.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            callbacks: list[Any] = caller.callbacks
            # Keras is iterating: callbacks behind us stay where they are, so that each is called exactly once.
            callbacks.remove(callback)
            callbacks.insert(0, callback)
            return list(callbacks)
        frame = frame.f_back
    return [callback]


class Saving:
    """Makes `ModelCheckpoint` and `BackupAndRestore` save the model as if nothing were frozen.

    A model that is saved while layers are frozen is loaded with an optimizer for the other layers only,
    which Keras then leaves without momenta and iterations, with nothing but a warning. The freezer's own
    state is written next to the file of a `BackupAndRestore`.

    Args:
        callbacks: All callbacks of the `fit`.
        thawed: Makes a context in which the model looks unfrozen.
        write: Writes the freezer's state to a file.
        iterations: Returns the number of batches that the optimizer has seen.
    """

    def __init__(
        self,
        callbacks: list[Any],
        thawed: Callable[[], AbstractContextManager[None]],
        write: Callable[[Path], None],
        iterations: Callable[[], int],
    ):
        kinds = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
        self._savers = [c for c in callbacks if isinstance(c, kinds) and hasattr(c, _SAVE)]
        for callback in self._savers:
            vars(callback).pop(_SAVE, None)  # left over from a run that was interrupted
            folder = _folder(callback)
            setattr(callback, _SAVE, _saving(getattr(callback, _SAVE), thawed, folder, write, iterations))

    def find_state(self, iterations: int) -> Path | None:
        """Return the state that belongs to the model that a `BackupAndRestore` has just restored; None if it did not."""
        for callback in self._savers:
            folder = _folder(callback)
            if folder is not None and iterations and (path := _state_file(folder, iterations)).exists():
                return path
        return None

    def close(self) -> None:
        """Restore the callbacks."""
        for callback in self._savers:
            vars(callback).pop(_SAVE, None)


def _saving(
    save: Callable[..., None],
    thawed: Callable[[], AbstractContextManager[None]],
    folder: Path | None,
    write: Callable[[Path], None],
    iterations: Callable[[], int],
) -> Callable[..., None]:
    @wraps(save)
    def saving(*args: Any, **kwargs: Any) -> None:
        with thawed():
            if folder is None:
                save(*args, **kwargs)
                return
            # Ours first, and named after the iteration: whenever the process dies, there is one for the backup.
            older = list(folder.glob("smartfrz-*.npz"))
            folder.mkdir(parents=True, exist_ok=True)
            path = _state_file(folder, iterations())
            write(path)
            save(*args, **kwargs)
            # The newest older one stays, for `double_checkpoint`.
            older = sorted((p for p in older if p != path), key=lambda p: p.stat().st_mtime)
            for file in older[:-1]:
                file.unlink(missing_ok=True)

    return saving


def _folder(callback: Any) -> Path | None:
    """Return where a `BackupAndRestore` saves, if that is a local folder."""
    folder = getattr(callback, "backup_dir", None)
    if folder is None:
        return None
    if "://" in str(folder):
        logger.warning(
            "BackupAndRestore saves to %s, where SmartFRZ cannot write its state: a run that is restored from it will "
            "start freezing from the beginning. Back up to a local folder.",
            folder,
        )
        return None
    return Path(os.fspath(folder))


def _state_file(folder: Path, iterations: int) -> Path:
    return folder / f"smartfrz-{iterations}.npz"


class Board:
    """Writes scalars and a picture for TensorBoard, into the run of the user's `TensorBoard` callback.

    Args:
        callbacks: All callbacks of the `fit`. Without a `TensorBoard` among them nothing is written.
    """

    def __init__(self, callbacks: list[Any]):
        board = next((c for c in callbacks if isinstance(c, keras.callbacks.TensorBoard)), None)
        self._writer: Any = None
        if board is not None:
            import tensorflow as tf  # the callback needs it as well, on every backend

            self._summary = tf.summary
            # A file of our own, next to the file of the callback: TensorBoard shows both as one run.
            self._writer = tf.summary.create_file_writer(os.path.join(board.log_dir, "train"))

    def stage(self, decisions: list[FreezeDecision], report: Report) -> None:
        """Write what was decided at one freezing stage."""
        if self._writer is None or not decisions:
            return
        step = decisions[0].step
        with self._writer.as_default():
            for name, value in report.scalars().items():
                self._summary.scalar(name, value, step)
            for decision in decisions:
                if not np.isnan(decision.confidence):
                    self._summary.scalar(f"smartfrz/confidence/{decision.layer}", decision.confidence, step)
        if any(decision.action != "keep" for decision in decisions):
            self._picture(report)

    def close(self, report: Report) -> None:
        """Write the last picture."""
        if self._writer is not None and report.num_steps:
            self._picture(report)
            self._writer.close()
            self._writer = None

    def _picture(self, report: Report) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            from smartfrz.plots import plot_report
        except ImportError:
            return  # scalars need no matplotlib
        canvas = FigureCanvasAgg(plot_report(report))
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[None, :, :, :3]
        with self._writer.as_default():
            self._summary.image("smartfrz/layers", pixels, report.num_steps)
