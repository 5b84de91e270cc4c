"""Time to the same accuracy: `python -m benchmarks.fronts run|tables|picture [--tier cpu|long|imagenet]`.

A user with less time may train in fewer steps, with freezing or without. So both sides choose the number of steps here:
plain training in 30, 50, 70, 85 and 100 %, and each setting of SmartFRZ, AutoFreeze and GradES in 50, 70 and 100 %, the
learning rate schedule scaled with them. The front of a method is what it reaches in which time; between two of its runs
it is interpolated.

The figure is *time to the same accuracy*: how long a method takes to the highest accuracy that plain training reaches at
all, as a share of the shortest time in which plain training reaches that. Both are read off the fronts of means over
seeds. In brackets is the interval in which 95 % of 2,000 bootstrap samples of the seeds lie. A highest accuracy is in part
luck; so a second table has the time to half a point less than that, for both sides. `any setting` is the fastest of
all settings of SmartFRZ: what a user finds who tries them all. It has more runs to choose from than plain training, and
so more luck.

Every method, plain training too, is judged with the batch norm statistics of its last batches. Where norms lag behind
the weights, a network whose norms were frozen would look better for that alone.

`run` trains the methods of a task and seed in turns, and writes one JSON line a finished run. Runs that are there are
not repeated; those of plain training, AutoFreeze and GradES count for every predictor. `tables` and `picture` read the
lines.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from benchmarks.arguments import errors_as_messages, lines_of, seeds
from benchmarks.compare import RESULTS, Job, machine
from benchmarks.methods import methods_of
from benchmarks.options import add_job_options, parse_job
from benchmarks.pictures import front_panels, save
from benchmarks.tables import NOTHING, fronts
from benchmarks.time_to_accuracy import RIVALS, curves_of, groups_of
from smartfrz import zoo
from smartfrz.adapters.torch import PrefixCache
from smartfrz.comparing.engine import Method
from smartfrz.comparing.study import run_study
from smartfrz.comparing.variants import fewer_steps
from smartfrz.control.options import FreezeOptions
from smartfrz.control.quality import TARGETS
from smartfrz.errors import SmartFRZError

PLAIN_SHARES = "30,50,70,85"
SHARES = (100, 70, 50)
THRESHOLDS = (None, 0.3, 0.2)  # None is the predictor's own
TELL_EVERY = 60  # seconds


# Methods


def methods_for(job, kind=None, cached=False, rivals=RIVALS, shares=SHARES):
    """Everything that is compared, but full training itself.

    Args:
        job: What is trained.
        kind: `thresholds` or `qualities` of SmartFRZ; None for qualities if the predictor was calibrated for all of them.
        cached: Whether SmartFRZ is run with the prefix cache, too, where samples come back as they were.
        rivals: Other policies to compare with.
        shares: Numbers of steps of what freezes, in percent of full training's.

    Raises:
        ValueError: If the predictor has not been calibrated for the qualities.
    """
    known = methods_of(job)
    qualities = job.predictor.info.qualities
    if kind is None:
        kind = "qualities" if set(TARGETS) <= set(qualities) else "thresholds"
    if kind == "qualities":
        if missing := [quality for quality in TARGETS if quality not in qualities]:
            raise ValueError(
                f"The predictor {job.predictor.info.name} is not calibrated for {', '.join(missing)}; expected "
                f"{', '.join(TARGETS)}. Train it with costs (docs/recipes.md), or use --settings thresholds."
            )
        settings = {f"quality {quality}": {"quality": quality} for quality in TARGETS}
    else:
        settings = {_threshold(value): {"threshold": value} if value else {} for value in THRESHOLDS}
    smartfrz = known["smartfrz"]
    label = f"{job.predictor.info.name} {job.predictor.sha256[:6]}"
    families = {
        f"{label}, {name}": dataclasses.replace(smartfrz, options={**smartfrz.options, **options})
        for name, options in settings.items()
    }
    if cached and job.benchmark.repeats:
        families |= {
            f"{family} and cache": dataclasses.replace(method, cache=lambda: PrefixCache(memory="4GB"))
            for family, method in families.items()
        }
    made = [_shorter(family, method, share) for family, method in families.items() for share in shares]
    made += [_shorter(name, known[name], share) for name in rivals for share in shares]
    return [*fewer_steps(PLAIN_SHARES), *made]


def _threshold(value):
    return "own threshold" if value is None else f"threshold {value}"


def _shorter(family, method, share):
    return dataclasses.replace(method, name=f"{family}, {share} %", share=share / 100)


def run_all(options, predictor, results):
    """Run all tasks; those that lack a file are left out, with a message.

    Args:
        options: Options read by `benchmarks.options.parse_job`, with `seeds`, `kind` and `cached`.
        predictor: The predictor.
        results: File of JSON lines.
    """
    norm_batches = FreezeOptions().norm_batches
    for name in options.tasks:
        job = Job(options.tier, name, 0, options.settings, predictor, options.folder, options.device, norm_batches)
        facts = job.facts | {"metric": job.benchmark.metric, "norm_batches": norm_batches}
        about = {"predictor": facts.pop("predictor"), "machine": machine(job.device)}
        del facts["seed"]
        methods: list[Method] = methods_for(job, options.kind, options.cached, options.rivals, options.shares)
        try:
            data = job.data()
            about["test_samples"] = len(data.test)
            start = job.task(data).start
            run_study(start, methods, options.seeds, facts, results, _teller(name), about=about)
        except (OSError, SmartFRZError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)


def _teller(name):
    """Print now and then how far a task has come."""
    told = time.monotonic()

    def tell(fraction, text):
        nonlocal told
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            print(f"{name}: {fraction:.0%}   {text:.200}", file=sys.stderr, flush=True)

    return tell


def picture(lines):
    """Fronts of all tasks, with the predictor that was measured last; None if nothing was measured."""
    groups = groups_of(lines)
    if not groups:
        return None
    label, tasks = list(groups.items())[-1]
    return front_panels(curves_of(tasks), f"SmartFRZ with {label}")


@errors_as_messages(ValueError)
def main(given=None):
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "tables", "picture"))
    add_job_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS / "fronts.jsonl", help="JSON lines.")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2, 3, 4])
    parser.add_argument("--predictor", default=zoo.DEFAULT, help="Name or file.")
    parser.add_argument(
        "--settings", dest="kind", choices=("thresholds", "qualities"), help="Default: qualities, if calibrated."
    )
    parser.add_argument("--cache", dest="cached", action="store_true", help="SmartFRZ with the prefix cache, too.")
    parser.add_argument(
        "--no-rivals",
        dest="rivals",
        action="store_const",
        const=(),
        default=RIVALS,
        help=f"Without {', '.join(RIVALS)}.",
    )
    parser.add_argument(
        "--shares", type=seeds, default=list(SHARES), help="Steps of what freezes, in percent. Default: 100,70,50."
    )
    parser.add_argument("--picture", type=Path, default=RESULTS.parent / "pictures" / "fronts.png")
    options = parse_job(parser, given)
    lines_of(options.results)  # a damaged file is found before anything is trained
    if options.what == "run":
        run_all(options, zoo.load(options.predictor), options.results)
    lines = lines_of(options.results)
    if options.what == "picture":
        figure = picture(lines)
        if figure is None:
            print(NOTHING)
        else:
            save(figure, options.picture)
            print(options.picture)
    else:
        print(fronts(lines, details=True))


if __name__ == "__main__":
    main()
