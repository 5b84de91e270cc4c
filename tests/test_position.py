"""Where in the network a layer stands: from the policy to the network, and for callers that do not know it."""

from dataclasses import dataclass, field

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from numpy_adapter import NumpyAdapter, ScriptedPredictor, make_info  # noqa: E402

from smartfrz.control.learned import LearnedPolicy  # noqa: E402
from smartfrz.predictor.contract import UNKNOWN_POSITION  # noqa: E402
from smartfrz.predictor.runtime import Predictor  # noqa: E402
from smartfrz.predictor.training.export import export  # noqa: E402
from smartfrz.predictor.training.model import FIGURES, FreezePredictor, trajectory  # noqa: E402

SIZE, WINDOW = 64, 8


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FreezePredictor(SIZE, "trajectory").eval()


@pytest.fixture(scope="module")
def predictor(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("position") / "placed.onnx"
    export(network, make_info(tailored_size=SIZE, window=WINDOW, representation="trajectory"), path)
    return Predictor(path, device="cpu")


def histories(num_layers):
    walk = np.random.default_rng(0).normal(size=(num_layers, WINDOW, SIZE)).cumsum(1) * 0.01 + 1.0
    return walk.astype(np.float32), np.full(num_layers, WINDOW, np.int64)


def test_the_position_counts_and_is_unknown_by_default(predictor):
    history, lengths = histories(3)
    assert predictor.positional
    without = predictor.predict(history, lengths).confidence
    unknown = predictor.predict(history, lengths, np.full(3, UNKNOWN_POSITION, np.float32)).confidence
    first, last = (predictor.predict(history, lengths, np.full(3, p, np.float32)).confidence for p in (0.0, 1.0))
    np.testing.assert_array_equal(without, unknown)
    assert np.abs(first - last).min() > 1e-4
    assert np.abs(first - unknown).min() > 1e-4


def test_many_layers_are_asked_in_parts_with_their_positions(predictor):
    history, lengths = histories(100)
    places = np.linspace(0, 1, 100, dtype=np.float32)
    together = predictor.predict(history, lengths, places).confidence
    alone = [predictor.predict(history[i : i + 1], lengths[:1], places[i : i + 1]).confidence for i in (0, 37, 99)]
    np.testing.assert_allclose(together[[0, 37, 99]], np.concatenate(alone), atol=1e-6)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (np.zeros(2, np.float32), r"position is float32 \(2,\); expected float32 \(3,\)"),
        (np.zeros(3), r"position is float64 \(3,\); expected float32"),
        (np.array([0, 1, 2], np.float32), r"expected values from 0, the first layer, to 1, the last, or -1\.0"),
        (np.array([0, 1, np.nan], np.float32), r"expected values from 0, the first layer, to 1"),
    ],
)
def test_wrong_positions(predictor, position, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(*histories(3), position)


def test_a_predictor_without_position_says_so(predictor_file):
    other = Predictor(predictor_file, device="cpu")
    assert not other.positional
    with pytest.raises(ValueError, match=r"'tiny' reads no position: its representation is 'raw'\. Leave `position`"):
        other.predict(np.zeros((1, 3, 64), np.float32), np.array([3]), np.zeros(1, np.float32))


@dataclass
class PlacedPredictor(ScriptedPredictor):
    """A scripted predictor that is told positions, and keeps them."""

    positional: bool = True
    places: list = field(default_factory=list)

    def predict(self, history, lengths, position):
        self.places.append(position)
        return super().predict(history, lengths)


def test_the_policy_tells_where_layers_stand_among_all_layers():
    adapter = NumpyAdapter({name: np.ones(4, np.float32) for name in "abcde"})
    adapter.freeze(["b"])
    predictor = PlacedPredictor(info=make_info(tailored_size=4, window=3, min_records=1))
    policy = LearnedPolicy(predictor)
    policy.begin(adapter, adapter.layers(), total_steps=10, seed=0)
    policy.record(["a", "d", "e"], ask=True)
    policy.confidence(["a", "d", "e"], step=1)
    np.testing.assert_allclose(predictor.places[0], [0.0, 0.75, 1.0])


def test_figures_do_not_depend_on_which_weights_were_sampled():
    """Two samples of one layer's way give nearly the same, as long as its weights move alike."""
    walk = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 12, 8192)).cumsum(1) * 0.01 + 3.0).float()
    real = torch.ones(1, 12, dtype=torch.bool)
    ours, theirs = trajectory(walk[..., ::2], real), trajectory(walk[..., 1::2], real)
    assert ours.shape == (1, 12, len(FIGURES))
    torch.testing.assert_close(ours[:, 1:-1], theirs[:, 1:-1], atol=0.06, rtol=0)


def test_figures_tell_drifting_from_wandering():
    rng, real = np.random.default_rng(2), torch.ones(1, 12, dtype=torch.bool)
    start, direction = rng.normal(size=(1, 1, 1024)), rng.normal(size=(1, 1, 1024)) * 0.01
    drifting = start + direction * np.arange(12)[None, :, None]
    wandering = start + (rng.normal(size=(1, 12, 1024)) * 0.01).cumsum(1)
    drift, wander = (
        dict(zip(FIGURES, trajectory(torch.from_numpy(x).float(), real)[0, 8].tolist(), strict=True))
        for x in (drifting, wandering)
    )
    assert drift["step_along_last"] == pytest.approx(1.0, abs=1e-3)
    assert abs(wander["step_along_last"]) < 0.15
    assert drift["straightness"] == pytest.approx(np.log10(4) / 2.5, abs=1e-3)
    assert wander["straightness"] == pytest.approx(np.log10(2) / 2.5, abs=0.03)


def test_padding_changes_nothing(network):
    history, _ = histories(2)
    short = torch.from_numpy(history[:, 3:])
    padded = torch.cat([torch.full((2, 3, SIZE), 7.0), short], dim=1)
    with torch.no_grad():
        alone = network(short, torch.full((2,), WINDOW - 3))[0]
        left_padded = network(padded, torch.full((2,), WINDOW - 3))[0]
    torch.testing.assert_close(alone, left_padded)
