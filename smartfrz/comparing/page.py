"""The page of a comparison: one HTML file that loads nothing else, without a script. Needs jinja2."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from smartfrz.comparing.verdict import Figures, Verdict
from smartfrz.files import replacing
from smartfrz.report_page import render, ticks

_KINDS = {"full": "full training", "fewer": "full training in fewer steps", "freezing": "SmartFRZ"}
_CHARACTER, _LINE = 6.6, 14.0  # size of a letter of 12 pixels and of its line
_DOT = 5.0
# Where a name may stand beside its point: the side on which the point is, and how far below the point its middle is.
_PLACES = [
    (side, down)
    for down in (-12.0, 14.0, -26.0, 28.0, -40.0, 42.0, -54.0, 56.0, -68.0, 70.0)
    for side in ("end", "start")
]


class _Size(NamedTuple):
    """A picture in pixels, the margins around its area, and the longest name in characters."""

    width: float
    height: float
    left: float = 52.0
    right: float = 16.0
    top: float = 12.0
    bottom: float = 40.0
    name: int = 44


_WIDE, _NARROW = _Size(1000, 400), _Size(360, 320, left=44, name=20)


@dataclass(frozen=True)
class _Box:
    """A rectangle that is taken."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "_Box") -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


def save_page(verdict: Verdict, facts: Mapping[str, str], title: str, path: Path) -> None:
    """Write the page.

    Args:
        verdict: What the comparison says.
        facts: What was run, in words: a heading and a text each.
        title: Name of the task.
        path: File to write.

    Raises:
        MissingDependencyError: If jinja2 is not installed.
    """
    text = render("comparing/page.html.jinja", _view(verdict, facts, title))
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def _view(verdict: Verdict, facts: Mapping[str, str], title: str) -> dict[str, Any]:
    """Return what the template shows."""
    header, *rows = verdict.table()
    clock = "processor time" if verdict.clock == "cpu_seconds" else "training time"
    kinds = [one.kind for one in verdict.figures]
    return {
        "title": f"Will SmartFRZ help? {title}",
        "sentence": verdict.sentence.replace(" %", "\N{NO-BREAK SPACE}%"),
        "notes": verdict.notes,
        "header": header,
        "rows": list(zip(kinds, rows, strict=True)),
        "kinds": [(kind, words) for kind, words in _KINDS.items() if kind in kinds],
        "heading": f"{verdict.metric[:1].upper()}{verdict.metric[1:]} against full training",
        "unit": "points" if verdict.is_share else verdict.metric,
        "clock": clock,
        "pictures": [("wide", _picture(verdict, rows, _WIDE)), ("narrow", _picture(verdict, rows, _NARROW))],
        "facts": facts,
    }


