"""Networks at their real size on one GPU: `python -m benchmarks.full_size run|table [--budget SECONDS]`.

ResNet-50 and DeiT-T on pictures of 224 px in batches of 128, BERT-base on 128 tokens in batches of 32: bfloat16
autocast, channels last, all data in the GPU's memory. It is made for ten minutes of one GPU, and is about time, not
accuracy: all weights are random at the start. Pictures come from the folder that SMARTFRZ_DATA names, and so do
sentences; their tokenizer is among what `recipes/fetch.py` fetches.

Two methods train in turns in a process of their own. A line is written as soon as its method is finished, and what is
there is not repeated: a run that is cut off loses at most the pair that it was at, and the next one goes on from there.
The pairs come in the order of what they tell: full training and SmartFRZ of each network first.

A line says how the time splits into data, forward pass, backward pass, optimizer and deciding: what a GPU took between
CUDA events, so that a GPU that waits is counted where it waits; on a CPU by the clock. Nothing of the program waits for
the GPU but the end of a turn.

`--toy` does the same with tiny networks on digits, which a CPU can do, to see that it works. Its lines are no results.
"""

import argparse
import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.arguments import errors_as_messages, lines_of, list_of, positive
from benchmarks.compare import RESULTS, machine, versions
from benchmarks.methods import EARLY, methods_of
from benchmarks.tables import full_size
from benchmarks.tasks import agnews, digits, imagenette
from smartfrz import zoo
from smartfrz.adapters.torch import SmartFRZ
from smartfrz.comparing.engine import TURN, Method, Result
from smartfrz.comparing.lines import add_line, matching, read_lines
from smartfrz.hyperparameters import TrainingSpec
from smartfrz.training import forward, optimizer_of, schedule_factor

PAIRS = (("full", "smartfrz"), ("early-stop-50", "early-stop-70"), ("linear", "autofreeze"))
PARTS = ("data", "forward", "backward", "optimizer", "deciding")
BUDGET = 570  # seconds
WARM_UP = 4  # steps of a network that is thrown away: the GPU chooses its algorithms in them
JUDGED_AT_ONCE = 256
LAST_LOSSES = 20


class Size(NamedTuple):
    """One network, its data and how it is trained.

    Attributes:
        network: Makes the network for a number of classes, with random weights.
        data: Makes training and test data: inputs, a tensor or a dict of tensors, and targets.
        classes: Number of classes.
        training: Optimizer, schedule, batch size and epochs.
    """

    network: Callable[[int], nn.Module]
    data: Callable[[], list[tuple[Any, torch.Tensor]]]
    classes: int
    training: TrainingSpec


# Networks and data


def resnet50(classes):
    """ResNet-50 for pictures of 224 px."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=classes))


def deit_tiny(classes):
    """DeiT-T for pictures of 224 px: patches of 16 px, 12 blocks of width 192 with 3 heads."""
    from recipe_models import VisionTransformer

    return VisionTransformer(224, patch=16, width=192, depth=12, heads=3, num_classes=classes)


def bert_base(classes):
    """The shape of BERT-base."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=classes))


def toy_resnet(classes):
    """A residual network for digits."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=classes)
    return ResNetForImageClassification(config)


def toy_deit(classes):
    """A vision transformer for digits."""
    from recipe_models import VisionTransformer

    return VisionTransformer(16, width=32, depth=2, heads=2, num_classes=classes)


def toy_bert(classes):
    """A BERT that reads the brightness of a digit's pixels as tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=17, max_position_embeddings=64, num_labels=classes, **size)
    )


def photos():
    """Imagenette at 224 px."""
    return [part.tensors for part in imagenette(None, size=224, divisor=64.0)]


def news():
    """AG News, 128 tokens."""
    return [(part.encoded, part.labels) for part in agnews(None, length=128)]


def toy_pictures():
    """128 digits of 16 px."""
    train, test = digits(128)
    return [_stacked(part) for part in (train, test)]


def _stacked(samples):
    pictures, labels = zip(*samples, strict=True)
    return torch.stack(pictures), torch.tensor([int(label) for label in labels])


