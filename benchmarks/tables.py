"""Tables of what was measured, and benchmarks/README.md from them: `python -m benchmarks.tables [--check]`.

Each part of that file between `<!-- begin NAME -->` and `<!-- end NAME -->` is written from the JSON lines in
`benchmarks/results/`; parts of which nothing was measured yet say so. `--check` changes nothing, and fails if the
file is not what the lines say.
"""

import argparse
import dataclasses
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import paper
from benchmarks.arguments import lines_of
from benchmarks.frames import ORDERED, by_task, clock_of, frame, frozen_at, mean_of_tasks, tasks_of
from benchmarks.labels import table as label_table
from benchmarks.methods import METHODS, SWEEPS, SWEPT, TRADEOFF, stops_early
from benchmarks.tasks import TIERS
from benchmarks.time_to_accuracy import groups_of, headline, points
from smartfrz.comparing.lines import matching
from smartfrz.comparing.verdict import POINTS
from smartfrz.files import replacing

FOLDER = Path(__file__).parent
NOTHING = "Not measured yet."
NOT_RUN = (
    "**This has not been run on a GPU yet**; that the program works was tried with toy networks on a CPU (`--toy`)."
)
LANGUAGE = ("minilm-agnews", "minilm-mrpc", "minilm-cola", "bert-mrpc", "bert-cola")
SCRATCH = ("resnet20-scratch",)
FREEZING = [method for method in METHODS if method != "full" and not stops_early(method)]
IN_TRADEOFF = ("smartfrz", *TRADEOFF, "linear", "autofreeze", "grades", "weight-change", *METHODS[-4:])
EQUAL_TIME = 0.03  # by which two runs of equal time may differ
NOTES = (
    "Times, FLOPs and memory are those of full training of the same seed = 100 %. After ± is the standard deviation over "
    "seeds, in brackets the standard error of the mean; differences are taken within a seed, and the errors over all tasks "
    "are those of the seeds, the tasks being what they are. *To stopping early at equal time*: accuracy less that of full "
    "training in fewer steps, its schedule scaled, interpolated at the time that the method took."
)


# Cells


def markdown(rows):
    """A table of rows, dicts from title to text; empty without rows."""
    table = pd.DataFrame(rows).fillna("")
    if table.empty:
        return ""
    lines = [list(table.columns), *table.to_numpy().tolist()]
    first, *others = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([first, "|---" * len(table.columns) + "|", *others])


def cell(values, form, unit=""):
    """Mean ± standard deviation, and in brackets the standard error of the mean; of one value only that."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    text = f"{statistics.mean(values):{form}}"
    if len(values) > 1:
        deviation = statistics.stdev(values)
        form = form.lstrip("+")
        text += f" ± {deviation:{form}} ({deviation / math.sqrt(len(values)):{form}})"
    return text + unit


def mean(values, form, unit=""):
    """Mean of what is known; empty if nothing is."""
    values = [value for value in values if not math.isnan(value)]
    return f"{statistics.mean(values):{form}}{unit}" if values else ""


def with_error(mean, error):
    return f"{mean:+.2f}" + ("" if error is None else f" ({error:.2f})")


def grouped(groups, methods=METHODS):
    """Task, method, and rows of `frame`, in order."""
    found = frame(groups, methods)
    for (task, method), part in found.groupby(ORDERED, observed=True):
        yield task, method, part


# Comparisons


def ours(groups, methods=METHODS):
    """Means over seeds, in the form of the paper's tables, and what stopping early reaches at equal time."""
    rows = [
        {
            "ours": task,
            "method": method,
            "accuracy, %": cell(found["accuracy"], ".1f"),
            "difference": cell(found["difference"], "+.1f"),
            "time": cell(found["share"], ".1f", " %"),
            "computation": mean(found["total"], ".1f", " %"),
            "to stopping early at equal time": cell(found["to_early"], "+.1f"),
        }
        for task, method, found in grouped(groups, methods)
    ]
    return markdown(rows) or NOTHING


