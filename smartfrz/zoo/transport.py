"""Read the bytes of an address: resumed after a cut, never longer than allowed, never from elsewhere than asked for.

The standard library does the http: pooch cannot resume a download, and would bring seven packages into every install.
"""

import contextlib
import http.client
import io
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from smartfrz import __version__
from smartfrz.errors import DownloadError, MissingDependencyError, SmartFRZError, UnreachableError, install_command
from smartfrz.files import open_regular
from smartfrz.predictor.deadline import call_within
from smartfrz.zoo import settings, urls

T = TypeVar("T")
Progress = Callable[[int, int | None], None]
"""Called with the bytes received so far and with their total, or None if that is unknown."""
TIMEOUT = 30.0  # seconds without a single byte
DEADLINE = 1800.0  # seconds for a predictor, all attempts together
SHORT_DEADLINE = 60.0  # seconds for a registry or a card
SLOWEST = 1024  # bytes a second, on average over SLOW_FOR seconds of waiting
SLOW_FOR = 30.0
ATTEMPTS = 5
PAUSE = 0.5  # seconds before the second attempt; doubles
_CHUNK = 2**18
_MAX_HEAD = 2**18  # bytes of an answer before its body; http.client would read "100 Continue" for ever
_BUSY = (408, 425, 429, 500, 502, 503, 504, 511)  # 511: a captive portal


class _Request(NamedTuple):
    """What is asked for, and within which limits; `until` is a time of `time.monotonic`."""

    url: str
    limit: int
    size: int | None
    progress: Progress | None
    until: float


