"""Options that several benchmarks have, and processes of their own."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.arguments import list_of, positive
from benchmarks.tasks import TIERS

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "NPROC": "1",  # what XLA takes for the number of cores
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def add_job_options(parser):
    """Add the options that say what is trained; `parse_job` reads them."""
    parser.add_argument("--tier", choices=TIERS, default="cpu")
    parser.add_argument("--tasks", help="Names in the tier; all by default.")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/compare"), help="Folder of pretrained weights and references."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="Default: what the tier is for, if available.")
    parser.add_argument("--samples", type=positive, help="Maximum size of each part, to try something out.")
    parser.add_argument("--epochs", type=positive, help="Length of full training, to try something out.")


def parse_job(parser, given):
    """Parse, and have PyTorch use one thread.

    `tasks` becomes a list and `device` a name, and `settings` holds what is smaller than the task's own.
    """
    options = parser.parse_args(given)
    tier = TIERS[options.tier]
    try:
        options.tasks = list_of(tier)(options.tasks) if options.tasks else list(tier)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if options.device is None:
        options.device = "cuda" if options.tier == "gpu" and torch.cuda.is_available() else "cpu"
    chosen = {"samples": options.samples, "epochs": options.epochs}
    options.settings = {key: value for key, value in chosen.items() if value is not None}
    torch.set_num_threads(1)
    return options


def run_alone(module, arguments, backend):
    """Run a benchmark of Keras in a process of its own, with one thread, and return the JSON lines that it prints.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | ONE_THREAD | {"KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in process.stdout.splitlines()]
