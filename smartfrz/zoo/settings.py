"""What the user decides once for everything: an environment variable, or the option of a command that goes before it."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

_chosen: ContextVar[dict[str, str] | None] = ContextVar("_chosen", default=None)


def offline() -> bool:
    """Return True if SMARTFRZ_OFFLINE forbids the network."""
    return _on("SMARTFRZ_OFFLINE")


def allow_private() -> bool:
    """Return True if SMARTFRZ_ALLOW_PRIVATE or `--allow-private` allows addresses inside of a private network."""
    return _on("SMARTFRZ_ALLOW_PRIVATE")


def lock_file() -> str:
    """Return the path of the project's lock file, from SMARTFRZ_LOCK or `--lock`; '' for the one in the cache."""
    return _value("SMARTFRZ_LOCK")


@contextlib.contextmanager
def choosing(name: str, value: str) -> Iterator[None]:
    """Use a value in the place of an environment variable, until the block ends."""
    token = _chosen.set({**(_chosen.get() or {}), name: value})
    try:
        yield
    finally:
        _chosen.reset(token)


def _value(name: str) -> str:
    return (_chosen.get() or {}).get(name) or os.environ.get(name, "")


def _on(name: str) -> bool:
    return _value(name) not in ("", "0")
