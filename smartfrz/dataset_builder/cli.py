"""`smartfrz-build`: record runs, label them, train a predictor, evaluate it."""

import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from smartfrz import commands
from smartfrz.commands import Group, device_option
from smartfrz.dataset_builder.options import (
    FILE,
    FOLDER,
    RecordingOptions,
    RuleOptions,
    TrainingArguments,
    given,
    recording_options,
    rule_options,
    training_options,
)
from smartfrz.errors import RecipeError, install_command
from smartfrz.files import replacing
from smartfrz.progress import Tell, lines

# Imports that take time, or that need the extra, are made by the commands: `--help` does without them.
_PACKAGES = ("torch", "onnx", "onnxscript", "pyarrow", "safetensors", "sklearn", "PIL", "matplotlib", "rich")
PATH = click.Path(path_type=Path)


_SECTIONS = {
    "From nothing to a predictor": ("new", "check", "run"),
    "Step by step": ("record", "label", "dataset", "train", "evaluate"),
    "Afterwards": ("calibrate", "compact"),
}
_ONE_RECIPE = (
    "A predictor takes at least two recipes, one to train on and one to validate on, and gets better with more. --family "
    "writes four of one model; other networks and data teach more."
)
_KEPT = "Finished recordings are kept; the same command goes on from there."


@click.group(cls=Group, sections=_SECTIONS, extra="build", packages=_PACKAGES)
@click.version_option(package_name="smartfrz")
def main() -> None:
    """Build a freeze predictor from recorded training runs."""


@main.command(
    short_help="Write a recipe: what to train and record.",
    example="smartfrz-build new torchvision:resnet18 --data photos --family",
)
@click.argument("model")
@click.option("--output", "-o", type=FILE, help="The recipe. Default: the model's name, with .toml.")
@click.option("--data", default="", help="A folder with train/<class>/ and test/<class>/, or module:callable.")
@click.option("--num-classes", default=0, type=click.IntRange(0), help="Default: as in the folder, else 10.")
@click.option("--name", default="", help="Default: the output file's name.")
@click.option("--architecture", default="", help="Family. Default: a guess from the model's name.")
@click.option(
    "--image-size", type=click.IntRange(8), help="Default: the network's own size, or the pictures' if smaller."
)
@click.option(
    "--family", is_flag=True, help="Write four recipes: two orders of the data, each with two learning rates."
)
def new(model: str, output: Path | None, family: bool, **others: Any) -> None:
    """Write a commented recipe, or with --family four of them: a predictor takes at least two.

    MODEL is torchvision:NAME, timm:NAME, transformers:NAME_OR_FOLDER, keras:NAME, keras_hub:PRESET, module:callable, the
    bare name of a torchvision or timm model, or organisation/name on the Hugging Face hub. What module:callable names is
    imported and, if it needs no arguments, built.
    """
    from smartfrz.dataset_builder import templates
    from smartfrz.dataset_builder.recipes import parse_recipe

    path, asked = output or templates.default_file(model), templates.NewRecipe(model, **others)
    wanted = templates.family(asked, path) if family else {path: asked}
    for file in wanted:
        if file.exists():
            raise RecipeError(
                f"{str(file)!r} exists, and is left as it is. Choose another file with --output, or remove it."
            )
    texts = {file: templates.recipe_text(recipe, file) for file, recipe in wanted.items()}
    recipes = [parse_recipe(text, file) for file, text in texts.items()]
    left = _left_to_do(recipes[0], bool(others["data"]))
    for file, text in texts.items():
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    files = list(texts)
    commands_to_type = _commands_to_type(files)
    commands.answer(
        {"recipe": files[0], "text": texts[files[0]], "recipes": files, "left": left, "commands": commands_to_type},
        "\n".join(
            [
                f"Wrote {', '.join(map(str, files))}.",
                *(f"Still to do: {what}." for what in left),
                *([_ONE_RECIPE] if len(files) == 1 else []),
                "Now type:",
                *(f"  {line}" for line in commands_to_type),
            ]
        ),
    )


def _left_to_do(recipe: Any, data_given: bool) -> list[str]:
    """Check what a new recipe names, and return what the user still has to do."""
    from smartfrz.dataset_builder.templates import has_own_code

    left: list[str] = []
    if has_own_code(recipe.model.source) or (data_given and recipe.data.source):
        from smartfrz.dataset_builder.checking import check_callables  # loads PyTorch

        left += check_callables(recipe, data_given)
    if not data_given:
        folder = recipe.folder / recipe.data.folder
        if recipe.data.source:
            left.append(f"write {recipe.data.source} beside the recipe, or name other data in [data]")
        elif not folder.is_dir():
            left.append(f"put pictures into {recipe.data.folder}/train/<class>/ and test/<class>/, or change [data]")
    return left


