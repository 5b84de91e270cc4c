"""What asking costs: `python -m benchmarks.decision [--layers 54] [--rounds 50] [--cuda] [FILE ...]`.

54 layers, the window of 30 full, one thread of the CPU, the predictors taking turns: `smartfrz-base`, an untrained
network of the representation `raw`, and other predictor files that are named. With `--cuda` also `smartfrz-base` on
the GPU, and all times are wall time. Prints medians, minima, and the memory of the history.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.arguments import positive
from smartfrz import zoo
from smartfrz.control.history import WeightHistory
from smartfrz.errors import SmartFRZError
from smartfrz.predictor.contract import PredictorInfo
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.export import export
from smartfrz.predictor.training.model import FreezePredictor


def untrained(representation, info, folder):
    torch.manual_seed(0)
    model = FreezePredictor(info.tailored_size, representation)
    facts = PredictorInfo(representation, info.tailored_size, info.window, representation, 0.5, info.record_fraction)
    export(model, facts, Path(folder) / f"{representation}.onnx")
    return Predictor(Path(folder) / f"{representation}.onnx", device="cpu")


def kept_bytes(history, weights):
    for row in range(weights.shape[1]):
        for layer in range(len(weights)):
            history.append(str(layer), weights[layer, row])
    return sum(array.nbytes for array in history.state_dict().values())


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="other predictors")
    parser.add_argument("--layers", type=positive, default=54)
    parser.add_argument("--rounds", type=positive, default=50)
    parser.add_argument("--cuda", action="store_true", help="ask smartfrz-base on the GPU as well, by wall time")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.cuda else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        base = zoo.load(zoo.DEFAULT, device="cpu")
        predictors = {"smartfrz-base": base}
        try:
            if arguments.cuda:
                predictors["smartfrz-base on the GPU"] = zoo.load(zoo.DEFAULT, device="cuda")
            predictors |= {file: Predictor(file, device="cpu") for file in arguments.files}
        except SmartFRZError as error:
            parser.error(str(error))
        predictors["`raw`, untrained"] = untrained("raw", base.info, folder)
    rng = np.random.default_rng(0)
    shape = arguments.layers, base.info.window, base.info.tailored_size
    start = rng.normal(size=(shape[0], 1, shape[2])) * 0.05
    weights = (start + rng.normal(size=shape).cumsum(axis=1) * 1e-3).astype(np.float32)
    lengths = np.full(len(weights), shape[1])
    seconds = {name: [] for name in predictors}
    for _ in range(arguments.rounds):
        for name, predictor in predictors.items():
            start = clock()
            predictor.predict(weights, lengths)
            seconds[name].append(clock() - start)
    about = f"{shape[0]} layers, window {shape[1]}, {shape[2]} weights, {arguments.rounds} rounds"
    print(f"{about}, {'wall time' if arguments.cuda else 'processor time of one thread'}\n")
    print("| predictor | median | minimum |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {1e3 * statistics.median(times):.2f} ms | {1e3 * min(times):.2f} ms |")
    print(f"\nHistory: {kept_bytes(WeightHistory(*shape[1:]), weights) / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
