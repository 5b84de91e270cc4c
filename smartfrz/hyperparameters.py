"""How a model is trained: optimizer, learning rate and schedule, as plain data for any framework."""

from dataclasses import dataclass

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")
SCHEDULES = ("cosine", "linear", "constant", "step")


@dataclass(frozen=True)
class TrainingSpec:
    """The section `[training]` of a recipe; docs/recipes.md explains every entry."""

    epochs: float
    batch_size: int = 32
    optimizer: str = "SGD"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.0  # fraction of the run
    label_smoothing: float = 0.0
