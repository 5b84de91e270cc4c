"""How much faster recordings are on two workers of a Ray cluster than on one: python -m benchmarks.ray_scaling.

Each cluster is made of processes on this machine, a worker having one CPU. The tasks' imports are part of the time, the
start of the cluster is not. A machine with other work, or with fewer cores than workers, has nothing to say here.
"""

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.arguments import positive

MODULE = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10),
    )


def digits():
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target)
    return TensorDataset(images[:1200], labels[:1200]), TensorDataset(images[1200:], labels[1200:])
"""
RECIPE = """
architecture = "cnn"
seed = {seed}
[model]
source = "scaling_parts:network"
[data]
source = "scaling_parts:digits"
[training]
epochs = {epochs}
[recording]
records = 16
pool_size = 64
"""


def write_recipes(folder: Path, number: int, epochs: float) -> list[Path]:
    (folder / "scaling_parts.py").write_text(MODULE)
    paths = [folder / f"digits-{seed}.toml" for seed in range(number)]
    for seed, path in enumerate(paths):
        path.write_text(RECIPE.format(seed=seed, epochs=epochs))
    return paths


def seconds(paths: list[Path], output: Path, workers: int) -> float:
    """Record all on a new cluster of that many workers."""
    from ray.cluster_utils import Cluster

    from smartfrz.dataset_builder.ray_engine import RayEngine, RayOptions
    from smartfrz.dataset_builder.recipes import load_recipe

    node = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    config = {"worker_niceness": 0}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "_system_config": config})
    try:
        for _ in range(workers):
            cluster.add_node(num_cpus=1, **node)
        with RayEngine(str(output), RayOptions(cluster.address)) as engine:
            start, waiting = time.perf_counter(), len(paths)
            for path in paths:
                engine.start(load_recipe(path))
            while waiting:
                for result in engine.finished(timeout=1.0):
                    if result.error:
                        raise result.error
                    waiting -= 1
            return time.perf_counter() - start
    finally:
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", type=positive, default=4)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--workers", type=positive, nargs="+", default=[1, 2])
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with TemporaryDirectory() as name:
        paths = write_recipes(Path(name), options.recipes, options.epochs)
        took = {workers: seconds(paths, Path(name) / f"runs-{workers}", workers) for workers in options.workers}
    first = took[options.workers[0]]
    print(f"{options.recipes} recordings, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    for workers, duration in took.items():
        print(f"{workers} worker(s): {duration:.1f} s, {first / duration:.2f} times as fast as the first")


if __name__ == "__main__":
    main()
