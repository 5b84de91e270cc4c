"""Registries: lists of predictors with their checksums, facts and results."""

import difflib
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from typing import Any, NoReturn

from smartfrz.errors import DownloadError, RegistryError, UnknownPredictorError
from smartfrz.files import unique_keys
from smartfrz.predictor.contract import REPRESENTATIONS, find_unprintable
from smartfrz.predictor.inspection import MAX_FILE_SIZE
from smartfrz.zoo import fetch, lock, signatures, transport, urls
from smartfrz.zoo.versions import version_key

FORMAT_VERSION = 1
FILE = "registry.json"
EMBEDDED = "embedded"
MAX_SIZE = 4 * 2**20  # bytes of a registry; enough for thousands of predictors
# Lower case only: some file systems ignore case.
NAME, NAME_EXPECTED = r"[a-z0-9][a-z0-9._-]{0,63}", "up to 64 of a-z, 0-9, '.', '_' and '-'"
_PATTERNS = {
    "name": (NAME, NAME_EXPECTED),
    "version": (r"[0-9]{1,6}(\.[0-9]{1,6}){0,2}", "up to three numbers, as in '1' or '2.0.1'"),
    "file": (r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.onnx", "a plain file name that ends in .onnx, without a folder"),
    "sha256": (r"[0-9a-f]{64}", "64 hexadecimal digits"),
    "license": (r"[A-Za-z0-9.+() -]{1,100}", "an SPDX identifier, as in 'Apache-2.0'"),
    "url": (r"[!-~]{0,2000}", "an address, or '' for a file in the registry's folder"),
}
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


@dataclass(frozen=True)
class Entry:
    """One predictor in a registry.

    Attributes:
        name: For example `smartfrz-base`.
        version: Up to three numbers separated by dots. The highest is used unless another is asked for.
        file: File name of the predictor. Its card has the same name with `.md`.
        size: Size of the file in bytes.
        sha256: SHA-256 of the whole file.
        window: Number of records that the predictor reads.
        tailored_size: Number of samples in a record.
        representation: Name of the transformation that it first applies to the weights.
        domains: Kinds of data that it was trained on, for example `vision` and `language`.
        metrics: Results on architectures that it was not trained on.
        license: SPDX identifier.
        url: Address of the file; '' if it is in the registry's folder.
        registry: Address of the registry that the entry was read from; not written to the file.
    """

    name: str
    version: str
    file: str
    size: int
    sha256: str
    window: int
    tailored_size: int
    representation: str
    domains: tuple[str, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    license: str = "Apache-2.0"
    url: str = ""
    registry: str = EMBEDDED

    @property
    def address(self) -> str:
        """Address of the file, or '' if it ships with the package."""
        return self.url or ("" if self.registry == EMBEDDED else urls.sibling(self.registry, self.file))

    @property
    def card(self) -> str:
        """File name of the card, which is in the same folder."""
        return self.file.removesuffix(".onnx") + ".md"

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def parse(content: bytes, registry: str, *, exact: bool = False) -> list[Entry]:
    """Read and check a registry.

    Args:
        content: JSON: `format_version`, and `predictors`, a list of objects with the fields of `Entry`. Other keys, which
            later versions of this package may write, are ignored.
        registry: Its address, or `EMBEDDED`.
        exact: Refuse other keys, which writing the registry again would lose.

    Raises:
        RegistryError: If it breaks the format anywhere.
    """
    try:
        # Input that is nested a thousand levels deep ends in a RecursionError.
        document = json.loads(content, object_pairs_hook=unique_keys, parse_constant=_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        _refuse(registry, f"it is no valid JSON ({error})")
    if not isinstance(document, dict) or "format_version" not in document:
        _refuse(registry, "it has no format_version; expected an object with format_version and predictors")
    if type(document["format_version"]) is not int or document["format_version"] != FORMAT_VERSION:  # True == 1
        _refuse(
            registry,
            f"it has format_version {document['format_version']!r:.50}; this version of smartfrz reads {FORMAT_VERSION}. "
            "Update with: pip install --upgrade smartfrz",
        )
    known = {"format_version", "predictors"}
    if not isinstance(document.get("predictors"), list) or (exact and set(document) != known):
        _refuse(registry, f"it has {sorted(document)!r:.200}; expected format_version and a list named predictors")
    entries = []
    for number, value in enumerate(document["predictors"], 1):
        try:
            entries.append(_entry(value, registry, exact))
        except (ValueError, RecursionError) as error:
            _refuse(registry, f"in entry {number}, {error}")
    seen = set()
    for entry in entries:
        if (entry.name, version_key(entry.version)) in seen:
            _refuse(registry, f"it has two entries {str(entry)!r}; expected one of a name and version")
        seen.add((entry.name, version_key(entry.version)))
    return entries


def serialise(entries: Iterable[Entry]) -> bytes:
    """Return the content of a registry file with these entries, sorted by name and version."""
    rows = [asdict(entry) for entry in sorted(entries, key=lambda e: (e.name, version_key(e.version)))]
    for row in rows:
        del row["registry"]
    document = {"format_version": FORMAT_VERSION, "predictors": rows}
    return (json.dumps(document, indent=1) + "\n").encode()


def embedded() -> list[Entry]:
    """Return the predictors that ship with this package."""
    return parse((files(__package__) / FILE).read_bytes(), EMBEDDED)


def registries(more: Sequence[str] = ()) -> Iterator[list[Entry]]:
    """Yield the entries of each registry: the embedded one, `more`, and the registries that SMARTFRZ_ZOO names.

    Each registry is read only when it is asked for: a name in the first one needs no network.

    Args:
        more: Addresses or local paths of registries, each with `#minisign=` and a public key if it is signed.

    Raises:
        DownloadError: If one cannot be fetched and there is no copy of it.
        RegistryError: If one breaks the format, or its signature is missing or wrong, and there is no good copy of it.
        MissingDependencyError: If signatures are asked for, and cryptography is not installed.
    """
    yield embedded()
    for location in locations(more):
        yield entries_of(location)


def entries_of(location: str) -> list[Entry]:
    """Return the entries of one registry, at its address or path. Errors are those of `registries`."""
    place, key = signatures.split(location)
    url = urls.registry_url(place)
    return fetch.read_registry(url, MAX_SIZE, functools.partial(_parse_answer, url, key), signed=key is not None)


def locations(more: Sequence[str] = ()) -> list[str]:
    """Return the addresses and paths of all registries, but for the embedded one: `more`, and those in SMARTFRZ_ZOO."""
    more = (more,) if isinstance(more, str) else more
    return list(dict.fromkeys((*more, *os.environ.get("SMARTFRZ_ZOO", "").split())))


def verify_signature(location: str) -> str:
    """Fetch a registry and its signature now, without the cache, and return the signature's trusted comment.

    Args:
        location: Address or path, with `#minisign=` and the owner's public key.

    Raises:
        RegistryError: If it has no signature, or one that is wrong, or if it breaks the format.
        DownloadError: If it cannot be fetched, or the address has no key.
    """
    place, key = signatures.split(location)
    url = urls.registry_url(place)
    if key is None:
        raise DownloadError(
            f"There is no key to compare the signature of {url} with. Append #minisign= and the owner's public key to its "
            "address, which is the second line of minisign.pub."
        )
    content = transport.read(url, MAX_SIZE)
    comment = signatures.verify(content, fetch.read_signature(url), key, url)
    parse(content, url)
    return comment


def entries(more: Sequence[str] = ()) -> list[Entry]:
    """Return every predictor of every registry. Arguments and errors are those of `registries`."""
    return [entry for known in registries(more) for entry in known]


def find(name: str, more: Sequence[str] = ()) -> Entry:
    """Return the entry of a name, from the first registry that has it.

    Args:
        name: For example `smartfrz-base` for its highest version there, or `smartfrz-base@1`. With a project's lock
            file, a name without a version stands for the version there.
        more: Addresses or local paths of registries.

    Raises:
        UnknownPredictorError: If no registry has it.
        ChecksumError: If the version stood for another file before.
        DownloadError: If a registry cannot be fetched and there is no copy of it.
        RegistryError: If a registry breaks the format, or its highest version is lower than one that was used before.
    """
    return _choose(name, registries(more))


def find_in(location: str, name: str = "") -> Entry:
    """Return the entry of a name in one registry alone.

    Args:
        location: Address or local path of the registry.
        name: As for `find`; '' if the registry has one name only.

    Raises:
        UnknownPredictorError: If it has no such predictor, or no name is given and it has not exactly one.
        SmartFRZError: For the same reasons as `find`.
    """
    known = entries_of(location)
    names = sorted({entry.name for entry in known})
    if not name and len(names) != 1:
        raise UnknownPredictorError(
            f"{location} has {len(names)} predictors ({', '.join(names) or 'none'}); expected one where no name is given. "
            "Name the predictor."
        )
    return _choose(name or names[0], [known])


def _choose(name: str, parts: Iterable[list[Entry]]) -> Entry:
    wanted, _, version = name.partition("@")
    check_version(name, version)
    chosen = bool(version)
    version = version or lock.chosen_version(wanted)
    known: list[Entry] = []
    for part in parts:
        known += part
        fits = [e for e in part if e.name == wanted and version_key(version or e.version) == version_key(e.version)]
        if fits:
            entry = max(fits, key=lambda e: version_key(e.version))
            lock.check(entry, chosen=chosen)
            return entry
    names = sorted({entry.name for entry in known})
    if wanted in names:
        versions = ", ".join(entry.version for entry in known if entry.name == wanted)
        raise UnknownPredictorError(
            f"predictor {wanted!r} has no version {version}{', to which the lock file holds it' * (not chosen)}. "
            f"Known versions: {versions}."
        )
    close = difflib.get_close_matches(wanted, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownPredictorError(
        f"unknown predictor {wanted!r}.{hint} Known predictors: {', '.join(names)}. The path of a file has to end in "
        ".onnx. Name further registries with SMARTFRZ_ZOO."
    )


def check_version(name: str, version: str) -> str:
    """Return the version that a name asks for, if it is one, or ''.

    Raises:
        UnknownPredictorError: If it is something else.
    """
    if version and not re.fullmatch(_PATTERNS["version"][0], version):
        raise UnknownPredictorError(f"{name!r} asks for version {version!r}; expected {_PATTERNS['version'][1]}.")
    return version


def sha256(content: bytes) -> str:
    """Return the SHA-256 of a file's content in the form that registries use."""
    return hashlib.sha256(content).hexdigest()


def check(entry: Entry) -> None:
    """Refuse an entry with values that a registry may not contain.

    Raises:
        RegistryError: If there is such a value.
    """
    try:
        _entry({f.name: getattr(entry, f.name) for f in fields(Entry) if f.name != "registry"}, entry.registry, True)
    except ValueError as error:
        raise RegistryError(f"{entry} cannot be added to a registry: {error}.") from error


def _parse_answer(url: str, key: signatures.Key | None, content: bytes, signature: bytes) -> list[Entry]:
    if key is not None:
        signatures.verify(content, signature, key, url)
    return parse(content, url)


def _entry(value: Any, registry: str, exact: bool) -> Entry:
    wanted = {f.name for f in fields(Entry)} - {"registry"}
    if not isinstance(value, dict) or not wanted <= set(value) or (exact and set(value) != wanted):
        given = f"the keys {sorted(value)}" if isinstance(value, dict) else repr(value)
        raise ValueError(f"received {given:.400}; expected an object with {', '.join(sorted(wanted))}")
    for key, (pattern, expected) in _PATTERNS.items():
        if not isinstance(value[key], str) or not re.fullmatch(pattern, value[key]):
            raise ValueError(f"{key} is {value[key]!r:.200}; expected {expected}")
    for key, highest in {"size": MAX_FILE_SIZE, "window": 2**16, "tailored_size": 2**20}.items():
        # not isinstance: bool is a subclass of int
        if type(value[key]) is not int or not 0 < value[key] <= highest:
            raise ValueError(f"{key} is {value[key]!r:.200}; expected an integer in 1 to {highest}")
    if value["representation"] not in REPRESENTATIONS:
        raise ValueError(
            f"representation is {value['representation']!r:.200}; expected one of {', '.join(REPRESENTATIONS)}"
        )
    domains = value["domains"]
    if not isinstance(domains, (list, tuple)) or not all(isinstance(d, str) and _DOMAIN.fullmatch(d) for d in domains):
        raise ValueError(f"domains is {domains!r:.200}; expected a list of words, as in ['vision']")
    if not isinstance(value["metrics"], dict):
        raise ValueError(f"metrics is {value['metrics']!r:.200}; expected an object")
    if (text := find_unprintable(value["metrics"])) is not None:
        raise ValueError(f"metrics has the text {text!a:.200}; expected no control characters")
    if value["url"]:
        _check_url(value["url"], registry)
    return Entry(**{**{key: value[key] for key in wanted}, "domains": tuple(domains)}, registry=registry)


def _check_url(url: str, registry: str) -> None:
    try:
        urls.check(url)
    except DownloadError as error:
        raise ValueError(f"the url is refused: {error}") from error
    # A remote registry must not make us read files of this machine or give up encryption.
    source = "file" if registry == EMBEDDED else urls.scheme(registry)
    allowed = {"file": ("file",), "http": ("http", "file")}.get(urls.scheme(url))
    if allowed and source not in allowed:
        raise ValueError(f"the url is {url!r}, which a registry at {source}:// may not name; expected https://")
    if urls.is_local(url) and not (source == "file" or urls.is_local(registry)):
        raise ValueError(f"the url is {url!r} on your own machine, which a registry elsewhere may not name")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _constant(text)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _refuse(registry: str, fault: str) -> NoReturn:
    raise RegistryError(f"The registry {registry} cannot be used: {fault}. Tell its owner, or leave it out.")
