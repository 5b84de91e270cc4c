"""Engines make recordings: in processes on this machine, or (`ray_engine.py`) as tasks on a Ray cluster.

This module is the first that a worker process imports, so it imports nothing heavy.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import connection, get_context, parent_process
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smartfrz.dataset_builder.recipes import Recipe


class Message(NamedTuple):
    """Progress of a recording: the recipe's name, the fraction done, in [0, 1], and what is being done."""

    name: str
    fraction: float
    text: str


class Result(NamedTuple):
    """Outcome of a recipe: the place of its recording, or the error."""

    name: str
    place: str
    error: BaseException | None = None


class Engine(Protocol):
    """Records recipes; a recipe whose recording exists is finished at once."""

    def start(self, recipe: Recipe) -> None:
        """Record a recipe as soon as there is room. A reference model that it starts from must be finished."""

    def finished(self, timeout: float) -> list[Result]:
        """Return recordings that have ended since the last call; wait for one for at most `timeout` seconds."""

    def messages(self) -> Iterator[Message]:
        """Return new messages without waiting."""


def record_all(engine: Engine, recipes: Sequence[Recipe]) -> Iterator[Message | Result]:
    """Record recipes, each one after the recipe whose reference model it starts from.

    Yields:
        Progress, and one result for each recipe, as they come.
    """
    waiting = {recipe.name: recipe for recipe in recipes}
    running: set[str] = set()
    while waiting or running:
        unfinished = running | set(waiting)
        for name in [name for name, recipe in waiting.items() if recipe.model.init not in unfinished]:
            engine.start(waiting.pop(name))
            running.add(name)
        results = engine.finished(timeout=0.5)
        yield from engine.messages()
        for result in results:
            running.remove(result.name)
            yield result


class LocalEngine:
    """Records in processes on this machine, which end with the process that started them.

    Args:
        output: Folder of the recordings.
        workers: Number of recipes that are recorded at once.
        threads: PyTorch threads of each; None for PyTorch's own choice.
        device: Device on which PyTorch trains: `"cpu"`, `"cuda"` or `"auto"`.
        costs: Whether to measure what freezing costs.
    """

    def __init__(self, output: Path, workers: int, threads: int | None, device: str = "auto", costs: bool = False):
        self._output, self._threads, self._device, self._costs = output, threads, device, costs
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
        """Submit the recipe to the pool of processes."""
        arguments = recipe, self._output, self._threads, self._device, self._costs, self._messages
        self._running[self._pool.submit(_record, *arguments)] = recipe.name

    def finished(self, timeout: float) -> list[Result]:
        """Return recordings whose processes have finished."""
        results = []
        for future in wait(self._running, timeout, FIRST_COMPLETED).done:
            error = future.exception()
            results.append(Result(self._running.pop(future), "" if error else str(future.result()), error))
        return results

    def messages(self) -> Iterator[Message]:
        """Empty the queue that the processes write to."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield Message(*self._messages.get_nowait())


def _record(recipe: Recipe, output: Path, threads: int | None, device: Any, costs: bool, messages: Any) -> Path:
    import torch

    from smartfrz.dataset_builder.recording import record

    if threads:
        torch.set_num_threads(threads)

    def progress(fraction: float, text: str) -> None:
        messages.put((recipe.name, fraction, text))

    return record(recipe, output, progress, device, costs=costs)


def end_with_parent() -> None:
    """End this process when its parent is killed; else it would go on next to the workers of the next call."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