def _picture(verdict: Verdict, rows: Sequence[tuple[str, ...]], size: _Size) -> dict[str, Any]:
    """Return one picture of both fronts: all coordinates in pixels, and where each name stands."""
    scale, figures = verdict.scale, verdict.figures
    across = [100 * (one.time.mean + sign * (one.time.deviation or 0.0)) for one in figures for sign in (-1, 1)]
    up = [scale * (one.difference.mean + sign * (one.difference.deviation or 0)) for one in figures for sign in (-1, 1)]
    first, last = _range(min(*across, 50.0), max(*across, 100.0), 0.06)
    low, high = _range(min(*up, -scale * verdict.tolerance), max(*up, 0.0), 0.14)  # names stand above and below

    def x(share: float) -> float:
        return round(size.left + (size.width - size.left - size.right) * (share - first) / (last - first), 1)

    def y(difference: float) -> float:
        return round(size.top + (size.height - size.top - size.bottom) * (high - difference) / (high - low), 1)

    def place(one: Figures) -> tuple[float, float]:
        return x(100 * one.time.mean), y(scale * one.difference.mean)

    points, bars = [], []
    for one, row in zip(figures, rows, strict=True):
        aside, above = 100 * (one.time.deviation or 0.0), scale * (one.difference.deviation or 0.0)
        at, level = 100 * one.time.mean, scale * one.difference.mean
        left, right, top, bottom = x(at - aside), x(at + aside), y(level + above), y(level - above)
        bars += [(left, y(level) - 2, right, y(level) + 2), (x(at) - 2, top, x(at) + 2, bottom)]
        points.append(
            {
                "kind": one.kind,
                "at": place(one),
                "bars": f"M{left} {y(level)}H{right}M{x(at)} {top}V{bottom}",
                "says": _describe(verdict, one, row),
            }
        )
    fronts = []
    for kind in ("fewer", "freezing"):
        ends = sorted((one for one in figures if one.kind == kind), key=lambda one: one.time.mean)
        ends += figures[:1] if kind == "fewer" else []
        if len(ends) > 1:
            fronts.append((kind, "M" + "L".join(f"{a} {b}" for a, b in map(place, ends))))
    ups = _ticks_within(low, high)
    digits = max(0, -math.floor(math.log10(ups[1] - ups[0]) + 1e-9))
    return {
        "size": size,
        "points": points,
        "names": _place_names([(one, place(one)) for one in figures], bars, size),
        "fronts": fronts,
        "band": (y(0.0), round(y(-scale * verdict.tolerance) - y(0.0), 1)),
        "across": [(x(tick), f"{tick:g} %") for tick in _ticks_within(first, last)],
        "up": [(y(tick), f"{tick:+.{digits}f}" if tick else "0") for tick in ups],
    }


def _range(low: float, high: float, margin: float) -> tuple[float, float]:
    """Leave some room on both sides."""
    room = margin * (high - low) or 1.0
    return low - room, high + room


def _ticks_within(low: float, high: float) -> list[float]:
    """Return about six round numbers between these values."""
    first, second, *_ = ticks(0.0, (high - low) / 2)
    size = second - first
    return [index * size for index in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _place_names(
    points: Sequence[tuple[Figures, tuple[float, float]]], bars: Sequence[tuple[float, ...]], size: _Size
) -> list[dict[str, Any]]:
    """Put each name beside its point, where it covers no other name, point or bar, and nothing outside of the area."""
    taken = [_Box(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for _, (x, y) in points]
    thin = [_Box(*bar) for bar in bars]
    placed = []
    for one, (x, y) in points:
        name = _short(one, size.name)
        width = _CHARACTER * len(name)
        choices: list[tuple[float, int, _Box, str]] = []
        for side, down in _PLACES:
            left = x - 7 - width if side == "end" else x + 7
            box = _Box(left, y + down - _LINE / 2, left + width, y + down + _LINE / 2)
            inside = _Box(size.left, size.top, size.width, size.height - size.bottom).overlap(box)
            choices.append(
                (
                    _LINE * width - inside + 4 * sum(map(box.overlap, taken)) + sum(map(box.overlap, thin)),
                    len(choices),
                    box,
                    side,
                )
            )
        _, index, box, side = min(choices, key=lambda choice: choice[:2])
        taken.append(box)
        down = _PLACES[index][1]
        placed.append(
            {
                "kind": one.kind,
                "name": name,
                "anchor": side,
                "at": (round(x + (-7 if side == "end" else 7), 1), round(y + down + 4, 1)),
                "line": f"M{x} {y}L{x + (-6 if side == 'end' else 6)} {y + down}" if abs(down) > _LINE else "",
            }
        )
    return placed


def _short(one: Figures, most: int) -> str:
    name = one.method.removesuffix(" of the steps")
    if name != "SmartFRZ":
        name = name.removeprefix("SmartFRZ ")
    return name if len(name) <= most else name[: most - 1] + "…"


def _describe(verdict: Verdict, one: Figures, row: Sequence[str]) -> str:
    metric = f"{verdict.metric} {row[2]}{' %' if verdict.is_share else ''}"
    if one.kind == "full":
        return f"{one.method}: {metric}"
    return f"{one.method}: {metric} ({row[3]}) in {row[4]} % of full training's time"