def _commands_to_type(files: Sequence[Path]) -> list[str]:
    names = [shlex.quote(str(file)) for file in files]
    others = [] if len(names) > 1 else ["another.toml"]
    predictor = shlex.quote(str(files[0].with_name("my.onnx")))
    return [f"smartfrz-build check {names[0]}", f"smartfrz-build run {' '.join(names + others)} -o {predictor}"]


@main.command(short_help="Try a recipe, and say how long it will take.", example="smartfrz-build check mine.toml")
@click.argument("recipe", type=PATH)
@click.option("--runs", default="runs", show_default=True, type=FOLDER, help="Folder of recordings.")
@device_option("Where PyTorch trains.")
def check(recipe: Path, runs: Path, device: Any) -> None:
    """Take two training steps; print layers, memory, and how long a recording will take."""
    from smartfrz.dataset_builder.checking import check_recipe, describe
    from smartfrz.dataset_builder.recipes import load_recipe

    loaded = load_recipe(recipe)
    checked = check_recipe(loaded, runs, device)
    commands.answer({"recipe": loaded.name, **vars(checked)}, describe(loaded, checked))


@main.command(
    short_help="Train recipes, and record how their layers converge.",
    example="smartfrz-build record a.toml b.toml --workers 2",
    if_stopped=_KEPT,
)
@click.argument("recipes", nargs=-1, required=True, type=PATH)
@click.option(
    "--output",
    "-o",
    default="runs",
    show_default=True,
    help="Folder of recordings; with --engine ray also an address.",
)
@recording_options
def record(recipes: tuple[Path, ...], output: str, recording: RecordingOptions) -> None:
    """Train a reference model, train again, and record weights and CKA.

    Finished recordings are kept: after an interruption, run the same command again.
    """
    loaded = _load_recipes(recipes)
    places = _record_all(loaded, output, recording)
    commands.answer({"recordings": dict(zip((recipe.name for recipe in loaded), places, strict=True)), "failed": []})


@main.command(
    short_help="Show which layers count as ready to freeze.", example="smartfrz-build label runs --tolerance 0.03"
)
@click.argument("runs", type=FOLDER)
@rule_options
@click.option("--plots", type=FOLDER, help="Also draw one picture per run into this folder.")
def label(runs: Path, rule: RuleOptions, plots: Path | None) -> None:
    """Show the labels that a rule gives: share ready to freeze, by run and by layer."""
    from smartfrz.dataset_builder.storage import read_run, run_files

    chosen, shares = rule.make(), {}
    for path in run_files(runs):
        run = read_run(path)
        labels = _show_labels(run, chosen)
        ready = ((row == 1).sum() / max(1, (row >= 0).sum()) for row in labels)
        shares[run.name] = dict(zip(run.layers, ready, strict=True))
        for layer, share in shares[run.name].items():
            commands.show(f"  {layer:40s} {share:5.0%}")
        if plots is not None:
            from smartfrz.plots import plot_labels

            with replacing(plots / f"{run.name}.png") as temporary:
                plot_labels(run.name, run.layers, run.cka, labels, temporary)
            commands.show(f"  picture: {plots / run.name}.png")
    commands.answer({"ready": shares})


@main.command(
    short_help="Train a predictor on recordings.",
    example="smartfrz-build train runs -o mine.onnx",
)
@click.argument("runs", nargs=-1, required=True, type=PATH)
@rule_options
@training_options
def train(runs: tuple[Path, ...], rule: RuleOptions, training: TrainingArguments) -> None:
    """Train a predictor, evaluate it on held-out runs, export it to ONNX, check parity, write its card.

    RUNS are folders of recordings, or files: recordings, or datasets made by `smartfrz-build dataset`.
    """
    from smartfrz.dataset_builder.datasets import names_in
    from smartfrz.dataset_builder.planning import make_job

    files = _files_in(runs)
    names = [name for path in files for name in names_in(path)]
    document = _train(make_job(training, rule, names), files)
    commands.answer(document)
    _note_few(document)


