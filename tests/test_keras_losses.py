"""Keras' running mean of the loss, turned back for the predictor's question. No file reads losses yet: a mock does."""

import math

import numpy as np
import pytest
from keras_runs import BACKEND, WARNINGS, compiled, data, fit, freezer, keras, mlp, not_on_torch, read
from numpy_adapter import MockLossPredictor, ScriptedPredictor

pytestmark = WARNINGS
criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Oracle(keras.callbacks.Callback):
    """The loss of each batch of a `mlp`, computed with NumPy before Keras trains on it, and the state after some batches.

    Args:
        x: Inputs of an epoch.
        y: Their targets.
        freezer: Whose state is kept.
        batches: In one execution.
        saved_after: Batches after which the state is kept.
    """

    def __init__(self, x, y, freezer, batches=1, saved_after=()):
        super().__init__()
        self.x, self.y, self.freezer, self.batches, self.saved_after = x, y, freezer, batches, saved_after
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


@pytest.mark.parametrize("kind", [keras.Sequential, LogsEachBatch])
def test_a_mock_predictor_is_told_the_mean_since_the_record_before_across_epochs(kind):
    predictor = MockLossPredictor()
    _, oracle = train(predictor, kind(mlp(4, 8, 8, 3).layers))
    assert len(oracle.losses) == 16
    np.testing.assert_allclose(predictor.losses[-1], [means(oracle.losses, 3)] * 3, rtol=2e-5)
    assert predictor.losses[-1].dtype == np.float32


def test_the_state_holds_the_losses_since_the_record_for_a_mock_predictor():
    _, oracle = train(MockLossPredictor(), saved_after=(1, 5, 10))
    losses = oracle.losses
    for after, state in oracle.states.items():
        since = losses[after - after % 3 : after]
        expected = [sum(since), len(since), *means(losses[:after], 3)]
        np.testing.assert_allclose(state, expected, rtol=2e-5)
    assert set(oracle.states) == {1, 5, 10}


@not_on_torch
def test_batches_that_are_executed_at_once_count_together_for_a_mock_predictor():
    x, y = data(shape=(4,))
    every = {}
    for at_once in (1, 2):
        predictor = MockLossPredictor()
        model = compiled(mlp(4, 8, 8, 3), steps_per_execution=at_once)
        fit(model, [freezer(predictor=predictor, record_every=4, decide_every=1)], inputs=(x, y))
        every[at_once] = predictor.losses[-1]
    np.testing.assert_allclose(every[1], every[2], rtol=2e-5)
    assert every[1].shape == (3, 4)


def test_accumulated_batches_count_together_for_a_mock_predictor():
    x, y = data(shape=(4,))
    predictor = MockLossPredictor()
    model = compiled(mlp(4, 8, 8, 3), "sgd", gradient_accumulation_steps=2)
    own = freezer(predictor=predictor, record_every=2, decide_every=1)
    oracle = Oracle(x, y, own)
    fit(model, [own, oracle], inputs=(x, y))
    np.testing.assert_allclose(predictor.losses[-1], [means(oracle.losses, 4)] * 3, rtol=2e-5)


class NoLoss(keras.Sequential):
    def train_step(self, *args):
        if BACKEND == "jax":
            logs, state = super().train_step(*args)
            return {"cross_entropy": logs["loss"]}, state
        return {"cross_entropy": super().train_step(*args)["loss"]}


def test_without_a_logged_loss_a_mock_predictor_is_told_none():
    predictor = MockLossPredictor()
    train(predictor, NoLoss(mlp(4, 8, 8, 3).layers))
    assert predictor.losses
    assert set(predictor.losses) == {None}


@pytest.mark.parametrize("loss", [None, np.zeros(3), "0.5", [0.5], math.nan])
def test_a_mock_model_may_log_what_is_no_loss(loss):
    from smartfrz.adapters.keras.losses import LoggedLosses

    class MockModel:
        metrics = ()

    losses = LoggedLosses(MockModel())
    for _ in range(3):
        losses.note({"loss": loss})
    mean, count = losses.take()
    assert math.isnan(mean)
    assert count == 3


def test_nothing_is_kept_where_the_predictor_reads_no_losses():
    own, _ = train(ScriptedPredictor(), epochs=1)
    assert own._losses is None
    assert not own.reads_loss
