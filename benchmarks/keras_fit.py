"""Full training against SmartFRZ in Keras: `python -m benchmarks.keras_fit [--output FILE]`.

EfficientNet-Lite0 with ImageNet weights on 3,000 CIFAR-10 pictures (in the folder that SMARTFRZ_DATA
names), 4 epochs of SGD, batch 32, cosine schedule, no augmentation; 2,000 test pictures. 64 px; 32 px on
JAX, where a step takes more than ten times as long on a CPU (depthwise convolutions in XLA). One
process and one thread for each backend and seed; in it both methods take turns of ten steps.

Prints one JSON line a run, and then a table: means and standard deviations over seeds, and of the
difference to full training of the same seed. `seconds` is training with everything that freezing costs,
compilations included; not in it are the evaluations and `first_step_seconds`, which is what `fit` took
up to the end of its first step. `cpu_seconds` is processor time during `seconds`: on a machine with
other work it says more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

SIZES = {"tensorflow": 64, "torch": 64, "jax": 32}
SEEDS = (0, 1, 2)
ROOT = Path(__file__).parent.parent
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "NPROC": "1",  # what XLA takes for the number of cores
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def run(backend, seed, epochs, predictor):
    """One line a method. KERAS_BACKEND must be the backend."""
    sys.path.insert(0, str(ROOT / "recipes"))
    import torch
    from recipe_data import cifar10
    from torch.utils.data import TensorDataset

    from smartfrz.demo import FREEZING, FULL, DemoOptions, pretrained_network, take_turns
    from smartfrz.demo_keras import Trainer, as_arrays

    splits = [
        # the recipes divide by 64, the network was trained with 128
        as_arrays(TensorDataset(images / 2, labels))
        for images, labels in (data.tensors for data in cifar10(SIZES[backend], 3000, 2000))
    ]
    torch.manual_seed(seed)
    network = pretrained_network(10)
    options = DemoOptions(epochs=epochs, seed=seed, predictor=predictor)
    with ExitStack() as stack:
        trainers = [stack.enter_context(Trainer(method, network, *splits, options)) for method in (FULL, FREEZING)]
        take_turns(trainers, lambda done, text: print(f"{backend} {seed} {done:.0%} {text}", file=sys.stderr))
        for trainer in trainers:
            result, report = trainer.run, trainer.report().to_dict()
            line = {"backend": backend, "seed": seed, "method": result.method, "image_size": SIZES[backend]}
            line |= {"num_steps": result.num_steps, "accuracy": result.accuracy, "curve": result.curve}
            for key in ("seconds", "cpu_seconds", "first_step_seconds", "decision_seconds"):
                line[key] = getattr(result, key)
            if result.method == FREEZING:
                line |= {"num_layers": len(result.layers), "frozen": result.frozen}
                for part in ("", "_by_prefix", "_by_interior"):
                    line["saved" + part] = report["backward_flops_saved" + part] / report["backward_flops"]
            yield line


def cell(values, form):
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form.lstrip('+')}}"


def table(lines):
    """Means and standard deviations over seeds; differences are taken within a seed."""
    header = "backend, size | seeds | full | SmartFRZ | difference, points | time of full training | processor time"
    print(f"| {header} | full, seconds | first step, seconds | backward saved | in the prefix | layers | stages |")
    print("|" + "---|" * 13)
    for backend in SIZES:
        of = {(line["seed"], line["method"]): line for line in lines if line["backend"] == backend}
        pairs = [(of[s, "full training"], of[s, m]) for s, m in sorted(of) if m == "SmartFRZ"]
        if not pairs:
            continue
        full, freezing = zip(*pairs, strict=True)
        cells = [f"{backend}, {full[0]['image_size']} px", str(len(pairs))]
        cells += [cell([100 * x["accuracy"] for x in method], ".1f") + " %" for method in (full, freezing)]
        cells.append(cell([100 * (b["accuracy"] - a["accuracy"]) for a, b in pairs], "+.1f"))
        for key in ("seconds", "cpu_seconds"):
            cells.append(cell([100 * b[key] / a[key] for a, b in pairs], ".1f") + " %")
        cells.append(cell([x["seconds"] for x in full], ".0f"))
        cells.append(cell([x["first_step_seconds"] for x in full], ".0f"))
        for key in ("saved", "saved_by_prefix"):
            cells.append(cell([100 * x[key] for x in freezing], ".1f") + " %")
        layers = statistics.mean(len(x["frozen"]) for x in freezing)
        stages = statistics.mean(len(set(x["frozen"].values())) for x in freezing)
        print(f"| {' | '.join(cells)} | {layers:.0f} of {freezing[0]['num_layers']} | {stages:.1f} |")
    print("The standard error of one accuracy is about 1 point (2,000 test pictures).")


def main():
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, help="Append one JSON line a run; runs that are there are not repeated.")
    parser.add_argument("--backends", default=",".join(SIZES))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--predictor", default="smartfrz-base")
    parser.add_argument("--here", action="store_true", help="Run in this process, and print the lines only.")
    options = parser.parse_args()
    lines = []
    if options.output and options.output.exists():
        lines = [json.loads(line) for line in options.output.read_text().splitlines()]
    for backend in options.backends.split(","):
        for seed in map(int, options.seeds.split(",")):
            if options.here:
                for line in run(backend, seed, options.epochs, options.predictor):
                    print(json.dumps(line))
                continue
            if any((line["backend"], line["seed"]) == (backend, seed) for line in lines):
                continue
            arguments = ["--backends", backend, "--seeds", str(seed), "--epochs", str(options.epochs)]
            arguments += ["--predictor", options.predictor, "--here"]
            process = subprocess.run(
                [sys.executable, "-m", "benchmarks.keras_fit", *arguments],
                env=os.environ | ONE_THREAD | {"KERAS_BACKEND": backend},
                stdout=subprocess.PIPE,
                text=True,
            )
            if process.returncode:
                print(f"{backend}, seed {seed} is left out: see above", file=sys.stderr)
                continue
            lines += [json.loads(line) for line in process.stdout.splitlines()]
            print(process.stdout, file=sys.stderr, end="", flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(process.stdout)
    if not options.here:
        table(lines)


if __name__ == "__main__":
    main()
