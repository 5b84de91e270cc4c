"""Trains a PyTorch task a few steps at a time, and measures what it takes."""

import copy
import functools
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from smartfrz.adapters.torch import PrefixCache, SmartFRZ
from smartfrz.adapters.torch.costs import measure_step
from smartfrz.adapters.torch.norms import RecentNorms
from smartfrz.comparing.engine import FULL, Method, Point, Result
from smartfrz.comparing.tasks import AnyTask, Cost, chance_level, check_numbers, explained, read_metric
from smartfrz.control.options import FreezeOptions
from smartfrz.errors import RecipeError
from smartfrz.training import Loss, classification_loss, device_of, endless, evaluate, to_device, train_step

LAST_LOSSES = 20  # steps whose mean loss is reported
JUDGED_AT_ONCE = 250  # samples
COUNTED = 2000  # samples of which the classes are counted, spread over the test data
Judge = Callable[[nn.Module, Dataset[Any]], float | tuple[float, dict[str, Any]]]


def judge_accuracy(model: nn.Module, data: Dataset[Any]) -> tuple[float, dict[str, Any]]:
    """Share of right answers; there are no details."""
    return evaluate(model, data, JUDGED_AT_ONCE), {}


def constant(progress: float) -> float:
    """A learning rate that does not change."""
    return 1.0


