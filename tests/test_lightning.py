import functools
import itertools

import numpy as np
import pytest
from framework_runs import (
    assert_frozen_means_bit_identical,
    assert_same_weights,
    kept,
    kill_this_process,
    run_until_killed,
    without,
)
from numpy_adapter import ChangePredictor, MockLossPredictor

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

from smartfrz.adapters.torch import PrefixCache  # noqa: E402
from smartfrz.adapters.torch.lightning import SmartFRZCallback  # noqa: E402
from smartfrz.baselines import GradES  # noqa: E402
from smartfrz.errors import StateError, UsageError  # noqa: E402

pytestmark = [
    # what Lightning says about the settings of these tests
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    # Lightning 2.6 with PyTorch 2.13
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]
STEPS, BATCHES = 24, 8


class Net(LightningModule):
    """Its training step calls the parts one by one, or the whole."""

    def __init__(self, seed=0, *, call_whole=False):
        super().__init__()
        torch.manual_seed(seed)
        self.call_whole = call_whole
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.encoder = nn.Sequential(nn.Linear(4, 12), nn.Dropout(0.2), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.encoder(self.norm(self.conv(x)).relu().mean((2, 3))))

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.call_whole:
            return nn.functional.cross_entropy(self(x), y)
        x = self.encoder(self.norm(self.conv(x)).relu().mean((2, 3)))
        return nn.functional.cross_entropy(self.head(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(self.global_step)  # for dropout: Lightning's checkpoints hold no random state

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Probe(Callback):
    """Keeps the model and the learning rate after each batch; `stop` is called before the step `stop_at`."""

    def __init__(self, stop_at=None, stop=None):
        self.stop_at, self.stop = stop_at, stop
        self.after, self.rates = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.stop_at:
            self.stop()

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after[trainer.global_step] = kept(pl_module)
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


def pictures(count=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    y = (x[:, 0, 2, 2] > 0).long()
    return TensorDataset(x + y[:, None, None, None], y)


def loader():
    return DataLoader(pictures(), 4)


def smartfrz(**options):
    options = {"record_every": 2, "decide_every": 1, "patience": 1, "threshold": 0.82} | options
    return SmartFRZCallback(options.pop("predictor", ChangePredictor(scale=20.0)), **options)


def trainer_of(folder, *callbacks, **arguments):
    arguments = {
        "max_epochs": STEPS // BATCHES,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": folder,
    } | arguments
    return Trainer(callbacks=[*callbacks], **arguments)


def fit(folder, *callbacks, model=None, ckpt_path=None, data=None, **arguments):
    trainer = trainer_of(folder, *callbacks, **arguments)
    trainer.fit(model or Net(), loader() if data is None else data, loader(), ckpt_path=ckpt_path)
    return trainer


def checkpoints(folder):
    return ModelCheckpoint(folder, "{step}", save_top_k=-1)


def fit_and_die(folder):
    fit(folder, smartfrz(), Probe(18, kill_this_process), checkpoints(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A fit that nothing interrupts, validated after each epoch: its Trainer, callback and probe."""
    callback, probe = smartfrz(), Probe()
    folder = tmp_path_factory.mktemp("whole")
    trainer = fit(folder, callback, probe, checkpoints(folder))
    return trainer, callback, probe


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of the same run, killed after step 18: checkpoints of steps 8 and 16."""
    folder = tmp_path_factory.mktemp("killed")
    run_until_killed(f"import test_lightning; test_lightning.fit_and_die({str(folder)!r})")
    return folder


def test_frozen_layers_are_bit_identical_and_the_others_train(whole):
    _, callback, probe = whole
    report = callback.report()
    assert [layer.name for layer in report.layers] == ["conv", "encoder.0", "encoder.3", "head"]
    assert_frozen_means_bit_identical(probe.after, report)
    assert report.num_steps == STEPS == len(probe.after)
    # otherwise resuming from step 16 would prove little
    assert min(report.frozen.values()) < 16 < max(report.frozen.values())


def test_when_fitting_ends_everything_can_be_trained_again(whole):
    trainer, callback, _ = whole
    model = trainer.lightning_module
    assert callback.freezer.frozen_layers
    assert all(p.requires_grad for p in model.parameters())
    assert "training_step" not in vars(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.train()
    assert model.norm.training


def test_logs(whole):
    metrics = whole[0].callback_metrics
    assert metrics["smartfrz/frozen_layers"] == len(whole[1].freezer.frozen_layers)
    assert 0 < metrics["smartfrz/backward_saved"] < 1


def test_the_learning_rate_is_that_of_fitting_without_smartfrz(whole, tmp_path):
    probe = Probe()
    fit(tmp_path, probe)
    assert probe.rates == whole[2].rates
    assert len(set(probe.rates.values())) > 3


@pytest.mark.parametrize("step", [16, 8])
def test_a_killed_run_goes_on_bit_identical(step, whole, killed):
    callback, probe = smartfrz(), Probe()
    path = killed / f"step={step}.ckpt"
    trainer = fit(killed, callback, probe, checkpoints(killed), model=Net(seed=1), ckpt_path=path)
    assert min(probe.after) == step + 1
    assert_same_weights(whole[0].lightning_module.state_dict(), trainer.lightning_module.state_dict())
    assert repr(callback.freezer.events) == repr(whole[1].freezer.events)
    assert callback.report().frozen == whole[1].report().frozen
    assert_frozen_means_bit_identical(whole[2].after | probe.after, callback.report())


def test_a_baseline_that_keeps_gradients_goes_on_from_a_checkpoint(tmp_path):
    callback, again = (SmartFRZCallback(GradES(0.15, alpha=0.25), record_every=5) for _ in range(2))
    first = fit(tmp_path, callback, checkpoints(tmp_path))
    later = checkpoints(tmp_path)
    second = fit(tmp_path, again, later, model=Net(seed=1), ckpt_path=str(tmp_path / "step=8.ckpt"))
    frozen = callback.report().frozen
    assert again.report().frozen == frozen
    assert min(frozen.values()) == 10, "after the checkpoint, for what was measured before and after it"
    assert repr(again.freezer.events) == repr(callback.freezer.events)
    assert_same_weights(first.model.state_dict(), second.model.state_dict())


def test_a_checkpoint_is_plain_data(killed):
    state = torch.load(killed / "step=16.ckpt", weights_only=True)
    assert state["callbacks"]["SmartFRZCallback"]["started"]


def test_a_checkpoint_without_our_state_is_refused_or_watched_from_there(tmp_path):
    fit(tmp_path, checkpoints(tmp_path), max_epochs=1)
    path = tmp_path / "step=8.ckpt"
    with pytest.raises(StateError, match=r"goes on from step 8, .* no state of SmartFRZCallback.*allow_missing_state"):
        fit(tmp_path, smartfrz(), checkpoints(tmp_path), ckpt_path=path)
    callback = smartfrz(allow_missing_state=True)
    fit(tmp_path, callback, checkpoints(tmp_path), ckpt_path=path)
    assert callback.report().num_steps == STEPS - 8


def test_the_whole_module_may_be_called_and_batches_accumulated(tmp_path):
    callback, probe = smartfrz(record_every=1), Probe()
    fit(tmp_path, callback, probe, model=Net(call_whole=True), accumulate_grad_batches=2, max_epochs=6)
    report = callback.report()
    assert [layer.name for layer in report.layers] == ["conv", "encoder.0", "encoder.3", "head"]
    assert report.num_steps == STEPS
    assert list(probe.after) == list(range(STEPS + 1))  # 0: after the first of two batches
    assert_frozen_means_bit_identical(probe.after, report)


def test_the_length_of_the_run_comes_from_the_trainer(tmp_path):
    callback = smartfrz(record_every=None)
    fit(tmp_path, callback, max_epochs=18)
    assert callback.freezer.state_dict()["controller"]["total_steps"] == 18 * BATCHES
    assert callback.freezer.state_dict()["controller"]["schedule"]["record_every"] == round(0.02 * 18 * BATCHES)


def test_an_endless_fit_needs_to_be_told_its_length(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return itertools.cycle(pictures())

    data = DataLoader(Endless(), 4)
    arguments = {"max_epochs": -1, "max_time": "00:00:00:02"}
    callback = smartfrz(record_every=None)
    with pytest.raises(UsageError, match=r"Lightning estimates inf steps.*total_steps="):
        fit(tmp_path, callback, data=data, **arguments)
    callback = smartfrz(total_steps=12)
    fit(tmp_path, callback, data=data, max_steps=12, max_epochs=-1)
    assert callback.report().num_steps == 12


class TwoOptimizers(Net):
    """Steps both of its optimizers at every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        parts = (
            [*self.conv.parameters(), *self.norm.parameters()],
            [*self.encoder.parameters(), *self.head.parameters()],
        )
        return [torch.optim.SGD(part, lr=0.05, momentum=0.9) for part in parts]


def test_two_optimizers_that_step_by_hand_make_one_step(tmp_path):
    callback, probe = smartfrz(record_every=1, threshold=0.7), Probe()
    trainer = fit(tmp_path, callback, probe, model=TwoOptimizers(), max_epochs=4)
    assert trainer.global_step == 2 * 16
    assert callback.report().num_steps == 16
    after = {step // 2: snapshot for step, snapshot in probe.after.items()}
    assert_frozen_means_bit_identical(after, callback.report())


def test_the_same_trainer_fits_on(tmp_path):
    callback, probe = smartfrz(), Probe()
    trainer = fit(tmp_path, callback, probe, max_epochs=2)
    frozen = callback.report().frozen
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, loader(), loader())
    report = callback.report()
    assert report.num_steps == STEPS
    assert report.frozen | frozen == report.frozen
    assert_frozen_means_bit_identical(probe.after, report)


def test_another_trainer_starts_anew(tmp_path):
    callback, model = smartfrz(), Net()
    fit(tmp_path, callback, model=model)
    fit(tmp_path, callback, model=model)
    assert callback.report().num_steps == STEPS
    assert callback.report().user_frozen == set()


def test_testing_a_checkpoint_leaves_the_report_alone(tmp_path):
    callback = smartfrz()
    trainer = fit(tmp_path, callback, checkpoints(tmp_path))
    before = repr(callback.report())
    trainer.test(dataloaders=loader(), ckpt_path=tmp_path / "step=8.ckpt", verbose=False)
    assert repr(callback.report()) == before
    model = trainer.lightning_module
    fit(tmp_path, callback, model=model)
    assert callback.report().num_steps == STEPS


def test_an_exception_leaves_the_model_as_it_was_found(tmp_path):
    def stop():
        raise OSError("the disk is full")

    model = Net()
    probe = Probe(20, stop)
    with pytest.raises(OSError, match="disk"):
        fit(tmp_path, smartfrz(), probe, model=model)
    assert len(probe.after[20][1]) < len(list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())


def test_a_dry_run_fits_as_without_smartfrz(tmp_path):
    callback = smartfrz(dry_run=True)
    models = [fit(tmp_path, *callbacks).lightning_module for callbacks in ([callback], [])]
    assert callback.report().frozen
    assert callback.freezer.frozen_layers == []
    assert_same_weights(*(model.state_dict() for model in models))


def test_a_decorated_training_step_gets_what_its_signature_asks_for(tmp_path):
    def noted(step):
        @functools.wraps(step)
        def wrapper(*args):
            sizes.append(len(args))
            return step(*args)

        return wrapper

    class Decorated(Net):
        @noted
        def training_step(self, batch):
            return super().training_step(batch, 0)

    sizes = []
    callback = smartfrz()
    fit(tmp_path, callback, model=Decorated(), max_epochs=1)
    assert callback.report().num_steps == len(sizes) == 8
    assert set(sizes) == {2}


def test_costs_are_measured_where_only_the_parts_are_called(tmp_path):
    callback = smartfrz(freeze_order="cost_aware")
    fit(tmp_path, callback, max_epochs=2, accumulate_grad_batches=2)
    assert callback.freezer.state_dict()["controller"]["costs"].keys() == {"conv", "encoder.0", "encoder.3", "head"}


def test_the_trainer_of_pytorch_lightning():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Model(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 2))

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = smartfrz()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pytorch_lightning.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, callbacks=[callback], **quiet
    )
    trainer.fit(Model(), loader())
    assert callback.report().num_steps == BATCHES


def test_wrong_arguments():
    with pytest.raises(TypeError, match="treshold"):
        SmartFRZCallback(treshold=0.5)


def test_torch_alone_does_not_load_lightning_and_its_absence_is_named():
    said = without("smartfrz.adapters.torch.lightning", ["lightning", "pytorch_lightning"])
    assert said.startswith("[] MissingDependencyError")
    assert 'pip install "smartfrz[lightning,cpu]"' in said


class Whole(Net):
    """Calls itself, or the one network in it, without dropout."""

    def __init__(self, how):
        super().__init__()
        self.encoder[1].p = 0.0
        if how == "network":
            self.net = nn.Sequential(
                self.conv, self.norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.encoder, self.head
            )
            del self.conv, self.norm, self.encoder, self.head
        self.losses = []

    def forward(self, x):
        return self.net(x) if "net" in self._modules else super().forward(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x) if "net" in self._modules else self(x), y)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("how", ["self", "network"])
def test_a_frozen_prefix_is_cached(how, tmp_path):
    models = [Whole(how) for _ in range(2)]
    callbacks = [smartfrz(freeze_order="prefix"), smartfrz(freeze_order="prefix", cache=PrefixCache(profile=False))]
    for model, callback in zip(models, callbacks, strict=True):
        fit(tmp_path, callback, model=model)
    use = callbacks[1].report().cache
    assert use.hits >= len(pictures())
    assert models[0].losses == pytest.approx(models[1].losses, abs=1e-5)
    assert callbacks[0].report().frozen == callbacks[1].report().frozen
    assert "forward" not in vars(models[1])


class Parts(Net):
    def __init__(self):
        LightningModule.__init__(self)
        self.first, self.second, self.third = nn.Linear(36, 36), nn.Linear(36, 36), nn.Linear(36, 36)
        self.first.requires_grad_(False)

    def forward(self, x):
        return self.third(self.second(self.first(x.flatten(1)).relu()).relu())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.forward(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def test_a_training_step_that_calls_the_parts_is_not_cached_and_says_so(tmp_path, caplog):
    callback = smartfrz(cache=PrefixCache(profile=False))
    fit(tmp_path, callback, model=Parts())
    assert "calls the parts of the model one by one" in caplog.text
    assert callback.report().cache.hits == 0


class NotesLosses(Net):
    """Notes the loss of each training step; returns it as it is, in a dict, or not at all."""

    def __init__(self, returns, automatic=True):
        super().__init__()
        self.automatic_optimization = automatic
        self.returns, self.losses = returns, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss, "dict": {"loss": loss, "more": 1}, "nothing": None}[self.returns]


@pytest.mark.parametrize(
    ("returns", "automatic", "accumulated"),
    [("loss", True, 1), ("dict", True, 1), ("loss", True, 2), ("loss", False, 1), ("dict", False, 1)],
)
def test_a_mock_predictor_is_told_the_losses_of_the_training_steps(tmp_path, returns, automatic, accumulated):
    predictor, model = MockLossPredictor(), NotesLosses(returns, automatic)
    fit(tmp_path, smartfrz(predictor=predictor), model=model, accumulate_grad_batches=accumulated)
    every = 2 * accumulated
    expected = np.reshape(model.losses, (-1, every)).mean(1) / accumulated  # Lightning divides by it
    asked = len(predictor.losses)
    assert asked >= len(expected) - 1  # not after the last step, whose learning rate is 0
    np.testing.assert_allclose(predictor.losses[-1][0], expected[:asked][-predictor.info.window :], rtol=1e-5)


def test_without_a_loss_a_mock_predictor_is_told_none(tmp_path):
    predictor = MockLossPredictor()
    fit(tmp_path, smartfrz(predictor=predictor), model=NotesLosses("nothing", automatic=False))
    assert set(predictor.losses) == {None}


class SkipsBatches(NotesLosses):
    """Returns no loss for every third batch, the first one included, which Lightning then does not train on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx % 3 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_may_be_skipped_from_the_first_one_on(tmp_path):
    predictor, model = MockLossPredictor(), SkipsBatches("loss")
    callback = smartfrz(predictor=predictor)
    fit(tmp_path, callback, model=model)
    assert callback.freezer.num_steps == len(model.losses) - 1
    alone = [loss for batch, loss in enumerate(model.losses[:3]) if batch % 3]
    np.testing.assert_allclose(predictor.losses[0][0], [np.mean(alone)], rtol=1e-6)


def test_losses_of_a_mock_predictor_go_on_after_resuming(tmp_path):
    whole, resumed = MockLossPredictor(), MockLossPredictor()
    fit(tmp_path, smartfrz(predictor=whole, record_every=3), checkpoints(tmp_path))
    fit(
        tmp_path,
        smartfrz(predictor=resumed, record_every=3),
        checkpoints(tmp_path),
        ckpt_path=tmp_path / "step=16.ckpt",
    )
    np.testing.assert_array_equal(whole.losses[-1], resumed.losses[-1])
