"""What the prefix cache saves: `python -m benchmarks.prefix_cache [steps|runs] [--output FILE]`.

`steps`: one training step with the first part of a network frozen from the start, without the cache
and with every sample in it. The variants take turns; medians.

`runs`: whole runs with SmartFRZ, the variants interleaved, a few steps at a time. The tasks are those
of `benchmarks.freeze_order` (EfficientNet-Lite0 on Fashion-MNIST, MiniLM on AG News; what they need
is said there), with more epochs, since only an epoch behind the first one after freezing gains.

Times are CPU seconds of the process, so that other programs on the machine disturb them less. Prints
one JSON line a measurement, and then a table.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from benchmarks.freeze_order import TASKS, TURN, logits
from smartfrz.adapters.torch import PrefixCache, SmartFRZ, trace_layers
from smartfrz.errors import SmartFRZError

BATCH = 32
FRACTIONS = (0.25, 0.5, 0.9)
STEPS, BATCHES = 6, 2
EPOCHS = {"fashion": 6, "agnews": 4}
VARIANTS = {
    "memory": {"memory": "4GB"},
    "disk": {"memory": 0, "disk": "8GB"},
    "float16": {"memory": "4GB", "dtype": "float16"},
    "int8": {"memory": "4GB", "dtype": "int8"},
}
RUNS = ("full", "smartfrz", "memory", "int8")


def cache_of(variant, folder, **options):
    if variant not in VARIANTS:
        return None
    place = {"folder": Path(folder) / variant} if variant == "disk" else {}
    return PrefixCache(**VARIANTS[variant], **place, **options)


def frozen_model(task, fraction):
    """The task's model with the first part of its layers frozen, its training data and its optimizer."""
    model, train, _, optimizer, _, _ = TASKS[task](0)
    inputs, _ = next(iter(DataLoader(train, 2)))
    arguments, keywords = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    layers = trace_layers(model.eval(), *arguments, **keywords)
    model.train()
    chosen = layers[: round(fraction * len(layers))]
    for layer in chosen:
        for name in layer.parameters:
            model.get_parameter(name).requires_grad_(False)
        for name in layer.norms:
            norm = model.get_submodule(name).eval()
            norm.train = lambda mode=True, norm=norm: norm
    return model, train, optimizer, len(chosen), len(layers)