def toy_tokens():
    """128 digits as 64 tokens each, their brightness."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rows, labels = torch.from_numpy(pixels).long(), torch.from_numpy(labels).long()
    return [({"input_ids": rows[part]}, labels[part]) for part in (slice(0, 128), slice(128, 256))]


_ADAM = {"optimizer": "AdamW", "weight_decay": 0.05, "warmup": 0.1}
SIZES = {
    "resnet50": Size(
        resnet50, photos, 10, TrainingSpec(epochs=10, batch_size=128, learning_rate=0.1, weight_decay=1e-4, warmup=0.1)
    ),
    "deit": Size(deit_tiny, photos, 10, TrainingSpec(epochs=10, batch_size=128, learning_rate=5e-4, **_ADAM)),
    "bert": Size(bert_base, news, 4, TrainingSpec(epochs=1, batch_size=32, learning_rate=5e-5, **_ADAM)),
}
TOYS = {
    "resnet50": Size(toy_resnet, toy_pictures, 10, TrainingSpec(epochs=2, batch_size=16, learning_rate=0.05)),
    "deit": Size(toy_deit, toy_pictures, 10, TrainingSpec(epochs=2, batch_size=16, learning_rate=1e-3, **_ADAM)),
    "bert": Size(toy_bert, toy_tokens, 10, TrainingSpec(epochs=2, batch_size=16, learning_rate=1e-3, **_ADAM)),
}


# Runs


class Split:
    """Adds up how long the parts of training steps take.

    On a GPU it marks places in the stream of work, and waits for it in `collect` alone.

    Args:
        cuda: Whether the work is a GPU's.
    """

    def __init__(self, cuda):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._cuda, self._marks = cuda, []

    def mark(self):
        """End a part of the step, and begin the next; the first mark of a step begins it."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def collect(self):
        """Add the steps since the last call, and wait for them to end."""
        if self._cuda:
            torch.cuda.synchronize()
        steps = [self._marks[i : i + len(PARTS) + 1] for i in range(0, len(self._marks), len(PARTS) + 1)]
        for marks in steps:
            for part, begin, end in zip(PARTS, marks[:-1], marks[1:], strict=True):
                self.seconds[part] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
        self._marks = []


class Batches:
    """Training data on the device, in an order that the seed decides."""

    def __init__(self, inputs, targets, size, seed):
        self._inputs, self._targets, self._size = inputs, targets, size
        self._random = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long, device=targets.device)

    def take(self):
        """The next batch: one index for each tensor, no copy from the host but that of an epoch's order."""
        if len(self._order) < self._size:
            order = torch.randperm(len(self._targets), generator=self._random)
            self._order = order.to(self._targets.device, non_blocking=True)
        chosen, self._order = self._order[: self._size], self._order[self._size :]
        return _part(self._inputs, chosen), self._targets[chosen]


def _part(inputs, chosen):
    if isinstance(inputs, dict):
        return {name: tensor[chosen] for name, tensor in inputs.items()}
    return inputs[chosen].contiguous(memory_format=torch.channels_last)


def on_device(inputs, device):
    """Move inputs to the device, pictures with their channels last."""
    if isinstance(inputs, dict):
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return inputs.to(device, memory_format=torch.channels_last)


