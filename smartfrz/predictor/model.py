"""The attention network of the predictor, Eq. 1-4. Used to train it; ONNX Runtime runs it."""

import math

import numpy as np
import torch
from torch import nn

from smartfrz.predictor.contract import ENCODING_SIZE, INCREMENTAL, REPRESENTATIONS

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
        for `raw`, the MLPs see displacements instead of weights.
    """

    def __init__(self, tailored_size: int = 1024, representation: str = "motion", dropout: float = 0.0):
        super().__init__()
        if representation not in REPRESENTATIONS:
            raise ValueError(f"`representation` is {representation!r}; expected one of {', '.join(REPRESENTATIONS)}.")
        self.tailored_size = tailored_size
        self.representation = representation
        self.incremental = representation in INCREMENTAL
        self.key = _mlp(tailored_size, 256, ENCODING_SIZE)
        self.query = _mlp(tailored_size, 256, ENCODING_SIZE)
        self.value = _mlp(tailored_size, 256, ENCODING_SIZE)
        self.dropout = nn.Dropout(dropout)
        self.head = _mlp(ENCODING_SIZE, 32, 2)

    def forward(
        self,
        history: torch.Tensor,
        lengths: torch.Tensor,
        past_keys: torch.Tensor | None = None,
        past_values: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Confidences and attention.

        Args:
            history: float32 `[layers, window, tailored_size]`, oldest first, left-padded.
            lengths: How many of the last rows are real, int64 `[layers]`; the past ones included.
            past_keys: Keys of the records before `history`, float32 `[layers, past, 64]`; only if
                the representation is incremental. docs/format.md says what is fed when.
            past_values: Their values, of the same shape.

        Returns:
            `confidence`, float32 `[layers, 2]`, and `attention`, float32 `[layers, past + window]`;
            with a past also `keys` and `values` of `history`, float32 `[layers, new, 64]`.
        """
        past = None if past_keys is None or past_values is None else (past_keys, past_values)
        logits, attention, keys, values = self._attend(history, lengths, past)
        answer = logits.softmax(-1), attention
        return answer if past is None else (*answer, keys, values)

    def logits(self, history: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, before the last softmax."""
        return self._attend(history, lengths, None)[:2]

    def _attend(
        self, history: torch.Tensor, lengths: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        num_records = history.shape[1] + (0 if past is None else past[0].shape[1])
        age = torch.arange(num_records, device=history.device)[None, :]
        real = age >= num_records - lengths[:, None]
        seen = represent(history, real, self.representation)
        encoded = seen[:, 1:] if self.representation == "steps" else seen
        new_keys, new_values = keys, values = self.key(encoded), self.value(encoded)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=1), torch.cat([past[1], values], dim=1)
        # Only the newest timestamp asks (all-to-one attention), so one query is enough.
        scores = torch.matmul(keys, self.query(seen[:, -1]).unsqueeze(-1)).squeeze(-1) / 8.0
        if self.representation == "steps":
            # A column for the first record, and no attention to the first real one: no step leads there.
            scores, values = nn.functional.pad(scores, (1, 0)), nn.functional.pad(values, (0, 0, 1, 0))
            real = age > num_records - lengths[:, None]
        attention = torch.where(real, scores, torch.full_like(scores, _MASKED)).softmax(-1)
        attention = attention * real.to(attention.dtype)
        context = torch.matmul(attention.unsqueeze(1), values).squeeze(1)
        return self.head(self.dropout(context)), attention, new_keys, new_values


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

    Returns:
        float32 of the shape of `history`.
    """
    if representation == "raw":
        return history
    if representation == "steps":
        size = torch.sqrt((history * history).mean(-1, keepdim=True)).clamp(min=_FLOOR)
        return (history - torch.cat([history[:, :1], history[:, :-1]], dim=1)) / size
    now = history[:, -1:]
    # Clamped: a small number added instead is taken for zero, and dropped, by ONNX optimizers.
    scale = torch.sqrt((now * now).mean(-1, keepdim=True)).clamp(min=_FLOOR)
    displacement = (history - now) / scale
    if representation == "displacement":
        return displacement
    if representation == "motion":
        return _motion(history, displacement, scale, real)
    magnitude = _log_magnitude(displacement)
    return magnitude if representation == "log_displacement" else _ascending(magnitude)


def _motion(history: torch.Tensor, displacement: torch.Tensor, scale: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    window, tailored_size = history.shape[1:]
    num_lags = min(_LAGS, tailored_size // 4)
    share = (tailored_size - num_lags) // 4
    num_lags = tailored_size - 4 * share
    before = torch.cat([history[:, :1], history[:, :-1]], dim=1)
    # The step into the first real row is unknown: the row before it is padding.
    known = torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], dim=1).unsqueeze(-1)
    step = torch.where(known, (history - before) / scale, torch.zeros_like(history))
    seen = []
    for move in (displacement, step):
        size = torch.sqrt((move * move).mean(-1, keepdim=True))
        level = torch.log(size + _STILL) / (1.5 * math.log(10.0)) + 4.0 / 3.0
        # Positions ascend through the layer: every fourth one, so that the sample sees all of it.
        shape = _ascending(move[..., : 4 * share : 4].abs() / size.clamp_min(_FLOOR)) - 0.8
        seen += [shape, level.expand(-1, -1, share)]
    # Attention knows no order by itself; change over 3 timestamps and over 30 are different things.
    ago = torch.arange(window - 1, -1, -1, device=history.device).clamp(max=num_lags - 1)
    one_hot = (ago[:, None] == torch.arange(num_lags, device=history.device)[None, :]).to(history.dtype)
    return torch.cat([*seen, one_hot.unsqueeze(0).expand(history.shape[0], -1, -1)], dim=-1)


def _log_magnitude(x: torch.Tensor) -> torch.Tensor:
    # Relative changes of 1e-6 to 1 map to about -1 to 1.
    return torch.log(x.abs() + 1e-7) / (3.0 * math.log(10.0)) + 1.0


def _ascending(x: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling() or x.requires_grad or x.is_cuda:
        # topk exports to one ONNX node; sort exports to the same, with a longer detour.
        return torch.topk(x, x.shape[-1], dim=-1, largest=False, sorted=True).values
    return torch.from_numpy(np.sort(x.numpy(), axis=-1))  # ten times as fast on a CPU


def _mlp(inside: int, hidden: int, outside: int) -> nn.Sequential:
    """The paper's three-layer MLP."""
    return nn.Sequential(
        nn.Linear(inside, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outside)
    )
