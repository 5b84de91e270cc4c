"""What command lines of benchmarks share: readers of values, for argparse, and errors as messages.

This module loads no framework, so that what makes load on a server stays small.
"""

import argparse
import contextlib
import sys

from smartfrz.comparing.lines import read_lines
from smartfrz.errors import SmartFRZError


@contextlib.contextmanager
def errors_as_messages(*more):
    """Exit with the message of an error that SmartFRZ raises on purpose, instead of with a traceback.

    Args:
        *more: Other exceptions whose messages are meant for the user.
    """
    try:
        yield
    except (SmartFRZError, *more) as error:
        sys.exit(str(error))


def list_of(known):
    """Make argparse's reader of a comma-separated list of known names."""

    def read(text):
        unknown = set(text.split(",")) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(known)}.")
        return text.split(",")

    return read


def at_least(smallest):
    """Make argparse's reader of a whole number that is not below `smallest`."""

    def number(text):
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text}; expected {smallest} or more")
        return int(text)

    return number


positive = at_least(1)


def seeds(text):
    """Read a comma-separated list of seeds, for argparse."""
    return [int(seed) for seed in text.split(",")]


def lines_of(path):
    """Read the lines of a file of results; exit with a message if one is damaged."""
    with errors_as_messages():
        return read_lines(path)


def progress_printer(name):
    """Make a progress callback that tells on stderr of each fifth of the work."""
    shown = 0.0

    def progress(done, text):
        nonlocal shown
        if done - shown >= 0.2:
            shown = done
            print(f"{name}: {done:.0%} {text}", file=sys.stderr, flush=True)

    return progress
