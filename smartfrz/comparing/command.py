"""What `smartfrz compare` does: trains the runs that are missing, judges all, and writes what came out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from smartfrz import __version__
from smartfrz.comparing.engine import FULL, Progress
from smartfrz.comparing.lines import matching, read_lines
from smartfrz.comparing.own_task import Part, Source, build_task, duration, fit_budget
from smartfrz.comparing.page import save_page
from smartfrz.comparing.study import finished, run_study
from smartfrz.comparing.tasks import AnyTask, explained
from smartfrz.comparing.variants import DEFAULT, PREDICTOR, methods_of
from smartfrz.comparing.verdict import Verdict, judge
from smartfrz.errors import MissingDependencyError, install_command
from smartfrz.files import replacing
from smartfrz.importing import importable

FEW_STEPS = 100  # of full training, below which a note says that they are few
LINES, FIGURES, PICTURE, PAGE = "runs.jsonl", "compare.json", "compare.png", "report.html"


@dataclass(frozen=True)
class CompareOptions:
    """How a task is compared.

    Attributes:
        predictor: What decides about freezing; see `SmartFRZ`.
        variants: Ways to use SmartFRZ; see `smartfrz.comparing.variants.variant`.
        fewer: Shares of the steps in percent, as in `50,70`.
        seeds: Number of seeds, 0 to `seeds - 1`.
        tolerance: Loss that counts as none; see `smartfrz.comparing.verdict.judge`.
        budget: Seconds that all runs may take together; None for as long as it takes.
        output: Folder of the results.
    """

    predictor: str = PREDICTOR
    variants: tuple[str, ...] = (DEFAULT,)
    fewer: str = "50,70"
    seeds: int = 1
    tolerance: float | None = None
    budget: float | None = None
    output: Path = Path("compare-output")


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        verdict: The verdict.
        lines: Results of the runs, as in the file.
        known: How many of them an earlier start had finished.
        foreign: Runs in the file that belong to another task, version or budget.
        ran: What was run, in words: a heading and a text each.
    """

    verdict: Verdict
    lines: list[dict[str, Any]]
    known: int
    foreign: int
    ran: dict[str, str]


def run_compare(source: Source, options: CompareOptions, progress: Progress = lambda fraction, text: None) -> Outcome:
    """Compare ways to train a task, and write `runs.jsonl` and `compare.json` into the output folder.

    Raises:
        RecipeError: If the task cannot be found or trained, or the budget is too short.
        ResultsError: If the file of results is damaged, or the loss is not finite.
        ValueError: If a variant or a share cannot be read.
    """
    methods = [FULL, *methods_of(options.predictor, options.variants, options.fewer)]
    seeds, path = range(options.seeds), options.output / LINES
    read_lines(path)  # a damaged file is found before anything is trained
    with importable(source.folder):
        task = build_task(source)
        device, chance = task.device_type(), task.chance()
        facts: dict[str, Any] = {"task": source.name, "version": source.version}
        facts |= {"device": device, "smartfrz": __version__, "budget": options.budget}
        part = Part()
        if options.budget is not None:
            part = _known_part(path, facts) or fit_budget(task, methods, options.seeds, options.budget)
        facts["part"] = asdict(part)
        known = len(finished(path, facts, methods, seeds))
        with explained(f"Training {source.name} failed", only_theirs=True):
            lines = run_study(part.of(task).start, methods, seeds, facts, path, progress, turns=task.takes_turns)
    clock = "cpu_seconds" if device == "cpu" else "train_seconds"
    verdict = judge(lines, task.metric, options.tolerance, clock, chance)
    sentence = verdict.sentence if part.share == 1.0 else f"On {part.share:.0%} of the task: {verdict.sentence}"
    verdict = replace(verdict, sentence=sentence, notes=[*verdict.notes, *_notes(verdict, task, part, options)])
    foreign = len(read_lines(path)) - len(matching(read_lines(path), facts))
    outcome = Outcome(verdict, lines, known, foreign, _what_ran(source, part.of(task), lines, options))
    with replacing(options.output / FIGURES) as temporary:
        temporary.write_text(json.dumps(to_dict(outcome), indent=1), "utf-8")
    return outcome


def _known_part(path: Path, facts: Mapping[str, Any]) -> Part | None:
    """The part of the task on which an earlier start with the same budget trained."""
    lines = matching(read_lines(path), facts)
    return Part(**lines[-1]["part"]) if lines else None


def _notes(verdict: Verdict, task: AnyTask, part: Part, options: CompareOptions) -> list[str]:
    notes = []
    steps = part.of(task).steps
    if steps < FEW_STEPS:
        notes.append(
            f"Full training has {steps} steps. In fewer than about {FEW_STEPS} SmartFRZ sees too little to judge layers, "
            "and the first steps of each run weigh on its time. Compare a run as long as those that you do."
        )
    number = task.num_samples("test")
    if verdict.is_share and 1 / number > verdict.tolerance / 2:
        notes.append(
            f"The test data has {number} samples: a single one is {100 / number:.2g} points. More test data would tell more."
        )
    if task.note:
        notes.append(task.note)
    if options.budget is not None:
        notes.append(part.trust(options.budget, task))
    return notes


def _what_ran(
    source: Source, task: AnyTask, lines: Sequence[Mapping[str, Any]], options: CompareOptions
) -> dict[str, str]:
    """What was run, in words: a heading and a text each."""
    parts = {"train": "training", "validation": "validation", "test": "testing"}
    samples = ", ".join(f"{task.num_samples(part):,} for {purpose}" for part, purpose in parts.items())
    used: dict[str, set[str]] = {"smartfrz": {line["smartfrz"] for line in lines}}
    for line in lines:
        for name, version in line.get("versions", {}).items():
            used.setdefault(name, set()).add(version)
    return {
        "Task": f"{source.name}, version {source.version}" if source.version else source.name,
        "Full training": f"{task.steps:,} steps of {task.batch_size} samples",
        "Samples": samples,
        "Seeds": ", ".join(map(str, range(options.seeds))),
        "Predictor": options.predictor,
        "Budget": "none: the whole task" if options.budget is None else duration(options.budget),
        "Device": lines[0]["device"],
        "Versions": ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in used.items()),
    }


def to_dict(outcome: Outcome) -> dict[str, Any]:
    """The verdict and all runs, ready for JSON."""
    return {**outcome.verdict.to_dict(), "ran": outcome.ran, "runs": outcome.lines}


def draw(outcome: Outcome, title: str, folder: Path) -> Path:
    """Write the picture.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from smartfrz.comparing.fronts import save_fronts
    except ModuleNotFoundError as error:
        raise _not_made("picture", str(error.name).partition(".")[0]) from error
    save_fronts(outcome.verdict, title, folder / PICTURE)
    return folder / PICTURE


def write_page(outcome: Outcome, title: str, folder: Path) -> Path:
    """Write the page.

    Raises:
        MissingDependencyError: If jinja2 is not installed.
    """
    try:
        save_page(outcome.verdict, outcome.ran, title, folder / PAGE)
    except MissingDependencyError as error:
        raise _not_made("page", "jinja2") from error
    return folder / PAGE


def _not_made(what: str, package: str) -> MissingDependencyError:
    return MissingDependencyError(f"No {what} was made: {package} is not installed. Type: {install_command('plots')}")
