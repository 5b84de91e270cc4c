"""`smartfrz-build`: record runs, label them, train a predictor, evaluate it."""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import rich
from click.core import ParameterSource
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smartfrz.commands import Group
from smartfrz.dataset_builder.engines import Engine, LocalEngine
from smartfrz.dataset_builder.labels import LabelRule, label_layers
from smartfrz.dataset_builder.places import on_this_machine
from smartfrz.dataset_builder.recipes import Recipe, load_recipe
from smartfrz.dataset_builder.storage import RecordedRun, read_run, run_files
from smartfrz.errors import RecipeError
from smartfrz.files import replacing
from smartfrz.predictor.contract import REPRESENTATIONS, PredictorInfo
from smartfrz.zoo import urls

# For going on from a base: docs/recipes.md has what was measured.
_FURTHER_LEARNING_RATE = 1e-4
_PULL = 1000.0


@click.group(cls=Group)
@click.version_option(package_name="smartfrz")
def main() -> None:
    """Build a freeze predictor from recorded training runs."""


@main.command()
@click.argument("model")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="Default: the model's name, with .toml."
)
@click.option("--data", default="", help="A folder with train/<class>/ and test/<class>/, or module:callable.")
@click.option("--num-classes", default=0, type=click.IntRange(0), help="Default: as in the folder, else 10.")
@click.option("--name", default="", help="Default: the output file's name.")
@click.option("--architecture", default="", help="Family. Default: a guess from the model's name.")
@click.option("--image-size", default=64, type=click.IntRange(8), show_default=True, help="Of pictures in a folder.")
def new(model: str, output: Path | None, **others: Any) -> None:
    """Write a commented recipe.

    MODEL is torchvision:NAME, timm:NAME, transformers:NAME_OR_FOLDER, keras:NAME, keras_hub:PRESET, module:callable, the
    bare name of a torchvision or timm model, or organisation/name of the Hugging Face hub.
    """
    from smartfrz.dataset_builder.templates import NewRecipe, default_file, recipe_text

    path = output or default_file(model)
    if path.exists():
        raise RecipeError(
            f"{str(path)!r} exists, and is left as it is. Choose another file with --output, or remove it."
        )
    text = recipe_text(NewRecipe(model, **others), path)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    load_recipe(path)
    click.echo(f"Wrote {path}. Fill in [data], then: smartfrz-build check {path}")


def _device_option(text: str) -> Callable[[Any], Any]:
    return click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help=text
    )


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--runs", default="runs", show_default=True, type=click.Path(path_type=Path, file_okay=False))
@_device_option("Where PyTorch trains.")
def check(recipe: Path, runs: Path, device: Any) -> None:
    """Take two training steps; print layers, memory, and how long a recording will take."""
    from smartfrz.dataset_builder.checking import check_recipe, describe

    loaded = load_recipe(recipe)
    click.echo(describe(loaded, check_recipe(loaded, runs, device)))


_RECORDING = ("engine", "workers", "threads", "device", "address", "cpus", "gpus", "retries")


def _recording_options(command: Any) -> Any:
    options = (
        click.option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Processes on this machine, or tasks of a Ray cluster.",
        ),
        click.option(
            "--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Recipes at once, local."
        ),
        click.option(
            "--threads",
            default=None,
            type=click.IntRange(min=1),
            help="PyTorch threads of a recipe. Default: PyTorch's own choice; with --engine ray as many as --cpus.",
        ),
        _device_option("Where PyTorch trains, local. A Ray task trains on a GPU if --gpus reserves one."),
        click.option(
            "--address",
            default=None,
            metavar="HOST:PORT",
            help="Of the Ray cluster. Default: RAY_ADDRESS, else a new one.",
        ),
        click.option("--cpus", default=1.0, show_default=True, type=click.FloatRange(0), help="Of a Ray task."),
        click.option("--gpus", default=0.0, show_default=True, type=click.FloatRange(0), help="Of a Ray task."),
        click.option(
            "--retries",
            default=3,
            show_default=True,
            type=click.IntRange(0),
            help="Of a Ray task whose machine died, or which could not read or write.",
        ),
    )
    for option in reversed(options):  # as decorators, the last one is applied first
        command = option(command)
    return command


@main.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", "-o", default="runs", show_default=True, help="Folder; with --engine ray also an address.")
@_recording_options
def record(recipes: tuple[Path, ...], output: str, **options: Any) -> None:
    """Train a reference model, train again, and record weights and CKA.

    Finished recordings are kept: after an interruption, run the same command again.
    """
    loaded = [load_recipe(path) for path in recipes]
    _check_names(loaded)
    _record_all(loaded, output, **options)


