"""Loss, accuracy and other numbers of a run, as far as somebody told them."""

from collections.abc import Iterator, Mapping
from typing import Any

_MAX_POINTS = 4000


class Curves:
    """Numbers over training steps, one curve for each name.

    A curve that grows beyond 4,000 points loses every second one.
    """

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[int, float]]] = {}

    def note(self, step: int, values: Mapping[str, Any], *, only_new: bool = False) -> None:
        """Add one point to each of these curves.

        Args:
            step: Optimizer steps so far.
            values: A number for each name: a float, or an array or tensor of one element.
            only_new: Leave out values that a curve already ends with, where a framework repeats the latest ones.

        Raises:
            TypeError: If a value is no number.
        """
        for name, value in values.items():
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"The value of {name!r} is {type(value).__name__} {value!r:.60}; expected a number, such as loss.item()."
                ) from error
            points = self._points.setdefault(name, [])
            if only_new and points and points[-1][1] == number:
                continue
            if points and points[-1][0] == step:
                points[-1] = (step, number)
                continue
            points.append((step, number))
            if len(points) > _MAX_POINTS:
                del points[1:-1:2]

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def copy(self) -> dict[str, list[tuple[int, float]]]:
        """Return the points (step, value) of each curve."""
        return {name: list(points) for name, points in self._points.items()}


def chosen_from(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is worth a curve among the logs of a framework: no times, rates of progress or numbers of ours."""
    boring = ("runtime", "per_second", "epoch", "learning_rate", "grad_norm", "total_flos", "smartfrz/", "lr-")
    return {
        name: value
        for name, value in logs.items()
        if not any(word in name for word in boring) and name != "step" and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return getattr(value, "shape", None) == ()  # an array or a tensor
