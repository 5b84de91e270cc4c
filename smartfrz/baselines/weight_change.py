"""Weight change: the heuristic that the learned predictor is compared with."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartfrz.control.weight_change import CHANGE_RECORDS, relative_change


@dataclass(frozen=True)
class WeightChange:
    """Freezes layers whose weights changed little over the last records; it needs no training.

    It takes the place of the predictor's network; sampled weights, schedule and patience are the same.

    Args:
        limit: Relative change, |W_t - W_{t-records}| / |W_t|, up to which a layer is ready.
        records: Number of records to look back; with the default schedule 3 records are a tenth of a run.
        tailored_size: Number of weights that are sampled from each layer.

    Raises:
        ValueError: If an argument is not positive.

    Source:
        Ours. `smartfrz-build` compares predictors with it. The right limit depends on the network
        and its learning rate, and the default is a guess (docs/baselines.md explains how to find one).
    """

    limit: float = 0.01
    records: int = CHANGE_RECORDS
    tailored_size: int = 1024

    def __post_init__(self) -> None:
        if not (0.0 < self.limit < float("inf") and self.records >= 1 and self.tailored_size >= 1):
            raise ValueError(
                f"WeightChange received limit={self.limit!r}, records={self.records!r}, tailored_size="
                f"{self.tailored_size!r}; expected a positive limit such as 0.01, and counts of at least 1."
            )

    @property
    def info(self) -> "WeightChangeInfo":
        """What has to be recorded, and when."""
        return WeightChangeInfo(tailored_size=self.tailored_size, window=self.records + 1, min_records=self.records + 1)

    @property
    def sha256(self) -> str:
        """Digest of the arguments."""
        arguments = [self.info.name, self.limit, self.records, self.tailored_size]
        return hashlib.sha256(json.dumps(arguments).encode()).hexdigest()

    def predict(self, history: NDArray[np.float32], lengths: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Judge layers by their histories, as a predictor does.

        Args:
            history: Sampled weights, float32 `[layers, window, tailored_size]`, the last row is now.
            lengths: How many of the last rows are real, int64 `[layers]`.

        Returns:
            Confidence, float64 `[layers, 2]`: `limit / (limit + change)` in the second column, which
            is 0.5, the threshold, if the change equals the limit. And attention, float64
            `[layers, window]`: 1 for the row that is compared with the last one.
        """
        window = history.shape[1]
        before = window - 1 - np.minimum(self.records, lengths - 1)
        rows = np.arange(len(history))
        change = relative_change(history[:, -1], history[rows, before]).astype(np.float64)
        ready = self.limit / (self.limit + change)
        attention = np.zeros(history.shape[:2])
        attention[rows, before] = 1.0
        return np.stack([1.0 - ready, ready], axis=1), attention


@dataclass(frozen=True)
class WeightChangeInfo:
    """The facts that a predictor file gives in its metadata.

    Attributes:
        tailored_size: Length of a tailored vector.
        window: Number of records that are kept of each layer.
        min_records: Length of the shortest history that is judged.
        name: Name in messages and reports.
        threshold: Confidence from which a layer is frozen.
        record_fraction: Fraction of a run between two records.
    """

    tailored_size: int
    window: int
    min_records: int
    name: str = "weight-change"
    threshold: float = 0.5
    record_fraction: float = 1 / 30
