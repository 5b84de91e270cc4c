"""`smartfrz`: the demo, a comparison on your own task, an estimate of what freezing would save, the zoo, and serving."""

import importlib
from pathlib import Path
from typing import Any

import click

from smartfrz import commands
from smartfrz.commands import Group
from smartfrz.comparing.cli import compare
from smartfrz.completing import PREDICTOR
from smartfrz.control.quality import TARGETS
from smartfrz.errors import not_installed
from smartfrz.progress import progress
from smartfrz.serving.cli import serve
from smartfrz.zoo.cli import zoo

_SECTIONS = {
    "Does it help?": ("demo", "estimate", "compare"),
    "Predictors": ("zoo", "serve"),
    "When something is wrong": ("doctor",),
}


@click.group(cls=Group, sections=_SECTIONS)
@click.version_option(package_name="smartfrz")
def main() -> None:
    """Train to the same accuracy in less time: freeze layers when they have converged.

    'smartfrz-build' makes predictors of your own.
    """


main.add_command(compare)
main.add_command(zoo)
main.add_command(serve)


@main.command(short_help="Check this installation.", example="smartfrz doctor")
@click.pass_context
def doctor(context: click.Context) -> None:
    """Check this installation, and say how to repair what is wrong.

    Shows versions, what ONNX Runtime and PyTorch can use, cache, registries and settings, and tries out the predictors of
    this package. No network is used, and no password is shown: paste all of it into a bug report. Exits with 1 if there is
    a problem.
    """
    from smartfrz import doctor as examining

    with progress("looking") as tell:
        findings = examining.examine(tell)
    commands.answer(findings, examining.text(findings))
    if findings["problems"]:
        context.exit(1)


@main.command(
    short_help="Fine-tune a small network with and without freezing: about six minutes.",
    example="smartfrz demo --data digits --epochs 2",
)
@click.option(
    "--framework",
    type=click.Choice(["torch", "keras"]),
    default="torch",
    show_default=True,
    help="Keras runs on the backend that KERAS_BACKEND names.",
)
@click.option("--data", default="mnist", show_default=True, help="mnist, digits, fashion-mnist, or a folder of images.")
@click.option(
    "--output",
    "-o",
    default="demo-output",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the figures (demo.json) and a picture (demo.png).",
)
@click.option("--epochs", default=4, show_default=True, type=click.IntRange(min=1), help="Length of each training.")
@click.option(
    "--num-train", default=4000, show_default=True, type=click.IntRange(min=64), help="Pictures to train on, at most."
)
@click.option(
    "--num-test", default=1000, show_default=True, type=click.IntRange(min=10), help="Pictures to test on, at most."
)
@click.option("--seed", default=0, show_default=True, help="Seed of both trainings.")
@click.option(
    "--predictor", type=PREDICTOR, default="smartfrz-base", show_default=True, help="A zoo name, file or address."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    help="Confidence from which a layer is frozen. Default: the predictor's own.",
)
@click.option("--quality", type=click.Choice(list(TARGETS)), help="What may be lost, instead of --threshold.")
def demo(framework: str, output: Path, **options: Any) -> None:
    """Fine-tune an ImageNet network fully and with SmartFRZ, and compare accuracy and time."""
    try:
        from rich.console import Console
        from rich.table import Table

        if framework == "torch":
            import torch  # noqa: F401
    except ImportError as error:
        extras = ("demo",) if framework == "torch" else ("demo-keras", "tensorflow")
        raise not_installed("The demo", error.name, *extras) from error
    from smartfrz.demo.data import DemoOptions
    from smartfrz.demo.printing import save, sentence, table

    demo_of: Any = importlib.import_module(f"smartfrz.demo.{'pytorch' if framework == 'torch' else 'keras'}")
    if options["threshold"] is not None and options["quality"] is not None:
        raise click.UsageError("Received both --threshold and --quality, which stands for one. Pass one of them.")
    chosen = DemoOptions(**options)
    task = demo_of.demo_task(chosen)
    with progress("training both runs") as tell:
        results = demo_of.run_demo(chosen, tell, task)
    commands.show(f"{sentence(results, chosen, task.chance())}\n")
    header, *rows = table(results)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(shown)
    text = captured.get().rstrip("\n")
    remarks = demo_of.notes(results) if framework == "keras" else ""
    written = save(results, chosen, output)
    document = {"runs": [result.to_dict() for result in results], "notes": remarks, "files": written}
    commands.answer(document, "\n".join([text, *filter(None, [remarks]), *(f"wrote {path}" for path in written)]))


@main.command(
    short_help="Measure what freezing the first layers of your model would save.",
    example="smartfrz estimate torchvision.models:resnet50 --input 32,3,224,224",
)
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
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1. auto: CUDA where there is one."
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Turns of each number.")
@click.option("--seed", default=0, show_default=True, help="Seed of the model, its inputs and dropout.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="Also write all figures to this JSON file."
)
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
        raise not_installed("The estimate", "torch", "torch") from error
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
    with progress("measuring") as tell:
        result = estimating.estimate(options, lambda done: tell(done, ""))
    threads = f", {result.threads} threads" if result.device == "cpu" else ""
    parts = [f"{source} on {result.device}{threads}; inputs {' '.join(inputs)}"]
    parts.append(estimating.text(estimating.table(result)))
    if warning := estimating.busy(result):
        parts.append(warning)
    if result.already_frozen:
        parts.append(
            f"The model came with {len(result.already_frozen)} layers frozen; they stay so and are not counted."
        )
    parts.append(estimating.NOTE)
    if layers:
        parts.append(estimating.text(estimating.layer_table(result)))
    if output is not None:
        estimating.save(result, options, output)
        parts.append(f"wrote {output}")
    commands.answer(estimating.to_dict(result, options), "\n\n".join(parts))
