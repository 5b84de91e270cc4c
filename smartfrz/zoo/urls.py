"""Which addresses are read, and how they are put together."""

import os
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import url2pathname

from smartfrz.errors import DownloadError

SCHEMES = ("https", "file", "hf", "s3", "gs")
_LOCAL = ("localhost", "127.0.0.1", "::1")


def is_url(text: str) -> bool:
    """Whether a text is an address, and not a name or a path."""
    return "://" in text


def is_server(text: str) -> bool:
    """Whether a text is the address of a predictor on a server, `http://host:port/NAME`, and not of a file.

    Files have to end in `.onnx`, so that what does not is a server, where the scheme is one that servers speak.
    """
    return (
        scheme(text) in ("http", "https")
        and is_url(text)
        and not text.partition("#")[0].partition("?")[0].endswith(".onnx")
    )


def scheme(url: str) -> str:
    """The part before `://`, in lower case."""
    return url.partition("://")[0].lower()


def is_local(url: str) -> bool:
    """Whether an address is that of a server on this machine."""
    return urlsplit(url).hostname in _LOCAL


def checked(url: str) -> str:
    """The address of a file, if it may be read.

    Args:
        url: One of `SCHEMES`; `http://` only on this machine, or anywhere with SMARTFRZ_ALLOW_HTTP=1.

    Raises:
        DownloadError: If its scheme is another one, it holds a password, or its path leaves its folder.
    """
    parts = _plain(url)
    known = scheme(url)
    if known == "http":
        if not is_local(url) and os.environ.get("SMARTFRZ_ALLOW_HTTP") != "1":
            raise DownloadError(
                f"{url!r} is not encrypted; expected https://. If you trust the network, set SMARTFRZ_ALLOW_HTTP=1."
            )
    elif known not in SCHEMES:
        raise DownloadError(f"{url!r} cannot be read: expected one of {', '.join(f'{s}://' for s in SCHEMES)}.")
    # fsspec takes `::` for a chain of file systems.
    if "::" in url.replace("[::1]", ""):
        raise DownloadError(f"{url!r} is no plain address; write blanks and special characters as %20 and so on.")
    if known == "file" and parts.netloc not in ("", "localhost"):
        raise DownloadError(f"{url!r} names a host; expected three slashes, as in file:///folder/registry.json.")
    return url


def checked_server(url: str) -> str:
    """The address of a predictor on a server, if it may be asked.

    Unlike files, servers are asked over `http://` on any host: they run inside of a cluster's own
    network, and what they say can do no more than freeze layers.

    Args:
        url: For which `is_server` is true.

    Raises:
        DownloadError: If it holds a password, a query or a fragment, or its path leaves its folder.
    """
    parts = _plain(url)
    if parts.query or parts.fragment or not parts.hostname or not parts.path.strip("/"):
        raise DownloadError(
            f"{url!r} is neither the address of a file, which ends in .onnx, nor of a predictor on a server; expected "
            "http://host:port/NAME, with nothing behind the name."
        )
    return url


def _plain(url: str) -> SplitResult:
    """The parts of an address without a password or anything unusual."""
    try:
        parts = urlsplit(url)
        user = parts.username or parts.password
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError as error:
        raise DownloadError(f"{url!r} is no address ({error}); expected https://host/name.") from error
    if user:
        # Neither in messages nor in the process list.
        raise DownloadError(
            f"An address at {parts.hostname!r} holds a user name or password; expected none. Private files: use hf://, "
            "s3:// or gs://, which read their own credentials."
        )
    if not url.isprintable() or " " in url or "\\" in url:
        raise DownloadError(f"{url!r} is no plain address; write blanks and special characters as %20 and so on.")
    if ".." in unquote(parts.path).replace("\\", "/").split("/"):
        raise DownloadError(f"{url!r} leaves its own folder ('..'); expected the address itself.")
    return parts


def local_path(url: str) -> Path | None:
    """The path of a `file://` address; None for all others."""
    return Path(url2pathname(urlsplit(url).path)) if scheme(url) == "file" else None


def beside(url: str, name: str) -> str:
    """The address of another file in the same folder."""
    parts = urlsplit(url)
    folder = parts.path.rpartition("/")[0]
    return parts._replace(path=f"{folder}/{quote(name)}", query="", fragment="").geturl()


def registry_url(location: str) -> str:
    """The address of a registry's file.

    Args:
        location: An address or a local path; `/registry.json` is added unless it ends in `.json`.

    Raises:
        DownloadError: If it may not be read.
    """
    url = checked(location if is_url(location) else Path(location).absolute().as_uri())
    parts = urlsplit(url)
    if not parts.path.endswith(".json"):
        url = parts._replace(path=parts.path.rstrip("/") + "/registry.json").geturl()
    return url
