"""Stopping early: what a user with less time would do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EarlyStop:
    """Full training in a share of its steps, with its whole learning rate schedule.

    Every method that saves time has to beat this one at equal time, since it needs no method at all. It is not a
    policy: it freezes nothing, and what it shortens is your training loop. Pass every number of steps in your loop
    through `steps`: the length of the run, a warm-up, the milestones of a schedule.

    Args:
        share: Share of the steps of full training, in (0, 1].

    Raises:
        ValueError: If the share is outside of (0, 1].

    Example:
        >>> early = EarlyStop(0.6)
        >>> early.steps(1000), early.steps(50)
        (600, 30)

    Source:
        Ours. Li, Yumer and Ramanan 2020 (arXiv 1905.04753) show that it matters most that the schedule comes to its
        end within the budget.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(
                f"`share` is {self.share!r}; expected a share of the steps of full training in (0, 1], such as 0.6."
            )

    @classmethod
    def at_time_of(cls, seconds: float, full_seconds: float) -> "EarlyStop":
        """Make the one that takes as long as a run of another method.

        Args:
            seconds: Time that the other method took.
            full_seconds: Time of full training, measured under the same conditions. If the other method was slower,
                the share is 1.

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
        """Return the shortened number of steps, at least 1."""
        return max(1, round(self.share * number))