@main.command(
    short_help="Do all of it: record, label, train and evaluate.",
    example="smartfrz-build run a.toml b.toml -o mine.onnx",
    if_stopped=_KEPT,
)
@click.argument("recipes", nargs=-1, required=True, type=PATH)
@click.option(
    "--runs", default="runs", show_default=True, help="Folder of recordings; with --engine ray also an address."
)
@recording_options
@rule_options
@training_options
def run(
    recipes: tuple[Path, ...], runs: str, recording: RecordingOptions, rule: RuleOptions, training: TrainingArguments
) -> None:
    """Record recipes, label, train, evaluate, export and write the card, in one go.

    After an interruption at any point, run the same command again: finished recordings are kept, and training starts from
    the beginning and gives the same file.
    """
    from smartfrz.dataset_builder.places import on_this_machine
    from smartfrz.dataset_builder.planning import make_job
    from smartfrz.dataset_builder.storage import read_run

    loaded = _load_recipes(recipes)
    job = make_job(training, rule, [recipe.name for recipe in loaded])
    job.check_recipes(loaded, costs=recording.costs)
    with on_this_machine(_record_all(loaded, runs, recording)) as files:
        for path in files:
            recorded = read_run(path)
            by_cka = job.as_base and recorded.costs is None  # a base's rule may ask for costs that were not recorded
            _show_labels(recorded, replace(job.plan.rule, source="cka") if by_cka else job.plan.rule)
        document = _train(job, files)
        document["evaluation"] = _evaluate(job.output, files)
        commands.answer({"recordings": [str(path) for path in files], **document})
        _note_few(document)


@main.command(short_help="Judge a predictor on recordings.", example="smartfrz-build evaluate mine.onnx runs")
@click.argument("predictor", type=FILE)
@click.argument("runs", type=PATH)
def evaluate(predictor: Path, runs: Path) -> None:
    """Judge a predictor on recorded runs, next to the weight-change baseline.

    RUNS is a folder of recordings, or a dataset.
    """
    commands.answer(_evaluate(predictor, _files_in([runs])))


@main.command(
    short_help="Find what its thresholds cost.", example="smartfrz-build calibrate mine.onnx runs -o mine.onnx"
)
@click.argument("predictor", type=FILE)
@click.argument("runs", type=PATH)
@click.option("--output", "-o", required=True, type=FILE, help="May be the predictor itself.")
def calibrate(predictor: Path, runs: Path, output: Path) -> None:
    """Find out which thresholds cost no, little and some accuracy, and write that into a predictor's file.

    RUNS is a folder of recordings, or a dataset. They need costs (record --costs), and should be of runs that the predictor
    was not trained on. Nothing is trained. Users then choose with `quality="same"`, `"balanced"` or `"fast"`.
    """
    from smartfrz.control.quality import TARGETS
    from smartfrz.dataset_builder.datasets import read_together
    from smartfrz.dataset_builder.labelling import seen_by
    from smartfrz.dataset_builder.qualities import calibrate_file

    recorded = read_together(_files_in([runs]))
    info = calibrate_file(predictor, recorded, output)
    found, known = info.qualities, seen_by(info)
    lines = [
        f"{name:<9} threshold {one.threshold:.3f}: {one.points:+.2f} points (spread {one.spread:.2f}) at "
        f"{one.computation:.0%} of the computation, over {one.runs} runs, each with thresholds chosen without it"
        for name, one in found.items()
    ]
    lines += [
        f"{name:<9} is left out: no threshold costs {target:g} points or less in the mean"
        for name, target in TARGETS.items()
        if name not in found
    ]
    if seen := [run.name for run in recorded if run.costs is not None and run.name in known]:
        commands.note(
            f"The predictor was trained or validated on {', '.join(seen)}, so the figures flatter. Calibrate it on "
            "other runs."
        )
    commands.answer({name: one.to_dict() for name, one in found.items()}, "\n".join(lines))


@main.command(short_help="Make a predictor smaller.", example="smartfrz-build compact mine.onnx -o small.onnx")
@click.argument("predictor", type=FILE)
@click.option("--output", "-o", required=True, type=FILE, help="The smaller predictor.")
@click.option("--name", default=None, help="Name in the file. Default: the output file's name.")
def compact(predictor: Path, output: Path, name: str | None) -> None:
    """Write a predictor again with weights of 8 bits, a quarter of the size."""
    from smartfrz.predictor.training.export import compact as write_compact

    difference = write_compact(predictor, output, name or output.stem)
    commands.answer(
        {"predictor": output, "bytes": output.stat().st_size, "difference": difference},
        f"Wrote {output}: {output.stat().st_size / 1000:,.0f} kB instead of {predictor.stat().st_size / 1000:,.0f}, "
        f"confidences differ by at most {difference:.2g} on random histories.",
    )


