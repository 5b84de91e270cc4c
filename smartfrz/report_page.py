"""The page of a report: one HTML file that loads nothing else. Reads what `Report.to_dict` returns; needs jinja2."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smartfrz.errors import not_installed

_TEMPLATES = Path(__file__).parent
_WIDE, _NARROW = 30, 17  # characters of a layer's name that fit beside its bar
_SPARKS = 150  # points of the line of confidences in a bar
_ROWS = 60
_MARKS = 60
_PACE = "seconds per step"
_NOTHING = "Nothing was frozen."
_SPLIT = re.compile(r"^(?:train|training|val|valid|validation|eval|test)[_/](?=.)")
_REASONS = {
    "confident": "the predictor was confident",
    "below_threshold": "below the threshold",
    "patience": "above the threshold, but not yet at enough stages in a row",
    "history_too_short": "not judged: too few records so far",
    "no_answer": "not judged: the predictor did not answer",
    "not_finite": "not judged: the weights hold NaN or infinity",
    "behind_live_layer": "ready, but a layer before it is trained",
    "grouped": "ready, but layers freeze at a few stages only, or it does not pay",
    "last_active_layer": "ready, but the last active layer is always kept",
    "by_hand": "thaw() was called",
    "learning_rate_raised": "the learning rate was raised",
    "moved_while_frozen": "it moved although it was frozen",
    "unfrozen_by_user": "the training script set it to be trained again",
    "not_trained": "not judged: nothing trains it",
}
_ACTIONS = {"freeze": "froze", "would_freeze": "would have frozen", "thaw": "thawed"}
_CHANGES = {
    "joined": ("unfrozen by the training script", "watched since"),
    "appeared": ("ran for the first time", "watched since"),
    "left": ("frozen or removed by the training script", "no longer watched"),
}


def page(report: Mapping[str, Any]) -> str:
    """Return a whole page, with a script that shows numbers where the pointer is.

    Args:
        report: What `Report.to_dict` returns, with its `text` and a `title` of one line.

    Raises:
        MissingDependencyError: If jinja2 is not installed.
    """
    return render("report_page.html.jinja", _view(report), data=_for_script(report))


def fragment(report: Mapping[str, Any]) -> str:
    """Return the same without a script, for a notebook that shows it among other cells; see `page`."""
    return render("report_page.html.jinja", _view(report), whole=False)


def render(
    template: str,
    view: Mapping[str, Any],
    *,
    whole: bool = True,
    data: Mapping[str, Any] | None = None,
) -> str:
    """Fill in a template that extends `page.html.jinja`. All text is escaped.

    Args:
        template: Path of the template in this package.
        view: What the template shows, with a `title`.
        whole: Whether to return a page, or a part of one.
        data: What the template's script reads; a page without it may run no script.

    Raises:
        MissingDependencyError: If jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise not_installed("The page of a report", "jinja2", "plots") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(whole=whole, data=data, **view)