def of_paper(table):
    """The paper's own figures: differences to full training, times and computation as shares of it."""
    rows = []
    for task, entries in table.items():
        full = entries[0]
        for method, (accuracy, *sizes) in zip(paper.METHODS, entries, strict=True):
            shares = [f"{100 * mine / theirs:.1f} %" for mine, theirs in zip(sizes, full[1:], strict=True)]
            difference = "" if (accuracy, *sizes) == full else f"{accuracy - full[0]:+.2f}"
            row = {"paper": task, "method": method, "accuracy, %": f"{accuracy:.2f}", "difference": difference}
            rows.append(row | dict(zip(("time", "computation"), [*shares, ""], strict=False)))
    return markdown(rows)


def beside(groups, table, methods=METHODS):
    """Ours, and then the paper's."""
    return "\n\n".join([ours(groups, methods), of_paper(table)])


def task_table(name, lines):
    """Everything about one task: means, standard deviations and standard errors over seeds."""
    metric = "Matthews correlation x 100" if lines[0]["metric"] == "matthews" else "test accuracy, %"
    rows = []
    for _, method, found in grouped({name: lines}):
        layers = found["line"].iloc[0].get("layers")
        row = {name: method, "seeds": str(len(found)), metric: cell(found["accuracy"], ".1f")}
        row |= {"difference, points": cell(found["difference"], "+.1f")}
        row |= {"to stopping early at equal time": cell(found["to_early"], "+.1f")}
        row |= {"CPU time": cell(found["cpu"], ".1f", " %"), "wall time": cell(found["wall"], ".1f", " %")}
        titles = {"backward": "backward FLOPs", "total": "all FLOPs", "peak": "peak memory", "end": "memory at the end"}
        row |= {title: mean(found[column], ".1f", " %") for column, title in titles.items()}
        row |= {"deciding": mean(found["deciding"], ".2f", " %")}
        rows.append(row | {"frozen layers": f"{found['frozen'].mean():.1f} of {len(layers)}" if layers else ""})
    judged = [line for line in lines if line["method"] == "full"] or lines
    error = 100 * statistics.mean(map(standard_error, judged))
    size = judged[0]["test_samples"]
    text = f"{markdown(rows)}\n\nStandard error of one result, from the size of the test set ({size:,}): {error:.1f}."
    stopped = [line for line in lines if line["method"] == "early-stop"]
    return f"{text}\n{equal_time_note(stopped)}" if stopped else text


def equal_time_note(lines):
    """How well `early-stop` met the time of `smartfrz`."""
    times = [line["time_of_smartfrz"] for line in lines]
    drifts = [line["drift"][clock_of(line)] for line in lines]
    left = [time / drift for time, drift in zip(times, drifts, strict=True)]
    off, drift, rest = (", ".join(f"{100 * (v - 1):+.1f}" for v in values) for values in (times, drifts, left))
    beyond = sum(abs(time - 1) > EQUAL_TIME for time in times)
    return (
        f"The time of early-stop differs from that of smartfrz by {off} % ({beyond} of {len(lines)} by more than "
        f"{100 * EQUAL_TIME:.0f} %), that of its steps from those of full before it by {drift} %; without that drift "
        f"{rest} % are left."
    )


def standard_error(line):
    """Error of a line's metric, from the size of the test data alone; of a correlation by 1,000 resamplings."""
    if line["metric"] == "accuracy":
        return math.sqrt(line["accuracy"] * (1 - line["accuracy"]) / line["test_samples"])
    (tn, fp), (fn, tp) = np.moveaxis(_resampled(np.array(line["confusion"])), 0, -1)
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return statistics.stdev(np.where(below > 0, (tp * tn - fp * fn) / np.maximum(below, 1), 0).tolist())


def _resampled(counts):
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts.ravel() / counts.sum(), 1000)
    return drawn.reshape(-1, 2, 2).astype(float)


