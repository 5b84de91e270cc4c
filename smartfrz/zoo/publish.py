"""Add a predictor to a registry: in a local folder, on Hugging Face, or anywhere else that fsspec can write."""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from smartfrz import __version__
from smartfrz.errors import RegistryError, not_installed
from smartfrz.files import replacing
from smartfrz.predictor.runtime import Predictor
from smartfrz.zoo import registry, transport, urls
from smartfrz.zoo.registry import Entry
from smartfrz.zoo.versions import version_key


def describe(
    path: str | os.PathLike[str], *, name: str = "", version: str = "1", domains: Sequence[str] = (), file: str = ""
) -> Entry:
    """Make the registry entry of a predictor from its file.

    Args:
        path: The ONNX file, which is checked.
        name: Name in the registry; '' for the one in the file.
        version: Up to three numbers separated by dots.
        domains: Kinds of data that it was trained on, for example `vision`.
        file: File name in the registry's folder; '' for `<name>-<version>.onnx`.

    Raises:
        PredictorFileError: If the file cannot be used.
        RegistryError: If a registry may not contain such an entry.
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
    """Average the metrics in a predictor file over the architectures that were left out of training.

    The result is empty if the predictor was trained without cross-validation. `right_freezes` is the share of freezes
    that are right, `time_frozen` the share of all layers' training time that is frozen; the card lists each architecture.
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
        return {}  # a file that other software wrote: the form of its metrics is free
    return {"architectures": sorted(left_out), **means}


def merge(entries: Sequence[Entry], entry: Entry) -> list[Entry]:
    """Return the entries with one more, or with one updated.

    Raises:
        RegistryError: If its name and version, or its file name, already stand for another file.
    """
    key = (entry.name, version_key(entry.version))
    same = [e for e in entries if (e.name, version_key(e.version)) == key]
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
    """Read the card of a predictor file: the file of the same name with `.md`.

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
    """Copy a predictor and its card into the folder of a local registry, and list it there.

    Args:
        path: The predictor file.
        target: The registry file or its folder, which is created if it does not exist.
        entry: The result of `describe`.
        card: Text of its card.

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
        existing = registry.parse(place.read_bytes(), place.absolute().as_uri(), exact=True) if place.exists() else []
        entries = merge(existing, entry)
        # The registry comes last, so that a reader finds every file that it names.
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
        entry: The result of `describe`.
        card: Text of its card.
        private: Make a new repository on Hugging Face private.

    Returns:
        The address of the registry.

    Raises:
        RegistryError: If the registry there cannot be read, or has that version with another file.
        MissingDependencyError: If the package for that file system is not installed.
        OSError: If something cannot be written, for example because another commit came in between.
    """
    if not urls.is_url(target) or urls.scheme(target) == "file":
        return add(path, urls.local_path(target) or Path(target), entry, card).absolute().as_uri()
    target = target.rstrip("/")
    address = f"{target}/{registry.FILE}"
    if urls.scheme(target) in ("http", "https"):
        raise RegistryError(f"{target} cannot be written to; expected a folder, or hf://, s3:// or gs://.")
    if urls.scheme(target) == "hf":
        _commit_to_hub(path, target, entry, card, private)
        return address
    fs, place = transport.file_system(address)
    entries = merge(_read_entries(fs, place, address), entry)
    folder = place.rpartition("/")[0]
    with transport.naming_the_target(target):
        fs.makedirs(folder, exist_ok=True)
        # The registry comes last, so that a reader finds every file that it names.
        fs.pipe_file(f"{folder}/{entry.file}", path.read_bytes())
        fs.pipe_file(f"{folder}/{entry.card}", card.encode())
        fs.pipe_file(place, registry.serialise(entries))
    return address


def _read_entries(fs: Any, place: str, address: str) -> list[Entry]:
    """Read a registry in an fsspec file system; it is empty if it does not exist."""
    with transport.naming_the_target(address):
        try:
            content = fs.cat_file(place)
        except FileNotFoundError:
            return []
    return registry.parse(content, address, exact=True)


def _commit_to_hub(path: Path, target: str, entry: Entry, card: str, private: bool) -> None:
    """Commit a predictor, its card, the registry and the model card to `hf://organisation/repository[@revision]`."""
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise not_installed("Publishing to hf://", "huggingface_hub", "hub") from error
    repository, _, revision = target.removeprefix("hf://").partition("@")
    if repository.count("/") != 1 or "/" in revision:
        raise RegistryError(f"{target!r} is no model repository; expected hf://organisation/repository.")
    api = HfApi(library_name="smartfrz", library_version=__version__)
    with transport.naming_the_target(target):
        api.create_repo(repository, private=private, exist_ok=True)
        # The hub refuses our commit if there is another one after this parent, whose registry we read below.
        parent = api.repo_info(repository, revision=revision or None).sha
    address = f"{target}/{registry.FILE}"
    entries = merge(_read_entries(*transport.file_system(address), address), entry)
    files = {
        entry.file: path.read_bytes(),
        entry.card: card.encode(),
        "README.md": _model_card(target, entries, entry, card).encode(),
        registry.FILE: registry.serialise(entries),
    }
    with transport.naming_the_target(target):
        api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
            commit_message=f"Add {entry}",
            revision=revision or None,
            parent_commit=parent,
        )


def _model_card(target: str, entries: list[Entry], entry: Entry, card: str) -> str:
    """Write the README of a repository: metadata, a table of all predictors, and the newest one's card."""
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        license=entry.license.lower(), library_name="smartfrz", tags=["layer-freezing", "onnx", *entry.domains]
    )
    rows = [
        f"| [{e}]({e.card}) | {e.window} | {e.tailored_size} | {e.representation} | {', '.join(e.domains)} | "
        f"{e.metrics.get('auc', '')} | {e.metrics.get('weight_change_auc', '')} |"
        for e in entries
    ]
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        f"# {target.removeprefix('hf://')}",
        "",
        "Freeze predictors for SmartFRZ. The AUC is measured on architectures that were left out of training, and compared",
        "with the plain weight-change heuristic.",
        "",
        "| predictor | window | tailored size | representation | domains | AUC | weight change AUC |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "```",
        f"SMARTFRZ_ZOO={target} smartfrz zoo download {entry}",
        "```",
        "",
        card,
    ]
    return "\n".join(lines)