@main.command(
    short_help="Put many recordings into one small file.", example="smartfrz-build dataset runs -o dataset.parquet"
)
@click.argument("runs", type=FOLDER)
@click.option("--output", "-o", required=True, type=FILE, help="The dataset; its card is written beside it.")
@click.option(
    "--records", default=30, type=click.IntRange(4), show_default=True, help="Records per run, as in training."
)
@click.option("--tailored-size", default=1024, type=click.IntRange(16), show_default=True, help="Weights in a draw.")
@click.option("--draws", default=3, type=click.IntRange(1, 1000), show_default=True, help="Draws for each layer.")
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True, help="Seed of the draws.")
@click.option("--notes", type=FILE, help="Markdown for the card, such as the licences of the data.")
def dataset(runs: Path, output: Path, notes: Path | None, **options: Any) -> None:
    """Make a dataset that predictors can be trained from, some hundred times smaller than the recordings.

    Instead of weights it holds the norms and angles that predictors see (all but those with --representation raw), beside
    similarities (CKA), losses, learning rates, and the costs of freezing where they were measured.
    """
    from smartfrz.dataset_builder.dataset_cards import dataset_card
    from smartfrz.dataset_builder.datasets import PathOptions, with_paths, write_dataset
    from smartfrz.dataset_builder.storage import read_run, run_files

    if output.resolve().parent == runs.resolve():
        raise click.UsageError(
            f"{str(output)!r} lies among the recordings, and would be taken for one. Choose another folder."
        )
    chosen = PathOptions(**options)
    made = [with_paths(read_run(path), chosen) for path in run_files(runs)]
    text = notes.read_text("utf-8") if notes else ""
    write_dataset(output, made, chosen)
    card = output.with_suffix(".md")
    with replacing(card) as temporary:
        temporary.write_text(dataset_card(output, made, chosen, text), encoding="utf-8")
    without = sorted(run.name for run in made if run.costs is None)
    size = output.stat().st_size
    told = f"Wrote {output}, {size / 1000:,.0f} kB of {len(made)} recordings, and {card}."
    if without:
        told += f" {len(without)} of them have no costs of freezing: {', '.join(without)}."
    commands.answer({"dataset": output, "card": card, "bytes": size, "without_costs": without}, told)


def _files_in(places: Sequence[Path]) -> list[Path]:
    """Return the recordings in folders, and files as they are."""
    from smartfrz.dataset_builder.storage import run_files

    return [path for place in places for path in (run_files(place) if place.is_dir() else [place])]


def _load_recipes(paths: Sequence[Path]) -> Any:
    from smartfrz.dataset_builder.recipes import check_together, load_recipe

    recipes = [load_recipe(path) for path in paths]
    check_together(recipes)
    return recipes


def _record_all(recipes: Sequence[Any], output: str, options: RecordingOptions) -> list[str]:
    """Record recipes; return paths or addresses of the recordings, in the order of the recipes."""
    from smartfrz.dataset_builder.engines import Message, record_all

    failures, places, missing = [], {}, None
    done: dict[str, float] = dict.fromkeys((recipe.name for recipe in recipes), 0.0)
    with _engine(output, options) as engine, _progress_bars() as bars, _lines("recording") as tell:
        tasks = {recipe.name: bars.add_task(recipe.name, total=1.0, what="waiting") for recipe in recipes}
        for news in record_all(engine, recipes):
            done[news.name] = news.fraction if isinstance(news, Message) else 1.0
            if isinstance(news, Message):
                bars.update(tasks[news.name], completed=news.fraction, what=news.text)
                tell(sum(done.values()) / len(done), f"{news.name}: {news.text}")
            elif news.error:
                bars.update(tasks[news.name], completed=0, what="failed")
                failures.append(f"{news.name}: {news.error}")
                if isinstance(news.error, ModuleNotFoundError) and _is_of_the_extra(news.error):
                    missing = news.error
            else:
                bars.update(tasks[news.name], completed=1.0, what="done")
                places[news.name] = news.place
                commands.show(news.place)
    if missing and options.engine == "ray":
        failures.append(f"Type on each machine of the cluster: {install_command('build', 'ray')}")
    elif missing and not places:
        raise missing  # the group says what to install
    if failures:
        commands.answer({"recordings": places, "failed": failures})
        raise click.ClickException("Not recorded:\n" + "\n".join(failures))
    return [places[recipe.name] for recipe in recipes]


