"""What `benchmarks.compare` has measured, as tables and pictures, from its JSON lines alone."""

import math
import statistics
from collections import defaultdict
from operator import itemgetter

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from smartfrz.files import replacing

EARLY = {f"early-stop-{percent}": percent / 100 for percent in (30, 50, 70, 85)}  # method to share of the steps
METHODS = (
    "full",
    "smartfrz",
    "smartfrz-prefix",
    "smartfrz-cost_aware",
    "smartfrz+cache",
    "linear",
    "autofreeze",
    "weight-change",
    "similarity-guided",
    "early-stop",
    *EARLY,
)
STYLES = {
    "full": ("#7d8597", "--", "o"),
    "smartfrz": ("#2f6690", "-", "o"),
    "smartfrz-prefix": ("#16a5c4", "-", "s"),
    "smartfrz-cost_aware": ("#3a3d98", "-", "^"),
    "smartfrz+cache": ("#0b2545", "-", "D"),
    "linear": ("#c1121f", "-", "v"),
    "autofreeze": ("#f2813a", "-", "<"),
    "weight-change": ("#f2b134", "-", ">"),
    "similarity-guided": ("#588157", ":", "P"),
    "early-stop": ("#111111", "--", "X"),
} | {method: ("#111111", ":", f"${round(100 * share)}$") for method, share in EARLY.items()}
SIZES = (
    itemgetter("backward_flops"),
    itemgetter("total_flops"),
    itemgetter("peak_memory_bytes"),
    lambda line: line["memory"][-1][1],
)
OVER_TIME = ("full", "smartfrz", "linear", "autofreeze", "early-stop-70")
EQUAL_TIME = 0.03  # by which two runs of equal time may differ


def matthews(confusion):
    """Matthews correlation, in [-1, 1]; 0 where it is undefined.

    Args:
        confusion: Counts `[2, 2]`, rows are true classes.
    """
    (tn, fp), (fn, tp) = confusion
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / below if below else 0.0


def standard_error(line):
    """Of a line's metric, from the size of the test data alone; of a correlation by 1,000 resamplings."""
    if line["metric"] == "accuracy":
        return math.sqrt(line["accuracy"] * (1 - line["accuracy"]) / line["test_samples"])
    counts = np.array(line["confusion"]).ravel()
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), 1000)
    return statistics.stdev(matthews(row.reshape(2, 2)) for row in drawn.astype(float))


def clock_of(line):
    """CPU seconds on a CPU, which other programs disturb less, and seconds elsewhere."""
    return "cpu_seconds" if line["device"] == "cpu" else "train_seconds"


def stops_early(method):
    """Whether it is full training in fewer steps."""
    return method.startswith("early-stop")


def share_of_full(line, clock=None):
    """Training time, of the full run's, were it run at the same time.

    Of full training that stops early this is its share of the steps: while it runs, more runs share the machine than in
    the mean over the whole of full training.
    """
    if stops_early(line["method"]):
        return line["steps"] / line["full_steps"]
    clock = clock or clock_of(line)
    return line[clock] / line[f"full_{clock}"] / line.get("drift", {}).get(clock, 1.0)


def frozen_at(line):
    """Layer to the share of the run at which it froze, of those that were frozen in the end."""
    frozen = {}
    for step, action, layer in line["events"]:
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


def paired(lines, method, value):
    """Of each seed of a method: its value less that of full training of the seed."""
    full = {line["seed"]: line for line in lines if line["method"] == "full"}
    chosen = [line for line in lines if line["method"] == method and line["seed"] in full]
    return [value(line) - value(full[line["seed"]]) for line in chosen]


def early_curve(lines, seed):
    """What full training reaches in which share of its time, of one seed: rising shares, accuracies in %.

    Returns:
        Two lists, which end with full training; None if that or the shorter runs were not measured.
    """
    full = [line for line in lines if line["seed"] == seed and line["method"] == "full"]
    early = [line for line in lines if line["seed"] == seed and stops_early(line["method"])]
    if not full or not early:
        return None
    points = {share_of_full(line): 100 * line["accuracy"] for line in early} | {1.0: 100 * full[0]["accuracy"]}
    shares = sorted(points)
    return shares, [points[share] for share in shares]


def against_early(lines, method):
    """Of each seed: a method's accuracy less that of stopping early in the method's own time, in points.

    Linear between the shares that were measured. Before the first of them it is that one's, which took longer: the
    method is then judged too severely.
    """
    differences = []
    for line in lines:
        curve = early_curve(lines, line["seed"]) if line["method"] == method else None
        if curve is not None:
            differences.append(100 * line["accuracy"] - float(np.interp(share_of_full(line), *curve)))
    return differences


