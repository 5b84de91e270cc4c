"""`smartfrz`: the demo. More commands follow."""

import sys
from pathlib import Path
from typing import Any

import click

from smartfrz.errors import SmartFRZError


class Group(click.Group):
    """Shows our errors as a message and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SmartFRZError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"{error}. Nothing half-written was left behind.") from error


@click.group(cls=Group)
@click.version_option(package_name="smartfrz")
def main() -> None:
    """Train to the same accuracy in less time: freeze layers when they have converged."""


@main.command()
@click.option("--data", default="mnist", show_default=True, help="mnist, digits, fashion-mnist, or a folder of images.")
@click.option("--output", "-o", default="demo-output", show_default=True, type=click.Path(path_type=Path))
@click.option("--epochs", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--num-train", default=4000, show_default=True, type=click.IntRange(min=64))
@click.option("--num-test", default=1000, show_default=True, type=click.IntRange(min=10))
@click.option("--seed", default=0, show_default=True)
@click.option("--predictor", default="smartfrz-base", show_default=True, help="A zoo name or an ONNX file.")
@click.option("--threshold", type=click.FloatRange(0, 1, min_open=True), help="Default: the predictor's own.")
def demo(output: Path, **options: Any) -> None:
    """Fine-tune an ImageNet network fully and with SmartFRZ, and compare.

    OUTPUT gets the figures (demo.json) and a picture (demo.png).
    """
    try:
        import torch  # noqa: F401
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Table
    except ImportError as error:
        raise click.ClickException(
            f'The demo needs {error.name}, which is not installed. Type: pip install "smartfrz[demo,cpu]"'
        ) from error
    from smartfrz.demo import DemoOptions, run_demo, save, table

    columns = (
        TextColumn("training both runs in turns"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("", total=1.0, what="")
        chosen = DemoOptions(**options)
        runs = run_demo(chosen, lambda done, what: bars.update(task, completed=done, what=what))
    header, *rows = table(runs)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)
    for path in save(runs, chosen, output):
        click.echo(f"wrote {path}")
