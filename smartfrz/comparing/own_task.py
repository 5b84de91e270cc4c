"""The user's own PyTorch task: found by name, checked, and cut to what a budget of time allows."""

import hashlib
import inspect
import math
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from smartfrz.comparing.engine import FULL, Method
from smartfrz.comparing.pytorch import Task, TorchRun
from smartfrz.errors import RecipeError, SmartFRZError
from smartfrz.importing import import_callable, importable

FEWEST_STEPS = 100  # of a task that is cut: a predictor that decides at 60 records a run needs some steps
PROBED = 8  # steps that are timed
_NOT_THE_USERS = (
    "<",
    str(Path(__file__).parents[1]),
    *filter(None, (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))),
)
FOLLOWED = 5  # evaluations of a run that is cut


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
    with _explained(f"{place} cannot be imported"):
        build = import_callable(source, folder, "The task")
    return Source(text, folder, build, _version(build))


def _version(build: Callable[..., Any]) -> str:
    try:
        file = inspect.getsourcefile(inspect.unwrap(build))
    except TypeError:  # built in, or an object that can be called
        file = None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else ""


def build_task(source: Source) -> Task:
    """Make the task and check it.

    Raises:
        RecipeError: If the function fails, returns something else, or returns a task that cannot be trained.
    """
    with importable(source.folder), _explained(f"{source.name} failed"):
        task = source.build()
    if not isinstance(task, Task):
        raise RecipeError(
            f"{source.name} returns {type(task).__name__}; expected a smartfrz.comparing.pytorch.Task. Return one; "
            "docs/compare.md has an example."
        )
    check_task(task, source.name)
    return task


def check_task(task: Task, name: str) -> None:
    """Check that a task can be trained.

    Raises:
        RecipeError: If it cannot; the message says what is wrong.
    """
    for part in ("train", "validation", "test"):
        data = getattr(task, part)
        try:
            number = len(data)
        except TypeError as error:
            raise RecipeError(
                f"The task {name} has a `{part}` of type {type(data).__name__} without a length; expected a data set with "
                "__len__ and __getitem__, whose items are (inputs, target). Streams cannot be compared."
            ) from error
        if not number:
            raise RecipeError(
                f"The task {name} has no samples in `{part}`; expected at least one. Look at how they are read."
            )
    for part in ("steps", "batch_size"):
        value = getattr(task, part)
        if not isinstance(value, int) or value < 1:
            raise RecipeError(f"The task {name} has {part}={value!r}; expected an integer of at least 1.")
    with _explained(f"`model` of the task {name} failed"):
        model = task.model(0)
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"`model` of the task {name} returns {type(model).__name__}; expected a function that takes a seed and returns "
            "a torch.nn.Module, as in model=lambda seed: Net()."
        )
    with _explained(f"`optimizer` of the task {name} failed"):
        optimizer = task.optimizer(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RecipeError(
            f"`optimizer` of the task {name} returns {type(optimizer).__name__}; expected a function that takes the model "
            "and returns a torch.optim.Optimizer."
        )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say in one line what failed in the user's code, and where."""
    try:
        yield
    except SmartFRZError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
        last = (own or frames)[-1]
        where = f"{last.filename}, line {last.lineno}"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}, line {error.lineno}"
        raise RecipeError(f"{what}: {type(error).__name__}: {error} ({where}). Make it run by itself first.") from error


def device_name(task: Task) -> str:
    """Type of the device that the task is trained on, `cpu` or `cuda`."""
    return next((parameter.device.type for parameter in task.model(0).parameters()), "cpu")


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

    def of(self, task: Task) -> Task:
        """Cut a task: a part of its training data, chosen at random, and of its steps; epochs stay as many."""
        if self.share == 1.0:
            return task
        number = max(task.batch_size, round(self.share * len(task.train)))  # type: ignore[arg-type]
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        return replace(
            task,
            train=Subset(task.train, order[:number].tolist()),
            steps=max(min(task.steps, FEWEST_STEPS), round(self.share * task.steps)),
            evaluations=self.evaluations,
        )

    def trust(self, seconds: float, task: Task) -> str:
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
            f"Budget of {budget}: {len(cut.train)} of {len(task.train)} training samples and "  # type: ignore[arg-type]
            f"{cut.steps} of {task.steps} steps ({self.share:.0%}). {worth}"
        )


def fit_budget(task: Task, methods: Sequence[Method], seeds: int, seconds: float) -> Part:
    """Measure what a step and an evaluation take, and choose the part of the task whose runs fit into `seconds`.

    Raises:
        RecipeError: If not even the smallest part fits; the message says what would.
    """
    run = TorchRun(replace(task, evaluations=1), FULL, seed=0)
    run.advance(1)
    begin = time.perf_counter()
    before = run.result.steps
    run.advance(PROBED)
    step = (time.perf_counter() - begin) / max(1, run.result.steps - before)
    begin = time.perf_counter()
    run.judge(task.validation)
    look = time.perf_counter() - begin
    epochs = math.ceil(task.steps / run.steps_per_epoch)
    number = min(FOLLOWED, task.evaluations or epochs)
    runs = seeds * len(methods)
    steps = seeds * sum(method.share for method in methods) * task.steps * step
    if steps + runs * (task.evaluations or epochs) * look <= seconds:
        return Part()
    if runs * (number + 1) * look > 0.3 * seconds:
        number = 1
    judging = runs * (number + 1) * look
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
