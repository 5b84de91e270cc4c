"""The callback for ultralytics, on a mock of its trainer, which needs torchvision and much time."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy_adapter import MockLossPredictor

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from smartfrz.adapters.torch.ultralytics import SmartFRZCallback  # noqa: E402
from smartfrz.errors import StateError  # noqa: E402


class MockTrainer:
    """The loop of ultralytics 8.4's trainer, as far as it decides when the optimizer steps."""

    def __init__(self, batches, epochs, accumulate, start_epoch=0):
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self.train_loader = range(batches)
        self.epochs, self.accumulate, self.start_epoch = epochs, accumulate, start_epoch
        self.args = SimpleNamespace(warmup_epochs=3.0)
        self.callbacks = {}
        self.losses = []

    def add_callback(self, event, function):
        self.callbacks[event] = function

    def train(self):
        self.callbacks["on_train_start"](self)
        batches, latest, nominal = len(self.train_loader), -1, self.accumulate
        warm_up = round(min(self.args.warmup_epochs, self.epochs - 1) * batches)
        for number in range(self.start_epoch * batches, self.epochs * batches):
            if number <= warm_up:
                self.accumulate = max(1, round(1 + number / warm_up * (nominal - 1)))
            self.loss = self.model(torch.randn(4, 4)).square().mean()
            self.losses.append(self.loss.item())
            self.loss.backward()
            if number - latest >= self.accumulate:
                self.optimizer.step()
                self.optimizer.zero_grad()
                latest = number
            self.callbacks["on_train_batch_end"](self)
        self.callbacks["on_train_end"](self)


@pytest.mark.parametrize(("batches", "epochs", "accumulate", "steps"), [(8, 6, 16, 5), (2, 30, 4, 16), (6, 4, 1, 24)])
def test_mock_every_step_of_the_optimizer_counts(batches, epochs, accumulate, steps):
    """ultralytics 8.4.190 took 5 and 16 steps in runs of the first two lengths."""
    callback = SmartFRZCallback("smartfrz-tiny", record_every=1, verbose=False)
    trainer = MockTrainer(batches, epochs, accumulate)
    callback.attach(trainer)
    trainer.train()
    assert callback.report().num_steps == callback.freezer.options.total_steps == steps
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_mock_a_resumed_run_has_no_state():
    trainer = MockTrainer(8, 6, 1, start_epoch=2)
    SmartFRZCallback("smartfrz-tiny", verbose=False).attach(trainer)
    with pytest.raises(StateError, match=r"goes on from step 2.*allow_missing_state=True"):
        trainer.train()
    callback = SmartFRZCallback("smartfrz-tiny", allow_missing_state=True, verbose=False)
    callback.attach(trainer)
    trainer.train()
    assert callback.report().num_steps == 32


def test_mock_a_mock_predictor_is_told_the_losses_of_the_batches():
    """The optimizer steps before the event in which the loss is passed: it counts for the next step."""
    predictor = MockLossPredictor()
    callback = SmartFRZCallback(predictor, record_every=2, decide_every=1, verbose=False)
    trainer = MockTrainer(4, 2, 1)
    callback.attach(trainer)
    trainer.train()
    expected = [np.mean(trainer.losses[max(0, i - 1) : i + 1]) for i in range(0, 8, 2)]
    np.testing.assert_allclose(predictor.losses[-1][0], expected, rtol=1e-5)
