import pytest
from framework_runs import assert_frozen_means_bit_identical, assert_same_weights, kept
from numpy_adapter import ChangePredictor

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402
from smartfrz.baselines import AutoFreeze, GradES, LinearFreezing  # noqa: E402
from smartfrz.errors import StateError  # noqa: E402

STEPS = 24


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 12)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = self.hidden(self.norm(self.conv(x)).relu().mean((2, 3)))
        return self.head(self.drop(x.relu()))


def pictures():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 1, 6, 6, generator=generator)
    return TensorDataset(x, (x[:, 0, 2, 2] > 0).long())


class Loop:
    """A loop with two batches a step, as Accelerate's documentation writes it; 4 steps an epoch."""

    def __init__(self, model=None, prepared_optimizer=True, mixed_precision="no", policy=None, **options):
        AcceleratorState._reset_state(reset_partial_state=True)  # several Accelerators in one process
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision)
        self.inner = model or Net()
        self.raw = torch.optim.SGD(self.inner.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.raw, STEPS)
        loader = DataLoader(pictures(), 4)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            self.inner, self.raw, loader, schedule
        )
        if policy is None:
            options = {"record_every": 2, "decide_every": 1, "patience": 2, "threshold": 0.838} | options
        optimizer = self.optimizer if prepared_optimizer else self.raw
        self.freezer = SmartFRZ(self.model, optimizer, policy or ChangePredictor(scale=20.0), **options)
        self.accelerator.register_for_checkpointing(self.freezer)
        self.after, self.rates = {}, []

    def run(self, epochs):
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(nn.functional.cross_entropy(self.model(x), y))
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                    if self.accelerator.sync_gradients:
                        self.freezer.step()
                        self.after[self.freezer.report().num_steps] = kept(self.inner)
                        self.rates.append(self.raw.param_groups[0]["lr"])
        return self


@pytest.fixture(autouse=True)
def _no_accelerator_is_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("prepared_optimizer", [True, False])
def test_frozen_layers_are_bit_identical_and_the_others_train(prepared_optimizer, mixed_precision):
    loop = Loop(prepared_optimizer=prepared_optimizer, mixed_precision=mixed_precision).run(6)
    report = loop.freezer.report()
    assert report.num_steps == STEPS == len(loop.after)
    assert_frozen_means_bit_identical(loop.after, report)
    frozen = {
        loop.inner.get_parameter(n) for layer in report.layers if layer.name in report.frozen for n in layer.parameters
    }
    assert frozen
    assert frozen.isdisjoint(loop.raw.state)


def test_the_learning_rate_is_that_of_training_without_freezing():
    rates = [Loop(dry_run=dry_run).run(6).rates for dry_run in (True, False)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == STEPS


def test_a_loaded_run_goes_on_bit_identical(tmp_path):
    loop = Loop().run(4)
    folder = loop.accelerator.save_state(tmp_path / "state")
    loop.run(2)
    frozen = loop.freezer.report().frozen.values()
    assert min(frozen) < 16 < max(frozen)

    other = Loop(Net(seed=1))
    other.accelerator.load_state(folder)
    other.run(2)
    assert_same_weights(loop.inner.state_dict(), other.inner.state_dict())
    assert repr(loop.freezer.events) == repr(other.freezer.events)
    assert_frozen_means_bit_identical(loop.after | other.after, other.freezer.report())


def test_the_state_of_something_else_is_refused(tmp_path):
    loop = Loop().run(1)
    loop.accelerator._custom_objects[0] = torch.optim.SGD(loop.inner.parameters(), 0.1)
    folder = loop.accelerator.save_state(tmp_path / "state")
    with pytest.raises(StateError, match="param_groups"):
        Loop().accelerator.load_state(folder)


@pytest.mark.parametrize("policy", [LinearFreezing(0.2, scale_lr=True), AutoFreeze(epochs=6), GradES(0.5, alpha=0.2)])
def test_baselines_reach_the_optimizer_inside_and_are_restored(policy, tmp_path):
    options = {"policy": policy, "total_steps": STEPS}
    raw = Loop(prepared_optimizer=False, **options)
    raw.run(6)
    whole = Loop(**options)
    whole.run(3)
    whole.accelerator.save_state(str(tmp_path))
    whole.run(3)
    assert_same_weights(whole.inner.state_dict(), raw.inner.state_dict())
    assert min(whole.freezer.report().frozen.values()) < 12
    resumed = Loop(model=Net(seed=1), **options)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(3)
    assert_same_weights(whole.inner.state_dict(), resumed.inner.state_dict())
    assert repr(resumed.freezer.events) == repr(whole.freezer.events)
