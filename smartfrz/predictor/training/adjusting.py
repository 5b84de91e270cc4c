"""How a confidence is adjusted by the training loss, so that it means more nearly the same in every run.

A network sees one layer at a time. From its weights it ranks layers and moments of a run well, but it does not see how much
the run as a whole has still to learn. The training loss shows that, at least in part: where it has fallen far, freezing was
found to cost less. So after the network is trained, a logistic regression is fitted to the network's own answer and the
fall of the loss, and another one to the answer alone, for where the loss is not known. Both are fitted on runs that the
network has not seen, since on those that it was trained on it is nearly always right.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from smartfrz.predictor.training.model import ADJUSTED_BY, describe_margin, fall_of_loss
from smartfrz.predictor.training.runs import LabelledRun

_LEAST = 1e-6  # distance of a confidence from 0 and 1, so that its logit is finite
_PENALTY = 0.01  # of the regressions: hardly any, since they have three coefficients at most


def apply_adjustment(
    factors: NDArray[np.float64], confidence: NDArray[np.float32], run: LabelledRun, window: int
) -> NDArray[np.float32]:
    """Adjust a network's confidences of one run as the network would; NaN stays NaN.

    Args:
        factors: Factors of `ADJUSTED_BY`, as `Adjuster.without` returns them.
        confidence: float32 `[layers, timestamps]`.
        run: The run.
        window: Number of records that the network reads.

    Returns:
        float32 of the same shape.
    """
    return np.asarray(1 / (1 + np.exp(-_describe(confidence, run, window) @ factors)), np.float32)


@dataclass(frozen=True)
class Adjuster:
    """Fits adjustments.

    Attributes:
        runs: The runs.
        said: For each seed, confidences of networks that have not seen the run, by its name; runs may be missing.
        window: Number of records that the networks read.
    """

    runs: Sequence[LabelledRun]
    said: Sequence[Mapping[str, NDArray[np.float32]]]
    window: int

    def without(self, names: Collection[str]) -> NDArray[np.float64] | None:
        """Fit factors of `ADJUSTED_BY` on all runs but these; every run has the same weight.

        Returns:
            float64 `[len(ADJUSTED_BY)]`; None if no run has known labels.
        """
        rows, targets, shares = [], [], []
        for run in self.runs:
            soft = run.labels if run.targets is None else run.targets
            for said in self.said:
                if run.name in names or run.name not in said:
                    continue
                known = (run.labels >= 0) & np.isfinite(said[run.name])
                rows.append(_describe(said[run.name], run, self.window)[known])
                targets.append(soft[known].astype(np.float64))
                shares.append(np.full(len(rows[-1]), 1 / max(1, len(rows[-1]))))
        if not rows or not sum(map(len, rows)):
            return None
        x, y, share = map(np.concatenate, (rows, targets, shares))
        columns = dict(zip(ADJUSTED_BY, x.T, strict=True))
        heard = columns["loss_known"] == 1
        bias, scale = _regress([columns["margin"]], y, share) or (0.0, 1.0)
        factors = {"one": bias, "margin": scale}
        if together := _regress([columns[name][heard] for name in ("margin", "loss_fall")], y[heard], share[heard]):
            factors["loss_fall"] = together[2]
            factors |= {"loss_known": together[0] - bias, "margin_if_loss_known": together[1] - scale}
        return np.array([factors.get(name, 0.0) for name in ADJUSTED_BY])


def _regress(
    columns: Sequence[NDArray[np.float64]], targets: NDArray[np.float64], share: NDArray[np.float64]
) -> tuple[float, ...] | None:
    """Fit targets in [0, 1]; return what is added and a factor of each column.

    None if all targets are the same, or if a larger margin, the first column, would make a confidence smaller.
    """
    weight = np.concatenate([share * targets, share * (1 - targets)])
    labels = np.repeat([1, 0], len(targets))
    if not 0 < weight[labels == 1].sum() < weight.sum():
        return None
    x = np.stack(columns, axis=1)
    model = LogisticRegression(C=1 / _PENALTY, max_iter=1000)
    model.fit(np.concatenate([x, x]), labels, sample_weight=weight * len(x) / weight.sum())
    return (float(model.intercept_[0]), *model.coef_[0].tolist()) if model.coef_[0, 0] > 0 else None


def _describe(confidence: NDArray[np.float32], run: LabelledRun, window: int) -> NDArray[np.float64]:
    """Return the `ADJUSTED_BY` of a run's confidences, float64 `[layers, timestamps, len(ADJUSTED_BY)]`."""
    layers, timestamps = confidence.shape
    sure = np.clip(confidence.astype(np.float64), _LEAST, 1 - _LEAST)
    margin = torch.from_numpy(np.log(sure / (1 - sure)))
    past, real = np.zeros((timestamps, window), np.float32), np.zeros((timestamps, window), bool)
    for now in range(timestamps):
        length = min(now + 1, window)
        real[now, -length:] = True
        if run.loss is not None:
            past[now, -length:] = run.loss[now + 1 - length : now + 1]
    falls = [part.repeat(layers, 1) for part in fall_of_loss(*map(torch.from_numpy, (past, real)))]
    return describe_margin(margin.reshape(-1, 1), *falls).numpy().reshape(layers, timestamps, -1)
