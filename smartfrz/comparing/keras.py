"""Trains a Keras task with `fit`, on the backend that KERAS_BACKEND names, and measures what it takes."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from smartfrz.adapters.keras import Report, SmartFRZ  # before Keras: it says what to install where that is missing

# isort: split
import keras
import numpy as np

from smartfrz.comparing.engine import FULL, Method, Point, Result
from smartfrz.comparing.tasks import AnyTask, Cost, chance_level, check_numbers, explained, read_metric
from smartfrz.errors import RecipeError

JUDGED_AT_ONCE = 250  # samples
Data = tuple[Any, Any]


@dataclass(frozen=True)
class Task(AnyTask):
    """What is trained, on what, and how.

    Attributes:
        model: Makes a compiled model from a seed and the number of steps of the run, to which its learning rate schedule
            should be stretched. Python's, NumPy's and the backend's random numbers are seeded before.
        train: Pair of inputs and targets: NumPy arrays, or dicts or lists of them, that all begin with the samples.
        validation: Such a pair, on which the run is followed.
        test: Such a pair, on which the trained model is judged; it may be `validation`.
        steps: Steps of full training.
        batch_size: Samples a step.
        judge: Metric of a model on such a pair, the larger the better: a number, or a number and other facts to report.
            None for the compiled metric that is called `metric`.
        evaluations: How often a run is evaluated on `validation`, at ends of epochs; None for after each epoch.
        metric: Name of the metric.
    """

    model: Callable[[int, int], keras.Model]
    train: Data
    validation: Data
    test: Data
    steps: int
    batch_size: int = 32
    judge: Callable[[keras.Model, Data], Any] | None = None
    evaluations: int | None = None
    metric: str = "accuracy"

    takes_turns: ClassVar[bool] = False
    note: ClassVar[str] = (
        f"Keras on {keras.backend.backend()}: runs come one after the other, not in turns, so that another program may have "
        "slowed one of them only. The time up to the end of the first step, where fit traces and compiles, is not counted; "
        "doing that again after freezing is."
    )

    def check(self, name: str) -> None:
        """Check that the task can be trained.

        Raises:
            RecipeError: If it cannot; the message says what is wrong.
        """
        check_numbers(self, name)
        for part in ("train", "validation", "test"):
            _check_data(getattr(self, part), part, name)
        if self.num_samples("train") < self.batch_size:
            raise RecipeError(
                f"The task {name} has {self.num_samples('train')} training samples; expected at least {self.batch_size}, "
                "one batch. Add samples, or lower the batch size."
            )
        with explained(f"`model` of the task {name} failed"):
            model = self.model(0, self.steps)
        if not isinstance(model, keras.Model) or not model.compiled:
            raise RecipeError(
                f"`model` of the task {name} returns {_kind(model)}; expected a function that takes a seed and a number of "
                "steps and returns a keras.Model on which compile() was called."
            )

    def num_samples(self, part: str) -> int:
        """Number of samples in `train`, `validation` or `test`."""
        return len(keras.tree.flatten(getattr(self, part))[0])

    def device_type(self) -> str:
        """`cpu`, or the backend's name of another device."""
        device = str(keras.Variable(0.0).value.device).lower()
        return "cpu" if "cpu" in device else device

    def chance(self) -> float | None:
        """Return what a model that has learned nothing may reach; None unless targets are numbers of classes."""
        targets = self.test[1]
        if (
            self.judge is not None
            or self.metric != "accuracy"
            or getattr(targets, "dtype", np.dtype(float)).kind not in "iu"
        ):
            return None
        return chance_level(np.ravel(targets).tolist())

    def cut(self, num_train: int, steps: int, evaluations: int | None) -> "Task":
        """Return the task with fewer training samples, chosen at random but always the same, and fewer steps."""
        chosen = np.random.default_rng(0).permutation(self.num_samples("train"))[:num_train]
        return replace(self, train=_take(self.train, chosen), steps=steps, evaluations=evaluations)

    def measure(self, steps: int) -> Cost:
        """Train for some steps, evaluate once more, and return what both take."""
        run = KerasRun(replace(self, steps=steps + 1, evaluations=1), FULL, seed=0)
        run.advance(steps + 1)
        begin = time.perf_counter()
        run.evaluate(self.validation)
        look = time.perf_counter() - begin
        step = run.result.train_seconds / steps
        return Cost(step, look, run.steps_per_epoch, max(0.0, run.result.first_step_seconds - step))

    def start(self, seed: int) -> "Callable[[Method], KerasRun]":
        """Return what starts the run of a method."""
        return functools.partial(KerasRun, self, seed=seed)


