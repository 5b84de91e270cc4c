"""Measures how long Keras takes to make its training function."""

import math
import statistics
import time
from collections import deque
from typing import Any


class CompileClock:
    """Counts how often the training function was made, and estimates how long that took.

    A function is traced and compiled inside of its first call. Its cost is the time by which that call exceeds others.
    """

    def __init__(self) -> None:
        self._begun = self._ended = 0.0
        self._new = False
        self._first: list[float] = []  # seconds of the first call of each function
        self._others: deque[float] = deque(maxlen=64)

    def note_new_function(self, compiles: bool) -> None:
        """Note that the next call is the first one of a new function."""
        self._new = self._new or compiles

    def call_begins(self) -> None:
        """Note the time before a call of the training function."""
        self._begun = time.perf_counter()

    def call_ended(self) -> None:
        """Note the time after a call of the training function."""
        now = time.perf_counter()
        if self._new:
            self._new = False
            self._first.append(now - self._begun)
        elif self._ended:
            # From end to end: on JAX a call returns before the device is done, and the next one waits for it.
            self._others.append(now - self._ended)
        self._ended = now

    @property
    def usual(self) -> float:
        """Seconds of a call that compiles nothing; 0 if there was none yet."""
        return statistics.median(self._others) if self._others else 0.0

    @property
    def cost(self) -> float:
        """What making the training function cost the first time, in calls, rounded to a power of two.

        Rounding keeps decisions from depending on how busy the machine is.
        """
        if not self._first or not self.usual:
            return 0.0
        return 2.0 ** round(math.log2(max(1.0, self._first[0] / self.usual - 1.0)))

    def facts(self) -> dict[str, Any]:
        """Return the numbers of compilations and their seconds, as `Report` names them."""
        seconds = [max(0.0, first - self.usual) for first in self._first]
        return {
            "num_compilations": len(seconds),
            "compile_seconds": sum(seconds),
            "num_recompilations": max(0, len(seconds) - 1),
            "recompile_seconds": sum(seconds[1:]),
        }