class SizedRun:
    """One training of a network by a method. Implements `smartfrz.comparing.engine.Run`.

    Args:
        size: The network and how it is trained.
        data: Training and test data, on the device.
        method: The method.
        seed: Seed of the weights and of the order of samples.
    """

    def __init__(self, size: Size, data: list[tuple[Any, torch.Tensor]], method: Method, seed: int):
        self.method, self._data, spec = method, data, size.training
        (inputs, targets), _ = data
        self._device = targets.device
        self.steps_per_epoch = len(targets) // spec.batch_size
        whole = max(1, round(self.steps_per_epoch * spec.epochs))
        self.total_steps = method.steps(whole)
        self.result = Result(method.name, full_steps=whole)
        self.tell = lambda: None
        torch.manual_seed(seed)
        self.model = size.network(size.classes).to(self._device, memory_format=torch.channels_last)
        self._batches = Batches(inputs, targets, spec.batch_size, seed)
        optimizer = self._optimizer = optimizer_of(self.model, spec)
        of = dataclasses.replace(spec, schedule="constant") if method.own_schedule else spec
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: schedule_factor(of, step / self.total_steps)
        )
        self._freezer = None
        if method.policy is not None:
            options = {"total_steps": self.total_steps, "verbose": False} | dict(method.options)
            self._freezer = SmartFRZ(self.model, optimizer, method.policy(self), **options)
        self._split = Split(self._device.type == "cuda")
        self._losses: list[torch.Tensor] = []
        self._random = self._random_state()
        self.model.train()

    def _random_state(self):
        return torch.get_rng_state(), torch.cuda.get_rng_state() if self._device.type == "cuda" else None

    def advance(self, steps: int) -> bool:
        """Train up to `steps` more steps, wait for the GPU, and return whether there are more to come."""
        on_cpu, on_gpu = self._random  # each run draws its own random numbers, such as those of dropout
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)
        begin = time.process_time()
        for _ in range(min(steps, self.total_steps - self.result.steps)):
            self._step()
        self._split.collect()
        self.result.cpu_seconds += time.process_time() - begin
        self._random = self._random_state()
        self.result.train_seconds = sum(self._split.seconds.values())
        return self.result.steps < self.total_steps

    def _step(self) -> None:
        mark = self._split.mark
        mark()
        inputs, targets = self._batches.take()
        mark()
        loss = self._loss(inputs, targets)
        mark()
        loss.backward()
        mark()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        mark()
        if self._freezer is not None:
            self._freezer.step(loss)
        mark()
        self.result.steps += 1
        self._losses = [*self._losses[1 - LAST_LOSSES :], loss.detach()]

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, torch.bfloat16)

    def _loss(self, inputs: Any, targets: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            logits = forward(self.model, inputs)
        return cross_entropy(logits.float(), targets)

    def finish(self) -> Result:
        """Judge the network on the test data, and return the result."""
        result = self.result
        result.last_loss = float(torch.stack(self._losses).mean())
        if not math.isfinite(result.last_loss):
            result.last_loss = None  # JSON has no NaN
        result.details = {"split": {part: round(value, 6) for part, value in self._split.seconds.items()}}
        if self._freezer is not None:
            report = self._freezer.report()
            result.decision_seconds, result.frozen = report.decision_seconds, dict(report.frozen)
            result.layers = [layer.name for layer in report.layers]
            result.events = list(report.changes)
            self._freezer.close()
        result.accuracy = self._judge(*self._data[1])
        return result

    def _judge(self, inputs: Any, targets: torch.Tensor) -> float:
        self.model.eval()
        right = torch.zeros((), dtype=torch.long, device=self._device)
        with torch.no_grad(), self._autocast():
            for chosen in torch.arange(len(targets), device=self._device).split(JUDGED_AT_ONCE):
                right += (forward(self.model, _part(inputs, chosen)).argmax(1) == targets[chosen]).sum()
        return int(right) / len(targets)


# Measuring


class Setting(NamedTuple):
    """What methods are made for; see `benchmarks.methods.methods_of`.

    Attributes:
        predictor: The predictor.
        device: `cuda` or `cpu`.
    """

    predictor: Any
    device: str


def facts_of(name, setting, toy, seed):
    """What tells the lines of a network from others."""
    size = (TOYS if toy else SIZES)[name]
    known = {"name": setting.predictor.info.name, "sha256": setting.predictor.sha256}
    facts = {"network": name, "toy": toy, "seed": seed, "training": dataclasses.asdict(size.training)}
    return facts | {"predictor": known, "device": setting.device}


def run_pair(name, pair, setting, toy, seed, results):
    """Train the methods of a pair that are missing, in turns, and write their lines."""
    size, facts = (TOYS if toy else SIZES)[name], facts_of(name, setting, toy, seed)
    known = {line["method"] for line in matching(read_lines(results), facts)}
    missing = [method for method in pair if method not in known]
    if not missing:
        return
    torch.backends.cudnn.benchmark = True
    methods = methods_of(setting)
    data = [(on_device(inputs, setting.device), targets.to(setting.device)) for inputs, targets in size.data()]
    SizedRun(size, data, methods["full"], seed).advance(WARM_UP)
    runs = [SizedRun(size, data, methods[method], seed) for method in missing]
    while runs:
        for run in list(runs):
            if not run.advance(TURN):
                runs.remove(run)
                line = facts | run.finish().to_dict()
                line |= line.pop("details")
                add_line(results, line | {"versions": versions(), "machine": machine(setting.device)})


def run_all(options, results):
    """Run each pair of each network in a process of its own until the budget is used up."""
    end = time.monotonic() + options.budget
    for pair in PAIRS:
        for name in options.networks:
            command = [sys.executable, "-m", "benchmarks.full_size", "pair", "--networks", name, "--methods", *pair]
            command += ["--results", str(results), "--predictor", options.predictor, "--device", options.device]
            command += ["--seed", str(options.seed), *(["--toy"] if options.toy else [])]
            left = end - time.monotonic()
            if left <= 0:
                print(f"{name}, {' and '.join(pair)}: no time left", file=sys.stderr)
                continue
            begin = time.monotonic()
            try:
                code = subprocess.run(command, timeout=left, check=False).returncode
                said = "done" if not code else f"left out, it ended with {code}"
            except subprocess.TimeoutExpired:
                said = "cut off, the budget is used up"
            print(
                f"{name}, {' and '.join(pair)}: {said} ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True
            )


@errors_as_messages(OSError)
def main(given=None):
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "pair", "table"), help="`pair` is what `run` starts.")
    parser.add_argument("--networks", type=list_of(SIZES), default=list(SIZES), help="All by default.")
    parser.add_argument("--methods", nargs="+", choices=("full", "smartfrz", "linear", "autofreeze", *EARLY))
    parser.add_argument("--budget", type=positive, default=BUDGET, help="Seconds that all may take together.")
    parser.add_argument("--results", type=Path, help="JSON lines. Default: results/full_size.jsonl; not for --toy.")
    parser.add_argument("--predictor", default=zoo.DEFAULT, help="Name or file.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="Default: the GPU.")
    parser.add_argument("--toy", action="store_true", help="Tiny networks on digits, on a CPU.")
    options = parser.parse_args(given)
    if options.toy and options.results is None:
        parser.error("--toy needs --results FILE: what it writes is no result")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.what != "table" and options.device == "cpu" and not options.toy:
        parser.error("PyTorch sees no GPU, and a CPU would take days. Try it out with --toy --results FILE.")
    results = options.results or RESULTS / "full_size.jsonl"
    lines_of(results)  # a damaged file is found before anything is trained
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.what == "pair":
        setting = Setting(zoo.load(options.predictor), options.device)
        run_pair(options.networks[0], options.methods, setting, options.toy, options.seed, results)
        return
    if options.what == "run":
        run_all(options, results)
    print(full_size(lines_of(results)))


if __name__ == "__main__":
    main()
