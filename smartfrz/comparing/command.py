"""What `smartfrz compare` does: trains the runs that are missing, judges all, and writes what came out."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from smartfrz import __version__
from smartfrz.comparing.engine import FULL, Progress
from smartfrz.comparing.lines import matching, read_lines
from smartfrz.comparing.own_task import Part, Source, build_task, fit_budget
from smartfrz.comparing.study import finished, run_study
from smartfrz.comparing.tasks import AnyTask, explained
from smartfrz.comparing.variants import DEFAULT, PREDICTOR, methods_of
from smartfrz.comparing.verdict import Verdict, judge
from smartfrz.errors import not_installed
from smartfrz.files import replacing
from smartfrz.importing import importable

LINES, FIGURES, PICTURE = "runs.jsonl", "compare.json", "compare.png"


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
    """

    verdict: Verdict
    lines: list[dict[str, Any]]
    known: int
    foreign: int


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
    outcome = Outcome(verdict, lines, known, len(read_lines(path)) - len(matching(read_lines(path), facts)))
    with replacing(options.output / FIGURES) as temporary:
        temporary.write_text(json.dumps(to_dict(outcome), indent=1), "utf-8")
    return outcome


def _known_part(path: Path, facts: Mapping[str, Any]) -> Part | None:
    """The part of the task on which an earlier start with the same budget trained."""
    lines = matching(read_lines(path), facts)
    return Part(**lines[-1]["part"]) if lines else None


def _notes(verdict: Verdict, task: AnyTask, part: Part, options: CompareOptions) -> list[str]:
    notes = []
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


def to_dict(outcome: Outcome) -> dict[str, Any]:
    """The verdict and all runs, ready for JSON."""
    return {**outcome.verdict.to_dict(), "runs": outcome.lines}


def draw(outcome: Outcome, title: str, folder: Path) -> Path:
    """Write the picture.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from smartfrz.comparing.fronts import save_fronts
    except ModuleNotFoundError as error:
        raise not_installed("The picture of the comparison", error.name, "plots") from error
    save_fronts(outcome.verdict, title, folder / PICTURE)
    return folder / PICTURE
