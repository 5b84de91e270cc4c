"""Step time in Keras with a frozen prefix, and what the change costs: `python -m benchmarks.keras_step [--output FILE]`.

MobileNetV2 (keras.applications, random weights, 96 px; 32 px with `jit_compile`, since XLA takes over ten times as long
as the others for depthwise convolutions on a CPU) and a ResNet-14 (32 px), batches of 32, on every backend that is
installed, one thread, each in a process of its own: TensorFlow with `jit_compile` off and on, JAX with it on, PyTorch
with it off. JAX without it runs, and compiles, every operation alone; PyTorch with it takes minutes for each
compilation: `--cases jax/plain,torch/jit` measures them all the same.

Within one `fit` the first 1/4, 1/2 and 3/4 of the layers are frozen by `KerasAdapter`, with everything thawed before,
in between and after. A block of frozen steps is compared with the blocks beside it, so that a machine that gets slower
does so for both: of the time, and of the processor time, which says more on a machine with other work. For each
change, the processor time that the adapter took, and how much more the first step after it took than the median of
the others: tracing, and compiling.

Prints a table, and one JSON line a row, the lines to the file if there is one.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.options import lines_of, run_alone
from smartfrz.comparing.lines import add_line

FRACTIONS = (1 / 4, 1 / 2, 3 / 4)
NETWORKS = ("mobilenetv2", "resnet14")
CASES = ("tensorflow/plain", "tensorflow/jit", "jax/jit", "torch/plain")
BATCH = 32
KEYS = ("backend", "jit", "network")


def resnet14(keras, pixels):
    """Three stages of two residual blocks, of 16, 32 and 64 channels."""
    inputs = x = keras.Input((pixels, pixels, 3))
    conv = {"padding": "same", "use_bias": False}
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(16, 3, **conv)(x))
    for channels in (16, 32, 64):
        for stride in (1 if channels == 16 else 2, 1):
            shortcut = x
            x = keras.layers.ReLU()(
                keras.layers.BatchNormalization()(keras.layers.Conv2D(channels, 3, stride, **conv)(x))
            )
            x = keras.layers.BatchNormalization()(keras.layers.Conv2D(channels, 3, **conv)(x))
            if stride == 2:
                shortcut = keras.layers.Conv2D(channels, 1, 2, **conv)(shortcut)
            x = keras.layers.ReLU()(keras.layers.Add()([x, shortcut]))
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))


def clock():
    """Seconds, and processor seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def measure(network, jit, steps):
    """One row for each fraction, and one for nothing frozen."""
    import keras

    from smartfrz.adapters.keras import KerasAdapter, trace_layers

    keras.utils.set_random_seed(0)
    pixels = 96 if network == "mobilenetv2" and not jit else 32
    if network == "mobilenetv2":
        model = keras.applications.MobileNetV2(
            (pixels, pixels, 3), weights=None, classes=10, classifier_activation=None
        )
    else:
        model = resnet14(keras, pixels)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss, jit_compile=jit)
    adapter = KerasAdapter(model, trace_layers(model))
    names = adapter.layers()

    class Same(keras.utils.PyDataset):
        """The same batch, again and again."""

        def __init__(self):
            super().__init__()
            rng = np.random.default_rng(0)
            self.batch = rng.normal(size=(BATCH, pixels, pixels, 3)).astype(np.float32), rng.integers(0, 10, BATCH)

        def __len__(self):
            return steps * (2 * len(FRACTIONS) + 1)

        def __getitem__(self, index):
            return self.batch

    class Blocks(keras.callbacks.Callback):
        """Freezes or thaws after every block of steps, and looks at the clock after every step."""

        def __init__(self):
            super().__init__()
            self.steps, self.changes = [], []

        def on_train_batch_end(self, batch, logs=None):
            adapter.sync()
            keras.ops.convert_to_numpy(model.optimizer.iterations.value)  # JAX goes ahead otherwise
            now = clock()
            if self.steps:
                self.steps[-1].append(now - self.last)
            else:
                self.steps.append([])  # the first step has all of the loading in it
            if (batch + 1) % steps == 0 and batch + 1 < len(data):
                block = (batch + 1) // steps
                prefix = names[: round(len(names) * FRACTIONS[block // 2])] if block % 2 else []
                if prefix:
                    adapter.freeze(prefix)
                else:
                    adapter.unfreeze(names)
                self.changes.append(clock() - now)
                self.steps.append([])
            self.last = clock()

    data, blocks = Same(), Blocks()
    model.fit(data, epochs=1, verbose=0, shuffle=False, callbacks=[blocks])
    medians = np.array([np.median(block[1:], axis=0) for block in blocks.steps])
    facts = {
        "network": network,
        "pixels": pixels,
        "batch": BATCH,
        "steps": steps - 1,
        "num_layers": len(names),
        "keras": keras.__version__,
    }

    def row(frozen, step, live):
        times = {"step_ms": 1e3 * step[0], "cpu_ms": 1e3 * step[1]}
        return facts | {"frozen": frozen} | times | {"ratio": step[0] / live[0], "cpu_ratio": step[1] / live[1]}

    live = np.median(medians[::2], axis=0)
    yield row(0.0, live, live)
    for block, fraction in zip(range(1, len(medians), 2), FRACTIONS, strict=True):
        changed = {
            "change_cpu_ms": 1e3 * blocks.changes[block - 1][1],
            "first_step_cpu_ms": 1e3 * (blocks.steps[block][0] - medians[block])[1],
        }
        yield row(fraction, medians[block], (medians[block - 1] + medians[block + 1]) / 2) | changed


def cell(row, key):
    """A time in ms, or nothing."""
    return f"{row[key]:.0f} ms" if key in row else ""


def table(rows):
    """One line a row."""
    print("| network | backend | `jit_compile` | frozen | step | all live = 100 % |", end="")
    print(" processor time | all live = 100 % | freezing | first step, more |")
    print("|" + "---|" * 10)
    for row in rows:
        cells = [row["network"], row["backend"], "on" if row["jit"] else "off", f"{row['frozen']:.0%}"]
        cells += [cell(row, "step_ms"), f"{row['ratio']:.0%}", cell(row, "cpu_ms"), f"{row['cpu_ratio']:.0%}"]
        cells += [cell(row, "change_cpu_ms"), cell(row, "first_step_cpu_ms")]
        print(f"| {' | '.join(cells)} |")


def main():
    """Measure every case in a process of its own, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--output", type=Path, help="Append one JSON line a row; cases that are there are not repeated."
    )
    parser.add_argument("--cases", default=",".join(CASES), help="Backend, a slash, `jit` or `plain`.")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--steps", type=int, default=10, help="In each of the seven blocks, the first not counted.")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in the process of a case
    options = parser.parse_args()
    if options.here:
        for row in measure(options.networks, options.cases.endswith("/jit"), options.steps):
            print(json.dumps(row))
        return
    rows = lines_of(options.output)
    for network in options.networks.split(","):
        for case in options.cases.split(","):
            backend, _, mode = case.partition("/")
            labels = {"backend": backend, "jit": mode == "jit"}
            if importlib.util.find_spec(backend) is None:
                print(f"{case} is left out: {backend} is not installed", file=sys.stderr)
                continue
            if any(all(row[key] == (labels | {"network": network})[key] for key in KEYS) for row in rows):
                continue
            arguments = ["--here", "--cases", case, "--networks", network, "--steps", str(options.steps)]
            for made in run_alone("benchmarks.keras_step", arguments, backend):
                row = labels | made
                rows.append(row)
                add_line(options.output, row)
    table(rows)


if __name__ == "__main__":
    main()
