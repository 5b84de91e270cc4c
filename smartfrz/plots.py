"""Pictures. Needs matplotlib, which the extras `demo` and `build` bring."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from smartfrz.demo import Run

matplotlib.use("Agg")
ACTIVE, FROZEN, FULL = "#f2b134", "#2f6690", "#7d8597"


def plot_demo(runs: "Sequence[Run]", path: Path) -> None:
    """Layers over training steps, coloured by frozen or not; accuracy of both runs below.

    Args:
        runs: The full run and the run with SmartFRZ.
        path: Where the PNG goes.
    """
    full, freezing = runs
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    count, steps = len(freezing.layers), freezing.num_steps
    for row, layer in enumerate(freezing.layers):
        at = freezing.frozen.get(layer, steps)
        top.broken_barh([(0, at)], (row, 0.9), facecolor=ACTIVE)
        top.broken_barh([(at, steps - at)], (row, 0.9), facecolor=FROZEN)
    every = max(1, count // 12)
    top.set_yticks([row + 0.45 for row in range(0, count, every)], freezing.layers[::every], fontsize=7)
    top.set_ylim(count, 0)
    top.set_xlim(0, steps)
    top.set_ylabel("layers, input at the top")
    saved = 1 - freezing.seconds / full.seconds
    top.set_title(
        f"SmartFRZ froze {len(freezing.frozen)} of {count} layers: {abs(saved):.0%} {'less' if saved >= 0 else 'more'} "
        "training time, "
        f"{100 * (freezing.accuracy - full.accuracy):+.1f} points of accuracy",
        fontsize=11,
        loc="left",
    )
    top.legend(
        handles=[Patch(color=ACTIVE, label="trained"), Patch(color=FROZEN, label="frozen")],
        loc="upper right",
        framealpha=1.0,
    )
    for run, colour, style in ((full, FULL, "--"), (freezing, FROZEN, "-")):
        points = [(step, 100 * value) for step, _, value in run.curve]
        label = f"{run.method}: {100 * run.accuracy:.1f} % in {run.seconds:.0f} s"
        bottom.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=4, label=label)
    bottom.set_xlabel("training steps")
    bottom.set_ylabel("test accuracy, %")
    bottom.grid(alpha=0.3)
    bottom.legend(loc="lower right")
    figure.savefig(path, dpi=130, format="png")


def plot_labels(
    name: str, layers: Sequence[str], cka: NDArray[np.float64], labels: NDArray[np.int8], path: Path
) -> None:
    """CKA curves of one run, and below them which layers are labelled ready to freeze.

    Args:
        name: The run's name, for the title.
        layers: Layer names, in execution order.
        cka: float64 `[num_layers, timestamps]`.
        labels: int8 of the same shape: 1 freeze, 0 keep training, -1 unknown.
        path: Where the PNG goes.
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
    palette = matplotlib.colors.ListedColormap(["#d0d0d0", ACTIVE, FROZEN])
    bottom.imshow(labels, aspect="auto", interpolation="nearest", cmap=palette, vmin=-1, vmax=1)
    every = max(1, len(layers) // 20)
    bottom.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)
    bottom.set_xlabel("timestamps (records)")
    bottom.set_ylabel("layers, input at the top")
    share = (labels == 1).sum() / max(1, (labels >= 0).sum())
    bottom.set_title(f"labels: {share:.0%} ready to freeze", loc="left", fontsize=11)
    bottom.legend(
        handles=[Patch(color=ACTIVE, label="keep training"), Patch(color=FROZEN, label="freeze")],
        loc="lower left",
        framealpha=1.0,
    )
    figure.savefig(path, dpi=130, format="png")