@dataclass(frozen=True)
class Task(AnyTask):
    """What is trained, on what, and how.

    Attributes:
        model: Makes the model from a seed, on the device on which it is trained. The random numbers of training
            (dropout, augmentation) continue from the global generator as this leaves it.
        optimizer: Makes the optimizer of a model.
        train: Training samples `(inputs, target)`; inputs that are a dict are spread over the model's arguments.
        validation: Samples on which the run is followed.
        test: Samples on which the trained model is judged; it may be `validation`.
        steps: Steps of full training.
        batch_size: Samples a step.
        schedule: Learning rate as a fraction of its peak, from the fraction of the run that is done.
        warmup: What is left of `schedule` for methods that bring their own.
        loss: Loss of a batch, from the model, inputs and targets.
        judge: Metric of a model on data, the larger the better: a number, or a number and other facts to report. It may
            leave the model in eval mode.
        evaluations: How often a run is evaluated on `validation`; None for after each epoch.
        metric: Name of what `judge` returns.
        norm_batches: Number of last batches whose statistics the trained model's batch norms are judged with; 0 for their
            running statistics as they are, which lag. A method that freezes norms is flattered by those.
    """

    model: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    steps: int
    batch_size: int = 32
    schedule: Callable[[float], float] = constant
    warmup: Callable[[float], float] = constant
    loss: Loss = classification_loss
    judge: Judge = judge_accuracy
    evaluations: int | None = None
    metric: str = "accuracy"
    # As a norm that SmartFRZ freezes has: pretrained networks may remember hundreds of steps, which flatters freezing.
    norm_batches: int = FreezeOptions().norm_batches

    def check(self, name: str) -> None:
        """Check that the task can be trained.

        Raises:
            RecipeError: If it cannot; the message says what is wrong.
        """
        for part in ("train", "validation", "test"):
            _check_data(getattr(self, part), part, name)
        check_numbers(self, name)
        with explained(f"`model` of the task {name} failed"):
            model = self.model(0)
        if not isinstance(model, nn.Module):
            raise RecipeError(
                f"`model` of the task {name} returns {type(model).__name__}; expected a function that takes a seed and "
                "returns a torch.nn.Module, as in model=lambda seed: Net()."
            )
        with explained(f"`optimizer` of the task {name} failed"):
            optimizer = self.optimizer(model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise RecipeError(
                f"`optimizer` of the task {name} returns {type(optimizer).__name__}; expected a function that takes the "
                "model and returns a torch.optim.Optimizer."
            )
        self._check_loss(model, name)

    def _check_loss(self, model: nn.Module, name: str) -> None:
        number = min(self.batch_size, self.num_samples("train"))
        with explained(f"`train` of the task {name} cannot be put into batches"):
            batch = default_collate([self.train[index] for index in range(number)])
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            received = f"{len(batch)} parts" if isinstance(batch, (list, tuple)) else type(batch).__name__
            raise RecipeError(
                f"The samples in `train` of the task {name} have {received}; expected pairs (inputs, target). Inputs may "
                "be a dict, which is spread over the model's arguments."
            )
        with explained(f"`loss` of the task {name} failed on a batch of {number} samples"):
            value = self.loss(model.train(), *to_device(batch, device_of(model)))
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            received = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise RecipeError(
                f"`loss` of the task {name} returns {received}; expected a tensor with one number that depends on the "
                "model's weights, such as a mean over the batch."
            )

    def num_samples(self, part: str) -> int:
        """Number of samples in `train`, `validation` or `test`."""
        return len(getattr(self, part))

    def device_type(self) -> str:
        """Type of the device that the model is on, such as `cpu` or `cuda`."""
        return device_of(self.model(0)).type

    def chance(self) -> float | None:
        """Return what a model that has learned nothing may reach; None for a metric of the task's own."""
        if self.judge is not judge_accuracy:
            return None
        number = len(self.test)  # type: ignore[arg-type]
        return chance_level(int(self.test[index][1]) for index in range(0, number, math.ceil(number / COUNTED)))

    def cut(self, num_train: int, steps: int, evaluations: int | None) -> "Task":
        """Return the task with fewer training samples, chosen at random but always the same, and fewer steps."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        chosen = Subset(self.train, order[:num_train].tolist())
        return replace(self, train=chosen, steps=steps, evaluations=evaluations)

    def measure(self, steps: int) -> Cost:
        """Train for some steps, evaluate once, and return what both take."""
        run = TorchRun(replace(self, evaluations=1), FULL, seed=0)
        run.advance(1)
        begin, before = time.perf_counter(), run.result.steps
        run.advance(steps)
        step = (time.perf_counter() - begin) / max(1, run.result.steps - before)
        begin = time.perf_counter()
        run.judge(self.validation)
        return Cost(step, time.perf_counter() - begin, run.steps_per_epoch)

    def start(self, seed: int) -> "Callable[[Method], TorchRun]":
        """Return what starts the run of a method."""
        return functools.partial(TorchRun, self, seed=seed)


def _check_data(data: Any, part: str, name: str) -> None:
    try:
        number = len(data)
    except TypeError as error:
        raise RecipeError(
            f"The task {name} has a `{part}` of type {type(data).__name__} without a length; expected a data set with "
            "__len__ and __getitem__, whose items are (inputs, target). Streams cannot be compared."
        ) from error
    if isinstance(data, DataLoader) or not hasattr(data, "__getitem__"):
        raise RecipeError(
            f"The task {name} has a `{part}` of type {type(data).__name__}; expected a data set with __len__ and "
            "__getitem__, whose items are (inputs, target), and not a loader of batches. Give the loader's `dataset`."
        )
    if not number:
        raise RecipeError(
            f"The task {name} has no samples in `{part}`; expected at least one. Look at how they are read."
        )


class TorchRun:
    """One training of a task by a method. Implements `smartfrz.comparing.engine.Run`.

    Runs of the same task and seed start from the same weights and see the same batches.

    Args:
        task: The task.
        method: The method.
        seed: Seed of the weights, the order of samples, dropout and augmentation.
        watch: Called with the run before its first step and after each evaluation, outside of the clock.
    """

    def __init__(self, task: Task, method: Method, seed: int, watch: Callable[["TorchRun"], None] = lambda run: None):
        self.task, self.method, self._watch = task, method, watch
        self.tell: Callable[[], None] = lambda: None  # not called: `advance` does a few steps
        self.result = Result(method.name, full_steps=task.steps, total_flops=0 if method.cache is None else None)
        self.total_steps = method.steps(task.steps)
        torch.manual_seed(seed)
        self.model = task.model(seed)
        self._cuda = device_of(self.model).type == "cuda"
        self._random = self._random_state()
        self._loader = self._make_loader(seed)
        self._batches = endless(self._loader)
        self._evaluated_after = self._evaluation_steps()
        self.optimizer = task.optimizer(self.model)
        schedule = task.warmup if method.own_schedule else task.schedule
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step / self.total_steps)
        )
        self._freezer = self._make_freezer()
        self._losses: list[float] = []
        self._norms = RecentNorms(self.model)
        self._norms_noted_after = max(0, self.total_steps - task.norm_batches) if task.norm_batches else None
        watch(self)
        self.model.train()
        self._look_after_norms()

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in the training data."""
        return len(self._loader)

    def _make_loader(self, seed: int) -> DataLoader[Any]:
        task, order = self.task, torch.Generator().manual_seed(seed)
        indexed = PrefixCache.indexed(task.train, seed=seed)
        loader: DataLoader[Any] = DataLoader(indexed, task.batch_size, shuffle=True, drop_last=True, generator=order)
        if not len(loader):
            raise RecipeError(
                f"The task has {len(indexed)} training samples; expected at least {task.batch_size}, one batch. "
                "Add samples, or lower the batch size."
            )
        return loader

    def _make_freezer(self) -> SmartFRZ | None:
        method = self.method
        if method.policy is None:
            return None
        return SmartFRZ(
            self.model,
            self.optimizer,
            method.policy(self),
            total_steps=self.total_steps,
            cache=None if method.cache is None else method.cache(),
            verbose=False,
            **method.options,
        )

    def _evaluation_steps(self) -> set[int]:
        number = self.task.evaluations
        if number is None:
            return {*range(self.steps_per_epoch, self.total_steps, self.steps_per_epoch), self.total_steps}
        return {math.ceil(self.total_steps * (k + 1) / number) for k in range(number)}

    def _random_state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.get_rng_state(), torch.cuda.get_rng_state() if self._cuda else None

    def _random_numbers_kept(self) -> AbstractContextManager[None]:
        """Leave the random numbers of training as they are; even a DataLoader draws one."""
        return torch.random.fork_rng([torch.cuda.current_device()] if self._cuda else [])

    def advance(self, steps: int) -> bool:
        """Train up to `steps` more steps, and return whether there are more to come."""
        cpu_state, cuda_state = self._random  # each run draws its own random numbers
        torch.set_rng_state(cpu_state)
        others = 0
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated()
        for _ in range(min(steps, self.total_steps - self.result.steps)):
            self._step()
        if self._cuda:
            peak = torch.cuda.max_memory_allocated() - others
            self.result.peak_device_bytes = max(peak, self.result.peak_device_bytes or 0)
        self._random = self._random_state()
        self.result.last_loss = self._last_loss()
        return self.result.steps < self.total_steps

    def _last_loss(self) -> float | None:
        last = self._losses[-LAST_LOSSES:]
        return sum(last) / len(last) if last else None

    def _step(self) -> None:
        result, start = self.result, self._clock()
        ids, *batch = next(self._batches)
        inputs, targets = to_device(batch, device_of(self.model))
        if not result.steps:
            self._count(inputs, targets)
            start = self._clock()
        with self._named(ids):  # a prefix cache then knows the samples
            loss = train_step(self.model, inputs, targets, self.task.loss, self.optimizer)
        changed = False
        if self._freezer is not None:
            changed = any(decision.action in ("freeze", "thaw") for decision in self._freezer.step(loss))
        self._scheduler.step()
        end = self._clock()
        result.cpu_seconds += end[0] - start[0]
        result.train_seconds += end[1] - start[1]
        result.steps += 1
        result.backward_flops += self._work.backward_flops
        if result.total_flops is not None:
            result.total_flops += self._work.forward_flops + self._work.backward_flops
        self._losses.append(loss.item())
        if changed:
            self._count(inputs, targets)
        self._look_after_norms()
        if result.steps in self._evaluated_after:
            self._evaluate()

    def _look_after_norms(self) -> None:
        if self._norms_noted_after is not None and self.result.steps == self.total_steps:
            self._norms.correct()
        elif self.result.steps == self._norms_noted_after:
            self._norms.note()

    def _named(self, ids: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._freezer is None else self._freezer.batch(ids)

    def _clock(self) -> tuple[float, float]:
        if self._cuda:
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def _count(self, inputs: Any, targets: Any) -> None:
        """Count one step's FLOPs and activations, on a copy and outside of the clock."""
        twin = copy.deepcopy(self.model)
        with self._random_numbers_kept():
            self._work = measure_step(twin, lambda: self.task.loss(twin, inputs, targets))
        self.result.activation_bytes[self.result.steps] = self._work.activation_bytes
        self._note_memory()

    def _note_memory(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        kept = [*self.model.parameters(), *self.model.buffers(), *trained]  # gradients are as large as weights
        kept += [x for x in tree_leaves(dict(self.optimizer.state)) if isinstance(x, torch.Tensor)]
        size = self._work.activation_bytes
        if self._freezer is not None:
            kept += kept_gradients(self._freezer)
            use = self._freezer.report().cache
            size += 0 if use is None else use.memory_bytes
        size += sum(tensor.numel() * tensor.element_size() for tensor in kept)
        self.result.memory.append((self.result.steps, size))

    def _evaluate(self) -> None:
        result = self.result
        self._note_memory()
        self._judged = accuracy, _ = self.judge(self.task.validation)
        result.curve.append(Point(result.steps, result.cpu_seconds, result.train_seconds, accuracy))
        self._watch(self)
        self.model.train()

    def judge(self, data: Dataset[Any]) -> tuple[float, dict[str, Any]]:
        """The task's metric on data, and other facts; the model is in eval mode afterwards.

        Raises:
            RecipeError: If the metric is no finite number.
        """
        self.model.eval()
        with self._random_numbers_kept():
            judged = self.task.judge(self.model, data)
        return read_metric(judged, self.method.name, self.result.steps)

    def finish(self) -> Result:
        """Judge the trained model on the test data, release the freezer, and return the result."""
        result = self.result
        is_judged = self.task.test is self.task.validation and result.curve[-1].step == result.steps
        result.accuracy, result.details = self._judged if is_judged else self.judge(self.task.test)
        result.last_loss = self._last_loss()
        if self._freezer is not None:
            report = self._freezer.report()
            result.decision_seconds, result.frozen = report.decision_seconds, dict(report.frozen)
            result.layers = [layer.name for layer in report.layers]
            result.events = list(report.changes)
            result.cache = report.to_dict()["cache"]
            self._freezer.close()
        return result


def kept_gradients(freezer: SmartFRZ) -> list[torch.Tensor]:
    """Gradients that a freezer keeps: their sums for AutoFreeze, the latest ones for GradES."""
    if freezer.adapter is None:
        return []
    latest = freezer.adapter.gradient_change_state().get("latest", {})
    return [*freezer.adapter.gradient_state().values(), *latest.values()]
