"""Methods of a comparison from the words of a command line."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from smartfrz.comparing.engine import Method
from smartfrz.control.options import FreezeOptions

DEFAULT = "default"
PREDICTOR = "smartfrz-base"
_OPTIONS = {field.name for field in fields(FreezeOptions)} - {"total_steps", "seed", "verbose", "dry_run"} | {
    "predictor"
}


def variant(text: str, predictor: str) -> Method:
    """Read a way to use SmartFRZ.

    Args:
        text: `default`, or `OPTION=VALUE,OPTION=VALUE` with options of `SmartFRZ`, for example
            `threshold=0.9,freeze_order=prefix`; `predictor=NAME` stands for another predictor.
        predictor: The predictor of the others.

    Raises:
        ValueError: If `text` is not of that form, or an option has no such value.
    """
    if text == DEFAULT:
        return Method(_name(predictor, ""), lambda run: predictor)
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in _OPTIONS:
            raise ValueError(
                f"{text!r} is no variant; expected {DEFAULT!r}, or OPTION=VALUE,.. with options among "
                f"{', '.join(sorted(_OPTIONS))}. For example threshold=0.9,freeze_order=prefix."
            )
        options[name] = _value(value)
    chosen = str(options.pop("predictor", predictor))
    words = ",".join(part.strip() for part in text.split(",") if part.partition("=")[0].strip() != "predictor")
    try:
        FreezeOptions(**options)
    except TypeError as error:
        raise ValueError(
            f"{text!r} has a value of the wrong type ({error}). Write numbers plain, as in 0.9."
        ) from error
    return Method(_name(chosen, words), lambda run: chosen, options)


def _name(predictor: str, words: str) -> str:
    """Name of a method, which changes with the content of a predictor's file, so that old runs do not pass for new ones."""
    parts = ["SmartFRZ"]
    if predictor != PREDICTOR:
        path = Path(predictor)
        is_file = path.is_file()
        parts.append(
            f"with {path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:6]}" if is_file else f"with {predictor}"
        )
    return " ".join([*parts, words] if words else parts)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def fewer_steps(text: str) -> list[Method]:
    """Read shares of the steps in percent, as in `50,70`; empty for none.

    Raises:
        ValueError: If one is no number between 0 and 100.
    """
    return [_fewer(part) for part in text.split(",") if part.strip()]


def _fewer(text: str) -> Method:
    try:
        percent = float(text)
    except ValueError:
        percent = 0.0
    if not 0 < percent < 100:
        raise ValueError(f"{text!r} is no share of the steps; expected percent between 0 and 100, as in 50,70.")
    return Method(f"{percent:g} % of the steps", share=percent / 100)


def methods_of(predictor: str, variants: Iterable[str], fewer: str) -> list[Method]:
    """Make the methods that full training is compared with.

    Raises:
        ValueError: If a word cannot be read.
    """
    made = [variant(text, predictor) for text in dict.fromkeys(variants)]
    return [*made, *{method.name: method for method in fewer_steps(fewer)}.values()]
