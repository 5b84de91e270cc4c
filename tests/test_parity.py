"""PyTorch and ONNX Runtime give the same answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_adapter import make_info

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from smartfrz.errors import PredictorFileError  # noqa: E402
from smartfrz.predictor.contract import REPRESENTATIONS  # noqa: E402
from smartfrz.predictor.runtime import Predictor  # noqa: E402
from smartfrz.predictor.training import export as export_module  # noqa: E402
from smartfrz.predictor.training.export import TOLERANCE, export, parity  # noqa: E402
from smartfrz.predictor.training.model import FreezePredictor, represent  # noqa: E402

SIZE, WINDOW = 32, 12


@pytest.fixture(scope="module", params=REPRESENTATIONS)
def pair(request, tmp_path_factory):
    """A network whose answers differ much between inputs, and its file."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = FreezePredictor(SIZE, request.param)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.8
    path = tmp_path_factory.mktemp("parity") / "predictor.onnx"
    info = make_info(name="parity", tailored_size=SIZE, window=WINDOW, representation=request.param)
    assert export(model, info, path) <= TOLERANCE
    return model.eval(), Predictor(path, device="cpu")


def random_input(seed, num_layers, window, scale):
    """Weights on a random walk, left-padded."""
    rng = np.random.default_rng(seed)
    walk = rng.normal(size=(num_layers, window, SIZE)).cumsum(axis=1) * scale
    history = (rng.normal(size=(num_layers, 1, SIZE)) + walk).astype(np.float32)
    lengths = rng.integers(1, window + 1, num_layers)
    history[np.arange(window) < window - lengths[:, None]] = 0
    return history, lengths


def both(pair, history, lengths):
    model, predictor = pair
    with torch.no_grad():
        expected = model(torch.from_numpy(history), torch.from_numpy(lengths))
    return predictor.predict(history, lengths), [e.numpy() for e in expected]


@settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.integers(1, WINDOW),
    st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]),
)
def test_torch_and_onnxruntime_agree(pair, seed, num_layers, window, scale):
    answers, expected = both(pair, *random_input(seed, num_layers, window, scale))
    for got, wanted in zip(answers, expected, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


def test_the_inputs_of_this_file_lead_to_different_answers(pair):
    answers, _ = both(pair, *random_input(0, 40, WINDOW, 0.1))
    assert answers.confidence[:, 1].std() > 100 * TOLERANCE
    # Attention is not the plain average over the window either.
    assert np.abs(answers.attention.max(1) - 1 / WINDOW).max() > 100 * TOLERANCE


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e30])
def test_constant_weights(pair, value):
    """A layer of zeros, a dead layer, a layer that does not move: finite and equal in both."""
    history = np.full((2, 5, SIZE), value, np.float32)
    answers, expected = both(pair, history, np.array([5, 2]))
    if value <= 1:
        assert all(np.isfinite(a).all() for a in answers)
    for got, wanted in zip(answers, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("representation", REPRESENTATIONS[1:])
def test_what_is_not_raw_does_not_depend_on_the_scale_of_the_weights(representation):
    history, lengths = map(torch.from_numpy, random_input(2, 3, 6, 0.01))
    real = torch.arange(6)[None] >= 6 - lengths[:, None]
    seen = represent(history, real, representation)
    assert seen.shape[:2] == history.shape[:2]
    torch.testing.assert_close(represent(history * 100, real, representation)[real], seen[real], rtol=1e-4, atol=1e-4)


def test_raw_sees_the_weights():
    history = torch.randn(2, 3, 4)
    assert torch.equal(represent(history, torch.ones(2, 3, dtype=torch.bool), "raw"), history)


def test_an_unknown_representation():
    with pytest.raises(ValueError, match="`representation` is 'row'; expected one of raw, trajectory"):
        FreezePredictor(SIZE, "row")


def test_parity_is_nan_for_a_network_that_answers_nan(tiny_model, predictor_file):
    predictor = Predictor(predictor_file, device="cpu")
    assert parity(tiny_model, predictor, rounds=2) <= TOLERANCE
    broken = FreezePredictor(64, "raw")
    with torch.no_grad():
        broken.head[0].bias[0] = float("nan")
    assert np.isnan(parity(broken, predictor, rounds=2))


@pytest.mark.parametrize("difference", [2e-5, float("nan")])
def test_mock_a_file_that_answers_differently_is_not_kept(
    tiny_model, tiny_info, predictor_file, tmp_path, monkeypatch, difference
):
    monkeypatch.setattr(export_module, "serialise", lambda model, info: predictor_file.read_bytes())
    monkeypatch.setattr(export_module, "parity", lambda model, predictor: difference)
    (tmp_path / "p.onnx").write_bytes(b"old")
    with pytest.raises(PredictorFileError, match=r"differs from the trained network by .*; expected at most 1e-05"):
        export(tiny_model, tiny_info, tmp_path / "p.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["p.onnx"]
    assert (tmp_path / "p.onnx").read_bytes() == b"old"
