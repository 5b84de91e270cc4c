"""Results of benchmarks: one JSON line a measurement, on standard error and, if the user named one, in a file."""

import json
import sys

from filelock import FileLock

from smartfrz.files import replacing


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


def add_line(path, line):
    """To a file that is whole at any time, and that several processes may write to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        before = path.read_text("utf-8") if path.exists() else ""
        with replacing(path) as temporary:
            temporary.write_text(before + json.dumps(line) + "\n", "utf-8")


def is_known(path, facts):
    """Whether the file has a line of these facts."""
    return any(all(line.get(key) == value for key, value in facts.items()) for line in earlier(path))
