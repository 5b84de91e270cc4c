"""Keras' running mean of the loss, turned back for the predictor's question. No file reads losses yet: a mock does."""

import math

import numpy as np
import pytest
from keras_runs import BACKEND, WARNINGS, compiled, data, fit, freezer, keras, mlp, not_on_torch, read
from numpy_adapter import MockLossPredictor

from smartfrz.adapters.keras.losses import LoggedLosses

pytestmark = WARNINGS
criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Oracle(keras.callbacks.Callback):
    """The loss of each batch of a `mlp`, computed with NumPy before Keras trains on it, and the state after some batches.

    Args:
        x: Inputs of an epoch.
        y: Their targets.
        freezer: Whose state is kept.
        saved_after: Batches after which the state is kept.
    """

    def __init__(self, x, y, freezer, saved_after=()):
        super().__init__()
        self.x, self.y, self.freezer, self.saved_after = x, y, freezer, saved_after
        self.losses, self.states = [], {}

    def on_train_batch_begin(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        x, y = self.x[8 * batch : 8 * (batch + 1)], self.y[8 * batch : 8 * (batch + 1)]
        dense = [layer for layer in self.model.layers if layer.weights]
        for layer in dense:
            x = x @ read(layer.kernel) + read(layer.bias)
            x = x if layer is dense[-1] else np.tanh(x)
        self.losses.append(float(np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(len(y)), y])))

    def on_train_batch_end(self, batch, logs=None):
        if len(self.losses) in self.saved_after:
            self.states[len(self.losses)] = self.freezer.state_dict()["controller"]["history"]["..losses"]


class LogsEachBatch(keras.Sequential):
    """Logs the loss of each batch, and not the mean over the epoch so far."""

    def train_step(self, *args):
        if BACKEND == "jax":
            state, (x, y) = args
            predicted, _ = self.stateless_call(state[0], state[1], x)
            logs, state = super().train_step(*args)
            return logs | {"loss": criterion(y, predicted)}, state
        x, y = args[0]
        loss = criterion(y, self(x))
        return super().train_step(*args) | {"loss": loss}


def train(predictor, model=None, epochs=2, saved_after=(), **options):
    x, y = data(shape=(4,))
    model = compiled(model or mlp(4, 8, 8, 3))
    own = freezer(predictor=predictor, **{"record_every": 3, "decide_every": 1} | options)
    oracle = Oracle(x, y, own, saved_after=saved_after)
    fit(model, [own, oracle], epochs=epochs, inputs=(x, y))
    return own, oracle


def means(losses, every):
    return [np.mean(losses[i : i + every]) for i in range(0, len(losses) - every + 1, every)]


@pytest.fixture(scope="module")
def whole():
    """A run of two epochs, recorded after every third batch: what the predictor was asked with, and the oracle."""
    predictor = MockLossPredictor()
    _, oracle = train(predictor, saved_after=(1, 5, 10))
    return predictor.losses, oracle


def test_a_mock_predictor_is_told_the_mean_since_the_record_before_across_epochs(whole):
    asked, oracle = whole
    assert len(oracle.losses) == 16
    np.testing.assert_allclose(asked[-1], [means(oracle.losses, 3)] * 3, rtol=2e-5)
    assert asked[-1].dtype == np.float32


def test_a_mock_predictor_is_told_the_same_where_each_batch_logs_its_own_loss(whole):
    predictor = MockLossPredictor()
    train(predictor, LogsEachBatch(mlp(4, 8, 8, 3).layers))
    np.testing.assert_allclose(predictor.losses[-1], whole[0][-1], rtol=2e-5)


def test_the_state_holds_the_losses_since_the_record_for_a_mock_predictor(whole):
    _, oracle = whole
    for after, state in oracle.states.items():
        since = oracle.losses[after - after % 3 : after]
        expected = [sum(since), len(since), *means(oracle.losses[:after], 3)]
        np.testing.assert_allclose(state, expected, rtol=2e-5)
    assert set(oracle.states) == {1, 5, 10}


@not_on_torch
def test_batches_that_are_executed_at_once_count_together_for_a_mock_predictor(whole):
    predictor, (x, y) = MockLossPredictor(), data(shape=(4,))
    model = compiled(mlp(4, 8, 8, 3), steps_per_execution=2)
    fit(model, [freezer(predictor=predictor, record_every=4, decide_every=1)], inputs=(x, y))
    np.testing.assert_allclose(predictor.losses[-1], [means(whole[1].losses, 4)] * 3, rtol=2e-5)


def test_accumulated_batches_count_together_for_a_mock_predictor():
    x, y = data(shape=(4,))
    predictor = MockLossPredictor()
    model = compiled(mlp(4, 8, 8, 3), "sgd", gradient_accumulation_steps=2)
    own = freezer(predictor=predictor, record_every=2, decide_every=1)
    oracle = Oracle(x, y, own)
    fit(model, [own, oracle], inputs=(x, y))
    np.testing.assert_allclose(predictor.losses[-1], [means(oracle.losses, 4)] * 3, rtol=2e-5)


class Pairs(LoggedLosses):
    """Notes the mean of each two batches. In the first epoch, the logs may be NaN from the second batch on."""

    def __init__(self, model, nan):
        super().__init__(model)
        self.nan, self.noted, self.means = nan, 0, []

    def note(self, logs):
        self.noted += 1
        super().note({"loss": math.nan} if self.nan and 2 <= self.noted <= 8 else logs)
        if self.noted % 2 == 0:
            self.means.append(self.take()[0])


class Evaluates(keras.callbacks.Callback):
    """Calls `evaluate` after the fifth batch of the first epoch, which begins Keras' mean anew."""

    done = False

    def on_train_batch_end(self, batch, logs=None):
        if batch == 4 and not self.done:
            self.done = True
            self.model.evaluate(*data(10, (4,)), verbose=0)


@pytest.mark.parametrize(("by", "unknown"), [("evaluate", [2]), ("nan", [0, 1, 2, 3])])
def test_losses_are_known_again_after_an_interruption(whole, by, unknown, monkeypatch):
    made = []
    monkeypatch.setattr(
        "smartfrz.adapters.keras.callback.LoggedLosses",
        lambda model: made.append(Pairs(model, nan=by == "nan")) or made[0],
    )
    callbacks = [freezer(predictor=MockLossPredictor(), record_every=100), *([Evaluates()] if by == "evaluate" else [])]
    fit(compiled(mlp(4, 8, 8, 3)), callbacks, inputs=data(shape=(4,)))
    expected = np.array(means(whole[1].losses, 2))
    expected[unknown] = math.nan
    np.testing.assert_allclose(made[0].means, expected, rtol=2e-5)


class NoLoss(keras.Sequential):
    def train_step(self, *args):
        if BACKEND == "jax":
            logs, state = super().train_step(*args)
            return {"cross_entropy": logs["loss"]}, state
        return {"cross_entropy": super().train_step(*args)["loss"]}


def test_without_a_logged_loss_a_mock_predictor_is_told_none():
    predictor = MockLossPredictor()
    train(predictor, NoLoss(mlp(4, 8, 8, 3).layers), epochs=1)
    assert predictor.losses
    assert set(predictor.losses) == {None}


@pytest.mark.parametrize("loss", [None, np.zeros(3), "0.5", [0.5], math.nan])
def test_a_mock_model_may_log_what_is_no_loss(loss):
    class MockModel:
        metrics = ()

    losses = LoggedLosses(MockModel())
    for _ in range(3):
        losses.note({"loss": loss})
    mean, count = losses.take()
    assert math.isnan(mean)
    assert count == 3
