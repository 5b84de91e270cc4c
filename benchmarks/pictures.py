"""Pictures of what `benchmarks.compare` has measured."""

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.frames import by_task, frame, frozen_at, mean_of_tasks, tasks_of
from benchmarks.methods import EARLY, METHODS, TRADEOFF
from benchmarks.tables import FREEZING, with_all_settings
from smartfrz.files import replacing

STYLES = {
    "full": ("#7d8597", "--", "o"),
    "smartfrz": ("#2f6690", "-", "o"),
    "smartfrz-prefix": ("#16a5c4", "-", "s"),
    "smartfrz-cost_aware": ("#3a3d98", "-", "^"),
    "smartfrz+cache": ("#0b2545", "-", "D"),
    "linear": ("#c1121f", "-", "v"),
    "autofreeze": ("#f2813a", "-", "<"),
    "grades": ("#9b5de5", "-", "p"),
    "weight-change": ("#f2b134", "-", ">"),
    "similarity-guided": ("#588157", ":", "P"),
    "early-stop": ("#111111", "--", "X"),
} | {method: ("#111111", ":", f"${method.rpartition('-')[2]}$") for method in EARLY}
OVER_TIME = ("full", "smartfrz", "linear", "autofreeze", "early-stop-70")  # few enough to be legible


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
        panel.grid(alpha=0.3)
    return figure, dict(zip(groups, axes, strict=False))


def _add_legend(figure, methods):
    made = [
        Line2D([], [], color=STYLES[m][0], linestyle=STYLES[m][1], marker=STYLES[m][2], markersize=5, label=m)
        for m in METHODS
        if m in methods
    ]
    figure.legend(handles=made, loc="outside lower center", ncols=7, fontsize=8, frameon=False)


def _by_task_and_method(groups, methods=METHODS):
    """Task, method, and its lines, one a seed."""
    for (task, method), found in frame(groups, methods).groupby(["task", "method"], observed=True):
        yield task, method, list(found["line"])


def accuracy_over_time(groups):
    """Accuracy on the validation part, means over seeds at the same moments of the run."""
    figure, axes = _panels(groups)
    shown = set()
    for task, method, found in _by_task_and_method(groups, OVER_TIME):
        count = min(len(line["curve"]) for line in found)
        curves = np.array([line["curve"][:count] for line in found])  # [seeds, moments, 4]
        column, seconds = (1, "CPU seconds") if found[0]["device"] == "cpu" else (2, "seconds")
        x, y = curves[:, :, column].mean(0), 100 * curves[:, :, 3].mean(0)
        colour, style, marker = STYLES[method]
        axes[task].plot(x, y, color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.3)
        axes[task].set_xlabel(f"{seconds} of training")
        axes[task].set_ylabel("validation, %")
        shown.add(method)
    _add_legend(figure, shown)
    return figure


def accuracy_against_time(groups):
    """Difference to full training against the time saved, of all methods: small marks are tasks, large ones their mean."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    methods = set()
    for method in FREEZING:
        points = [(100 - share, difference) for share, difference in task_means(groups, method)]
        if points:
            methods.add(method)
            colour, _, marker = STYLES[method]
            axes.scatter(*zip(*points, strict=True), s=22, color=colour, marker=marker, alpha=0.45, linewidths=0)
            middle = np.mean(points, 0)
            axes.scatter(*middle, s=130, color=colour, marker=marker, edgecolors="white", zorder=3)
    curve = [point for method in EARLY if (point := early_point(groups, method))]
    if curve:
        colour = STYLES["early-stop"][0]
        axes.plot(*zip(*curve, (0.0, 0.0), strict=True), color=colour, linewidth=1.5, zorder=2)
        axes.scatter(*zip(*curve, strict=True), s=30, color=colour, marker="X", zorder=2)
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
    _add_legend(figure, methods)
    return figure


def task_means(groups, method):
    """Mean time in % of full training's and mean difference in points, of each task that has both."""
    found = frame(groups, (method,))
    differences, shares = by_task(found, "difference"), by_task(found, "share")
    return [(np.mean(shares[task]), np.mean(values)) for task, values in differences.items()]


def early_point(groups, method):
    """Share of the steps saved and mean difference over tasks of stopping early; None if it was not measured."""
    found = task_means(groups, method)
    return (100 - 100 * EARLY[method], np.mean([y for _, y in found])) if found else None


def memory_over_time(groups):
    """Memory of the first seed: weights, gradients, optimizer, activations and what the method keeps."""
    figure, axes = _panels(groups)
    shown = set()
    for task, method, (line, *_) in _by_task_and_method(groups):
        points = np.array(line["memory"], float)
        colour, style, _ = STYLES[method]
        x, y = 100 * points[:, 0] / line["steps"], points[:, 1] / 2**20
        axes[task].step(x, y, where="post", color=colour, linestyle=style, linewidth=1.3)
        axes[task].set_xlabel("% of the run")
        axes[task].set_ylabel("memory, MiB")
        axes[task].set_ylim(0, None)
        shown.add(method)
    _add_legend(figure, shown)
    return figure


