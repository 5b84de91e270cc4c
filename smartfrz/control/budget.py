"""How much of a run asking a predictor may take."""

import logging
import time

logger = logging.getLogger("smartfrz")
SHARE = 0.05  # of the time since the run began; a shipped predictor takes less than a thousandth
ALLOWANCE = 60.0  # seconds, which are always granted
clock = time.monotonic


class AskingBudget:
    """Seconds that asking may take: `ALLOWANCE`, and from there on `SHARE` of the time since the run began.

    Each question has a deadline of its own, but a run asks up to 10,000 times.
    """

    def __init__(self) -> None:
        self._began = clock()
        self._spent = 0.0
        self._said = False

    def allows(self, *, freezes: bool = True) -> bool:
        """Return whether the predictor may be asked now. The first time that it may not is logged.

        Args:
            freezes: Whether layers may freeze at this stage. Once the budget was exceeded, other stages are left out.
        """
        passed = clock() - self._began
        if self._spent <= max(ALLOWANCE, SHARE * passed):
            return freezes or not self._said
        if not self._said:
            self._said = True
            logger.warning(
                "SmartFRZ: asking the predictor took %.0f s of the %.0f s since this run began; expected at most %g s, or "
                "%.0f %% of a longer run. It is asked at fewer freezing stages from here on, so that layers freeze later. "
                "Use a predictor or a server that answers faster.",
                self._spent,
                passed,
                ALLOWANCE,
                100 * SHARE,
            )
        return False

    def __enter__(self) -> None:
        self._asked = clock()

    def __exit__(self, *error: object) -> None:
        self._spent += clock() - self._asked