def cell(values, form, unit=""):
    """Mean ± standard deviation, and in brackets the standard error of the mean; of one value only that."""
    if not values:
        return ""
    text = f"{statistics.mean(values):{form}}"
    if len(values) > 1:
        deviation = statistics.stdev(values)
        form = form.lstrip("+")
        text += f" ± {deviation:{form}} ({deviation / math.sqrt(len(values)):{form}})"
    return text + unit


def mean_of_tasks(values):
    """Of lists of values, one a task: the mean of their means, and its standard error (None with one seed).

    The tasks are those that they are: the error is that of the seeds alone.
    """
    mean = statistics.mean(map(statistics.mean, values))
    if min(map(len, values)) < 2:
        return mean, None
    return mean, math.sqrt(sum(statistics.variance(found) / len(found) for found in values)) / len(values)


def task_table(name, lines):
    """Markdown: means, standard deviations and standard errors over seeds; all is compared within a seed."""
    full = {line["seed"]: line for line in lines if line["method"] == "full"}
    metric = "Matthews correlation x 100" if lines[0]["metric"] == "matthews" else "test accuracy, %"
    columns = f"{name} | seeds | {metric} | difference, points | to stopping early at equal time | CPU time | wall time"
    columns += " | backward FLOPs | all FLOPs | peak memory | memory at the end | deciding | frozen layers"
    rows = [f"| {columns} |", "|" + "---|" * 13]
    for method in METHODS:
        found = [line for line in lines if line["method"] == method]
        if not found:
            continue
        cells = [method, str(len(found)), cell([100 * line["accuracy"] for line in found], ".1f")]
        differences = paired(lines, method, lambda line: 100 * line["accuracy"])
        cells.append(cell(differences, "+.1f") if method != "full" else "")
        judged = method != "full" and not stops_early(method)
        cells.append(cell(against_early(lines, method), "+.1f") if judged else "")
        for clock in ("cpu_seconds", "train_seconds"):
            cells.append(cell([100 * share_of_full(line, clock) for line in found], ".1f", " %"))
        for value in SIZES:
            pairs = [(value(line), value(full[line["seed"]])) for line in found if line["seed"] in full and value(line)]
            cells.append(f"{100 * statistics.mean(a / b for a, b in pairs):.1f} %" if pairs else "")
        cells.append(f"{100 * statistics.mean(x['decision_seconds'] / x['train_seconds'] for x in found):.2f} %")
        frozen = statistics.mean(len(frozen_at(line)) for line in found)
        cells.append(f"{frozen:.1f} of {len(found[0]['layers'])}" if found[0].get("layers") else "")
        rows.append(f"| {' | '.join(cells)} |")
    # of any run of the task, if no full one is there
    judged = list(full.values()) or lines
    error = 100 * statistics.mean(map(standard_error, judged))
    rows.append("")
    rows.append(
        f"Standard error of one result, from the size of the test set ({judged[0]['test_samples']:,}): {error:.1f}."
    )
    stopped = [line for line in lines if line["method"] == "early-stop"]
    if stopped:

        def drift(line):
            return line["drift"][clock_of(line)]

        beyond = sum(abs(line["time_of_smartfrz"] - 1) > EQUAL_TIME for line in stopped)
        off, drift, rest = (
            ", ".join(f"{100 * (value(line) - 1):+.1f}" for line in stopped)
            for value in (
                itemgetter("time_of_smartfrz"),
                drift,
                lambda line: line["time_of_smartfrz"] / drift(line),
            )
        )
        rows.append(
            f"The time of early-stop differs from that of smartfrz by {off} % ({beyond} of {len(stopped)} by more than "
            f"{100 * EQUAL_TIME:.0f} %), that of its steps from those of full before it by {drift} %; without that drift "
            f"{rest} % are left."
        )
    return "\n".join(rows)


