"""What the runs of a comparison say: figures over the seeds, one sentence, and what limits its worth."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# One-sided quantiles of Student's t at 95 %, by degrees of freedom; beyond these the normal distribution's is close.
_STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81, 1.80, 1.78, 1.77, 1.76, 1.75)
_NORMAL = 1.64
CLOCKS_AGREE = 0.05  # share of full training's time by which the two clocks may differ before a note says so
POINTS = 0.5  # default tolerance for a metric between 0 and 1
RELATIVE = 0.01  # default tolerance for another metric, as a share of full training's


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds.

    Attributes:
        mean: Mean over the seeds.
        deviation: Standard deviation over the seeds; None for one seed.
        seeds: How many there are.
    """

    mean: float
    deviation: float | None
    seeds: int

    @classmethod
    def over(cls, values: Sequence[float]) -> "Spread":
        """Mean and standard deviation of one value a seed."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    @property
    def margin(self) -> float:
        """How far the true mean may lie to one side, at 95 %; infinite for one seed."""
        if self.deviation is None:
            return math.inf
        quantile = _STUDENT[self.seeds - 2] if self.seeds - 2 < len(_STUDENT) else _NORMAL
        return quantile * self.deviation / math.sqrt(self.seeds)

    def text(self, scale: float = 1.0, digits: int = 0, sign: bool = False) -> str:
        """Show `71 ± 4`, or `71` for one seed."""
        rounded = round(scale * self.mean, digits) + 0.0  # no minus before a zero
        mean = f"{rounded:{'+' if sign else ''}.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {scale * self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Figures:
    """What one method took and reached, beside full training with the same seeds.

    Attributes:
        method: Name of the method.
        kind: `full`, `freezing` or `fewer` (full training in fewer steps).
        steps: Steps of each run.
        metric: The task's metric on the test data.
        difference: Metric minus that of full training with the same seed.
        time: Training time as a share of full training's, by the clock that counts.
        other_time: The same by the other clock.
        seconds: Training time by the clock that counts.
        frozen: Layers that were frozen at the end, as a share of all; None if the method freezes nothing.
        diverged: Runs whose loss was no finite number at the end.
    """

    method: str
    kind: str
    steps: int
    metric: Spread
    difference: Spread
    time: Spread
    other_time: Spread
    seconds: Spread
    frozen: Spread | None
    diverged: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a comparison says.

    Attributes:
        sentence: The result.
        notes: What limits its worth, a sentence or two each.
        figures: Figures of the methods, full training first.
        metric: Name of the metric.
        is_share: Whether the metric is a share, which is shown in percent and points.
        tolerance: Loss of the metric that counts as none.
        clock: `cpu_seconds` or `train_seconds`, the clock that counts.
    """

    sentence: str
    notes: list[str]
    figures: list[Figures]
    metric: str
    is_share: bool
    tolerance: float
    clock: str

    @property
    def scale(self) -> float:
        """What the metric is multiplied by to be shown."""
        return 100.0 if self.is_share else 1.0

    @property
    def digits(self) -> int:
        """Digits behind the point with which the metric is shown."""
        return _digits(self.figures[0].metric.mean, self.is_share)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    def table(self) -> list[tuple[str, ...]]:
        """Rows of the comparison, the header first."""
        unit = ", %" if self.is_share else ""
        other = "by the clock" if self.clock == "cpu_seconds" else "processor"
        rows: list[tuple[str, ...]] = [
            ("", "steps", f"{self.metric}{unit}", "difference", "time, %", f"{other}, %", "seconds", "layers frozen, %")
        ]
        for one in self.figures:
            is_full = one.kind == "full"
            rows.append(
                (
                    one.method,
                    str(one.steps),
                    one.metric.text(self.scale, self.digits),
                    "" if is_full else one.difference.text(self.scale, self.digits, sign=True),
                    "100" if is_full else one.time.text(100),
                    "100" if is_full else one.other_time.text(100),
                    one.seconds.text(digits=1),
                    "" if one.frozen is None else one.frozen.text(100),
                )
            )
        return rows


