"""How much time for how much accuracy: `python -m benchmarks.tradeoff run|table|plot [--tasks ...]`.

SmartFRZ at other thresholds than the predictor's own, and in fewer steps than full training, beside full training that
stops early: the tasks, the seeds and the runs of `benchmarks.compare`, which has the predictor's own threshold and the
shorter runs of full training. The settings were chosen before any of them was measured. One JSON line a run; runs that
are there are not repeated.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.compare import RESULTS as COMPARED
from benchmarks.compare import Run, run_all, take_turns
from benchmarks.compare_results import (
    EARLY,
    STYLES,
    mean_of_tasks,
    paired,
    share_of_full,
    summary,
    tasks_of,
)
from benchmarks.lines import read_lines
from benchmarks.options import add_job_options, list_of, parse_job, seeds
from smartfrz import zoo
from smartfrz.files import replacing

RESULTS = Path(__file__).parent / "results" / "tradeoff.jsonl"
NOTHING = "No task has all settings yet."


class Setting(NamedTuple):
    """What differs from SmartFRZ as it comes.

    Attributes:
        threshold: Confidence from which a layer is frozen; None for the predictor's own.
        share: Of the steps of full training; the schedule is scaled.
    """

    threshold: float | None
    share: float = 1.0


SETTINGS = {
    "threshold-0.5": Setting(0.5),
    "threshold-0.85": Setting(0.85),
    "threshold-0.95": Setting(0.95),
    "steps-85": Setting(None, 0.85),
    "threshold-0.85-steps-85": Setting(0.85, 0.85),
}
SHOWN = ("smartfrz", *SETTINGS, "linear", "autofreeze", "weight-change", *EARLY)


def measure(job, settings, known, load):
    """One line for each of these `SETTINGS` that `known`, method to line of this job, lacks; full training runs along.

    `load` returns the job's data, and is called only if there is something to do.
    """
    missing = [name for name in settings if name not in known]
    if not missing:
        return
    data = load()
    runs = {"full": Run(job, "full", data)}
    for name in missing:
        setting = SETTINGS[name]
        options = {} if setting.threshold is None else {"threshold": setting.threshold}
        runs[name] = Run(job, "smartfrz", data, setting.share, **options)
    take_turns(runs)
    full = runs["full"].times()
    for name in missing:
        yield runs.pop(name).line(full) | {"method": name}


def table(lines):
    """Markdown: each setting over all tasks of which everything that it is compared with was measured."""
    groups = measured(lines)
    return summary(groups, SHOWN) if groups else NOTHING


def measured(lines):
    """Groups of the lines of those tasks that have all settings: a mean over others would compare what differs."""
    return {name: group for name, group in tasks_of(lines).items() if set(SETTINGS) <= {x["method"] for x in group}}


def points(groups, method):
    """Time in % of full training's, difference in points and its standard error: means over tasks."""
    shares, differences = [], []
    for lines in groups.values():
        found = paired(lines, method, lambda line: 100 * line["accuracy"])
        if found:
            differences.append(found)
            shares.append([100 * share_of_full(line) for line in lines if line["method"] == method])
    if len(differences) < len(groups):
        return None
    return mean_of_tasks(shares)[0], *mean_of_tasks(differences)


def picture(groups):
    """Accuracy against time: SmartFRZ by threshold and in fewer steps, and full training that stops early."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()

    def curve(methods, style, label):
        colour, line, marker = STYLES[style]
        found = [point for method in methods if (point := points(groups, method))]
        if found:
            x, y, errors = zip(*sorted(found), strict=True)
            errors = [error or 0.0 for error in errors]
            axes.errorbar(x, y, errors, color=colour, linestyle=line, marker=marker, label=label, capsize=2)

    whole = [name for name, setting in SETTINGS.items() if setting.share == 1.0]
    shorter = [name for name, setting in SETTINGS.items() if setting.share < 1.0]
    curve(["smartfrz", *whole], "smartfrz", "SmartFRZ, by threshold")
    curve(shorter, "smartfrz+cache", "SmartFRZ in 85 % of the steps, by threshold")
    curve(EARLY, "early-stop", "full training in fewer steps")
    for method in ("linear", "autofreeze", "weight-change"):
        curve([method], method, method)
    axes.axhline(0.0, color=STYLES["full"][0], linewidth=1)
    axes.set_xlabel("training time, % of full training")
    axes.set_ylabel("accuracy less full training's, points")
    axes.set_title(f"Means of {len(groups)} tasks, bars are standard errors over seeds", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def main(given=None):
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "table", "plot"))
    add_job_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="Of JSON lines.")
    parser.add_argument("--compared", type=Path, help="Lines of benchmarks.compare. By default results/<tier>.jsonl.")
    parser.add_argument("--methods", type=list_of(SETTINGS), default=list(SETTINGS), help="All by default.")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2])
    parser.add_argument("--picture", type=Path, default=Path("runs/compare/pictures/tradeoff.png"))
    options = parse_job(parser, given)
    if options.what == "run":
        run_all(
            options,
            zoo.load(zoo.DEFAULT),
            options.results,
            lambda job, known, load: measure(job, options.methods, known, load),
        )
    lines = read_lines(options.results) + read_lines(options.compared or COMPARED / f"{options.tier}.jsonl")
    if options.what != "plot":
        print(table(lines))
    elif not (groups := measured(lines)):
        print(NOTHING)
    else:
        with replacing(options.picture) as temporary:
            picture(groups).savefig(temporary, dpi=130, format="png")
        print(options.picture)


if __name__ == "__main__":
    main()
