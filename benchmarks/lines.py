"""Results of benchmarks: one JSON line a measurement, in a file, or on standard error if the user named none."""

import json
import sys

from filelock import FileLock

from smartfrz.files import replacing


def earlier(output):
    """What the file holds already; nothing without a file."""
    if output is None or not output.exists():
        return []
    return [json.loads(line) for line in output.read_text().splitlines()]


def add_line(output, line):
    """Write a line to the file, or, without a file, to standard error.

    The file is whole at any time, and several processes may write to it.
    """
    text = json.dumps(line) + "\n"
    if output is None:
        print(text, end="", file=sys.stderr, flush=True)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_name(f".{output.name}.lock")):
        before = output.read_text("utf-8") if output.exists() else ""
        with replacing(output) as temporary:
            temporary.write_text(before + text, "utf-8")


def is_known(path, facts):
    """Whether the file has a line of these facts."""
    return any(all(line.get(key) == value for key, value in facts.items()) for line in earlier(path))
