"""Options that several benchmarks have."""

import argparse
from pathlib import Path

import torch

from benchmarks.tasks import TIERS


def list_of(known):
    """What argparse reads as a list of these names."""

    def read(text):
        unknown = set(text.split(",")) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(known)}.")
        return text.split(",")

    return read


def positive(text):
    """A positive number for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return int(text)


def seeds(text):
    """What argparse reads as a list of seeds."""
    return [int(seed) for seed in text.split(",")]


def add_job_options(parser):
    """Those that say what is trained: `parse_job` reads them."""
    parser.add_argument("--tier", choices=TIERS, default="cpu")
    parser.add_argument("--tasks", help="Of the tier; all by default.")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/compare"), help="Of pretrained weights and references."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="By default that of the tier, if it is there.")
    parser.add_argument("--samples", type=positive, help="At most, of each part, to try something out.")
    parser.add_argument("--epochs", type=positive, help="Of full training, to try something out.")


def parse_job(parser, given):
    """The options, one thread for PyTorch, and beside them `settings`: what is smaller than the task's own.

    `tasks` is a list then, and `device` one.
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
