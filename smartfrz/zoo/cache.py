"""The per-user folder of downloaded predictors, which several processes may use at once.

What lies in it:

    predictors/<sha256>.onnx   a checked file; its name is its content
    predictors/<sha256>.part   what has arrived of one; the next download goes on from there
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
from smartfrz.zoo import download

logger = logging.getLogger("smartfrz")


class Source(NamedTuple):
    """A predictor that lies elsewhere.

    Attributes:
        label: What messages call it.
        url: Where it lies.
        sha256: Of the whole file; None if nobody says.
        size: Bytes, if known.
        facts: Fields of `PredictorInfo` that it has to have.
    """

    label: str
    url: str
    sha256: str | None = None
    size: int | None = None
    facts: tuple[tuple[str, object], ...] = ()


def folder() -> Path:
    """The cache: SMARTFRZ_CACHE, or what is usual on this system."""
    if chosen := os.environ.get("SMARTFRZ_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("smartfrz"))


def path_of(sha256: str) -> Path:
    """Where the file of that SHA-256 is kept."""
    return folder() / "predictors" / f"{sha256}.onnx"


def kept() -> list[Path]:
    """The files in the cache."""
    return sorted((folder() / "predictors").glob("*.onnx"))


def sha256_of(path: Path) -> str | None:
    """The SHA-256 of a file; None if there is none that can be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@contextlib.contextmanager
def provided(source: Source, progress: download.Progress | None = None) -> Iterator[Path]:
    """The checked file of a source, from the cache if it can be, else for the length of the block.

    Raises:
        ChecksumError: If it has another SHA-256 than it should.
        PredictorFileError: If it is no predictor, or another one than its registry describes.
        DownloadError: If it cannot be fetched, or there is no room for it anywhere.
    """
    if source.sha256 is not None:
        try:
            path = obtained(source, progress)
        except OSError as error:
            logger.warning(
                "The cache %s cannot be used (%s); %s is fetched for this time only. Free %s there, or set SMARTFRZ_CACHE.",
                folder(),
                error,
                source.label,
                "some room" if source.size is None else f"{source.size} bytes",
            )
        else:
            yield path
            return
    try:
        # Closed by hand: an error within the caller's block is none of writing.
        temporary = tempfile.TemporaryDirectory(prefix="smartfrz-")
    except OSError as error:
        raise _no_room(source, error) from error
    with temporary as name:
        path = Path(name) / "predictor.onnx"
        try:
            _fetch(source, path, progress)
        except OSError as error:
            raise _no_room(source, error) from error
        yield path


def obtained(source: Source, progress: download.Progress | None = None) -> Path:
    """The checked file in the cache, fetched if it is not there or damaged. `source.sha256` has to be known.

    Raises:
        OSError: If the cache cannot be written.
        SmartFRZError: As `provided`.
    """
    from filelock import FileLock

    if source.sha256 is None:
        raise ValueError(f"{source.label} has no known SHA-256; expected one, since the cache is sorted by it.")
    path = path_of(source.sha256)
    if sha256_of(path) == source.sha256:  # needs no lock, and no right to write
        return path
    if download.offline() and path.exists():
        raise ChecksumError(
            f"The file of {source.label} in the cache is damaged ({path}), and SMARTFRZ_OFFLINE is set. Unset it to fetch "
            "the file again."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if sha256_of(path) == source.sha256:  # another process was faster
            return path
        if path.exists():
            logger.warning("The file of %s in the cache is damaged (%s); it is fetched again.", source.label, path)
        part = path.with_suffix(".part")
        # Not with files.replacing, which removes what it could not finish: here that is gone on with.
        _fetch(source, part, progress)
        os.replace(part, path)
    return path


def registry(url: str, limit: int) -> bytes:
    """The content of a registry; if it cannot be reached, what it was when it last could.

    Raises:
        DownloadError: If it cannot be fetched, and never was.
    """
    copy = folder() / "registries" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    try:
        # With a copy at hand, a network that swallows everything must not hold a training up for minutes.
        content = download.read(url, limit, attempts=2 if copy.exists() else download.ATTEMPTS)
    except UnreachableError as error:
        try:
            content = copy.read_bytes()
        except OSError:
            raise error from None
        if not download.offline():
            logger.warning("The registry %s cannot be reached; its copy in the cache is used. %s", url, error)
        return content
    if not url.startswith("file:"):
        try:
            with replacing(copy) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            logger.debug("No copy of the registry %s is kept: %s", url, error)
    return content


def _fetch(source: Source, path: Path, progress: download.Progress | None) -> None:
    """Fetch into `path`, which may hold the beginning, and check; what is wrong is removed."""
    resumed = path.exists()
    try:
        with path.open("r+b" if resumed else "x+b") as file:
            download.fetch(source.url, file, limit=MAX_FILE_SIZE, size=source.size, progress=progress)
            if resumed and _sha256_of_open(file) != source.sha256:
                # The beginning may be that of another version, or was cut within a write.
                file.truncate(0)
                download.fetch(source.url, file, limit=MAX_FILE_SIZE, size=source.size, progress=progress)
            if source.sha256 is not None and (actual := _sha256_of_open(file)) != source.sha256:
                raise ChecksumError(
                    f"{source.url} has SHA-256 {actual[:12]}...; expected {source.sha256[:12]}... for {source.label}. It "
                    "was not kept. Try again; if it stays so, tell whoever published it."
                )
            os.fsync(file.fileno())
        _check_facts(source, Predictor(path, device="cpu").info)
    except UnreachableError:
        raise  # gone on with next time
    except (DownloadError, ChecksumError, PredictorFileError, OSError):
        path.unlink(missing_ok=True)
        raise


def _sha256_of_open(file: io.BufferedRandom) -> str:
    """The SHA-256 of an open file, from its beginning."""
    file.flush()
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _check_facts(source: Source, info: PredictorInfo) -> None:
    for name, expected in source.facts:
        if getattr(info, name) != expected:
            raise PredictorFileError(
                f"{source.url} has {name}={getattr(info, name)!r}; its registry says {expected!r}. It was not kept. Tell "
                "whoever keeps the registry."
            )


def _no_room(source: Source, error: OSError) -> DownloadError:
    return DownloadError(
        f"There is no place to write {source.label} ({error}). Free some room in {folder()} or {tempfile.gettempdir()}, or "
        "name a folder with SMARTFRZ_CACHE."
    )
