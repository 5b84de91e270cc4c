"""What recording and deciding cost beside a training step: `python -m benchmarks.overhead`.

Prints the time of one training step of EfficientNet-Lite0 (batch 32, 64 px), of one record and of
one freezing stage with all layers active, medians of one process, and their share of a run of 480
steps at the default schedule, if no layer ever froze.
"""

import statistics
import time

import torch
from torch.nn.functional import cross_entropy

from smartfrz.adapters.torch import SmartFRZ
from smartfrz.demo import pretrained_network
from smartfrz.predictor.controller import RECORDS_PER_STAGE

STEPS = 480


def main():
    """Measure and print."""
    torch.manual_seed(0)
    model = pretrained_network(10).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    freezer = SmartFRZ(model, optimizer, record_every=1, decide_every=3, dry_run=True, threshold=1.0)
    inputs, targets = torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))
    training, recording, deciding = [], [], []
    for step in range(96):
        start = time.perf_counter()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        middle = time.perf_counter()
        decided = freezer.step()
        end = time.perf_counter()
        if step >= 36:  # the window is full: the dearest case
            training.append(middle - start)
            (deciding if decided else recording).append(end - middle)
    train, record, decide = (statistics.median(times) for times in (training, recording, deciding))
    records = STEPS // freezer_interval(freezer)
    total = records * record + records // RECORDS_PER_STAGE * (decide - record)
    print(f"layers                       {len(freezer.layers)}")
    print(f"training step                {1e3 * train:8.2f} ms")
    print(f"one record                   {1e3 * record:8.2f} ms")
    print(f"one freezing stage           {1e3 * decide:8.2f} ms (with its record)")
    print(
        f"share of {STEPS} steps, {records} records, {records // RECORDS_PER_STAGE} stages: {total / STEPS / train:.2%}"
    )


def freezer_interval(freezer: SmartFRZ) -> int:
    return max(1, round(STEPS * freezer.predictor.info.record_fraction))


if __name__ == "__main__":
    main()
