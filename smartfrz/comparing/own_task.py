"""The user's own task: found by name, checked, and cut to what a budget of time allows. No framework is needed here."""

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from smartfrz.comparing.engine import Method
from smartfrz.comparing.tasks import AnyTask, explained
from smartfrz.errors import RecipeError
from smartfrz.importing import import_callable, importable

FEWEST_STEPS = 100  # of a task that is cut: a predictor that decides at 60 records a run needs some steps
PROBED = 8  # steps that are timed
FOLLOWED = 5  # evaluations of a run that is cut
SomeTask = TypeVar("SomeTask", bound=AnyTask)


@dataclass(frozen=True)
class Source:
    """Where a task comes from.

    Attributes:
        name: What the user wrote.
        folder: Folder in which its modules are found.
        build: Makes the task.
        version: Changes with the task, so that runs of another one are told apart.
    """

    name: str
    folder: Path
    build: Callable[[], Any]
    version: str


def find_task(text: str, here: Path) -> Source:
    """Find the function that `module:callable` or `file.py:callable` names.

    Args:
        text: The name.
        here: Folder in which modules are looked up first.

    Raises:
        RecipeError: If there is no such file, module or function, or the module fails.
    """
    place, colon, attribute = text.rpartition(":")
    folder, source = here, text
    if place.endswith(".py"):
        file = here / place
        if not file.is_file():
            raise RecipeError(
                f"{text!r} names the file {str(file)!r}, which does not exist. Give the path of your task's file."
            )
        folder, source = file.resolve().parent, f"{file.stem}:{attribute}"
    elif not colon or not place or not attribute:
        raise RecipeError(
            f"{text!r} names no task; expected module:callable or file.py:callable, for example mytask.py:build. It is "
            "called without arguments and returns a smartfrz.comparing.pytorch.Task."
        )
    with explained(f"{place} cannot be imported"):
        build = import_callable(source, folder, "The task")
    return Source(text, folder, build, _version(build))


def _version(build: Callable[..., Any]) -> str:
    try:
        file = inspect.getsourcefile(inspect.unwrap(build))
    except TypeError:  # built in, or an object that can be called
        file = None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else ""


def build_task(source: Source) -> AnyTask:
    """Make the task and check it.

    Raises:
        RecipeError: If the function fails, returns something else, or returns a task that cannot be trained.
    """
    with importable(source.folder), explained(f"{source.name} failed"):
        task = source.build()
    if not isinstance(task, AnyTask):
        raise RecipeError(
            f"{source.name} returns {type(task).__name__}; expected a smartfrz.comparing.pytorch.Task or a "
            "smartfrz.comparing.keras.Task. Return one; docs/compare.md has an example."
        )
    with importable(source.folder):
        task.check(source.name)
    return task


def duration(seconds: float) -> str:
    """Show a time as `--budget` takes it, rounded up.

    Example:
        >>> duration(60), duration(90), duration(5400)
        ('1m', '90s', '1.5h')
    """
    if seconds < 120 and seconds != 60:
        return f"{math.ceil(seconds)}s"
    return f"{math.ceil(seconds / 60)}m" if seconds < 3600 else f"{math.ceil(seconds / 360) / 10:g}h"


@dataclass(frozen=True)
class Part:
    """What a budget leaves of a task.

    Attributes:
        share: Share of the training data and of the steps, in (0, 1].
        evaluations: See `Task`.
    """

    share: float = 1.0
    evaluations: int | None = None

    def of(self, task: SomeTask) -> SomeTask:
        """Cut a task: a part of its training data, chosen at random, and of its steps; epochs stay as many."""
        if self.share == 1.0:
            return task
        number = max(task.batch_size, round(self.share * task.num_samples("train")))
        steps = max(min(FEWEST_STEPS, task.steps), round(self.share * task.steps))
        return task.cut(number, steps, self.evaluations)

    def trust(self, seconds: float, task: AnyTask) -> str:
        """Say how far the result of the part can be believed."""
        budget = duration(seconds)
        if self.share == 1.0:
            return f"The whole task fits into the budget of {budget}: nothing was cut."
        cut = self.of(task)
        if self.share >= 0.5:
            worth = (
                "Expect the whole task to look much the same, but confirm an accuracy that matters without --budget."
            )
        elif self.share >= 0.15:
            worth = (
                "The share of the time is a guess for the whole task, whose longer runs may save more; the accuracies come "
                "from less data and fewer steps. Believe which way a difference goes, not its size."
            )
        else:
            worth = "So small a part shows that it runs, and what a step costs. Take no decision from its accuracies."
        return (
            f"Budget of {budget}: {cut.num_samples('train')} of {task.num_samples('train')} training samples and "
            f"{cut.steps} of {task.steps} steps ({self.share:.0%}). {worth}"
        )


def fit_budget(task: AnyTask, methods: Sequence[Method], seeds: int, seconds: float) -> Part:
    """Measure what a step and an evaluation take, and choose the part of the task whose runs fit into `seconds`.

    Raises:
        RecipeError: If not even the smallest part fits; the message says what would.
    """
    step, look, steps_per_epoch, first_step = task.measure(PROBED)
    epochs = math.ceil(task.steps / steps_per_epoch)
    number = min(FOLLOWED, task.evaluations or epochs)
    runs = seeds * len(methods)
    begin = runs * first_step
    steps = seeds * sum(method.share for method in methods) * task.steps * step
    if begin + steps + runs * (task.evaluations or epochs) * look <= seconds:
        return Part()
    if runs * (number + 1) * look > 0.3 * seconds:
        number = 1
    judging = begin + runs * (number + 1) * look
    smallest = min(1.0, FEWEST_STEPS / task.steps)
    share = (seconds - judging) / steps
    if share < smallest:
        needed = judging + smallest * steps
        raise RecipeError(
            f"A budget of {duration(seconds)} is too short for {runs} runs: {min(FEWEST_STEPS, task.steps)} steps of each "
            f"and judging them take about {duration(needed)}. Give --budget {duration(1.2 * needed)}, fewer "
            "methods, or fewer seeds."
        )
    return Part(min(1.0, round(share, 3) or share), number)
