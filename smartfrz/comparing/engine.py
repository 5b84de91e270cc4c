"""Methods, runs and results, and the loop that trains several runs in turns. No framework is needed here."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

TURN = 10  # steps
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Method:
    """One way to train a task. Without a policy it is full training.

    Attributes:
        name: Name in results.
        policy: Makes what decides about freezing, from the run: a predictor's name or file, a predictor, or a policy.
        options: Further arguments of `SmartFRZ`.
        cache: Makes the prefix cache, one for each run.
        share: Steps as a share of the task's; the learning rate schedule is scaled with them.
        own_schedule: Whether the policy brings its own learning rate schedule, in the place of the task's.
    """

    name: str
    policy: Callable[[Any], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: Callable[[], Any] | None = None
    share: float = 1.0
    own_schedule: bool = False

    def steps(self, full_steps: int) -> int:
        """Number of steps where full training has `full_steps`."""
        return max(1, round(self.share * full_steps))


FULL = Method("full training")


class Point(NamedTuple):
    """One evaluation in the course of a run: seconds are training time up to there."""

    step: int
    cpu_seconds: float
    train_seconds: float
    accuracy: float


@dataclass
class Result:
    """What a run took and reached: plain data, which `to_dict` turns into JSON.

    Attributes:
        method: Name of the method.
        steps: Steps done.
        full_steps: Steps of full training.
        accuracy: The task's metric on its test data, at the end.
        details: What else the task's judge said about the test data.
        train_seconds: Training time by the wall clock: batches, both passes, optimizer, and all that freezing costs;
            no evaluation, no counting.
        cpu_seconds: Processor time of the process during `train_seconds`.
        decision_seconds: Part of `train_seconds` spent recording, deciding and freezing.
        backward_flops: FLOPs of all backward passes.
        total_flops: FLOPs of all passes; None with a cache, whose batches differ in what is computed.
        activation_bytes: Memory kept for the backward pass, by the step at which it was counted.
        memory: Pairs of step and bytes: weights, gradients, optimizer, activations, and what the method keeps.
        peak_device_bytes: Largest memory on the GPU, if the run was on one.
        curve: Evaluations on the validation data.
        last_loss: Mean loss of the last steps.
        layers: Names of all layers in execution order, if the method freezes.
        frozen: Layers that were frozen at the end, and the steps at which they were.
        events: Triples of step, action and layer.
        cache: What the prefix cache did, if there is one.
    """

    method: str
    steps: int = 0
    full_steps: int = 0
    accuracy: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    train_seconds: float = 0.0
    cpu_seconds: float = 0.0
    decision_seconds: float = 0.0
    backward_flops: float = 0
    total_flops: float | None = 0
    activation_bytes: dict[int, int] = field(default_factory=dict)
    memory: list[tuple[int, int]] = field(default_factory=list)
    peak_device_bytes: int | None = None
    curve: list[Point] = field(default_factory=list)
    last_loss: float | None = None
    layers: list[str] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    events: list[tuple[int, str, str]] = field(default_factory=list)
    cache: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


class Run(Protocol):
    """One training of a task by a method, which a framework implements.

    Attributes:
        result: What it took and reached so far.
        total_steps: Steps in all.
        tell: Called after each epoch by a run that cannot be interrupted; whoever wants to follow it sets this.
    """

    result: Result
    total_steps: int
    tell: Callable[[], None]

    def advance(self, steps: int) -> bool:
        """Train up to `steps` more steps, and return whether there are more to come.

        A framework whose training loop cannot be interrupted trains to the end.
        """
        ...

    def finish(self) -> Result:
        """Judge the trained model, release what the run holds, and return its result."""
        ...


def take_turns(runs: Sequence[Run], progress: Progress = lambda fraction, text: None) -> None:
    """Train all runs to the end, `TURN` steps each at a time.

    A machine that gets slower or faster meanwhile does so for all of them.

    Args:
        runs: The runs.
        progress: Called after each turn with the fraction that is done, and the accuracies so far.
    """
    total, active = sum(run.total_steps for run in runs), list(runs)
    while active:
        for run in list(active):
            if not run.advance(TURN):
                active.remove(run)
            accuracies = [f"{r.result.method} {r.result.curve[-1].accuracy:.1%}" for r in runs if r.result.curve]
            progress(sum(r.result.steps for r in runs) / total, "   ".join(accuracies))


def compare(
    start: Callable[[Method], Run],
    methods: Iterable[Method],
    known: Collection[str] = (),
    progress: Progress = lambda fraction, text: None,
) -> Iterator[Result]:
    """Train a task by several methods, in turns.

    Args:
        start: Makes the run of a method; all runs must see the same data in the same order.
        methods: The methods.
        known: Names of methods whose results exist already; they are left out.
        progress: See `take_turns`.

    Yields:
        The result of each method, in order.
    """
    runs = [start(method) for method in methods if method.name not in known]
    take_turns(runs, progress)
    while runs:
        yield runs.pop(0).finish()
