"""Full training: nothing is frozen."""

from smartfrz.control.policy import Policy


class FullTraining(Policy):
    """Freezes nothing. Full training then takes the same path through the code as the methods it is compared with."""

    name = "full-training"
