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
from pathlib import Path

from benchmarks.arguments import at_least, lines_of, list_of
from benchmarks.options import run_alone
from smartfrz.comparing.lines import add_line

NETWORKS = ("mobilenetv2", "resnet14")
KNOWN = tuple(f"{backend}/{mode}" for backend in ("tensorflow", "jax", "torch") for mode in ("plain", "jit"))
CASES = ("tensorflow/plain", "tensorflow/jit", "jax/jit", "torch/plain")
KEYS = ("backend", "jit", "network")


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


def main(given=None):
    """Measure every case in a process of its own, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--output", type=Path, help="Append one JSON line a row; cases that are there are not repeated."
    )
    parser.add_argument("--cases", type=list_of(KNOWN), default=CASES, help="Backend, a slash, `jit` or `plain`.")
    parser.add_argument("--networks", type=list_of(NETWORKS), default=NETWORKS)
    parser.add_argument(
        "--steps", type=at_least(3), default=10, help="In each of the seven blocks, the first not counted."
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in the process of a case
    options = parser.parse_args(given)
    if options.here:
        from benchmarks.keras_blocks import measure  # loads Keras, on the backend of this process

        for row in measure(options.networks[0], options.cases[0].endswith("/jit"), options.steps):
            print(json.dumps(row))
        return
    rows = lines_of(options.output)
    for network in options.networks:
        for case in options.cases:
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
    if not rows:
        sys.exit("Nothing was measured: no backend of these cases is installed.")
    table(rows)


if __name__ == "__main__":
    main()
