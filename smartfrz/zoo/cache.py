"""Files in a folder that others may write to as well: nothing is read or written through what they put there.

A symbolic link in a shared cache could have us overwrite a file of the user's, and a pipe could have us wait for ever.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_FOLDERS = ("predictors", "registries")  # inside of the cache, which may itself be a link
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def make_folder(path: Path) -> None:
    """Create a folder of the cache.

    Raises:
        OSError: If that fails, or if it is a symbolic link. Only the cache itself may be one.
    """
    path.mkdir(parents=True, exist_ok=True)
    _check_folder(path)


@contextlib.contextmanager
def open_plain(path: Path, *, write: bool = False) -> Iterator[BinaryIO]:
    """Open a plain file to read it, or to write it as well, for which it is created if it does not exist.

    Raises:
        OSError: If it cannot be opened, or is anything but a plain file with one name.
    """
    _check_folder(path.parent)
    if path.is_symlink():  # without O_NOFOLLOW, on Windows, this is all there is
        raise OSError(f"{path} is a symbolic link, which is not followed inside of the cache")
    handle = os.open(path, _FLAGS | (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY), 0o666)
    with os.fdopen(handle, "r+b" if write else "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or (write and found.st_nlink > 1):
            raise OSError(f"{path} is no plain file of the cache")
        yield file


def read(path: Path, limit: int) -> bytes:
    """Return the content of a plain file, of which there are at most `limit` bytes.

    Raises:
        OSError: As `open_plain` does, or if it is longer.
    """
    with open_plain(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"{path} has more than {limit} bytes")
    return content


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or the old one. A link in its place is replaced, not followed.

    Raises:
        OSError: If it cannot be written.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    handle = os.open(temporary, _FLAGS | os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_folder(path: Path) -> None:
    if path.name in _FOLDERS and path.is_symlink():
        raise OSError(f"{path} is a symbolic link, which is not followed inside of the cache")
