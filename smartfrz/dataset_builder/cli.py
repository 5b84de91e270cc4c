"""`smartfrz-build`: record runs, label them, train a predictor, evaluate it."""

import queue
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import rich
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smartfrz.dataset_builder.recipes import Recipe, load_recipe
from smartfrz.errors import SmartFRZError


class _Group(click.Group):
    """Shows our errors as one line and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SmartFRZError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"{error}. Nothing half-written was left behind.") from error


@click.group(cls=_Group)
@click.version_option(package_name="smartfrz")
def main() -> None:
    """Build a freeze predictor from recorded training runs."""


@main.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", "-o", default="runs", show_default=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--workers", default=1, show_default=True, help="Recipes recorded at once.")
@click.option("--threads", default=None, type=int, help="PyTorch threads a worker. Default: PyTorch's own choice.")
def record(recipes: tuple[Path, ...], output: Path, workers: int, threads: int | None) -> None:
    """Train a reference model, train again, and record weights and CKA.

    Finished recordings are kept: after an interruption, run the same command again.
    """
    loaded = [load_recipe(path) for path in recipes]
    output.mkdir(parents=True, exist_ok=True)
    waiting = {recipe.name: recipe for recipe in loaded}
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
