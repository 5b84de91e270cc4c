"""Adding a predictor to a registry, on this machine or elsewhere."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from smartfrz.errors import RegistryError
from smartfrz.files import replacing
from smartfrz.predictor.runtime import Predictor
from smartfrz.zoo import download, registry, urls
from smartfrz.zoo.registry import Entry


def describe(
    path: str | os.PathLike[str], *, name: str = "", version: str = "1", domains: Sequence[str] = (), file: str = ""
) -> Entry:
    """What a registry says of a predictor file, from the file itself.

    Args:
        path: The ONNX file; its contract is checked.
        name: As which it is listed; empty for the one in the file.
        version: Up to three numbers with dots between them.
        domains: What kinds of data it was trained on, as in `vision`.
        file: Its name beside the registry; empty for `<name>-<version>.onnx`.

    Raises:
        PredictorFileError: If the file cannot be used.
        RegistryError: If a registry may not hold such an entry.
    """
    predictor = Predictor(path, device="cpu")
    info, content = predictor.info, Path(path).read_bytes()
    entry = Entry(
        name=name or info.name,
        version=version,
        file=file or f"{name or info.name}-{version}.onnx",
        size=len(content),
        sha256=registry.sha256(content),
        window=info.window,
        tailored_size=info.tailored_size,
        representation=info.representation,
        domains=tuple(domains),
        metrics=held_out(info.metrics),
        license=info.license,
    )
    registry.check(entry)
    return entry


def held_out(metrics: dict[str, Any]) -> dict[str, Any]:
    """The means over architectures that were left out of training, from the metrics in a predictor file.

    Empty if it was trained without cross-validation. `right_freezes` is the share of right ones, `time_frozen` that of
    all layers' training time; the card has each architecture.
    """
    left_out = metrics.get("leave_one_architecture_out")
    if not left_out:
        return {}
    judged = {
        "auc": ("predictor", "auc"),
        "weight_change_auc": ("weight_change", "auc"),
        "right_freezes": ("predictor", "freeze_precision"),
        "time_frozen": ("predictor", "frozen_share"),
    }
    try:
        means = {
            name: round(fmean(part[judge][metric] for part in left_out.values()), 3)
            for name, (judge, metric) in judged.items()
        }
    except (AttributeError, KeyError, TypeError):
        return {}  # a file of somebody else's making: its metrics are free in form
    return {"architectures": sorted(left_out), **means}


def merged(entries: Sequence[Entry], entry: Entry) -> list[Entry]:
    """The entries with one more, or with its facts renewed.

    Raises:
        RegistryError: If that name and version, or that file name, stands for another file already.
    """
    key = (entry.name, registry.version_key(entry.version))
    same = [e for e in entries if (e.name, registry.version_key(e.version)) == key]
    for other in same:
        if other.sha256 != entry.sha256:
            raise RegistryError(
                f"{other} is in the registry with another file ({other.sha256[:12]}..., not {entry.sha256[:12]}...), and "
                "others may rely on it. Pass a higher --version."
            )
    others = [e for e in entries if e not in same]
    for other in others:
        if (other.file, other.url) == (entry.file, entry.url) and other.sha256 != entry.sha256:
            raise RegistryError(
                f"{entry.file} is the file of {other}, with other content. Give the new file another name, or take {other} "
                "out of the registry."
            )
    return [*others, entry]


def card_of(path: Path) -> str:
    """The card beside a predictor file.

    Raises:
        RegistryError: If there is none.
    """
    card = path.with_suffix(".md")
    try:
        return card.read_text("utf-8")
    except FileNotFoundError as error:
        raise RegistryError(
            f"{path} has no card: {card} does not exist. smartfrz-build train writes one; say in it on which data the "
            "predictor was trained, and where it does not help."
        ) from error


def add(path: Path, target: Path, entry: Entry, card: str) -> Path:
    """Copy a predictor and its card beside a registry on this machine, and list it there.

    Args:
        path: The predictor file.
        target: The registry file, or its folder; made if there is none.
        entry: What `describe` said of the file.
        card: Its card.

    Returns:
        The registry file.

    Raises:
        RegistryError: If the registry cannot be read, or has that version with another file.
        OSError: If something cannot be written.
    """
    from filelock import FileLock

    place = target if target.suffix == ".json" else target / registry.FILE
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        existing = registry.parse(place.read_bytes(), place.absolute().as_uri()) if place.exists() else []
        entries = merged(existing, entry)
        # The registry comes last: who reads it meanwhile finds every file that it names.
        for name, content in {
            entry.file: path.read_bytes(),
            entry.card: card.encode(),
            place.name: registry.serialise(entries),
        }.items():
            if (place.parent / name) != path.absolute():
                with replacing(place.parent / name) as temporary:
                    temporary.write_bytes(content)
    return place


def publish(path: Path, target: str, entry: Entry, card: str, *, private: bool = False) -> str:
    """Write a predictor, its card and its registry entry to where others can read them.

    Args:
        path: The predictor file.
        target: A local folder, `hf://organisation/repository`, or a folder in any file system that fsspec knows.
        entry: What `describe` said of the file.
        card: Its card.
        private: Whether a new repository of Hugging Face is private.

    Returns:
        The address of the registry.

    Raises:
        RegistryError: If the registry there cannot be read, or has that version with another file.
        MissingDependencyError: If the package for that file system is not installed.
        OSError: If something cannot be written.
    """
    if not urls.is_url(target) or urls.scheme(target) == "file":
        return add(path, urls.local_path(target) or Path(target), entry, card).absolute().as_uri()
    target = target.rstrip("/")
    address = f"{target}/{registry.FILE}"
    if urls.scheme(target) in ("http", "https"):
        raise RegistryError(f"{target} cannot be written to; expected a folder, or hf://, s3:// or gs://.")
    if urls.scheme(target) == "hf":
        from smartfrz.zoo.hub import to_hub

        to_hub(path, target, entry, card, private=private)
        return address
    fs, place = download.file_system(address)
    entries = merged(existing_entries(fs, place, address), entry)
    folder = place.rpartition("/")[0]
    with writing(target):
        fs.makedirs(folder, exist_ok=True)
        # The registry comes last: who reads it meanwhile finds every file that it names.
        fs.pipe_file(f"{folder}/{entry.file}", path.read_bytes())
        fs.pipe_file(f"{folder}/{entry.card}", card.encode())
        fs.pipe_file(place, registry.serialise(entries))
    return address


def existing_entries(fs: Any, place: str, address: str) -> list[Entry]:
    """What a registry in an fsspec file system lists; nothing if there is none."""
    with writing(address):
        try:
            content = fs.cat_file(place)
        except FileNotFoundError:
            return []
    return registry.parse(content, address)


@contextlib.contextmanager
def writing(target: str) -> Iterator[None]:
    """Turn the errors of a file system, which are of its own kind, into an `OSError` that names the target."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{target} cannot be read or written ({type(error).__name__}: {error})") from error
