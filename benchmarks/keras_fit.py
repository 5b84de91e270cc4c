"""Full training against SmartFRZ in Keras: `python -m benchmarks.keras_fit [--output FILE]`.

ResNet-20 with weights from CIFAR-10 (He et al. 2016; the file that SMARTFRZ_DATA's neighbour
`weights/cifar_resnet` holds), fine-tuned on 3,068 photos of clothing at 32 px: 4 epochs of SGD with
momentum, batch 32, cosine schedule, no augmentation; tested on the 713 photos of validation and test,
neither of which anything was chosen on. One process and one thread for each backend and seed; in it both
methods take turns of ten steps.

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
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.lines import read_lines

BACKENDS = ("tensorflow", "jax", "torch")
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


def clothing():
    """Training photos, and those of validation and test: float32 `[n, 32, 32, 3]` as the network reads them."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from recipe_data import archive

    splits = []
    for names in (("train",), ("validation", "test")):
        parts = [archive("clothing_96px_jpeg", name) for name in names]
        photos = [np.asarray(photo.resize((32, 32))) for pictures, _ in parts for photo in pictures]
        pixels = np.stack(photos).astype(np.float32) / 255
        pixels = (pixels - np.float32([0.4914, 0.4822, 0.4465])) / np.float32([0.247, 0.2435, 0.2616])
        splits.append((pixels, np.concatenate([labels for _, labels in parts]).astype(np.int64)))
    return splits


def resnet20(weights, seed, num_classes=10, head=False):
    """ResNet-20 with option-A shortcuts, and a new classifier unless `head` says to load that as well.

    Args:
        weights: Names of PyTorch parameters to arrays.
        seed: Of the new classifier.
        num_classes: Of the classifier.
        head: Whether to load the classifier's weights, too.
    """
    import keras

    def convolution(x, name, norm, stride, width):
        if stride > 1:  # Keras' "same" would begin at another pixel
            x = keras.layers.ZeroPadding2D(1)(x)
        padding = "valid" if stride > 1 else "same"
        conv = keras.layers.Conv2D(width, 3, stride, padding, use_bias=False, name=name.replace(".", "_"))
        batch_norm = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=norm.replace(".", "_"))
        x = batch_norm(conv(x))
        conv.set_weights([weights[f"{name}.weight"].transpose(2, 3, 1, 0)])
        batch_norm.set_weights(
            [weights[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
        )
        return x

    keras.utils.set_random_seed(seed)
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.ReLU()(convolution(inputs, "conv1", "bn1", 1, 16))
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = keras.layers.ReLU()(convolution(x, f"{name}.conv1", f"{name}.bn1", stride, width))
            y = convolution(y, f"{name}.conv2", f"{name}.bn2", 1, width)
            if stride > 1:
                x = keras.ops.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (width // 4, width // 4)))
            x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    classifier = keras.layers.Dense(num_classes, name="linear")
    model = keras.Model(inputs, classifier(x))
    if head:
        classifier.set_weights([weights["linear.weight"].T, weights["linear.bias"]])
    return model


def run(backend, seed, epochs, predictor):
    """One line a method. KERAS_BACKEND must be the backend."""
    from safetensors.numpy import load_file

    from smartfrz.demo import FREEZING, FULL, DemoOptions, take_turns
    from smartfrz.demo_keras import Trainer

    folder = Path(os.environ["SMARTFRZ_DATA"])
    splits = clothing()
    weights = load_file(folder.parent / "weights/cifar_resnet/resnet20.safetensors")
    options = DemoOptions(epochs=epochs, seed=seed, predictor=predictor, learning_rate=0.02)
    with ExitStack() as stack:
        trainers = [
            stack.enter_context(Trainer(method, resnet20(weights, seed), *splits, options))
            for method in (FULL, FREEZING)
        ]
        take_turns(trainers, lambda done, text: print(f"{backend} {seed} {done:.0%} {text}", file=sys.stderr))
        for trainer in trainers:
            result, report = trainer.run, trainer.report().to_dict()
            line = {"backend": backend, "seed": seed, "method": result.method, "keras": version("keras")}
            line |= {"num_steps": result.num_steps, "accuracy": result.accuracy, "curve": result.curve}
            for key in ("seconds", "cpu_seconds", "first_step_seconds", "decision_seconds"):
                line[key] = getattr(result, key)
            if result.method == FREEZING:
                line |= {"num_layers": len(result.layers), "frozen": result.frozen}
                line |= {key: report[key] for key in ("num_recompilations", "recompile_seconds")}
                for part in ("", "_by_prefix", "_by_interior"):
                    line["saved" + part] = report["backward_flops_saved" + part] / report["backward_flops"]
            yield line


def cell(values, form):
    """Mean and standard deviation; of one value only that."""
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def table(lines):
    """Means and standard deviations over seeds; differences are taken within a seed."""
    header = "backend | seeds | full | SmartFRZ | difference, points | time of full training | processor time"
    print(f"| {header} | full, seconds | first step, seconds | backward saved | in the prefix | layers | stages |")
    print("|" + "---|" * 13)
    for backend in BACKENDS:
        of = {(line["seed"], line["method"]): line for line in lines if line["backend"] == backend}
        pairs = [(of[s, "full training"], of[s, m]) for s, m in sorted(of) if m == "SmartFRZ"]
        if not pairs:
            continue
        full, freezing = zip(*pairs, strict=True)
        cells = [backend, str(len(pairs))]
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
    print("The standard error of one accuracy is about 1.5 points (713 test photos).")


def main():
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, help="Append one JSON line a run; runs that are there are not repeated.")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--predictor", default="smartfrz-base")
    parser.add_argument("--here", action="store_true", help="Run in this process, and print the lines only.")
    options = parser.parse_args()
    lines = read_lines(options.output)
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