def judge(
    lines: Sequence[Mapping[str, Any]],
    metric: str = "accuracy",
    tolerance: float | None = None,
    clock: str = "cpu_seconds",
    chance: float | None = None,
) -> Verdict:
    """Judge the runs of a comparison.

    Args:
        lines: Results as `smartfrz.comparing.study.run_study` writes them. Seeds that lack full training are left out.
        metric: Name of the metric.
        tolerance: Loss that counts as none: in points for a metric between 0 and 1, else in the metric's own unit. None
            for 0.5 points, or 1 % of what full training reaches.
        clock: The clock that counts: `cpu_seconds`, which other programs on the machine hardly change, or
            `train_seconds` for what a GPU does.
        chance: What a model that has learned nothing may reach by luck; None if that is not known.

    Raises:
        ValueError: If no seed has a run of full training and another one.
    """
    full = {line["seed"]: line for line in lines if line["kind"] == "full"}
    beside = [line for line in lines if line["seed"] in full]
    names = list(dict.fromkeys(line["method"] for line in sorted(beside, key=lambda line: line["kind"] != "full")))
    if len(names) < 2:
        raise ValueError(f"Received runs of {names}; expected full training and another method with the same seed.")
    figures = [_figures([line for line in beside if line["method"] == name], full, clock) for name in names]
    is_share = all(0 <= line["accuracy"] <= 1 for line in beside)
    if tolerance is None:
        tolerance = POINTS / 100 if is_share else RELATIVE * abs(figures[0].metric.mean)
    elif is_share:
        tolerance /= 100
    words = _Words(figures, metric, is_share, tolerance, chance)
    return Verdict(words.sentence(), words.notes(clock), figures, metric, is_share, tolerance, clock)


def _figures(lines: Sequence[Mapping[str, Any]], full: Mapping[int, Mapping[str, Any]], clock: str) -> Figures:
    other = "train_seconds" if clock == "cpu_seconds" else "cpu_seconds"
    freezes = lines[0]["kind"] == "freezing"
    return Figures(
        lines[0]["method"],
        lines[0]["kind"],
        lines[0]["steps"],
        Spread.over([line["accuracy"] for line in lines]),
        Spread.over([line["accuracy"] - full[line["seed"]]["accuracy"] for line in lines]),
        Spread.over([time_share(line, clock) for line in lines]),
        Spread.over([time_share(line, other) for line in lines]),
        Spread.over([line[clock] for line in lines]),
        Spread.over([len(line["frozen"]) / max(1, len(line["layers"])) for line in lines]) if freezes else None,
        sum(line.get("diverged", False) for line in lines),
    )


def time_share(line: Mapping[str, Any], clock: str) -> float:
    """Training time as a share of what full training would have taken at the same time."""
    return float(line[clock] / max(line["full_steps"] * line["pace"][clock], 1e-9))


