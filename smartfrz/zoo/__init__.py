"""Named predictors: some ship with this package, registries name others, and a cache keeps what was downloaded."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from smartfrz.errors import ChecksumError, DownloadError, ServerError
from smartfrz.predictor import runtime
from smartfrz.predictor.runtime import Device, Providers
from smartfrz.zoo import fetch, lock, publish, settings, urls
from smartfrz.zoo.registry import Entry, entries, find, find_in
from smartfrz.zoo.transport import Progress

__all__ = ["DEFAULT", "Entry", "Predictor", "entries", "find", "load", "locate"]
DEFAULT = "smartfrz-base"
_REINSTALL = "The installation is damaged. Type: pip install --force-reinstall smartfrz"


class Predictor(runtime.Predictor):
    """A predictor file, checked and loaded, which can come from Hugging Face and be published there.

    `smartfrz.predictor.runtime.Predictor` documents the arguments, attributes and errors.
    """

    @classmethod
    def from_pretrained(
        cls,
        repository: str | os.PathLike[str],
        name: str = "",
        *,
        device: Device = "auto",
        providers: Providers | None = None,
    ) -> "Predictor":
        """Load a predictor from a repository on Hugging Face, or as `load` does.

        Args:
            repository: A model repository, `organisation/repository`, with `@REVISION` for a branch, a tag or a commit;
                or a name, path or address, as for `load`.
            name: Which predictor of the repository, with or without a version (`my-predictor@2`). Not needed where
                the repository has one name only.
            device: As for `load`.
            providers: As for `load`.

        Raises:
            ValueError: If `repository` is no repository although a `name` is given.
            UnknownPredictorError: If the repository has no predictor of that name, or several and none is named.
            SmartFRZError: For the same reasons as `load`.
        """
        text = os.fspath(repository)
        remote = re.fullmatch(r"(?:hf://)?([\w.-]+/[\w.-]+(?:@[^#]+)?)", text)
        if remote is None or text.endswith(".onnx"):
            if name:
                raise ValueError(
                    f"`repository` is {text!r} and `name` is {name!r}; expected organisation/repository on Hugging Face "
                    "where a name is given. Leave the name out, or correct the repository."
                )
            loaded = load(repository, device=device, providers=providers)
        else:
            loaded = _load(find_in(f"hf://{remote[1]}", name), (), device, providers)
        if not isinstance(loaded, Predictor):
            raise ValueError(f"{text!r} is a predictor on a server; expected one with a file. Use smartfrz.zoo.load.")
        return loaded

    def push_to_hub(
        self,
        repository: str,
        *,
        name: str = "",
        version: str = "1",
        domains: Sequence[str] = (),
        card: str = "",
        private: bool = False,
    ) -> str:
        """Publish the file, its card and its registry entry in a model repository on Hugging Face.

        `smartfrz zoo publish` does the same. You have to be logged in (`hf auth login`, or HF_TOKEN).

        Args:
            repository: `organisation/repository`, with `@BRANCH` if it is not the main one.
            name: Name in the registry; '' for the name in the file.
            version: Up to three numbers separated by dots.
            domains: Kinds of data that it was trained on, for example `vision`.
            card: Text of the card; '' for the file beside the predictor, with `.md`.
            private: Make a new repository private.

        Returns:
            The address of the registry, which `load(registries=[...])` takes.

        Raises:
            RegistryError: If the repository has that version with another file, or there is no card.
            MissingDependencyError: If huggingface_hub is not installed.
            OSError: If it cannot be written.
        """
        target = f"hf://{repository.removeprefix('hf://')}"
        entry = publish.describe(self.path, name=name, version=version, domains=domains)
        return publish.publish(self.path, target, entry, card or publish.card_of(self.path), private=private)


def load(
    predictor: Any = DEFAULT,
    *,
    device: Device = "auto",
    registries: Sequence[str] = (),
    providers: Providers | None = None,
) -> Any:
    """Load a predictor by name, path or address; return one that is loaded already.

    Args:
        predictor: One of: a name in a registry, with or without a version (`smartfrz-base@1`); the path of
            an ONNX file, which ends in `.onnx` or contains a folder; the address of such a file, best with
            `#sha256=` and its SHA-256 appended; the address of a predictor on a server
            (`http://host:port/NAME`, or https); or a `Predictor`, which is returned as it is.
        device: Where ONNX Runtime runs. Ignored for a predictor on a server.
        registries: Addresses or paths of further registries, asked before the ones that SMARTFRZ_ZOO names.
        providers: Execution providers of ONNX Runtime, in the place of `device`; as for `Predictor`.

    Returns:
        The `Predictor` or `RemotePredictor`.

    Raises:
        ServerError: If a server cannot be reached or may not be asked, or has no predictor of that name.
        UnknownPredictorError: If no registry has that name.
        ChecksumError: If a file differs from its registry, or from what it was when it was first used.
        RegistryError: If a registry breaks its format or goes back to a lower version, or its signature is wrong.
        DownloadError: If a file or registry cannot be fetched.
        PredictorFileError: If the file cannot be used.
    """
    if not isinstance(predictor, (str, os.PathLike)):
        return predictor
    if isinstance(predictor, str) and urls.is_server(predictor):
        from smartfrz.predictor.remote import RemotePredictor

        url = urls.check_server(predictor)
        if settings.offline() and not urls.is_local(url):
            raise ServerError(
                f"SMARTFRZ_OFFLINE is set, so that {url} is not asked. Unset it, or use a predictor on this machine."
            )
        return RemotePredictor(url)
    if not _is_named(predictor):
        return Predictor(predictor, device=device, providers=providers)
    return _load(os.fspath(predictor), registries, device, providers)


def _load(wanted: str | Entry, registries: Sequence[str], device: Device, providers: Providers | None) -> Predictor:
    with _provide(wanted, registries) as (path, source, entry):
        loaded = Predictor(path, device=device, providers=providers)
        fetch.check_facts(source, loaded.info)
        if entry is not None:
            lock.remember(entry)
        return loaded


def file_of(
    predictor: str | os.PathLike[str], registries: Sequence[str] = ()
) -> contextlib.AbstractContextManager[str | Path]:
    """Return a context with the file that `load` reads: a name or an address is located, a path is taken as it is."""
    text = os.fspath(predictor)
    return locate(text, registries) if _is_named(predictor) else contextlib.nullcontext(text)


@contextlib.contextmanager
def locate(text: str, registries: Sequence[str] = (), progress: Progress | None = None) -> Iterator[Path]:
    """Yield the checked file of a name or address, fetched if necessary. It may be deleted after the block.

    Args:
        text: A name or an address, as for `load`.
        registries: As for `load`.
        progress: Called during a download with the bytes received so far and their total, or None if unknown.

    Raises:
        SmartFRZError: For the same reasons as `load`.
    """
    with _provide(text, registries, progress) as (path, source, entry):
        if entry is not None:
            fetch.check_facts(source, Predictor(path, device="cpu").info)
            lock.remember(entry)
        yield path


def embedded_folder() -> Path:
    """Return the folder of the predictors that ship with this package."""
    return Path(str(files(__package__)))


def _is_named(predictor: str | os.PathLike[str]) -> bool:
    """Return True for a name or an address, False for a path."""
    text = os.fspath(predictor)
    return isinstance(predictor, str) and (urls.is_url(text) or not (text.endswith(".onnx") or os.sep in text))


@contextlib.contextmanager
def _provide(
    wanted: str | Entry, registries: Sequence[str], progress: Progress | None = None
) -> Iterator[tuple[Path, fetch.Source, Entry | None]]:
    """Yield the file of a name, address or entry, what it has to be, and its entry. Its facts are left to be compared."""
    entry = None
    if isinstance(wanted, str) and urls.is_url(wanted):
        source = _source_of_url(wanted)
    else:
        entry = find(wanted, registries) if isinstance(wanted, str) else wanted
        source = _source_of_entry(entry)
        if not entry.address:
            with as_file(files(__package__) / entry.file) as path:  # works in a zip file, too
                _check(path, str(entry), entry.sha256, _REINSTALL)
                yield path, source, entry
            return
    local = urls.local_path(source.url)
    if local is None:
        with fetch.provide(source, progress) as path:
            yield path, source, entry
        return
    if source.sha256 is not None:
        _check(local, source.label, source.sha256, "Copy the file again, or correct the expected SHA-256.")
    yield local, source, entry


def _source_of_entry(entry: Entry) -> fetch.Source:
    facts = tuple((name, getattr(entry, name)) for name in ("window", "tailored_size", "representation"))
    return fetch.Source(str(entry), entry.address or entry.file, entry.sha256, entry.size, facts)


def _source_of_url(text: str) -> fetch.Source:
    url, _, fragment = text.partition("#")
    urls.check(url)
    if not url.partition("?")[0].endswith(".onnx"):
        raise DownloadError(f"{url!r} is no address of a predictor; expected one that ends in .onnx.")
    if not fragment:
        if urls.local_path(url) is None:
            warnings.warn(
                f"There is no SHA-256 to compare {url} with: it is used unverified, and fetched each time. Add #sha256= and "
                "the SHA-256 of its file.",
                UserWarning,
                stacklevel=6,  # the line that called `load`, or entered `locate`
            )
        return fetch.Source(url, url)
    if not re.fullmatch("sha256=[0-9a-fA-F]{64}", fragment):
        raise DownloadError(f"{text!r} ends in #{fragment}; expected #sha256= and 64 hexadecimal digits, or nothing.")
    return fetch.Source(url, url, fragment.removeprefix("sha256=").lower())


def _check(path: Path, name: str, expected: str, remedy: str) -> None:
    actual = fetch.sha256_of(path) or "missing"
    if actual != expected:
        raise ChecksumError(
            f"the file of predictor {name!r} has SHA-256 {actual[:12]}...; expected {expected[:12]}.... {remedy}"
        )
