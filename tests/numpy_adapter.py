"""The reference adapter, on NumPy, and predictors whose answers tests choose.

The adapters of real frameworks are compared with `NumpyAdapter`.
"""

from dataclasses import dataclass, field

import numpy as np

from smartfrz.predictor.contract import PredictorInfo


def make_info(**changes):
    """Facts of a small predictor."""
    facts = {
        "name": "scripted",
        "tailored_size": 8,
        "window": 10,
        "representation": "raw",
        "threshold": 0.5,
        "record_fraction": 0.02,
        "min_records": 2,
    }
    return PredictorInfo(**facts | changes)


class NumpyAdapter:
    """Layers whose weights are pulled towards 1 by SGD with momentum 0.9 and weight decay 0.1.

    Args:
        arrays: Layer name to weights, in execution order. Copied.
        trained: The layers that a training script trains. It may change this set; all by default.
        ran: The layers that have run; all by default.

    Attributes:
        trainable: Frozen layers whose flag somebody has set again; they are then trained.
        decays: Frozen layers whose weights decay all the same.
        rates: Layer name to a factor on its learning rate that the user chose.
    """

    def __init__(self, arrays, trained=None, ran=None):
        self.arrays = {name: np.array(array) for name, array in arrays.items()}
        self.velocity = {name: np.zeros_like(array) for name, array in self.arrays.items()}
        self.frozen = set()
        self.lr_scales = {}
        self.trained = set(self.arrays if trained is None else trained)
        self.ran = set(self.arrays if ran is None else ran)
        self.trainable, self.decays, self.rates = set(), set(), {}
        self._kept = {}
        self._known = [name for name in self.arrays if name in self.ran]
        self._layers = self.find_layers()
        self.gradient_sums = {name: np.zeros(array.shape) for name, array in self.arrays.items()}
        self.latest, self.smallest = {}, {}

    @classmethod
    def random(cls, sizes, seed=0):
        """Layers of the given numbers of weights."""
        rng = np.random.default_rng(seed)
        return cls({name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()})

    def layers(self):
        return list(self._layers)

    def all_layers(self):
        return list(self._known)

    def find_layers(self):
        return [name for name in self.arrays if name in self.trained and name in self.ran]

    def set_layers(self, layers):
        self._layers = list(layers)
        self._known = [name for name in self.arrays if name in self._known or name in layers]
        self.frozen &= self.trained

    def disturbed(self, layers):
        found = {}
        for layer in layers:
            moved = self.arrays[layer].tobytes() != self._kept[layer]
            if layer in self.trainable:
                found[layer] = "trained" if moved else "trainable"
            elif moved:
                found[layer] = "moved"
        return found

    def untrained(self, layers):
        return {layer: "learning_rate_zero" for layer in layers if self.rates.get(layer, 1.0) == 0.0}

    def num_weights(self, layer):
        return self.arrays[layer].size

    def weights(self, layer, indices):
        return self.arrays[layer].reshape(-1)[indices].astype(np.float32)

    def tailored(self, positions):
        return {layer: self.weights(layer, indices) for layer, indices in positions.items()}

    def freeze(self, layers):
        for layer in layers:
            self.frozen.add(layer)
            self.trainable.discard(layer)
            self._kept[layer] = self.arrays[layer].tobytes()
            self.velocity[layer][...] = 0
            self.gradient_sums[layer][...] = 0
            self.latest.pop(layer, None)
            self.smallest.pop(layer, None)
            self.lr_scales.pop(layer, None)

    def unfreeze(self, layers):
        self.frozen -= set(layers)
        self.trainable -= set(layers)

    def set_lr_scale(self, layer, scale):
        self.lr_scales[layer] = scale

    def gradient_norm(self, layer):
        norm = np.abs(self.gradient_sums[layer]).sum()
        self.gradient_sums[layer][...] = 0
        return float(norm)

    def gradient_changes(self, layers):
        return {layer: self.smallest.pop(layer, np.inf) for layer in layers}

    def train_step(self, learning_rate=0.05):
        """One real step; layers further behind converge more slowly."""
        for index, (name, array) in enumerate(self.arrays.items()):
            if name in self.decays and name in self.frozen:
                array *= 0.9
            if name in self.trained & self.ran and (name not in self.frozen or name in self.trainable):
                gradient = (array - 1) / (index + 1) + 0.1 * array
                self.gradient_sums[name] += gradient
                if name in self.latest:
                    change = float(np.abs(gradient - self.latest[name]).sum())
                    self.smallest[name] = min(self.smallest.get(name, np.inf), change)
                self.latest[name] = gradient
                self.velocity[name] = 0.9 * self.velocity[name] + gradient
                array -= learning_rate * self.rates.get(name, 1.0) * self.lr_scales.get(name, 1.0) * self.velocity[name]