def summary(groups, methods=METHODS):
    """Each method over all tasks."""
    rows = []
    for method, found in frame(groups, methods).groupby("method", observed=True):
        differences, judged = by_task(found, "difference"), by_task(found, "to_early")
        if not differences:
            continue
        worst = min(differences, key=lambda task: statistics.mean(differences[task]))
        shares = [statistics.mean(by_task(found, "share")[task]) for task in differences]
        row = {"all tasks": method, "tasks": str(len(differences))}
        row["mean difference, points"] = with_error(*mean_of_tasks(differences.values()))
        row["worst task"] = f"{statistics.mean(differences[worst]):+.2f} ({worst})"
        row["training time, geometric mean"] = f"{statistics.geometric_mean(shares):.1f} %"
        row["to stopping early at equal time, points"] = row["better on"] = ""
        if judged:
            better = sum(statistics.mean(values) > 0 for values in judged.values())
            row["to stopping early at equal time, points"] = with_error(*mean_of_tasks(judged.values()))
            row["better on"] = f"{better} of {len(judged)}"
        rows.append(row)
    return markdown(rows)


def tables(lines, methods=METHODS):
    """What `benchmarks.compare` prints for a set of methods: by default a table for each task, and one over all."""
    if methods == tuple(TRADEOFF):
        return tradeoff(lines)
    if not lines:
        return "There are no results yet."
    if set(SWEPT) <= set(methods):
        return sweeps(lines)
    groups = tasks_of(lines)
    found = [task_table(name, group) for name, group in groups.items()]
    machines = sorted({line["machine"] for line in lines})
    return "\n\n".join([*found, summary(groups), NOTES, f"Machine: {'; '.join(machines)}."])


def with_all_settings(lines):
    """Groups of the lines of those tasks that have all settings: a mean over others would compare what differs."""
    return {name: group for name, group in tasks_of(lines).items() if set(TRADEOFF) <= {x["method"] for x in group}}


def tradeoff(lines):
    """Each setting of SmartFRZ over all tasks of which everything that it is compared with was measured."""
    return summary(with_all_settings(lines), IN_TRADEOFF) or "No task has all settings yet."


def sweeps(lines):
    """Tables 8 and 9."""
    full = cell([100 * line["accuracy"] for line in lines if line["method"] == "full"], ".1f")
    accuracy, seconds = paper.SWEEPS_FULL
    made = []
    for name, title in (("linear", "t_0"), ("autofreeze", "M")):
        found = frame({"": lines}, [f"{name}:{value}" for value in SWEEPS[name]])
        rows = []
        for value in SWEEPS[name] if len(found) else ():
            part = found[found["method"] == f"{name}:{value}"]
            steps = [100 * line["steps"] / line["full_steps"] for line in part["line"]]
            row = {title: str(value), "seeds": str(len(part)), "accuracy, %": cell(part["accuracy"], ".1f")}
            row |= {"time, % of full training": cell(part["share"], ".1f"), "steps, %": mean(steps, ".0f")}
            row |= {"paper: accuracy": f"{paper.SWEEPS[name][value][0]:.2f} %"}
            rows.append(row | {"paper: time": f"{100 * paper.SWEEPS[name][value][1] / seconds:.1f} %"})
        if rows:
            texts = ("full training", "", full, "100", "100", f"{accuracy:.2f} %", "100 %")
            rows.append(dict(zip(rows[0], texts, strict=True)))
            made.append(markdown(rows))
    return "\n\n".join(made) or NOTHING


def similarity(lines):
    """Table 1: freezing by similarity to a finished reference."""
    groups = {
        name: found for name, found in tasks_of(lines).items() if any(x["method"] == "similarity-guided" for x in found)
    }
    rows = [
        {
            "paper": task,
            "accuracy, full": f"{full[0]:.2f} %",
            "accuracy, similarity-guided": f"{guided[0]:.2f} %",
            "computation": f"{100 * guided[1] / full[1]:.1f} %",
        }
        for task, (full, guided) in paper.TABLE_1.items()
    ]
    return "\n\n".join([ours(groups, ("full", "similarity-guided")), markdown(rows)])