def _check_data(data: Any, part: str, name: str) -> None:
    expected = (
        "expected a pair of inputs and targets: NumPy arrays, or dicts or lists of them. Streams cannot be compared"
    )
    if not isinstance(data, tuple) or len(data) != 2:
        raise RecipeError(f"The task {name} has a `{part}` of type {_kind(data)}; {expected}.")
    arrays = keras.tree.flatten(data)
    kinds = [type(array).__name__ for array in arrays if not getattr(array, "shape", ())]
    if kinds or not arrays:
        raise RecipeError(
            f"The task {name} has a `{part}` with {kinds[0] if kinds else 'no arrays'} in it; {expected}."
        )
    numbers = sorted({len(array) for array in arrays})
    if len(numbers) > 1:
        raise RecipeError(f"The task {name} has a `{part}` with arrays of {numbers} samples; expected as many in each.")
    if not numbers[0]:
        raise RecipeError(
            f"The task {name} has no samples in `{part}`; expected at least one. Look at how they are read."
        )


def _kind(value: Any) -> str:
    if isinstance(value, keras.Model):
        return "a model that is not compiled"
    return f"tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def _take(data: Data, chosen: Any) -> Any:
    return keras.tree.map_structure(lambda array: np.asarray(array)[chosen], data)


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Full batches in an order that depends on the seed alone: with arrays it would depend on the backend."""

    def __init__(self, task: Task, seed: int):
        super().__init__()
        self._data, self._number = keras.tree.map_structure(np.asarray, task.train), task.num_samples("train")
        self._batch_size = task.batch_size
        self._random = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        return self._number // self._batch_size

    def __getitem__(self, index: int) -> Any:
        return _take(self._data, self._order[index * self._batch_size : (index + 1) * self._batch_size])

    def on_epoch_end(self) -> None:
        self._order = self._random.permutation(self._number)


@dataclass
class KerasResult(Result):
    """Result of a run with Keras. Backward FLOPs are estimated from shapes, and activations are not counted.

    Attributes:
        first_step_seconds: Time that `fit` took up to the end of its first step, which traces and compiles the
            training function. It is not part of `train_seconds`; later traces are.
    """

    first_step_seconds: float = 0.0


class KerasRun(keras.callbacks.Callback):  # type: ignore[misc]
    """One `fit`, which cannot be interrupted. Implements `smartfrz.comparing.engine.Run`.

    Runs of the same task and seed start from the same weights and see the same batches. There is no model before `advance`
    and none after `finish`.

    Args:
        task: The task.
        method: The method; its `share` scales the steps.
        seed: Seed of the weights, the order of samples, dropout and augmentation.
    """

    def __init__(self, task: Task, method: Method, seed: int):
        super().__init__()
        self.task, self.method, self._seed = task, method, seed
        self.tell: Callable[[], None] = lambda: None
        self._batches = _Batches(task, seed)
        self.result = KerasResult(method.name, full_steps=task.steps, total_flops=None)
        self.total_steps = method.steps(task.steps)
        self._network: keras.Model | None = None
        self._freezer: SmartFRZ | None = None
        if method.policy is not None:
            self._freezer = SmartFRZ(method.policy(self), total_steps=self.total_steps, verbose=False, **method.options)
        self._logs: dict[str, Any] = {}
        self._epoch = 0

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in the training data."""
        return len(self._batches)

    def advance(self, steps: int) -> bool:
        """Train to the end, whatever `steps` is."""
        keras.utils.set_random_seed(self._seed)
        self._network = self.task.model(self._seed, self.total_steps)
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        number = self.task.evaluations or epochs
        self._evaluated_after = {math.ceil(epochs * (k + 1) / number) for k in range(number)}
        uses_fit = self.task.judge is None
        self._start()
        self._network.fit(
            self._batches,
            epochs=epochs,
            shuffle=False,  # `_Batches` has done it
            verbose=0,
            callbacks=[callback for callback in (self._freezer, self) if callback is not None],  # the clock is the last
            validation_data=self.task.validation if uses_fit else None,
            validation_batch_size=JUDGED_AT_ONCE if uses_fit else None,
            validation_freq=sorted(self._evaluated_after) if uses_fit else 1,
        )
        return False

    def evaluate(self, data: Data) -> tuple[float, dict[str, Any]]:
        """The task's metric on data, and other facts.

        Raises:
            RecipeError: If the metric is no finite number, or the model was compiled without it.
        """
        if self.task.judge is not None:
            return read_metric(self.task.judge(self._network, data), self.method.name, self.result.steps)
        inputs, targets = data
        model: Any = self._network
        found = model.evaluate(inputs, targets, batch_size=JUDGED_AT_ONCE, verbose=0, return_dict=True)
        return self._metric_in(found), {}

    def _metric_in(self, found: dict[str, Any], prefix: str = "") -> float:
        name = f"{prefix}{self.task.metric}"
        if name not in found:
            known = sorted(key.removeprefix(prefix) for key in found if key.startswith(prefix))
            raise RecipeError(
                f"The model of the task was compiled without the metric {self.task.metric!r}; it has {known}. Give the name "
                "of one as Task(metric=...), or a function of model and data as Task(judge=...)."
            )
        return read_metric(found[name], self.method.name, self.result.steps)[0]

    def finish(self) -> "KerasResult":
        """Judge the trained model on the test data, let it go, and return the result.

        Backward FLOPs are those of a run that freezes; of full training nothing counts them.
        """
        result, task = self.result, self.task
        if task.test is task.validation and result.curve and result.curve[-1].step == result.steps:
            result.accuracy = result.curve[-1].accuracy
        else:
            result.accuracy, result.details = self.evaluate(task.test)
        if self._freezer is not None:
            report = self.report()
            result.decision_seconds, result.frozen = report.decision_seconds, dict(report.frozen)
            result.layers, result.events = [layer.name for layer in report.layers], list(report.changes)
            result.backward_flops = task.batch_size * float(report.backward_flops - report.backward_flops_saved)
        self._network = None
        return result

    def report(self) -> Report:
        """Report of SmartFRZ; empty in full training."""
        return Report() if self._freezer is None else self._freezer.report()

    def _start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def _stop(self, is_first: bool = False) -> None:
        for value in self._logs.values():
            float(value)  # waits for the device
        seconds, cpu_seconds = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        if is_first:
            self.result.first_step_seconds = seconds
        else:
            self.result.train_seconds += seconds
            self.result.cpu_seconds += cpu_seconds

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note which epoch it is, for the number of steps."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count the step; after the first one, begin to count time anew."""
        is_first = not self.result.steps
        self.result.steps = self._epoch * self.steps_per_epoch + batch + 1  # `batch` is the last one of an execution
        self._logs = logs or {}
        if is_first:
            self._stop(is_first=True)
            self._start()
        if self.result.steps >= self.total_steps:
            self.model.stop_training = True  # in the middle of an epoch, perhaps

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Stop the clock."""
        self._stop()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Start the clock."""
        self._start()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note the loss, and the metric on the validation data."""
        self._stop()
        result, found = self.result, logs or {}
        result.last_loss = float(found["loss"])
        if epoch + 1 in self._evaluated_after:
            is_judged = self.task.judge is not None
            value = self.evaluate(self.task.validation)[0] if is_judged else self._metric_in(found, "val_")
            result.curve.append(Point(result.steps, result.cpu_seconds, result.train_seconds, value))
        self.tell()
        self._start()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stop the clock."""
        self._stop()
