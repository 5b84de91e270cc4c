"""Named predictors: some ship with this package, registries name others, and a cache keeps what was downloaded."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from smartfrz.errors import ChecksumError, DownloadError, ServerError
from smartfrz.predictor.runtime import Device, Predictor
from smartfrz.zoo import fetch, lock, settings, urls
from smartfrz.zoo.registry import Entry, entries, find
from smartfrz.zoo.transport import Progress

__all__ = ["DEFAULT", "Entry", "entries", "find", "load", "locate"]
DEFAULT = "smartfrz-base"
_REINSTALL = "The installation is damaged. Type: pip install --force-reinstall smartfrz"


def load(predictor: Any = DEFAULT, *, device: Device = "auto", registries: Sequence[str] = ()) -> Any:
    """Load a predictor by name, path or address; return one that is loaded already.

    Args:
        predictor: One of: a name in a registry, with or without a version (`smartfrz-base@1`); the path of
            an ONNX file, which ends in `.onnx` or contains a folder; the address of such a file, best with
            `#sha256=` and its SHA-256 appended; the address of a predictor on a server
            (`http://host:port/NAME`, or https); or a `Predictor`, which is returned as it is.
        device: Where ONNX Runtime runs. Ignored for a predictor on a server.
        registries: Addresses or paths of further registries, asked before the ones that SMARTFRZ_ZOO names.

    Returns:
        The `Predictor` or `RemotePredictor`.

    Raises:
        ServerError: If a server cannot be reached or may not be asked, or has no predictor of that name.
        UnknownPredictorError: If no registry has that name.
        ChecksumError: If a file differs from its registry, or from what it was when it was first used.
        RegistryError: If a registry breaks its format or goes back to a lower version, or its signature is wrong.
        DownloadError: If a file or registry cannot be fetched.
        PredictorFileError: If the file cannot be used.
    """
    if not isinstance(predictor, (str, os.PathLike)):
        return predictor
    if isinstance(predictor, str) and urls.is_server(predictor):
        from smartfrz.predictor.remote import RemotePredictor

        url = urls.check_server(predictor)
        if settings.offline() and not urls.is_local(url):
            raise ServerError(
                f"SMARTFRZ_OFFLINE is set, so that {url} is not asked. Unset it, or use a predictor on this machine."
            )
        return RemotePredictor(url)
    if not _is_named(predictor):
        return Predictor(predictor, device=device)
    with _provide(os.fspath(predictor), registries) as (path, source, entry):
        loaded = Predictor(path, device=device)
        fetch.check_facts(source, loaded.info)
        if entry is not None:
            lock.remember(entry)
        return loaded


def file_of(
    predictor: str | os.PathLike[str], registries: Sequence[str] = ()
) -> contextlib.AbstractContextManager[str | Path]:
    """Return a context with the file that `load` reads: a name or an address is located, a path is taken as it is."""
    text = os.fspath(predictor)
    return locate(text, registries) if _is_named(predictor) else contextlib.nullcontext(text)


@contextlib.contextmanager
def locate(text: str, registries: Sequence[str] = (), progress: Progress | None = None) -> Iterator[Path]:
    """Yield the checked file of a name or address, fetched if necessary. It may be deleted after the block.

    Args:
        text: A name or an address, as for `load`.
        registries: As for `load`.
        progress: Called during a download with the bytes received so far and their total, or None if unknown.

    Raises:
        SmartFRZError: For the same reasons as `load`.
    """
    with _provide(text, registries, progress) as (path, source, entry):
        if entry is not None:
            fetch.check_facts(source, Predictor(path, device="cpu").info)
            lock.remember(entry)
        yield path


def embedded_folder() -> Path:
    """Return the folder of the predictors that ship with this package."""
    return Path(str(files(__package__)))


def _is_named(predictor: str | os.PathLike[str]) -> bool:
    """Return True for a name or an address, False for a path."""
    text = os.fspath(predictor)
    return isinstance(predictor, str) and (urls.is_url(text) or not (text.endswith(".onnx") or os.sep in text))


@contextlib.contextmanager
def _provide(
    text: str, registries: Sequence[str], progress: Progress | None = None
) -> Iterator[tuple[Path, fetch.Source, Entry | None]]:
    """Yield the file of a name or address, what it has to be, and its entry. Its facts are left to be compared."""
    entry = None
    if urls.is_url(text):
        source = _source_of_url(text)
    else:
        entry = find(text, registries)
        source = _source_of_entry(entry)
        if not entry.address:
            with as_file(files(__package__) / entry.file) as path:  # works in a zip file, too
                _check(path, str(entry), entry.sha256, _REINSTALL)
                yield path, source, entry
            return
    local = urls.local_path(source.url)
    if local is None:
        with fetch.provide(source, progress) as path:
            yield path, source, entry
        return
    if source.sha256 is not None:
        _check(local, source.label, source.sha256, "Copy the file again, or correct the expected SHA-256.")
    yield local, source, entry


def _source_of_entry(entry: Entry) -> fetch.Source:
    facts = tuple((name, getattr(entry, name)) for name in ("window", "tailored_size", "representation"))
    return fetch.Source(str(entry), entry.address or entry.file, entry.sha256, entry.size, facts)


def _source_of_url(text: str) -> fetch.Source:
    url, _, fragment = text.partition("#")
    urls.check(url)
    if not url.partition("?")[0].endswith(".onnx"):
        raise DownloadError(f"{url!r} is no address of a predictor; expected one that ends in .onnx.")
    if not fragment:
        if urls.local_path(url) is None:
            warnings.warn(
                f"There is no SHA-256 to compare {url} with: it is used unverified, and fetched each time. Add #sha256= and "
                "the SHA-256 of its file.",
                UserWarning,
                stacklevel=5,
            )
        return fetch.Source(url, url)
    if not re.fullmatch("sha256=[0-9a-fA-F]{64}", fragment):
        raise DownloadError(f"{text!r} ends in #{fragment}; expected #sha256= and 64 hexadecimal digits, or nothing.")
    return fetch.Source(url, url, fragment.removeprefix("sha256=").lower())


def _check(path: Path, name: str, expected: str, remedy: str) -> None:
    actual = fetch.sha256_of(path) or "missing"
    if actual != expected:
        raise ChecksumError(
            f"the file of predictor {name!r} has SHA-256 {actual[:12]}...; expected {expected[:12]}.... {remedy}"
        )