def memory(lines):
    """Fig. 5(a) in figures: memory at the end of the run, of full training's peak."""
    rows = {}
    for task, method, found in grouped(tasks_of(lines), FREEZING):
        row = rows.setdefault(task, {"memory at the end, % of full training": task} | dict.fromkeys(FREEZING, ""))
        row[method] = mean(found["end_of_peak"], ".0f")
    return markdown(list(rows.values())) or NOTHING


def shares_by_clock(lines):
    """What is saved in FLOPs and what in time, and what deciding takes: means over seeds."""
    rows = [
        {
            "ours": task,
            "method": method,
            "backward FLOPs": mean(found["backward"], ".0f", " %"),
            "all FLOPs": mean(found["total"], ".0f", " %"),
            "time": mean(found["share"], ".0f", " %"),
            "deciding, of the run's time": mean(found["deciding"], ".1f", " %"),
        }
        for task, method, found in grouped(tasks_of(lines), FREEZING)
    ]
    return markdown(rows)


def fronts(lines, details=False):
    """What `benchmarks.fronts` shows, for each predictor; with `details` each run's time and accuracy, too."""
    made = []
    for predictor, groups in groups_of(lines).items():
        tables = [headline(groups), headline(groups, POINTS / 100), *([points(groups)] if details else [])]
        made += [f"SmartFRZ with {predictor}:", *map(markdown, tables)]
    return "\n\n".join(made) or NOTHING


def full_size(lines):
    """What `benchmarks.full_size` measured: time, and how it splits, in % of the method's own time."""
    rows = []
    for network in dict.fromkeys(line["network"] for line in lines):
        found = [line for line in lines if line["network"] == network]
        full = next((line for line in found if line["method"] == "full"), None)
        for line in found:
            seconds = line["train_seconds"]
            row = {"network": network + (" (toy)" if line["toy"] else ""), "method": line["method"]}
            share = seconds / full["train_seconds"] if full else math.nan
            share = line["steps"] / line["full_steps"] if stops_early(line["method"]) else share
            row["time, % of full training"] = mean([100 * share], ".1f")
            row["ms a step"] = f"{1000 * seconds / line['steps']:.1f}"
            row |= {f"{part}, %": f"{100 * value / seconds:.2f}" for part, value in line["split"].items()}
            row["layers frozen"] = f"{len(line['frozen'])} of {len(line['layers'])}" if line["layers"] else ""
            rows.append(row | {"accuracy, %": f"{100 * line['accuracy']:.1f}"})
    return markdown(rows) or NOT_RUN


def other_predictors(lines, known):
    """SmartFRZ with other predictors, `smartfrz-base` first, and the full runs of the same tasks and seeds."""
    rows = []
    for tier, task in dict.fromkeys((line["tier"], line["task"]) for line in lines):
        of_task = [line for line in known + lines if (line["tier"], line["task"]) == (tier, task)]
        found = frame({f"{tier} {task}": of_task}, ("smartfrz",)).dropna(subset=["difference"])
        for name, part in found.groupby(found["line"].map(lambda line: line["predictor"]["name"]), sort=False):
            halfway = [100 * statistics.median(frozen_at(line).values()) for line in part["line"]]
            row = {"ours": f"{tier} {task}", "predictor": name, "accuracy, %": cell(part["accuracy"], ".1f")}
            row |= {"difference": cell(part["difference"], "+.1f"), "computation": cell(part["total"], ".1f", " %")}
            rows.append(row | {"half of the layers frozen at": f"{statistics.mean(halfway):.0f} % of the run"})
    return markdown(rows) or NOTHING


