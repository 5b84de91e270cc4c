"""Fetch predictors and registries: resumed after a cut, checked before use, kept in a folder per user.

That folder, which several processes may use at once, holds

    predictors/<sha256>.onnx   a checked file, named by its content
    predictors/<sha256>.part   the beginning of one; the next download continues it
    registries/<hash>.json     the last version of a registry, for when it cannot be reached
"""

import contextlib
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from smartfrz.errors import ChecksumError, DownloadError, PredictorFileError, UnreachableError
from smartfrz.files import replacing
from smartfrz.predictor.contract import PredictorInfo
from smartfrz.predictor.inspection import MAX_FILE_SIZE
from smartfrz.predictor.runtime import Predictor
from smartfrz.zoo import urls
from smartfrz.zoo.transport import ATTEMPTS, Progress, download, offline, read

logger = logging.getLogger("smartfrz")


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


def sha256_of(path: Path) -> str | None:
    """Return the SHA-256 of a file, or None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
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
                _download_checked(source, path, progress)
            except OSError as error:
                raise DownloadError(
                    f"There is no place to write {source.label} ({error}). Free some room in {folder()} or "
                    f"{tempfile.gettempdir()}, or name a folder with SMARTFRZ_CACHE."
                ) from error
        yield path


def read_registry(url: str, limit: int) -> bytes:
    """Return the content of a registry; if it cannot be reached, the copy in the cache.

    Raises:
        DownloadError: If it cannot be fetched and there is no copy.
    """
    copy = folder() / "registries" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    try:
        # With a copy at hand, a network that swallows everything must not delay a training for minutes.
        content = read(url, limit, attempts=2 if copy.exists() else ATTEMPTS)
    except UnreachableError as error:
        try:
            content = copy.read_bytes()
        except OSError:
            raise error from None
        if not offline():
            logger.warning("The registry %s cannot be reached; its copy in the cache is used. %s", url, error)
        return content
    if urls.local_path(url) is None:
        try:
            with replacing(copy, follow_links=False) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            logger.debug("No copy of the registry %s is kept: %s", url, error)
    return content


def _from_cache(source: Source, sha256: str, progress: Progress | None) -> Path | None:
    """Return the file in the cache, fetched if it is missing or damaged; None if the cache cannot be written."""
    path = path_of(sha256)
    if sha256_of(path) == sha256:  # without the lock, which a read-only cache could not give
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
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if sha256_of(path) == source.sha256:  # another process was faster
            return path
        if path.exists():
            logger.warning("The file of %s in the cache is damaged (%s); it is fetched again.", source.label, path)
        # Not files.replacing, which removes an unfinished file: this one is resumed next time.
        part = path.with_suffix(".part")
        _download_checked(source, part, progress)
        os.replace(part, path)
    return path


def _download_checked(source: Source, path: Path, progress: Progress | None) -> None:
    """Download to `path`, which may hold the beginning, and check the result; remove a file that fails a check."""
    resumed = path.exists()
    try:
        with path.open("r+b" if resumed else "x+b") as file:
            download(source.url, file, limit=MAX_FILE_SIZE, size=source.size, progress=progress)
            if resumed and _sha256_of_open(file) != source.sha256:
                # The beginning may come from another version of the file, or from an interrupted write.
                file.truncate(0)
                download(source.url, file, limit=MAX_FILE_SIZE, size=source.size, progress=progress)
            if source.sha256 is not None and (actual := _sha256_of_open(file)) != source.sha256:
                raise ChecksumError(
                    f"{source.url} has SHA-256 {actual[:12]}...; expected {source.sha256[:12]}... for {source.label}. It "
                    "was not kept. Try again; if the error stays, report it to the publisher."
                )
            os.fsync(file.fileno())
        _check_facts(source, Predictor(path, device="cpu").info)
    except UnreachableError:
        raise  # the beginning is kept and resumed next time
    except (DownloadError, ChecksumError, PredictorFileError, OSError):
        path.unlink(missing_ok=True)
        raise


def _sha256_of_open(file: io.BufferedRandom) -> str:
    file.flush()
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _check_facts(source: Source, info: PredictorInfo) -> None:
    for name, expected in source.facts:
        if getattr(info, name) != expected:
            raise PredictorFileError(
                f"{source.url} has {name}={getattr(info, name)!r}; its registry says {expected!r}. It was not kept. "
                "Report it to the owner of the registry."
            )
