"""What the prefix cache saves: `python -m benchmarks.prefix_cache [curve|steps|runs] [--output FILE]`.

`curve`: whether training is the same with it. Pretrained networks with the first half of their layers
frozen and nothing left to chance in them, three shuffled epochs of 256 samples with the cache and
without: the largest difference of two losses. In float64 as well, since training multiplies whatever
a convolution rounds otherwise at another place of a batch.

`steps`: one training step with the first part of a network frozen from the start, without the cache
and with every sample in it. The variants take turns; medians. The tasks are those of
`benchmarks.freeze_order`; what they need is said there.

`runs`: whole runs, `RUN_TASKS` x `METHODS` x seeds. All methods of a task and seed see the same samples
in the same order, in one process, and take turns of a few steps. After them comes `stopped`: full
training with its whole schedule in the share of the time that `cache` took. `seconds` are of training
steps, loading of batches and all that freezing and caching cost included; evaluations are not in them.
The pictures are read from the folder that SMARTFRZ_DATA names, as by the recipes.

Times are CPU seconds of the process, so that other programs on the machine disturb them less, and of one
thread; only `decision_seconds` and the cache's `seconds_saved` are by the clock on the wall. Prints one
JSON line a measurement, and then a table. With `--output` the lines go to a file instead, and what is
in it is not measured again. Runs that are missing there are trained beside those that they are compared
with, whose lines are not written a second time.
"""

import argparse
import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from benchmarks.freeze_order import RECIPES, TASKS, TURN, logits
from benchmarks.keras_fit import cell
from benchmarks.lines import add_line, read_lines
from benchmarks.options import list_of, positive
from smartfrz import __version__
from smartfrz.adapters.torch import PrefixCache, SmartFRZ, trace_layers
from smartfrz.demo import pretrained_network
from smartfrz.errors import SmartFRZError

BATCH = 32
FRACTIONS = (0.25, 0.5, 0.9)
STEPS, BATCHES = 6, 2
VARIANTS = {
    "memory": {"memory": "4GB"},
    "disk": {"memory": 0, "disk": "8GB"},
    "float16": {"memory": "4GB", "dtype": "float16"},
    "int8": {"memory": "4GB", "dtype": "int8"},
}
METHODS = ("full", "smartfrz", "cache", "eager+cache", "prefix+cache", "cost_aware+cache", "stopped")
OPTIONS = {
    "smartfrz": {},
    "cache": {},
    "eager+cache": {"threshold": 0.5},  # layers that are more likely converged than not
    "prefix+cache": {"freeze_order": "prefix"},
    "cost_aware+cache": {"freeze_order": "cost_aware"},
}
COMPARED_WITH = {"cache": {"smartfrz"}, "stopped": {"cache"}}  # besides full training
SAMPLES = ("hits", "advanced", "misses")
PICTURE_SIZE = 64


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


def without_chance(model):
    """No dropout, and no stochastic depth."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if hasattr(model, "_global_params"):  # EfficientNet-Lite
        model._global_params = model._global_params._replace(drop_connect_rate=0.0)


def curve(task):
    """One line for each dtype."""
    for dtype in (torch.float32, torch.float64):
        losses = {}
        for name, cache in (("without", None), ("with", PrefixCache(memory="4GB", profile=False))):
            model, train, optimizer, frozen, layers = frozen_model(task, 0.5)
            without_chance(model.to(dtype))
            freezer = SmartFRZ(model, optimizer, total_steps=10**6, dry_run=True, cache=cache)
            order = torch.Generator().manual_seed(0)
            loader = DataLoader(Subset(train, range(256)), BATCH, shuffle=True, generator=order)
            losses[name] = []
            for inputs, targets in (batch for _ in range(3) for batch in loader):
                inputs = inputs.to(dtype) if isinstance(inputs, torch.Tensor) else inputs
                loss = cross_entropy(logits(model, inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                freezer.step()
                losses[name].append(loss.item())
        use = freezer.report().cache
        freezer.close()
        differences = [abs(a - b) for a, b in zip(losses["with"], losses["without"], strict=True)]
        line = {"what": "curve", "task": task, "dtype": str(dtype), "frozen": frozen, "layers": layers, "cut": use.cut}
        line |= {"largest_difference": max(differences), "of_the_first_half": max(differences[: len(differences) // 2])}
        yield line | {
            "steps": len(differences),
            "first": losses["with"][0],
            "last": losses["with"][-1],
            "hits": use.hits,
        }


class Setup(NamedTuple):
    """What a run trains, on what, and how.

    Attributes:
        model: With pretrained weights and a new head.
        train: Samples `(inputs, target)`.
        test: As `train`.
        optimizer: Of the model's parameters.
        schedule: Done share of the run, in [0, 1], to a factor of the learning rate.
        epochs: Of full training.
        views: As for `PrefixCache.indexed`, of all methods alike.
    """

    model: nn.Module
    train: Dataset
    test: Dataset
    optimizer: torch.optim.Optimizer
    schedule: Callable[[float], float]
    epochs: int
    views: int


@functools.lru_cache(maxsize=2)  # training and test pictures of one task
def photos(name, *splits):
    """Pictures of these splits, float32 `[n, 3, 64, 64]` as EfficientNet-Lite reads them, and labels."""
    sys.path.insert(0, str(RECIPES))
    from recipe_data import archive

    pixels, labels = [], []
    for split in splits:
        pictures, classes = archive(name, split)
        pixels += [np.asarray(picture.resize((PICTURE_SIZE, PICTURE_SIZE))) for picture in pictures]
        labels.append(classes.astype(np.int64))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().contiguous()
    return TensorDataset(images.sub_(127).div_(128), torch.from_numpy(np.concatenate(labels)))


def fine_tuning(seed, train, test, views=1):
    """EfficientNet-Lite0 with ImageNet weights and a new head for ten classes."""
    torch.manual_seed(seed)
    model = pretrained_network(10)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    return Setup(model, train, test, optimizer, lambda share: 0.5 * (1 + math.cos(math.pi * share)), 8, views)


def clothing(seed):
    """3,068 photos of clothing; tested on the 713 of validation and test, on neither of which anything was chosen."""
    name = "clothing_96px_jpeg"
    return fine_tuning(seed, photos(name, "train"), photos(name, "validation", "test"))


def clothing_flip(seed):
    """As `clothing`, each training picture mirrored with probability one half, in two views."""
    plain = clothing(seed)
    from recipe_data import Augmented  # where `photos` found `archive`

    return plain._replace(train=Augmented(*plain.train.tensors, shift=0), views=2)


def imagenette(seed):
    """Ten classes of ImageNet, 3,000 training and 1,000 test pictures.

    The weights were trained on ImageNet, probably on these very training pictures: only the head is new, so
    that this is easier than a task that the network never saw. Test accuracy is low at first all the same (31 %
    after one epoch of a run of one), probably since the statistics of its batch norms follow slowly (momentum 0.01).
    """
    name = "imagenette_224px_subset_3000_1000_jpeg"
    return fine_tuning(seed, photos(name, "train"), photos(name, "val"))


def agnews(seed):
    """As in `benchmarks.freeze_order`, with more epochs, and with the network's dropout as it is."""
    return Setup(*TASKS["agnews"](seed)[:-1], epochs=6, views=1)


