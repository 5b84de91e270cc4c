"""Train with a loop of your own on top of Accelerate while SmartFRZ freezes what has converged.

pip install "smartfrz[torch,cpu]" accelerate scikit-learn
python examples/accelerate_loop.py --epochs 30
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from smartfrz.adapters.torch import SmartFRZ

ACCUMULATE = 2  # batches that make one optimizer step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    set_seed(0)
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32) / 16
    train, test = random_split(TensorDataset(pixels, torch.tensor(data.target)), [1500, len(pixels) - 1500])

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer, loader, test_loader = accelerator.prepare(
        model, optimizer, DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(test, 99)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    steps = -(-len(loader) // ACCUMULATE) * options.epochs  # Accelerate steps at the end of each epoch, too
    freezer = SmartFRZ(accelerator.unwrap_model(model), optimizer, total_steps=steps)
    accelerator.register_for_checkpointing(freezer)  # accelerator.save_state and load_state include it

    for _ in range(options.epochs):
        model.train()
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:  # the optimizer really stepped
                freezer.step(loss)
        schedule.step()

    model.eval()
    with torch.no_grad():
        pairs = [accelerator.gather_for_metrics((model(inputs).argmax(1), targets)) for inputs, targets in test_loader]
    right = torch.cat([predicted == targets for predicted, targets in pairs])
    accelerator.print(f"test accuracy {right.float().mean():.1%}")
    accelerator.print(freezer.report())


if __name__ == "__main__":
    main()
