import copy
import io
import logging
import pickle

import numpy as np
import pytest
from adapter_contract import AdapterContract, Case, same
from numpy_adapter import ChangePredictor, NumpyAdapter, ScriptedPredictor, make_info

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ, TorchAdapter, trace_layers  # noqa: E402
from smartfrz.control.controller import FreezeController  # noqa: E402
from smartfrz.control.options import FreezeOptions  # noqa: E402
from smartfrz.errors import StateError, UnsupportedModelError, UsageError  # noqa: E402
from smartfrz.predictor.runtime import Predictor  # noqa: E402

LAYERS = ["conv1", "conv2", "head"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
}
FREEZE_FIRST = [{"conv1": 0.9, "conv2": 0.1, "head": 0.1}]
FREEZE_TWO = [*FREEZE_FIRST, {"conv2": 0.9, "head": 0.1}]


class Net(nn.Module):
    """Two convolutions with batch norm and a linear layer, registered from back to front."""

    def __init__(self, seed=0, momentum=0.01):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(6, 3)
            self.norm2 = nn.BatchNorm2d(6, momentum=momentum)
            self.conv2 = nn.Conv2d(4, 6, 3)
            self.norm1 = nn.BatchNorm2d(4, momentum=momentum)
            self.conv1 = nn.Conv2d(2, 4, 3, bias=False)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


class Loop:
    """A plain training loop; batch i is the same in every run."""

    def __init__(self, model=None, optimizer="sgd", set_to_none=True, step=0):
        self.model = model or Net()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.set_to_none = set_to_none
        self.num_steps = step

    def train_step(self):
        generator = torch.Generator().manual_seed(self.num_steps)
        inputs = torch.randn(8, 2, 7, 7, generator=generator) + 0.5
        targets = torch.randint(3, (8,), generator=generator)
        self.model.train()  # as at the start of each epoch
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        loss = nn.functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.num_steps += 1
        return loss.item()

    def run(self, freezer, steps):
        for _ in range(steps):
            self.train_step()
            freezer.step()

    def freezer(self, script=(), **options):
        predictor = options.pop("predictor", None) or ScriptedPredictor(list(script))
        return SmartFRZ(
            self.model, self.optimizer, predictor, **{"record_every": 2, "decide_every": 3, "patience": 1} | options
        )


def layers_of(model):
    was_training = model.training
    layers = trace_layers(model.eval(), torch.zeros(1, 2, 7, 7))
    model.train(was_training)
    return layers


def everything(model, layer):
    """Copies of all that one layer of `Net` holds: parameters and buffers, those of its norm included."""
    own = {"conv1": ("conv1", "norm1"), "conv2": ("conv2", "norm2"), "head": ("head",)}[layer]
    state = model.state_dict()
    return [value.numpy().copy() for name, value in state.items() if name.partition(".")[0] in own]


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class TestTorchAdapter(AdapterContract):
    @pytest.fixture(
        params=[(name, flag) for name in OPTIMIZERS for flag in (True, False)], ids=lambda p: f"{p[0]}-{p[1]}"
    )
    def case(self, request):
        loop = Loop(Net(), *request.param)
        adapter = TorchAdapter(loop.model, [loop.optimizer], layers_of(loop.model))
        return Case(
            adapter,
            LAYERS,
            everything=lambda layer: everything(loop.model, layer),
            flat_weights=lambda layer: loop.model.get_parameter(f"{layer}.weight").detach().flatten().numpy().copy(),
            train_step=loop.train_step,
        )

    def half(self, dtype):
        model = nn.Sequential(nn.Linear(4, 3)).to(getattr(torch, dtype))
        layers = trace_layers(model, torch.zeros(1, 4, dtype=getattr(torch, dtype)))
        return TorchAdapter(model, [], layers), "0", model[0].weight.detach().float().flatten().numpy().copy()