RUN_TASKS = {"clothing": clothing, "clothing-flip": clothing_flip, "imagenette": imagenette, "agnews": agnews}


class Runner:
    """One run, a few steps at a time.

    Args:
        task: A name of `RUN_TASKS`.
        method: One of `METHODS`.
        seed: Of the head, the order of samples and dropout, and of the views.
        limits: As in `runs`.
        share: Of the steps of full training; the schedule is scaled.
    """

    def __init__(self, task, method, seed, limits, share=1.0):
        self.model, train, self.test, self.optimizer, schedule, epochs, views = RUN_TASKS[task](seed)
        self.random = torch.get_rng_state()
        self.epochs = limits.get("epochs", epochs)
        self.train_samples = min(len(train), limits.get("train_samples", len(train)))
        indexed = PrefixCache.indexed(Subset(train, range(self.train_samples)), views, seed=seed)
        order = torch.Generator().manual_seed(seed)
        self.loader = DataLoader(indexed, BATCH, shuffle=True, drop_last=True, generator=order)
        self.total_steps, self.step = max(1, round(share * len(self.loader) * self.epochs)), 0
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step / self.total_steps)
        )
        self.freezer = None
        if method in OPTIONS:
            cache = PrefixCache(memory="4GB") if "cache" in method else None
            self.freezer = SmartFRZ(
                self.model, self.optimizer, total_steps=self.total_steps, cache=cache, **OPTIONS[method]
            )
        self.batches, self.seconds, self.losses = iter(()), 0.0, []
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

    def line(self, full_seconds):
        """What is reported; the run is over then."""
        line = {"accuracy": self.accuracy(), "test_samples": len(self.test), "seconds": self.seconds}
        line |= {"share_of_full": self.seconds / full_seconds, "epochs": self.step / len(self.loader)}
        line |= {"steps": self.step, "train_samples": self.train_samples}
        line |= {"last_loss": statistics.mean(self.losses[-20:])}
        if self.freezer is not None:
            report = self.freezer.report().to_dict()
            line |= {key: report[key] for key in ("num_layers", "frozen", "decision_seconds", "cache")}
            self.freezer.close()
        return line

    def accuracy(self):
        """On the test data, in [0, 1]."""
        self.model.eval()
        with torch.no_grad():
            right = sum(int((logits(self.model, x).argmax(1) == y).sum()) for x, y in DataLoader(self.test, 250))
        return right / len(self.test)


