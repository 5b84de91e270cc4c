"""`smartfrz`: the demo, a comparison on your own task, an estimate of what freezing would save, the zoo, and serving."""

import importlib
import sys
from pathlib import Path
from typing import Any

import click

from smartfrz.commands import Group
from smartfrz.comparing.cli import compare
from smartfrz.serving.cli import serve
from smartfrz.zoo.cli import zoo


@click.group(cls=Group)
@click.version_option(package_name="smartfrz")
def main() -> None:
    """Train to the same accuracy in less time: freeze layers when they have converged."""


main.add_command(compare)
main.add_command(zoo)
main.add_command(serve)


@main.command()
@click.option(
    "--framework",
    type=click.Choice(["torch", "keras"]),
    default="torch",
    show_default=True,
    help="Keras runs on the backend that KERAS_BACKEND names.",
)
@click.option("--data", default="mnist", show_default=True, help="mnist, digits, fashion-mnist, or a folder of images.")
@click.option("--output", "-o", default="demo-output", show_default=True, type=click.Path(path_type=Path))
@click.option("--epochs", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--num-train", default=4000, show_default=True, type=click.IntRange(min=64))
@click.option("--num-test", default=1000, show_default=True, type=click.IntRange(min=10))
@click.option("--seed", default=0, show_default=True)
@click.option("--predictor", default="smartfrz-base", show_default=True, help="A zoo name, file or address.")
@click.option("--threshold", type=click.FloatRange(0, 1, min_open=True), help="Default: the predictor's own.")
def demo(framework: str, output: Path, **options: Any) -> None:
    """Fine-tune an ImageNet network fully and with SmartFRZ, and compare.

    OUTPUT gets the figures (demo.json) and a picture (demo.png).
    """
    extra = "demo,cpu" if framework == "torch" else "demo-keras,cpu"
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Table

        if framework == "torch":
            import torch  # noqa: F401
    except ImportError as error:
        raise click.ClickException(
            f'The demo needs {error.name}, which is not installed. Type: pip install "smartfrz[{extra}]"'
        ) from error
    from smartfrz.demo.data import DemoOptions
    from smartfrz.demo.printing import save, sentence, table

    demo_of: Any = importlib.import_module(f"smartfrz.demo.{'pytorch' if framework == 'torch' else 'keras'}")
    columns = (
        TextColumn("training both runs"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("", total=1.0, what="")
        chosen = DemoOptions(**options)
        results = demo_of.run_demo(chosen, lambda done, what: bars.update(task, completed=done, what=what))
    click.echo(f"{sentence(results, chosen)}\n")
    header, *rows = table(results)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)
    if framework == "keras":
        click.echo(demo_of.notes(results))
    for path in save(results, chosen, output):
        click.echo(f"wrote {path}")


@main.command()
@click.argument("source", metavar="MODULE:CALLABLE")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="[NAME=]SHAPE[:DTYPE[:HIGH]]",
    help="32,3,224,224 or 8,128:int64:1000 (integers below 1000). Once for each argument of the forward pass.",
)
@click.option("--prefix", default="", metavar="K1,K2,..", help="Numbers of layers to freeze. Default: up to 12 values.")
@click.option("--layers", is_flag=True, help="Also print what each layer costs in a step.")
@click.option("--device", default="", help="cpu, cuda, cuda:1. Default: CUDA where there is one.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Turns of each number.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures to a file.")
def estimate(
    source: str, inputs: tuple[str, ...], prefix: str, layers: bool, output: Path | None, **others: Any
) -> None:
    """Measure what freezing the first layers of a model would save.

    MODULE:CALLABLE is called without arguments and returns the model, for example torchvision.models:resnet50. Modules
    in the current directory are found.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise click.ClickException(
            'The estimate needs torch, which is not installed. Type: pip install "smartfrz[torch,cpu]"'
        ) from error
    from smartfrz import estimate as estimating

    try:
        specs = tuple(estimating.InputSpec.parse(text) for text in inputs)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--input") from error
    try:
        prefixes = tuple(int(number) for number in prefix.split(",")) if prefix else ()
    except ValueError as error:
        raise click.BadParameter(f"{prefix!r}; expected numbers, as in 4,8,12.", param_hint="--prefix") from error
    options = estimating.EstimateOptions(source, specs, prefixes, profile=layers, **others)
    with click.progressbar(length=1000, label="measuring", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        result = estimating.estimate(options, lambda done: bar.update(round(1000 * done) - bar.pos))
    threads = f", {result.threads} threads" if result.device == "cpu" else ""
    click.echo(f"{source} on {result.device}{threads}; inputs {' '.join(inputs)}\n")
    click.echo(estimating.text(estimating.table(result)))
    if warning := estimating.busy(result):
        click.echo(f"\n{warning}")
    if result.already_frozen:
        click.echo(
            f"\nThe model came with {len(result.already_frozen)} layers frozen; they stay so and are not counted."
        )
    click.echo(f"\n{estimating.NOTE}")
    if layers:
        click.echo(f"\n{estimating.text(estimating.layer_table(result))}")
    if output is not None:
        estimating.save(result, options, output)
        click.echo(f"\nwrote {output}")
