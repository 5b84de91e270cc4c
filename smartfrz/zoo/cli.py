"""`smartfrz zoo`: list, fetch, check and publish predictors."""

import contextlib
import functools
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from smartfrz.errors import DownloadError, MissingDependencyError, PredictorFileError, SmartFRZError
from smartfrz.files import replacing
from smartfrz.predictor.runtime import Predictor
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


_file = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))


@click.group()
def zoo() -> None:
    """Find, fetch, check and publish predictors."""


@zoo.command("list")
@_registries
@click.option("--json", "as_json", is_flag=True, help="Print all fields as JSON.")
def list_(registries: tuple[str, ...], as_json: bool) -> None:
    """List the predictors of all registries."""
    known = registry.entries(registries)
    if as_json:
        rows = [{**asdict(entry), "address": entry.address} for entry in known]
        click.echo(json.dumps(rows, indent=1))
        return
    header = ("predictor", "window", "size", "representation", "domains", "AUC", "MB", "where")
    table = [header] + [
        (
            str(entry),
            str(entry.window),
            str(entry.tailored_size),
            entry.representation,
            ",".join(entry.domains) or "-",
            _number(entry.metrics.get("auc")),
            f"{entry.size / 1e6:.1f}",
            _where(entry),
        )
        for entry in known
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@zoo.command()
@click.argument("name")
@_registries
def show(name: str, registries: tuple[str, ...]) -> None:
    """Show the facts about a predictor, and its card."""
    entry = registry.find(name, registries)
    for key, value in asdict(entry).items():
        if value:
            click.echo(f"{key:14} {value if isinstance(value, (str, int)) else json.dumps(value)}")
    click.echo(f"{'where':14} {_where(entry)}\n")
    try:
        click.echo(_card(entry))
    except DownloadError as error:
        click.echo(f"Its card cannot be shown: {error}", err=True)


@zoo.command("download")
@click.argument("name")
@_registries
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Also copy it to this file or folder.")
def download_(name: str, registries: tuple[str, ...], output: Path | None) -> None:
    """Fetch a predictor into the cache, and print its path.

    NAME is a name, name@version, or the address of an ONNX file, best with #sha256=.
    """
    if output is None and urls.is_url(name) and "#" not in name:
        raise click.UsageError("An address without #sha256= is not kept in the cache. Add it, or pass --output.")
    with _plain_warnings(), _bar(name) as progress, locate(name, registries, progress) as path:
        if output is not None:
            target = output / _file_name(name, registries) if output.is_dir() else output
            with replacing(target) as temporary:
                temporary.write_bytes(path.read_bytes())
    place = path if output is None else target
    if not place.exists():
        raise DownloadError(
            f"{name} cannot be kept in the cache {fetch.folder()}. Pass --output, or set SMARTFRZ_CACHE."
        )
    click.echo(place)


@zoo.command()
@click.argument("path", required=False)
@click.option("--signatures", "signed", is_flag=True, help="Check the signatures of registries instead.")
@_private
def verify(path: str | None, signed: bool) -> None:
    """Check a predictor, or a folder with a registry. Without PATH: check this package and the cache.

    With --signatures, PATH is the address or path of a registry with #minisign= and its owner's public key. Without PATH:
    check the registries that SMARTFRZ_ZOO names.
    """
    unloaded: list[MissingDependencyError] = []
    checks = _signatures(path) if signed else _files(None if path is None else Path(path), unloaded)
    faults = 0
    for label, check in checks:
        try:
            found = check()
        except SmartFRZError as error:
            faults += 1
            click.echo(f"bad  {label}  {error}")
        else:
            click.echo(f"ok   {label}  {found}")
    if faults and signed:
        raise click.ClickException(f"{faults} without a good signature.")
    if faults:
        raise click.ClickException(f"{faults} damaged. A file in the cache is fetched again when it is next used.")
    if unloaded:
        click.echo(f"Checksums match, but loading was not tried. {unloaded[0]}", err=True)


@zoo.command()
@click.argument("name")
@_lock
def unlock(name: str) -> None:
    """Take a predictor out of the lock file: what NAME, or NAME@VERSION, stands for next is locked anew."""
    wanted, _, version = name.partition("@")
    gone = lock.forget(wanted, registry.check_version(name, version))
    if not gone:
        raise click.ClickException(f"{name} is not in {lock.place()}.")
    click.echo(f"{', '.join(gone)} may stand for another file now, from its next use on ({lock.place()})")


@zoo.command()
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
    click.echo(f"added {entry} to {place}")


@zoo.command("publish")
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
    click.echo(f"published {entry}: smartfrz zoo download {entry} --registry {address}")


@zoo.command()
@click.argument("name")
@_registries
@click.option(
    "--triton",
    "folder",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="A model repository of Triton Inference Server, which is created if it does not exist.",
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
    """Write a predictor in the form that another server reads.

    NAME is a name, name@version, path or address.
    """
    with _plain_warnings(), file_of(name, registries) as path:
        place = triton.export(path, folder, name=model, max_layers=max_layers)
    click.echo(f"wrote {place}: tritonserver --model-repository={folder.absolute()}")


@zoo.command("path")
@click.argument("name", required=False)
@_registries
def path_(name: str | None, registries: tuple[str, ...]) -> None:
    """Print where the file of a predictor is, or would be. Without NAME: print the cache folder."""
    if name is None:
        click.echo(fetch.folder())
        return
    entry = registry.find(name, registries)
    click.echo(_path(entry))


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
    # Text from elsewhere must not control the terminal.
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


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
                click.echo(f"-    {entry}  is at {entry.address}; it is checked when it is fetched")
    else:
        yield str(path), path, None


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings as one line, without the line of our code that issues them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: click.echo(f"Warning: {message}", err=True)
        yield


@contextlib.contextmanager
def _bar(label: str) -> Iterator[transport.Progress | None]:
    """Show a progress bar on a terminal; yield None elsewhere, or without rich."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ImportError:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None, visible=False)
        yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)
