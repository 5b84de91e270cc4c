"""The training loss, on its way from the loop to the predictor's question. No file reads losses yet: a mock does."""

import copy
import gc
import math
import weakref

import numpy as np
import pytest
from numpy_adapter import MockLossPredictor, NumpyAdapter, ScriptedPredictor, make_info
from test_reading_later import LaterAdapter

from smartfrz.baselines import LinearFreezing
from smartfrz.control.controller import FreezeController
from smartfrz.control.losses import LossCurve
from smartfrz.control.options import FreezeOptions
from smartfrz.control.state import sealed
from smartfrz.errors import PredictionError, StateError

SIZES = {"a": 40, "b": 20, "c": 3}
NAN = math.nan


def controller_of(predictor, adapter=None, **options):
    defaults = {"record_every": 2, "decide_every": 1, "patience": 1, "threshold": 0.5}
    return FreezeController(adapter or NumpyAdapter.random(SIZES), predictor, FreezeOptions(**defaults | options))


def run(controller, losses):
    for loss in losses:
        controller._adapter.train_step()
        if loss is not None:
            controller.note_loss(loss)
        controller.step()


def alike(asked, expected):
    np.testing.assert_allclose(asked, np.array(expected, np.float32), rtol=1e-6)


def test_a_mock_predictor_is_told_the_mean_loss_of_the_steps_before_each_record():
    predictor = MockLossPredictor()
    run(controller_of(predictor), [8, 6, 4.0, 2, 3, None])
    first, second, third = predictor.losses
    assert first.dtype == np.float32
    alike(third, [[7, 3, 3]] * 3)
    alike(second, [[7, 3]] * 3)
    alike(first, [[7]] * 3)
    assert [history.shape[:2] for history, _ in predictor.calls] == [loss.shape for loss in predictor.losses]


@pytest.mark.parametrize("make", [NumpyAdapter, LaterAdapter])
def test_rows_end_at_the_newest_record_for_a_mock_predictor_also_where_layers_joined_late(make):
    adapter = make.random(SIZES)
    adapter.trained = {"a", "b"}
    adapter.set_layers(["a", "b"])
    predictor = MockLossPredictor(info=make_info(window=3, min_records=1))
    controller = controller_of(predictor, adapter, record_every=1)
    run(controller, [9, 8])
    adapter.trained = {"a", "b", "c"}
    run(controller, [7, 6, 5, 4])
    lengths = [lengths.tolist() for _, lengths in predictor.calls]
    joined = lengths.index([3, 3, 2])
    alike(predictor.losses[joined], [[8, 7, 6], [8, 7, 6], [NAN, 7, 6]])


@pytest.mark.parametrize("wrong", [NAN, math.inf, -math.inf, 1e300, 0.0])
def test_a_loss_that_is_none_is_unknown_for_its_record_only(wrong):
    predictor = MockLossPredictor()
    run(controller_of(predictor), [8, 8, wrong, wrong, 4, 4])
    alike(predictor.losses[2], [[8, NAN, 4]] * 3)


def test_a_mock_predictor_is_told_no_losses_of_both_signs():
    """An ELBO, or a policy gradient: near zero it would pass for a loss that has fallen by a factor of thousands."""
    predictor = MockLossPredictor(info=make_info(window=4, min_records=1))
    controller = controller_of(predictor, record_every=1)
    run(controller, [3, 2, -1, 1e-4])
    state = controller.state_dict()
    run(controller, [2, 2, 1])
    assert [losses is None for losses in predictor.losses] == [False, False, True, True, True, True, False]
    resumed = MockLossPredictor(info=predictor.info)
    other = controller_of(resumed, record_every=1)
    other.load_state_dict(state)
    run(other, [2, 2, 1])
    assert resumed.losses[:2] == [None, None]
    alike(resumed.losses[2], [[1e-4, 2, 2, 1]] * 3)


def test_without_any_known_loss_a_mock_predictor_is_told_none():
    predictor = MockLossPredictor()
    run(controller_of(predictor), [None, None, NAN, 3.0])
    assert predictor.losses == [None, None]


def test_a_mock_predictor_that_reads_positions_is_told_both():
    predictor = MockLossPredictor(positional=True)
    run(controller_of(predictor), [2, 2])
    alike(predictor.places, [[0, 0.5, 1]])
    alike(predictor.losses[0], [[2]] * 3)


def test_a_mock_predictor_that_fails_freezes_nothing():
    class MockFailing(MockLossPredictor):
        def predict(self, *args, **kwargs):
            raise PredictionError("no answer")

    controller = controller_of(MockFailing())
    run(controller, [2] * 8)
    assert controller.events
    assert not controller.frozen


