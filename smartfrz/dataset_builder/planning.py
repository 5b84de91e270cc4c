"""Plans for training a predictor: the options of `train` and `run`, checked before hours of recording."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from smartfrz import zoo
from smartfrz.dataset_builder import building
from smartfrz.dataset_builder.building import Base, Material, Plan
from smartfrz.dataset_builder.cards import few_recordings
from smartfrz.dataset_builder.datasets import read_together
from smartfrz.dataset_builder.labelling import labelled_runs, records_of, rule_of
from smartfrz.dataset_builder.labels import LabelRule
from smartfrz.dataset_builder.options import FURTHER_LEARNING_RATE, PULL, RuleOptions, TrainingArguments, given
from smartfrz.dataset_builder.recipes import Recipe
from smartfrz.dataset_builder.storage import run_files
from smartfrz.errors import RecipeError
from smartfrz.predictor.contract import PredictorInfo
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.cross_validation import can_hold_out
from smartfrz.predictor.training.export import restore
from smartfrz.predictor.training.runs import TrainingOptions

_FORMAT = ("window", "tailored_size", "representation", "records")  # a base's file can be read in no other way


@dataclass(frozen=True)
class Job:
    """A predictor that is to be trained.

    Attributes:
        output: The ONNX file.
        plan: How to train it.
        cross_validate: As in `Plan`; None to decide by the number of runs.
        old_files: Recordings of the base that are mixed in.
        as_base: Whether the label rule is the base's, because the user chose none.
    """

    output: Path
    plan: Plan
    cross_validate: bool | None = None
    old_files: Sequence[Path] = ()
    as_base: bool = False

    def check_recipes(self, recipes: Sequence[Recipe], *, costs: bool) -> None:
        """Refuse before recording what training would refuse afterwards.

        Args:
            recipes: What is recorded.
            costs: Whether what freezing costs is measured, too.

        Raises:
            RecipeError: If there is only one recipe, one records fewer weights than the predictor reads, or labels need
                costs that are not measured.
        """
        plan = self.plan
        if plan.rule.source != "cka" and not costs and not self.as_base:  # those of a base may become labels by CKA
            raise RecipeError(
                f"The labels need what freezing costs (--labels {plan.rule.source}), which is measured with --costs only. "
                "Add --costs, which makes recording take about five times as long, or choose --labels cka."
            )
        for recipe in recipes:
            if recipe.recording.pool_size < plan.options.tailored_size:
                raise RecipeError(
                    f"Recipe {recipe.name!r} has recording.pool_size = {recipe.recording.pool_size}, but the predictor "
                    f"reads {plan.options.tailored_size} weights a layer; expected at least as many. Raise pool_size"
                    f"{'.' if plan.base else ', or lower --tailored-size.'}"
                )
        validated = plan.base.facts()["validated_on"] if plan.base else ()
        if len(recipes) < 2 and not {path.stem for path in self.old_files} & set(validated):
            raise RecipeError(
                f"One recipe, {recipes[0].name!r}, is too few: expected at least two, one to train on and one to validate "
                "on. Add another, for instance the same with another name and seed."
            )

    def run(self, files: Sequence[Path], progress: Callable[[float, str], None]) -> tuple[str, str]:
        """Train on recordings, or on datasets of them, and export the predictor.

        Returns:
            The predictor's card, and what to say if it was made from few recordings, else "".

        Raises:
            click.ClickException: If the runs are too few or too small.
        """
        plan = self.plan
        everything = read_together([*files, *self.old_files])
        num_new = len(everything) - len(self.old_files)
        new, old = everything[:num_new], everything[num_new:]
        architectures = [run.architecture for run in new]
        chosen = self.cross_validate
        plan = replace(plan, cross_validate=can_hold_out(architectures) if chosen is None else chosen)
        if plan.base and self.as_base:
            plan = replace(plan, rule=rule_of(plan.base.info, everything))
        if plan.rule.source == "both" and not self.as_base and all(run.costs is None for run in everything):
            raise click.ClickException(
                f"None of the {len(everything)} recordings has costs of freezing, which --labels both needs of some. Add "
                "them with: smartfrz-build record --costs RECIPE..., to the same --output, or choose --labels cka."
            )
        try:
            runs, old_runs = (labelled_runs(some, plan.rule, plan.records) for some in (new, old))
            if plan.base:
                plan = replace(plan, base=replace(plan.base, runs=old_runs))
            material = Material([*new, *old], runs, _digest({*files, *self.old_files}))
            card = building.build_predictor(material, plan, self.output, progress)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        return card, "" if plan.base else few_recordings(architectures)


def make_job(arguments: TrainingArguments, rule: RuleOptions, new_names: Sequence[str]) -> Job:
    """Check the options of a training and plan it.

    Args:
        arguments: The options.
        rule: Options of the label rule.
        new_names: Names of the runs to train on.

    Raises:
        click.UsageError: If options contradict each other or the base.
        click.ClickException: If `--base-runs` holds no recording of the base.
    """
    chosen = rule.make()
    if arguments.base is not None:
        return _continue_from(arguments.base, arguments, chosen, new_names)
    if arguments.base_runs is not None or arguments.pull is not None:
        raise click.UsageError("--base-runs and --pull need --base, the predictor to continue from.")
    name = arguments.name or arguments.output.stem
    return Job(arguments.output, Plan(name, chosen, _options(arguments), arguments.records), arguments.cross_validate)


def _options(arguments: TrainingArguments) -> TrainingOptions:
    return TrainingOptions(
        representation=arguments.representation,
        window=arguments.window,
        tailored_size=arguments.tailored_size,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        precision=arguments.precision,
        seed=arguments.seed,
    )


def _continue_from(name: str, arguments: TrainingArguments, rule: LabelRule, new_names: Sequence[str]) -> Job:
    """Plan to continue from a base, which decides everything that the user has not."""
    if arguments.cross_validate:
        raise click.UsageError("--cross-validate cannot be combined with --base, which has seen the architectures.")
    base = _load_base(name)
    info = base.info
    _check_format(arguments, info)
    as_base = not any(map(given, ("labels", "rule", "tolerance", "rule_records", "cost_limit")))
    if as_base:
        rule = LabelRule(**info.metrics.get("label_rule", {}))
    old_files = _old_files(base, arguments.base_runs, set(new_names)) if arguments.base_runs else []
    if not old_files:
        click.echo(
            f"The recordings of {info.name} are not at hand (--base-runs), so the weights are kept near its own.",
            err=True,
        )
    default_pull = 0.0 if old_files else PULL
    options = replace(
        _options(arguments),
        window=info.window,
        tailored_size=info.tailored_size,
        representation=info.representation,
        min_records=info.min_records,
        pull=default_pull if arguments.pull is None else arguments.pull,
        learning_rate=arguments.learning_rate if given("learning_rate") else FURTHER_LEARNING_RATE,
    )
    plan = Plan(arguments.name or arguments.output.stem, rule, options, records_of(info), base=base)
    return Job(arguments.output, plan, cross_validate=False, old_files=old_files, as_base=as_base)


def _check_format(arguments: TrainingArguments, info: PredictorInfo) -> None:
    for option in _FORMAT:
        asked = getattr(arguments, option)
        own = records_of(info) if option == "records" else getattr(info, option)
        if given(option) and asked != own:
            raise click.UsageError(
                f"--{option.replace('_', '-')} is {asked!r}, but the base {info.name!r} has {own!r}; expected the same. "
                "Leave the option out, or train without --base."
            )


def _load_base(name: str) -> Base:
    with zoo.file_of(name) as path:
        predictor = Predictor(path, device="cpu")
        return Base(predictor.info, predictor.sha256, restore(path))


def _old_files(base: Base, folder: Path, new_names: set[str]) -> list[Path]:
    """Find the recordings in a folder that the base was made from."""
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


def _digest(files: set[Path]) -> str:
    """Return the SHA-256 of the files' own digests, in the order of their names."""
    ordered = sorted(files, key=lambda path: path.name)
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in ordered)).hexdigest()
