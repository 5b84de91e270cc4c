"""Signatures over registries, in the form of minisign: who made a registry, wherever it was fetched from.

The owner signs with `minisign -Sm registry.json`, which writes `registry.json.minisig` beside it. The user appends the
owner's public key to the address: `https://host/zoo#minisign=RW...`. Format: https://jedisct1.github.io/minisign/
"""

import base64
import binascii
import hashlib
from typing import NamedTuple, NoReturn

from smartfrz.errors import DownloadError, MissingDependencyError, RegistryError, install_command

_MARK = "#minisign="
_PREHASHED, _PLAIN = b"ED", b"Ed"  # the second is of minisign before 0.10, or of minisign -l


class Key(NamedTuple):
    """A public key of minisign.

    Attributes:
        number: Eight bytes by which a signature names its key.
        public: The Ed25519 key, 32 bytes.
    """

    number: bytes
    public: bytes


def split(location: str) -> tuple[str, Key | None]:
    """Divide the address or path of a registry from the key behind `#minisign=`, if there is one.

    Raises:
        DownloadError: If there is something else than a public key.
    """
    place, mark, text = location.partition(_MARK)
    if not mark:
        return location, None
    try:
        raw = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raw = b""
    if len(raw) != 42 or raw[:2] != _PLAIN:
        raise DownloadError(
            f"{text!r:.100} after {_MARK} is no public key of minisign; expected 56 characters that begin with RW, which is "
            "the second line of the owner's minisign.pub."
        )
    return place, Key(raw[2:10], raw[10:])


def verify(content: bytes, signature: bytes, key: Key, registry: str) -> str:
    """Check a signature, and return its trusted comment, which minisign fills with the time.

    Args:
        content: The signed file.
        signature: The content of its `.minisig`.
        key: The public key.
        registry: Its address, for messages.

    Raises:
        RegistryError: If the signature is damaged, or is not over this content by this key.
        MissingDependencyError: If cryptography is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise MissingDependencyError(
            f"Signatures of registries need cryptography, which cannot be imported ({error}). Type: "
            + install_command("signatures")
        ) from error
    try:
        # Not splitlines, which also divides at characters that a comment may contain.
        _, line, comment, last = (text.rstrip("\r") for text in signature.decode("utf-8").split("\n")[:4])
        raw, whole = (base64.b64decode(text, validate=True) for text in (line, last))
        trusted = comment.removeprefix("trusted comment: ")
        if len(raw) != 74 or len(whole) != 64 or raw[:2] not in (_PREHASHED, _PLAIN) or trusted == comment:
            raise ValueError("it has another form")
    except ValueError as error:
        _refuse(registry, f"is damaged ({error}); expected a file that minisign -S wrote")
    if raw[2:10] != key.number:
        _refuse(registry, f"is by key {_show(raw[2:10])}; expected {_show(key.number)}, which is in its address")
    signed = hashlib.blake2b(content).digest() if raw[:2] == _PREHASHED else content
    public = Ed25519PublicKey.from_public_bytes(key.public)
    try:
        public.verify(raw[10:], signed)
        public.verify(whole, raw[10:] + trusted.encode())
    except InvalidSignature:
        _refuse(registry, "is not over this content: the registry was changed after it was signed, or by somebody else")
    return "".join(character if character.isprintable() else " " for character in trusted)


def _show(number: bytes) -> str:
    """Show the number of a key as minisign does."""
    return number[::-1].hex().upper()


def _refuse(registry: str, fault: str) -> NoReturn:
    raise RegistryError(
        f"The signature of the registry {registry} {fault}. Tell its owner, and do not use it until then."
    )
