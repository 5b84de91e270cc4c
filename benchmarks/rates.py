"""The learning rate of each task of `benchmarks.compare`: `python -m benchmarks.rates run|table [--tier cpu]`.

A method that saves time is easily better than full training at a rate that full training is bad at. So each task is
trained fully at several rates, and takes the one that is best on its validation part; all methods share it. The seed is none
of those that results are measured with, and the test data is not looked at. One JSON line a run; runs that are
there are not repeated.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from benchmarks.compare import Run, job_of
from benchmarks.lines import add_line, read_lines
from benchmarks.options import add_job_options, parse_job
from benchmarks.tasks import TIERS
from smartfrz import zoo
from smartfrz.errors import SmartFRZError

RESULTS = Path(__file__).parent / "results" / "rates.jsonl"
GRIDS = {"SGD": (0.003, 0.01, 0.03, 0.1), "AdamW": (5e-5, 1e-4, 3e-4, 1e-3)}
SEED = 100


def rate_lines(job, known):
    """One line for each rate of the grid that is not among the `known` ones: accuracy on the validation part.

    The grid grows by another step while its smallest or largest rate is better than all others.
    """
    data = None
    found = dict(known)
    grid = grid_of(job)
    while True:
        for rate in grid:
            if rate in found:
                continue
            data = data or job.data()
            trial = job._replace(settings=job.settings | {"learning_rate": rate})
            run = Run(trial, "early-stop", data)  # of full length: full training whose layers are not looked at
            while run.advance(run.total_steps):
                pass
            found[rate], _ = run.judge(run.validation)
            line = facts_of(job.tier, job.name, job.settings) | {"rate": rate, "metric": job.task.metric}
            yield line | {"validation": found[rate], "samples": len(run.validation)}
        edges = {min(found): min(found) / 3.0, max(found): max(found) * 3.0}
        best = best_rate(found)
        better = all(found[best] > accuracy for rate, accuracy in found.items() if rate != best)
        if best not in edges or not better or len(found) > 2 * len(grid_of(job)):
            return
        grid = [float(f"{edges[best]:.1g}")]


def grid_of(job):
    """The rates to begin with."""
    return GRIDS[job.task.training.optimizer]


def best_rate(found):
    """The rate of the best validation accuracy; of equal ones the smallest.

    Args:
        found: Rate to accuracy.
    """
    return min(found, key=lambda rate: (-found[rate], rate))


def facts_of(tier, name, settings):
    """What tells the lines of a task from those of others, and from those of another training than it has now."""
    training = dataclasses.asdict(TIERS[tier][name].training)
    del training["learning_rate"]
    return {"tier": tier, "task": name, "settings": settings, "seed": SEED, "training": training}


def of_task(lines, tier, name, settings):
    """Rate to validation accuracy, from lines."""
    facts = facts_of(tier, name, settings)
    return {line["rate"]: line["validation"] for line in lines if facts.items() <= line.items()}


def table(lines, tier, settings):
    """Markdown: one row a task; empty if nothing was tried."""
    rows = [
        "| task | learning rate: validation accuracy, % (Matthews correlation x 100) | the task's |",
        "|---|---|---|",
    ]
    for name, task in TIERS[tier].items():
        found = of_task(lines, tier, name, settings)
        if found:
            tried = ", ".join(f"{rate:g}: {100 * found[rate]:.1f}" for rate in sorted(found))
            rows.append(f"| {name} | {tried} | {task.training.learning_rate:g} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def main(arguments=None):
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("run", "table"))
    add_job_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="Of JSON lines.")
    options = parse_job(parser, arguments)
    for name in options.tasks if options.what == "run" else ():
        known = of_task(read_lines(options.results), options.tier, name, options.settings)
        try:
            for line in rate_lines(job_of(options, name, SEED, zoo.load(zoo.DEFAULT)), known):
                add_line(options.results, line)
                print(f"{name}, rate {line['rate']:g}: {line['validation']:.3f}", file=sys.stderr)
        except (OSError, SmartFRZError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    print(table(read_lines(options.results), options.tier, options.settings))


if __name__ == "__main__":
    main()