@contextlib.contextmanager
def _engine(
    output: str,
    engine: str,
    workers: int,
    threads: int | None,
    device: str,
    address: str | None,
    cpus: float,
    gpus: float,
    retries: int,
) -> Iterator[Engine]:
    """The engine that the options ask for.

    Raises:
        click.UsageError: If options do not belong together.
    """
    if engine == "ray":
        from smartfrz.dataset_builder.ray_engine import RayEngine, RayOptions

        for name, instead in (
            ("workers", "cpus says how many recipes fit a machine"),
            ("device", "gpus reserves GPUs"),
        ):
            if _given(name):
                raise click.UsageError(f"--{name} is for --engine local. On Ray, --{instead}.")
        try:
            with RayEngine(output, RayOptions(address, cpus, gpus, retries, threads)) as chosen:
                yield chosen
        except ConnectionError as error:
            raise click.ClickException(f"No Ray cluster answers at {address}: {error}") from error
        return
    for name in ("address", "cpus", "gpus", "retries"):
        if _given(name):
            raise click.UsageError(f"--{name} is for --engine ray.")
    if urls.is_url(output):
        raise click.UsageError(f"{output!r} is an address, to which only --engine ray records. Pass a folder.")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with LocalEngine(folder, workers, threads, device) as chosen_here:
        yield chosen_here


def _record_all(loaded: list[Recipe], output: str, **options: Any) -> list[str]:
    """Record recipes; paths or addresses of the recordings, in the order of the recipes."""
    waiting = {recipe.name: recipe for recipe in loaded}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
    bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=rich.console.Console(stderr=True))
    failures, places = [], {}
    with _engine(output, **options) as engine, bars:
        tasks = {name: bars.add_task(name, total=1.0, what="waiting") for name in waiting}
        running: set[str] = set()
        while waiting or running:
            for name in _ready(waiting, running):
                engine.start(waiting.pop(name))
                running.add(name)
            results = engine.finished(timeout=0.5)
            for message in engine.messages():
                bars.update(tasks[message.name], completed=message.fraction, what=message.text)
            for name, place, error in results:
                running.remove(name)
                bars.update(tasks[name], completed=0 if error else 1.0, what="failed" if error else "done")
                if error:
                    failures.append(f"{name}: {error}")
                else:
                    places[name] = place
                    click.echo(place)
    if failures:
        raise click.ClickException("Not recorded:\n" + "\n".join(failures))
    return [places[recipe.name] for recipe in loaded]


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
        labels = _show_labels(run, chosen)
        for layer, row in zip(run.layers, labels, strict=True):
            click.echo(f"  {layer:40s} {(row == 1).sum() / max(1, (row >= 0).sum()):5.0%}")
        if plots is not None:
            from smartfrz.plots import plot_labels

            with replacing(plots / f"{run.name}.png") as temporary:
                plot_labels(run.name, run.layers, run.cka, labels, temporary)
            click.echo(f"  picture: {plots / run.name}.png")


def _show_labels(run: RecordedRun, rule: LabelRule) -> Any:
    labels = label_layers(run.cka, rule)
    known = labels >= 0
    click.echo(f"{run.name}: {(labels == 1).sum() / max(1, known.sum()):.0%} ready, {known.mean():.0%} known")
    return labels