def frozen_moments(groups):
    """When each layer froze, mean over seeds; a seed in which it did not counts as the end of the run."""
    figure, axes = _panels(groups)
    image, rows = None, {name: {} for name in groups}
    for task, method, found in _by_task_and_method(groups, FREEZING):
        layers = found[0]["layers"]
        moments = np.mean([[frozen_at(line).get(layer, 1.0) for layer in layers] for line in found], 0)
        never = [all(layer not in frozen_at(line) for line in found) for layer in layers]
        rows[task][method] = np.where(never, np.nan, 100 * moments)
    for task, found in rows.items():
        panel = axes[task]
        panel.grid(visible=False)
        panel.set_facecolor("#e4e4e4")
        if found:
            picture = np.stack(list(found.values()))
            image = panel.imshow(picture, aspect="auto", interpolation="nearest", cmap="viridis_r", vmin=0, vmax=100)
        panel.set_yticks(range(len(found)), list(found), fontsize=7)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("layers, input at the left")
    if image is not None:
        figure.colorbar(image, ax=list(axes.values()), label="% of the run; grey: never frozen")
    return figure


def similarities(groups):
    """CKA of each layer of full training, first seed, to the same layer at the end; None where it was not measured."""
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
    figure.suptitle("Full training: dark curves are layers near the input", fontsize=10, x=0.01, ha="left")
    return figure


def tradeoff(groups):
    """Accuracy against time: SmartFRZ by threshold and in fewer steps, and full training that stops early.

    None unless a task has all settings.
    """
    groups = with_all_settings([line for lines in groups.values() for line in lines])
    if not groups:
        return None
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    whole = [name for name, setting in TRADEOFF.items() if "share" not in setting]
    shorter = [name for name in TRADEOFF if name not in whole]
    curves = [
        (["smartfrz", *whole], "smartfrz", "SmartFRZ, by threshold"),
        (shorter, "smartfrz+cache", "SmartFRZ in 85 % of the steps, by threshold"),
        (EARLY, "early-stop", "full training in fewer steps"),
        *(([method], method, method) for method in ("linear", "autofreeze", "grades", "weight-change")),
    ]
    for methods, style, label in curves:
        colour, line, marker = STYLES[style]
        found = [point for method in methods if (point := tradeoff_point(groups, method))]
        if found:
            x, y, errors = zip(*sorted(found), strict=True)
            errors = [error or 0.0 for error in errors]
            axes.errorbar(x, y, errors, color=colour, linestyle=line, marker=marker, label=label, capsize=2)
    axes.axhline(0.0, color=STYLES["full"][0], linewidth=1)
    axes.set_xlabel("training time, % of full training")
    axes.set_ylabel("accuracy less full training's, points")
    axes.set_title(f"Means of {len(groups)} tasks, bars are standard errors over seeds", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def tradeoff_point(groups, method):
    """Time in % of full training's, difference in points and its standard error, means over tasks.

    None unless every task has the method.
    """
    found = frame(groups, (method,))
    differences, shares = by_task(found, "difference"), by_task(found, "share")
    if not found.size or len(differences) < len(groups):
        return None
    return mean_of_tasks(shares.values())[0], *mean_of_tasks(differences.values())


def front_panels(curves, title):
    """Fronts of methods, one panel a task.

    Args:
        curves: Task to method to times (%) and accuracies (%) of its runs, and their front.
        title: What stands above.
    """
    figure, axes = _panels(curves)
    names = list(dict.fromkeys(name for methods in curves.values() for name in methods))
    colours = dict(zip(names, matplotlib.colormaps["tab10"](np.arange(len(names)) % 10), strict=True))
    for task, methods in curves.items():
        for name, (times, accuracies, front) in methods.items():
            whole = name in ("plain training", "any setting")
            colour = {"plain training": "black", "any setting": STYLES["smartfrz"][0]}.get(name, colours[name])
            if name != "any setting":
                axes[task].scatter(times, accuracies, s=14, color=[colour], zorder=3, linewidths=0)
            style = {"linewidth": 2.0} if whole else {"linewidth": 0.8, "linestyle": ":"}
            axes[task].plot(100 * front.times, 100 * front.accuracies, color=colour, **style)
            colours[name] = colour
        axes[task].set_xlabel("training time, % of full training")
        axes[task].set_ylabel("accuracy, %")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    made = [Line2D([], [], color=colours[name], marker="o", markersize=4, label=name) for name in names]
    figure.legend(handles=made, loc="outside lower center", ncols=3 * min(3, len(curves)), fontsize=7, frameon=False)
    return figure


PICTURES = {
    "accuracy_over_time": accuracy_over_time,
    "accuracy_against_time": accuracy_against_time,
    "memory": memory_over_time,
    "frozen_moments": frozen_moments,
    "cka": similarities,
}


def plots(lines, methods, folder):
    """Draw the pictures of a set of methods; returns the files that were written."""
    pictures = {"tradeoff": tradeoff} if methods == tuple(TRADEOFF) else PICTURES
    groups, written = tasks_of(lines), []
    for name, draw in pictures.items():
        figure = draw(groups) if groups else None
        if figure is not None:
            save(figure, folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written


def save(figure, path, dpi=130):
    """Write a figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