def test_one_trajectory_gives_the_same_decisions_in_numpy_and_torch():
    sizes = {"0": (5, 6), "1": (4, 5), "2": (3, 4)}
    model = nn.Sequential(*(nn.Linear(b, a, bias=False) for a, b in sizes.values()))
    reference = NumpyAdapter.random(sizes)
    adapter = TorchAdapter(model, [], trace_layers(model, torch.zeros(1, 6)))
    options = {"record_every": 1, "decide_every": 2, "threshold": 0.75, "seed": 5}
    controllers = [FreezeController(a, ChangePredictor(), FreezeOptions(**options)) for a in (reference, adapter)]
    for _ in range(40):
        reference.train_step()
        with torch.no_grad():
            for name, array in reference.arrays.items():
                model.get_parameter(f"{name}.weight").copy_(torch.from_numpy(array))
        for controller in controllers:
            controller.step()
    assert len(controllers[0].frozen) == 2
    assert repr(controllers[0].events) == repr(controllers[1].events)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {f"{n}.weight" for n in reference.frozen}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_releases_state_but_keeps_its_groups(optimizer):
    loop = Loop(optimizer=optimizer)
    freezer = loop.freezer(FREEZE_TWO)
    names = {p: n for n, p in loop.model.named_parameters()}
    groups = [[id(p) for p in group["params"]] for group in loop.optimizer.param_groups]
    loop.run(freezer, 5)
    assert len(loop.optimizer.state) == len(names)
    loop.run(freezer, 10)
    assert freezer.frozen_layers == ["conv1", "conv2"]
    assert {names[p] for p in loop.optimizer.state} == {"head.weight", "head.bias"}
    assert [[id(p) for p in group["params"]] for group in loop.optimizer.param_groups] == groups
    assert all(p.grad is None for n, p in loop.model.named_parameters() if not n.startswith("head"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_after_freezing_goes_on_as_without_it(optimizer):
    loop = Loop(optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, 40)
    freezer = loop.freezer(FREEZE_FIRST)
    for _ in range(10):
        loop.run(freezer, 1)
        scheduler.step()
    assert freezer.frozen_layers == ["conv1"]
    saved = copy.deepcopy([loop.model.state_dict(), loop.optimizer.state_dict(), scheduler.state_dict()])

    other = Loop(Net(seed=1), optimizer, step=10)
    other_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(other.optimizer, 40)
    other_freezer = other.freezer()
    for target, state in zip((other.model, other.optimizer, other_scheduler), saved, strict=True):
        target.load_state_dict(state)
    other_freezer.load_state_dict(freezer.state_dict())
    for _ in range(10):
        for pair in ((loop, freezer, scheduler), (other, other_freezer, other_scheduler)):
            pair[0].run(pair[1], 1)
            pair[2].step()
    assert scheduler.get_last_lr() == other_scheduler.get_last_lr()
    assert scheduler.get_last_lr()[0] < saved[1]["param_groups"][0]["lr"]
    for layer in LAYERS:
        assert same(everything(loop.model, layer), everything(other.model, layer))


def test_every_optimizer_of_several_releases_its_state_and_keeps_one_layer():
    loop = Loop()
    parts = [loop.model.conv1, loop.model.norm1, loop.model.conv2, loop.model.norm2], [loop.model.head]
    optimizers = [OPTIMIZERS["sgd"](p for module in part for p in module.parameters()) for part in parts]
    loop.optimizer = optimizers[1]
    script = [{"conv1": 0.1, "conv2": 0.9, "head": 0.9}, {"conv1": 0.9, "head": 0.9}]
    freezer = SmartFRZ(loop.model, optimizers, ScriptedPredictor(script), record_every=1, decide_every=2, patience=1)
    for _ in range(6):
        loop.train_step()
        optimizers[0].step()
        optimizers[0].zero_grad()
        freezer.step()
    assert freezer.frozen_layers == ["conv2"]
    assert [e.reason for e in freezer.events if e.layer == "conv1"][1] == "last_active_layer"
    assert next(e.reason for e in freezer.events if e.layer == "head") == "last_active_layer"
    assert len(optimizers[0].state) == 3
    assert len(optimizers[1].state) == 2


def test_layers_that_the_user_froze_are_respected_and_never_thawed():
    loop = Loop()
    loop.model.conv1.requires_grad_(False)
    loop.model.norm1.requires_grad_(False)
    script = [{"conv2": 0.9, "head": 0.1}]
    freezer = loop.freezer(script)
    loop.run(freezer, 8)
    assert freezer.layers == ["conv2", "head"]
    assert freezer.frozen_layers == ["conv2"]
    assert freezer.report().user_frozen == {"conv1"}
    assert "1 layers were frozen before" in str(freezer.report())

    adapter = TorchAdapter(loop.model, [loop.optimizer], layers_of(Net()))
    adapter.freeze(LAYERS)
    adapter.unfreeze(LAYERS)
    assert not any(p.requires_grad for p in loop.model.conv1.parameters())


def test_a_partly_frozen_layer_is_thawed_in_its_trainable_part_only():
    loop = Loop()
    loop.model.conv1.weight.requires_grad_(False)
    adapter = TorchAdapter(loop.model, [loop.optimizer], layers_of(loop.model))
    assert adapter.layers() == LAYERS
    adapter.freeze(["conv1"])
    assert not loop.model.norm1.weight.requires_grad
    adapter.unfreeze(["conv1"])
    assert loop.model.norm1.weight.requires_grad
    assert not loop.model.conv1.weight.requires_grad


@pytest.mark.parametrize("momentum", [0.01, 0.3, None])
@pytest.mark.parametrize(
    ("norm_batches", "freeze_at", "batches"),
    [
        (4, 6, range(2, 6)),
        (4, 12, range(8, 12)),
        (1, 12, range(11, 12)),
        # More than lie between two stages: as many as there are; before the first one, all but the first batch.
        (24, 12, range(6, 12)),
        (24, 6, range(1, 6)),
    ],
)
def test_statistics_of_a_frozen_batch_norm_are_those_of_the_last_batches(momentum, norm_batches, freeze_at, batches):
    loop = Loop(Net(momentum=momentum))
    script = [dict.fromkeys(LAYERS, 0.1)] * (freeze_at // 6 - 1) + FREEZE_FIRST
    freezer = loop.freezer(script, norm_batches=norm_batches)
    seen = []
    hook = loop.model.norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
    loop.run(freezer, freeze_at)
    hook.remove()
    assert freezer.frozen_layers == ["conv1"]
    # Independently of the running average: batch means and unbiased variances, newer ones count more.
    age = torch.arange(len(batches) - 1, -1, -1, dtype=torch.double)
    share = (1 - momentum) ** age if momentum else torch.ones_like(age)
    share = (share / share.sum())[:, None]
    mean = (share * torch.stack([seen[i].mean((0, 2, 3)) for i in batches])).sum(0)
    variance = (share * torch.stack([seen[i].var((0, 2, 3)) for i in batches])).sum(0)
    # Two float32 numbers that differ by a share of 1 - 0.99^n are subtracted.
    torch.testing.assert_close(loop.model.norm1.running_mean.double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loop.model.norm1.running_var.double(), variance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop", [1, 7, 8, 9, 11])
def test_a_run_resumed_between_snapshot_and_stage_freezes_the_same_statistics(stop):
    script = [dict.fromkeys(LAYERS, 0.1), *FREEZE_FIRST]
    whole, first, second = Loop(), Loop(), Loop(Net(seed=1), step=stop)
    whole.run(whole.freezer(script, norm_batches=4), 15)
    freezer = first.freezer(script, norm_batches=4)
    first.run(freezer, stop)
    resumed = second.freezer(script[stop // 6 :], norm_batches=4)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    resumed.load_state_dict(freezer.state_dict())
    second.run(resumed, 15 - stop)
    assert resumed.frozen_layers == ["conv1"]
    for layer in LAYERS:
        assert same(everything(whole.model, layer), everything(second.model, layer))


def test_without_norm_batches_the_running_statistics_stay_as_they_are():
    frozen, plain = Loop(), Loop()
    frozen.run(frozen.freezer(FREEZE_FIRST, norm_batches=0), 6)
    for _ in range(6):
        plain.train_step()
    assert not frozen.model.conv1.weight.requires_grad
    assert torch.equal(frozen.model.norm1.running_mean, plain.model.norm1.running_mean)
    assert torch.equal(frozen.model.norm1.running_var, plain.model.norm1.running_var)


def test_statistics_that_the_user_keeps_in_eval_are_not_touched():
    loop = Loop()
    loop.model.norm1.train = lambda mode=True: loop.model.norm1  # a common way to keep a pretrained norm
    loop.model.norm1.training = False
    before = loop.model.norm1.running_mean.clone()
    freezer = loop.freezer(FREEZE_FIRST)
    loop.run(freezer, 8)
    assert freezer.frozen_layers == ["conv1"]
    assert torch.equal(loop.model.norm1.running_mean, before)


def test_a_frozen_batch_norm_stays_in_eval_through_train():
    loop = Loop()
    freezer = loop.freezer(FREEZE_FIRST)
    loop.run(freezer, 6)
    before = everything(loop.model, "conv1")
    for _ in range(3):
        loop.model.eval()
        loop.model.train()
        with torch.no_grad():
            loop.model(torch.randn(4, 2, 7, 7))
        assert not loop.model.norm1.training
        assert loop.model.norm2.training
    assert same(before, everything(loop.model, "conv1"))


def test_no_hook_remains():
    loop = Loop()
    freezer = loop.freezer(FREEZE_FIRST)
    assert num_hooks(loop.model) > 0
    loop.train_step()
    assert num_hooks(loop.model) == 0
    freezer.step()
    loop.run(freezer, 5)
    assert freezer.frozen_layers == ["conv1"]
    assert num_hooks(loop.model) == 0


def test_close_removes_the_hooks_of_a_freezer_that_was_never_used():
    loop = Loop()
    loop.freezer().close()
    assert num_hooks(loop.model) == 0
    assert all(not p._backward_hooks for p in loop.model.parameters())


def test_a_copy_of_a_frozen_model_works_and_is_independent():
    loop = Loop()
    freezer = loop.freezer(FREEZE_FIRST)
    loop.run(freezer, 6)
    before = everything(loop.model, "conv1")
    for twin in copy.deepcopy(loop.model), pickle.loads(pickle.dumps(loop.model)):
        assert {n for n, p in twin.named_parameters() if not p.requires_grad} == {
            "conv1.weight",
            "norm1.weight",
            "norm1.bias",
        }
        other = Loop(twin, step=6)
        other.train_step()
        assert same(everything(twin, "conv1"), before)
        assert not same(everything(twin, "head"), everything(loop.model, "head"))
    assert same(everything(loop.model, "conv1"), before)


def without_smartfrz(model):
    """The model, saved whole and loaded where smartfrz is not installed."""
    file = io.BytesIO()
    torch.save(model, file)
    assert b"smartfrz" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("order", ["free", "cost_aware"])
@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_a_saved_model_names_nothing_of_smartfrz_at_any_moment(steps, order):
    loop = Loop()
    freezer = loop.freezer(FREEZE_FIRST, freeze_order=order)
    loop.run(freezer, steps)
    twin = without_smartfrz(loop.model)
    assert same(everything(twin, "conv1"), everything(loop.model, "conv1"))
    Loop(twin, step=6).train_step()
    freezer.close(unfreeze=False)
    without_smartfrz(loop.model)
    freezer.close()
    assert not any("train" in vars(module) for module in without_smartfrz(loop.model).modules())


def test_close_makes_frozen_layers_trainable_unless_told_not_to():
    for unfreeze in True, False:
        loop = Loop()
        freezer = loop.freezer(FREEZE_FIRST)
        loop.run(freezer, 6)
        freezer.close(**({} if unfreeze else {"unfreeze": False}))
        assert freezer.frozen_layers == ["conv1"]
        before = everything(loop.model, "conv1")
        loop.model.train()
        loop.train_step()
        assert same(everything(loop.model, "conv1"), before) is not unfreeze


def test_step_before_any_forward_pass():
    with pytest.raises(UsageError, match=r"had no forward pass in training mode .*after loss.backward\(\)"):
        Loop().freezer().step()


def test_step_after_a_forward_pass_in_eval_mode():
    loop = Loop()
    freezer = loop.freezer()
    loop.model.eval()(torch.randn(4, 2, 7, 7)).sum().backward()
    with pytest.raises(UsageError, match="no forward pass in training mode"):
        freezer.step()


def test_step_before_any_backward_pass_and_then_after_one():
    loop = Loop()
    freezer = loop.freezer()
    loop.model(torch.randn(4, 2, 7, 7))
    with pytest.raises(UsageError, match=r"had no backward pass .*Call freezer.step\(\) after loss.backward\(\)"):
        freezer.step()
    loop.run(freezer, 1)
    assert freezer.layers == LAYERS


def test_a_model_with_nothing_to_freeze():
    model = nn.Sequential(nn.BatchNorm1d(4))
    message = "found no layer to freeze in Sequential.*Pass the model that holds the layers"
    freezer = SmartFRZ(model, torch.optim.SGD(model.parameters(), lr=0.1), ScriptedPredictor(), record_every=1)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(UnsupportedModelError, match=message):
        freezer.step()
    model(torch.randn(3, 4))  # training goes on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"neither `total_steps` nor `record_every`"),
        ({"total_steps": 0}, "`total_steps` is 0"),
        ({"record_every": 1, "norm_batches": -1}, "`norm_batches` is -1; expected 0 or more"),
    ],
)
def test_bad_arguments_are_noticed_at_once_and_leave_no_hooks(options, message):
    loop = Loop()
    with pytest.raises(ValueError, match=message):
        SmartFRZ(loop.model, loop.optimizer, ScriptedPredictor(), **options)
    assert num_hooks(loop.model) == 0


def test_total_steps_gives_the_schedule():
    loop = Loop()
    predictor = ScriptedPredictor(info=make_info(record_fraction=0.1))
    freezer = SmartFRZ(loop.model, loop.optimizer, predictor, total_steps=20)
    loop.run(freezer, 20)
    assert sorted({event.step for event in freezer.events}) == [4, 8, 12, 16, 20]


def test_a_dry_run_trains_as_if_it_were_not_there():
    dry, plain = Loop(), Loop()
    freezer = dry.freezer(FREEZE_TWO, dry_run=True)
    dry.run(freezer, 14)
    for _ in range(14):
        plain.train_step()
    for layer in LAYERS:
        assert same(everything(dry.model, layer), everything(plain.model, layer))
    assert freezer.frozen_layers == []
    assert [e.layer for e in freezer.events if e.action == "would_freeze"] == ["conv1", "conv2"]
    assert "SmartFRZ would have frozen 2 of 3 layers in 14 steps" in str(freezer.report())
    assert num_hooks(dry.model) == 0


def test_bad_weights_one_warning_and_training_goes_on(caplog):
    loop = Loop()
    with torch.no_grad():
        loop.model.head.bias[0] = float("nan")  # spreads to every weight in the first step
    freezer = loop.freezer()
    with caplog.at_level(logging.WARNING, "smartfrz"):
        loop.run(freezer, 18)
    assert freezer.frozen_layers == []
    assert {e.reason for e in freezer.events} == {"not_finite"}
    assert sorted(r.args[0] for r in caplog.records) == LAYERS


def test_a_predictor_by_path_and_loaded_give_the_same_events(predictor_file):
    predictors = str(predictor_file), predictor_file, Predictor(predictor_file, device="cpu")
    events = []
    for predictor in predictors:
        loop = Loop()
        freezer = loop.freezer(predictor=predictor, record_every=1, decide_every=1, threshold=1.0, device="cpu")
        loop.run(freezer, 12)
        events.append(freezer.events)
    assert len(events[0]) == 12 * len(LAYERS)
    assert {e.reason for e in events[0][:3]} == {"history_too_short"}
    assert all(0 < e.confidence < 1 for e in events[0][3:])
    assert repr(events[0]) == repr(events[1]) == repr(events[2])


def test_report():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 6, bias=False), nn.Linear(6, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    script = [{"0": 0.1, "1": 0.9, "2": 0.1}, {"0": 0.9, "2": 0.1}]
    freezer = SmartFRZ(model, optimizer, ScriptedPredictor(script), record_every=2, decide_every=2, patience=1)
    assert str(freezer.report()) == "SmartFRZ: no step yet."
    for _ in range(10):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        freezer.step()
    report = freezer.report()
    first, second, third = (2 * 3 * size for size in (4 * 5, 5 * 6, 6 * 2))
    # Backward: the first layer needs its weight gradient only, the others the gradient of their input too.
    full = first + 2 * second + 2 * third
    interior = first + second + 2 * third  # steps 5 to 8: layer 1 frozen, gradients still pass through it
    prefix = third  # steps 9 and 10: layers 0 and 1 frozen, the pass ends at layer 2
    assert report.backward_flops == 10 * full
    assert report.backward_flops_saved == 4 * (full - interior) + 2 * (full - prefix)
    assert report.frozen == {"1": 4, "0": 8}
    assert freezer.frozen_layers == ["1", "0"]
    assert "SmartFRZ froze 2 of 3 layers in 10 steps." in str(report)
    assert "The frozen prefix is 2 layers long; 0 frozen layers are behind it." in str(report)
    assert report.to_dict()["backward_flops_saved"] == report.backward_flops_saved


def test_a_state_before_the_first_step_starts_anew():
    loop = Loop()
    state = loop.freezer().state_dict()
    assert state == {"started": False}
    other = Loop()
    freezer = other.freezer(FREEZE_FIRST)
    freezer.load_state_dict(state)
    other.run(freezer, 6)
    assert freezer.frozen_layers == ["conv1"]


def test_a_dict_that_is_no_state():
    with pytest.raises(StateError, match=r"received a dict with keys \['a', 'b'\]; expected what SmartFRZ.state_dict"):
        Loop().freezer().load_state_dict({"b": 1, "a": 2})


def test_a_state_of_another_model_or_predictor():
    loop = Loop()
    freezer = loop.freezer()
    loop.run(freezer, 3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other = SmartFRZ(model, torch.optim.SGD(model.parameters(), lr=0.1), ScriptedPredictor(), record_every=1)
    with pytest.raises(StateError, match="parameters that Sequential does not have"):
        other.load_state_dict(freezer.state_dict())
    with pytest.raises(StateError, match="Resume with the same predictor file"):
        Loop().freezer(predictor=ScriptedPredictor(sha256="00" * 32)).load_state_dict(freezer.state_dict())
    forgot = Loop()
    forgot.model.conv1.requires_grad_(False)
    forgot.model.norm1.requires_grad_(False)
    with pytest.raises(StateError, match=r"3 layers, this one has 2; they differ in \['conv1'\]"):
        forgot.freezer().load_state_dict(freezer.state_dict())


def test_going_back_to_an_earlier_state_of_the_same_run():
    loop = Loop()
    freezer = loop.freezer(FREEZE_TWO)
    loop.run(freezer, 8)
    state = copy.deepcopy(freezer.state_dict())
    loop.run(freezer, 8)
    assert freezer.frozen_layers == ["conv1", "conv2"]
    freezer.load_state_dict(state)
    assert freezer.frozen_layers == ["conv1"]
    assert loop.model.conv2.weight.requires_grad
    assert not loop.model.conv1.weight.requires_grad
    before = [everything(loop.model, layer) for layer in LAYERS]
    loop.run(freezer, 1)
    assert loop.model.norm2.training
    moved = [not same(b, everything(loop.model, layer)) for b, layer in zip(before, LAYERS, strict=True)]
    assert moved == [False, True, True]


class Digits(nn.Module):
    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=0.05), nn.ReLU()),
                *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16, momentum=0.05), nn.ReLU()),
                *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten()),
            )
            self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.body(x))