def shorten(name: str, most: int) -> str:
    """Return a layer's name in at most so many characters, at least 3.

    Words from the left become initials, as far as need be; then the left is cut off. What tells layers apart stays: the
    last part, and parts with a number.

    Example:
        >>> shorten("vit.encoder.layer.10.attention.attention.query", 30)
        'v.e.l.10.a.attention.query'
        >>> shorten("vit.encoder.layer.10.attention.attention.query", 15)
        '…l.10.a.a.query'
    """
    separator = "/" if "/" in name else "."
    parts = name.split(separator)
    words = [i for i, part in enumerate(parts[:-1]) if not re.search(r"\d", part)]
    short = name
    for index in words:
        if len(short) <= most:
            return short
        parts[index] = parts[index][:1]
        short = separator.join(parts)
    while len(parts) > 2 and len(short) > most and not re.search(r"\d", parts[0]):
        parts = parts[1:]
        short = "…" + separator.join(parts)
    if len(short) <= most:
        return short
    end = (most - 1) // 2
    return short[: most - 1 - end] + "…" + short[len(short) - end :]


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template shows, in words and in percent of the width."""
    steps, layers = report["num_steps"], report["layers"]
    who = "would" if report["dry_run"] else "smartfrz"
    stages = report["stages"]
    rows = []
    for layer in layers:
        spans = [(start, end, who if by == "smartfrz" else by) for start, end, by in report["spans"].get(layer, ())]
        points = [
            (step, value)
            for step, value in zip(stages["steps"], stages["confidence"].get(layer, ()), strict=False)
            if value is not None
        ]
        rows.append(
            {
                "name": layer,
                "wide": shorten(layer, _WIDE),
                "narrow": shorten(layer, _NARROW),
                "spans": [(_percent(a, steps), _percent(b - a, steps), by) for a, b, by in spans if b > a],
                "spark": _path([_every(points, _SPARKS)], steps, -0.12, 1.12, 100),
                "says": _describe_row(layer, spans, points, steps),
            }
        )
    kinds = {by for row in rows for _, _, by in row["spans"]}
    return {
        "title": report["title"],
        "text": report["text"],
        "steps": steps,
        "rows": rows,
        "height": 20 if len(rows) <= 30 else 16 if len(rows) <= 80 else 13,
        "kinds": [kind for kind in ("smartfrz", "would", "user") if kind in kinds],
        "sparks": any(row["spark"] for row in rows),
        "ticks": [(_percent(tick, steps), f"{tick:,}") for tick in _whole_ticks(steps)],
        "marks": [_percent(step, steps) for step in _every(_freezing_steps(report), _MARKS)] if steps else [],
        "tiles": _tiles(report),
        "why_nothing": report["why_nothing"],
        "panels": _panels(report),
        "happened": _happened(report),
    }


def _tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the few numbers to see first: a heading, a number, and what it means."""
    layers, steps, seconds = len(report["layers"]), report["num_steps"], report["seconds"]
    if not steps:
        return []
    stopped = {layer for layer, spans in report["spans"].items() if spans and spans[-1][1] >= steps}
    users = {layer for layer in stopped if report["spans"][layer][-1][2] == "user"}
    own = len(stopped - users)
    saved = report["measured_seconds"]["saved"]
    if saved is not None:
        whole = seconds + max(saved, 0.0)  # without freezing, or as it was
        time = {
            "head": "Time saved, measured" if saved >= 0 else "Time lost, measured",
            "value": f"about {_seconds(abs(saved))} ({abs(saved) / whole:.0%})" if whole > 0 else _seconds(abs(saved)),
            "says": f"A step took {_seconds(report['measured_seconds']['step_before'])} before layers froze and "
            f"{_seconds(report['measured_seconds']['step_after'])} at the end. What SmartFRZ itself took is deducted.",
        }
    else:
        why = (
            "This was a dry run: nothing was really frozen."
            if report["dry_run"]
            else _NOTHING
            if not own and not any(act["action"] == "freeze" for act in report["acts"])
            else "Too few steps were measured before or after layers froze."
        )
        time = {"head": "Time saved, measured", "value": "none" if why == _NOTHING else "unknown", "says": why}
    flops = report["backward_flops"]
    return [
        time,
        {
            "head": "Backward computation saved",
            "value": f"{report['backward_flops_saved'] / flops:.0%}" if flops else "unknown",
            "says": (
                "Estimated from floating point operations" + (", had it been no dry run." if report["dry_run"] else ".")
            )
            if flops
            else "Operations of these layers cannot be counted.",
        },
        {
            "head": "Would be frozen at the end" if report["dry_run"] else "Frozen at the end",
            "value": f"{own} of {layers} layers",
            "says": f"{len(users)} more were frozen by the training script."
            if users
            else "By the predictor or policy.",
        },
        {
            "head": "Run",
            "value": f"{steps:,} steps in {_seconds(seconds)}",
            "says": f"Recording and deciding took {_seconds(report['decision_seconds'])} of that.",
        },
    ]


