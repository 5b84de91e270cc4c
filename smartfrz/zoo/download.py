"""Fetching a file: resumed after a cut, never longer than it may be, never from elsewhere than it was asked from."""

import contextlib
import http.client
import importlib.util
import io
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, NamedTuple
from urllib.parse import urljoin

from smartfrz import __version__
from smartfrz.errors import DownloadError, MissingDependencyError, SmartFRZError, UnreachableError
from smartfrz.zoo import urls

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there, and those there will be, if that is known."""
TIMEOUT = 30.0  # seconds without a single byte
ATTEMPTS = 5
_PAUSE = 0.5  # seconds before the second attempt; doubles
_CHUNK = 2**18
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class NotThereError(DownloadError):
    """The server answers, and has no such file."""


class _Body(NamedTuple):
    """What a server sends: from which byte on, how long the whole file is, and how to read it."""

    start: int
    total: int | None
    read: Callable[[], bytes]


def offline() -> bool:
    """Whether SMARTFRZ_OFFLINE=1 forbids the network."""
    return os.environ.get("SMARTFRZ_OFFLINE", "0") not in ("", "0")


def read(url: str, limit: int, *, attempts: int = ATTEMPTS) -> bytes:
    """A small file.

    Args:
        url: As for `fetch`.
        limit: The most bytes it may have.
        attempts: As for `fetch`.

    Raises:
        DownloadError: As `fetch`.
    """
    buffer = io.BytesIO()
    fetch(url, buffer, limit=limit, attempts=attempts)
    return buffer.getvalue()


def fetch(
    url: str,
    file: BinaryIO,
    *,
    limit: int,
    size: int | None = None,
    progress: Progress | None = None,
    attempts: int = ATTEMPTS,
) -> None:
    """Continue a file with what it lacks of an address.

    Args:
        url: Checked by `urls.checked`, and each address that it redirects to.
        file: Open for reading and writing. What it holds is taken for the beginning of the file.
        limit: The most bytes it may have. A server that says or sends more is refused.
        size: How many bytes it has, if that is known.
        progress: Told after each part.
        attempts: How often to ask, each time for what is still missing.

    Raises:
        UnreachableError: If it is not complete after the last attempt.
        DownloadError: If there is no such file, or it is not as long as it should be.
        MissingDependencyError: If the package that reads this scheme is not installed.
        OSError: If `file` cannot be written.
    """
    urls.checked(url)
    if offline() and urls.scheme(url) != "file":
        raise UnreachableError(
            f"SMARTFRZ_OFFLINE is set, so that {url} is not fetched, and it is not in the cache. Unset it, or fetch it "
            "beforehand with: smartfrz zoo download"
        )
    for attempt in range(1, attempts + 1):
        try:
            return _continue(url, file, limit, size, progress)
        except UnreachableError as error:
            if attempt == attempts:
                raise UnreachableError(
                    f"{error} Tried {attempts} times. Check the address and the connection, and try again: what has "
                    "arrived is kept where the file's SHA-256 is known."
                ) from error
        time.sleep(_PAUSE * 2 ** (attempt - 1))


def _continue(url: str, file: BinaryIO, limit: int, size: int | None, progress: Progress | None) -> None:
    offset = file.seek(0, io.SEEK_END)
    if size is not None and offset >= size:
        if offset == size:
            return
        offset = 0
    with _opened(url, offset) as body:
        expected = body.total if size is None else size
        if body.total is not None and (body.total > limit or body.total != expected):
            wanted = f"at most {limit}" if size is None else f"{size}, as its registry says"
            raise DownloadError(
                f"{url} has {body.total} bytes; expected {wanted}. Nothing was kept. Tell whoever runs the server."
            )
        done = file.seek(body.start)
        file.truncate()
        while chunk := _reading(url, body.read):
            if done + len(chunk) > (limit if size is None else size):
                file.seek(0)
                file.truncate()
                raise DownloadError(
                    f"{url} goes on after {limit if size is None else size} bytes, which is all it may have. Nothing was "
                    "kept. Tell whoever runs the server."
                )
            file.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, expected)
    if expected is not None and done < expected:
        raise UnreachableError(f"{url} broke off after {done} of {expected} bytes.")


def _reading(url: str, read: Callable[[], bytes]) -> bytes:
    """A part of the body. Errors of the connection must not pass for errors of the file that is written."""
    try:
        return read()
    except Exception as error:  # what may come is as manifold as in _from_files
        raise UnreachableError(f"{url} broke off ({type(error).__name__}: {error}).") from error


def _opened(url: str, offset: int) -> contextlib.AbstractContextManager[_Body]:
    return _over_http(url, offset) if urls.scheme(url) in ("http", "https") else _from_files(url, offset)


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects that stay encrypted, or on this machine."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage
    ) -> Any:
        # Not in redirect_request: the base class turns some schemes away before it, with less to say.
        target = urljoin(req.full_url, headers.get("location", ""))
        if urls.scheme(target) != urls.scheme(req.full_url):
            raise DownloadError(
                f"{req.full_url} redirects to {target!r}, another scheme; that is not followed. Pass the final address."
            )
        urls.checked(target)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@contextlib.contextmanager
def _over_http(url: str, offset: int) -> Iterator[_Body]:
    # A compressed body could unfold to any size.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"smartfrz/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    # A proxy cannot reach this machine's own servers.
    proxies = [urllib.request.ProxyHandler({})] if urls.is_local(url) else []
    opener = urllib.request.build_opener(_SameScheme, *proxies)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # what is there is as long as the file, or longer: begin anew
            with _over_http(url, 0) as body:
                yield body
            return
        if error.code in _BUSY:
            raise UnreachableError(f"{url} cannot be fetched now: {error.code} {error.reason}.") from error
        kind = NotThereError if error.code in (404, 410) else DownloadError
        raise kind(f"{url} cannot be fetched: {error.code} {error.reason}. Check the address.") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or repr(error)
        if isinstance(reason, ssl.SSLCertVerificationError):  # asking again would not help
            raise DownloadError(
                f"{url} has no certificate that is trusted here ({reason.verify_message}). Check the address; the "
                "certificate of your own authority is named by SSL_CERT_FILE."
            ) from error
        raise UnreachableError(f"{url} cannot be reached ({reason}).") from error
    except ValueError as error:
        raise DownloadError(f"{url} cannot be fetched ({error}). Check the address.") from error
    with response:
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise DownloadError(
                f"{url} comes with Content-Encoding {encoding!r}; expected the plain file, as was asked for. Tell whoever "
                "runs the server."
            )
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        start = 0
        if response.status == 206:
            # "bytes 100-199/200"; a server that ignores the range answers 200 with the whole file.
            unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
            first, whole = rest.partition("-")[0], rest.partition("/")[2]
            if unit != "bytes" or first != str(offset):
                raise DownloadError(
                    f"{url} was asked for the bytes from {offset} on and answers {rest!r}. Tell whoever runs the server."
                )
            start, total = offset, int(whole) if whole.isdecimal() else None
        yield _Body(start, total, lambda: response.read1(_CHUNK))


@contextlib.contextmanager
def _from_files(url: str, offset: int) -> Iterator[_Body]:
    local = urls.local_path(url)
    try:
        if local is not None:  # without fsspec, which may not be installed
            total, file = local.stat().st_size, local.open("rb")
        else:
            fs, path = file_system(url)
            # What one reads is what is fetched: nothing is read ahead.
            total, file = fs.info(path)["size"], fs.open(path, "rb", cache_type="none")
    except FileNotFoundError as error:
        raise NotThereError(f"{url} does not exist. Check the address.") from error
    except (PermissionError, IsADirectoryError) as error:
        raise DownloadError(f"{url} cannot be read ({error}). Check the address and your credentials.") from error
    except SmartFRZError:
        raise
    except Exception as error:
        # Each file system has errors of its own, as httpx's and botocore's, which share no base class.
        raise UnreachableError(f"{url} cannot be reached ({type(error).__name__}: {error}).") from error
    with file:
        start = min(offset, total)
        file.seek(start)
        yield _Body(start, total, lambda: file.read(4 * _CHUNK))  # each is a request of its own


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it.

    Raises:
        MissingDependencyError: If fsspec, or the package that it needs for this scheme, is not installed.
    """
    known = urls.scheme(url)
    extra = "hub" if known == "hf" else "zoo"
    if importlib.util.find_spec("fsspec") is None:
        raise MissingDependencyError(
            f'{known}:// addresses need fsspec, which is not installed. Type: pip install "smartfrz[{extra}]"'
        )
    import fsspec

    try:
        # No instance or listing of before: a registry may have been published meanwhile.
        fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        packages = {"hf": '"smartfrz[hub]"', "s3": "s3fs", "gs": "gcsfs"}
        raise MissingDependencyError(
            f"{known}:// addresses need a package that is not installed ({error}). Type: pip install "
            f"{packages.get(known, 'PACKAGE')}"
        ) from error
    except ValueError as error:
        raise DownloadError(f"{url!r} cannot be read ({error}). Check the scheme.") from error
    return fs, str(path)