class DigitsRun:
    """A real run on scikit-learn's digits. Batch i is the same in every run."""

    def __init__(self, seed=0):
        data = pytest.importorskip("sklearn.datasets").load_digits()
        self.images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        self.targets = torch.tensor(data.target)
        self.model = Digits(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 300)
        predictor = ChangePredictor(make_info(tailored_size=32, record_fraction=1 / 60), scale=10.0)
        self.freezer = SmartFRZ(
            self.model, self.optimizer, predictor, total_steps=300, threshold=0.62, patience=2, norm_batches=10
        )
        self.losses = []
        self.at_freezing = {}

    def run(self, start, end):
        for step in range(start, end):
            self.model.train()
            batch = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(step))[:32]
            loss = nn.functional.cross_entropy(self.model(self.images[batch]), self.targets[batch])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            for decision in self.freezer.step():
                if decision.action == "freeze":
                    self.at_freezing[decision.layer] = self.layer_state(decision.layer)
            self.losses.append(loss.item())

    def layer_state(self, name):
        """Copies of what a layer holds; the module after a convolution is its batch norm, or holds nothing."""
        head, _, index = name.rpartition(".")
        names = [name, f"{head}.{int(index) + 1}"] if head else [name]
        return {k: v.clone() for k, v in self.model.state_dict().items() if k.rpartition(".")[0] in names}

    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "freezer": self.freezer}