@dataclass
class ScriptedPredictor:
    """Answers with listed confidences, so that a test knows what will be frozen.

    Attributes:
        script: One mapping per freezing stage: the layers that will be asked about, in execution
            order, and the confidence of each. It answers 0 to everything after the last one.
        info: The facts it gives.
        sha256: Which predictor it says it is.
        calls: The `history` and `lengths` it was asked with.
    """

    script: list = field(default_factory=list)
    info: PredictorInfo = field(default_factory=make_info)
    sha256: str = "5c" * 32
    calls: list = field(default_factory=list)

    def predict(self, history, lengths):
        stage = self.script[len(self.calls)] if len(self.calls) < len(self.script) else {}
        self.calls.append((history.copy(), lengths.copy()))
        freeze = np.array(list(stage.values()) if stage else [0.0] * len(history), np.float32)
        if len(freeze) != len(history):
            raise LookupError(f"asked about {len(history)} layers; the script has {list(stage)}")
        return np.stack([1 - freeze, freeze], axis=1), np.zeros(history.shape[:2], np.float32)


def script(layers, *stages):
    """Answers of a predictor that has these layers frozen, stage by stage."""
    active, answers = list(layers), []
    for chosen in stages:
        answers.append({layer: 0.9 if layer in chosen else 0.1 for layer in active})
        active = [layer for layer in active if layer not in chosen]
    return answers


@dataclass
class ChangePredictor:
    """The less a layer's weights changed over the history, the surer: its answers depend on all of it."""

    info: PredictorInfo = field(default_factory=make_info)
    sha256: str = "c4" * 32
    scale: float = 10.0

    def predict(self, history, lengths):
        freeze = np.zeros(len(history), np.float32)
        for index, (rows, length) in enumerate(zip(history, lengths, strict=True)):
            real = rows[-int(length) :].astype(np.float64)
            change = np.abs(np.diff(real, axis=0)).mean() / np.abs(real[-1]).mean()
            freeze[index] = np.exp(-self.scale * change)
        return np.stack([1 - freeze, freeze], axis=1), np.zeros(history.shape[:2], np.float32)


@dataclass
class MockLossPredictor(ScriptedPredictor):
    """A scripted predictor that reads losses, and keeps what it was asked with.

    Attributes:
        losses: What it was asked with.
        places: The positions it was told; empty unless `positional`.
    """

    info: PredictorInfo = field(default_factory=lambda: make_info(min_records=1))
    reads_loss: bool = True
    positional: bool = False
    losses: list = field(default_factory=list)
    places: list = field(default_factory=list)

    def predict(self, history, lengths, position=None, loss=None):
        self.losses.append(loss)
        self.places += [] if position is None else [position]
        return super().predict(history, lengths)


class SlowPredictor:
    """Advances the clock of the budget, and not the machine's, at each question; sure of the first layer from one on.

    Attributes:
        now: What the clock says.
        asked_at: When it was asked.
    """

    info, sha256 = make_info(), "ab" * 32

    def __init__(self, monkeypatch, sure_from=0, seconds=25.0):
        self.now, self.asked_at, self.seconds, self.sure_from = 1000.0, [], seconds, sure_from
        monkeypatch.setattr("smartfrz.control.budget.clock", lambda: self.now)

    def predict(self, history, lengths):
        self.asked_at.append(self.now)
        self.now += self.seconds
        freeze = np.zeros(len(history), np.float32)
        freeze[0] = len(self.asked_at) > self.sure_from
        return np.stack([1 - freeze, freeze], axis=1), np.zeros(history.shape[:2], np.float32)
