"""Rules for addresses: which ones may be read, and how they are put together."""

import ipaddress
import os
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import url2pathname

from smartfrz.errors import DownloadError
from smartfrz.zoo import settings

SCHEMES = ("https", "file", "hf", "s3", "gs")
_LOCAL = ("localhost", "127.0.0.1", "::1")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_url(text: str) -> bool:
    """Return True for an address, False for a name or a path."""
    return "://" in text


def is_server(text: str) -> bool:
    """Return True for the address of a predictor on a server, `http://host:port/NAME`.

    The address of a file has to end in `.onnx`; every other `http(s)://` address is taken for a server.
    """
    path = text.partition("#")[0].partition("?")[0]
    return is_url(text) and scheme(text) in ("http", "https") and not path.endswith(".onnx")


def scheme(url: str) -> str:
    """Return the part before `://`, in lower case."""
    return url.partition("://")[0].lower()


def is_local(url: str) -> bool:
    """Return True if the server of an address runs on this machine."""
    return urlsplit(url).hostname in _LOCAL


def is_ip(host: str) -> bool:
    """Return True if a host is an IP address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_private(address: str) -> bool:
    """Return True for an IP address that is not one of the public internet: private, link-local, this machine, multicast.

    An IPv4 address inside of an IPv6 address counts as itself.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return not ip.is_global or ip.is_multicast


def check_public(url: str, address: str, first: str) -> None:
    """Refuse an IP address inside of a private network, unless it was asked for or is allowed.

    Cloud machines give out credentials, and routers and printers take orders, at such addresses.

    Args:
        url: The address whose host it is.
        address: The IP address.
        first: The address that was asked for, before any redirect. If its host is this machine, named as `localhost`,
            `127.0.0.1` or `::1`, it may lead to this machine.

    Raises:
        DownloadError: If it is refused.
    """
    if not is_private(address) or settings.allow_private():
        return
    if is_local(first) and is_local(url):
        return
    raise DownloadError(
        f"{url} is at {address}, inside of a private network, which a registry or a redirect could name to reach what is "
        "not meant for it; expected a public address. If it is yours, pass --allow-private, or set SMARTFRZ_ALLOW_PRIVATE=1."
    )


def check(url: str) -> str:
    """Return the address of a file unchanged, if it may be read.

    Args:
        url: One of `SCHEMES`; `http://` only on this machine, or anywhere with SMARTFRZ_ALLOW_HTTP=1.

    Raises:
        DownloadError: If it has another scheme, contains a password, or its path leaves its folder.
    """
    parts = _split(url)
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


def check_server(url: str) -> str:
    """Return the address of a predictor on a server unchanged, if it may be asked.

    Unlike files, servers may be asked over `http://` on any host: they run inside a cluster's own network, and their
    answers can do no more than freeze layers.

    Args:
        url: An address for which `is_server` is true.

    Raises:
        DownloadError: If it contains a password, a query or a fragment, or its path leaves its folder.
    """
    parts = _split(url)
    if parts.query or parts.fragment or not parts.hostname or not parts.path.strip("/"):
        raise DownloadError(
            f"{url!r} is neither the address of a file, which ends in .onnx, nor of a predictor on a server; expected "
            "http://host:port/NAME, with nothing behind the name."
        )
    return url


def local_path(url: str) -> Path | None:
    """Return the path of a `file://` address, or None for any other address."""
    return Path(url2pathname(urlsplit(url).path)) if scheme(url) == "file" else None


def sibling(url: str, name: str) -> str:
    """Return the address of another file in the same folder."""
    parts = urlsplit(url)
    folder = parts.path.rpartition("/")[0]
    return parts._replace(path=f"{folder}/{quote(name)}", query="", fragment="").geturl()


def signature_of(url: str) -> str:
    """Return the address of a registry's signature, in the form of minisign: its own with `.minisig` after the path."""
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path}.minisig").geturl()


def registry_url(location: str) -> str:
    """Return the address of a registry's file.

    Args:
        location: An address or a local path; `/registry.json` is added unless it ends in `.json`.

    Raises:
        DownloadError: If it may not be read.
    """
    url = check(location if is_url(location) else Path(location).expanduser().absolute().as_uri())
    parts = urlsplit(url)
    if not parts.path.endswith(".json"):
        url = parts._replace(path=parts.path.rstrip("/") + "/registry.json").geturl()
    return url


def _split(url: str) -> SplitResult:
    """Split an address, or refuse it if it contains a password or anything unusual."""
    try:
        parts = urlsplit(url)
        user = parts.username or parts.password
        parts.port  # noqa: B018 - raises if it is not a number
    except ValueError as error:
        raise DownloadError(f"{url!r} is no address ({error}); expected https://host/name.") from error
    if user:
        # The address itself must not appear in messages and logs.
        raise DownloadError(
            f"An address at {parts.hostname!r} holds a user name or password; expected none. Private files: use hf://, "
            "s3:// or gs://, which read their own credentials."
        )
    if not url.isprintable() or " " in url or "\\" in url:
        raise DownloadError(f"{url!r} is no plain address; write blanks and special characters as %20 and so on.")
    if ".." in unquote(parts.path).replace("\\", "/").split("/"):
        raise DownloadError(f"{url!r} leaves its own folder ('..'); expected the address itself.")
    return parts
