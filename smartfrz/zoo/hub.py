"""Publishing to a repository of Hugging Face."""

from pathlib import Path

from smartfrz import __version__
from smartfrz.errors import MissingDependencyError, RegistryError
from smartfrz.zoo import download, publish, registry
from smartfrz.zoo.registry import Entry


def to_hub(path: Path, target: str, entry: Entry, card: str, *, private: bool = False) -> None:
    """Commit a predictor, its card, the registry and the repository's model card, all at once.

    Args:
        path: The predictor file.
        target: `hf://organisation/repository`, with `@revision` behind it for another branch than main.
        entry: What the registry says of it.
        card: Its card.
        private: Whether a new repository is private.

    Raises:
        RegistryError: If the target is none, or the registry there contradicts the entry.
        MissingDependencyError: If huggingface_hub is not installed.
        OSError: If the hub refuses, for example because somebody else has committed meanwhile.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise MissingDependencyError(
            'Publishing to hf:// needs huggingface_hub, which is not installed. Type: pip install "smartfrz[hub]"'
        ) from error
    repository, _, revision = target.removeprefix("hf://").partition("@")
    if repository.count("/") != 1 or "/" in revision:
        raise RegistryError(f"{target!r} is no model repository; expected hf://organisation/repository.")
    api = HfApi(library_name="smartfrz", library_version=__version__)
    with publish.writing(target):
        api.create_repo(repository, private=private, exist_ok=True)
        # What is read and what is written belong together: a commit of somebody else in between is refused.
        parent = api.repo_info(repository, revision=revision or None).sha
    address = f"{target}/{registry.FILE}"
    fs, place = download.file_system(address)
    entries = publish.merged(publish.existing_entries(fs, place, address), entry)
    files = {
        entry.file: path.read_bytes(),
        entry.card: card.encode(),
        "README.md": model_card(target, entries, entry, card).encode(),
        registry.FILE: registry.serialise(entries),
    }
    with publish.writing(target):
        api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
            commit_message=f"Add {entry}",
            revision=revision or None,
            parent_commit=parent,
        )


def model_card(target: str, entries: list[Entry], entry: Entry, card: str) -> str:
    """The README of a repository: metadata, all predictors, and the newest one's card."""
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
        "Freeze predictors for SmartFRZ. AUC: on architectures that were left out of training, beside that of the plain",
        "weight-change heuristic.",
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
