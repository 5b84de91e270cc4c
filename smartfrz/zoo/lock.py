"""`smartfrz.lock`: which file a name and version stood for when it was first used. Later uses are held to it.

There is one in the cache, which holds every registry on another machine to what it said before: a version stays the same
file, and the highest version does not go down. A project may have one of its own (`--lock FILE`, SMARTFRZ_LOCK), which
it shares as it does its code: it holds every name, those of the package as well, to one version and file, wherever it
comes from.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol
from urllib.parse import urlsplit

from smartfrz.errors import ChecksumError, RegistryError
from smartfrz.files import replacing, unique_keys
from smartfrz.zoo import cache, fetch, settings, urls
from smartfrz.zoo.versions import version_key

logger = logging.getLogger("smartfrz")
FILE = "smartfrz.lock"
FORMAT_VERSION = 1
_MAX_SIZE = 4 * 2**20  # bytes
_WAIT = 60.0  # seconds for another process, which holds the guard for the time of a write
_FIELDS = {
    "name": r"[a-z0-9][a-z0-9._-]{0,63}",
    "version": r"[0-9]{1,6}(\.[0-9]{1,6}){0,2}",
    "sha256": r"[0-9a-f]{64}",
    "registry": r"[!-~]{1,4000}",
}


class Named(Protocol):
    """What is locked of an entry of a registry."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def version(self) -> str: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102
    @property
    def registry(self) -> str: ...  # noqa: D102


class Locked(NamedTuple):
    """One line of the file.

    Attributes:
        name: Name of the predictor.
        version: Its version.
        sha256: SHA-256 of its file.
        registry: Address of the registry that named it, without a query, which may hold a token.
    """

    name: str
    version: str
    sha256: str
    registry: str

    @property
    def key(self) -> tuple[int, ...]:
        """The version as a sort key."""
        return version_key(self.version)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def place() -> Path:
    """Return the path of the lock file that is in use."""
    return Path(settings.lock_file()) if settings.lock_file() else fetch.folder() / FILE


def chosen_version(name: str) -> str:
    """Return the version that a name stands for in the project's lock file, or '' for the highest of its registry."""
    versions = [row.version for row in _read() if row.name == name] if settings.lock_file() else []
    return max(versions, key=version_key, default="")


def check(entry: Named, *, chosen: bool) -> None:
    """Hold an entry to what its name and version stood for before.

    Args:
        entry: The entry that a registry has for a name.
        chosen: Whether the user asked for this version: an older one is no step back then.

    Raises:
        ChecksumError: If the version stood for another file.
        RegistryError: If a higher version was used before, or the lock file cannot be read.
    """
    if not _is_locked(entry):
        return
    rows = _about(entry, _read())
    for row in rows:
        if row.key == version_key(entry.version) and row.sha256 != entry.sha256:
            raise ChecksumError(
                f"{row} was another file when it was first used: {place()} has SHA-256 {row.sha256[:12]}... from "
                f"{row.registry}, and {entry.registry} now says {entry.sha256[:12]}.... Ask the owner of the registry why; "
                f"if the new file is right, type: smartfrz zoo unlock {row}{_option()}"
            )
    newest = max(rows, key=lambda row: row.key, default=None)
    if newest is not None and not chosen and newest.key > version_key(entry.version):
        raise RegistryError(
            f"{entry.registry} has {entry.name}@{entry.version} as its highest version, and {newest} was used before "
            f"({place()}). It may be an old copy of the registry. Ask for {entry.name}@{entry.version} if that is what you "
            f"want, or type: smartfrz zoo unlock {newest}{_option()}"
        )


def remember(entry: Named) -> None:
    """Write down which file an entry stood for, when it was used for the first time.

    Raises:
        RegistryError: If the project's lock file cannot be written. The one in the cache is done without.
    """
    if not _is_locked(entry):
        return
    row = Locked(entry.name, entry.version, entry.sha256, _plain(entry.registry))
    if any(other[:3] == row[:3] for other in _about(entry, _read())):
        return
    try:
        _change(lambda rows: rows if row in rows else [*rows, row])
    except OSError as error:
        if settings.lock_file():
            _refuse(f"cannot be written ({error})", "Give a file in a folder that can be written to")
        logger.debug("%s is not locked: %s", row, error)


def forget(name: str, version: str = "") -> list[str]:
    """Take a name, or one of its versions, out of the lock file. Return what was taken out.

    Raises:
        RegistryError: If the lock file cannot be read or written.
    """
    rows = _read()
    gone = [row for row in rows if row.name == name and (not version or row.key == version_key(version))]
    if gone:
        try:
            _change(lambda rows: [row for row in rows if row not in gone])
        except OSError as error:
            _refuse(f"cannot be written ({error})", "Change its permissions, or edit it by hand")
    return [str(row) for row in gone]


def _is_locked(entry: Named) -> bool:
    """Return True for what the lock file in use speaks of: everything, or what others can change behind our back."""
    return bool(settings.lock_file()) or (urls.is_url(entry.registry) and urls.local_path(entry.registry) is None)


def _about(entry: Named, rows: Iterable[Locked]) -> list[Locked]:
    """Return the rows of a name; in the cache, two registries may use a name for different things."""
    of_all = bool(settings.lock_file())
    return [
        row for row in rows if row.name == entry.name and (of_all or _plain(row.registry) == _plain(entry.registry))
    ]


def _plain(registry: str) -> str:
    """Return an address without its query, in the one form that it has with all its spellings."""
    parts = urlsplit(registry.partition("?")[0])
    if parts.scheme not in ("http", "https"):
        return registry.partition("?")[0]
    host = (parts.netloc.lower()).removesuffix({"http": ":80", "https": ":443"}[parts.scheme])
    return parts._replace(netloc=host).geturl()


def _read() -> list[Locked]:
    try:
        content = place().read_bytes() if settings.lock_file() else cache.read(place(), _MAX_SIZE)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if isinstance(error, PermissionError) and not settings.lock_file():
            return []  # there is no cache that we could use
        _refuse(f"cannot be read ({error})", "Change its permissions, or name another one with --lock or SMARTFRZ_LOCK")
    try:
        document = json.loads(content, object_pairs_hook=unique_keys)
        if document["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {document['format_version']!r:.50}; expected {FORMAT_VERSION}")
        return [_row(value) for value in document["predictors"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        _refuse(f"is damaged ({type(error).__name__}: {error})", "Restore it, or delete it to lock anew")


def _row(value: dict[str, str]) -> Locked:
    row = Locked(value["name"], value["version"], value["sha256"], value["registry"])
    for key, pattern in _FIELDS.items():
        if not re.fullmatch(pattern, value[key]):
            raise ValueError(f"{key} is {value[key]!r:.100}")
    return row


def _change(change: Callable[[list[Locked]], list[Locked]]) -> None:
    from filelock import FileLock

    target = place()
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.guard")).acquire(timeout=_WAIT):
        rows = sorted(change(_read()), key=lambda row: (row.name, row.key, row.registry))
        document = {"format_version": FORMAT_VERSION, "predictors": [row._asdict() for row in rows]}
        content = (json.dumps(document, indent=1) + "\n").encode()
        if settings.lock_file():
            with replacing(target) as temporary:
                temporary.write_bytes(content)
        else:
            cache.replace(target, content)


def _option() -> str:
    return f" --lock {settings.lock_file()}" if settings.lock_file() else ""


def _refuse(fault: str, remedy: str) -> NoReturn:
    raise RegistryError(f"The lock file {place()} {fault}, so that nothing can be held to what it was. {remedy}.")
