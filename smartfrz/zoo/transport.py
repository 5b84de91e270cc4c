"""Read the bytes of an address: resumed after a cut, never longer than allowed, never from elsewhere than asked for.

The standard library does the http: pooch cannot resume a download, and would bring seven packages into every install.
"""

import contextlib
import http.client
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
"""Called with the bytes received so far and with their total, or None if that is unknown."""
TIMEOUT = 30.0  # seconds without a single byte
DEADLINE = 1800.0  # seconds for a predictor, all attempts together
SHORT_DEADLINE = 60.0  # seconds for a registry or a card
ATTEMPTS = 5
PAUSE = 0.5  # seconds before the second attempt; doubles
_CHUNK = 2**18
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class _Request(NamedTuple):
    """What is asked for, and within which limits; `until` is a time of `time.monotonic`."""

    url: str
    limit: int
    size: int | None
    progress: Progress | None
    until: float


class _Body(NamedTuple):
    """An answer: the offset of its first byte, the length of the whole file, and a function that reads on."""

    start: int
    total: int | None
    read: Callable[[], bytes]


def offline() -> bool:
    """Return True if SMARTFRZ_OFFLINE forbids the network."""
    return os.environ.get("SMARTFRZ_OFFLINE", "0") not in ("", "0")


def read(url: str, limit: int, *, attempts: int = ATTEMPTS) -> bytes:
    """Return the content of a small file of at most `limit` bytes.

    Raises:
        DownloadError: For the same reasons as `download`.
    """
    buffer = io.BytesIO()
    download(url, buffer, limit=limit, attempts=attempts, deadline=SHORT_DEADLINE)
    return buffer.getvalue()


def download(
    url: str,
    file: BinaryIO,
    *,
    limit: int,
    size: int | None = None,
    progress: Progress | None = None,
    attempts: int = ATTEMPTS,
    deadline: float = DEADLINE,
) -> None:
    """Complete a file with the bytes that it lacks.

    Args:
        url: Has to pass `urls.check`, and so does every address that it redirects to.
        file: Open for reading and writing. Its content is taken for the beginning of the file at `url`.
        limit: Maximum number of bytes. A server that announces or sends more is refused.
        size: Number of bytes, if known.
        progress: Called after each chunk.
        attempts: Maximum number of attempts, each of which asks for what is still missing.
        deadline: Maximum number of seconds, all attempts together.

    Raises:
        UnreachableError: If the file is incomplete after the last attempt.
        DownloadError: If there is no such file, or its length is not the expected one.
        MissingDependencyError: If the package that reads this scheme is not installed.
        OSError: If `file` cannot be written.
    """
    urls.check(url)
    if offline() and urls.local_path(url) is None:
        raise UnreachableError(
            f"SMARTFRZ_OFFLINE is set, so that {url} is not fetched, and it is not in the cache. Unset it, or fetch it "
            "beforehand with: smartfrz zoo download"
        )
    request = _Request(url, limit, size, progress, time.monotonic() + deadline)
    for attempt in range(1, attempts + 1):
        try:
            return _resume(request, file)
        except UnreachableError as error:
            pause = PAUSE * 2 ** (attempt - 1)
            if attempt == attempts or time.monotonic() + pause > request.until:
                raise UnreachableError(
                    f"{error} Tried {'once' if attempt == 1 else f'{attempt} times'}. Check the address and the "
                    "connection, and try again: what has arrived is kept if the file's SHA-256 is known."
                ) from error
        time.sleep(pause)


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address or a local path, and the path in it.

    Raises:
        MissingDependencyError: If fsspec, or the package that it needs for this scheme, is not installed.
        DownloadError: If the scheme is unknown.
    """
    try:
        import fsspec

        # No cached instance, and so no old listing: a registry may have been published meanwhile.
        fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        scheme = urls.scheme(url) if urls.is_url(url) else "file"
        package = {"hf": '"smartfrz[hub]"', "s3": "s3fs", "gs": "gcsfs"}.get(scheme, "PACKAGE")
        if error.name == "fsspec" and scheme != "hf":
            package = '"smartfrz[zoo]"'
        raise MissingDependencyError(
            f"{scheme}:// addresses need a package that is not installed ({error}). Type: pip install {package}"
        ) from error
    except ValueError as error:
        raise DownloadError(f"{url!r} cannot be read ({error}). Check the scheme.") from error
    return fs, str(path)


@contextlib.contextmanager
def naming_the_target(target: str) -> Iterator[None]:
    """Turn the errors of a file system, which share no base class, into an `OSError` that names the target."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{target} cannot be read or written ({type(error).__name__}: {error})") from error


def _resume(request: _Request, file: BinaryIO) -> None:
    """Make one attempt to complete a file."""
    offset = file.seek(0, io.SEEK_END)
    if offset == request.size:
        return
    if request.size is not None and offset > request.size:
        offset = 0
    opening = _open_http if urls.scheme(request.url) in ("http", "https") else _open_file
    with opening(request.url, offset) as body:
        _check_length(request, body.total)
        _copy(request, body, file)


def _check_length(request: _Request, total: int | None) -> None:
    if total is not None and (total > request.limit or total != (request.size or total)):
        expected = f"at most {request.limit}" if request.size is None else f"{request.size}, as its registry says"
        raise DownloadError(
            f"{request.url} has {total} bytes; expected {expected}. Nothing was kept. Report it to whoever runs the server."
        )


