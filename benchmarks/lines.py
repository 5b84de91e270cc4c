"""Results of benchmarks: one JSON line a measurement, on standard error and, if the user named one, in a file."""

import json
import sys


def earlier(output):
    """What the file holds already; nothing without a file."""
    if output is None or not output.exists():
        return []
    return [json.loads(line) for line in output.read_text().splitlines()]


def note(line, output):
    """Print a line, and append it to the file."""
    text = json.dumps(line)
    print(text, file=sys.stderr, flush=True)
    if output:
        with output.open("a") as file:
            file.write(text + "\n")