def summary(groups, methods=METHODS):
    """Markdown: each method over all tasks."""
    columns = "all tasks | tasks | mean difference, points | worst task | training time, geometric mean"
    columns += " | to stopping early at equal time, points | better on"
    rows = [f"| {columns} |", "|" + "---|" * 7]
    for method in methods:
        differences, early, shares = {}, {}, []
        for name, lines in groups.items():
            found = paired(lines, method, lambda line: 100 * line["accuracy"])
            if found:
                differences[name] = found
                shares += [statistics.mean(share_of_full(line) for line in lines if line["method"] == method)]
                if not stops_early(method) and (judged := against_early(lines, method)):
                    early[name] = judged
        if not differences or method == "full":
            continue
        worst = min(differences, key=lambda name: statistics.mean(differences[name]))
        cells = [method, str(len(differences)), _with_error(*mean_of_tasks(list(differences.values())))]
        cells += [f"{statistics.mean(differences[worst]):+.2f} ({worst})"]
        cells += [f"{100 * statistics.geometric_mean(shares):.1f} %"]
        better = sum(statistics.mean(found) > 0 for found in early.values())
        cells += [_with_error(*mean_of_tasks(list(early.values()))), f"{better} of {len(early)}"] if early else ["", ""]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _with_error(mean, error):
    return f"{mean:+.2f}" + ("" if error is None else f" ({error:.2f})")


NOTES = (
    "Times, FLOPs and memory are those of full training of the same seed = 100 %. After ± is the standard deviation over "
    "seeds, in brackets the standard error of the mean; differences are taken within a seed, and the errors over all tasks "
    "are those of the seeds, the tasks being what they are. *To stopping early at equal time*: accuracy less that of full "
    "training in fewer steps, its schedule scaled, interpolated at the time that the method took."
)


def tables(lines):
    """All of them, as Markdown; times, FLOPs and memory are those of full training of the same seed = 100 %."""
    if not lines:
        return "There are no results yet."
    groups = tasks_of(lines)
    machines = sorted({line["machine"] for line in lines})
    found = [task_table(name, group) for name, group in groups.items()]
    return "\n\n".join([*found, summary(groups), NOTES, f"Machine: {'; '.join(machines)}."])


def _panels(groups, height=3.2, width=5.2):
    """A figure, and its axes by task."""
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(width * columns + 1, height * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[len(groups) :]:
        unused.set_visible(False)
    for name, panel in zip(groups, axes, strict=False):
        panel.set_title(name, loc="left", fontsize=10)
    return figure, dict(zip(groups, axes, strict=False))


def _legend(figure, methods):
    made = [
        Line2D([], [], color=STYLES[m][0], linestyle=STYLES[m][1], marker=STYLES[m][2], markersize=5, label=m)
        for m in METHODS
        if m in methods
    ]
    figure.legend(handles=made, loc="outside lower center", ncols=7, fontsize=8, frameon=False)


def _drawn(axes, method, x, y, **options):
    colour, style, marker = STYLES[method]
    axes.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.3, **options)


def _by_method(lines):
    return {m: found for m in METHODS if (found := [line for line in lines if line["method"] == m])}


def accuracy_over_time(groups):
    """On the validation part, means over seeds at the same moments of the run; of `OVER_TIME` alone, to be legible."""
    groups = {name: [x for x in lines if x["method"] in OVER_TIME] for name, lines in groups.items()}
    figure, axes = _panels(groups)
    for name, lines in groups.items():
        for method, found in _by_method(lines).items():
            count = min(len(line["curve"]) for line in found)
            curves = np.array([line["curve"][:count] for line in found])  # [seeds, moments, 4]
            column = 1 if found[0]["device"] == "cpu" else 2
            _drawn(axes[name], method, curves[:, :, column].mean(0), 100 * curves[:, :, 3].mean(0))
        axes[name].set_xlabel("CPU seconds of training" if lines[0]["device"] == "cpu" else "seconds of training")
        axes[name].set_ylabel("validation, %")
        axes[name].grid(alpha=0.3)
    _legend(figure, {line["method"] for group in groups.values() for line in group})
    return figure


