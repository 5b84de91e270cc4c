"""SmartFRZ beside full training that stops earlier: `python -m benchmarks.equal_time`.

Fashion-MNIST, 1,200 training and 1,000 test pictures at 64 px, EfficientNet-Lite0, 4 epochs, three
seeds. Full training and SmartFRZ take turns, as in the demo. Then full training again with as many
epochs as fit in SmartFRZ's share of the time, its schedule scaled: what a user would do with the
same time. Prints a line a seed, and means with standard deviations.
"""

import dataclasses
import statistics

import torch

from smartfrz.demo import FULL, DemoOptions, _Trainer, load_data, pretrained_network, run_demo

SEEDS = (0, 1, 2)
OPTIONS = DemoOptions(data="fashion-mnist", num_train=1200, num_test=1000, epochs=4, batch_size=16)


def earlier(options: DemoOptions, share: float) -> float:
    """Accuracy of full training in a share of the epochs."""
    options = dataclasses.replace(options, epochs=options.epochs * share)
    train, test = load_data(options)
    torch.manual_seed(options.seed)
    trainer = _Trainer(FULL, pretrained_network(10), train, test, options)
    while trainer.advance(100):
        pass
    return trainer.run.accuracy


def main():
    """Measure and print."""
    rows = []
    print("| seed | full training | SmartFRZ | stopped earlier | time of SmartFRZ | backward FLOPs |\n|" + "---|" * 6)
    for seed in SEEDS:
        options = dataclasses.replace(OPTIONS, seed=seed)
        full, freezing = run_demo(options)
        share = freezing.seconds / full.seconds
        stopped = earlier(options, share)
        accuracies = [100 * value for value in (full.accuracy, freezing.accuracy, stopped)]
        rows.append([*accuracies, 100 * share, 100 * freezing.backward_flops / full.backward_flops])
        print(f"| {seed} | " + " | ".join(f"{v:.2f} %" for v in rows[-1]) + " |", flush=True)
    for name, function in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        print(f"| {name} | " + " | ".join(f"{function(column):.2f} %" for column in zip(*rows, strict=True)) + " |")


if __name__ == "__main__":
    main()