def _is_of_the_extra(error: ModuleNotFoundError) -> bool:
    return str(error.name).partition(".")[0] in _PACKAGES


@contextlib.contextmanager
def _engine(output: str, options: RecordingOptions) -> Iterator[Any]:
    """Open the engine that the options ask for.

    Raises:
        click.UsageError: If options do not belong together.
    """
    from smartfrz.zoo import urls

    taken = () if urls.is_url(output) else (Path(output), *Path(output).parents)
    for path in taken:
        if path.exists() and not path.is_dir():
            raise click.UsageError(f"Cannot record to {output!r}: {str(path)!r} is a file. Pass a folder.")
    if options.engine == "ray":
        with _ray_engine(output, options) as engine:
            yield engine
        return
    from smartfrz.dataset_builder.engines import LocalEngine

    for name in ("address", "cpus", "gpus", "retries"):
        if given(name):
            raise click.UsageError(f"--{name} is for --engine ray.")
    if urls.is_url(output):
        raise click.UsageError(f"{output!r} is an address, to which only --engine ray records. Pass a folder.")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with LocalEngine(folder, options.workers, options.threads, options.device, options.costs) as engine:
        yield engine


@contextlib.contextmanager
def _ray_engine(output: str, options: RecordingOptions) -> Iterator[Any]:
    from smartfrz.dataset_builder.ray_engine import RayEngine, RayOptions

    for name, instead in (("workers", "cpus says how many recipes fit a machine"), ("device", "gpus reserves GPUs")):
        if given(name):
            raise click.UsageError(f"--{name} is for --engine local. On Ray, --{instead}.")
    wanted = RayOptions(options.address, options.cpus, options.gpus, options.retries, options.threads, options.costs)
    try:
        with RayEngine(output, wanted) as engine:
            yield engine
    except ConnectionError as error:
        raise click.ClickException(f"No Ray cluster answers at {options.address}: {error}") from error


def _show_labels(run: Any, rule: Any) -> Any:
    from smartfrz.dataset_builder.labelling import label_run

    labels = label_run(run, rule).hard
    known = labels >= 0
    told = f"{run.name}: {(labels == 1).sum() / max(1, known.sum()):.0%} of the labels say freeze"
    commands.show(told if known.all() else f"{told}, and {1 - known.mean():.0%} are not known")
    return labels


def _train(job: Any, files: Sequence[Path]) -> dict[str, Any]:
    """Train, export, write the card and print it."""
    # The exporter warns of torchvision operators, which no predictor has.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    bars = _progress_bars()
    task = bars.add_task("training", total=1.0, what="")
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(_lines("training"))

        def progress(fraction: float, what: str) -> None:
            if not bars.live.is_started:  # nothing is drawn above an error of what is read first
                stack.enter_context(bars)
            bars.update(task, completed=fraction, what=what)
            tell(fraction, what)

        card, remark = job.run(files, progress)
    commands.show(card)
    place = job.output.with_suffix(".md")
    commands.show(f"Wrote {job.output} and {place}.")
    return {"predictor": job.output, "card": place, "remark": remark}


def _note_few(document: dict[str, Any]) -> None:
    """Say last of all that a predictor was made from few recordings."""
    if document["remark"]:
        commands.note(document["remark"])


def _evaluate(predictor: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Judge, and print the tables."""
    from smartfrz.dataset_builder.building import evaluation_text, judge_predictor
    from smartfrz.dataset_builder.datasets import read_together
    from smartfrz.dataset_builder.labelling import labelled_runs, records_of, rule_of
    from smartfrz.predictor.runtime import Predictor

    loaded = Predictor(predictor, device="cpu")
    recorded = read_together(files)
    rule = rule_of(loaded.info, recorded)
    judged = judge_predictor(loaded, labelled_runs(recorded, rule, records_of(loaded.info)))
    commands.show(evaluation_text(loaded.info, judged))
    qualities = {run: {method: one.quality for method, one in methods.items()} for run, methods in judged.items()}
    return {"predictor": predictor, "quality": qualities}


@contextlib.contextmanager
def _lines(label: str) -> Iterator[Tell]:
    """Yield what writes a line a minute where no bars can be drawn."""
    if sys.stderr.isatty():
        yield lambda fraction, text: None
    else:
        with lines(label) as tell:
            yield tell


def _progress_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
    hidden = commands.quiet() or not sys.stderr.isatty()
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=hidden)
