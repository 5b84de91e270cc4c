"""What a task of any framework offers to the engine. No framework is needed here."""

import math
import sysconfig
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from smartfrz.comparing.engine import Method, Run
from smartfrz.errors import RecipeError, SmartFRZError

_NOT_THE_USERS = (
    "<",
    str(Path(__file__).parents[1]),
    *filter(None, (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))),
)


class Cost(NamedTuple):
    """What training a task costs.

    Attributes:
        step: Seconds of a step.
        evaluation: Seconds of an evaluation on the validation data.
        steps_per_epoch: Steps in an epoch.
        first_step: Seconds that the first step of a run takes in addition.
    """

    step: float
    evaluation: float
    steps_per_epoch: int
    first_step: float = 0.0


class AnyTask(ABC):
    """A task that can be compared. `smartfrz.comparing.pytorch.Task` and `smartfrz.comparing.keras.Task` are such.

    Attributes:
        steps: Steps of full training.
        batch_size: Samples a step.
        evaluations: How often a run is evaluated on the validation data; None for after each epoch.
        metric: Name of the metric.
        takes_turns: Whether runs can be interrupted after a few steps. If not, they come one after the other.
        note: What the reader of a verdict has to know about the framework's measurements.
    """

    steps: int
    batch_size: int
    evaluations: int | None
    metric: str
    takes_turns: ClassVar[bool] = True
    note: ClassVar[str] = ""

    @abstractmethod
    def check(self, name: str) -> None:
        """Check that the task can be trained.

        Raises:
            RecipeError: If it cannot; the message says what is wrong.
        """

    @abstractmethod
    def num_samples(self, part: str) -> int:
        """Number of samples in `train`, `validation` or `test`."""

    @abstractmethod
    def device_type(self) -> str:
        """Type of the device on which the task is trained: `cpu`, or another one."""

    @abstractmethod
    def chance(self) -> float | None:
        """Return the accuracy that a model which has learned nothing may reach, `chance_level` of the test data's targets.

        None where the metric is not the accuracy over classes that the framework counts itself.
        """

    @abstractmethod
    def cut(self, num_train: int, steps: int, evaluations: int | None) -> Self:
        """Return the task with fewer training samples, chosen at random but always the same, and fewer steps."""

    @abstractmethod
    def measure(self, steps: int) -> Cost:
        """Train for some steps, evaluate once, and return what both take."""

    @abstractmethod
    def start(self, seed: int) -> Callable[[Method], Run]:
        """Return what starts the run of a method; all runs of a seed see the same batches from the same weights."""


def check_numbers(task: AnyTask, name: str) -> None:
    """Check the numbers of steps, samples a step, and evaluations.

    Raises:
        RecipeError: If one is no positive integer.
    """
    for part in ("steps", "batch_size", "evaluations"):
        value = getattr(task, part)
        if value is None and part == "evaluations":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RecipeError(f"The task {name} has {part}={value!r}; expected an integer of at least 1.")


def chance_level(targets: Iterable[Hashable]) -> float:
    """Accuracy of always naming the most frequent class, and two standard errors of that.

    Example:
        >>> round(chance_level([0, 1] * 50), 3)
        0.6
    """
    counts = Counter(targets)
    number = counts.total()
    share = max(counts.values()) / number
    return share + 2 * math.sqrt(share * (1 - share) / number)


def read_metric(judged: Any, method: str, steps: int) -> tuple[float, dict[str, Any]]:
    """Read what a task's `judge` returned: a number, or a number and other facts.

    Raises:
        RecipeError: If the metric is no finite number.
    """
    value, details = judged if isinstance(judged, tuple) and len(judged) == 2 else (judged, {})
    try:
        number = float(value)
        received = str(number)
    except (TypeError, ValueError, RuntimeError):
        number, received = math.nan, type(value).__name__
    if not math.isfinite(number):
        raise RecipeError(
            f"The metric of {method} is {received} after {steps} steps; expected a finite number, the larger the better. "
            "Look at what the task's `judge` returns, and whether training diverged."
        )
    return number, details


@contextmanager
def explained(what: str, *, only_theirs: bool = False) -> Iterator[None]:
    """Say in one line what failed in the user's code, and where.

    Args:
        what: What failed, to begin the message with.
        only_theirs: Whether to leave an error alone that came up without any code of the user's.
    """
    try:
        yield
    except SmartFRZError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
        if only_theirs and not own:
            raise
        last = (own or frames)[-1]
        where = f"{last.filename}, line {last.lineno}"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}, line {error.lineno}"
        raise RecipeError(f"{what}: {type(error).__name__}: {error} ({where}). Make it run by itself first.") from error