def accuracy_against_time(groups):
    """One picture of all methods: small marks are means of a task, large ones of all tasks."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    methods = set()
    for method in METHODS[1:]:
        if stops_early(method):
            continue
        points = []
        for lines in groups.values():
            differences = paired(lines, method, lambda line: 100 * line["accuracy"])
            if differences:
                shares = [share_of_full(line) for line in lines if line["method"] == method]
                points.append((100 * (1 - statistics.mean(shares)), statistics.mean(differences)))
        if points:
            methods.add(method)
            colour, _, marker = STYLES[method]
            axes.scatter(*zip(*points, strict=True), s=22, color=colour, marker=marker, alpha=0.45, linewidths=0)
            middle = np.mean(points, 0)
            axes.scatter(*middle, s=130, color=colour, marker=marker, edgecolors="white", zorder=3)
    curve = [point for method in EARLY if (point := _early_point(groups, method))]
    if curve:
        axes.plot(*zip(*curve, (0.0, 0.0), strict=True), color=STYLES["early-stop"][0], linewidth=1.5, zorder=2)
        axes.scatter(*zip(*curve, strict=True), s=30, color=STYLES["early-stop"][0], marker="X", zorder=2)
        methods.add("early-stop")
    axes.axhline(0, color=STYLES["full"][0], linestyle="--", linewidth=1)
    axes.set_xlabel("training time saved, % of full training")
    axes.set_ylabel("difference to full training, points")
    axes.set_title(
        f"Small: a task; large: the mean of the method's tasks ({len(groups)} in all); black: full training in fewer steps",
        loc="left",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    _legend(figure, methods)
    return figure


def _early_point(groups, method):
    """Means over tasks of the time saved and the difference; None if it was not measured."""
    found = [paired(lines, method, lambda line: 100 * line["accuracy"]) for lines in groups.values()]
    found = [statistics.mean(differences) for differences in found if differences]
    return (100 * (1 - EARLY[method]), statistics.mean(found)) if found else None


def memory_over_time(groups):
    """Of the first seed: weights, gradients, optimizer, activations and what the method keeps."""
    figure, axes = _panels(groups)
    for name, lines in groups.items():
        for method, found in _by_method(lines).items():
            points = np.array(found[0]["memory"], float)
            colour, style, _ = STYLES[method]
            x, y = 100 * points[:, 0] / found[0]["steps"], points[:, 1] / 2**20
            axes[name].step(x, y, where="post", color=colour, linestyle=style, linewidth=1.3)
        axes[name].set_xlabel("% of the run")
        axes[name].set_ylabel("memory, MiB")
        axes[name].set_ylim(0, None)
        axes[name].grid(alpha=0.3)
    _legend(figure, {line["method"] for group in groups.values() for line in group})
    return figure


def frozen_moments(groups):
    """When each layer froze, mean over seeds; a seed in which it did not counts as the end of the run."""
    figure, axes = _panels(groups)
    image = None
    for name, lines in groups.items():
        found = {m: group for m, group in _by_method(lines).items() if m != "full" and not stops_early(m)}
        layers = next((line["layers"] for group in found.values() for line in group), [])
        rows = np.full((len(found), len(layers)), np.nan)
        for row, group in enumerate(found.values()):
            moments = [[frozen_at(line).get(layer, 1.0) for layer in layers] for line in group]
            never = [all(layer not in frozen_at(line) for line in group) for layer in layers]
            rows[row] = np.where(never, np.nan, 100 * np.mean(moments, 0))
        panel = axes[name]
        panel.set_facecolor("#e4e4e4")
        if rows.size:
            image = panel.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis_r", vmin=0, vmax=100)
        panel.set_yticks(range(len(found)), list(found), fontsize=7)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("layers, input at the left")
    if image is not None:
        figure.colorbar(image, ax=list(axes.values()), label="% of the run; grey: never frozen")
    return figure


def similarities(groups):
    """CKA of each layer of full training, first seed, to the same layer at the end."""
    groups = {name: lines for name, lines in groups.items() if any("cka" in line for line in lines)}
    if not groups:
        return None
    figure, axes = _panels(groups)
    for name, lines in groups.items():
        line = next(line for line in lines if "cka" in line)
        values = np.array(line["cka"]["values"], float)  # [moments, layers]
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, values.shape[1]))
        for curve, colour in zip(values.T, colours, strict=True):
            axes[name].plot(line["cka"]["steps"], curve, color=colour, linewidth=1)
        axes[name].set_xlabel("training steps")
        axes[name].set_ylabel("CKA to the end")
        axes[name].grid(alpha=0.3)
    figure.suptitle("Full training: dark curves are layers near the input", fontsize=10, x=0.01, ha="left")
    return figure


PICTURES = {
    "accuracy_over_time": accuracy_over_time,
    "accuracy_against_time": accuracy_against_time,
    "memory": memory_over_time,
    "frozen_moments": frozen_moments,
    "cka": similarities,
}


def plots(lines, folder):
    """Draw all pictures; the files that were written."""
    groups, written = tasks_of(lines), []
    for name, draw in PICTURES.items():
        figure = draw(groups) if groups else None
        if figure is not None:
            with replacing(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=130, format="png")
            written.append(folder / f"{name}.png")
    return written
