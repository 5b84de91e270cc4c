"""What the policies that SmartFRZ is compared with cost: `python -m benchmarks.baselines`.

MobileNetV2 (transformers' own class, random weights), 32 pictures of 96 px, SGD with momentum, on the
CPU or with `--device cuda`; the policies take turns, step by step. Prints medians, nothing frozen:

- of both passes, and of `optimizer.step()` with the policy's hooks: learning rates of single layers
  for LinearFreezing, the sum of all gradients for AutoFreeze, their changes for GradES;
- of one record with the freezing stage that follows it (AutoFreeze: the norms; the predictor: asking it;
  the oracle: a forward pass on 64 pictures);
- the memory that AutoFreeze's sums and GradES' latest gradients take.
"""

import argparse
import copy
import statistics
import time

import torch

from benchmarks.arguments import positive
from benchmarks.overhead import networks
from smartfrz.adapters.torch import SmartFRZ
from smartfrz.baselines import AutoFreeze, FullTraining, GradES, LinearFreezing, WeightChange
from smartfrz.baselines.similarity_guided import SimilarityGuided
from smartfrz.comparing.pytorch import kept_gradients

ENDLESS = 10**9  # steps: nothing freezes


def policies(model, device):
    """By name; of one record and stage a step, none of which freezes anything."""
    pictures = {"pixel_values": torch.randn(64, 3, 96, 96, device=device)}
    return {
        "full training": (FullTraining(), {}),
        "linear freezing": (LinearFreezing(), {}),
        "AutoFreeze": (AutoFreeze(steps_per_epoch=4), {"patience": ENDLESS}),
        "GradES": (GradES(1e-30), {}),
        "weight change": (WeightChange(limit=1e-12), {}),
        "smartfrz-base": ("smartfrz-base", {"threshold": 1.0}),
        "similarity-guided": (SimilarityGuided(model, copy.deepcopy(model), pictures), {"patience": ENDLESS}),
    }


class Turn:
    """One policy's run."""

    def __init__(self, model, policy, options):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
        options = {"total_steps": ENDLESS, "record_every": 1, "decide_every": 1} | options
        self.freezer = SmartFRZ(model, self.optimizer, policy, verbose=False, **options)
        self.seconds = {"passes": [], "optimizer": [], "stage": []}
        self.kept = 0

    def step(self, batch, clock):
        """Take one, and note the times."""
        times = [clock()]
        loss = self.model(**batch).loss
        loss.backward()
        times.append(clock())
        self.optimizer.step()
        times.append(clock())
        self.optimizer.zero_grad()
        self.kept = sum(gradient.numel() * gradient.element_size() for gradient in kept_gradients(self.freezer))
        start = clock()
        self.freezer.step(loss)
        for name, seconds in zip(
            self.seconds, (times[1] - times[0], times[2] - times[1], clock() - start), strict=True
        ):
            self.seconds[name].append(seconds)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=positive, default=12, help="Training steps of each policy.")
    options = parser.parse_args()
    torch.manual_seed(0)

    def clock():
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    _, first, batch = next(networks())
    batch = {key: value.to(options.device) for key, value in batch.items()}
    turns = {}
    for name in policies(first.to(options.device), options.device):
        model = copy.deepcopy(first).train()
        turns[name] = Turn(model, *policies(model, options.device)[name])
    for _ in range(options.rounds):
        for turn in turns.values():
            turn.step(batch, clock)
    print("| policy | both passes | optimizer step | record and stage | gradients kept |\n|" + "---|" * 5)
    for name, turn in turns.items():
        # The first step learns the layers; a predictor is asked from the fourth record on.
        times = [statistics.median(seconds[4:]) for seconds in turn.seconds.values()]
        cells = [f"{1e3 * seconds:.1f} ms" for seconds in times]
        print(f"| {name} | {' | '.join(cells)} | {turn.kept / 2**20:.1f} MiB |", flush=True)


if __name__ == "__main__":
    main()
