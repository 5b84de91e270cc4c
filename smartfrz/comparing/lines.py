"""Results in a file of JSON lines, one a measurement, so that what was interrupted goes on where it stopped."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from smartfrz.errors import ResultsError
from smartfrz.files import replacing


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    """All lines of the file; none if it does not exist.

    Raises:
        ResultsError: If a line is not a JSON object; the message has its number.
    """
    if path is None or not path.exists():
        return []
    texts = path.read_text("utf-8", "replace").splitlines()
    return [_parse(path, number, text) for number, text in enumerate(texts, 1)]


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        damage = "" if isinstance(line, dict) else f"it is of type {type(line).__name__}"
    except json.JSONDecodeError as error:
        damage = str(error)
    if damage:
        raise ResultsError(
            f"{path}, line {number} is damaged ({damage}): expected one JSON object a line. "
            "Remove the line; what it said is measured again."
        )
    return dict(line)


def add_line(path: Path | None, line: Mapping[str, Any]) -> None:
    """Append a line to the file, or write it to standard error if there is no file.

    The file is whole at any time, and several processes may write to it.
    """
    text = json.dumps(line) + "\n"
    if path is None:
        print(text, end="", file=sys.stderr, flush=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        before = path.read_text("utf-8") if path.exists() else ""
        with replacing(path) as temporary:
            temporary.write_text(before + text, "utf-8")


def matching(lines: list[dict[str, Any]], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines that have all of these facts."""
    return [line for line in lines if facts.items() <= line.items()]