def moments(lines):
    """Fig. 5(b) in figures: when the layers of the front and of the back half freeze."""
    rows = []
    for task, method, found in grouped(tasks_of(lines)):
        chosen = [line for line in found["line"] if line.get("layers") and line["events"]]
        if not chosen:
            continue
        front, back, never = [], [], []
        for line in chosen:
            frozen, names = frozen_at(line), line["layers"]
            for half, part in ((front, names[: len(names) // 2]), (back, names[len(names) // 2 :])):
                half += [100 * frozen[name] for name in part if name in frozen]
            never.append(len(names) - len(frozen))
        row = {"frozen at, % of the run": task, "method": method, "layers": str(len(chosen[0]["layers"]))}
        row |= {"front half": mean(front, ".0f"), "back half": mean(back, ".0f"), "never": mean(never, ".1f")}
        rows.append(row)
    return markdown(rows) or NOTHING


def rates(lines, tier, settings):
    """What each learning rate of a tier's tasks reached on validation data, and the task's own; empty without lines."""
    title = "learning rate: validation accuracy, % (Matthews correlation x 100)"
    rows = []
    for name, task in TIERS[tier].items():
        found = rates_of(lines, tier, name, settings)
        shown = ", ".join(f"{rate:g}: {100 * found[rate]:.1f}" for rate in sorted(found))
        rows += [{"task": name, title: shown, "the task's": f"{task.training.learning_rate:g}"}] if found else []
    return markdown(rows)


def rates_of(lines, tier, name, settings):
    """Rate to validation accuracy of a task, trained as it is now but for the rate."""
    training = dataclasses.asdict(TIERS[tier][name].training)
    del training["learning_rate"]
    facts = {"tier": tier, "task": name, "settings": settings, "training": training}
    return {line["rate"]: line["validation"] for line in matching(lines, facts)}


# Predictors


def mean_auc(line, method, key="auc"):
    """Mean of a figure over the architectures of a line of `benchmarks.predictor_tables`."""
    values = [methods[method][key] for methods in line["held_out"].values()]
    return statistics.mean(value for value in values if value is not None)


def predictor_settings(lines, name, values=None):
    """Table 4 or 5, ours and the paper's; empty without lines.

    Args:
        lines: Lines of `benchmarks.predictor_tables`.
        name: `window` or `size`.
        values: Windows or sizes, in order; the paper's by default.
    """
    values = values or paper.SETTINGS[name]
    key, title = ("window", "attention window") if name == "window" else ("tailored_size", "tailored size")
    found = [line for line in lines if line["table"] == name]
    rows = []
    for (representation, number, settings), part in _grouped(found, "representation", "runs", "settings"):
        note = "" if settings == "{}" else f", {settings}"
        for what, form, measure in (
            ("AUC", ".3f", lambda line: mean_auc(line, "predictor")),
            ("pooled AUC", ".3f", lambda line: mean_auc(line, "predictor", "pooled_auc")),
            (
                "AUC above logistic regression",
                "+.3f",
                lambda line: mean_auc(line, "predictor") - mean_auc(line, "logistic_regression"),
            ),
        ):
            row = {title: f"ours, {what} (`{representation}`, {number} recordings{note})"}
            for value in values:
                row[str(value)] = cell([measure(line) for line in part if line[key] == value], form)
            rows.append(row)
    for network, accuracies in paper.PREDICTOR[name].items() if rows else ():
        shown = [f"{accuracy:.2f} %" for accuracy in accuracies]
        row = {title: f"paper, accuracy of {network} on CIFAR-100"}
        rows.append(row | dict(zip(map(str, values), shown, strict=False)))
    return markdown(rows)


def _grouped(lines, *keys):
    groups = {}
    for line in lines:
        key = tuple(len(line[k]) if k == "runs" else str(line[k]) for k in keys)
        groups.setdefault(key, []).append(line)
    return groups.items()


def representations(lines):
    """What the predictor sees, and baselines on the same recordings; empty without lines."""
    found = [line for line in lines if line["table"] == "representation"]
    groups = {}
    for line in found:
        hidden = ", position not told" if line.get("unplaced") == 1.0 else ""
        note = f", {line['settings']}" if line["settings"] else ""
        groups.setdefault(f"`{line['representation']}`{hidden}{note}", []).append(line)
    shown = [(f"predictor, {name}", "predictor", part) for name, part in groups.items()]
    if found:
        others = [method for method in next(iter(found[0]["held_out"].values())) if method != "predictor"]
        shown += [(method.replace("_", " "), method, found[:1]) for method in others]
    titles = {
        "auc": "AUC",
        "pooled_auc": "pooled AUC",
        "freeze_precision": "right freezes",
        "frozen_share": "time frozen",
        "calibration_error": "calibration error",
    }
    rows = [
        {"judged by": name, "seeds": str(len(part))}
        | {title: cell([mean_auc(line, method, key) for line in part], ".3f") for key, title in titles.items()}
        for name, method, part in shown
    ]
    return markdown(rows)


def gradients(lines):
    """Distances of subsets to the whole, by size, over layers and moments; empty without lines."""
    rows = []
    for line in lines:
        if line["table"] != "gradients":
            continue
        sizes = sorted({int(size) for one in line["layers"] for size in one["distances"]})
        for size in sizes:
            found = pd.DataFrame([x["distances"][str(size)] for x in line["layers"] if str(size) in x["distances"]])
            row = {"task": line["task"], "subset": str(size), "layers x moments": str(len(found))}
            row |= {"KS, mean": f"{found['ks'].mean():.3f}", "KS, largest": f"{found['ks'].max():.3f}"}
            row |= {"Wasserstein, mean": f"{found['wasserstein'].mean():.3f}"}
            row |= {"Wasserstein, largest": f"{found['wasserstein'].max():.3f}"}
            rows.append(row | {"KS by chance": f"{0.8687 / math.sqrt(size):.3f}"})
    return markdown(rows)


def predictor_costs(lines):
    """Appendix C; empty without lines."""
    found = [line for line in lines if line["table"] == "costs"]
    rows = []
    for line in found:
        form = f"`{line['representation']}`, window {line['window']}, {line['tailored_size']} weights"
        row = {"predictor": f"{line['predictor']} ({form})", "file": f"{line['file_bytes'] / 2**20:.2f} MiB"}
        row |= {"parameters": f"{line['parameters']:,}"}
        row |= {"one layer's decision": f"{line['flops_per_layer'] / 1e9:.3f} GFLOPs"}
        row |= {f"a record of {line['num_layers']} layers": f"{line['record_bytes'] / 2**10:.0f} KiB"}
        row |= {"their history": f"{line['history_bytes'] / 2**20:.1f} MiB", "asked": f"{line['milliseconds']:.1f} ms"}
        rows.append(row)
    if rows:
        rows.append(dict(zip(rows[0], paper.COSTS, strict=True)))
    return markdown(rows)


def predictor_tables(lines, settings=paper.SETTINGS):
    """What `benchmarks.predictor_tables` prints.

    Args:
        lines: Its lines.
        settings: Windows and sizes to show, by the name of the table.
    """
    made = [predictor_settings(lines, name, values) for name, values in settings.items()]
    made += [representations(lines), gradients(lines), predictor_costs(lines)]
    return "\n\n".join(filter(None, made)) or "There are no results yet."


# README


def chosen(lines, keep):
    """Groups of the lines whose task `keep` accepts."""
    return tasks_of([line for line in lines if keep(line["task"])])


def picture(folder, name, text):
    """A picture of the folder, if it was drawn."""
    return f"![{text}](pictures/{name}.png)" if (folder / "pictures" / f"{name}.png").exists() else NOTHING


def sections(folder=FOLDER):
    """Name to text of all parts that are made from results."""
    names = (
        "cpu",
        "long",
        "gpu",
        "tradeoff",
        "predictor_tables",
        "sweeps",
        "rates",
        "predictors",
        "fronts",
        "full_size",
        "labels",
    )
    found = {name: lines_of(folder / "results" / f"{name}.jsonl") for name in names}
    lines, longer, on_gpu = (found[tier] for tier in ("cpu", "long", "gpu"))
    predictor, tried = found["predictor_tables"], found["rates"]
    machines = sorted({line["machine"] for line in lines + longer + on_gpu + found["fronts"]})
    made = {
        "summary": "\n\n".join([summary(tasks_of(lines)), NOTES]) if lines else NOTHING,
        "equal-time": picture(folder, "accuracy_against_time", "Accuracy against time saved"),
        "tradeoff": tradeoff([line for line in found["tradeoff"] if line["tier"] == "cpu"] + lines),
        "tradeoff-picture": picture(folder, "tradeoff", "Accuracy against training time"),
        "fronts": fronts(found["fronts"]),
        "fronts-picture": picture(folder, "fronts", "Fronts of accuracy over time"),
        "longer": ours(tasks_of(longer)),
        "predictors": other_predictors(found["predictors"], lines + longer),
        "labels": markdown(label_table(found["labels"])),
        "gpu": "\n\n".join([ours(tasks_of(on_gpu)), shares_by_clock(on_gpu)]) if on_gpu else NOTHING,
        "full-size": full_size([line for line in found["full_size"] if not line["toy"]]),
        "rates": rates(tried, "cpu", {}),
        "rates-longer": rates(tried, "long", {}),
        "table-1": similarity(lines),
        "table-2": beside(chosen(lines, lambda task: task not in (*LANGUAGE, *SCRATCH)), paper.TABLE_2),
        "table-3": beside(chosen(lines, lambda task: task in SCRATCH), paper.TABLE_3),
        "table-4": predictor_settings(predictor, "window"),
        "table-5": predictor_settings(predictor, "size"),
        "table-6": beside(chosen(lines + longer, lambda task: task in LANGUAGE), paper.TABLE_6),
        "tables-8-9": sweeps(found["sweeps"]),
        "representation": representations(predictor),
        "figure-3": gradients(predictor),
        "figure-3-picture": picture(folder, "gradient_distribution", "Gradients of a layer and of a subset of it"),
        "figure-4": picture(folder, "cka", "CKA of each layer to the end of training"),
        "figure-5a": memory(lines),
        "figure-5b": moments(lines),
        "appendix-c": predictor_costs(predictor),
        "all": "\n\n".join(task_table(name, group) for name, group in tasks_of(lines).items()),
        "machines": f"Machines: {'; '.join(machines)}." if machines else NOTHING,
    }
    return {name: text or NOTHING for name, text in made.items()}


def filled(text, made):
    """The text with each marked part replaced.

    Raises:
        ValueError: If it has a mark that nothing is made for, or lacks one.
    """
    names = re.findall(r"<!-- begin (\S+) -->", text)
    if sorted(names) != sorted(made):
        raise ValueError(
            f"The marks are {sorted(names)}; expected each of {sorted(made)} once. Add or remove `<!-- begin NAME -->` and "
            "`<!-- end NAME -->`."
        )
    for name, part in made.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, number = re.subn(pattern, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)
        if number != 1:
            raise ValueError(f"`<!-- begin {name} -->` has no `<!-- end {name} -->` after it; expected one. Add it.")
    return text


def main(given=None):
    """Write the parts, or see whether they are right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Change nothing; exit with 1 if something would change.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="Folder of README.md, results/ and pictures/.")
    options = parser.parse_args(given)
    readme = options.folder / "README.md"
    if not readme.exists():
        parser.error(f"{readme} does not exist; expected the file whose marked parts are to be written. See --folder.")
    before = readme.read_text("utf-8")
    after = filled(before, sections(options.folder))
    if options.check:
        if after != before:
            sys.exit(f"{readme} is not what the results say; run: python -m benchmarks.tables")
    elif after != before:
        with replacing(readme) as temporary:
            temporary.write_text(after, "utf-8")


if __name__ == "__main__":
    main()
