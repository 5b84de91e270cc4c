"""`smartfrz-build`: record runs, label them, train a predictor, evaluate it."""

import hashlib
import logging
import queue
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import rich
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smartfrz.cli import Group
from smartfrz.dataset_builder.labels import LabelRule, label_layers
from smartfrz.dataset_builder.recipes import Recipe, load_recipe
from smartfrz.dataset_builder.storage import read_run, run_files
from smartfrz.errors import RecipeError
from smartfrz.files import replacing
from smartfrz.predictor.contract import REPRESENTATIONS


@click.group(cls=Group)
@click.version_option(package_name="smartfrz")
def main() -> None:
    """Build a freeze predictor from recorded training runs."""


@main.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", "-o", default="runs", show_default=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Recipes recorded at once.")
@click.option(
    "--threads",
    default=None,
    type=click.IntRange(min=1),
    help="PyTorch threads a worker. Default: PyTorch's own choice.",
)
def record(recipes: tuple[Path, ...], output: Path, workers: int, threads: int | None) -> None:
    """Train a reference model, train again, and record weights and CKA.

    Finished recordings are kept: after an interruption, run the same command again.
    """
    loaded = [load_recipe(path) for path in recipes]
    waiting = {recipe.name: recipe for recipe in loaded}
    _check_names(loaded)
    output.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
    bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=rich.console.Console(stderr=True))
    context = get_context("spawn")  # forked workers deadlock in PyTorch's threads
    failures = []
    with context.Manager() as manager, bars, ProcessPoolExecutor(workers, context) as pool:
        tasks = {name: bars.add_task(name, total=1.0, what="waiting") for name in waiting}
        messages = manager.Queue()
        running: dict[Future[Path], str] = {}
        while waiting or running:
            for name in _ready(waiting, set(running.values())):
                future = pool.submit(_record, waiting.pop(name), output, threads, messages)
                running[future] = name
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            _show(messages, bars, tasks)
            for future in finished:
                name = running.pop(future)
                error = future.exception()
                bars.update(tasks[name], completed=0 if error else 1.0, what="failed" if error else "done")
                if error:
                    failures.append(f"{name}: {error}")
                else:
                    click.echo(future.result())
    if failures:
        raise click.ClickException("Not recorded:\n" + "\n".join(failures))


def _check_names(recipes: list[Recipe]) -> None:
    """Each recipe needs a file of its own, and initial weights that can be there before it."""
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(
            f"Several recipes are named {twice[0]!r}, and would overwrite each other's recording. Give each one another "
            "`name`."
        )
    after = {recipe.name: recipe.model.init for recipe in recipes}
    for name in names:
        chain = [name]
        while (init := after.get(chain[-1])) in after and init not in chain:
            chain.append(str(init))
        if init in chain:
            raise RecipeError(
                f"Recipe {chain[-1]!r} starts from the reference model of {init!r}, which itself waits for "
                f"{chain[-1]!r}. Change model.init of one of them."
            )


def _ready(waiting: dict[str, Recipe], running: set[str]) -> list[str]:
    """Recipes whose initial weights no unfinished recipe has still to make."""
    return [name for name, recipe in waiting.items() if recipe.model.init not in running | set(waiting)]


def _record(recipe: Recipe, output: Path, threads: int | None, messages: Any) -> Path:
    import torch

    from smartfrz.dataset_builder.recording import record as record_one

    if threads:
        torch.set_num_threads(threads)
    return record_one(recipe, output, lambda fraction, text: messages.put((recipe.name, fraction, text)))


def _show(messages: Any, bars: Progress, tasks: dict[str, Any]) -> None:
    while True:
        try:
            name, fraction, text = messages.get_nowait()
        except queue.Empty:
            return
        bars.update(tasks[name], completed=fraction, what=text)


def _rule_options(command: Any) -> Any:
    """The options of a label rule, shared by several commands."""
    for option in (
        click.option("--rule", type=click.Choice(["forward", "backward"]), default="forward", show_default=True),
        click.option("--tolerance", default=LabelRule.tolerance, show_default=True, help="Of CKA, absolute."),
        click.option("--rule-records", default=LabelRule.records, show_default=True, help="For --rule backward."),
    ):
        command = option(command)
    return command


