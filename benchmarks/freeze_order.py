"""The three freezing orders beside full training: `python -m benchmarks.freeze_order [--output FILE]`.

Two tasks, three seeds, each with its methods interleaved, a few steps at a time, so that a machine
that gets slower does so for all of them:

- `fashion`: EfficientNet-Lite0 (ImageNet weights) on 2,000 Fashion-MNIST pictures at 64 px, 4 epochs
  of SGD, cosine schedule; 2,000 test pictures.
- `agnews`: MiniLM-L6 (pretrained) on 3,000 news of four topics, 2 epochs of AdamW, linear schedule;
  2,000 test news. Needs `recipes/fetch.py`, and `text/agnews/{dev,test}.tsv` (text, tab, topic) in the
  folder that SMARTFRZ_DATA names.

Prints one JSON line a run, to the file if there is one, and then a table: means and standard
deviations over seeds. Times are of training (batches, both passes, optimizer, freezer), without
evaluation.
"""

import argparse
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.lines import add_line, read_lines
from smartfrz.adapters.torch import SmartFRZ
from smartfrz.demo import DemoOptions, load_data, pretrained_network
from smartfrz.errors import SmartFRZError

METHODS = ("full", "free", "prefix", "cost_aware")
SEEDS = (0, 1, 2)
TURN = 8  # steps
RECIPES = Path(__file__).parent.parent / "recipes"


def fashion(seed):
    """Model, training data, test data, optimizer, schedule and epochs."""
    train, test = load_data(DemoOptions(data="fashion-mnist", num_train=2000, num_test=2000))
    torch.manual_seed(seed)
    model = pretrained_network(10)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-5)
    return model, train, test, optimizer, lambda share: 0.5 * (1 + math.cos(math.pi * share)), 4


def agnews(seed):
    """As `fashion`."""
    sys.path.insert(0, str(RECIPES))
    from recipe_data import _Tokens
    from recipe_models import minilm
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "cache" / "minilm", local_files_only=True)
    folder = Path(os.environ.get("SMARTFRZ_DATA", ".")) / "text" / "agnews"
    topics = ["Business", "Sci/Tech", "Sports", "World"]
    made = []
    for file, number in (("dev.tsv", 3000), ("test.tsv", 2000)):
        rows = [line.rsplit("\t", 1) for line in (folder / file).read_text("utf-8").splitlines()]
        chosen = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:number]]
        texts = [text for text, _ in chosen]
        encoded = tokenizer(texts, truncation=True, max_length=40, padding="max_length", return_tensors="pt")
        made.append(_Tokens(dict(encoded), torch.tensor([topics.index(topic) for _, topic in chosen])))
    torch.manual_seed(seed)
    model = minilm(len(topics))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5, weight_decay=0.01)
    return model, *made, optimizer, lambda share: min(1.0, share / 0.1) * (1 - share), 2


TASKS = {"fashion": fashion, "agnews": agnews}


def logits(model, inputs):
    return model(**inputs).logits if isinstance(inputs, dict) else model(inputs)


class Trainer:
    """One run, a few steps at a time."""

    def __init__(self, task, method, seed):
        self.model, train, self.test, self.optimizer, schedule, epochs = TASKS[task](seed)
        order = torch.Generator().manual_seed(seed)
        self.loader = DataLoader(train, 32, shuffle=True, drop_last=True, generator=order)
        self.total_steps, self.step = len(self.loader) * epochs, 0
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step / self.total_steps)
        )
        self.freezer = None
        if method != "full":
            self.freezer = SmartFRZ(self.model, self.optimizer, total_steps=self.total_steps, freeze_order=method)
        self.batches = iter(())
        self.seconds = 0.0
        self.random = torch.get_rng_state()
        self.model.train()

    def advance(self, steps):
        """Whether there is more to do."""
        torch.set_rng_state(self.random)
        for _ in range(min(steps, self.total_steps - self.step)):
            start = time.perf_counter()
            batch = next(self.batches, None)
            if batch is None:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            inputs, targets = batch
            cross_entropy(logits(self.model, inputs), targets).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.freezer is not None:
                self.freezer.step()
            self.scheduler.step()
            self.seconds += time.perf_counter() - start
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


def run(task, seed, trainers):
    """One line a method."""
    while any([trainer.advance(TURN) for trainer in trainers.values()]):
        pass
    for method, trainer in trainers.items():
        line = {"task": task, "seed": seed, "method": method, "accuracy": trainer.accuracy()}
        line |= {"seconds": trainer.seconds, "share_of_full": trainer.seconds / trainers["full"].seconds}
        if trainer.freezer is not None:
            report = trainer.freezer.report().to_dict()
            line |= {key: report[key] for key in ("num_layers", "frozen", "decision_seconds")}
            for part in ("", "_by_prefix", "_by_interior"):
                line["saved" + part] = report["backward_flops_saved" + part] / report["backward_flops"]
        yield line


def table(lines):
    """Means and standard deviations over seeds."""
    print("| task | order | accuracy | time of full training | backward saved | in the prefix | behind it | layers |")
    print("|" + "---|" * 8)
    for task in TASKS:
        for method in METHODS:
            chosen = [line for line in lines if (line["task"], line["method"]) == (task, method)]
            if not chosen:
                continue

            def cell(key, chosen=chosen):
                values = [100 * line.get(key, 0.0) for line in chosen]
                return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f} %"

            layers = statistics.mean(len(line.get("frozen", ())) for line in chosen)
            cells = [cell(key) for key in ("accuracy", "share_of_full", "saved")]
            cells += [cell("saved_by_prefix").split(" ±")[0] + " %", cell("saved_by_interior").split(" ±")[0] + " %"]
            print(f"| {task} | {method} | {' | '.join(cells)} | {layers:.1f} |")


def main():
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, help="Append one JSON line a run; runs that are there are not repeated.")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    options = parser.parse_args()
    lines = read_lines(options.output)
    for seed in map(int, options.seeds.split(",")):
        for task in options.tasks.split(","):
            if any((line["task"], line["seed"]) == (task, seed) for line in lines):
                continue
            try:
                trainers = {method: Trainer(task, method, seed) for method in METHODS}
            except (OSError, SmartFRZError) as error:
                print(f"{task} is left out: {error}", file=sys.stderr)
                continue
            for line in run(task, seed, trainers):
                lines.append(line)
                add_line(options.output, line)
    table(lines)


if __name__ == "__main__":
    main()
