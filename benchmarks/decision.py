"""What asking costs: `python -m benchmarks.decision [--layers 54] [--rounds 50] [--cuda] [FILE ...]`.

54 layers, the window of 30 full, one thread of the CPU, the ways taking turns. `smartfrz-base` as
shipped, and other predictor files that are named, are asked about the whole window. Networks of the
representations `raw` and `steps`, untrained, which for times does not matter, are asked in both
forms: the whole window, and only what is new (a record is encoded; at a freezing stage it is encoded
and scored in one). With `--cuda` also `smartfrz-base` on the GPU, and all times are wall time.
Prints medians, minima, and the memory of the history.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from smartfrz import zoo
from smartfrz.control.history import EncodedHistory, WeightHistory
from smartfrz.errors import SmartFRZError
from smartfrz.predictor.contract import ENCODING_SIZE, INCREMENTAL, PredictorInfo
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.export import export
from smartfrz.predictor.training.model import FreezePredictor


def untrained(representation, info, folder):
    torch.manual_seed(0)
    model = FreezePredictor(info.tailored_size, representation)
    facts = PredictorInfo(representation, info.tailored_size, info.window, representation, 0.5, info.record_fraction)
    export(model, facts, Path(folder) / f"{representation}.onnx")
    return Predictor(Path(folder) / f"{representation}.onnx", device="cpu")


def ways_of(predictor, weights):
    """What is timed: name and call."""
    num_layers, window = weights.shape[:2]
    lengths = np.full(num_layers, window)
    yield "decision, whole window", lambda: predictor.predict(weights, lengths)
    if predictor.incremental:
        rows = 2 if predictor.info.representation == "steps" else 1
        newest = np.ascontiguousarray(weights[:, -rows:])
        keys, values = (a[:, : window - rows] for a in predictor.encode(weights))
        keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
        yield "record, encoded", lambda: predictor.encode(newest)
        yield "decision, only what is new", lambda: predictor.advance(newest, keys, values, lengths)


def kept_bytes(history, weights):
    for row in range(weights.shape[1]):
        vectors = {str(layer): weights[layer, row] for layer in range(len(weights))}
        if isinstance(history, EncodedHistory):
            history.record(vectors, ask=False)
        else:
            for layer, vector in vectors.items():
                history.append(layer, vector)
    return sum(array.nbytes for array in history.state_dict().values())


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="other predictors")
    parser.add_argument("--layers", type=int, default=54)
    parser.add_argument("--rounds", type=int, default=50)
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
        predictors |= {f"`{name}`, untrained": untrained(name, base.info, folder) for name in INCREMENTAL}
    rng = np.random.default_rng(0)
    shape = arguments.layers, base.info.window, base.info.tailored_size
    start = rng.normal(size=(shape[0], 1, shape[2])) * 0.05
    weights = (start + rng.normal(size=shape).cumsum(axis=1) * 1e-3).astype(np.float32)
    ways = [(name, *way) for name, predictor in predictors.items() for way in ways_of(predictor, weights)]
    seconds = [[] for _ in ways]
    for _ in range(arguments.rounds):
        for (_, _, call), times in zip(ways, seconds, strict=True):
            start = clock()
            call()
            times.append(clock() - start)
    about = f"{shape[0]} layers, window {shape[1]}, {shape[2]} weights, {arguments.rounds} rounds"
    print(f"{about}, {'wall time' if arguments.cuda else 'processor time of one thread'}\n")
    print("| predictor | what | median | minimum |\n|---|---|---|---|")
    for (name, what, _), times in zip(ways, seconds, strict=True):
        print(f"| {name} | {what} | {1e3 * statistics.median(times):.2f} ms | {1e3 * min(times):.2f} ms |")
    print("\n| history | memory |\n|---|---|")
    print(f"| records | {kept_bytes(WeightHistory(*shape[1:]), weights) / 2**20:.2f} MiB |")
    for name in INCREMENTAL:
        size = kept_bytes(EncodedHistory(predictors[f"`{name}`, untrained"]), weights) / 2**20
        last = ", and the last record" if name == "steps" else ""
        print(f"| `{name}`: {2 * ENCODING_SIZE} numbers a record{last} | {size:.2f} MiB |")


if __name__ == "__main__":
    main()
