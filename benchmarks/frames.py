"""Lines of `benchmarks.compare` as a data frame, in which everything is compared within a seed."""

import math
import statistics
from collections import defaultdict

import numpy as np
import pandas as pd

from benchmarks.methods import METHODS, stops_early

ORDERED = ["task", "method"]
COLUMNS = [*ORDERED, "seed", "line", "accuracy", "share", "cpu", "wall", "deciding", "frozen", "difference", "to_early"]
COLUMNS += ["backward", "total", "peak", "end", "end_of_peak"]


def clock_of(line):
    """CPU seconds on a CPU, which other programs disturb less, and seconds elsewhere."""
    return "cpu_seconds" if line["device"] == "cpu" else "train_seconds"


def share_of_full(line, clock=None):
    """Training time as a share of the full run's, were it run at the same time.

    For full training that stops early this is its share of the steps: while it runs, more runs share the machine than in
    the mean over the whole of full training.
    """
    if stops_early(line["method"]):
        return line["steps"] / line["full_steps"]
    clock = clock or clock_of(line)
    if line.get(clock) is None or line.get(f"full_{clock}") is None:
        return math.nan
    return line[clock] / line[f"full_{clock}"] / line.get("drift", {}).get(clock, 1.0)


def frozen_at(line):
    """Layers that were frozen in the end, and the share of the run at which each froze."""
    frozen = {}
    for step, action, layer in line.get("events", ()):
        if action == "freeze":
            frozen[layer] = step / line["steps"]
        elif action == "thaw":
            frozen.pop(layer, None)
    return frozen


def tasks_of(lines):
    """Groups of lines of one task, tier and settings, by what to call them."""
    groups = defaultdict(list)
    for line in lines:
        settings = ", ".join(f"{value} {key}" for key, value in sorted(line["settings"].items()))
        predictor = line["predictor"]
        name = f"{line['tier']} {line['task']}" + (f" ({settings})" if settings else "")
        groups[name, predictor["name"], predictor["sha256"], line["device"]].append(line)
    several = len({key[1:] for key in groups}) > 1
    return {f"{key[0]} [{key[1]}, {key[3]}]" if several else key[0]: group for key, group in groups.items()}


def early_curve(lines):
    """What full training reaches in which share of its time: rising shares, and accuracies in %.

    Args:
        lines: Lines of one task and seed.

    Returns:
        Two lists, which end with full training; None if that or the shorter runs were not measured.
    """
    full = [line for line in lines if line["method"] == "full"]
    early = [line for line in lines if stops_early(line["method"])]
    if not full or not early:
        return None
    points = {share_of_full(line): 100 * line["accuracy"] for line in early} | {1.0: 100 * full[0]["accuracy"]}
    shares = sorted(points)
    return shares, [points[share] for share in shares]


def frame(groups, methods=METHODS):
    """One row a line; NaN where a line, or the full run of its seed, does not say.

    Columns: `task`, `method` (both in order), `seed`, `line` (the line itself), `accuracy` (%), `share` (time, % of full
    training), `cpu` and `wall` (the same by either clock), `deciding` (% of the run's time), `frozen` (layers);
    and within a seed: `difference` to full training (points), `to_early` (points to stopping early at equal time,
    interpolated; before the shortest one that was measured, that one's, which judges too severely), `backward`,
    `total`, `peak` and `end` (FLOPs and memory, % of full training).

    Args:
        groups: Name to lines, as from `tasks_of`.
        methods: Names of methods; lines of others are left out.
    """
    rows = []
    for name, lines in groups.items():
        for seed in dict.fromkeys(line["seed"] for line in lines):
            of_seed = [line for line in lines if line["seed"] == seed]
            full = next((line for line in of_seed if line["method"] == "full"), None)
            curve = early_curve(of_seed)
            rows += [{"task": name} | _row(line, full, curve) for line in of_seed if line["method"] in methods]
    made = pd.DataFrame(rows, columns=COLUMNS)
    made["task"] = pd.Categorical(made["task"], list(groups), ordered=True)
    made["method"] = pd.Categorical(made["method"], list(methods), ordered=True)
    return made.sort_values(ORDERED, kind="stable")


def _row(line, full, curve):
    share, is_full = share_of_full(line), line["method"] == "full"
    row = {"method": line["method"], "seed": line["seed"], "line": line, "accuracy": 100 * line["accuracy"]}
    row |= {"share": 100 * share, "cpu": 100 * share_of_full(line, "cpu_seconds")}
    row |= {"wall": 100 * share_of_full(line, "train_seconds"), "frozen": len(frozen_at(line))}
    row["deciding"] = 100 * line["decision_seconds"] / line["train_seconds"] if "train_seconds" in line else math.nan
    row["difference"] = math.nan if full is None or is_full else 100 * line["accuracy"] - 100 * full["accuracy"]
    judged = curve is not None and not is_full and not stops_early(line["method"])
    row["to_early"] = 100 * line["accuracy"] - float(np.interp(share, *curve)) if judged else math.nan
    for column, size in SIZES.items():
        row[column] = 100 * size(line) / size(full) if full is not None and size(line) else math.nan
    row["end_of_peak"] = row["end"] * SIZES["end"](full) / SIZES["peak"](full) if row["end"] > 0 else math.nan
    return row


SIZES = {
    "backward": lambda line: line.get("backward_flops"),
    "total": lambda line: line.get("total_flops"),
    "peak": lambda line: max((size for _, size in line.get("memory", ())), default=None),
    "end": lambda line: line["memory"][-1][1] if line.get("memory") else None,
}


def mean_of_tasks(values):
    """Mean of tasks' means, and its standard error from the seeds alone (None with one seed): the tasks are what they are.

    Args:
        values: Lists of values, one a task.
    """
    mean = statistics.mean(map(statistics.mean, values))
    if min(map(len, values)) < 2:
        return mean, None
    return mean, math.sqrt(sum(statistics.variance(found) / len(found) for found in values)) / len(values)


def by_task(found, column):
    """Lists of a column's values, one for each task that has any, by task."""
    known = found.dropna(subset=[column])
    return {task: list(part[column]) for task, part in known.groupby("task", observed=True)}
