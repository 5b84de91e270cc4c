"""The training loss, from the logs that Keras hands to callbacks."""

import math
from numbers import Real
from typing import Any

import keras


class LoggedLosses:
    """Turns the logs of batches back into the mean loss of the batches since the last look.

    Keras logs the mean over the epoch so far. A `train_step` of the user's may log the loss of each batch instead, which
    shows at the second batch. The device is waited for only then, and in `take`. A loss that is NaN stays in the mean, so
    that nothing is known until the epoch ends. `evaluate` within an epoch begins the mean anew: if that shows, nothing is
    known until the next look.

    Args:
        model: The model that is trained.
    """

    def __init__(self, model: Any):
        self._model = model
        self._is_mean: bool | None = None  # None: not known yet
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Start over, as the means of Keras do."""
        self._latest: Any = None
        self._calls = self._taken = 0
        self._total_taken = self._weight_taken = 0.0
        self._sum: Any = 0.0  # of the losses of single batches

    def note(self, logs: dict[str, Any] | None) -> None:
        """Note the logs after a batch, or after the batches that were executed at once."""
        self._latest = _loss_in(logs or {})
        self._calls += 1
        if self._latest is None:
            return
        if self._is_mean is None and self._calls > 1:
            self._is_mean = self._logs_mean()
        if not self._is_mean:
            self._sum = self._sum + self._latest

    def _logs_mean(self) -> bool | None:
        """Return whether what was logged is the result of the model's metric of that name; None if it is not finite."""
        latest, metric = _number(self._latest), self._metric()
        if not math.isfinite(latest):
            return None
        return metric is not None and math.isclose(_number(metric.result()), latest, rel_tol=1e-5)

    def _metric(self) -> Any:
        """Return the model's metric of that name, which is a mean, with its state of now; None if there is none."""
        metric = next((metric for metric in self._model.metrics if metric.name == "loss"), None)
        if metric is not None and keras.backend.backend() == "jax":
            self._model.jax_state_sync()
        return metric

    def take(self) -> tuple[float, int]:
        """Return the mean loss since the last call, NaN if it is not known, and the number of calls of `note` since then."""
        count, taken, self._taken = self._calls - self._taken, self._taken, self._calls
        if self._latest is None or not count:
            mean = math.nan
        elif self._is_mean is False:
            mean = _number(self._sum) / count
        else:
            mean = self._mean_since(taken)
        self._sum = 0.0
        return mean, count

    def _mean_since(self, taken: int) -> float:
        """Return the mean of the calls after so many of this epoch, from two running means and their weights."""
        metric = self._metric()
        weight = _number(metric.count) if isinstance(metric, keras.metrics.Mean) else 0.0
        weight = weight or float(self._calls)
        before, total_before = self._weight_taken, self._total_taken
        self._weight_taken, self._total_taken = weight, weight * _number(self._latest)
        if taken and not 0 < weight - before <= 2 * before / taken * (self._calls - taken):
            return math.nan  # the mean began anew, or another one was added
        return (self._total_taken - total_before) / (weight - before)


def _loss_in(logs: dict[str, Any]) -> Any:
    """Return the loss, without a graph; None if there is none, or one that is no scalar."""
    loss: Any = logs.get("loss")
    if not isinstance(loss, Real) and tuple(getattr(loss, "shape", (None,))) != ():
        return None
    return loss.detach() if hasattr(loss, "detach") else loss  # of PyTorch


def _number(value: Any) -> float:
    return float(keras.ops.convert_to_numpy(value))
