"""The attention network of the predictor, Eq. 1-4. Used to train it; ONNX Runtime runs it."""

import math
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn

from smartfrz.predictor.contract import ENCODING_SIZE, INCREMENTAL, POSITIONAL, REPRESENTATIONS, UNKNOWN_POSITION

_MASKED = -1e9  # finite: a row of -inf would make softmax return NaN
_FLOOR = 1e-9
_LAGS = 32
_STILL = 1e-4  # relative change below which it does not matter how little a layer moved


class FreezePredictor(nn.Module):
    """Says from a layer's weight history whether the layer has converged.

    Args:
        tailored_size: Length of a tailored vector.
        representation: What the MLPs see of the weights; see `represent`.
        dropout: On the context vector, in training only.

    Source:
        Paper, section 3.3, Eq. 1-4, sizes of Appendix C: MLP_k, MLP_q and MLP_v are
        1024-256-256-64, one head of all-to-one attention, MLP_z is 64-32-32-2. Departure: scores
        are divided by sqrt(64), without which the softmax saturates early in training; and, but
        for `raw`, the MLPs see displacements instead of weights. For `trajectory` they see norms and angles
        of them, and the layer's position: layers near the input converge first, and weights do not show it.
    """

    def __init__(self, tailored_size: int = 1024, representation: str = "trajectory", dropout: float = 0.0):
        super().__init__()
        if representation not in REPRESENTATIONS:
            raise ValueError(f"`representation` is {representation!r}; expected one of {', '.join(REPRESENTATIONS)}.")
        self.tailored_size = tailored_size
        self.representation = representation
        self.incremental = representation in INCREMENTAL
        self.positional = representation in POSITIONAL
        inside = len(FIGURES) + 2 if representation == "trajectory" else tailored_size
        self.key = _mlp(inside, 256, ENCODING_SIZE)
        self.query = _mlp(inside, 256, ENCODING_SIZE)
        self.value = _mlp(inside, 256, ENCODING_SIZE)
        self.dropout = nn.Dropout(dropout)
        self.head = _mlp(ENCODING_SIZE, 32, 2)

    def forward(
        self,
        history: torch.Tensor,
        lengths: torch.Tensor,
        past_keys: torch.Tensor | None = None,
        past_values: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Confidences and attention.

        Args:
            history: float32 `[layers, window, tailored_size]`, oldest first, left-padded.
            lengths: How many of the last rows are real, int64 `[layers]`; the past ones included.
            past_keys: Keys of the records before `history`, float32 `[layers, past, 64]`; only if
                the representation is incremental. docs/format.md says what is fed when.
            past_values: Their values, of the same shape.
            position: Where in the network each layer stands, in execution order, in [0, 1], or -1 where that is not
                known; float32 `[layers]`. Only if the representation is positional; unknown by default.

        Returns:
            `confidence`, float32 `[layers, 2]`, and `attention`, float32 `[layers, past + window]`;
            with a past also `keys` and `values` of `history`, float32 `[layers, new, 64]`.
        """
        past = None if past_keys is None or past_values is None else (past_keys, past_values)
        logits, attention, keys, values = self._attend(history, lengths, past, position)
        answer = logits.softmax(-1), attention
        return answer if past is None else (*answer, keys, values)

    def logits(
        self, history: torch.Tensor, lengths: torch.Tensor, position: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, before the last softmax."""
        return self._attend(history, lengths, None, position)[:2]

    def _attend(
        self,
        history: torch.Tensor,
        lengths: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor] | None,
        position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        num_records = history.shape[1] + (0 if past is None else past[0].shape[1])
        age = torch.arange(num_records, device=history.device)[None, :]
        real = age >= num_records - lengths[:, None]
        if self.representation == "motion":
            motion = Motion.of(history, real)
            keys, values = motion.through(self.key), motion.through(self.value)
            query = motion.newest().through(self.query).squeeze(1)
        else:
            seen = represent(history, real, self.representation)
            if self.positional:
                seen = torch.cat([seen, _placed(position, lengths)[:, None].expand(-1, seen.shape[1], -1)], dim=-1)
            encoded = seen[:, 1:] if self.representation == "steps" else seen
            keys, values, query = self.key(encoded), self.value(encoded), self.query(seen[:, -1])
        new_keys, new_values = keys, values
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=1), torch.cat([past[1], values], dim=1)
        # Only the newest timestamp asks (all-to-one attention), so one query is enough.
        scores = torch.matmul(keys, query.unsqueeze(-1)).squeeze(-1) / 8.0
        if self.representation == "steps":
            # A column for the first record, and no attention to the first real one: no step leads there.
            scores, values = nn.functional.pad(scores, (1, 0)), nn.functional.pad(values, (0, 0, 1, 0))
            real = age > num_records - lengths[:, None]
        attention = torch.where(real, scores, torch.full_like(scores, _MASKED)).softmax(-1)
        attention = attention * real.to(attention.dtype)
        context = torch.matmul(attention.unsqueeze(1), values).squeeze(1)
        return self.head(self.dropout(context)), attention, new_keys, new_values


