"""The model and the data that compare_digits.toml names."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def network(width=32):
    blocks = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(5)]
    first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
    return nn.Sequential(first, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def digits():
    read = load_digits()
    order = np.random.default_rng(0).permutation(len(read.target))
    pictures = torch.from_numpy(read.images[order].astype(np.float32) / 16)[:, None]
    labels = torch.from_numpy(read.target[order])
    return TensorDataset(pictures[:1000], labels[:1000]), TensorDataset(pictures[1000:], labels[1000:])
