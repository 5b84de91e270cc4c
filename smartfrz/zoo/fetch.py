"""Fetch predictors and registries: resumed after a cut, checked before use, kept in a folder per user.

That folder, which several processes may use at once, holds

    predictors/<sha256>.onnx   a checked file, named by its content
    predictors/<sha256>.part   the beginning of one; the next download continues it
    registries/<hash>.json     the last good version of a registry, for when it cannot be reached
    registries/<hash>.minisig  its signature, if one is asked for
    smartfrz.lock              which file a name and version stood for (smartfrz/zoo/lock.py)
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from smartfrz.errors import ChecksumError, DownloadError, PredictorFileError, RegistryError, UnreachableError
from smartfrz.files import open_regular
from smartfrz.predictor.contract import PredictorInfo
from smartfrz.predictor.inspection import MAX_FILE_SIZE
from smartfrz.predictor.runtime import Predictor
from smartfrz.zoo import cache, transport, urls
from smartfrz.zoo.settings import offline
from smartfrz.zoo.transport import ATTEMPTS, Progress, download, read

T = TypeVar("T")
logger = logging.getLogger("smartfrz")
_SIGNATURE_SIZE = 4096  # bytes


class Source(NamedTuple):
    """A predictor that is not on this machine yet.

    Attributes:
        label: Name for messages.
        url: Address of the file.
        sha256: SHA-256 of the whole file; None if unknown.
        size: Size in bytes; None if unknown.
        facts: Fields of `PredictorInfo`, and the values that they must have.
    """

    label: str
    url: str
    sha256: str | None = None
    size: int | None = None
    facts: tuple[tuple[str, object], ...] = ()


def folder() -> Path:
    """Return the cache folder: SMARTFRZ_CACHE, or the usual place on this system."""
    if chosen := os.environ.get("SMARTFRZ_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("smartfrz"))


def path_of(sha256: str) -> Path:
    """Return where the cache keeps the predictor with that SHA-256."""
    return folder() / "predictors" / f"{sha256}.onnx"


def cached_files() -> list[Path]:
    """List the predictors in the cache."""
    return sorted((folder() / "predictors").glob("*.onnx"))


def sha256_of(path: Path, *, cached: bool = False) -> str | None:
    """Return the SHA-256 of a file, or None if it cannot be read.

    Args:
        path: The file.
        cached: Whether it is in the cache, where others may write as well: links are not followed.
    """
    try:
        with cache.open_plain(path) if cached else open_regular(path) as file:
            return _sha256_of_open(file)
    except OSError:
        return None


@contextlib.contextmanager
def provide(source: Source, progress: Progress | None = None) -> Iterator[Path]:
    """Yield the checked file of a source, from the cache if possible, else from a temporary folder.

    Raises:
        ChecksumError: If its SHA-256 is not the expected one.
        PredictorFileError: If it is not a predictor, or not the one that its registry describes.
        DownloadError: If it cannot be fetched, or there is no room for it.
    """
    with contextlib.ExitStack() as stack:
        path = _from_cache(source, source.sha256, progress) if source.sha256 else None
        if path is None:
            try:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smartfrz-"))) / "predictor.onnx"
                _download_checked(source, path, progress, time.monotonic() + transport.DEADLINE)
            except OSError as error:
                raise DownloadError(
                    f"There is no place to write {source.label} ({error}). Free some room in {folder()} or "
                    f"{tempfile.gettempdir()}, or name a folder with SMARTFRZ_CACHE."
                ) from error
        yield path


def read_registry(url: str, limit: int, parse: Callable[[bytes, bytes], T], *, signed: bool = False) -> T:
    """Return what `parse` makes of a registry; if it cannot be reached or used, of the last good copy in the cache.

    Args:
        url: Address of its file.
        limit: Maximum number of bytes.
        parse: Called with the content and the signature; raises `RegistryError` if they cannot be used.
        signed: Fetch the signature, at the same address with `.minisig`; else it is empty.

    Raises:
        DownloadError: If it cannot be fetched and there is no good copy.
        RegistryError: If `parse` refuses it and there is no good copy.
    """
    copy = folder() / "registries" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    try:
        # With a copy at hand, a network that swallows everything must not delay a training for minutes.
        attempts = 2 if copy.exists() else ATTEMPTS
        content = read(url, limit, attempts=attempts)
        signature = read_signature(url, attempts) if signed else b""
        parsed = parse(content, signature)
    except (UnreachableError, RegistryError) as error:
        try:
            kept = cache.read(copy, limit)
            parsed = parse(kept, cache.read(copy.with_suffix(".minisig"), _SIGNATURE_SIZE) if signed else b"")
        except (OSError, RegistryError):
            raise error from None
        if isinstance(error, RegistryError):
            logger.warning("The registry %s answers with what cannot be used; its copy in the cache is. %s", url, error)
        elif not offline():
            logger.warning("The registry %s cannot be reached; its copy in the cache is used. %s", url, error)
        return parsed
    if urls.local_path(url) is None:
        try:
            if signed:
                cache.replace(copy.with_suffix(".minisig"), signature)
            cache.replace(copy, content)
        except OSError as error:
            logger.debug("No copy of the registry %s is kept: %s", url, error)
    return parsed


def read_signature(url: str, attempts: int = ATTEMPTS) -> bytes:
    """Return the signature of a registry.

    Raises:
        RegistryError: If there is none.
        UnreachableError: If the server does not answer.
    """
    try:
        return read(urls.signature_of(url), _SIGNATURE_SIZE, attempts=attempts)
    except UnreachableError:
        raise
    except DownloadError as error:
        raise RegistryError(
            f"The registry {url} has no signature, and its address asks for one ({error}). Ask its owner to sign it, or "
            "take #minisign= and the key out of the address to use it unsigned."
        ) from error


def _from_cache(source: Source, sha256: str, progress: Progress | None) -> Path | None:
    """Return the file in the cache, fetched if it is missing or damaged; None if the cache cannot be written."""
    path = path_of(sha256)
    if sha256_of(path, cached=True) == sha256:  # without the lock, which a read-only cache could not give
        return path
    if offline() and path.exists():
        raise ChecksumError(
            f"The file of {source.label} in the cache is damaged ({path}), and SMARTFRZ_OFFLINE is set. Unset it to fetch "
            "the file again."
        )
    try:
        return _fill_cache(source, path, progress)
    except OSError as error:
        logger.warning(
            "The cache %s cannot be used (%s); %s is fetched for this time only. Free %s there, or set SMARTFRZ_CACHE.",
            folder(),
            error,
            source.label,
            "some room" if source.size is None else f"{source.size} bytes",
        )
        return None


def _fill_cache(source: Source, path: Path, progress: Progress | None) -> Path:
    """Fetch a file into the cache.

    Processes that ask one mirror for a file wait for each other. Those that ask different mirrors do not: a registry could
    name the file of another one, at an address that sends it slowly.
    """
    from filelock import FileLock, Timeout

    until = time.monotonic() + transport.DEADLINE
    cache.make_folder(path.parent)
    mirror = f"{path.stem}-{hashlib.sha256(source.url.encode()).hexdigest()[:16]}"
    with contextlib.ExitStack() as stack:
        lock = FileLock(path.with_name(f"{mirror}.lock"))
        while not lock.is_locked:
            try:
                stack.enter_context(lock.acquire(timeout=1))
            except Timeout:
                if sha256_of(path, cached=True) == source.sha256:
                    return path
                if time.monotonic() > until:
                    raise UnreachableError(
                        f"Another process has been fetching {source.url} for {transport.DEADLINE:.0f} seconds. End it, or "
                        "try again later."
                    ) from None
        if sha256_of(path, cached=True) == source.sha256:  # another process was faster
            return path
        if path.exists() or path.is_symlink():
            logger.warning("The file of %s in the cache is damaged (%s); it is fetched again.", source.label, path)
        own = path.with_name(f"{mirror}.part")
        own.unlink(missing_ok=True)  # of a process that was killed
        # Not files.replacing, which removes an unfinished file: this one is resumed next time.
        part = path.with_suffix(".part")
        try:
            stack.enter_context(FileLock(path.with_suffix(".lock")).acquire(timeout=0))
        except Timeout:  # it is being fetched from another mirror
            part = own
            stack.callback(own.unlink, missing_ok=True)
        _download_checked(source, part, progress, until)
        os.replace(part, path)
    return path


def _download_checked(source: Source, path: Path, progress: Progress | None, until: float) -> None:
    """Download to `path`, which may hold the beginning, and check the result; remove a file that fails a check."""
    if path.is_symlink():
        path.unlink()
    resumed = path.exists()

    def go_on(file: BinaryIO) -> None:
        left = until - time.monotonic()
        download(source.url, file, limit=MAX_FILE_SIZE, size=source.size, progress=progress, deadline=left)

    try:
        with cache.open_plain(path, write=True) as file:
            go_on(file)
            if resumed and _sha256_of_open(file) != source.sha256:
                # The beginning may come from another version of the file, or from an interrupted write.
                file.truncate(0)
                go_on(file)
            if source.sha256 is not None and (actual := _sha256_of_open(file)) != source.sha256:
                raise ChecksumError(
                    f"{source.url} has SHA-256 {actual[:12]}...; expected {source.sha256[:12]}... for {source.label}. It "
                    "was not kept. Try again; if the error stays, report it to the publisher."
                )
            os.fsync(file.fileno())
    except (UnreachableError, KeyboardInterrupt):
        raise  # the beginning is kept and resumed next time
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    try:
        check_facts(source, Predictor(path, device="cpu").info, "It was not kept.")
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sha256_of_open(file: BinaryIO) -> str:
    file.seek(0)  # writes what is buffered
    digest, left = hashlib.sha256(), MAX_FILE_SIZE + 1  # a file of more is none of ours, whatever its digest
    while chunk := file.read(min(2**20, left)):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def check_facts(source: Source, info: PredictorInfo, outcome: str = "It is not used.") -> None:
    """Compare a predictor with what its registry says of it.

    Args:
        source: What it has to be.
        info: What it is.
        outcome: What the message says happens.

    Raises:
        PredictorFileError: If they differ.
    """
    for name, expected in source.facts:
        if getattr(info, name) != expected:
            raise PredictorFileError(
                f"{source.url} has {name}={getattr(info, name)!r}; its registry says {expected!r}. {outcome} "
                "Report it to the owner of the registry."
            )