def runs(task, seed, methods, limits):
    """One line for each of `methods`.

    `limits` are `epochs` and `train_samples` of shorter runs than the task's own. To what each method is
    compared with, full training first of all, is trained along with it.
    """
    together = {"full", *methods}.union(*(COMPARED_WITH.get(method, ()) for method in methods))
    runners = {method: Runner(task, method, seed, limits) for method in METHODS if method in together - {"stopped"}}
    while any([runner.advance(TURN) for runner in runners.values()]):
        pass
    facts = {"what": "runs", "task": task, "seed": seed, "limits": limits}
    versions = {"versions": {"torch": torch.__version__, "smartfrz": __version__}}
    full_seconds = runners["full"].seconds
    for method, runner in runners.items():
        if method in methods:
            line = facts | {"method": method} | runner.line(full_seconds) | versions
            if method == "cache":
                pairs = zip(runner.losses, runners["smartfrz"].losses, strict=True)
                line["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
            yield line
    if "stopped" in methods:
        share = runners["cache"].seconds / full_seconds
        del runner
        runners.clear()  # room for another one
        stopped = Runner(task, "stopped", seed, limits, share)
        while stopped.advance(TURN):
            pass
        yield facts | {"method": "stopped"} | stopped.line(full_seconds) | versions


def steps_table(lines):
    """Medians, as Markdown."""
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


def runs_table(lines):
    """Means and standard deviations over seeds, as Markdown; differences are taken within a seed."""
    columns = "task | method | seeds | accuracy | difference to full, points | time of full training"
    print(f"| {columns} | samples read | advanced | computed | memory |\n|" + "---|" * 10)
    errors = []
    for task in RUN_TASKS:
        full = {line["seed"]: line for line in lines if (line["task"], line["method"]) == (task, "full")}
        for method in METHODS:
            found = [line for line in lines if (line["task"], line["method"]) == (task, method)]
            if not found:
                continue
            accuracy = cell([100 * line["accuracy"] for line in found], ".1f")
            share = cell([100 * line["share_of_full"] for line in found], ".1f")
            pairs = [(line, full[line["seed"]]) for line in found if line["seed"] in full and method != "full"]
            difference = cell([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs], "+.1f") if pairs else ""
            uses = [line["cache"] for line in found if line.get("cache")]
            use = {key: statistics.mean(use[key] for use in uses) if uses else 0 for key in (*SAMPLES, "memory_bytes")}
            cells = [f"{use[key]:,.0f}" for key in SAMPLES] + [f"{use['memory_bytes'] / 1e6:.0f} MB"]
            start = f"| {task} | {method} | {len(found)} | {accuracy} % | {difference} | {share} % |"
            print(f"{start} {' | '.join(cells if uses else [''] * 4)} |")
        if full:
            right = statistics.mean(line["accuracy"] for line in full.values())
            number = next(iter(full.values()))["test_samples"]
            errors.append(f"{task} {100 * math.sqrt(right * (1 - right) / number):.1f} points ({number:,} samples)")
    if errors:
        print(f"\nStandard error of one accuracy, from the size of the test set: {', '.join(errors)}.")


def main():
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=("curve", "steps", "runs"), help="All by default.")
    parser.add_argument("--output", type=Path, help="Append one JSON line a measurement; those there are not repeated.")
    parser.add_argument("--tasks", type=list_of({**TASKS, **RUN_TASKS}), help="All by default.")
    parser.add_argument("--methods", type=list_of(METHODS), default=METHODS, help="Of runs; all by default.")
    parser.add_argument("--seeds", default="0", help="Of runs.")
    parser.add_argument("--epochs", type=positive, help="Of each run, to try something out.")
    parser.add_argument("--train-samples", type=positive, help="At most, in each run, to try something out.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = {"epochs": options.epochs, "train_samples": options.train_samples}
    limits = {key: value for key, value in given.items() if value is not None}
    lines = read_lines(options.output)
    jobs = []
    for what, measure in (("curve", curve), ("steps", steps)):
        for task in TASKS if options.what in (what, None) else ():
            if task in (options.tasks or TASKS) and not any((li["what"], li["task"]) == (what, task) for li in lines):
                jobs.append((task, measure, ()))
    for task in RUN_TASKS if options.what in ("runs", None) else ():
        for seed in map(int, options.seeds.split(",")):
            same = [li for li in lines if (li["task"], li.get("seed"), li.get("limits")) == (task, seed, limits)]
            missing = [method for method in options.methods if method not in [li["method"] for li in same]]
            if task in (options.tasks or RUN_TASKS) and missing:
                jobs.append((task, runs, (seed, missing, limits)))
    for task, measure, arguments in jobs:
        try:
            for line in measure(task, *arguments):
                lines.append(line)
                add_line(options.output, line)
        except (OSError, SmartFRZError) as error:
            print(f"{task} is left out: {error}", file=sys.stderr)
    for line in lines:
        if line["what"] == "curve" and options.what in ("curve", None):
            start, whole = line["of_the_first_half"], line["largest_difference"]
            print(f"{line['task']}, {line['dtype']}: {line['steps']} losses differ by {whole:.1e} at most, the first")
            print(f"half of them by {start:.1e}; the loss fell from {line['first']:.2f} to {line['last']:.2f}")
    if options.what in ("steps", None):
        steps_table([line for line in lines if line["what"] == "steps"])
    if options.what in ("runs", None):
        runs_table([line for line in lines if line["what"] == "runs" and line["limits"] == limits])


if __name__ == "__main__":
    main()