@pytest.mark.parametrize("policy", [ScriptedPredictor(), LinearFreezing(anneal=False)])
def test_a_policy_that_reads_no_losses_keeps_none(policy):
    controller = controller_of(policy, total_steps=20)
    run(controller, [4, NAN, 3, 2, 1])
    plain = controller_of(policy, total_steps=20)
    run(plain, [None] * 5)
    assert set(controller.state_dict()["history"]) == set(plain.state_dict()["history"]) <= set(SIZES)
    assert repr(controller.events) == repr(plain.events)


@pytest.mark.parametrize("make", [NumpyAdapter, LaterAdapter])
@pytest.mark.parametrize("saved_after", [1, 2, 3, 5, 6])
def test_a_resumed_run_asks_a_mock_predictor_as_an_uninterrupted_one(make, saved_after):
    losses = [9, 8, NAN, 6, 5, 4.5, 4, 3]
    adapter, whole = make.random(SIZES), MockLossPredictor()
    controller = controller_of(whole, adapter)
    run(controller, losses[:saved_after])
    asked = len(whole.losses)
    state = copy.deepcopy(controller.state_dict())
    twin = make(adapter.arrays)
    twin.velocity = copy.deepcopy(adapter.velocity)
    run(controller, losses[saved_after:])
    resumed = MockLossPredictor()
    other = controller_of(resumed, twin)
    other.load_state_dict(state)
    run(other, losses[saved_after:])
    assert len(resumed.losses) == len(whole.losses) - asked > 0
    for theirs, ours in zip(whole.losses[asked:], resumed.losses, strict=True):
        np.testing.assert_array_equal(theirs, ours)


def test_an_older_state_without_losses_loads_and_they_are_unknown():
    controller = controller_of(MockLossPredictor())
    run(controller, [4, 4])
    state = controller.state_dict()
    del state["history"]["..losses"], state["sha256"]
    predictor = MockLossPredictor()
    resumed = controller_of(predictor)
    resumed.load_state_dict(sealed(state))
    run(resumed, [2, 2])
    alike(predictor.losses[0], [[NAN, 2]] * 3)


def test_a_state_with_losses_loads_where_the_same_mock_predictor_reads_none():
    """As where a run goes on with a server that does not offer the input."""
    controller = controller_of(MockLossPredictor())
    run(controller, [4, 4, 4])
    state = controller.state_dict()
    resumed = controller_of(MockLossPredictor(reads_loss=False))
    resumed.load_state_dict(state)
    assert "..losses" not in resumed.state_dict()["history"]
    np.testing.assert_equal(resumed.state_dict()["history"], {k: v for k, v in state["history"].items() if k in SIZES})


@pytest.mark.parametrize(
    "damaged",
    [
        np.zeros(1),
        np.zeros(20),
        np.zeros((2, 2)),
        np.array([1.0, -1.0]),
        np.array([1.0, 0.5]),
        np.array([1.0, NAN]),
        np.array([1.0, math.inf]),
        np.array([1.0, 1.0, 0.0]),
        np.array([1.0, 1.0, math.inf]),
        np.array([1, 1]),
    ],
)
def test_damaged_losses_are_refused(damaged):
    controller = controller_of(MockLossPredictor())
    run(controller, [4, 4])
    state = controller.state_dict()
    state["history"]["..losses"] = damaged
    del state["sha256"]
    with pytest.raises(StateError, match=r"training losses are .*; expected a sum, a number of steps"):
        controller_of(MockLossPredictor()).load_state_dict(sealed(state))


def test_records_at_other_distances_are_forgotten_with_their_losses():
    controller = controller_of(MockLossPredictor())
    run(controller, [4, 4, 4])
    predictor = MockLossPredictor()
    resumed = controller_of(predictor, record_every=1)
    resumed.load_state_dict(controller.state_dict())
    run(resumed, [2])
    alike(predictor.losses[0], [[2]] * 3)


def test_a_curve_is_kept_as_long_as_the_window():
    curve = LossCurve(3)
    for mean in (5.0, 4.0, 3.0, 2.0):
        curve.append(mean)
    alike(curve.windows(np.array([3, 1])), [[4, 3, 2], [NAN, NAN, 2]])
    assert curve.state().tolist() == [0, 0, 4, 3, 2]


# In PyTorch.

torch = pytest.importorskip("torch")

from torch_runs import loss_of, mlp  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402
from smartfrz.adapters.torch.freezing import TorchAdapter  # noqa: E402
from smartfrz.adapters.torch.losses import plain_loss  # noqa: E402


