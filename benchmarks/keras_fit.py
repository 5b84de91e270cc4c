"""Full training against SmartFRZ in Keras: `python -m benchmarks.keras_fit [--output FILE]`.

ResNet-20 with weights from CIFAR-10 (He et al. 2016; the file that SMARTFRZ_DATA's neighbour
`weights/cifar_resnet` holds), fine-tuned on 3,068 photos of clothing at 32 px: 4 epochs of SGD with
momentum, batch 32, cosine schedule, no augmentation; tested on the 713 photos of validation and test,
neither of which was used to choose anything. One process and one thread for each backend and seed, in which one method
is trained after the other.

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
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.arguments import errors_as_messages, lines_of, list_of, seeds
from benchmarks.options import run_alone
from smartfrz.comparing.engine import FULL, Method, compare
from smartfrz.comparing.lines import add_line

BACKENDS = ("tensorflow", "jax", "torch")
ROOT = Path(__file__).parent.parent


def clothing():
    """Return the training photos, and the validation and test photos: float32 `[n, 32, 32, 3]` as the network reads them."""
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
    """Make a ResNet-20 with option-A shortcuts, and a new classifier unless `head` is true.

    Args:
        weights: Names of PyTorch parameters to arrays.
        seed: Seed of the new classifier.
        num_classes: Number of outputs of the classifier.
        head: Whether to load the weights of the classifier as well.
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


def compiled(model, steps):
    """The model, to be trained with SGD and a cosine schedule of as many steps."""
    import keras

    rate = keras.optimizers.schedules.CosineDecay(0.02, steps)
    optimizer = keras.optimizers.SGD(rate, momentum=0.9, weight_decay=1e-5)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def steps_of(train, epochs):
    """Steps of full training, 32 samples each."""
    return round(len(train[1]) // 32 * epochs)


def run(backend, seed, epochs, predictor):
    """Yield one line for each method. KERAS_BACKEND must be the backend."""
    from safetensors.numpy import load_file

    from smartfrz.comparing.keras import Task

    folder = Path(os.environ["SMARTFRZ_DATA"])
    splits = clothing()
    weights = load_file(folder.parent / "weights/cifar_resnet/resnet20.safetensors")
    train, test = splits
    task = Task(
        lambda seed, steps: compiled(resnet20(weights, seed), steps), train, test, test, steps_of(train, epochs)
    )
    runs = {}

    def start(method):
        runs[method.name] = task.start(seed)(method)
        return runs[method.name]

    def progress(done, text):
        print(f"{backend} {seed} {done:.0%} {text}", file=sys.stderr)

    for result in compare(start, (FULL, Method("SmartFRZ", lambda run: predictor)), progress=progress):
        line = {"backend": backend, "seed": seed, "method": result.method, "keras": version("keras")}
        line |= {"num_steps": result.steps, "accuracy": result.accuracy, "curve": result.curve}
        line |= {"seconds": result.train_seconds, "cpu_seconds": result.cpu_seconds}
        line |= {"first_step_seconds": result.first_step_seconds, "decision_seconds": result.decision_seconds}
        if result.method != FULL.name:
            report = runs[result.method].report().to_dict()
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


@errors_as_messages()
def main():
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="Append one JSON line a run; runs that are there are not repeated.")
    parser.add_argument("--backends", type=list_of(BACKENDS), default=BACKENDS)
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--predictor", default="smartfrz-base")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in the process of a backend and seed
    options = parser.parse_args()
    if options.here:
        for line in run(options.backends[0], options.seeds[0], options.epochs, options.predictor):
            print(json.dumps(line))
        return
    lines = lines_of(options.output)
    for backend in options.backends:
        for seed in options.seeds:
            if any((line["backend"], line["seed"]) == (backend, seed) for line in lines):
                continue
            arguments = ["--here", "--backends", backend, "--seeds", str(seed), "--epochs", str(options.epochs)]
            try:
                made = run_alone("benchmarks.keras_fit", [*arguments, "--predictor", options.predictor], backend)
            except subprocess.CalledProcessError:
                print(f"{backend}, seed {seed} is left out: see above", file=sys.stderr)
                continue
            lines += made
            for line in made:
                add_line(options.output, line)
    if not lines:
        sys.exit("Nothing was measured. Install a backend of Keras, or see above what failed.")
    table(lines)


if __name__ == "__main__":
    main()
