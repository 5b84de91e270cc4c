"""Where recordings are made: in processes on this machine, or (`ray_engine.py`) as tasks of a Ray cluster."""

import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smartfrz.dataset_builder.processes import end_with_parent
from smartfrz.dataset_builder.recipes import Recipe


class Message(NamedTuple):
    """How far a recording is: the recipe's name, the fraction done, in [0, 1], and what is being done."""

    name: str
    fraction: float
    text: str


class Result(NamedTuple):
    """What became of a recipe: the place of its recording, or why there is none."""

    name: str
    place: str
    error: BaseException | None = None


class Engine(Protocol):
    """Records recipes. What is finished already, as its files say, is not recorded again."""

    def start(self, recipe: Recipe) -> None:
        """Have a recipe recorded, as soon as there is room. Reference models that it starts from have to be there."""

    def finished(self, timeout: float) -> list[Result]:
        """Recordings that have ended since the last call; waits for one for at most `timeout` seconds."""

    def messages(self) -> Iterator[Message]:
        """What is new, without waiting."""


class LocalEngine:
    """Processes on this machine, which end with the one that started them.

    Args:
        output: Folder of the recordings.
        workers: How many recipes at once.
        threads: PyTorch threads of each; None for PyTorch's own choice.
        device: Where PyTorch trains, as `recording.record` takes it.
    """

    def __init__(self, output: Path, workers: int, threads: int | None, device: str = "auto"):
        self._output, self._threads, self._device = output, threads, device
        context = get_context("spawn")  # forked workers deadlock in PyTorch's threads
        self._manager = SyncManager(ctx=context)
        self._manager.start(end_with_parent)
        self._messages = self._manager.Queue()
        self._pool = ProcessPoolExecutor(workers, context, end_with_parent)
        self._running: dict[Future[Path], str] = {}

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._manager.shutdown()

    def start(self, recipe: Recipe) -> None:
        """As `Engine.start`."""
        arguments = recipe, self._output, self._threads, self._device, self._messages
        self._running[self._pool.submit(_record, *arguments)] = recipe.name

    def finished(self, timeout: float) -> list[Result]:
        """As `Engine.finished`."""
        results = []
        for future in wait(self._running, timeout, FIRST_COMPLETED).done:
            error = future.exception()
            results.append(Result(self._running.pop(future), "" if error else str(future.result()), error))
        return results

    def messages(self) -> Iterator[Message]:
        """As `Engine.messages`."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield Message(*self._messages.get_nowait())


def _record(recipe: Recipe, output: Path, threads: int | None, device: Any, messages: Any) -> Path:
    import torch

    from smartfrz.dataset_builder.recording import record

    if threads:
        torch.set_num_threads(threads)
    return record(recipe, output, lambda fraction, text: messages.put((recipe.name, fraction, text)), device)