class Stepper:
    """Steps of one variant over the same few batches."""

    def __init__(self, task, fraction, variant, folder):
        self.model, train, self.optimizer, self.frozen, self.layers = frozen_model(task, fraction)
        cache = cache_of(variant, folder, profile=False)
        self.freezer = SmartFRZ(self.model, self.optimizer, total_steps=10**6, dry_run=True, cache=cache)
        self.batches = list(DataLoader(PrefixCache.indexed(Subset(train, range(BATCH * BATCHES))), BATCH))
        self.seconds = []

    def step(self, number):
        """One; the first ones are not timed."""
        ids, inputs, targets = self.batches[number % BATCHES]
        start = time.process_time()
        with self.freezer.batch(ids):
            output = logits(self.model, inputs)
        cross_entropy(output, targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.freezer.step()
        if number >= 2 * BATCHES:
            self.seconds.append(time.process_time() - start)


def steps(task):
    """One line for each fraction and variant."""
    for fraction in FRACTIONS:
        with tempfile.TemporaryDirectory() as folder:
            steppers = {variant: Stepper(task, fraction, variant, folder) for variant in ("none", *VARIANTS)}
            for number in range(2 * BATCHES + STEPS):
                for stepper in steppers.values():
                    stepper.step(number)
            for variant, stepper in steppers.items():
                use, cache = stepper.freezer.report().cache, stepper.freezer._cache
                line = {"what": "steps", "task": task, "fraction": fraction, "variant": variant}
                line |= {"frozen": stepper.frozen, "layers": stepper.layers}
                line |= {"step_ms": 1000 * statistics.median(stepper.seconds)}
                if use is not None:
                    line |= {"cut": use.cut, "row_bytes": cache._now.store.row_bytes if cache._now else None}
                    line |= {"hits": use.hits, "reason": use.reason}
                stepper.freezer.close()
                yield line


class Runner:
    """One run, a few steps at a time."""

    def __init__(self, task, variant, seed, folder):
        self.model, train, self.test, self.optimizer, schedule, _ = TASKS[task](seed)
        order = torch.Generator().manual_seed(seed)
        self.loader = DataLoader(PrefixCache.indexed(train), BATCH, shuffle=True, drop_last=True, generator=order)
        self.total_steps, self.step = len(self.loader) * EPOCHS[task], 0
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step / self.total_steps)
        )
        self.freezer = None
        if variant != "full":
            cache = cache_of(variant, folder)
            self.freezer = SmartFRZ(self.model, self.optimizer, total_steps=self.total_steps, cache=cache)
        self.batches, self.seconds, self.losses = iter(()), 0.0, []
        self.random = torch.get_rng_state()
        self.model.train()

    def advance(self, number):
        """Whether there is more to do."""
        torch.set_rng_state(self.random)
        for _ in range(min(number, self.total_steps - self.step)):
            start = time.process_time()
            batch = next(self.batches, None)
            if batch is None:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            ids, inputs, targets = batch
            if self.freezer is None:
                output = logits(self.model, inputs)
            else:
                with self.freezer.batch(ids):
                    output = logits(self.model, inputs)
            loss = cross_entropy(output, targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.freezer is not None:
                self.freezer.step()
            self.scheduler.step()
            self.losses.append(loss.item())
            self.seconds += time.process_time() - start
            self.step += 1
        self.random = torch.get_rng_state()
        return self.step < self.total_steps

    def accuracy(self):
        """On the test data, in [0, 1]."""
        self.model.eval()
        with torch.no_grad():
            return statistics.mean(
                float((logits(self.model, x).argmax(1) == y).float().mean()) for x, y in DataLoader(self.test, 250)
            )


def runs(task, seed):
    """One line a variant."""
    with tempfile.TemporaryDirectory() as folder:
        runners = {variant: Runner(task, variant, seed, folder) for variant in RUNS}
        while any([runner.advance(TURN) for runner in runners.values()]):
            pass
        for variant, runner in runners.items():
            line = {"what": "runs", "task": task, "seed": seed, "variant": variant, "accuracy": runner.accuracy()}
            line |= {"seconds": runner.seconds, "share_of_full": runner.seconds / runners["full"].seconds}
            line |= {"last_loss": statistics.mean(runner.losses[-20:]), "epochs": EPOCHS[task]}
            if runner.freezer is not None:
                report = runner.freezer.report().to_dict()
                line |= {key: report[key] for key in ("num_layers", "frozen", "cache")}
                plain = runners["smartfrz"].losses
                line["largest_loss_difference"] = max(abs(a - b) for a, b in zip(runner.losses, plain, strict=True))
                runner.freezer.close()
            yield line


def table(lines):
    """Both measurements, as Markdown."""
    chosen = [line for line in lines if line["what"] == "steps"]
    if chosen:
        names = ("none", *VARIANTS)
        print(f"| task | frozen | {' | '.join(names)} | bytes a sample |\n|" + "---|" * (len(names) + 3))
    for task in TASKS:
        for fraction in FRACTIONS:
            found = {line["variant"]: line for line in chosen if (line["task"], line["fraction"]) == (task, fraction)}
            if found:
                cells = [f"{found[name]['step_ms']:.0f} ms" for name in names]
                size = found["memory"]["row_bytes"]
                print(
                    f"| {task} | {found['none']['frozen']} of {found['none']['layers']} | {' | '.join(cells)} | {size} |"
                )
    chosen = [line for line in lines if line["what"] == "runs"]
    if chosen:
        print("| task | run | seeds | accuracy | time of full training | hits | cache |\n|" + "---|" * 7)
    for task in TASKS:
        for variant in RUNS:
            found = [line for line in chosen if (line["task"], line["variant"]) == (task, variant)]
            if found:
                means = [100 * statistics.mean(line[key] for line in found) for key in ("accuracy", "share_of_full")]
                hits = round(statistics.mean((line.get("cache") or {}).get("hits", 0) for line in found))
                size = statistics.mean((line.get("cache") or {}).get("memory_bytes", 0) for line in found) / 1e6
                print(
                    f"| {task} | {variant} | {len(found)} | {means[0]:.1f} % | {means[1]:.1f} % | {hits} | {size:.0f} MB |"
                )


def main():
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=("steps", "runs"), help="Both by default.")
    parser.add_argument("--output", type=Path, help="Append one JSON line a measurement; those there are not repeated.")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, help="Of each run.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    EPOCHS.update(dict.fromkeys(EPOCHS, options.epochs) if options.epochs else {})
    lines = []
    if options.output and options.output.exists():
        lines = [json.loads(line) for line in options.output.read_text().splitlines()]
    jobs = []
    for task in options.tasks.split(","):
        if options.what != "runs" and not any((li["what"], li["task"]) == ("steps", task) for li in lines):
            jobs.append((task, steps, ()))
        for seed in map(int, options.seeds.split(",")):
            done = any((li["what"], li["task"], li.get("seed")) == ("runs", task, seed) for li in lines)
            if options.what != "steps" and not done:
                jobs.append((task, runs, (seed,)))
    for task, measure, arguments in jobs:
        try:
            for line in measure(task, *arguments):
                lines.append(line)
                print(json.dumps(line), file=sys.stderr, flush=True)
                if options.output:
                    with options.output.open("a") as file:
                        file.write(json.dumps(line) + "\n")
        except (OSError, SmartFRZError) as error:
            print(f"{task} is left out: {error}", file=sys.stderr)
    table(lines)


if __name__ == "__main__":
    main()
