"""Options that several commands of `smartfrz-build` share. Each group reaches its command as one object."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from smartfrz.commands import device_option
from smartfrz.completing import PREDICTOR

if TYPE_CHECKING:
    from smartfrz.dataset_builder.labels import LabelRule

Decorator = Callable[[Any], Any]

# For training that continues from a base; docs/recipes.md has the measurements.
FURTHER_LEARNING_RATE = 1e-4
PULL = 1000.0

FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)


@dataclass(frozen=True)
class RecordingOptions:
    """Where to record, and with how many processes; `--help` describes each option."""

    engine: str
    workers: int
    threads: int | None
    costs: bool
    device: str
    address: str | None
    cpus: float
    gpus: float
    retries: int


@dataclass(frozen=True)
class TrainingArguments:
    """How to train a predictor; `--help` describes each option."""

    output: Path
    name: str | None
    representation: str
    records: int
    window: int
    tailored_size: int
    optimizer: Literal["adamw", "sgd"]
    learning_rate: float
    epochs: int
    precision: float
    seed: int
    cross_validate: bool | None
    base: str | None
    base_runs: Path | None
    pull: float | None


@dataclass(frozen=True)
class RuleOptions:
    """The label rule; `LabelRule` describes it."""

    labels: str
    rule: str
    tolerance: float
    rule_records: int
    cost_limit: float

    def make(self) -> "LabelRule":
        """Make the label rule.

        Raises:
            click.UsageError: If an option is out of range.
        """
        from smartfrz.dataset_builder.labels import LabelRule

        try:
            return LabelRule(self.rule, self.tolerance, self.rule_records, self.labels, self.cost_limit)  # type: ignore[arg-type]
        except ValueError as error:
            raise click.UsageError(str(error)) from error


def given(parameter: str) -> bool:
    """Return whether the user has passed an option of the current command, instead of leaving it to its default."""
    return click.get_current_context().get_parameter_source(parameter) is not ParameterSource.DEFAULT


def _together(parameter: str, into: Any, options: Sequence[Decorator]) -> Decorator:
    """Return a decorator that adds options to a command, which receives them as one dataclass object."""

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def gathering(**values: Any) -> Any:
            own = {field.name: values.pop(field.name) for field in dataclasses.fields(into)}
            return command(**values, **{parameter: into(**own)})

        for option in reversed(options):  # decorators are applied from the last to the first
            gathering = option(gathering)
        return gathering

    return decorate


recording_options = _together(
    "recording",
    RecordingOptions,
    [
        click.option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Processes on this machine, or tasks on a Ray cluster.",
        ),
        click.option(
            "--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Recipes at once; local only."
        ),
        click.option(
            "--threads",
            default=None,
            type=click.IntRange(min=1),
            help="PyTorch threads per recipe. Default: PyTorch's own choice; with --engine ray as many as --cpus.",
        ),
        click.option(
            "--costs",
            is_flag=True,
            help="Also measure what freezing costs, by branches of the recorded run; PyTorch only.",
        ),
        device_option("Where PyTorch trains; local only. A Ray task trains on a GPU if --gpus reserves one."),
        click.option(
            "--address",
            default=None,
            metavar="HOST:PORT",
            help="Address of the Ray cluster. Default: RAY_ADDRESS, or else a new cluster on this machine.",
        ),
        click.option("--cpus", default=1.0, show_default=True, type=click.FloatRange(0), help="CPUs of a Ray task."),
        click.option("--gpus", default=0.0, show_default=True, type=click.FloatRange(0), help="GPUs of a Ray task."),
        click.option(
            "--retries",
            default=3,
            show_default=True,
            type=click.IntRange(0),
            help="Restarts of a Ray task whose machine died, or which could not read or write.",
        ),
    ],
)

rule_options = _together(
    "rule",
    RuleOptions,
    [
        click.option(
            "--labels",
            type=click.Choice(["cka", "costs", "both"]),
            default="cka",
            show_default=True,
            help="A layer is ready if its CKA has settled, if freezing up to it costs little (record --costs), or both.",
        ),
        click.option(
            "--rule",
            type=click.Choice(["forward", "backward"]),
            default="forward",
            show_default=True,
            help="A layer is ready if its CKA stays: until the end (forward), or if it did lately (backward).",
        ),
        click.option("--tolerance", default=0.02, show_default=True, help="Largest change of CKA, absolute."),
        click.option("--rule-records", default=10, show_default=True, help="Records for --rule backward."),
        click.option(
            "--cost-limit",
            default=0.5,
            type=click.FloatRange(0, 100, max_open=True),
            show_default=True,
            help="Accuracy that freezing may cost, in points; for --labels costs and both.",
        ),
    ],
)

training_options = _together(
    "training",
    TrainingArguments,
    [
        click.option("--output", "-o", required=True, type=FILE, help="The predictor; its card is written beside it."),
        click.option("--name", default=None, help="Name in the file. Default: the output file's name."),
        click.option(
            "--representation",
            type=click.Choice(["raw", "trajectory", "trajectory+loss"]),
            default="trajectory+loss",
            show_default=True,
            help="What the network sees: weights; how they move; or that, and how far the training loss has fallen.",
        ),
        click.option(
            "--records",
            default=30,
            type=click.IntRange(4),
            show_default=True,
            help="Records per run, to which recordings are thinned.",
        ),
        click.option(
            "--window",
            default=30,
            type=click.IntRange(2, 4096),
            show_default=True,
            help="Records that it looks back on.",
        ),
        click.option(
            "--tailored-size", default=1024, type=click.IntRange(16), show_default=True, help="Weights in a record."
        ),
        click.option(
            "--optimizer",
            type=click.Choice(["adamw", "sgd"]),
            default="adamw",
            show_default=True,
            help="Optimizer of the predictor's training.",
        ),
        click.option(
            "--learning-rate",
            default=5e-4,
            type=click.FloatRange(0, min_open=True),
            show_default=True,
            help=f"Peak learning rate. Default with --base: {FURTHER_LEARNING_RATE:g}.",
        ),
        click.option(
            "--epochs",
            default=10,
            type=click.IntRange(1),
            show_default=True,
            help="Length of the predictor's training.",
        ),
        click.option(
            "--precision",
            default=0.9,
            type=click.FloatRange(0, 1, min_open=True),
            show_default=True,
            help="Share of right freezes for which the threshold is calibrated.",
        ),
        click.option("--seed", default=0, show_default=True, help="Seed of the predictor's training."),
        click.option(
            "--cross-validate/--no-cross-validate",
            default=None,
            help="Also hold out each architecture in turn. Default: if there are enough runs, and no --base.",
        ),
        click.option(
            "--base", type=PREDICTOR, default=None, help="Continue from this one: a zoo name, file, or address."
        ),
        click.option("--base-runs", type=FOLDER, help="Recordings that the base was made from, to be mixed in."),
        click.option(
            "--pull",
            default=None,
            type=click.FloatRange(0),
            help=f"How strongly to keep the weights near the base's. Default: {PULL:g} without --base-runs, else 0.",
        ),
    ],
)