def _rule(rule: Any, tolerance: float, rule_records: int) -> LabelRule:
    try:
        return LabelRule(rule, tolerance, rule_records)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@main.command()
@click.argument("runs", type=click.Path(path_type=Path, file_okay=False))
@_rule_options
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Folder for one picture a run.")
def label(runs: Path, rule: str, tolerance: float, rule_records: int, plots: Path | None) -> None:
    """Show the labels that a rule gives: share ready to freeze, by run and by layer."""
    chosen = _rule(rule, tolerance, rule_records)
    for path in run_files(runs):
        run = read_run(path)
        labels = label_layers(run.cka, chosen)
        known = labels >= 0
        click.echo(f"{run.name}: {(labels == 1).sum() / max(1, known.sum()):.0%} ready, {known.mean():.0%} known")
        for layer, row in zip(run.layers, labels, strict=True):
            click.echo(f"  {layer:40s} {(row == 1).sum() / max(1, (row >= 0).sum()):5.0%}")
        if plots is not None:
            from smartfrz.plots import plot_labels

            with replacing(plots / f"{run.name}.png") as temporary:
                plot_labels(run.name, run.layers, run.cka, labels, temporary)
            click.echo(f"  picture: {plots / run.name}.png")


@main.command()
@click.argument("runs", type=click.Path(path_type=Path, file_okay=False))
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", default=None, help="Default: the output file's name.")
@_rule_options
@click.option("--representation", type=click.Choice(REPRESENTATIONS), default="motion", show_default=True)
@click.option(
    "--records", default=30, type=click.IntRange(4), show_default=True, help="Records a run; recordings are thinned."
)
@click.option("--window", default=30, type=click.IntRange(2, 4096), show_default=True)
@click.option("--tailored-size", default=1024, type=click.IntRange(16), show_default=True)
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True)
@click.option("--learning-rate", default=5e-4, type=click.FloatRange(0, min_open=True), show_default=True)
@click.option("--epochs", default=10, type=click.IntRange(1), show_default=True)
@click.option(
    "--precision",
    default=0.9,
    type=click.FloatRange(0, 1, min_open=True),
    show_default=True,
    help="For which the threshold is calibrated.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--cross-validate/--no-cross-validate", default=True, help="Also hold out each architecture in turn.")
def train(
    output: Path,
    runs: Path,
    name: str | None,
    rule: str,
    tolerance: float,
    rule_records: int,
    records: int,
    cross_validate: bool,
    **options: Any,
) -> None:
    """Train a predictor, evaluate it on held-out runs, export it to ONNX, check parity, write its card."""
    from smartfrz.dataset_builder.building import build_predictor, labelled_runs
    from smartfrz.predictor.training import TrainingOptions

    _quiet_exporter()
    chosen = _rule(rule, tolerance, rule_records)
    files = run_files(runs)
    recorded = [read_run(path) for path in files]
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeElapsedColumn())
    with Progress(*columns, console=rich.console.Console(stderr=True)) as bars:
        task = bars.add_task("training", total=1.0, what="")
        try:
            card = build_predictor(
                recorded,
                labelled_runs(recorded, chosen, records),
                chosen,
                TrainingOptions(**options),
                output,
                name or output.stem,
                digest,
                records=records,
                cross_validate=cross_validate,
                progress=lambda fraction, what: bars.update(task, completed=fraction, what=what),
            )
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    click.echo(card)
    click.echo(f"Wrote {output} and {output.with_suffix('.md')}.")


@main.command()
@click.argument("predictor", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("runs", type=click.Path(path_type=Path, file_okay=False))
def evaluate(predictor: Path, runs: Path) -> None:
    """Judge a predictor on recorded runs, beside the weight-change baseline."""
    from smartfrz.dataset_builder.building import evaluate_predictor, labelled_runs
    from smartfrz.predictor.runtime import Predictor

    loaded = Predictor(predictor, device="cpu")
    recorded = [read_run(path) for path in run_files(runs)]
    rule = LabelRule(**loaded.info.metrics.get("label_rule", {}))
    records = round(1 / loaded.info.record_fraction)
    click.echo(evaluate_predictor(loaded, labelled_runs(recorded, rule, records)))


def _quiet_exporter() -> None:
    # It warns of torchvision operators that no predictor has.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
