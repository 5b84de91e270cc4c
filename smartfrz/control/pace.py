"""How fast training steps were, and how much time freezing saved by that measure."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

# Fewer intervals than this may all hold an evaluation, which says nothing about training steps.
_ENOUGH = 3


class Interval(NamedTuple):
    """The training steps between two records.

    Attributes:
        step: The step at which the interval ends.
        steps: Number of steps in it.
        seconds: Wall time of one of them, on average.
        frozen: Number of layers that SmartFRZ kept frozen meanwhile.
    """

    step: int
    steps: int
    seconds: float
    frozen: int


class Saving(NamedTuple):
    """What freezing did to the wall time of a run.

    Attributes:
        before: Seconds of a step while nothing was frozen; the median of the intervals.
        after: Seconds of a step with the layers frozen that were frozen last; the median of the intervals.
        seconds: Seconds saved in all the steps that were measured; below 0 if freezing cost time.
    """

    before: float
    after: float
    seconds: float


class Pace:
    """Measures steps from one record to the next.

    The first record starts the measurement, so that what happens once in a run (tracing, compiling, filling caches) is
    left out of it.

    Attributes:
        intervals: What was measured so far, oldest first.
    """

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        self._last: tuple[int, float] | None = None
        self._frozen = 0

    def note(self, step: int, frozen: int) -> None:
        """Note that a record was taken.

        Args:
            step: Steps so far.
            frozen: Number of layers that are frozen from now on.
        """
        now = time.perf_counter()
        if self._last is not None and step > self._last[0]:
            steps = step - self._last[0]
            self.intervals.append(Interval(step, steps, (now - self._last[1]) / steps, self._frozen))
        self._last, self._frozen = (step, now), frozen


def measure_saving(intervals: Sequence[Interval], overhead: float) -> Saving | None:
    """Compare the steps of a run while nothing was frozen with the steps later.

    Evaluations and checkpoints fall into some intervals and lengthen them, so medians are compared: of the intervals in
    which nothing was frozen, and of the intervals for each number of frozen layers. Where there are fewer than three of
    these, they count as no slower than the steps before.

    Args:
        intervals: What was measured.
        overhead: Seconds that SmartFRZ itself took, which are deducted.

    Returns:
        None if nothing was frozen in any interval, or if nothing was measured before layers froze.
    """
    groups: dict[int, list[Interval]] = {}
    for interval in intervals:
        groups.setdefault(interval.frozen, []).append(interval)
    whole = groups.pop(0, [])
    if len(whole) < 2 or not groups:
        return None
    before = statistics.median(interval.seconds for interval in whole)
    saved, after = -overhead, before
    for frozen, members in groups.items():
        pace = statistics.median(interval.seconds for interval in members)
        if len(members) < _ENOUGH:
            pace = min(pace, before)
        saved += (before - pace) * sum(interval.steps for interval in members)
        if frozen == intervals[-1].frozen:
            after = pace
    return Saving(before, after, saved)
