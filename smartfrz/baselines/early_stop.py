"""Stopping early: what a user would do who has less time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EarlyStop:
    """Full training in a share of its steps, with its whole learning rate schedule.

    Every method that saves time has to beat this one at equal time, since it costs nothing to write. It is no policy:
    it freezes nothing, and what it shortens is your training loop. Whatever your loop counts in steps, pass it
    through `steps`: the length of the run, a warm-up, the milestones of a schedule.

    Args:
        share: Of the steps of full training, in (0, 1].

    Raises:
        ValueError: If the share is outside of (0, 1].

    Example:
        >>> early = EarlyStop(0.6)
        >>> early.steps(1000), early.steps(50)
        (600, 30)

    Source:
        Ours; Li, Yumer and Ramanan 2020 (arXiv 1905.04753) show that a schedule which comes to its end within the budget
        is what matters.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(
                f"`share` is {self.share!r}; expected a share of the steps of full training in (0, 1], such as 0.6."
            )

    @classmethod
    def at_time_of(cls, seconds: float, full_seconds: float) -> "EarlyStop":
        """The one that takes as long as a run of another method did.

        Args:
            seconds: Of that run.
            full_seconds: Of full training, measured beside it. A method that was slower gets full training.

        Raises:
            ValueError: If they are not positive.
        """
        if not (0.0 < seconds < float("inf") and 0.0 < full_seconds < float("inf")):
            raise ValueError(
                f"EarlyStop.at_time_of received seconds={seconds!r}, full_seconds={full_seconds!r}; expected positive "
                "numbers. Measure both runs."
            )
        return cls(min(1.0, seconds / full_seconds))

    def steps(self, number: int) -> int:
        """So many steps of full training, shortened; at least 1."""
        return max(1, round(self.share * number))