@pytest.mark.slow
def test_a_real_run_and_the_same_run_stopped_half_way(tmp_path):
    whole = DigitsRun()
    initial = {k: v.clone() for k, v in whole.model.state_dict().items()}
    whole.run(0, 300)

    frozen = whole.freezer.frozen_layers
    steps = whole.freezer.report().frozen
    assert any(step < 150 for step in steps.values())
    assert any(step > 150 for step in steps.values())
    final = whole.model.state_dict()
    for layer in frozen:
        for name, value in whole.at_freezing[layer].items():
            assert torch.equal(final[name], value), f"{name} moved after it was frozen"
            assert not torch.equal(final[name], initial[name]), f"{name} never moved"
    assert "head" not in frozen
    assert not torch.equal(final["head.weight"], initial["head.weight"])
    assert np.mean(whole.losses[-20:]) < 0.2 * np.mean(whole.losses[:20])

    first = DigitsRun()
    first.run(0, 150)
    torch.save({name: part.state_dict() for name, part in first.parts().items()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = DigitsRun(seed=99)
    for name, part in second.parts().items():
        part.load_state_dict(saved[name])
    second.run(150, 300)

    assert second.losses == whole.losses[150:]
    assert repr(second.freezer.events) == repr(whole.freezer.events)  # repr: NaN differs from itself
    assert second.freezer.frozen_layers == frozen
    resumed = second.model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in final.items())
    report, resumed_report = whole.freezer.report(), second.freezer.report()
    assert resumed_report.backward_flops_saved == report.backward_flops_saved > 0


def test_a_state_from_before_the_first_step_begins_anew():
    loop = Loop()
    freezer = loop.freezer([*FREEZE_FIRST, *FREEZE_TWO])
    start = freezer.state_dict()
    loop.run(freezer, 6)
    assert freezer.frozen_layers == ["conv1"]
    freezer.load_state_dict(start)
    assert freezer.frozen_layers == []
    assert all(p.requires_grad for p in loop.model.parameters())
    assert freezer.state_dict() == start
    loop.run(freezer, 6)
    assert freezer.layers == LAYERS
    assert freezer.frozen_layers == ["conv1"]


def test_a_layer_is_judged_by_all_that_is_trained_where_its_trained_matrices_are_a_small_part():
    class Tuned(nn.Linear):
        def __init__(self):
            super().__init__(40, 40)
            self.down, self.up = nn.Linear(40, 1, bias=False), nn.Linear(1, 40, bias=False)

        def forward(self, x):
            return super().forward(x) + self.up(self.down(x))

    model = nn.Sequential(Tuned(), nn.Linear(40, 3))
    layers = trace_layers(model, torch.randn(2, 40))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert TorchAdapter(model, [optimizer], layers).num_weights("0") == 1600 + 40 + 40
    model[0].weight.requires_grad_(False)
    assert TorchAdapter(model, [optimizer], layers).num_weights("0") == 80
    model[0].up.weight.requires_grad_(False)
    model[0].down.weight = nn.Parameter(torch.zeros(0, 40))
    model[0].bias.requires_grad_(False)
    assert TorchAdapter(model, [optimizer], layers).layers() == ["1"]  # what is left to train has no values