def _placed(position: torch.Tensor | None, lengths: torch.Tensor) -> torch.Tensor:
    """The position, and whether it is known; float32 `[layers, 2]`."""
    if position is None:
        position = torch.full_like(lengths, UNKNOWN_POSITION, dtype=torch.float32)
    known = (position >= 0).to(torch.float32)
    return torch.stack([known * position, known], dim=-1)


def represent(history: torch.Tensor, real: torch.Tensor, representation: str) -> torch.Tensor:
    """What the MLPs see of the weights W_j, j <= t.

    Args:
        history: float32 `[layers, window, tailored_size]`.
        real: Which rows are no padding, bool `[layers, window]`.
        representation: `raw`: the weights, as in the paper. `displacement`: (W_j - W_t) / rms(W_t).
            `log_displacement`: log magnitudes of that. `sorted_displacement`: those in ascending
            order, which no longer depends on which weights were sampled. `motion`: of the
            displacement W_j - W_t and of the step W_j - W_{j-1}, relative to rms(W_t), the
            logarithm of their size (repeated, so that it counts), the sorted magnitudes relative
            to that size; and how many timestamps ago j was, one-hot. `steps`: (W_j - W_{j-1}) /
            rms(W_j), which later records do not change; the first row has none, and is zero.
            `trajectory`: the `FIGURES` of each record instead of weights; see `trajectory`.

    Returns:
        float32 of the shape of `history`; of `trajectory` `[layers, window, len(FIGURES)]`.
    """
    if representation == "raw":
        return history
    if representation == "steps":
        return (history - _before(history)) / _rms(history).clamp(min=_FLOOR)
    if representation == "motion":
        return Motion.of(history, real).full(history.shape[2])
    if representation == "trajectory":
        return trajectory(history, real)
    now = history[:, -1:]
    displacement = (history - now) / _rms(now).clamp(min=_FLOOR)
    if representation == "displacement":
        return displacement
    magnitude = _log_magnitude(displacement)
    return magnitude if representation == "log_displacement" else _ascending(magnitude)


# Of record j, seen from the newest record t and from the first one, 0. Distances are Euclidean, over rms(W_t).
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
    "records",  # how many there are
    "ago",  # t - j
)
_LAG = 4
_RECORDS = 30.0  # records a run: with them `records` says how far the run is