class _Words:
    """Puts figures into words."""

    def __init__(self, figures: Sequence[Figures], metric: str, is_share: bool, tolerance: float, chance: float | None):
        self.full, self.metric, self.is_share, self.tolerance = figures[0], metric, is_share, tolerance
        self.freezing = [one for one in figures if one.kind == "freezing"]
        self.fewer = [one for one in figures if one.kind == "fewer"]
        self.digits, self.chance = _digits(figures[0].metric.mean, is_share), chance

    def sentence(self) -> str:
        if self.is_share and self.chance is not None and self.full.metric.mean <= self.chance:
            reached = self.full.metric.text(100, self.digits)
            return (
                f"Full training learned nothing: it reaches {reached} %, and a model that always "
                "gives the same answer may reach as much; nothing can be said about freezing before it learns."
            )
        said = self._sentence()
        return said if self.full.metric.seeds > 1 else f"{said.removesuffix('.')}; the spread over seeds is unknown."

    def _sentence(self) -> str:
        chosen = self._chosen()
        if chosen is None:
            return f"{'; '.join(map(self._of_fewer, self.fewer))}; SmartFRZ was not tried."
        parts = [self._of_freezing(chosen)]
        better = [
            e for e in self.fewer if e.time.mean <= chosen.time.mean and e.difference.mean >= chosen.difference.mean
        ]
        if better:
            best = max(better, key=lambda one: one.difference.mean)
            parts.append(f"training {best.method} did at least as well in {_percent(best.time)} of the time")
        elif self.fewer:
            parts.append(self._of_fewer(min(self.fewer, key=lambda one: abs(one.time.mean - chosen.time.mean))))
        return "; ".join(parts) + "."

    def _chosen(self) -> Figures | None:
        """The fastest that keeps the metric; if none does, the one that loses least."""
        sound = [one for one in self.freezing if not one.diverged] or self.freezing
        keeping = [one for one in sound if one.difference.mean >= -self.tolerance]
        if keeping:
            return min(keeping, key=lambda one: one.time.mean)
        return max(sound, key=lambda one: one.difference.mean, default=None)

    def _of_freezing(self, one: Figures) -> str:
        time, name = _percent(one.time), one.method
        if one.diverged:
            return f"{name} diverged in {one.diverged} of {one.difference.seeds} runs, whose loss was no finite number"
        if one.frozen is not None and not one.frozen.mean:
            why = "so it does not help" if one.time.mean >= 1 else "which is chance: it saves nothing here"
            return f"{name} froze nothing here and took {time} of full training's time, {why}"
        if one.difference.seeds == 1:
            start = f"With one seed, {name} took {time} of full training's time and {self._ended(one)}"
        elif one.difference.mean - one.difference.margin >= -self.tolerance:
            start = f"{name} reaches full training's {self.metric} in {time} of its time ({self._difference(one)})"
        elif one.difference.mean < -self.tolerance and one.difference.mean + one.difference.margin < 0:
            start = f"{name} loses {self._amount(one.difference)} in {time} of full training's time"
        else:
            start = (
                f"{name} took {time} of full training's time and {self._ended(one)}, but {one.difference.seeds} seeds "
                f"are too few to tell whether it stays within {self._plain(self.tolerance)}"
            )
        return start if one.time.mean < 1 else f"{start}, so it saves no time"

    def _of_fewer(self, one: Figures) -> str:
        if one.diverged:
            return f"training {one.method} diverged"
        if one.difference.mean < 0:
            return f"training {one.method} loses {self._amount(one.difference)}"
        return f"training {one.method} loses nothing ({self._difference(one)})"

    def _ended(self, one: Figures) -> str:
        if round(abs(one.difference.mean) * (100 if self.is_share else 1), self.digits) == 0:
            return f"ended at the same {self.metric}"
        return f"ended {self._amount(one.difference)} {'below' if one.difference.mean < 0 else 'above'} it"

    def _difference(self, one: Figures) -> str:
        text = one.difference.text(100 if self.is_share else 1, self.digits, sign=True)
        return f"{text} points" if self.is_share else text

    def _amount(self, difference: Spread) -> str:
        size = Spread(abs(difference.mean), difference.deviation, difference.seeds)
        text = size.text(100 if self.is_share else 1, self.digits)
        return f"{text} points" if self.is_share else f"{text} of {self.metric}"

    def _plain(self, value: float) -> str:
        return f"{100 * value:.1f} points" if self.is_share else f"{value:.{self.digits}f}"

    def notes(self, clock: str) -> list[str]:
        seeds = self.full.metric.seeds
        if seeds == 1:
            notes = [
                "One seed: how much of a difference is chance is not known, and another seed may turn it round. The same "
                "command with --seeds 3 goes on from here."
            ]
        else:
            notes = [
                f'Behind ± stands the standard deviation over {seeds} seeds. "Reaches" means that with 95 % confidence '
                f"the mean loss is at most {self._plain(self.tolerance)}."
            ]
        apart = [one for one in self.freezing if abs(one.time.mean - one.other_time.mean) > CLOCKS_AGREE]
        if apart:
            used, other = ("processor time", "the clock") if clock == "cpu_seconds" else ("the clock", "processor time")
            times = f"{_percent(apart[0].time)} by {used}, but {_percent(apart[0].other_time)} by {other}"
            notes.append(
                f"{apart[0].method} took {times}: other programs ran beside, or the processors were not all busy. On a "
                "quiet machine believe the clock."
            )
        return notes


def _percent(share: Spread) -> str:
    return f"{share.text(100)} %"


def _digits(mean: float, is_share: bool) -> int:
    if is_share:
        return 1
    return max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 2


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