def _training_options(command: Any) -> Any:
    """What `train` and `run` share."""
    file, folder = click.Path(path_type=Path, dir_okay=False), click.Path(path_type=Path, file_okay=False)
    options = (
        click.option("--output", "-o", required=True, type=file),
        click.option("--name", default=None, help="Default: the output file's name."),
        _rule_options,
        click.option("--representation", type=click.Choice(REPRESENTATIONS), default="trajectory", show_default=True),
        click.option(
            "--records",
            default=30,
            type=click.IntRange(4),
            show_default=True,
            help="Records a run; recordings are thinned.",
        ),
        click.option("--window", default=30, type=click.IntRange(2, 4096), show_default=True),
        click.option("--tailored-size", default=1024, type=click.IntRange(16), show_default=True),
        click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True),
        click.option(
            "--learning-rate",
            default=5e-4,
            type=click.FloatRange(0, min_open=True),
            show_default=True,
            help=f"With --base: {_FURTHER_LEARNING_RATE:g}.",
        ),
        click.option("--epochs", default=10, type=click.IntRange(1), show_default=True),
        click.option(
            "--precision",
            default=0.9,
            type=click.FloatRange(0, 1, min_open=True),
            show_default=True,
            help="For which the threshold is calibrated.",
        ),
        click.option("--seed", default=0, show_default=True),
        click.option(
            "--cross-validate/--no-cross-validate",
            default=None,
            help="Also hold out each architecture in turn. Default: where there are enough runs, and no --base.",
        ),
        click.option(
            "--base", default=None, metavar="PREDICTOR", help="Train this one further: a zoo name, file, address."
        ),
        click.option("--base-runs", type=folder, help="Recordings the base was made from, to be mixed in."),
        click.option(
            "--pull",
            default=None,
            type=click.FloatRange(0),
            help=f"How strongly to keep the weights near the base's. Default: {_PULL:g} without --base-runs, else 0.",
        ),
    )
    for option in reversed(options):  # as decorators, the last one is applied first
        command = option(command)
    return command


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a predictor is to be trained, checked before hours of recording."""

    output: Path
    name: str
    rule: LabelRule
    records: int
    cross_validate: bool | None
    options: Any  # TrainingOptions; its module loads PyTorch
    base: Any = None  # Base, its runs still to be added
    old_files: tuple[Path, ...] = ()


# Options that a base decides: its file can be read in no other way.
_OF_THE_BASE = ("window", "tailored_size", "representation", "records")


def _plan(
    new_names: Sequence[str],
    output: Path,
    name: str | None,
    rule: str,
    tolerance: float,
    rule_records: int,
    records: int,
    cross_validate: bool | None,
    base: str | None,
    base_runs: Path | None,
    pull: float | None,
    **options: Any,
) -> _Plan:
    from smartfrz.predictor.training.runs import TrainingOptions

    chosen = _rule(rule, tolerance, rule_records)
    if base is None:
        if base_runs is not None or pull is not None:
            raise click.UsageError("--base-runs and --pull need --base, the predictor to go on from.")
        return _Plan(output, name or output.stem, chosen, records, cross_validate, TrainingOptions(**options))
    if cross_validate:
        raise click.UsageError(
            "--cross-validate cannot be had with --base: it has seen the architectures. Leave one out."
        )
    loaded = _load_base(base)
    given = {
        key for key in click.get_current_context().params if _given(key)
    }  # what is only a default gives way to the base
    asked = {key: {"records": records, **options}[key] for key in _OF_THE_BASE}
    own = {key: getattr(loaded.info, key) for key in _OF_THE_BASE[:3]} | {"records": _records(loaded.info)}
    for key in _OF_THE_BASE:
        if key in given and asked[key] != own[key]:
            raise click.UsageError(
                f"--{key.replace('_', '-')} is {asked[key]!r}, but the base {loaded.info.name!r} has {own[key]!r}; expected "
                "the same. Leave the option out, or train without --base."
            )
    if not given & {"rule", "tolerance", "rule_records"}:
        chosen = LabelRule(**loaded.info.metrics.get("label_rule", {}))
    old_files = _old_files(loaded, base_runs, set(new_names)) if base_runs else ()
    if not old_files:
        click.echo(
            f"The recordings of {loaded.info.name} are not at hand (--base-runs): its weights are kept near where they are.",
            err=True,
        )
    options |= {key: own[key] for key in _OF_THE_BASE[:3]} | {"min_records": loaded.info.min_records}
    options["pull"] = pull if pull is not None else 0.0 if old_files else _PULL
    if "learning_rate" not in given:
        options["learning_rate"] = _FURTHER_LEARNING_RATE
    return _Plan(
        output, name or output.stem, chosen, own["records"], False, TrainingOptions(**options), loaded, tuple(old_files)
    )


def _given(parameter: str) -> bool:
    return click.get_current_context().get_parameter_source(parameter) is not ParameterSource.DEFAULT


def _records(info: PredictorInfo) -> int:
    return round(1 / info.record_fraction)


def _load_base(name: str) -> Any:
    from smartfrz import zoo
    from smartfrz.dataset_builder.building import Base
    from smartfrz.predictor.runtime import Predictor
    from smartfrz.predictor.training.export import restore

    with zoo.file_of(name) as path:
        predictor = Predictor(path, device="cpu")
        return Base(predictor.info, predictor.sha256, restore(path))


def _old_files(base: Any, folder: Path, new_names: set[str]) -> list[Path]:
    """The recordings in a folder that the base was made from."""
    facts = base.facts()
    known = {*facts["trained_on"], *facts["validated_on"]}
    files = [path for path in run_files(folder) if path.stem in known - new_names]
    if not files:
        raise click.ClickException(
            f"--base-runs {str(folder)!r} holds none of the recordings of {base.info.name!r}; expected some of "
            f"{', '.join(sorted(known)) or 'none, since it names none'}. Leave --base-runs out to keep near its weights."
        )
    click.echo(f"{len(files)} of {len(known)} recordings of {base.info.name} are mixed in.", err=True)
    return files


def _train(plan: _Plan, files: Sequence[Path]) -> None:
    """Train, export, write the card and print it."""
    from smartfrz.dataset_builder.building import build_predictor, labelled_runs
    from smartfrz.predictor.training.cross_validation import can_hold_out

    _quiet_exporter()
    new = [read_run(path) for path in files]
    old = [read_run(path) for path in plan.old_files]
    every_file = sorted({*files, *plan.old_files}, key=lambda path: path.name)
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in every_file)).hexdigest()
    base = plan.base
    if base is not None:
        base = dataclasses.replace(base, runs=labelled_runs(old, plan.rule, plan.records))
    cross_validate = plan.cross_validate
    if cross_validate is None:
        cross_validate = can_hold_out([run.architecture for run in new])
        if not cross_validate:
            click.echo(
                "Too few runs to hold out each architecture in turn: the card says nothing of new ones.", err=True
            )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeElapsedColumn())
    with Progress(*columns, console=rich.console.Console(stderr=True)) as bars:
        task = bars.add_task("training", total=1.0, what="")
        try:
            card = build_predictor(
                [*new, *old],
                labelled_runs(new, plan.rule, plan.records),
                plan.rule,
                plan.options,
                plan.output,
                plan.name,
                digest,
                records=plan.records,
                cross_validate=cross_validate,
                progress=lambda fraction, what: bars.update(task, completed=fraction, what=what),
                base=base,
            )
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    click.echo(card)
    click.echo(f"Wrote {plan.output} and {plan.output.with_suffix('.md')}.")


@main.command()
@click.argument("runs", type=click.Path(path_type=Path, file_okay=False))
@_training_options
def train(runs: Path, **options: Any) -> None:
    """Train a predictor, evaluate it on held-out runs, export it to ONNX, check parity, write its card."""
    files = run_files(runs)
    _train(_plan([path.stem for path in files], **options), files)


@main.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--runs", default="runs", show_default=True, help="Folder; with --engine ray also an address.")
@_recording_options
@_training_options
def run(recipes: tuple[Path, ...], runs: str, **options: Any) -> None:
    """Record recipes, label, train, evaluate, export and write the card, in one go.

    After an interruption at any point, run the same command again: what is recorded is kept, and training, which starts
    anew, gives the same file.
    """
    loaded = [load_recipe(path) for path in recipes]
    _check_names(loaded)
    recording = {name: options.pop(name) for name in _RECORDING}
    plan = _plan([recipe.name for recipe in loaded], **options)
    _check_enough(loaded, plan)
    with on_this_machine(_record_all(loaded, runs, **recording)) as files:
        for path in files:
            _show_labels(read_run(path), plan.rule)
        _train(plan, files)
        _evaluate(plan.output, files)


def _check_enough(recipes: list[Recipe], plan: _Plan) -> None:
    """What training would refuse after hours of recording."""
    for recipe in recipes:
        if recipe.recording.pool_size < plan.options.tailored_size:
            raise RecipeError(
                f"Recipe {recipe.name!r} has recording.pool_size = {recipe.recording.pool_size}, but the predictor reads "
                f"{plan.options.tailored_size} weights a layer; expected at least as many. Raise pool_size"
                f"{'.' if plan.base else ', or lower --tailored-size.'}"
            )
    validating = {path.stem for path in plan.old_files} & set(plan.base.facts()["validated_on"] if plan.base else ())
    if len(recipes) < 2 and not validating:
        raise RecipeError(
            f"One recipe, {recipes[0].name!r}, is too few: expected at least two, one to train on and one to validate on. "
            "Add another, for instance the same with another name and seed."
        )


@main.command()
@click.argument("predictor", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("runs", type=click.Path(path_type=Path, file_okay=False))
def evaluate(predictor: Path, runs: Path) -> None:
    """Judge a predictor on recorded runs, beside the weight-change baseline."""
    _evaluate(predictor, run_files(runs))


@main.command()
@click.argument("predictor", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", default=None, help="Default: the output file's name.")
def compact(predictor: Path, output: Path, name: str | None) -> None:
    """Write a predictor again with weights of 8 bits, a quarter of the size."""
    from smartfrz.predictor.training.export import compact as write_compact

    difference = write_compact(predictor, output, name or output.stem)
    click.echo(
        f"Wrote {output}: {output.stat().st_size / 1000:,.0f} kB instead of {predictor.stat().st_size / 1000:,.0f}, "
        f"confidences differ by at most {difference:.2g} on random histories."
    )


def _evaluate(predictor: Path, files: Sequence[Path]) -> None:
    from smartfrz.dataset_builder.building import evaluate_predictor, labelled_runs
    from smartfrz.predictor.runtime import Predictor

    loaded = Predictor(predictor, device="cpu")
    recorded = [read_run(path) for path in files]
    rule = LabelRule(**loaded.info.metrics.get("label_rule", {}))
    click.echo(evaluate_predictor(loaded, labelled_runs(recorded, rule, _records(loaded.info))))


def _quiet_exporter() -> None:
    # It warns of torchvision operators that no predictor has.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
