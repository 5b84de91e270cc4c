"""`smartfrz compare`: whether it helps on a task of your own."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from smartfrz import commands
from smartfrz.commands import Command, ParamType
from smartfrz.completing import PREDICTOR
from smartfrz.control.quality import TARGETS
from smartfrz.errors import MissingDependencyError, not_installed
from smartfrz.progress import progress

_READY = (
    "pictures",
    "texts",
    "network",
    "epochs",
    "batch_size",
    "learning_rate",
    "image_size",
    "from_scratch",
)


class Duration(ParamType[float]):
    """A time such as `90s`, `20m` or `1.5h`, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the text."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no time; expected a number and a unit, as in 90s, 20m or 1.5h.", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


@click.command(
    cls=Command,
    short_help="Train your own task with and without freezing, and judge.",
    example="smartfrz compare mytask.py:build --seeds 3\n"
    "smartfrz compare --pictures photos --network resnet18 --budget 20m",
    if_stopped="Finished runs are kept; the same command goes on from there.",
)
@click.argument("task", metavar="[MODULE:CALLABLE | FILE.py:CALLABLE | FILE.toml]", required=False)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="In the place of TASK: pictures in train/<class>/ and test/<class>/, or in <class>/.",
)
@click.option(
    "--texts",
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="In the place of TASK: CSV with the columns text and label.",
)
@click.option(
    "--network",
    help="For --pictures: a name of torchvision or timm, efficientnet-lite0, or MODULE:CALLABLE, called with the number of "
    "classes. For --texts: a model of transformers, its folder or its name.",
)
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="With --pictures or --texts. Default: 5.")
@click.option("--batch-size", type=click.IntRange(min=1), help="With --pictures or --texts. Default: 32.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="With --pictures or --texts. Default: 2e-4, from scratch 1e-3.",
)
@click.option("--image-size", type=click.IntRange(min=8), help="With --pictures. Default: 128.")
@click.option(
    "--from-scratch", is_flag=True, default=None, help="With --pictures or --texts: random weights to start from."
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="OPTION=VALUE,..",
    help="A way to use SmartFRZ, for example "
    "threshold=0.9,freeze_order=prefix; can be repeated. 'default' is always there.",
)
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Short for --variant threshold=VALUE; can be repeated.",
)
@click.option(
    "--quality",
    "qualities",
    multiple=True,
    type=click.Choice(list(TARGETS)),
    help="Short for --variant quality=VALUE; can be repeated.",
)
@click.option(
    "--fewer-steps",
    "fewer",
    default="50,70",
    show_default=True,
    metavar="PERCENT,..",
    help="Full training in fewer steps, in percent of them; '' for none.",
)
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Runs of each method.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Loss of the metric that counts as none: in points for a "
    "metric between 0 and 1. Default: 0.5 points, or 1% of full training's.",
)
@click.option(
    "--budget",
    type=Duration(),
    metavar="TIME",
    help="Take a part of the data and of the steps, so that all runs together take about so long: 90s, 20m, 1.5h.",
)
@click.option(
    "--predictor", type=PREDICTOR, default="smartfrz-base", show_default=True, help="A zoo name, file or address."
)
@click.option(
    "--output",
    "-o",
    default="compare-output",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the results.",
)
def compare(
    task: str | None,
    variants: tuple[str, ...],
    thresholds: tuple[float, ...],
    qualities: tuple[str, ...],
    **options: Any,
) -> None:
    """Will it help? Train your own task fully, with SmartFRZ, and in fewer steps.

    The function that MODULE:CALLABLE names is called without arguments and returns a smartfrz.comparing.pytorch.Task: model,
    optimizer, data, steps, schedule, loss and metric; or a smartfrz.comparing.keras.Task (docs/compare.md). Modules in the
    current directory are found. FILE.toml names a PyTorch model, data, optimizer and schedule, as a recipe does.

    OUTPUT gets one line for each finished run (runs.jsonl), all figures (compare.json), a picture (compare.png) and a page
    to look at (report.html). The same command started again goes on where it was stopped.
    """
    from smartfrz.comparing import command
    from smartfrz.comparing.variants import methods_of
    from smartfrz.comparing.verdict import text_table

    ready = {name: options.pop(name) for name in _READY}
    short = [*(f"threshold={value:g}" for value in thresholds), *(f"quality={name}" for name in qualities)]
    ways = ("default", *variants, *short)
    chosen = command.CompareOptions(variants=ways, **options)
    try:
        methods_of(chosen.predictor, chosen.variants, chosen.fewer)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    source = _source(task, {name: value for name, value in ready.items() if value is not None})
    with progress("training") as tell:
        outcome = command.run_compare(source, chosen, tell)
    written = [chosen.output / name for name in (command.LINES, command.FIGURES)]
    for show in (command.draw, command.write_page):
        try:
            written.append(show(outcome, source.name, chosen.output))
        except MissingDependencyError as error:
            commands.note(str(error))
    remarks = "".join(f"\n- {remark}" for remark in outcome.verdict.notes)
    commands.answer(
        command.to_dict(outcome),
        f"{outcome.verdict.sentence}\n\n{text_table(outcome.verdict.table())}\n{remarks}",
    )
    if outcome.foreign:
        commands.note(
            f"{outcome.foreign} runs in {chosen.output / command.LINES} are of another task, version of it, or budget, "
            "and are left out."
        )
    commands.note(f"wrote {', '.join(map(str, written))}")


def _source(task: str | None, ready: dict[str, Any]) -> Any:
    """Where the task comes from: the user's function, pictures or texts."""
    data = {name: ready.pop(name) for name in ("pictures", "texts") if name in ready}
    if (task is not None) + len(data) != 1:
        raise click.UsageError(
            "Expected one of: MODULE:CALLABLE or FILE.py:CALLABLE, --pictures FOLDER, --texts FILE.csv, FILE.toml."
        )
    if task is not None:
        if ready:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in ready)
            raise click.UsageError(f"{names} belong to --pictures and --texts. Set them in your task.")
        if task.endswith(".toml"):
            with _needing_torch(task):
                from smartfrz.comparing.recipe_tasks import recipe_source

                return recipe_source(Path(task))
        from smartfrz.comparing.own_task import find_task

        return find_task(task, Path.cwd())
    if "network" not in ready:
        raise click.UsageError(f"--{next(iter(data))} needs --network NAME as well.")
    with _needing_torch(f"--{next(iter(data))}"):
        from smartfrz.comparing.ready_tasks import ReadyOptions, picture_source, text_source

    options = ReadyOptions(**ready)
    return picture_source(data["pictures"], options) if "pictures" in data else text_source(data["texts"], options)


@contextmanager
def _needing_torch(what: str) -> Iterator[None]:
    """Say what to install if torch is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise not_installed(what, "torch", "torch") from error