def freezer_of(predictor, **options):
    model = mlp(4, 8, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    defaults = {"record_every": 2, "decide_every": 1, "patience": 1, "threshold": 0.5, "verbose": False}
    return SmartFRZ(model, optimizer, predictor, **defaults | options)


def steps(freezer, number, shown=lambda loss: loss, start=0):
    """A plain loop; returns the losses."""
    losses = []
    for step in range(start, start + number):
        loss = loss_of(freezer._model, step, 16, 4)
        loss.backward()
        freezer._optimizers[0].step()
        freezer._optimizers[0].zero_grad()
        freezer.step(shown(loss))
        losses.append(loss.item())
    return losses


SHOWN = {
    "tensor": lambda loss: loss,
    "one element": lambda loss: loss.reshape(1),
    "float": lambda loss: loss.item(),
    "float64": lambda loss: loss.detach().double(),
    "numpy": lambda loss: loss.detach().numpy()[()],
}


@pytest.mark.parametrize("shown", SHOWN)
def test_a_plain_loop_tells_a_mock_predictor_its_losses(shown):
    predictor = MockLossPredictor()
    freezer = freezer_of(predictor)
    losses = steps(freezer, 6, SHOWN[shown])
    assert freezer.reads_loss
    alike(predictor.losses[2], [[np.mean(losses[i : i + 2]) for i in (0, 2, 4)]] * 3)
    freezer.close()


def test_weights_read_later_come_with_the_same_losses_for_a_mock_predictor(monkeypatch):
    """A GPU's way, forced on the CPU: losses stay tensors, and are read one step after the record."""
    monkeypatch.setattr(TorchAdapter, "_always_later", True)
    monkeypatch.setattr("smartfrz.adapters.torch.freezer.plain_loss", lambda loss: loss.detach())
    predictor = MockLossPredictor()
    freezer = freezer_of(predictor)
    losses = steps(freezer, 7)
    alike(predictor.losses[2], [[np.mean(losses[i : i + 2]) for i in (0, 2, 4)]] * 3)
    state = freezer.state_dict()["controller"]["history"]["..losses"]
    np.testing.assert_allclose(state[:2], [losses[6], 1], rtol=1e-6)
    freezer.close()


def test_no_graph_is_kept_for_a_mock_predictor():
    freezer = freezer_of(MockLossPredictor(), record_every=50)
    seen = []
    steps(freezer, 3, lambda loss: seen.append(weakref.ref(loss)) or loss)
    gc.collect()
    assert [loss() for loss in seen] == [None] * 3
    freezer.close()
    on_device = plain_loss(torch.ones((), dtype=torch.float16, device="meta", requires_grad=True) * 2)
    assert (on_device.device.type, on_device.dtype, on_device.grad_fn) == ("meta", torch.float32, None)


def test_the_state_of_a_run_keeps_the_losses_for_a_mock_predictor(tmp_path):
    freezer = freezer_of(MockLossPredictor())
    losses = steps(freezer, 3)
    torch.save(freezer.state_dict(), tmp_path / "state.pt")
    predictor = MockLossPredictor()
    resumed = freezer_of(predictor)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    losses += steps(resumed, 1, start=3)
    alike(predictor.losses[0], [[np.mean(losses[:2]), np.mean(losses[2:])]] * 3)
    freezer.close()
    resumed.close()


def test_with_auto_step_a_loss_counts_for_the_next_step_of_a_mock_predictor():
    predictor = MockLossPredictor()
    freezer = freezer_of(predictor, auto_step=True)
    losses = steps(freezer, 4)
    alike(predictor.losses[1], [[losses[0], np.mean(losses[1:3])]] * 3)
    freezer.close()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda: torch.ones(4),
            r"a tensor of shape \(4,\) and type torch.float32; expected the training loss of the step",
        ),
        (lambda: torch.ones((), dtype=torch.complex64), "type torch.complex64"),
        (lambda: "0.5", "received '0.5', a str; expected"),
        (lambda: [0.5], r"received \[0.5\], a list; .* Pass the mean, loss.mean\(\)"),
        (lambda: True, "received True, a bool"),
    ],
)
@pytest.mark.parametrize("predictor", [MockLossPredictor, ScriptedPredictor])
def test_wrong_losses(loss, message, predictor):
    freezer = freezer_of(predictor())
    steps(freezer, 1)
    with pytest.raises(TypeError, match=message):
        steps(freezer, 1, lambda _: loss())
    assert freezer.num_steps == 1
    freezer.close()


def test_losses_change_nothing_where_the_predictor_reads_none():
    runs = []
    for shown in (lambda loss: loss, lambda loss: None, lambda loss: NAN):
        freezer = freezer_of(ScriptedPredictor([{"0": 0.9, "2": 0.1, "4": 0.1}]))
        steps(freezer, 4, shown)
        freezer.close()
        runs.append((repr(freezer.events), [p.detach().numpy().tobytes() for p in freezer._model.parameters()]))
    assert runs[0] == runs[1] == runs[2]
