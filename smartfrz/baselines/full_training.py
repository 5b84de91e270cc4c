"""Nothing is frozen."""

from smartfrz.control.policy import Policy


class FullTraining(Policy):
    """Freezes nothing, so that full training takes the same path through the code as what it is compared with."""

    name = "full-training"
