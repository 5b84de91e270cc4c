"""Train on several processes with DistributedDataParallel while SmartFRZ freezes what has converged.

pip install "smartfrz[torch,cpu]" scikit-learn
torchrun --nproc-per-node 2 examples/ddp.py --epochs 30 --checkpoint run.pt
torchrun --nproc-per-node 2 examples/ddp.py --epochs 30 --checkpoint run.pt   # goes on where it stopped
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset, random_split
from torch.utils.data.distributed import DistributedSampler

from smartfrz.adapters.torch import SmartFRZ


def network():
    return nn.Sequential(
        *[nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()],
        *[nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()],
        *[nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)],
    )


def train(options):
    is_first = dist.get_rank() == 0
    torch.manual_seed(0)
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    train, test = random_split(TensorDataset(pictures, torch.tensor(data.target)), [1500, len(pictures) - 1500])
    sampler = DistributedSampler(train, drop_last=True)
    loader = DataLoader(train, 16, sampler=sampler, drop_last=True)

    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    freezer = SmartFRZ(model, optimizer, total_steps=len(loader) * options.epochs)
    parts = {"model": model.module, "optimizer": optimizer, "schedule": schedule, "freezer": freezer}
    start = 0
    if options.checkpoint and os.path.exists(options.checkpoint):
        saved = torch.load(options.checkpoint, weights_only=True)
        for name, part in parts.items():  # the freezer last; on every rank, from the same file
            part.load_state_dict(saved[name])
        start = saved["epoch"]

    for epoch in range(start, options.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step(loss)  # on every rank: rank 0 decides, all freeze the same
        schedule.step()
        if options.checkpoint and is_first:
            saved = {name: part.state_dict() for name, part in parts.items()}
            torch.save(saved | {"epoch": epoch + 1}, options.checkpoint + ".new")
            os.replace(options.checkpoint + ".new", options.checkpoint)
        if options.checkpoint:
            dist.barrier()

    if is_first:
        model.eval()
        inputs, targets = next(iter(DataLoader(test, len(test))))
        with torch.no_grad():
            right = model.module(inputs).argmax(1) == targets
        print(f"test accuracy {right.float().mean():.1%}")
        print(freezer.report())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--checkpoint", metavar="FILE", help="written after each epoch, and read if it is there")
    options = parser.parse_args()
    dist.init_process_group("gloo")  # "nccl" on GPUs
    train(options)
    # The model is gone by now. Were it the last to hold the group, PyTorch could wait for ever for its own threads.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
