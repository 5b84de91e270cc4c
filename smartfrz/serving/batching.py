"""Runs the requests of several jobs that wait at the same time as one batch."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from smartfrz.predictor.contract import UNKNOWN_LOSS, UNKNOWN_POSITION
from smartfrz.predictor.runtime import Prediction

MAX_WAIT_SECONDS = 60.0  # by then a client has given up and asked again


class Predicts(Protocol):
    """The part of a `Predictor` that a batcher needs."""

    def predict(
        self,
        history: NDArray[np.float32],
        lengths: NDArray[np.int64],
        position: NDArray[np.float32] | None = None,
        loss: NDArray[np.float32] | None = None,
    ) -> Prediction:
        """Return confidence and attention."""
        ...


class Overloaded(Exception):
    """A request waited for too long; another attempt may find a shorter queue."""


@dataclass(eq=False)
class _Question:
    history: NDArray[np.float32]
    lengths: NDArray[np.int64]
    position: NDArray[np.float32] | None
    loss: NDArray[np.float32] | None
    answer: "asyncio.Future[Prediction]"
    arrived: float = field(default_factory=time.monotonic)

    @property
    def num_layers(self) -> int:
        return self.history.shape[0]

    @property
    def window(self) -> int:
        return self.history.shape[1]


class Batcher:
    """Asks a predictor about the layers of several requests at once.

    Requests gather while a run is going on, and the next run takes them together: the more jobs ask, the larger the runs.
    Shorter windows are padded on the left, which `lengths` tells the predictor. Padding costs as much as records do, so
    windows of which one is more than twice as long as another are not run together.

    Args:
        predictor: The predictor; it is called from threads, perhaps several at once.
        max_batch: Maximum number of layers in a run. A larger request is a run of its own.
        max_delay: Seconds that a request waits for others if nothing else keeps it waiting.
        threads: Number of runs at the same time.
        on_run: Called with the numbers of requests and layers of each run.
    """

    def __init__(
        self,
        predictor: Predicts,
        *,
        max_batch: int,
        max_delay: float,
        threads: int,
        on_run: Callable[[int, int], None] = lambda requests, layers: None,
    ):
        self._predictor = predictor
        self._max_batch = max_batch
        self._max_delay = max_delay
        self._on_run = on_run
        self._waiting: deque[_Question] = deque()
        self._arrival = asyncio.Condition()
        self._pool = ThreadPoolExecutor(threads, "smartfrz-run")
        self._workers = [asyncio.create_task(self._work()) for _ in range(threads)]

    @property
    def num_waiting(self) -> int:
        """Number of requests that no run has taken yet."""
        return len(self._waiting)

    async def ask(
        self,
        history: NDArray[np.float32],
        lengths: NDArray[np.int64],
        position: NDArray[np.float32] | None = None,
        loss: NDArray[np.float32] | None = None,
    ) -> Prediction:
        """Return the answer of `Predictor.predict` to arguments that have been checked.

        Raises:
            Overloaded: If the request waited for more than `MAX_WAIT_SECONDS`.
        """
        question = _Question(history, lengths, position, loss, asyncio.get_running_loop().create_future())
        async with self._arrival:
            self._waiting.append(question)
            self._arrival.notify_all()
        return await question.answer

    async def close(self) -> None:
        """Stop, and cancel the requests that still wait."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for question in self._waiting:
            question.answer.cancel()
        self._pool.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            self._on_run(len(batch), _count_layers(batch))
            try:
                answers = await loop.run_in_executor(self._pool, self._run, batch)
            except Exception as error:  # raised again where each request is awaited
                for question in batch:
                    if not question.answer.done():
                        question.answer.set_exception(error)
                continue
            for question, answer in zip(batch, answers, strict=True):
                if not question.answer.done():
                    question.answer.set_result(answer)

    async def _next_batch(self) -> list[_Question]:
        """Wait for a request, and for `max_delay` for others that fit to it."""
        async with self._arrival:
            batch: list[_Question] = []
            while not batch:
                await self._arrival.wait_for(lambda: self._waiting)
                self._move_fitting(batch)
            until = batch[0].arrived + self._max_delay
            while (left := until - time.monotonic()) > 0 and _count_layers(batch) < self._max_batch:
                try:
                    await asyncio.wait_for(self._arrival.wait(), left)
                except TimeoutError:
                    break
                self._move_fitting(batch)
            return batch

    def _move_fitting(self, batch: list[_Question]) -> None:
        """Move the waiting requests that fit into the batch, in the order of their arrival."""
        oldest = time.monotonic() - MAX_WAIT_SECONDS
        left: deque[_Question] = deque()
        for question in self._waiting:
            if question.answer.done():  # the client has gone
                continue
            if question.arrived < oldest:
                question.answer.set_exception(
                    Overloaded(f"The request waited for more than {MAX_WAIT_SECONDS:.0f} seconds. Try again later.")
                )
            elif not batch or self._fits(question, batch):
                batch.append(question)
            else:
                left.append(question)
        self._waiting = left

    def _fits(self, question: _Question, batch: Sequence[_Question]) -> bool:
        windows = [other.window for other in (*batch, question)]
        return _count_layers((*batch, question)) <= self._max_batch and max(windows) <= 2 * min(windows)

    def _run(self, batch: Sequence[_Question]) -> list[Prediction]:
        if len(batch) == 1:
            (only,) = batch
            return [self._predictor.predict(only.history, only.lengths, only.position, only.loss)]
        window = max(question.window for question in batch)
        ends = np.cumsum([question.num_layers for question in batch])
        history = np.zeros((ends[-1], window, batch[0].history.shape[2]), np.float32)
        for question, end in zip(batch, ends, strict=True):
            history[end - question.num_layers : end, window - question.window :] = question.history
        lengths = np.concatenate([question.lengths for question in batch])
        answer = self._predictor.predict(history, lengths, _join_positions(batch), _join_losses(batch, window))
        confidence, attention = (np.split(array, ends[:-1]) for array in answer)
        return [
            Prediction(c, a[:, window - question.window :])
            for question, c, a in zip(batch, confidence, attention, strict=True)
        ]


def _count_layers(batch: Sequence[_Question]) -> int:
    return sum(question.num_layers for question in batch)


def _join_positions(batch: Sequence[_Question]) -> NDArray[np.float32] | None:
    if all(question.position is None for question in batch):
        return None
    unknown = [np.full(question.num_layers, UNKNOWN_POSITION, np.float32) for question in batch]
    return np.concatenate([u if q.position is None else q.position for q, u in zip(batch, unknown, strict=True)])


def _join_losses(batch: Sequence[_Question], window: int) -> NDArray[np.float32] | None:
    if all(question.loss is None for question in batch):
        return None
    losses = [np.full((question.num_layers, window), UNKNOWN_LOSS, np.float32) for question in batch]
    for question, loss in zip(batch, losses, strict=True):
        if question.loss is not None:
            loss[:, window - question.window :] = question.loss
    return np.concatenate(losses)
