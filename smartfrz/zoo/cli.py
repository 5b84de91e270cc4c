"""`smartfrz zoo`: list, fetch, check and publish predictors."""

import contextlib
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from smartfrz import commands
from smartfrz.commands import Group
from smartfrz.completing import PREDICTOR
from smartfrz.errors import DownloadError, MissingDependencyError, PredictorFileError, SmartFRZError, printable
from smartfrz.files import replacing
from smartfrz.predictor.runtime import Predictor
from smartfrz.progress import progress
from smartfrz.serving import triton
from smartfrz.zoo import embedded_folder, fetch, file_of, locate, lock, publish, registry, settings, transport, urls
from smartfrz.zoo.registry import Entry

_CARD_SIZE = 2**20  # bytes


def _setting(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """Make a callback that lets an option go before an environment variable, for the time of the command."""

    def choose(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            context.with_resource(settings.choosing(name, "1" if value is True else str(value)))

    return choose


_private = click.option(
    "--allow-private",
    is_flag=True,
    expose_value=False,
    callback=_setting("SMARTFRZ_ALLOW_PRIVATE"),
    help="Allow addresses inside of a private network. So does SMARTFRZ_ALLOW_PRIVATE=1.",
)
_lock = click.option(
    "--lock",
    type=click.Path(dir_okay=False, path_type=Path),
    expose_value=False,
    callback=_setting("SMARTFRZ_LOCK"),
    metavar="FILE",
    help="The project's lock file, which holds each name to the file that it first stood for. Default: SMARTFRZ_LOCK, or "
    "one in the cache.",
)


def _registries(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a command that looks up a name."""
    named = click.option(
        "--registry",
        "registries",
        multiple=True,
        metavar="ADDRESS",
        help="A further registry: https://, file://, hf://, s3://, gs:// or a path, with #minisign=KEY if it is signed. "
        "SMARTFRZ_ZOO names others.",
    )
    return named(_lock(_private(command)))


def _facts(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for facts that a predictor file does not contain."""
    for option in (
        click.option(
            "--card", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Default: FILE's .md."
        ),
        click.option(
            "--domain",
            "domains",
            multiple=True,
            help="A kind of data that it was trained on, such as vision. May be repeated.",
        ),
        click.option("--version", default="1", show_default=True, help="Up to three numbers separated by dots."),
        click.option("--name", default="", help="Default: the name in the file."),
    ):
        command = option(command)
    return command


_name = click.argument("name", type=PREDICTOR)
_file = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))


_SECTIONS = {
    "Use": ("list", "show", "download", "path", "verify", "unlock"),
    "Share": ("add", "publish", "export"),
}


@click.group(cls=Group, sections=_SECTIONS, short_help="Find, fetch, check and publish predictors.")
def zoo() -> None:
    """Find, fetch, check and publish predictors."""


@zoo.command("list", short_help="List predictors.", example="smartfrz zoo list --registry https://example.org/zoo")
@_registries
def list_(registries: tuple[str, ...]) -> None:
    """List the predictors of all registries."""
    known = registry.entries(registries)
    header = ("predictor", "window", "size", "representation", "domains", "AUC", "MB", "SHA-256", "where")
    table = [header] + [
        (
            str(entry),
            str(entry.window),
            str(entry.tailored_size),
            entry.representation,
            ",".join(entry.domains) or "-",
            _number(entry.metrics.get("auc")),
            f"{entry.size / 1e6:.1f}",
            entry.sha256[:12],
            _where(entry),
        )
        for entry in known
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table)
    commands.answer([_facts_of(entry) for entry in known], "\n".join(lines))


@zoo.command(short_help="Show the facts about a predictor.", example="smartfrz zoo show smartfrz-base")
@_name
@_registries
def show(name: str, registries: tuple[str, ...]) -> None:
    """Show the facts about a predictor, and its card."""
    entry = registry.find(name, registries)
    lines = [
        f"{key:14} {value if isinstance(value, (str, int)) else json.dumps(value)}"
        for key, value in asdict(entry).items()
        if value
    ]
    try:
        card = _card(entry)
    except DownloadError as error:
        card = ""
        commands.note(f"Its card cannot be shown: {error}")
    lines += [f"{'where':14} {_where(entry)}", "", card]
    commands.answer({**_facts_of(entry), "where": _where(entry), "card": card}, "\n".join(lines))


@zoo.command(
    "download",
    short_help="Fetch a predictor, and print its path.",
    example="smartfrz zoo download smartfrz-base -o base.onnx",
)
@_name
@_registries
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Also copy it to this file or folder.")
def download_(name: str, registries: tuple[str, ...], output: Path | None) -> None:
    """Fetch a predictor into the cache, and print its path.

    NAME is a name, name@version, or the address of an ONNX file, best with #sha256=.
    """
    if output is None and urls.is_url(name) and "#" not in name:
        raise click.UsageError("An address without #sha256= is not kept in the cache. Add it, or pass --output.")
    with _plain_warnings(), _received(name) as tell, locate(name, registries, tell) as path:
        if output is not None:
            target = output / _file_name(name, registries) if output.is_dir() else output
            with replacing(target) as temporary:
                temporary.write_bytes(path.read_bytes())
    place = path if output is None else target
    if not place.exists():
        raise DownloadError(
            f"{name} cannot be kept in the cache {fetch.folder()}. Pass --output, or set SMARTFRZ_CACHE."
        )
    commands.answer({"predictor": name, "path": place}, str(place))


@zoo.command(short_help="Check files and signatures.", example="smartfrz zoo verify my.onnx")
@click.argument("path", required=False, type=click.Path())
@click.option("--signatures", "signed", is_flag=True, help="Check the signatures of registries instead.")
@_private
def verify(path: str | None, signed: bool) -> None:
    """Check a predictor, or a folder with a registry. Without PATH: check this package and the cache.

    With --signatures, PATH is the address or path of a registry with #minisign= and its owner's public key. Without PATH:
    check the registries that SMARTFRZ_ZOO names.
    """
    unloaded: list[MissingDependencyError] = []
    checks = _signatures(path) if signed else _files(None if path is None else Path(path), unloaded)
    results = []
    for label, check in checks:
        try:
            results.append({"what": label, "good": True, "found": check()})
        except SmartFRZError as error:
            results.append({"what": label, "good": False, "found": str(error)})
        commands.show(f"{'ok ' if results[-1]['good'] else 'bad'}  {label}  {results[-1]['found']}")
    commands.answer(results)
    faults = sum(not result["good"] for result in results)
    if faults and signed:
        raise click.ClickException(f"{faults} without a good signature.")
    if faults:
        raise click.ClickException(f"{faults} damaged. A file in the cache is fetched again when it is next used.")
    if unloaded:
        click.echo(f"Checksums match, but loading was not tried. {unloaded[0]}", err=True)


@zoo.command(short_help="Let a name stand for another file.", example="smartfrz zoo unlock my-net")
@_name
@_lock
def unlock(name: str) -> None:
    """Take a predictor out of the lock file: what NAME, or NAME@VERSION, stands for next is locked anew."""
    wanted, _, version = name.partition("@")
    gone = lock.forget(wanted, registry.check_version(name, version))
    if not gone:
        raise click.ClickException(f"{name} is not in {lock.place()}.")
    commands.answer(
        {"unlocked": gone, "lock": str(lock.place())},
        f"{', '.join(gone)} may stand for another file now, from its next use on ({lock.place()})",
    )


@zoo.command(short_help="List a file in a local registry.", example="smartfrz zoo add my.onnx zoo --domain vision")
@_file
@click.argument("registry_path", metavar="REGISTRY", type=click.Path(path_type=Path))
@_facts
def add(file: Path, registry_path: Path, card: Path | None, **facts: Any) -> None:
    """Copy FILE and its card into the folder of a local REGISTRY, and list it there.

    REGISTRY is a .json file or a folder, which is created if it does not exist.
    """
    folder = registry_path.parent if registry_path.suffix == ".json" else registry_path
    # A file that is already in that folder keeps its name.
    stays = file.name if file.resolve().parent == folder.resolve() else ""
    entry = publish.describe(file, **facts, file=stays)
    place = publish.add(file, registry_path, entry, publish.card_of(card or file))
    commands.answer({**_facts_of(entry), "registry": str(place)}, f"added {entry} to {place}")


@zoo.command(
    "publish",
    short_help="Write a file to where others can fetch it.",
    example="smartfrz zoo publish my.onnx hf://organisation/repository --name my-net",
)
@_file
@click.argument("target")
@_facts
@click.option("--private", is_flag=True, help="Make a new repository on Hugging Face private.")
def publish_(file: Path, target: str, card: Path | None, private: bool, **facts: Any) -> None:
    """Write FILE, its card and its registry entry to TARGET.

    TARGET is hf://organisation/repository, or a folder anywhere that fsspec can write: s3://, gs://, a path.
    """
    entry = publish.describe(file, **facts)
    address = publish.publish(file, target, entry, publish.card_of(card or file), private=private)
    commands.answer(
        {**_facts_of(entry), "registry": address},
        f"published {entry}: smartfrz zoo download {entry} --registry {address}",
    )


@zoo.command(
    short_help="Write a model repository for Triton Inference Server.",
    example="smartfrz zoo export smartfrz-base -o models",
)
@_name
@_registries
@click.option(
    "--output",
    "-o",
    "folder",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The model repository, a folder that is created if it does not exist.",
)
@click.option("--name", "model", default="", help="Name of the model there. Default: the name in the file.")
@click.option(
    "--max-layers",
    default=triton.MAX_LAYERS,
    type=click.IntRange(0),
    show_default=True,
    help="Maximum number of layers in a batch. 0: no batching, tensors as in the file.",
)
def export(name: str, registries: tuple[str, ...], folder: Path, model: str, max_layers: int) -> None:
    """Write a predictor into a model repository of Triton Inference Server.

    NAME is a name, name@version, path or address.
    """
    with _plain_warnings(), file_of(name, registries) as path:
        place = triton.export(path, folder, name=model, max_layers=max_layers)
    commands.answer(
        {"path": place, "repository": folder.absolute()},
        f"wrote {place}: tritonserver --model-repository={folder.absolute()}",
    )


@zoo.command("path", short_help="Print where a predictor is, or the cache.", example="smartfrz zoo path smartfrz-base")
@click.argument("name", required=False, type=PREDICTOR)
@_registries
def path_(name: str | None, registries: tuple[str, ...]) -> None:
    """Print where the file of a predictor is, or would be. Without NAME: print the cache folder."""
    place = fetch.folder() if name is None else _path(registry.find(name, registries))
    commands.answer({"path": place}, str(place))


def _facts_of(entry: Entry) -> dict[str, Any]:
    return {**asdict(entry), "address": entry.address}


def _number(value: object) -> str:
    """Show a number; metrics may contain anything else, and integers too large for a float."""
    return f"{value:.3f}" if isinstance(value, (int, float)) and -1000 < value < 1000 else "-"


def _path(entry: Entry) -> Path:
    if not entry.address:
        return embedded_folder() / entry.file
    return urls.local_path(entry.address) or fetch.path_of(entry.sha256)


def _where(entry: Entry) -> str:
    if not entry.address or urls.local_path(entry.address):
        return str(_path(entry)) if entry.address else "in this package"
    return "in the cache" if _path(entry).exists() else entry.address


def _file_name(name: str, registries: tuple[str, ...]) -> str:
    if urls.is_url(name):
        return Path(name.partition("#")[0].partition("?")[0]).name
    return registry.find(name, registries).file


def _card(entry: Entry) -> str:
    if not entry.address:
        return (embedded_folder() / entry.card).read_text("utf-8")
    text = transport.read(urls.sibling(entry.address, entry.card), _CARD_SIZE).decode("utf-8", "replace")
    return printable(text)


def _signatures(location: str | None) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield each registry whose signature is to be checked, and the check."""
    locations = registry.locations() if location is None else [location]
    if not locations:
        raise click.UsageError("There is no registry to check. Pass its address, or name it with SMARTFRZ_ZOO.")
    for one in locations:
        yield one.partition("#")[0], functools.partial(registry.verify_signature, one)


def _files(path: Path | None, unloaded: list[MissingDependencyError]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield each file that is to be checked, and the check, which notes why a file was not loaded."""

    def check(file: Path, sha256: str | None) -> str:
        actual = str(fetch.sha256_of(file, cached=path is None and file in cached))
        if sha256 is not None and actual != sha256:
            raise PredictorFileError(f"SHA-256 {actual[:12]}...; expected {sha256[:12]}...")
        try:
            Predictor(file, device="cpu")
        except MissingDependencyError as error:  # raised after the file's seal and structure were checked
            unloaded.append(error)
            return f"{actual}  not loaded"
        return actual

    cached = fetch.cached_files()
    for label, file, sha256 in _to_verify(path):
        yield label, functools.partial(check, file, sha256)


def _to_verify(path: Path | None) -> Iterator[tuple[str, Path, str | None]]:
    if path is None:
        for entry in registry.embedded():
            yield str(entry), _path(entry), entry.sha256
        for file in fetch.cached_files():
            yield str(file), file, file.stem
    elif not path.exists():
        known = re.fullmatch(registry.NAME, str(path).partition("@")[0]) and not path.suffix
        raise click.BadParameter(
            f"'{path}' does not exist; expected a predictor (.onnx), a registry (.json), or a folder with {registry.FILE}. "
            + (f"If {path} is a name: smartfrz zoo path {path} prints where its file is. " if known else "")
            + "Without PATH, this package and the cache are checked.",
            param_hint="PATH",
        )
    elif path.is_dir() or path.suffix == ".json":
        place = path / registry.FILE if path.is_dir() else path
        if not place.exists():
            raise click.BadParameter(
                f"'{path}' has no {registry.FILE}; expected a folder with one. Pass the .onnx file itself.",
                param_hint="PATH",
            )
        for entry in registry.parse(place.read_bytes(), place.absolute().as_uri()):
            if local := urls.local_path(entry.address):
                yield str(entry), local, entry.sha256
            else:
                commands.show(f"-    {entry}  is at {entry.address}; it is checked when it is fetched")
    else:
        yield str(path), path, None


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings as one line, without the line of our code that issues them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: commands.note(f"Warning: {message}")
        yield


@contextlib.contextmanager
def _received(label: str) -> Iterator[transport.Progress]:
    """Yield a function that shows how much of a file has been received."""
    with progress(label) as tell:

        def received(done: int, total: int | None) -> None:
            if total:
                tell(min(1.0, done / total), f"{done / 1e6:.1f}/{total / 1e6:.1f} MB")
            else:
                tell(0.0, f"{done / 1e6:.1f} MB")

        yield received
