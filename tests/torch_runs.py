"""A small network, its training loop and scripted freezers, for the tests of PyTorch's traps."""

import itertools

import pytest
from numpy_adapter import ScriptedPredictor, script

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402


class Net(nn.Module):
    """Two convolutions with batch norm, dropout, and a linear layer."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(2, 4, 3, bias=False)
            self.norm1 = nn.BatchNorm2d(4)
            self.conv2 = nn.Conv2d(4, 6, 3)
            self.norm2 = nn.BatchNorm2d(6)
            self.dropout = nn.Dropout(0.2)
            self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(self.dropout(x.mean((2, 3))))


NET = ["conv1", "conv2", "head"]
PARTS = {"conv1": ("conv1", "norm1"), "conv2": ("conv2", "norm2"), "head": ("head",)}


def seeded(make, *args, seed=0, **options):
    """What `make` returns, with its random numbers from this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*args, **options)


def mlp(*sizes, seed=0, bias=True):
    """Linear layers "0", "2", "4" and so on, with tanh between them."""
    pairs = list(itertools.pairwise(sizes))
    layers = seeded(lambda: [nn.Linear(a, b, bias=bias) for a, b in pairs], seed=seed)
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))[:-1]


def batch(step, *shape):
    """Inputs and targets of one step; the same in every run."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(*(shape or (8, 2, 7, 7)), generator=generator) + 0.5
    return inputs, torch.randint(3, (len(inputs),), generator=generator)


def loss_of(model, step, *shape):
    """One forward pass; dropout depends on the step alone."""
    inputs, targets = batch(step, *shape)
    torch.manual_seed(step)
    return nn.functional.cross_entropy(model(inputs), targets)


def train(model, optimizers, freezer, start, end, *shape, scheduler=None, set_to_none=True):
    """A plain loop over steps `start` to `end`."""
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    for step in range(start, end):
        model.train()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, step, *shape).backward()
        for optimizer in optimizers:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if freezer is not None:
            freezer.step()


def attach(model, optimizers, layers, *stages, **options):
    """A freezer that decides at every second step, and freezes at each stage the layers named for it."""
    predictor = options.pop("predictor", None) or ScriptedPredictor(script(layers, *stages))
    return SmartFRZ(model, optimizers, predictor, **{"record_every": 1, "decide_every": 2, "patience": 1} | options)


def values(model):
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved(before, model):
    """Names of the parameters and buffers that are not bit for bit what they were."""
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def parts(names, layers):
    """Those of the names of `Net`'s state that belong to these layers."""
    modules = [module for layer in layers for module in PARTS[layer]]
    return {name for name in names if name.partition(".")[0] in modules}


def num_hooks(model):
    """Forward hooks on all modules."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in model.modules()
    )
