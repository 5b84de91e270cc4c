"""Notices that a learning rate schedule has started again."""

from collections.abc import Sequence

# A learning rate counts as restarted once it is this many times its lowest value since something
# froze, and at least this share of its highest value so far.
RESTART_RATIO = 2.0
RESTART_SHARE = 0.05


class RestartWatch:
    """Watches the learning rate of each parameter group."""

    def __init__(self) -> None:
        self._lowest: list[float] = []
        self._highest: list[float] = []

    def is_restart(self, rates: Sequence[float], *, frozen: bool) -> bool:
        """Note the current learning rates, and return whether one of them was raised again.

        Args:
            rates: The learning rate of each parameter group.
            frozen: Whether any layer is frozen. A warm-up before that is no restart.
        """
        if len(rates) != len(self._highest):
            self._highest, self._lowest = list(rates), []
        self._highest = [max(a, b) for a, b in zip(self._highest, rates, strict=True)]
        if not frozen or len(rates) != len(self._lowest):
            self._lowest = list(rates)
        raised = any(
            now > RESTART_RATIO * lowest and now > RESTART_SHARE * highest
            for now, lowest, highest in zip(rates, self._lowest, self._highest, strict=True)
        )
        self._lowest = [min(a, b) for a, b in zip(self._lowest, rates, strict=True)]
        return raised

    def state(self) -> list[list[float]]:
        """Return plain data for a saved state."""
        return [list(self._lowest), list(self._highest)]

    def load_state(self, state: Sequence[Sequence[float]]) -> None:
        """Continue from what `state` returned."""
        self._lowest, self._highest = (list(rates) for rates in state)
