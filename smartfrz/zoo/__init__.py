"""Named predictors. The default one lies in this package."""

import difflib
import hashlib
import json
import os
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from smartfrz.errors import ChecksumError, UnknownPredictorError
from smartfrz.predictor.runtime import Device, Predictor

DEFAULT = "smartfrz-base"


def registry() -> dict[str, dict[str, Any]]:
    """What is known of the named predictors: name to file, SHA-256, size and facts."""
    entries: dict[str, dict[str, Any]] = json.loads((files(__package__) / "registry.json").read_text("utf-8"))
    return entries


def load(predictor: Any = DEFAULT, *, device: Device = "auto") -> Any:
    """A predictor by name, by path, or one that is loaded already.

    Args:
        predictor: A name in the registry; the path of an ONNX file (it ends in `.onnx` or has a
            folder in it); or a `Predictor`, returned as it is.
        device: Where ONNX Runtime shall run.

    Returns:
        The `Predictor`.

    Raises:
        UnknownPredictorError: If there is none of that name.
        ChecksumError: If the embedded file differs from the registry.
        PredictorFileError: If the file cannot be used.
    """
    if not isinstance(predictor, (str, os.PathLike)):
        return predictor
    text = os.fspath(predictor)
    if not isinstance(predictor, str) or text.endswith(".onnx") or os.sep in text:
        return Predictor(text, device=device)
    entries = registry()
    if text not in entries:
        close = difflib.get_close_matches(text, entries, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownPredictorError(
            f"unknown predictor {text!r}.{hint} Known predictors: {', '.join(sorted(entries))}. A file's path has to "
            "end in .onnx."
        )
    with as_file(files(__package__) / entries[text]["file"]) as path:
        _check(path, text, entries[text]["sha256"])
        return Predictor(path, device=device)


def _check(path: Path, name: str, expected: str) -> None:
    actual = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
    if actual != expected:
        raise ChecksumError(
            f"the file of predictor {name!r} has SHA-256 {actual[:12]}...; expected {expected[:12]}.... The "
            "installation is damaged. Type: pip install --force-reinstall smartfrz"
        )
