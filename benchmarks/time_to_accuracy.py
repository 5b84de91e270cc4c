"""Fronts of accuracy over time, and the time to the same accuracy that is read off them: see `benchmarks.fronts`."""

import dataclasses
import functools
import math
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from benchmarks.frames import clock_of
from smartfrz.comparing.verdict import time_share

PLAIN = "plain training"
RIVALS = ("autofreeze", "grades")
ANY = "any setting"
DRAWS = 2000
INTERVAL = (0.025, 0.975)


def family_of(line):
    """What stands before the share of the steps in a method's name; `PLAIN` for plain training."""
    return line["method"].rpartition(", ")[0] if line["kind"] == "freezing" else PLAIN


class Front(NamedTuple):
    """What can be reached in which time: points none of which is slower and worse than another, both rising.

    Attributes:
        times: Shares of full training's time.
        accuracies: What is reached.
    """

    times: np.ndarray
    accuracies: np.ndarray

    @classmethod
    def over(cls, times, accuracies):
        """Keep the points that are better than all faster ones; float `[n]` each."""
        order = np.lexsort((-np.asarray(accuracies), times))
        times, accuracies = np.asarray(times, float)[order], np.asarray(accuracies, float)[order]
        before = np.maximum.accumulate(np.concatenate(([-np.inf], accuracies[:-1])))
        return cls(times[accuracies > before], accuracies[accuracies > before])

    def time_to(self, accuracy):
        """Time to an accuracy; infinite if it is not reached. What the fastest point exceeds counts as its time."""
        if accuracy > self.accuracies[-1]:
            return math.inf
        return float(np.interp(accuracy, self.accuracies, self.times))

    def accuracy_in(self, time):
        """What is reached in a time; NaN before the fastest point."""
        return float(np.interp(time, self.times, self.accuracies, left=math.nan))


def same_accuracy(plain, other, tolerance=0.0):
    """Time of `other` to the best that `plain` reaches, as a share of the time of `plain`; infinite if it is not reached.

    Args:
        plain: Front of plain training.
        other: Front of another method.
        tolerance: What both may stay below that, in the unit of the accuracy.
    """
    best = plain.accuracies[-1] - tolerance
    return other.time_to(best) / plain.time_to(best)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The runs of one task that can be compared: those of the seeds that have all methods of a predictor.

    Attributes:
        families: Family of each method.
        names: Name of each method.
        times: Shares of full training's time, `[seeds, methods]`.
        accuracies: Metric on the test data, `[seeds, methods]`.
    """

    families: list[str]
    names: list[str]
    times: np.ndarray
    accuracies: np.ndarray

    @property
    def seeds(self):
        """Number of seeds."""
        return len(self.times)

    def groups(self):
        """Columns of each family, plain training left out; of all settings of SmartFRZ together those of each setting."""
        found = defaultdict(list)
        for index, family in enumerate(self.families):
            if family != PLAIN:
                found[family].append(index)
        groups = {family: [columns] for family, columns in found.items()}
        settings = [columns for family, columns in found.items() if family not in RIVALS]
        return groups | ({ANY: settings} if len(settings) > 1 else {})

    def time_to_same(self, group, tolerance=0.0, weights=None):
        """Time of a group to the best of plain training; of several fronts that of the fastest. See `same_accuracy`."""
        plain = self.front(self.plain, weights)
        return min(same_accuracy(plain, self.front(columns, weights), tolerance) for columns in group)

    def front(self, columns, weights=None):
        """The front of the means over seeds, each seed as often as `weights` say."""
        weights = np.ones(self.seeds) if weights is None else weights
        return Front.over(
            np.average(self.times[:, columns], axis=0, weights=weights),
            np.average(self.accuracies[:, columns], axis=0, weights=weights),
        )

    @property
    def plain(self):
        """Columns of plain training."""
        return [index for index, family in enumerate(self.families) if family == PLAIN]


def measured(lines):
    """Read the lines of one task and one predictor; None unless a seed has all of its methods, full training among them."""
    names = list(dict.fromkeys(line["method"] for line in sorted(lines, key=lambda line: line["kind"] == "freezing")))
    by_seed = defaultdict(dict)
    for line in lines:
        by_seed[line["seed"]][line["method"]] = line
    whole = [found for _, found in sorted(by_seed.items()) if len(found) == len(names)]
    if not whole or "full" not in {line["kind"] for line in lines}:
        return None
    return Measured(
        [family_of(whole[0][name]) for name in names],
        names,
        np.array([[share_of(found[name]) for name in names] for found in whole]),
        np.array([[found[name]["accuracy"] for name in names] for found in whole]),
    )


def share_of(line):
    """Training time as a share of full training's; of plain training that of the steps, as each takes as long."""
    return time_share(line, clock_of(line)) if line["kind"] == "freezing" else line["steps"] / line["full_steps"]


@functools.cache
def _resampled(number):
    """How often each seed is in a bootstrap sample, `[distinct samples, seeds]`, and how often there is such a sample."""
    drawn = np.sort(np.random.default_rng(0).integers(0, number, (DRAWS, number)), axis=1)
    distinct, often = np.unique(drawn, axis=0, return_counts=True)
    return np.stack([(distinct == seed).sum(1) for seed in range(number)], axis=1), often