def _panels(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one picture for each kind of number, loss and accuracy first, the pace last."""
    groups: dict[str, dict[str, Sequence[Any]]] = {}
    for name, points in report["curves"].items():
        drawn = [(step, _drawable(value)) for step, value in points]
        if any(value is not None for _, value in drawn):
            groups.setdefault(_SPLIT.sub("", name), {})[name] = drawn
    order = sorted(groups, key=lambda name: ("loss" not in name.lower(), "acc" not in name.lower(), name))
    if report["measured_seconds"]["steps"]:
        groups[_PACE] = {_PACE: report["measured_seconds"]["steps"]}
        order = [*order, _PACE]
    return [_panel(name, groups[name], report["num_steps"]) for name in order]


def _drawable(value: float | None) -> float | None:
    """Return a value that a scale of floats can hold: a loss may diverge up to their limits, or underflow."""
    if value is None or abs(value) > 1e300:
        return None
    return value if abs(value) > 1e-300 else 0.0


def _panel(title: str, curves: Mapping[str, Sequence[Any]], steps: int) -> dict[str, Any]:
    values = [value for points in curves.values() for _, value in points if value is not None]
    # A loss of the first steps, or a step that held an evaluation, would flatten all the rest.
    usual = sorted(values)[int(0.95 * (len(values) - 1))]
    marks = ticks(min(values), usual + min(max(values) - usual, 0.5 * abs(usual)))
    if title == _PACE:
        marks = ticks(0.0, marks[-1])
    low, high = marks[0], marks[-1]
    cut = max(values) > high
    lines = []
    for name, points in curves.items():
        pieces: list[list[tuple[int, float]]] = [[]]
        for step, value in points:
            if value is None:
                pieces.append([])
            else:
                pieces[-1].append((step, min(value, high)))
        dots = sum(map(len, pieces)) <= 60
        lines.append(
            {
                "name": name,
                "path": _path(pieces, steps, low, high, 1000),
                "dots": "".join(_path([[point]], steps, low, high, 1000) for piece in pieces for point in piece)
                if dots
                else "",
            }
        )
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    return {
        "title": title,
        "cut": f"highest value {max(values):.4g}, cut off" if cut else "",
        "lines": lines,
        "ticks": [(round(100 - _percent(tick - low, high - low), 2), f"{tick:.{digits}f}") for tick in marks],
    }


def _happened(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what froze and thawed and why, one row for each step and reason."""
    groups: dict[tuple[int, str, str], list[tuple[str, float | None]]] = {}
    for act in report["acts"]:
        step = act["step"] if act["since"] is None else act["since"]
        key = step, _ACTIONS[act["action"]], _REASONS.get(act["reason"], act["reason"].replace("_", " "))
        groups.setdefault(key, []).append((act["layer"], act["confidence"]))
    for step, change, layer in report["layer_changes"]:
        groups.setdefault((step, *_CHANGES[change]), []).append((layer, None))
    rows = []
    for (step, action, reason), members in sorted(groups.items(), key=lambda item: item[0][0]):
        sure = [confidence for _, confidence in members if confidence is not None]
        names = [layer for layer, _ in members]
        rows.append(
            {
                "step": f"{step:,}",
                "layers": names[:6],
                "more": max(0, len(names) - 6),
                "what": f"{action}: {reason}",
                "confidence": ""
                if not sure
                else f"{min(sure):.3f}"
                if len(sure) == 1 or f"{min(sure):.3f}" == f"{max(sure):.3f}"
                else f"{min(sure):.3f} to {max(sure):.3f}",
            }
        )
    return {"rows": rows[:_ROWS], "more": max(0, len(rows) - _ROWS)}


def _for_script(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the script shows where the pointer is."""
    stages = report["stages"]
    codes = list(_REASONS)
    return {
        "steps": report["num_steps"],
        "dry": report["dry_run"],
        "layers": report["layers"],
        "spans": [report["spans"].get(layer, []) for layer in report["layers"]],
        "stages": stages["steps"],
        "confidence": [stages["confidence"].get(layer) for layer in report["layers"]],
        "threshold": [_squeeze(stages["threshold"].get(layer)) for layer in report["layers"]],
        "reason": [
            _squeeze([codes.index(r) if r in codes else None for r in stages["reason"].get(layer, ())])
            for layer in report["layers"]
        ],
        "reasons": list(_REASONS.values()),
        "curves": [
            {"lines": [{"name": name, "points": list(points)} for name, points in group]}
            for group in _curve_groups(report)
        ],
    }


def _curve_groups(report: Mapping[str, Any]) -> list[list[tuple[str, Sequence[Any]]]]:
    known = {**report["curves"], _PACE: report["measured_seconds"]["steps"]}
    return [[(line["name"], known[line["name"]]) for line in panel["lines"]] for panel in _panels(report)]


def _squeeze(values: Sequence[Any] | None) -> Any:
    """Return the one value if all known ones are the same, which is smaller."""
    known = {value for value in values or () if value is not None}
    return (next(iter(known)) if known else None) if len(known) <= 1 else list(values or ())


def _freezing_steps(report: Mapping[str, Any]) -> list[int]:
    return sorted({step for step, action, _ in report["changes"] if action != "thaw"})


def _describe_row(
    layer: str, spans: Sequence[tuple[int, int, str]], points: Sequence[tuple[int, float]], steps: int
) -> str:
    by = {"smartfrz": "frozen by SmartFRZ", "would": "would have been frozen", "user": "frozen by the training script"}
    told = [
        f"{by[who]} from step {start:,}" + (f" to {end:,}" if end < steps else "") for start, end, who in spans
    ] or ["trained all the time"]
    if points:
        told.append(f"confidence {points[-1][1]:.3f} at step {points[-1][0]:,}")
    return f"{layer}: {'; '.join(told)}"


def _path(pieces: Iterable[Sequence[tuple[int, float]]], steps: int, low: float, high: float, size: int) -> str:
    """Return the path of a curve in a square of that size; a dot where a piece has one point."""
    told = []
    for points in pieces:
        at = [
            f"{size * step / max(steps, 1):.5g} {size * (1 - (value - low) / (high - low)):.4g}"
            for step, value in points
        ]
        if at:
            told.append("M" + "L".join(at) + ("h0" if len(at) == 1 else ""))
    return "".join(told)


def _every(items: Sequence[Any], most: int) -> list[Any]:
    return list(items[:: math.ceil(len(items) / most)]) if items else []


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 3) if whole else 0.0


def ticks(low: float, high: float) -> list[float]:
    """Return about four round numbers that enclose these values.

    Example:
        >>> ticks(0.0, 5.0)
        [0.0, 2.0, 4.0, 6.0]
    """
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - (abs(low) or 1.0) / 20, high + (abs(high) or 1.0) / 20
    size = _round_size((high - low) / 3)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [index * size for index in range(first, last + 1)]


def _whole_ticks(steps: int) -> list[int]:
    if not steps:
        return []
    return list(range(0, steps + 1, max(1, round(_round_size(steps / 7)))))


def _round_size(wish: float) -> float:
    power = 10.0 ** math.floor(math.log10(wish))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wish * 0.999)


def _seconds(seconds: float) -> str:
    if abs(seconds) >= 7200:
        return f"{seconds / 3600:.1f} h"
    if abs(seconds) >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if abs(seconds) >= 0.1 else f"{1e3 * seconds:.3g} ms"