class _Pace:
    """Ends one attempt that is late, silent or slow. Only waiting counts, not the time in which we write.

    The errors are `TimeoutError`, which http.client and urllib let through as they do those of a socket.
    """

    def __init__(self, until: float):
        self._until = until
        self._waited = 0.0
        self._arrived = 0

    def left(self) -> float:
        """Return the number of seconds that the next wait may take."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("it did not arrive in time")
        return min(TIMEOUT, left)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Callable[[int], None]]:
        """Measure a block that waits; it calls what is yielded with the number of bytes that came."""
        start = time.monotonic()
        yield self._add
        self._waited += time.monotonic() - start
        if self._waited >= SLOW_FOR:
            rate = self._arrived / self._waited
            self._waited, self._arrived = 0.0, 0
            if rate < SLOWEST:
                raise TimeoutError(f"only {rate:.0f} bytes a second arrive; expected at least {SLOWEST}")

    def _add(self, count: int) -> None:
        self._arrived += count

    def bound(self, call: Callable[[], T]) -> T:
        """Make a call that knows no time limit; on timeout, leave it to itself."""
        return call_within(self.left(), call)


class _Body(NamedTuple):
    """An answer: the offset of its first byte, the length of the whole file, and a function that reads on."""

    start: int
    total: int | None
    read: Callable[[], bytes]


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
    if settings.offline() and urls.local_path(url) is None:
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
        package = {"hf": "", "file": "", "s3": "s3fs", "gs": "gcsfs"}.get(scheme, "PACKAGE")
        install = f"pip install {package}"
        if scheme == "hf" or error.name == "fsspec":
            install = install_command("hub" if scheme == "hf" else "zoo", more=package)
        raise MissingDependencyError(
            f"{scheme}:// addresses need a package that is not installed ({error}). Type: {install}"
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
    with opening(request.url, offset, _Pace(request.until)) as body:
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
    except TimeoutError as error:
        late = time.monotonic() >= request.until
        raise UnreachableError(
            f"{request.url} {'did not arrive in time' if late else f'broke off: {error}'}."
        ) from error
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
        fp.close()  # the base class reads its page, which may have no end
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Incoming(io.RawIOBase):
    """The bytes of one answer, which has to come in time as a whole; a socket's own timeout begins anew with each byte."""

    def __init__(self, raw: io.RawIOBase, connected: socket.socket, pace: _Pace):
        super().__init__()
        self._raw, self._connected, self._pace = raw, connected, pace
        self.head: int | None = _MAX_HEAD

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connected.settimeout(self._pace.left())
        with self._pace.waiting() as arrived:
            count = self._raw.readinto(buffer) or 0
            arrived(count)
        if self.head is not None:
            self.head -= count
            if self.head < 0:
                raise http.client.HTTPException(f"more than {_MAX_HEAD} bytes come before the body")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is read through `_Incoming`."""

    def __init__(self, sock: socket.socket, *arguments: Any, pace: _Pace, **options: Any):
        super().__init__(sock, *arguments, **options)
        self._incoming = _Incoming(self.fp.detach(), sock, pace)
        self.fp = io.BufferedReader(self._incoming)

    def begin(self) -> None:
        super().begin()
        self._incoming.head = None


class _Connecting:
    """Opens connections within the pace, to the IP addresses that were checked, and to no others.

    Checking a name and having http.client look it up again would let its owner answer differently the second time.
    """

    def __init__(self, first: str, pace: _Pace):
        self._first, self._pace = first, pace

    def open(self, kind: type[http.client.HTTPConnection], request: urllib.request.Request) -> Callable[..., Any]:
        """Return a function that makes connections, as `urllib.request.AbstractHTTPHandler.do_open` calls it."""
        # Proxies are the user's own choice, and they look up names themselves.
        parts = urlsplit(request.full_url)
        proxied = request.host != parts.netloc
        if proxied and urls.is_ip(parts.hostname or ""):
            urls.check_public(request.full_url, parts.hostname or "", self._first)

        def create(place: tuple[str, int], *_: Any) -> socket.socket:
            return self._connect(place, "" if proxied else request.full_url)

        def make(*arguments: Any, **options: Any) -> http.client.HTTPConnection:
            connection = kind(*arguments, **options)
            connection._create_connection = create  # type: ignore[attr-defined]  # the hook that urllib3 used as well
            connection.response_class = lambda *given, **more: _Response(*given, pace=self._pace, **more)  # type: ignore[assignment]
            return connection

        return make

    def _connect(self, place: tuple[str, int], url: str) -> socket.socket:
        found = self._pace.bound(lambda: socket.getaddrinfo(*place, type=socket.SOCK_STREAM))
        for *_, address in found:
            if url:
                urls.check_public(url, str(address[0]), self._first)
        failed: OSError = OSError(f"{place[0]} has no address")
        for family, kind, protocol, _, address in found:
            connected = socket.socket(family, kind, protocol)
            try:
                connected.settimeout(self._pace.left())
                connected.connect(address)
                return connected
            except OSError as error:
                connected.close()
                failed = error
        raise failed


class _HTTP(urllib.request.HTTPHandler):
    def __init__(self, connecting: _Connecting):
        super().__init__()
        self._connecting = connecting

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connecting.open(http.client.HTTPConnection, req), req)


class _HTTPS(urllib.request.HTTPSHandler):
    def __init__(self, connecting: _Connecting):
        super().__init__()
        self._connecting = connecting

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connecting.open(http.client.HTTPSConnection, req), req)


@contextlib.contextmanager
def _open_http(url: str, offset: int, pace: _Pace) -> Iterator[_Body]:
    with _request_http(url, offset, pace) as response:
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise DownloadError(
                f"{url} comes with Content-Encoding {encoding!r}; expected the plain file, as was asked for. Report it to "
                "whoever runs the server."
            )
        if response.status == 206:
            start, total = offset, _total_of_range(url, offset, response.headers.get("Content-Range", ""))
        else:  # a server that ignores the range sends the whole file
            start, total = 0, _number(response.headers.get("Content-Length", ""))
        yield _Body(start, total, lambda: response.read1(_CHUNK))


def _request_http(url: str, offset: int, pace: _Pace) -> http.client.HTTPResponse:
    # A compressed body could unfold to any size.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"smartfrz/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    # A proxy cannot reach the servers of this machine.
    proxies = [urllib.request.ProxyHandler({})] if urls.is_local(url) else []
    connecting = _Connecting(url, pace)
    opener = urllib.request.build_opener(_CheckedRedirects, _HTTP(connecting), _HTTPS(connecting), *proxies)
    try:
        request = urllib.request.Request(url, headers=headers)
        response: http.client.HTTPResponse = opener.open(request, timeout=pace.left())
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # the file is no longer than what is there: start again
            return _request_http(url, 0, pace)
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
    return _number(whole)


def _number(text: str) -> int | None:
    """Return the number in a header; None if there is none, or one of so many digits that Python does not convert it."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


@contextlib.contextmanager
def _open_file(url: str, offset: int, pace: _Pace) -> Iterator[_Body]:
    local = urls.local_path(url)
    try:
        if local is not None:  # without fsspec, which may not be installed
            file: Any = open_regular(local)
            total = os.fstat(file.fileno()).st_size
        else:
            fs, path = file_system(url)
            total = pace.bound(lambda: fs.info(path)["size"])
            file = pace.bound(lambda: fs.open(path, "rb", cache_type="none"))  # no reading ahead
    except FileNotFoundError as error:
        raise DownloadError(f"{url} does not exist. Check the address.") from error
    except (PermissionError, IsADirectoryError) as error:
        raise DownloadError(f"{url} cannot be read ({error}). Check the address and your credentials.") from error
    except SmartFRZError:
        raise
    except Exception as error:  # httpx, botocore and others have errors of their own, without a common base class
        if local is not None:  # another attempt would not help
            raise DownloadError(f"{url} cannot be read ({error}). Check the address.") from error
        raise UnreachableError(f"{url} cannot be reached ({type(error).__name__}: {error}).") from error

    def read(count: int) -> bytes:
        with pace.waiting() as arrived:
            chunk: bytes = file.read(count) if local is not None else pace.bound(lambda: file.read(count))
            arrived(len(chunk))
        return chunk

    with file:
        start = min(offset, total)
        file.seek(start)
        yield _Body(start, total, lambda: read(_CHUNK))
