"""The learned predictor as a policy: it judges layers by the history of their tailored weights."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from smartfrz.control.decision import Reason
from smartfrz.control.history import EncodedHistory, Encodes, WeightHistory
from smartfrz.control.policy import Policy
from smartfrz.control.tailoring import tailoring_positions
from smartfrz.errors import ServerError

RECORDS_PER_STAGE = 2
PATIENCE = 2


class HistoryFacts(Protocol):
    """What has to be known of whatever reads weight histories; `PredictorInfo` says it of a predictor file."""

    @property
    def name(self) -> str:
        """For messages and reports."""
        ...

    @property
    def tailored_size(self) -> int:
        """Length of a tailored vector."""
        ...

    @property
    def window(self) -> int:
        """Records that are kept of each layer."""
        ...

    @property
    def min_records(self) -> int:
        """Shortest history that can be judged."""
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
    """What `LearnedPolicy` needs of a `Predictor`; tests pass scripted ones."""

    @property
    def info(self) -> HistoryFacts:
        """Facts of the predictor."""
        ...

    @property
    def sha256(self) -> str:
        """Which predictor it is."""
        ...

    def predict(self, history: NDArray[np.float32], lengths: NDArray[np.int64]) -> Any:
        """Confidence `[layers, 2]` and attention `[layers, window]`; `ServerError` where nobody answers."""
        ...


class ReadsPosition(Protocol):
    """What a predictor offers beyond `AsksPredictor` whose attribute `positional` is true."""

    def predict(self, history: NDArray[np.float32], lengths: NDArray[np.int64], position: NDArray[np.float32]) -> Any:
        """As `AsksPredictor.predict`; `position`, float32 `[layers]`, is 0 for the first layer and 1 for the last."""
        ...


class LearnedPolicy(Policy):
    """Records tailored weights, and asks a predictor.

    Args:
        predictor: A loaded predictor, or whatever else judges weight histories.
    """

    decide_every = RECORDS_PER_STAGE
    patience = PATIENCE

    def __init__(self, predictor: AsksPredictor):
        self.predictor = predictor
        self.name = predictor.info.name
        self.threshold = predictor.info.threshold
        self.record_fraction = predictor.info.record_fraction

    @property
    def sha256(self) -> str:
        """Of the predictor."""
        return self.predictor.sha256

    def begin(self, adapter: Any, layers: Sequence[str], *, total_steps: int | None, seed: int) -> None:
        """Choose the positions of the tailored weights, and forget what was recorded."""
        info = self.predictor.info
        self._adapter = adapter
        everything = adapter.all_layers()  # those that the user froze included
        self._places = {layer: index / max(1, len(everything) - 1) for index, layer in enumerate(everything)}
        self._positions = {
            layer: tailoring_positions(layer, adapter.num_weights(layer), info.tailored_size, seed=seed)
            for layer in layers
        }
        self.history: WeightHistory | EncodedHistory = WeightHistory(info.window, info.tailored_size)
        if getattr(self.predictor, "incremental", False):  # each record is encoded once, not at every stage anew
            self.history = EncodedHistory(cast(Encodes, self.predictor))

    def record(self, active: list[str], *, ask: bool) -> None:
        """Read the tailored weights of the active layers."""
        vectors = self._adapter.tailored({layer: self._positions[layer] for layer in active})
        if isinstance(self.history, EncodedHistory):
            self.history.record(vectors, ask=ask)
        else:
            for layer, vector in vectors.items():
                self.history.append(layer, vector)

    def excused(self, active: list[str]) -> dict[str, Reason]:
        """Layers with a short history, or with one that is not finite."""
        excused: dict[str, Reason] = {}
        for layer in active:
            if self.history.length(layer) < self.predictor.info.min_records:
                excused[layer] = "history_too_short"
            elif not self.history.is_finite(layer):
                excused[layer] = "not_finite"
        return excused

    def confidence(self, layers: list[str], *, step: int) -> dict[str, float]:
        """The predictor's answers; none where it is on a server that does not answer."""
        if isinstance(self.history, EncodedHistory):
            return self.history.confidence(layers)
        if not layers:
            return {}
        asked = self.history.windows(layers)
        try:
            if getattr(self.predictor, "positional", False):
                places = np.array([self._places[layer] for layer in layers], np.float32)
                answer = cast(ReadsPosition, self.predictor).predict(*asked, places)
            else:
                answer = self.predictor.predict(*asked)
        except ServerError:  # which has been logged; training goes on
            return {}
        return dict(zip(layers, answer[0][:, 1].tolist(), strict=True))

    def drop(self, layer: str) -> None:
        """Forget the history of a layer that was frozen."""
        self.history.drop(layer)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """The history."""
        return self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace the history.

        Raises:
            ValueError: If an array has another length.
        """
        self.history.load_state_dict(dict(state))


def policy_of(predictor: AsksPredictor | Policy) -> Policy:
    """The policy itself, or that of a predictor."""
    return predictor if isinstance(predictor, Policy) else LearnedPolicy(predictor)
