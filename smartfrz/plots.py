"""Pictures of reports, comparisons and labels. Needs matplotlib, which the extra `plots` brings.

Nothing here touches pyplot or the backend that the user chose.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartfrz.comparing.engine import Result
from smartfrz.control.report import Report
from smartfrz.errors import not_installed
from smartfrz.report_page import shorten

try:
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError as error:
    raise not_installed("smartfrz.plots", "matplotlib", "plots") from error

ACTIVE, FROZEN, FULL = "#f2b134", "#2f6690", "#7d8597"
_MOST_NAMES, _NAME_LENGTH = 60, 32


def plot_report(report: Report) -> Figure:
    """Draw layers over training steps, coloured by trained or frozen.

    Args:
        report: Report of a run with at least one step.

    Returns:
        A figure that no window shows: `figure.savefig(path)`.

    Raises:
        ValueError: If the run has no step yet.
    """
    if not report.num_steps or not report.layers:
        raise ValueError("The report is of a run without a step; expected one with at least one. Train first.")
    height = max(3.0, 1.4 + 0.16 * min(len(report.layers), _MOST_NAMES))
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    _draw_layers(axes, [layer.name for layer in report.layers], report.frozen_spans(), report.num_steps, _MOST_NAMES)
    what = "would have frozen" if report.dry_run else "froze"
    ever = {layer for _, action, layer in report.changes if action != "thaw"}
    axes.set_title(
        f"SmartFRZ {what} {len(ever)} of {len(report.layers)} layers: "
        f"{report.backward_flops_saved / max(report.backward_flops, 1):.0%} of the backward FLOPs saved",
        fontsize=11,
        loc="left",
    )
    axes.set_xlabel("training steps")
    return figure


def _draw_layers(
    axes: Any, layers: Sequence[str], spans: Mapping[str, Sequence[tuple[int, int]]], steps: int, names: int
) -> None:
    """Draw one bar for each layer, input at the top, with the spans in which it was frozen."""
    for row, layer in enumerate(layers):
        axes.broken_barh([(0, steps)], (row, 0.9), facecolor=ACTIVE)
        axes.broken_barh([(start, end - start) for start, end in spans.get(layer, ())], (row, 0.9), facecolor=FROZEN)
    every = ceil(len(layers) / names)
    shown = [shorten(layer, _NAME_LENGTH) for layer in layers[::every]]
    axes.set_yticks([row + 0.45 for row in range(0, len(layers), every)], shown, fontsize=7)
    axes.set_ylim(len(layers), 0)
    axes.set_xlim(0, steps)
    axes.set_ylabel("layers, input at the top")
    axes.figure.legend(
        handles=[Patch(color=ACTIVE, label="trained"), Patch(color=FROZEN, label="frozen")],
        loc="outside lower center",  # where it covers nothing
        ncols=2,
        frameon=False,
    )


def plot_results(results: Sequence[Result], path: Path) -> None:
    """Draw when each layer was frozen, and below it the accuracy of both runs over training steps.

    Args:
        results: Results of full training and of a run that freezes.
        path: PNG file to write.
    """
    full, freezing = results
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    spans = {layer: [(at, freezing.steps)] for layer, at in freezing.frozen.items()}
    _draw_layers(top, freezing.layers, spans, freezing.steps, names=20)
    saved = 1 - freezing.train_seconds / full.train_seconds
    top.set_title(
        f"SmartFRZ froze {len(freezing.frozen)} of {len(freezing.layers)} layers: {abs(saved):.0%} "
        f"{'less' if saved >= 0 else 'more'} training time, "
        f"{100 * (freezing.accuracy - full.accuracy):+.1f} points of accuracy",
        fontsize=11,
        loc="left",
    )
    for result, colour, style in ((full, FULL, "--"), (freezing, FROZEN, "-")):
        points = [(point.step, 100 * point.accuracy) for point in result.curve]
        label = f"{result.method}: {100 * result.accuracy:.1f} % in {result.train_seconds:.0f} s"
        bottom.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=4, label=label)
    bottom.set_xlabel("training steps")
    bottom.set_ylabel("test accuracy, %")
    bottom.grid(alpha=0.3)
    bottom.legend(loc="lower right")
    figure.savefig(path, dpi=130, format="png")


def plot_labels(
    name: str, layers: Sequence[str], cka: NDArray[np.float64], labels: NDArray[np.int8], path: Path
) -> None:
    """Draw the CKA curves of one run, and below them which layers are labelled ready to freeze.

    Args:
        name: Name of the run, for the title.
        layers: Layer names, in execution order.
        cka: float64 `[num_layers, timestamps]`.
        labels: int8 of the same shape: 1 freeze, 0 keep training, -1 unknown.
        path: PNG file to write.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    colours: Any = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(layers)))
    for curve, colour in zip(cka, colours, strict=True):
        top.plot(curve, color=colour, linewidth=1)
    top.set_ylabel("CKA to the reference")
    top.set_ylim(None, 1.01)
    top.set_title(f"{name}: dark curves are layers near the input", loc="left", fontsize=11)
    top.grid(alpha=0.3)
    palette = ListedColormap(["#d0d0d0", ACTIVE, FROZEN])
    bottom.imshow(labels, aspect="auto", interpolation="nearest", cmap=palette, vmin=-1, vmax=1)
    every = max(1, len(layers) // 20)
    shown = [shorten(layer, _NAME_LENGTH) for layer in layers[::every]]
    bottom.set_yticks(range(0, len(layers), every), shown, fontsize=7)
    bottom.set_xlabel("timestamps (records)")
    bottom.set_ylabel("layers, input at the top")
    share = (labels == 1).sum() / max(1, (labels >= 0).sum())
    bottom.set_title(f"labels: {share:.0%} ready to freeze", loc="left", fontsize=11)
    figure.legend(
        handles=[Patch(color=ACTIVE, label="keep training"), Patch(color=FROZEN, label="freeze")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    figure.savefig(path, dpi=130, format="png")
