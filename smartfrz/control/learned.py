"""The policy that asks a predictor about the history of tailored weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from smartfrz.control.decision import Reason
from smartfrz.control.history import WeightHistory
from smartfrz.control.losses import LossCurve
from smartfrz.control.policy import Policy
from smartfrz.control.quality import Calibration
from smartfrz.control.tailoring import tailoring_positions
from smartfrz.errors import PredictionError, StateError

RECORDS_PER_STAGE = 2
PATIENCE = 2
_LOSSES = "..losses"  # beside the names of layers, none of which is like this


class HistoryFacts(Protocol):
    """Facts about anything that judges weight histories; `PredictorInfo` has them for a predictor file."""

    @property
    def name(self) -> str:
        """Name for messages and reports."""
        ...

    @property
    def tailored_size(self) -> int:
        """Length of a tailored vector."""
        ...

    @property
    def window(self) -> int:
        """Number of records that are kept of each layer."""
        ...

    @property
    def min_records(self) -> int:
        """Length of the shortest history that can be judged."""
        ...

    @property
    def threshold(self) -> float:
        """Confidence from which a layer is frozen, in (0, 1]."""
        ...

    @property
    def record_fraction(self) -> float:
        """Fraction of a run between two records."""
        ...


class AsksPredictor(Protocol):
    """The part of `Predictor` that `LearnedPolicy` uses."""

    @property
    def info(self) -> HistoryFacts:
        """Facts about the predictor."""
        ...

    @property
    def sha256(self) -> str:
        """SHA-256 that identifies the predictor."""
        ...

    def predict(self, history: NDArray[np.float32], lengths: NDArray[np.int64]) -> Any:
        """Return confidence `[layers, 2]` and attention `[layers, window]`.

        Raises:
            PredictionError: If there is no usable answer; it has been logged then.
        """
        ...


class ReadsMore(Protocol):
    """What a predictor whose attribute `positional` or `reads_loss` is true offers in addition to `AsksPredictor`."""

    def predict(
        self,
        history: NDArray[np.float32],
        lengths: NDArray[np.int64],
        position: NDArray[np.float32] | None = None,
        loss: NDArray[np.float32] | None = None,
    ) -> Any:
        """Predict with what else is known of the run.

        Args:
            history: As for `AsksPredictor`.
            lengths: As for `AsksPredictor`.
            position: Only if `positional` is true. Float32 `[layers]`: 0 for the first layer in execution order and 1 for
                the last.
            loss: Only if `reads_loss` is true. Float32 `[layers, window]`, left-padded: the mean training loss of the steps
                before each record. NaN stands for "not known" and for padding; None if no loss is known.
        """
        ...


class LearnedPolicy(Policy):
    """Policy that records tailored weights and asks a predictor about them.

    Args:
        predictor: A loaded predictor, or another object that judges weight histories.
    """

    decide_every = RECORDS_PER_STAGE
    patience = PATIENCE
    has_budget = True
    waits_for_weights = True

    def __init__(self, predictor: AsksPredictor):
        self.predictor = predictor
        self.name = predictor.info.name
        self.threshold = predictor.info.threshold
        self.record_fraction = predictor.info.record_fraction
        self.reads_loss = bool(getattr(predictor, "reads_loss", False))

    @property
    def sha256(self) -> str:
        """SHA-256 that identifies the predictor."""
        return self.predictor.sha256

    def threshold_of(self, quality: str) -> float:
        """Return the threshold that a quality of this predictor stands for.

        Raises:
            ValueError: If the predictor was not calibrated for it.
        """
        qualities: Mapping[str, Calibration] = getattr(self.predictor.info, "qualities", {})
        if quality in qualities:
            return qualities[quality].threshold
        if not qualities:
            return super().threshold_of(quality)
        raise ValueError(
            f"`quality` is {quality!r}, but {self.name!r} reaches none such: it was calibrated for "
            f"{', '.join(map(repr, qualities))}. Pass one of these, or `threshold`."
        )

    def begin(self, adapter: Any, layers: Sequence[str], *, total_steps: int | None, seed: int) -> None:
        """Choose the positions of the tailored weights, and start with an empty history."""
        info = self.predictor.info
        self._adapter = adapter
        self._seed = seed
        self._positions: dict[str, NDArray[np.int64]] = {}
        self.layers_changed(layers)
        self._history = WeightHistory(info.window, info.tailored_size)
        self._losses = LossCurve(info.window)
        self._awaited: Callable[[], tuple[Mapping[str, NDArray[np.float32]], float]] | None = None

    @property
    def history(self) -> WeightHistory:
        """The weights recorded so far. A record that is still being read is waited for."""
        awaited, self._awaited = self._awaited, None
        if awaited is not None:
            self._append(*awaited())
        return self._history

    def _append(self, vectors: Mapping[str, NDArray[np.float32]], loss: float) -> None:
        for layer, vector in vectors.items():
            self._history.append(layer, vector)
        self._losses.append(loss)

    def layers_changed(self, layers: Sequence[str]) -> None:
        """Choose the positions of layers that are new."""
        everything = self._adapter.all_layers()  # including layers that the user froze
        self._places = {layer: index / max(1, len(everything) - 1) for index, layer in enumerate(everything)}
        known, size = self._positions, self.predictor.info.tailored_size
        self._positions = {
            layer: known[layer]
            if layer in known
            else tailoring_positions(layer, self._adapter.num_weights(layer), size, seed=self._seed)
            for layer in layers
        }

    def note_loss(self, loss: Any, weight: int = 1) -> None:
        """Add the loss to the mean that belongs to the next record."""
        self._losses.add(loss, weight)

    def record(self, active: list[str], *, ask: bool) -> None:
        """Read the tailored weights of the active layers, or begin to, where the adapter reads them later."""
        positions = {layer: self._positions[layer] for layer in active}
        loss = self._losses.take_mean()
        if not getattr(self._adapter, "reads_later", False):
            self._append(self._adapter.tailored(positions), float(loss))
            return
        vectors = self._adapter.tailored_later(positions)
        read = (lambda: loss) if isinstance(loss, float) else self._adapter.loss_later(loss)
        if self._awaited is not None:
            self._append(*self._awaited())
        self._awaited = lambda: (vectors(), read())

    def excused(self, active: list[str]) -> dict[str, Reason]:
        """Return the layers whose history is too short or not finite, with the reason."""
        excused: dict[str, Reason] = {}
        for layer in active:
            if self.history.length(layer) < self.predictor.info.min_records:
                excused[layer] = "history_too_short"
            elif not self.history.is_finite(layer):
                excused[layer] = "not_finite"
        return excused

    def confidence(self, layers: list[str], *, step: int) -> dict[str, float]:
        """Return the predictor's answers; none if it gives no usable one."""
        if not layers:
            return {}
        history, lengths = self.history.windows(layers)
        more: list[Any] = []
        if getattr(self.predictor, "positional", False):
            more.append(np.array([self._places[layer] for layer in layers], np.float32))
        loss = {"loss": self._losses.windows(lengths)} if self.reads_loss else {}
        try:
            answer = cast(ReadsMore, self.predictor).predict(history, lengths, *more, **loss)
        except PredictionError:  # it has been logged; training continues
            return {}
        freeze = answer[0][:, 1].tolist()
        return {layer: value for layer, value in zip(layers, freeze, strict=True) if not math.isnan(value)}

    def drop(self, layer: str) -> None:
        """Forget the history of a layer that was frozen."""
        self.history.drop(layer)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the history, and the losses if the predictor reads them."""
        state = self.history.state_dict()
        return state | {_LOSSES: self._losses.state()} if self.reads_loss else state

    def check_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Raise `StateError` if these are no vectors that the predictor reads."""
        for layer, rows in state.items():
            if layer == _LOSSES:
                self._losses.check_state(rows)
            elif rows.shape[1:] != (self.history.tailored_size,) or rows.ndim != 2:
                raise StateError(
                    f"The saved state is damaged: the history of layer {layer!r} has shape {rows.shape}; expected vectors "
                    f"of length {self.history.tailored_size}. Resume from another checkpoint, or start without a state."
                )

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace the history, and the losses if they were saved.

        Raises:
            ValueError: If an array has a different length.
        """
        self.history.load_state_dict({layer: rows for layer, rows in state.items() if layer != _LOSSES})
        if _LOSSES in state:
            self._losses.load_state(state[_LOSSES])


def policy_of(predictor: AsksPredictor | Policy) -> Policy:
    """Return the policy itself, or wrap a predictor in a policy.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(predictor, Policy):
        return predictor
    if isinstance(predictor, type) or not hasattr(predictor, "info"):
        given = f"the class {predictor.__name__}" if isinstance(predictor, type) else repr(predictor)
        raise TypeError(
            f"`predictor` is {given}; expected a name in the zoo, the path or address of an ONNX file, the address of a "
            "predictor on a server, a loaded Predictor, or a policy such as smartfrz.baselines.LinearFreezing(). Leave it "
            "out for the default, 'smartfrz-base'."
        )
    return LearnedPolicy(predictor)