def trajectory(history: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Figures of a layer's way through weight space that do not depend on which weights were sampled.

    Norms and angles of displacements say how far a layer went, how fast it still is, and whether it drifts
    or wanders; each is an average over the sampled weights, so that any sample gives nearly the same.

    Args:
        history: float32 `[layers, window, tailored_size]`.
        real: Which rows are no padding, bool `[layers, window]`.

    Returns:
        float32 `[layers, window, len(FIGURES)]`, about zero mean and unit range; what stands on padding means nothing.
    """
    window = history.shape[1]
    index = torch.arange(window, device=history.device)
    lengths = real.sum(1)
    first = window - lengths
    history = history / history[:, -1:].abs().amax(-1, keepdim=True).clamp(min=_FLOOR)  # squares shall not overflow
    now = history[:, -1:]
    start = torch.gather(history, 1, first[:, None, None].expand(-1, 1, history.shape[2]))
    scale = _rms(now).clamp(min=_FLOOR)
    away, since = history - now, history - start
    way = now - start
    size_away, size_since, size_way = _rms(away), _rms(since), _rms(way)
    # A record before the first one is taken for the first one.
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
    evenness = away.abs().mean(-1, keepdim=True) / size_away.clamp(min=_FLOOR)
    growth = torch.log(_rms(history).clamp(min=_FLOOR) / scale).clamp(-1.0, 1.0)
    records = (lengths / _RECORDS)[:, None, None].expand_as(to_now)
    ago = ((window - 1 - index) / _RECORDS)[None, :, None].expand_as(to_now)
    figures = [to_now, to_first, of_step, of_lag, of_way, of_speed]
    figures += [to_now - of_way, of_step - of_way, of_step - of_step[:, -1:], of_lag - of_step]
    figures += [*cosines, evenness, growth, records, ago]
    return torch.cat(figures, dim=-1)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(-1, keepdim=True)


def _level(size: torch.Tensor) -> torch.Tensor:
    # Relative changes of 1e-5 to 1 map to -1 to 1.
    return torch.log10(size + 1e-6) / 2.5 + 1.0


class Motion(NamedTuple):
    """The representation `motion` without its repetitions; see `represent`.

    Attributes:
        shapes: Sorted magnitudes of the displacement, and of the step; float32 `[layers, window, share]` each.
        levels: The logarithm of their sizes, `[layers, window, 1]` each.
        ago: How many timestamps ago each row was, int64 `[window]`.
    """

    shapes: tuple[torch.Tensor, torch.Tensor]
    levels: tuple[torch.Tensor, torch.Tensor]
    ago: torch.Tensor

    @classmethod
    def of(cls, history: torch.Tensor, real: torch.Tensor) -> "Motion":
        """From weights; arguments as of `represent`."""
        window, tailored_size = history.shape[1:]
        share, num_lags = _shares(tailored_size)
        scale = _rms(history[:, -1:]).clamp(min=_FLOOR)
        # Positions ascend through the layer: every fourth one, so that the sample sees all of it.
        fourth = history[..., : 4 * share : 4]
        # The step into the first real row is unknown: the row before it is padding.
        known = torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], dim=1).unsqueeze(-1)
        sizes = [
            _rms(history - history[:, -1:]) / scale,
            torch.where(known, _rms(history - _before(history)) / scale, 0.0),
        ]
        moves = [fourth - fourth[:, -1:], torch.where(known, fourth - _before(fourth), 0.0)]
        relative = [m.abs() / (scale * size.clamp_min(_FLOOR)) for m, size in zip(moves, sizes, strict=True)]
        sorted_ = _ascending(torch.stack(relative)) - 0.8
        levels = [torch.log(size + _STILL) / (1.5 * math.log(10.0)) + 4.0 / 3.0 for size in sizes]
        # Attention knows no order by itself; change over 3 timestamps and over 30 are different things.
        ago = torch.arange(window - 1, -1, -1, device=history.device).clamp(max=num_lags - 1)
        return cls((sorted_[0], sorted_[1]), (levels[0], levels[1]), ago)

    def newest(self) -> "Motion":
        """Of the last row only."""
        (a, b), (c, d) = self.shapes, self.levels
        return Motion((a[:, -1:], b[:, -1:]), (c[:, -1:], d[:, -1:]), self.ago[-1:])

    def full(self, tailored_size: int) -> torch.Tensor:
        """With the repetitions: a level stands in as many columns as a shape, the lag is one-hot."""
        share, num_lags = _shares(tailored_size)
        one_hot = nn.functional.one_hot(self.ago, num_lags).to(self.shapes[0].dtype)
        seen = []
        for shape, level in zip(self.shapes, self.levels, strict=True):
            seen += [shape, level.expand(-1, -1, share)]
        return torch.cat([*seen, one_hot.unsqueeze(0).expand(len(seen[0]), -1, -1)], dim=-1)

    def through(self, mlp: nn.Sequential) -> torch.Tensor:
        """What `mlp` makes of the full form, at half of the multiplications."""
        first = cast(nn.Linear, mlp[0])
        share = self.shapes[0].shape[-1]
        shape, level, step_shape, step_level, lag = first.weight.split(
            [share, share, share, share, first.weight.shape[1] - 4 * share], dim=1
        )
        weight = torch.cat([shape, step_shape, level.sum(1, keepdim=True), step_level.sum(1, keepdim=True)], dim=1)
        hidden = torch.cat([*self.shapes, *self.levels], dim=-1) @ weight.T + (first.bias[:, None] + lag).T[self.ago]
        return mlp[1:](hidden)


def _shares(tailored_size: int) -> tuple[int, int]:
    """Columns of a shape, and of the lags."""
    share = (tailored_size - min(_LAGS, tailored_size // 4)) // 4
    return share, tailored_size - 4 * share


def _rms(x: torch.Tensor) -> torch.Tensor:
    # Clamp it where it divides: a small number added instead is taken for zero, and dropped, by ONNX optimizers.
    return torch.sqrt((x * x).mean(-1, keepdim=True))


def _before(history: torch.Tensor) -> torch.Tensor:
    """The row before each; the first one before itself."""
    return torch.cat([history[:, :1], history[:, :-1]], dim=1)


def _log_magnitude(x: torch.Tensor) -> torch.Tensor:
    # Relative changes of 1e-6 to 1 map to about -1 to 1.
    return torch.log(x.abs() + 1e-7) / (3.0 * math.log(10.0)) + 1.0


def _ascending(x: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling() or x.requires_grad or x.is_cuda:
        # topk exports to one ONNX node, which export.py replaces.
        return torch.topk(x, x.shape[-1], dim=-1, largest=False, sorted=True).values
    return torch.from_numpy(np.sort(x.numpy(), axis=-1))  # ten times as fast on a CPU


def _mlp(inside: int, hidden: int, outside: int) -> nn.Sequential:
    """The paper's three-layer MLP."""
    return nn.Sequential(
        nn.Linear(inside, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outside)
    )
