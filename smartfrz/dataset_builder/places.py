"""Folders of recordings, in any file system that fsspec knows; a path is one on this machine."""

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from smartfrz.files import replacing
from smartfrz.zoo import transport, urls


class Place:
    """A folder from which files are fetched, and to which finished ones are sent.

    Args:
        output: `s3://bucket/runs` or another address that fsspec knows, or a path.

    Raises:
        MissingDependencyError: If fsspec, or the package for that file system, is not installed.
        DownloadError: If the scheme is unknown.
    """

    def __init__(self, output: str):
        self._address = output.rstrip("/")
        self._fs, self._folder = transport.file_system(self._address)

    def fetch(self, name: str, folder: Path) -> bool:
        """Copy a file to a folder on this machine; return False if there is no file of that name."""
        with transport.naming_the_target(self.address_of(name)):
            if not self._fs.exists(f"{self._folder}/{name}"):
                return False
            with replacing(folder / name) as temporary:
                self._fs.get_file(f"{self._folder}/{name}", str(temporary))
        return True

    def send(self, file: Path) -> None:
        """Copy a finished file here: first under a temporary name, which starts with a dot, then renamed."""
        temporary = f"{self._folder}/.{file.stem}-{uuid.uuid4().hex}{file.suffix}"
        with transport.naming_the_target(self.address_of(file.name)):
            self._fs.makedirs(self._folder, exist_ok=True)
            try:
                self._fs.put_file(str(file), temporary)
                self._fs.mv(temporary, f"{self._folder}/{file.name}")
            except BaseException:
                with contextlib.suppress(Exception):
                    self._fs.rm_file(temporary)
                raise

    def remove(self, name: str) -> None:
        """Remove a file if there is one of that name."""
        with transport.naming_the_target(self.address_of(name)):
            if self._fs.exists(f"{self._folder}/{name}"):
                self._fs.rm_file(f"{self._folder}/{name}")

    def address_of(self, name: str) -> str:
        """Return the address or path of a file here."""
        return f"{self._address}/{name}"


def make_absolute(output: str) -> str:
    """Return an address, or a path that means the same in another working directory."""
    return output if urls.is_url(output) else str(Path(output).absolute())


@contextlib.contextmanager
def on_this_machine(places: Sequence[str]) -> Iterator[list[Path]]:
    """Yield local paths for addresses and paths of files; copies of remote files are deleted after the block."""
    with TemporaryDirectory(prefix="smartfrz-") as name:
        files = []
        for place in places:
            if not urls.is_url(place):
                files.append(Path(place))
                continue
            folder, _, file = place.rpartition("/")
            if not Place(folder).fetch(file, Path(name)):
                raise FileNotFoundError(f"{place} is gone; record it again.")
            files.append(Path(name) / file)
        yield files
