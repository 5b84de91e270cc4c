"""How the statistics of a frozen batch norm are best kept: `python -m benchmarks.batch_norm`.

EfficientNet-Lite0 (batch norm momentum 0.01) is fine-tuned on Fashion-MNIST at 64 px; the first
half of its layers is frozen at a fifth of training, three ways: `running`: its running statistics as
they are; `corrected`: averaged over the 24 batches before (the default of SmartFRZ); `batch`: not
put to eval, so that it goes on using each batch's own. Three seeds; prints test accuracy in %.
"""

import math
import statistics
import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from smartfrz.adapters.torch import TorchAdapter, trace_layers
from smartfrz.demo import DemoOptions, accuracy, load_data, pretrained_network

SEEDS = (0, 1, 2)
METHODS = ("running", "corrected", "batch")
OPTIONS = DemoOptions(data="fashion-mnist", num_train=1200, num_test=1000, epochs=2, batch_size=16)
BATCHES = 24


def train(method: str, seed: int, options: DemoOptions = OPTIONS) -> float:
    """Test accuracy in [0, 1] of one run."""
    train_data, test_data = load_data(options)
    torch.manual_seed(seed)
    model = pretrained_network(10)
    optimizer = torch.optim.SGD(model.parameters(), options.learning_rate, momentum=0.9, weight_decay=1e-5)
    loader = DataLoader(train_data, options.batch_size, shuffle=True, drop_last=True)
    total = len(loader) * options.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / total)))
    model.eval()
    layers = trace_layers(model, torch.zeros(1, 3, 64, 64))
    adapter = TorchAdapter(model, [optimizer], layers)
    first_half = adapter.layers()[: len(layers) // 2]
    model.train()
    moment, step = max(BATCHES + 1, round(0.2 * total)), 0
    for _ in range(options.epochs):
        for inputs, targets in loader:
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if step == moment - BATCHES and method == "corrected":
                adapter.snapshot_statistics()
            if step == moment:
                adapter.freeze(first_half)
                if method == "batch":
                    _back_to_batch_statistics(adapter, first_half)
    return accuracy(model, test_data)


def _back_to_batch_statistics(adapter: TorchAdapter, layers: list[str]) -> None:
    for layer in layers:
        for norm in adapter._norms[layer]:
            adapter._kept_in_eval.pop(norm)
            del norm.__dict__["train"]
            nn.Module.train(norm)


def main():
    """Measure and print."""
    print("| statistics of frozen batch norms | mean | standard deviation | by seed |\n|---|---|---|---|")
    for method in METHODS:
        values = []
        for seed in SEEDS:
            values.append(100 * train(method, seed))
            print(f"{method}, seed {seed}: {values[-1]:.2f}", file=sys.stderr, flush=True)
        by_seed = ", ".join(f"{v:.2f}" for v in values)
        print(f"| {method} | {statistics.mean(values):.2f} | {statistics.stdev(values):.2f} | {by_seed} |", flush=True)


if __name__ == "__main__":
    main()
