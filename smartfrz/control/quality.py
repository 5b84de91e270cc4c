"""`Calibration`: how much accuracy a run may pay for the time that it saves, and what that was seen to mean."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Accuracy that each quality may cost on average, in percentage points.
TARGETS = {"same": 0.2, "balanced": 0.5, "fast": 1.5}


@dataclass(frozen=True)
class Calibration:
    """What freezing from one threshold on is expected to cost and to save.

    All figures are from whole recorded runs, each judged with thresholds that were chosen without it.

    Attributes:
        threshold: Confidence from which a layer is frozen, in (0, 1].
        points: Expected change of accuracy, in percentage points; negative is worse than full training.
        spread: Standard deviation of that over the runs, in percentage points.
        computation: Share of the operations of full training that are left, in [0, 1].
        runs: Number of runs that this is from.
    """

    threshold: float
    points: float
    spread: float
    computation: float
    runs: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not -(2**63) <= value < 2**63:  # NaN is in no range; math.isfinite takes no large integer
                raise ValueError(f"{field.name} is {value!r:.100}; expected a finite number")
        in_range = 0 < self.threshold <= 1 and self.spread >= 0 and 0 <= self.computation <= 1 and self.runs >= 1
        if not in_range or abs(self.points) > 100 or not isinstance(self.runs, int):
            raise ValueError(
                f"{self} is out of range; expected a threshold in (0, 1], at most 100 points, a spread of at least 0, "
                "computation in [0, 1], and at least one run"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def parse_qualities(value: Any) -> dict[str, Calibration]:
    """Read the qualities of a predictor from plain data; names that this version does not know are left out.

    Raises:
        ValueError: If the data are none.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"the qualities are of type {type(value).__name__}; expected an object")
    known = {field.name for field in fields(Calibration)}
    qualities = {}
    for name in TARGETS:
        if name not in value:
            continue
        facts = value[name]
        if not isinstance(facts, Mapping) or not known <= facts.keys():
            raise ValueError(f"quality {name!r} is {facts!r:.100}; expected an object with {', '.join(sorted(known))}")
        qualities[name] = Calibration(**{key: facts[key] for key in known})
    return qualities


def require_quality(name: str) -> None:
    """Raise `ValueError` if this is no quality."""
    if name not in TARGETS:
        raise ValueError(f"`quality` is {name!r:.100}; expected one of {', '.join(map(repr, TARGETS))}.")