def _copy(request: _Request, body: _Body, file: BinaryIO) -> None:
    expected, most = request.size or body.total, request.size or request.limit
    done = file.seek(body.start)
    file.truncate()
    while chunk := _read_chunk(request, body):
        done += len(chunk)
        if done > most:
            file.seek(0)
            file.truncate()
            raise DownloadError(
                f"{request.url} goes on after {most} bytes, which is all it may have. Nothing was kept. Report it to "
                "whoever runs the server."
            )
        file.write(chunk)
        if request.progress is not None:
            request.progress(done, expected)
    if expected is not None and done < expected:
        raise UnreachableError(f"{request.url} broke off after {done} of {expected} bytes.")


def _read_chunk(request: _Request, body: _Body) -> bytes:
    if time.monotonic() > request.until:
        raise UnreachableError(f"{request.url} did not arrive in time.")
    try:
        return body.read()
    except Exception as error:  # a broken connection, which must not be taken for an error of the file being written
        raise UnreachableError(f"{request.url} broke off ({type(error).__name__}: {error}).") from error


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects that keep the scheme and pass `urls.check`."""

    # Not redirect_request: the base class refuses some schemes before it, with a message that says less.
    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage
    ) -> Any:
        """Check the target, then follow the redirect."""
        target = urljoin(req.full_url, headers.get("location", ""))
        if urls.scheme(target) != urls.scheme(req.full_url):
            raise DownloadError(
                f"{req.full_url} redirects to {target!r}, another scheme; that is not followed. Pass the final address."
            )
        urls.check(target)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@contextlib.contextmanager
def _open_http(url: str, offset: int) -> Iterator[_Body]:
    with _request_http(url, offset) as response:
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise DownloadError(
                f"{url} comes with Content-Encoding {encoding!r}; expected the plain file, as was asked for. Report it to "
                "whoever runs the server."
            )
        if response.status == 206:
            start, total = offset, _total_of_range(url, offset, response.headers.get("Content-Range", ""))
        else:  # a server that ignores the range sends the whole file
            length = response.headers.get("Content-Length", "")
            start, total = 0, int(length) if length.isdecimal() else None
        yield _Body(start, total, lambda: response.read1(_CHUNK))


def _request_http(url: str, offset: int) -> http.client.HTTPResponse:
    # A compressed body could unfold to any size.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"smartfrz/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    # A proxy cannot reach the servers of this machine.
    proxies = [urllib.request.ProxyHandler({})] if urls.is_local(url) else []
    opener = urllib.request.build_opener(_CheckedRedirects, *proxies)
    try:
        response: http.client.HTTPResponse = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # the file is no longer than what is there: start again
            return _request_http(url, 0)
        if error.code in _BUSY:
            raise UnreachableError(f"{url} cannot be fetched now: {error.code} {error.reason}.") from error
        raise DownloadError(f"{url} cannot be fetched: {error.code} {error.reason}. Check the address.") from error
    except (OSError, http.client.HTTPException) as error:
        raise _connection_error(url, error) from error
    except ValueError as error:
        raise DownloadError(f"{url} cannot be fetched ({error}). Check the address.") from error


def _connection_error(url: str, error: Exception) -> DownloadError:
    reason = getattr(error, "reason", None) or repr(error)
    if isinstance(reason, ssl.SSLCertVerificationError):  # another attempt would not help
        return DownloadError(
            f"{url} has no certificate that is trusted here ({reason.verify_message}). Check the address. If your "
            "organisation has its own certificate authority, name its file with SSL_CERT_FILE."
        )
    return UnreachableError(f"{url} cannot be reached ({reason}).")


def _total_of_range(url: str, offset: int, header: str) -> int | None:
    """Read the length of the whole file from a Content-Range such as `bytes 100-199/200`."""
    unit, _, rest = header.partition(" ")
    first, whole = rest.partition("-")[0], rest.partition("/")[2]
    if unit != "bytes" or first != str(offset):
        raise DownloadError(
            f"{url} was asked for the bytes from {offset} on and answers {rest!r}. Report it to whoever runs the server."
        )
    return int(whole) if whole.isdecimal() else None


@contextlib.contextmanager
def _open_file(url: str, offset: int) -> Iterator[_Body]:
    local = urls.local_path(url)
    try:
        if local is not None:  # without fsspec, which may not be installed
            total, file = local.stat().st_size, local.open("rb")
        else:
            fs, path = file_system(url)
            total, file = fs.info(path)["size"], fs.open(path, "rb", cache_type="none")  # no reading ahead
    except FileNotFoundError as error:
        raise DownloadError(f"{url} does not exist. Check the address.") from error
    except (PermissionError, IsADirectoryError) as error:
        raise DownloadError(f"{url} cannot be read ({error}). Check the address and your credentials.") from error
    except SmartFRZError:
        raise
    except Exception as error:  # httpx, botocore and others have errors of their own, without a common base class
        raise UnreachableError(f"{url} cannot be reached ({type(error).__name__}: {error}).") from error
    with file:
        start = min(offset, total)
        file.seek(start)
        yield _Body(start, total, lambda: file.read(4 * _CHUNK))  # each is a request of its own
