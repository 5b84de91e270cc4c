"""Requests of several jobs that wait at the same time are run as one."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from smartfrz.predictor.contract import UNKNOWN_POSITION
from smartfrz.predictor.runtime import Prediction

MAX_WAIT_SECONDS = 60.0  # a client has given up by then, and asks again: do not work through what nobody reads


class Predicts(Protocol):
    """What a batcher needs of a `Predictor`."""

    def predict(
        self, history: NDArray[np.float32], lengths: NDArray[np.int64], position: NDArray[np.float32] | None = None
    ) -> Prediction:
        """Confidence and attention."""
        ...


class Overloaded(Exception):
    """A request waited for too long; another attempt may find a shorter queue."""


@dataclass(eq=False)
class _Question:
    history: NDArray[np.float32]
    lengths: NDArray[np.int64]
    position: NDArray[np.float32] | None
    answer: "asyncio.Future[Prediction]"
    arrived: float = field(default_factory=time.monotonic)

    @property
    def window(self) -> int:
        return self.history.shape[1]


class Batcher:
    """Asks a predictor about the layers of several requests at once.

    While a run goes on, requests gather, and the next run takes them together: the more jobs ask, the
    larger the runs. Windows of different lengths are left-padded to the longest one, which the
    `lengths` tell the predictor; only windows of which none is more than twice as long as another are
    run together, since padding costs as much as records do.

    Args:
        predictor: Asked from threads, perhaps from several at once.
        max_batch: Layers in a run. A request of more is a run of its own.
        max_delay: Seconds that a request waits for others if nothing else keeps it waiting.
        threads: Runs at the same time.
        on_run: Told how many requests and how many layers each run has.
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
        """Requests that no run has taken yet."""
        return len(self._waiting)

    async def ask(
        self, history: NDArray[np.float32], lengths: NDArray[np.int64], position: NDArray[np.float32] | None = None
    ) -> Prediction:
        """As `Predictor.predict`; the arguments must have been checked.

        Raises:
            Overloaded: If it waited for more than `MAX_WAIT_SECONDS`.
        """
        question = _Question(history, lengths, position, asyncio.get_running_loop().create_future())
        async with self._arrival:
            self._waiting.append(question)
            self._arrival.notify_all()
        return await question.answer

    async def close(self) -> None:
        """Stop. What still waits is not answered."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for question in self._waiting:
            question.answer.cancel()
        self._pool.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next()
            self._on_run(len(batch), sum(len(question.history) for question in batch))
            try:
                answers = await loop.run_in_executor(self._pool, self._run, batch)
            except Exception as error:  # whoever asked is told
                for question in batch:
                    if not question.answer.done():
                        question.answer.set_exception(error)
                continue
            for question, answer in zip(batch, answers, strict=True):
                if not question.answer.done():
                    question.answer.set_result(answer)

    async def _next(self) -> list[_Question]:
        """The requests of the next run: the oldest one, and those that fit to it."""
        async with self._arrival:
            batch: list[_Question] = []
            while not batch:
                await self._arrival.wait_for(lambda: self._waiting)
                self._take(batch)
            until = batch[0].arrived + self._max_delay
            while (left := until - time.monotonic()) > 0 and self._room(batch):
                try:
                    await asyncio.wait_for(self._arrival.wait(), left)
                except TimeoutError:
                    break
                self._take(batch)
            return batch

    def _room(self, batch: Sequence[_Question]) -> int:
        return self._max_batch - sum(len(question.history) for question in batch)

    def _take(self, batch: list[_Question]) -> None:
        """Move to the batch, in the order of arrival, what waits and fits."""
        left: deque[_Question] = deque()
        room = self._room(batch)
        windows = [question.window for question in batch]
        oldest = time.monotonic() - MAX_WAIT_SECONDS
        for question in self._waiting:
            together = [*windows, question.window]
            if question.answer.done():  # whoever asked has gone
                continue
            if question.arrived < oldest:
                question.answer.set_exception(Overloaded())
            elif not batch or (len(question.history) <= room and max(together) <= 2 * min(together)):
                batch.append(question)
                windows = together
                room -= len(question.history)
            else:
                left.append(question)
        self._waiting = left

    def _run(self, batch: Sequence[_Question]) -> list[Prediction]:
        if len(batch) == 1:
            return [self._predictor.predict(batch[0].history, batch[0].lengths, batch[0].position)]
        longest = max(question.window for question in batch)
        num_layers = sum(len(question.history) for question in batch)
        history = np.zeros((num_layers, longest, batch[0].history.shape[2]), np.float32)
        ends = itertools.accumulate(len(question.history) for question in batch)
        parts = [slice(end - len(question.history), end) for question, end in zip(batch, ends, strict=True)]
        for question, part in zip(batch, parts, strict=True):
            history[part, longest - question.window :] = question.history
        position = None
        if any(question.position is not None for question in batch):
            position = np.full(num_layers, UNKNOWN_POSITION, np.float32)
            for question, part in zip(batch, parts, strict=True):
                position[part] = UNKNOWN_POSITION if question.position is None else question.position
        lengths = np.concatenate([question.lengths for question in batch])
        answer = self._predictor.predict(history, lengths, position)
        return [
            Prediction(answer.confidence[part], answer.attention[part, longest - question.window :])
            for question, part in zip(batch, parts, strict=True)
        ]
