"""The attention network of the predictor, Eq. 1-4. It is trained here and run by ONNX Runtime."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from smartfrz.predictor.contract import POSITIONAL, READS_LOSS, REPRESENTATIONS, UNKNOWN_LOSS, UNKNOWN_POSITION

ENCODING_SIZE = 64
_MASKED = -1e9  # finite: a row of -inf would make softmax return NaN
_FLOOR = 1e-9


class FreezePredictor(nn.Module):
    """Network that judges from a layer's weight history whether the layer has converged.

    Args:
        tailored_size: Length of a tailored vector.
        representation: What the MLPs see of the weights; see `represent`.
        dropout: Dropout rate of the context vector in training.

    Source:
        Paper, section 3.3, Eq. 1-4, sizes from Appendix C: MLP_k, MLP_q and MLP_v are
        1024-256-256-64, one head of all-to-one attention, MLP_z is 64-32-32-2. Departures: scores
        are divided by sqrt(64), without which the softmax saturates early in training. With `trajectory` the MLPs see
        norms and angles of displacements instead of weights, and the layer's position: layers near the input converge
        first, and weights do not show it. With `trajectory+loss` the answer is adjusted by how far the training loss has
        fallen: what freezing costs depends on how much the run has still to learn, which one layer's weights do not show.
    """

    def __init__(self, tailored_size: int = 1024, representation: str = "trajectory", dropout: float = 0.0):
        super().__init__()
        if representation not in REPRESENTATIONS:
            raise ValueError(f"`representation` is {representation!r}; expected one of {', '.join(REPRESENTATIONS)}.")
        self.tailored_size = tailored_size
        self.representation = representation
        self.positional = representation in POSITIONAL
        self.reads_loss = representation in READS_LOSS
        inside = tailored_size if representation == "raw" else len(FIGURES) + 2
        self.key = _mlp(inside, 256, ENCODING_SIZE)
        self.query = _mlp(inside, 256, ENCODING_SIZE)
        self.value = _mlp(inside, 256, ENCODING_SIZE)
        self.dropout = nn.Dropout(dropout)
        self.head = _mlp(ENCODING_SIZE, 32, 2)
        if self.reads_loss:
            self.adjustment = nn.Linear(len(ADJUSTED_BY), 1, bias=False).requires_grad_(False)
            self.adjust(np.eye(len(ADJUSTED_BY))[ADJUSTED_BY.index("margin")])

    def adjust(self, factors: NDArray[np.float64]) -> None:
        """Set how the answer depends on the loss; a new network leaves its answers as they are.

        Args:
            factors: Factors of `ADJUSTED_BY`, float64 `[len(ADJUSTED_BY)]`.
        """
        with torch.no_grad():
            self.adjustment.weight.copy_(torch.from_numpy(factors)[None])

    def forward(
        self,
        history: torch.Tensor,
        lengths: torch.Tensor,
        position: torch.Tensor | None = None,
        loss: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute confidences and attention.

        Args:
            history: float32 `[layers, window, tailored_size]`, oldest first, left-padded.
            lengths: How many of the last rows are real, int64 `[layers]`.
            position: Place of each layer in execution order, in [0, 1], or -1 where it is not known; float32 `[layers]`.
                Ignored unless the representation is positional; unknown by default.
            loss: Mean training loss since the record before, float32 `[layers, window]`; zero or less, infinite or NaN
                where it is not known. Ignored unless the representation reads it; unknown by default.

        Returns:
            `confidence`, float32 `[layers, 2]`, and `attention`, float32 `[layers, window]`.
        """
        logits, attention = self.logits(history, lengths, position, loss)
        return logits.softmax(-1), attention

    def logits(
        self,
        history: torch.Tensor,
        lengths: torch.Tensor,
        position: torch.Tensor | None = None,
        loss: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute what `forward` returns, but without the last softmax."""
        real = real_rows(history, lengths)
        return self.judge(represent(history, real, self.representation), real, lengths, position, loss)

    def judge(
        self,
        seen: torch.Tensor,
        real: torch.Tensor,
        lengths: torch.Tensor,
        position: torch.Tensor | None = None,
        loss: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute what `logits` returns, from what `represent` or `describe_path` made of the histories."""
        num_records = seen.shape[1]
        if self.positional:
            seen = torch.cat([seen, _describe_position(position, lengths)[:, None].expand(-1, num_records, -1)], dim=-1)
        keys, values, query = self.key(seen), self.value(seen), self.query(seen[:, -1])
        # Only the newest timestamp asks (all-to-one attention), so one query is enough.
        scores = torch.matmul(keys, query.unsqueeze(-1)).squeeze(-1) / 8.0
        attention = torch.where(real, scores, torch.full_like(scores, _MASKED)).softmax(-1)
        attention = attention * real.to(attention.dtype)
        context = torch.matmul(attention.unsqueeze(1), values).squeeze(1)
        logits = self.head(self.dropout(context))
        if self.reads_loss:
            margin = self.adjustment(describe_margin(logits[:, 1:] - logits[:, :1], *fall_of_loss(loss, real)))
            logits = torch.cat([-0.5 * margin, 0.5 * margin], dim=-1)
        return logits, attention


def real_rows(history: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return which rows of left-padded histories `[layers, window, ...]` are real, bool `[layers, window]`."""
    num_records = history.shape[1]
    age = torch.arange(num_records, device=history.device)[None, :]
    return age >= num_records - lengths[:, None]


def _describe_position(position: torch.Tensor | None, lengths: torch.Tensor) -> torch.Tensor:
    """Return the position and whether it is known, float32 `[layers, 2]`."""
    if position is None:
        position = torch.full_like(lengths, UNKNOWN_POSITION, dtype=torch.float32)
    known = (position >= 0).to(torch.float32)
    return torch.stack([known * position, known], dim=-1)


def represent(history: torch.Tensor, real: torch.Tensor, representation: str) -> torch.Tensor:
    """Transform the weights into what the MLPs see.

    Args:
        history: float32 `[layers, window, tailored_size]`.
        real: True for rows that are not padding, bool `[layers, window]`.
        representation: `raw`: the weights, as in the paper. Otherwise the `FIGURES` of each record; see `trajectory`.

    Returns:
        `history` itself, or float32 `[layers, window, len(FIGURES)]`.
    """
    return history if representation == "raw" else trajectory(history, real)


# Figures of record j; t is the newest record and 0 the first one. Distances are Euclidean, relative to rms(W_t).
FIGURES = (
    "to_now",  # log |W_t - W_j|
    "to_first",  # log |W_j - W_0|
    "step",  # log |W_j - W_{j-1}|
    "lag",  # log |W_j - W_{j-4}|
    "way",  # log |W_t - W_0|, the same for all records
    "speed",  # log |W_t - W_{t-4}|, the same for all records
    "share_to_now",  # to_now - way: how much of the whole way was still to go
    "share_of_step",  # step - way
    "slowing",  # step of j - step of t
    "straightness",  # lag - step: four times the step where it drifts, twice where it wanders
    "step_along_way",  # cosine of W_j - W_{j-1} and W_t - W_0
    "step_along_last",  # cosine of W_j - W_{j-1} and W_{j-1} - W_{j-2}
    "along_way",  # cosine of W_j - W_0 and W_t - W_0
    "evenness",  # mean magnitude over root mean square of W_t - W_j
    "growth",  # log rms(W_j) - log rms(W_t)
    "records",  # number of records
    "ago",  # t - j
)
_LAG = 4
_RECORDS = 30.0  # usual number of records in a run, so that `records` is the progress of the run


def trajectory(history: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Describe a layer's path through weight space by figures that do not depend on which weights were sampled.

    Norms and angles of displacements tell how far a layer has moved, how fast it still moves, and whether it drifts
    or wanders. Each is an average over the sampled weights, so different samples give nearly the same figures.

    Args:
        history: float32 `[layers, window, tailored_size]`.
        real: True for rows that are not padding, bool `[layers, window]`.

    Returns:
        float32 `[layers, window, len(FIGURES)]`, about zero mean and unit range; rows of padding are meaningless.
    """
    history = history / history[:, -1:].abs().amax(-1, keepdim=True).clamp(
        min=_FLOOR
    )  # so that squares do not overflow
    return _figures(history, real, _rms(history), None)


def describe_path(start: torch.Tensor, moved: torch.Tensor, evenness: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Compute what `trajectory` returns, from the paths of layers (`smartfrz.predictor.training.paths`).

    Args:
        start: Length of the weights to which displacements are relative, float32 `[layers]`.
        moved: Displacements, float32 `[layers, window, dimensions]`; the first dimension is the direction of these weights.
        evenness: Of the displacements between each record and the newest one, float32 `[layers, window]`.
        real: True for rows that are not padding, bool `[layers, window]`.
    """
    moved = moved * moved.shape[2] ** 0.5  # so that means over dimensions are means over weights
    along = moved[..., :1] + start[:, None, None] * moved.shape[2] ** 0.5
    sizes = _rms(torch.cat([along, moved[..., 1:]], dim=-1))
    scale = sizes[:, -1:].clamp(min=_FLOOR)
    return _figures(moved / scale, real, sizes / scale, evenness.unsqueeze(-1))


def _figures(
    history: torch.Tensor, real: torch.Tensor, sizes: torch.Tensor, evenness: torch.Tensor | None
) -> torch.Tensor:
    """Compute the `FIGURES` of histories, or of displacements since some record, whose `sizes` are those of the weights."""
    window = history.shape[1]
    index = torch.arange(window, device=history.device)
    lengths = real.sum(1)
    first = window - lengths
    now = history[:, -1:]
    start = torch.gather(history, 1, first[:, None, None].expand(-1, 1, history.shape[2]))
    scale = sizes[:, -1:].clamp(min=_FLOOR)
    away, since = history - now, history - start
    way = now - start
    size_away, size_since, size_way = _rms(away), _rms(since), _rms(way)
    # There is nothing before the first record: use the first record itself.
    step = history - history.index_select(1, (index - 1).clamp(min=0))
    known = (index[None, :] > first[:, None]).unsqueeze(-1)
    size_step = torch.where(known, _rms(step), 0.0)
    lagged = history - history.index_select(1, (index - _LAG).clamp(min=0))
    old_enough = (index[None, :] - _LAG >= first[:, None]).unsqueeze(-1)
    size_lag = torch.where(old_enough, _rms(lagged), size_since)
    before = step.index_select(1, (index - 1).clamp(min=0))
    known_before = (index[None, :] - 1 > first[:, None]).unsqueeze(-1)
    size_before = size_step.index_select(1, (index - 1).clamp(min=0))
    level = [_level(size / scale) for size in (size_away, size_since, size_step, size_lag, size_way)]
    to_now, to_first, of_step, of_lag = level[:4]
    of_way, of_speed = level[4].expand_as(to_now), of_lag[:, -1:].expand_as(to_now)
    cosines = (
        torch.where(known, _mean(step * way) / (size_step * size_way).clamp(min=_FLOOR * _FLOOR), 0.0),
        torch.where(known_before, _mean(step * before) / (size_step * size_before).clamp(min=_FLOOR * _FLOOR), 0.0),
        _mean(since * way) / (size_since * size_way).clamp(min=_FLOOR * _FLOOR),
    )
    if evenness is None:
        evenness = away.abs().mean(-1, keepdim=True) / size_away.clamp(min=_FLOOR)
    growth = torch.log(sizes.clamp(min=_FLOOR) / scale).clamp(-1.0, 1.0)
    records = (lengths / _RECORDS)[:, None, None].expand_as(to_now)
    ago = ((window - 1 - index) / _RECORDS)[None, :, None].expand_as(to_now)
    figures = [to_now, to_first, of_step, of_lag, of_way, of_speed]
    figures += [to_now - of_way, of_step - of_way, of_step - of_step[:, -1:], of_lag - of_step]
    figures += [*cosines, evenness, growth, records, ago]
    return torch.cat(figures, dim=-1)


# What the adjustment sees; the margin is the logit of the confidence that the weights alone give.
ADJUSTED_BY = ("one", "margin", "loss_known", "loss_fall", "margin_if_loss_known")
_MOST_LOSS = 1e30
_MOST_FALL = 4.0  # of log loss: beyond a factor of 50 it hardly matters


def fall_of_loss(loss: torch.Tensor | None, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far the training loss has fallen since the first record whose loss is known.

    Args:
        loss: Mean training loss since the record before, float32 `[layers, window]`; None if no loss is known.
        real: True for rows that are not padding, bool `[layers, window]`.

    Returns:
        The natural logarithm of the newest loss over the first one, at least -4 and at most 4 and 0 where either is not
        known, and whether both are known, 1 or 0; float32 `[layers, 1]` each.
    """
    if loss is None:
        loss = torch.full_like(real, UNKNOWN_LOSS, dtype=torch.float32)
    known = real & (loss > 0) & (loss < _MOST_LOSS)  # both are false for NaN
    level = torch.log(torch.where(known, loss, torch.ones_like(loss)))
    index = torch.arange(loss.shape[1], device=loss.device)[None, :]
    # The first known loss has the greatest distance from the end; ArgMax would be one more operator to allow.
    first = loss.shape[1] - ((loss.shape[1] - index) * known).amax(1, keepdim=True)
    start = (level * (index == first)).sum(1, keepdim=True)
    both = (known[:, -1:] & (first < loss.shape[1] - 1)).to(torch.float32)
    return (level[:, -1:] - start).clamp(-_MOST_FALL, _MOST_FALL) * both, both


def describe_margin(margin: torch.Tensor, fall: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the `ADJUSTED_BY` of margins, float32 `[layers, len(ADJUSTED_BY)]`; each argument is `[layers, 1]`."""
    return torch.cat([torch.ones_like(margin), margin, known, fall, known * margin], dim=-1)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(-1, keepdim=True)


def _level(size: torch.Tensor) -> torch.Tensor:
    # Relative changes of 1e-5 to 1 map to -1 to 1.
    return torch.log10(size + 1e-6) / 2.5 + 1.0


def _rms(x: torch.Tensor) -> torch.Tensor:
    # Clamp the result where it divides: ONNX optimizers take a small number added to it for zero and drop it.
    return torch.sqrt((x * x).mean(-1, keepdim=True))


def _mlp(inside: int, hidden: int, outside: int) -> nn.Sequential:
    """Make the paper's three-layer MLP."""
    return nn.Sequential(
        nn.Linear(inside, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outside)
    )
