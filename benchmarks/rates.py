"""The learning rate of each task of `benchmarks.compare`: `python -m benchmarks.rates run|table [--tier cpu]`.

A method that saves time is easily better than full training at a rate that full training is bad at. So each task is
trained fully at several rates, and takes the one that is best on its validation part; all methods share it. The seed is
not used for any result, and the test data is not looked at. One JSON line a run; runs that are
there are not repeated.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from benchmarks import tables
from benchmarks.arguments import errors_as_messages, lines_of
from benchmarks.compare import job_of
from benchmarks.options import add_job_options, parse_job
from benchmarks.tasks import TIERS
from smartfrz.comparing.engine import FULL, take_turns
from smartfrz.comparing.lines import add_line
from smartfrz.comparing.pytorch import TorchRun
from smartfrz.errors import SmartFRZError

RESULTS = Path(__file__).parent / "results" / "rates.jsonl"
GRIDS = {"SGD": (0.003, 0.01, 0.03, 0.1), "AdamW": (5e-5, 1e-4, 3e-4, 1e-3)}
SEED = 100


def rate_lines(job, known):
    """Yield one line for each rate of the grid that is not `known` yet: accuracy on the validation part.

    The grid grows by another step while its smallest or largest rate is better than all others.

    Args:
        job: Job of `benchmarks.compare`.
        known: Rate to accuracy.
    """
    data, found = None, dict(known)
    grid = widest = GRIDS[job.benchmark.training.optimizer]
    while grid:
        for rate in grid:
            if rate not in found:
                data = data or job.data()
                found[rate] = accuracy_at(job, data, rate)
                line = facts_of(job.tier, job.name, job.settings) | {"rate": rate, "metric": job.benchmark.metric}
                yield line | {"validation": found[rate], "samples": len(data.validation)}
        grid = next_grid(found) if len(found) <= 2 * len(widest) else ()


def accuracy_at(job, data, rate):
    """Validation accuracy of full training at a learning rate."""
    run = TorchRun(job._replace(settings=job.settings | {"learning_rate": rate}).task(data), FULL, job.seed)
    take_turns([run])
    accuracy, _ = run.judge(data.validation)
    return accuracy


def next_grid(found):
    """A rate beyond the edge, if the best one is at the edge and better than all others."""
    best = best_rate(found)
    beyond = {max(found): best * 3.0, min(found): best / 3.0}
    is_better = all(found[best] > accuracy for rate, accuracy in found.items() if rate != best)
    return (float(f"{beyond[best]:.1g}"),) if best in beyond and is_better else ()


def best_rate(found):
    """The rate with the best validation accuracy; the smallest of equal ones.

    Args:
        found: Rate to accuracy.
    """
    return min(found, key=lambda rate: (-found[rate], rate))


def facts_of(tier, name, settings):
    """What tells the lines of a task from those of others, and of other trainings of it."""
    training = dataclasses.asdict(TIERS[tier][name].training)
    del training["learning_rate"]
    return {"tier": tier, "task": name, "settings": settings, "seed": SEED, "training": training}


@errors_as_messages()
def main(given=None):
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    add_job_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="File of JSON lines.")
    options = parse_job(parser, given)
    for name in options.tasks if options.what == "run" else ():
        known = tables.rates_of(lines_of(options.results), options.tier, name, options.settings)
        try:
            for line in rate_lines(job_of(options, name, SEED, None), known):
                add_line(options.results, line)
                print(f"{name}, rate {line['rate']:g}: {line['validation']:.3f}", file=sys.stderr)
        except (OSError, SmartFRZError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    table = tables.rates(lines_of(options.results), options.tier, options.settings)
    if not table:
        sys.exit(
            f"{options.results} has no results of the tier {options.tier!r} with these settings. Measure them with: "
            f"python -m benchmarks.rates run --tier {options.tier}"
        )
    print(table)


if __name__ == "__main__":
    main()
