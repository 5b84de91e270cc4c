"""Results of benchmarks: one JSON line a measurement, in a file, or on standard error if the user named none."""

import json
import sys

from filelock import FileLock

from smartfrz.files import replacing


def read_lines(path):
    """What the file holds already; nothing without a file.

    Raises:
        SystemExit: If a line is no JSON object, with its number.
    """
    if path is None or not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        try:
            line = json.loads(text)
            damage = "" if isinstance(line, dict) else f"it is of type {type(line).__name__}"
        except json.JSONDecodeError as error:
            damage = str(error)
        if damage:
            sys.exit(
                f"{path}, line {number} is damaged ({damage}): expected one JSON object a line. "
                "Remove the line; what it said is measured again."
            )
        lines.append(line)
    return lines


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
    return any(all(line.get(key) == value for key, value in facts.items()) for line in read_lines(path))