def distribution(found, group, tolerance=0.0):
    """Times to the same accuracy in bootstrap samples of the seeds, sorted, `[DRAWS]`; None for one seed."""
    if found.seeds < 2:
        return None
    weights, often = _resampled(found.seeds)
    values = [found.time_to_same(group, tolerance, each) for each in weights]
    return np.sort(np.repeat(values, often))


def interval(values):
    """The interval in which 95 % of these values lie, of which some may be infinite."""
    low, high = np.quantile(values, INTERVAL, method="inverted_cdf")
    return float(low), float(high)


def geometric_mean(values):
    """Of numbers above zero, along the first axis."""
    return np.exp(np.mean(np.log(values), axis=0))


def groups_of(lines):
    """Task to `Measured`, by predictor: plain training and the rivals are the same for each."""
    tasks = defaultdict(list)
    for line in lines:
        settings = ", ".join(f"{value} {key}" for key, value in sorted(line["settings"].items()))
        name = f"{line['tier']} {line['task']}" + (f" ({settings})" if settings else "")
        tasks[name, str(line["training"]), line["norm_batches"], line["device"]].append(line)
    made = defaultdict(dict)
    for (name, *_), group in tasks.items():
        shared = [line for line in group if family_of(line) in (PLAIN, *RIVALS)]
        own = defaultdict(list)
        for line in group:
            if family_of(line) not in (PLAIN, *RIVALS):
                own[line["method"].partition(", ")[0]].append(line)
        for predictor, found in own.items():
            if (read := measured(shared + found)) is not None:
                made[predictor][name] = read
    return dict(made)


def short(family):
    """A family's name without that of the predictor."""
    return family.partition(", ")[2] or family


def ratio(value):
    """Show a share; what is never reached is said."""
    return "not reached" if math.isinf(value) else f"{value:.2f}"


def _cell(value, values):
    if values is None:
        return ratio(value)
    low, high = interval(values)
    return f"{ratio(value)} [{ratio(low)}, {ratio(high)}]"


def headline(groups, tolerance=0.0):
    """Rows of a table: time to the same accuracy, of every task and group of settings, and over all tasks.

    Args:
        groups: Task to `Measured`.
        tolerance: See `same_accuracy`.
    """
    title = "time to the same accuracy" + (f" less {100 * tolerance:g} points" if tolerance else "")
    rows: list[dict[str, Any]] = []
    ratios, samples = defaultdict(list), defaultdict(list)
    for task, found in groups.items():
        plain = found.front(found.plain)
        best = plain.accuracies[-1]
        row = {title: task, "seeds": str(found.seeds)}
        row["best of plain training"] = f"{100 * best:.1f} % in {100 * plain.time_to(best):.0f} % of its time"
        for family, group in found.groups().items():
            ratios[short(family)].append(found.time_to_same(group, tolerance))
            samples[short(family)].append(distribution(found, group, tolerance))
            row[short(family)] = _cell(ratios[short(family)][-1], samples[short(family)][-1])
        rows.append(row)
    total = {title: "geometric mean", "seeds": "", "best of plain training": ""}
    total |= {name: _mean(ratios[name], samples[name], len(groups)) for name in ratios}
    return [*rows, *([total] if len(groups) > 1 else [])]


def _mean(ratios, samples, tasks):
    """The geometric mean over tasks and its interval; how many tasks were reached, or measured, if that is not all."""
    reached = sum(map(math.isfinite, ratios))
    if reached < len(ratios):
        return f"reached on {reached} of {len(ratios)}"
    note = "" if len(ratios) == tasks else f" ({len(ratios)} of {tasks} tasks)"
    if any(values is None for values in samples):
        return ratio(geometric_mean(ratios)) + note
    random = np.random.default_rng(0)  # the seeds of one task have nothing to do with those of another
    return _cell(geometric_mean(ratios), geometric_mean([random.permutation(values) for values in samples])) + note


def points(groups):
    """Rows of a table: every method of every task, means over seeds and standard deviations."""
    rows = []
    for task, found in groups.items():
        for index, name in enumerate(found.names):
            accuracy, share = 100 * found.accuracies[:, index], 100 * found.times[:, index]
            several = found.seeds > 1
            row = {"task": task, "method": name, "seeds": str(found.seeds)}
            row["accuracy, %"] = f"{accuracy.mean():.1f}" + (f" ± {accuracy.std(ddof=1):.1f}" if several else "")
            row["time, %"] = f"{share.mean():.0f}" + (f" ± {share.std(ddof=1):.0f}" if several else "")
            rows.append(row)
    return rows


def curves_of(groups):
    """Task to method to times (%) and accuracies (%) of its runs, and their front; plain training first."""
    made = {}
    for task, found in groups.items():
        parts = {name: [index for columns in group for index in columns] for name, group in found.groups().items()}
        made[task] = {
            short(name): (
                100 * found.times[:, columns].mean(0),
                100 * found.accuracies[:, columns].mean(0),
                found.front(columns),
            )
            for name, columns in {PLAIN: found.plain, **parts}.items()
        }
    return made
