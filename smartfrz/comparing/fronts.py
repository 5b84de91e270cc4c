"""The picture of a comparison: what is lost for how much time, by freezing and by fewer steps. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from smartfrz.comparing.verdict import Figures, Verdict
from smartfrz.files import replacing

_COLOURS = {"full": "#7d8597", "freezing": "#2f6690", "fewer": "#d1495b"}
_LABELS = {"full": "full training", "freezing": "SmartFRZ", "fewer": "full training in fewer steps"}
# Where a name stands beside its point: of freezing in turns to the left and to the right, as its points are close together.
_PLACES = {"full": [(6, 7, "left")], "fewer": [(8, -12, "left")], "freezing": [(-7, 7, "right"), (7, -13, "left")]}


def draw_fronts(verdict: Verdict, title: str) -> Figure:
    """Draw what each method gains or loses against full training, over its training time.

    One line is the front of freezing, the other that of fewer steps. Bars are the standard deviation over the seeds.

    Returns:
        A figure that no window shows.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    full, scale = verdict.figures[0], verdict.scale
    axes.axhspan(
        -scale * verdict.tolerance,
        0,
        color=_COLOURS["full"],
        alpha=0.15,
        linewidth=0,
        label="a loss that counts as none",
    )
    for kind in ("full", "fewer", "freezing"):
        chosen = sorted((one for one in verdict.figures if one.kind == kind), key=lambda one: one.time.mean)
        if chosen:
            ends = [*chosen, full] if kind == "fewer" else chosen
            axes.plot(*_points(ends, scale), color=_COLOURS[kind], alpha=0.4, zorder=1)
            _draw(axes, chosen, kind, scale)
    clock = "processor time" if verdict.clock == "cpu_seconds" else "training time"
    axes.set_xlabel(f"{clock}, % of full training")
    axes.set_ylabel(f"{verdict.metric} against full training{', points' if verdict.is_share else ''}")
    seeds = f"{full.metric.seeds} seed{'s' if full.metric.seeds > 1 else ''}"
    axes.set_title(f"{title}, {seeds}: full training reaches {_reached(verdict)}", loc="left", fontsize=11)
    axes.margins(0.16)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _reached(verdict: Verdict) -> str:
    text = verdict.figures[0].metric.text(verdict.scale, verdict.digits)
    return f"{text} %" if verdict.is_share else text


def _points(figures: Sequence[Figures], scale: float) -> tuple[list[float], list[float]]:
    return [100 * one.time.mean for one in figures], [scale * one.difference.mean for one in figures]


def _draw(axes: Any, figures: Sequence[Figures], kind: str, scale: float) -> None:
    axes.errorbar(
        *_points(figures, scale),
        xerr=[100 * (one.time.deviation or 0.0) for one in figures],
        yerr=[scale * (one.difference.deviation or 0.0) for one in figures],
        fmt="o",
        color=_COLOURS[kind],
        capsize=3,
        label=_LABELS[kind],
    )
    for index, one in enumerate(figures):
        x, y, side = _PLACES[kind][index % len(_PLACES[kind])]
        name = one.method.removeprefix("SmartFRZ ").removesuffix(" of the steps")
        point = (100 * one.time.mean, scale * one.difference.mean)
        axes.annotate(name, point, textcoords="offset points", xytext=(x, y), ha=side, fontsize=8)


def save_fronts(verdict: Verdict, title: str, path: Path) -> None:
    """Write the picture as PNG."""
    figure = draw_fronts(verdict, title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
