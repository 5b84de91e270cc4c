"""What recording, deciding and freezing cost beside a training step: `python -m benchmarks.overhead`.

MobileNetV2, ResNet-50 and a 12-layer transformer (transformers' own classes, random weights), one
process each after the other, on the CPU or with `--device cuda`. Prints a table of medians:

- the time of one training step (both passes, SGD with momentum);
- of one record, of one decision with the window full and every layer active (the dearest case, which
  no run has that freezes anything), and of one freezing stage that freezes half of the layers;
- their share of a run of `--steps` steps at the default schedule (30 records, 15 stages) in which
  nothing ever froze, and the number of steps from which on that is at most 0.2 %.
"""

import argparse
import statistics
import time

import torch

from benchmarks.arguments import positive
from smartfrz.adapters.torch import SmartFRZ
from smartfrz.control.learned import RECORDS_PER_STAGE

GOAL = 0.002


def networks():
    """Name, model, one batch of inputs."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
    )

    pictures = {"pixel_values": torch.randn(32, 3, 96, 96), "labels": torch.randint(0, 10, (32,))}
    yield (
        "MobileNetV2, 32 pictures of 96 px",
        MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=10)),
        pictures,
    )
    yield "ResNet-50, 32 pictures of 96 px", ResNetForImageClassification(ResNetConfig(num_labels=10)), pictures
    words = {"input_ids": torch.randint(0, 30000, (16, 64)), "labels": torch.randint(0, 2, (16,))}
    yield "BERT-base (12 layers), 16 x 64 tokens", BertForSequenceClassification(BertConfig()), words


def measure(model, batch, device, steps):
    """Seconds of a training step, of a record, of a decision, and of a stage that freezes half of the layers."""
    model = model.to(device).train()
    batch = {key: value.to(device) for key, value in batch.items()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    freezer = SmartFRZ(model, optimizer, record_every=1, decide_every=2, threshold=1.0, verbose=False)
    training, recording, deciding = [], [], []

    def clock():
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    for step in range(steps):
        start = clock()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        middle = clock()
        if step == 1:
            for _ in range(freezer.predictor.info.window):  # fill the window without training
                freezer.step(loss)
            continue
        decided = freezer.step(loss)
        end = clock()
        if step > 1:
            training.append(middle - start)
            (deciding if decided else recording).append(end - middle)
    adapter, half = freezer.adapter, freezer.layers[: len(freezer.layers) // 2]
    adapter.snapshot_statistics()
    start = clock()
    adapter.freeze(half)
    freezing = clock() - start
    record = statistics.median(recording)
    return len(freezer.layers), statistics.median(training), record, statistics.median(deciding) - record, freezing


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=positive, default=12, help="Training steps measured.")
    parser.add_argument("--steps", type=positive, default=2000, help="Length of the run that the share is given for.")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"| network | layers | step | record | decision | freezing | share of {options.steps} steps | 0.2 % from |")
    print("|" + "---|" * 8, flush=True)
    for name, model, batch in networks():
        layers, train, record, decide, freeze = measure(model, batch, options.device, options.rounds)
        records = 30
        stages = records // RECORDS_PER_STAGE
        whole = records * record + stages * (decide + freeze)
        cells = [f"{1e3 * seconds:.1f} ms" for seconds in (train, record, decide, freeze)]
        share, enough = whole / (options.steps * train), whole / (GOAL * train)
        print(f"| {name} | {layers} | {' | '.join(cells)} | {share:.2%} | {enough:.0f} steps |", flush=True)


if __name__ == "__main__":
    main()
