"""Folders of recordings, on this machine or in any file system that fsspec knows."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from smartfrz.files import replacing
from smartfrz.zoo import download, publish, urls


class Place(Protocol):
    """A folder from which files are fetched, and to which finished ones are sent."""

    def fetch(self, name: str, folder: Path) -> bool:
        """Copy a file to a folder on this machine; False if there is none of that name."""

    def send(self, file: Path) -> None:
        """Copy a finished file here, under a temporary name and renamed."""

    def where(self, name: str) -> str:
        """The address or path of a file here."""


class LocalPlace:
    """A folder on this machine, or on a disk that all machines share."""

    def __init__(self, folder: Path):
        self._folder = folder

    def fetch(self, name: str, folder: Path) -> bool:
        """As `Place.fetch`."""
        with contextlib.suppress(FileNotFoundError), replacing(folder / name) as temporary:
            shutil.copyfile(self._folder / name, temporary)
            return True
        return False

    def send(self, file: Path) -> None:
        """As `Place.send`."""
        with replacing(self._folder / file.name) as temporary:
            shutil.copyfile(file, temporary)

    def where(self, name: str) -> str:
        """As `Place.where`."""
        return str(self._folder / name)


class RemotePlace:
    """A folder in a file system of fsspec.

    Raises:
        MissingDependencyError: If fsspec, or the package for that file system, is not installed.
        DownloadError: If the scheme is unknown.
    """

    def __init__(self, url: str):
        self._url = url.rstrip("/")
        self._fs, self._folder = download.file_system(self._url)

    def fetch(self, name: str, folder: Path) -> bool:
        """As `Place.fetch`."""
        with publish.writing(f"{self._url}/{name}"):
            if not self._fs.exists(f"{self._folder}/{name}"):
                return False
            with replacing(folder / name) as temporary:
                self._fs.get_file(f"{self._folder}/{name}", str(temporary))
        return True

    def send(self, file: Path) -> None:
        """As `Place.send`. What a kill leaves under a temporary name begins with a dot, and no reader looks at it."""
        temporary = f"{self._folder}/.{file.stem}-{uuid.uuid4().hex}{file.suffix}"
        with publish.writing(f"{self._url}/{file.name}"):
            self._fs.makedirs(self._folder, exist_ok=True)
            try:
                self._fs.put_file(str(file), temporary)
                self._fs.mv(temporary, f"{self._folder}/{file.name}")
            except BaseException:
                with contextlib.suppress(Exception):
                    self._fs.rm_file(temporary)
                raise

    def where(self, name: str) -> str:
        """As `Place.where`."""
        return f"{self._url}/{name}"


def place_of(output: str) -> Place:
    """The folder of an address or a path.

    Args:
        output: `s3://bucket/runs` and the like, `file:///folder`, or a path.

    Raises:
        MissingDependencyError: As `RemotePlace`.
        DownloadError: As `RemotePlace`.
    """
    if not urls.is_url(output):
        return LocalPlace(Path(output))
    local = urls.local_path(output)
    return RemotePlace(output) if local is None else LocalPlace(local)


def absolute(output: str) -> str:
    """The same place for a process in another folder."""
    return output if urls.is_url(output) else str(Path(output).absolute())


@contextlib.contextmanager
def on_this_machine(places: Sequence[str]) -> Iterator[list[Path]]:
    """The files of some places, each an address or a path, for the length of the block."""
    with TemporaryDirectory(prefix="smartfrz-") as name:
        files = []
        for place in places:
            if not urls.is_url(place):
                files.append(Path(place))
                continue
            folder, _, file = place.rpartition("/")
            if not place_of(folder).fetch(file, Path(name)):
                raise FileNotFoundError(f"{place} is gone; record it again.")
            files.append(Path(name) / file)
        yield files
