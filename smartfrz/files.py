"""Write files so that a reader never sees half of one."""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read it, links followed. A pipe could have us wait for ever, and a device read without end.

    Raises:
        OSError: If it cannot be opened, or is anything but a regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        number, text = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "Is no regular file")
        raise OSError(number, text, os.fspath(path))
    return os.fdopen(handle, "rb")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` when the block succeeds.

    If the block fails, for example on a full disk or a KeyboardInterrupt, the temporary file is removed and the file
    at `path` stays as it was. What a killed process left is removed by the next call for the same path. A file that is
    replaced keeps its permissions.

    Args:
        path: Path of the finished file. Its folder is created. If it is a symbolic link, the file that it leads to is
            replaced.

    Raises:
        OSError: If the folder cannot be written, the disk is full, or `path` is something else than a file, or a link
            that leads to itself. Nothing is changed then.
    """
    if os.fspath(path).endswith(tuple(filter(None, (os.sep, os.altsep)))):
        raise OSError(f"{str(path)!r} ends as the path of a folder; expected the path of a file. Add its name.")
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(f"{str(path)!r} is a symbolic link that leads to itself; expected a file. Remove the link.")
    if target.exists() and not target.is_file():
        raise OSError(
            f"{str(path)!r} is no regular file; expected a path at which a file can be written. Choose another."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(target)
    temporary, handle = _create(target)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if target.is_file():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)
    _sync_folder(target.parent)


def _create(target: Path) -> tuple[Path, int | None]:
    """Create a temporary file beside the target, with the permissions of any new file.

    Returns:
        Its path, and a handle that holds a lock on it as long as this process lives; None where there are no locks.
    """
    while True:
        # Some writers choose their format by the suffix.
        temporary = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}{target.suffix}")
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        if fcntl is None:
            os.close(handle)  # Windows renames no open file
            return temporary, None
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        if temporary.exists():
            return temporary, handle
        os.close(handle)  # another process took it for left behind, before it was locked


def _remove_left_behind(target: Path) -> None:
    """Remove temporary files of this target that no living process has locked."""
    if fcntl is None:
        return
    ours = re.compile(rf"{re.escape(_prefix(target))}[0-9a-f]{{16}}{re.escape(target.suffix)}")
    for path in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
        # Not ours to remove: it is locked, gone, of another user, or a link.
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


def _prefix(target: Path) -> str:
    return f".{target.stem[:40]}-"


def _sync_folder(folder: Path) -> None:
    """Have the new name survive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON file, for `json.loads(object_pairs_hook=unique_keys)`.

    Raises:
        ValueError: If it has a key twice, of which readers take either.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"one object has a key twice: {sorted(key for key, _ in pairs)!r:.200}")
    return found
