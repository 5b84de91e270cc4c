"""Named predictors: the default one lies in this package, registries name others, a cache keeps what was fetched."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from smartfrz.errors import ChecksumError, DownloadError
from smartfrz.predictor.runtime import Device, Predictor
from smartfrz.zoo import cache, urls
from smartfrz.zoo.download import Progress
from smartfrz.zoo.registry import Entry, entries, find

__all__ = ["DEFAULT", "Entry", "entries", "find", "load", "located"]
DEFAULT = "smartfrz-base"
_REINSTALL = "The installation is damaged. Type: pip install --force-reinstall smartfrz"


def load(predictor: Any = DEFAULT, *, device: Device = "auto", registries: Sequence[str] = ()) -> Any:
    """A predictor by name, path or address, or one that is loaded already.

    Args:
        predictor: A name in a registry, with a version or without (`smartfrz-base@1`); the path of an
            ONNX file (it ends in `.onnx` or has a folder in it); the address of one (it ends in
            `.onnx`), best with `#sha256=` and its SHA-256 behind it; the address of a predictor on a
            server (`http://host:port/NAME`, or https); or a `Predictor`, returned as it is.
        device: Where ONNX Runtime shall run; of no account for a server.
        registries: Addresses or paths of more registries, asked before those that SMARTFRZ_ZOO names.

    Returns:
        The `Predictor`, or `RemotePredictor`.

    Raises:
        ServerError: If a server cannot be reached, or has no predictor of that name.
        UnknownPredictorError: If there is none of that name.
        ChecksumError: If a file differs from its registry.
        RegistryError: If a registry breaks its format.
        DownloadError: If a file or registry cannot be fetched.
        PredictorFileError: If the file cannot be used.
    """
    if not isinstance(predictor, (str, os.PathLike)):
        return predictor
    if isinstance(predictor, str) and urls.is_server(predictor):
        from smartfrz.predictor.remote import RemotePredictor

        return RemotePredictor(urls.checked_server(predictor))
    with file_of(predictor, registries) as path:
        return Predictor(path, device=device)


def file_of(
    predictor: str | os.PathLike[str], registries: Sequence[str] = ()
) -> contextlib.AbstractContextManager[str | Path]:
    """The file that `load` reads; names and addresses are `located`, with its errors, paths are not looked at."""
    text = os.fspath(predictor)
    named = isinstance(predictor, str) and (urls.is_url(text) or not (text.endswith(".onnx") or os.sep in text))
    return located(text, registries) if named else contextlib.nullcontext(text)


@contextlib.contextmanager
def located(text: str, registries: Sequence[str] = (), progress: Progress | None = None) -> Iterator[Path]:
    """The file of a name or address, checked, fetched if need be. It may be gone after the block.

    Args:
        text: A name or an address, as for `load`.
        registries: As for `load`.
        progress: Told how much of a download is there, in bytes, and how much there will be.

    Raises:
        SmartFRZError: As `load`.
    """
    if urls.is_url(text):
        source = _address(text)
    else:
        entry = find(text, registries)
        if not entry.address:
            with as_file(files(__package__) / entry.file) as path:  # also where the package is a zip file
                _check(path, str(entry), entry.sha256, _REINSTALL)
                yield path
            return
        source = source_of(entry)
    local = urls.local_path(source.url)
    if local is None:
        with cache.provided(source, progress) as path:
            yield path
        return
    if source.sha256 is not None:
        _check(local, source.label, source.sha256, "Copy the file again, or correct what names it.")
    yield local


def embedded_folder() -> Path:
    """Where the predictors of this package lie."""
    return Path(str(files(__package__)))


def source_of(entry: Entry) -> cache.Source:
    """What the cache needs to know of an entry that lies elsewhere."""
    facts = tuple((name, getattr(entry, name)) for name in ("window", "tailored_size", "representation"))
    return cache.Source(str(entry), entry.address, entry.sha256, entry.size, facts)


def _address(text: str) -> cache.Source:
    url, _, fragment = text.partition("#")
    urls.checked(url)
    if not url.partition("?")[0].endswith(".onnx"):
        raise DownloadError(f"{url!r} is no address of a predictor; expected one that ends in .onnx.")
    if not fragment:
        if urls.local_path(url) is None:
            warnings.warn(
                f"Nothing says what {url} should hold: it is used unverified, and fetched each time. Add #sha256= and the "
                "SHA-256 of its file.",
                UserWarning,
                stacklevel=5,
            )
        return cache.Source(url, url)
    if not re.fullmatch("sha256=[0-9a-fA-F]{64}", fragment):
        raise DownloadError(f"{text!r} ends in #{fragment}; expected #sha256= and 64 hexadecimal digits, or nothing.")
    return cache.Source(url, url, fragment.removeprefix("sha256=").lower())


def _check(path: Path, name: str, expected: str, remedy: str) -> None:
    actual = cache.sha256_of(path) or "missing"
    if actual != expected:
        raise ChecksumError(
            f"the file of predictor {name!r} has SHA-256 {actual[:12]}...; expected {expected[:12]}.... {remedy}"
        )
