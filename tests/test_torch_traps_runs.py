"""Thawing, orders, refusals and resumed runs in real PyTorch loops. One test per trap."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numpy_adapter import ChangePredictor, ScriptedPredictor, make_info, script

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim import lr_scheduler as schedulers  # noqa: E402
from torch_runs import (  # noqa: E402
    NET,
    Net,
    attach,
    batch,
    loss_of,
    mlp,
    moved,
    num_hooks,
    parts,
    seeded,
    train,
    values,
)

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402
from smartfrz.errors import StateError, UnsupportedModelError, UsageError  # noqa: E402

INPUTS = (8, 5)
FOUR = ["0", "2", "4", "6"]
SIZES = (5, 6, 7, 8, 3)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.1)


def actions(freezer, *kinds):
    return [(event.step, event.action, event.layer) for event in freezer.events if event.action in kinds]


def saved(*parts):
    """Their states, written to a file and read again."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Thawing


def restarting():
    """`Net` with warm restarts every 6 steps."""
    model = Net()
    optimizer = sgd(model)
    return model, optimizer, schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=6)


@pytest.mark.parametrize("on", [True, False])
def test_a_warm_restart_thaws_if_asked_to(on):
    model, optimizer, scheduler = restarting()
    options = {"thaw_on_restart": True} if on else {}
    freezer = attach(model, optimizer, NET, (), {"conv1", "conv2"}, **options)
    train(model, optimizer, freezer, 0, 5, scheduler=scheduler)
    assert freezer.frozen_layers == ["conv1", "conv2"]
    before = values(model)
    train(model, optimizer, freezer, 5, 8, scheduler=scheduler)
    expected = [(6, "thaw", "conv1"), (6, "thaw", "conv2")]
    assert actions(freezer, "thaw") == (expected if on else [])
    assert all(event.reason == "learning_rate_raised" for event in freezer.events if event.action == "thaw")
    assert freezer.frozen_layers == ([] if on else ["conv1", "conv2"])
    assert bool(parts(moved(before, model), ["conv1", "conv2"])) == on


WARM_UPS = {
    "linear": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.01, total_iters=8), schedulers.CosineAnnealingLR(o, 12)], milestones=[8]
    ),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=20, pct_start=0.4),
}


@pytest.mark.parametrize("scheduler", WARM_UPS)
def test_a_warm_up_before_anything_froze_thaws_nothing(scheduler):
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, (), (), (), (), {"conv1"}, thaw_on_restart=True)
    train(model, optimizer, freezer, 0, 19, scheduler=WARM_UPS[scheduler](optimizer))
    assert actions(freezer, "freeze", "thaw") == [(10, "freeze", "conv1")]


@pytest.mark.parametrize("stop", [3, 4, 5, 6, 7, 9])
def test_a_run_resumed_around_a_warm_restart(stop):
    whole, first, second = restarting(), restarting(), restarting()
    plan = [*script(NET, (), {"conv1", "conv2"}), dict.fromkeys(NET, 0.1), *script(NET, {"conv1"})]
    predictors = ScriptedPredictor(plan), ScriptedPredictor(plan)
    freezers = [
        attach(*run[:2], NET, predictor=predictor, thaw_on_restart=True)
        for run, predictor in zip((whole, first), predictors, strict=True)
    ]
    train(*whole[:2], freezers[0], 0, 14, scheduler=whole[2])
    train(*first[:2], freezers[1], 0, stop, scheduler=first[2])
    resumed = attach(*second[:2], NET, predictor=ScriptedPredictor(plan[len(predictors[1].calls) :]))
    for part, state in zip((*second, resumed), saved(*first, freezers[1]), strict=True):
        part.load_state_dict(state)
    train(*second[:2], resumed, stop, 14, scheduler=second[2])
    assert actions(freezers[0], "freeze", "thaw") == [
        (4, "freeze", "conv1"),
        (4, "freeze", "conv2"),
        (6, "thaw", "conv1"),
        (6, "thaw", "conv2"),
        (10, "freeze", "conv1"),
        (12, "thaw", "conv1"),
    ]
    assert repr(resumed.events) == repr(freezers[0].events)
    assert not moved(values(whole[0]), second[0])


def test_thawing_some_layers_by_hand():
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1", "conv2"})
    train(model, optimizer, freezer, 0, 3)
    (decision,) = freezer.thaw(["conv2"])
    assert (decision.step, decision.layer, decision.action, decision.reason) == (3, "conv2", "thaw", "by_hand")
    assert freezer.frozen_layers == ["conv1"]
    before = values(model)
    train(model, optimizer, None, 3, 5)
    assert moved(before, model) == parts(before, ["conv2", "head"])
    assert freezer.thaw(["conv2"]) == []  # trained already
    assert [decision.layer for decision in freezer.thaw("conv1")] == ["conv1"]
    assert freezer.thaw() == []
    assert num_hooks(model) == 0
    assert "train" not in vars(model.norm1)


def test_thawing_what_is_no_layer_or_the_users_own():
    model = Net()
    model.conv1.requires_grad_(False)
    model.norm1.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = attach(model, optimizer, NET[1:], {"conv2"})
    train(model, optimizer, freezer, 0, 3)
    for name in "conv1", "conv7":
        with pytest.raises(ValueError, match=rf"names \['{name}'\], which SmartFRZ cannot thaw.*\['conv2'\]"):
            freezer.thaw(["conv2", name])
    assert freezer.frozen_layers == ["conv2"]  # a bad name thaws nothing
    freezer.thaw()
    assert not any(p.requires_grad for p in (*model.conv1.parameters(), *model.norm1.parameters()))
    assert all(p.requires_grad for p in (*model.conv2.parameters(), *model.norm2.parameters()))


def test_a_thawed_layer_has_no_past_and_may_freeze_again():
    model = Net()
    optimizer = sgd(model)
    predictor = ScriptedPredictor(
        [
            *script(NET, {"conv1"}),
            {"conv2": 0.1, "head": 0.1},  # stage at step 4, with the thawed layer too young
            {"conv1": 0.9, "conv2": 0.1, "head": 0.1},
        ],
        make_info(min_records=2),
    )
    freezer = attach(model, optimizer, NET, predictor=predictor)
    train(model, optimizer, freezer, 0, 3)
    freezer.thaw()
    train(model, optimizer, freezer, 3, 8)
    reasons = [(event.step, event.action, event.reason) for event in freezer.events if event.layer == "conv1"]
    assert reasons == [
        (2, "freeze", "confident"),
        (3, "thaw", "by_hand"),
        (4, "keep", "history_too_short"),
        (6, "freeze", "confident"),
    ]
    assert [lengths.tolist() for _, lengths in predictor.calls] == [[2, 2, 2], [4, 4], [3, 6, 6], [8, 8]]


def test_after_a_thaw_the_last_live_layer_has_to_be_patient_anew():
    # It was kept for being the last one, confident all the time; now it is not the last one any more.
    model = Net()
    optimizer = sgd(model)
    sure = {"conv1": 0.9, "conv2": 0.9, "head": 0.9}
    unsure = {"conv1": 0.1, "conv2": 0.1, "head": 0.9}
    freezer = attach(model, optimizer, NET, predictor=ScriptedPredictor([sure, sure, unsure, unsure]), patience=2)
    train(model, optimizer, freezer, 0, 6)
    assert freezer.frozen_layers == ["conv1", "conv2"]
    freezer.thaw()
    train(model, optimizer, freezer, 6, 10)
    reasons = [(event.step, event.reason) for event in freezer.events if event.layer == "head"]
    assert reasons == [(2, "patience"), (4, "last_active_layer"), (8, "patience"), (10, "confident")]


def test_a_norm_that_the_user_keeps_in_eval_is_there_again_after_a_thaw():
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"})
    model.norm1.eval()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        freezer.step()
    freezer.thaw()
    assert not model.norm1.training
    assert model.norm2.training


# The report


def test_the_report_after_thawing_by_hand_computed():
    model = mlp(*SIZES, bias=False)
    optimizer = sgd(model)
    plan = [
        *script(FOUR, {"0"}, {"4"}, {"2"}),  # steps 2, 4, 6
        {"2": 0.1, "6": 0.1},
    ]
    freezer = attach(model, optimizer, FOUR, predictor=ScriptedPredictor(plan))
    train(model, optimizer, freezer, 0, 7, *INPUTS)
    freezer.thaw(["2"])
    train(model, optimizer, freezer, 7, 10, *INPUTS)
    a, b, c, d = (2 * 8 * rows * columns for rows, columns in ((5, 6), (6, 7), (7, 8), (8, 3)))
    report = freezer.report()
    # One unit is a weight gradient; an input gradient is another one, of which the first layer has none.
    assert report.backward_flops == 10 * (a + 2 * b + 2 * c + 2 * d)
    # 0 frozen: its weight gradient and the next layer's input gradient. Then 4: its weight gradient,
    # behind a live layer. Then 2: the prefix grows over 4, up to the input gradient of 6.
    only_first, with_third, all_three = a + b, a + b, a + 2 * b + 2 * c + d
    assert report.backward_flops_saved_by_prefix == 2 * only_first + 2 * with_third + 1 * all_three + 3 * with_third
    assert report.backward_flops_saved_by_interior == 2 * c + 3 * c
    assert report.backward_flops_saved == (
        report.backward_flops_saved_by_prefix + report.backward_flops_saved_by_interior
    )
    assert report.frozen == {"0": 2, "4": 4}
    assert "step      7 ( 70%): thawed 2" in str(report)
    assert "The frozen prefix is 1 layers long; 1 frozen layers are behind it." in str(report)


def test_a_prefix_that_the_user_froze_is_not_our_saving():
    model = mlp(*SIZES, bias=False)
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    freezer = attach(model, optimizer, FOUR[1:], {"4"}, {"2"})
    train(model, optimizer, freezer, 0, 6, *INPUTS)
    b, c, d = (2 * 8 * rows * columns for rows, columns in ((6, 7), (7, 8), (8, 3)))
    report = freezer.report()
    assert report.backward_flops == 6 * (b + 2 * c + 2 * d)
    assert report.backward_flops_saved_by_interior == 2 * c
    assert report.backward_flops_saved_by_prefix == 2 * (b + 2 * c + d)


# Somebody has to keep learning


def test_never_all_layers():
    model = Net()
    optimizer = sgd(model)
    freezer = attach(
        model, optimizer, NET, predictor=ScriptedPredictor([dict.fromkeys(NET, 1.0), *[{"head": 1.0}] * 9])
    )
    train(model, optimizer, freezer, 0, 12)
    assert freezer.frozen_layers == ["conv1", "conv2"]
    loss = loss_of(model, 0)
    assert loss.requires_grad


def test_a_model_of_one_layer_trains_on_in_peace():
    model = nn.Sequential(seeded(nn.Linear, 5, 3))
    optimizer = sgd(model)
    freezer = attach(model, optimizer, ["0"])
    train(model, optimizer, freezer, 0, 4, *INPUTS)
    assert (freezer.layers, freezer.events) == (["0"], [])
    freezer.close()
    assert num_hooks(model) == 0
    train(model, optimizer, None, 0, 2, *INPUTS)


def test_a_model_of_which_the_user_froze_all_but_one_layer_waits_for_more():
    model = Net()
    for name in "conv1", "norm1", "conv2", "norm2":
        getattr(model, name).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    freezer = attach(model, optimizer, NET)
    train(model, optimizer, freezer, 0, 4)
    assert (freezer.layers, freezer.events) == (["head"], [])
    model.requires_grad_(True)
    train(model, optimizer, freezer, 4, 6)
    assert freezer.layers == NET


def test_a_model_that_the_user_froze_whole():
    model = Net().requires_grad_(False)
    freezer = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), NET)
    loss_of(model, 0)
    with pytest.raises(UsageError, match="no backward pass"):
        freezer.step()


def test_a_model_without_values():
    model = mlp(*SIZES).to("meta")
    freezer = attach(model, sgd(model), FOUR)
    model(torch.randn(INPUTS, device="meta")).sum().backward()
    with pytest.raises(UnsupportedModelError, match=r"on the meta device: they have no values\. Load the weights"):
        freezer.step()


# Resumed runs

OPTIONS = {
    "free": {},
    "prefix": {"freeze_order": "prefix"},
    "cost_aware": {"freeze_order": "cost_aware"},
}


class Judged:
    """A run that `ChangePredictor` judges, with a schedule, a restart and a thaw by hand in it."""

    def __init__(self, order, seed=0):
        self.model = Net(seed)
        self.optimizer = sgd(self.model, 0.02)
        self.scheduler = schedulers.CosineAnnealingWarmRestarts(self.optimizer, T_0=18)
        predictor = ChangePredictor(make_info(min_records=3), scale=8.0)
        options = {"threshold": 0.75, "patience": 2, "norm_batches": 3} | OPTIONS[order]
        self.freezer = SmartFRZ(
            self.model, self.optimizer, predictor, record_every=1, decide_every=2, thaw_on_restart=True, **options
        )

    def parts(self):
        return self.model, self.optimizer, self.scheduler, self.freezer

    def run(self, start, end):
        for step in range(start, end):
            train(self.model, self.optimizer, self.freezer, step, step + 1, scheduler=self.scheduler)
            if step == 28:
                self.freezer.thaw(self.freezer.frozen_layers[:1])
        return self


@pytest.mark.parametrize("order", OPTIONS)
@pytest.mark.parametrize("stop", [5, 15, 23, 30])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(order, stop):
    first = Judged(order).run(0, stop)
    states = saved(*first.parts())
    second = Judged(order, seed=5)
    for part, state in zip(second.parts(), states, strict=True):
        part.load_state_dict(state)
    # What was measured is in the state; another run would measure other times.
    whole = first.run(stop, 40)
    second.run(stop, 40)

    assert actions(whole.freezer, "freeze")
    assert {event.reason for event in whole.freezer.events if event.action == "thaw"} == {
        "by_hand",
        "learning_rate_raised",
    }
    assert repr(second.freezer.events) == repr(whole.freezer.events)
    assert not moved(values(whole.model), second.model)
    assert whole.scheduler.get_last_lr() == second.scheduler.get_last_lr()
    reports = [run.freezer.report().to_dict() for run in (whole, second)]
    for report in reports:
        for measured in [name for name in report if name.endswith("seconds")]:
            del report[measured]
    assert reports[0] == reports[1]


def everything(model, optimizer, freezer):
    """All that a refused state must not change."""
    return (
        values(model),
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: (module.training, "train" in vars(module)) for name, module in model.named_modules()},
        copy.deepcopy(optimizer.state_dict()),
        copy.deepcopy(freezer.state_dict()),
        freezer.frozen_layers,
        num_hooks(model),
    )


REFUSED = {
    "an older version": (lambda s: s["controller"].update(version=1), "version 1; this version of smartfrz reads"),
    "no version": (lambda s: [s.pop("reentrant"), s["controller"].pop("version")], "version None"),
    "another predictor": (lambda s: s["controller"].update(predictor="00" * 32), "with the same predictor file"),
    "another model": (lambda s: s["layers"][0].update(parameters=("other",)), r"does not have: \['other'\]"),
    "other layers": (lambda s: s["controller"].update(layers=["conv2", "head"]), r"they differ in \['conv1'\]"),
    "fewer layers": (lambda s: s.update(layers=s["layers"][1:]), r"they differ in \['conv1'\]"),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_refused_state_changes_nothing(reason, steps):
    spoil, message = REFUSED[reason]
    donor = Net()
    donor_optimizer = sgd(donor)
    donor_freezer = attach(donor, donor_optimizer, NET, {"conv2"})
    train(donor, donor_optimizer, donor_freezer, 0, 3)
    state = copy.deepcopy(donor_freezer.state_dict())
    spoil(state)

    model, plain = Net(), Net()
    runs = []
    for net in model, plain:
        optimizer = sgd(net)
        runs.append((net, optimizer, attach(net, optimizer, NET, {"conv1"}, {"conv2"})))
        train(*runs[-1], 0, steps)
    before = everything(*runs[0])
    with pytest.raises(StateError, match=message):
        runs[0][2].load_state_dict(state)
    after = everything(*runs[0])
    assert repr(before) == repr(after)
    for run in runs:
        train(*run, steps, 8)
    assert repr(runs[0][2].events) == repr(runs[1][2].events)
    assert not moved(values(plain), model)


def test_a_state_is_taken_by_a_freezer_that_has_frozen_other_layers():
    donor = Net()
    donor_optimizer = sgd(donor)
    donor_freezer = attach(donor, donor_optimizer, NET, {"conv2"})
    train(donor, donor_optimizer, donor_freezer, 0, 3)
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"})
    train(model, optimizer, freezer, 0, 3)
    freezer.load_state_dict(donor_freezer.state_dict())
    assert freezer.frozen_layers == ["conv2"]
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        "conv2.weight",
        "conv2.bias",
        "norm2.weight",
        "norm2.bias",
    }
    assert model.norm1.training
    assert not model.norm2.training
    freezer.thaw()
    assert all(p.requires_grad for p in model.parameters())


# Orders


def test_the_prefix_order_freezes_front_to_back_in_a_real_loop():
    model = mlp(*SIZES)
    optimizer = sgd(model)
    plan = [
        {"0": 0.1, "2": 0.9, "4": 0.1, "6": 0.1},
        {"0": 0.9, "2": 0.1, "4": 0.9, "6": 0.1},
        {"2": 0.9, "4": 0.9, "6": 0.1},
    ]
    freezer = attach(model, optimizer, FOUR, predictor=ScriptedPredictor(plan), freeze_order="prefix")
    for step in range(8):
        train(model, optimizer, freezer, step, step + 1, *INPUTS)
        live = [parameter.requires_grad for parameter in model.parameters()]
        assert live == sorted(live)
    assert actions(freezer, "freeze") == [(4, "freeze", "0"), (6, "freeze", "2"), (6, "freeze", "4")]
    reasons = {(event.step, event.layer): event.reason for event in freezer.events}
    assert reasons[2, "2"] == reasons[4, "4"] == "behind_live_layer"
    assert freezer.report().backward_flops_saved_by_interior == 0


def test_cost_aware_is_free_bit_for_bit_until_the_first_freeze():
    models = Net(), Net()
    freezers = []
    for model, order in zip(models, ("free", "cost_aware"), strict=True):
        optimizer = sgd(model)
        freezer = attach(model, optimizer, NET, freeze_order=order)
        for step in range(6):
            model.eval()(batch(step)[0])  # a validation between the steps confuses nothing
            train(model, optimizer, freezer, step, step + 1)
            draws = torch.rand(1)
            with torch.no_grad():
                model.train()(batch(step)[0])
        freezers.append((freezer, draws))
    assert not moved(values(models[0]), models[1])
    assert torch.equal(freezers[0][1], freezers[1][1])
    assert [num_hooks(model) for model in models] == [0, 0]
    costs = freezers[1][0].state_dict()["controller"]["costs"]
    assert list(costs) == NET
    assert all(weight > 0 for _, _, weight in costs.values())
    assert freezers[0][0].state_dict()["controller"]["costs"] == {}


def test_cost_aware_without_a_second_step():
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, freeze_order="cost_aware")
    train(model, optimizer, freezer, 0, 1)
    model.eval()(batch(1)[0])
    assert num_hooks(model) > 0
    assert "SmartFRZ froze 0 of 3 layers in 1 steps" in str(freezer.report())
    states = saved(model, optimizer, freezer)
    freezer.close()
    assert num_hooks(model) == 0

    # A resumed run measures then.
    twin = Net(3)
    twin_optimizer = sgd(twin)
    resumed = attach(twin, twin_optimizer, NET)
    for part, state in zip((twin, twin_optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    train(twin, twin_optimizer, resumed, 1, 6)
    assert list(resumed.state_dict()["controller"]["costs"]) == NET
    assert num_hooks(twin) == 0


def test_cost_aware_asks_less_of_the_layer_that_closes_the_prefix():
    model = mlp(*SIZES)
    optimizer = sgd(model)
    plan = [dict.fromkeys(FOUR, 0.1)] * 2 + [{"0": 0.45, "2": 0.9, "4": 0.9, "6": 0.45}]
    freezer = attach(model, optimizer, FOUR, predictor=ScriptedPredictor(plan), freeze_order="cost_aware")
    train(model, optimizer, freezer, 0, 6, *INPUTS)
    assert freezer.frozen_layers == ["0", "2", "4"]
    bars = {event.layer: event.threshold for event in freezer.events if event.step == 6}
    assert bars["0"] < 0.45 < bars["6"]


def test_a_process_that_ends_before_its_layers_are_measured_ends_without_a_word():
    code = """
import torch
from torch_runs import NET, Net, attach, train
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
freezer = attach(model, optimizer, NET, freeze_order="cost_aware")
train(model, optimizer, freezer, 0, 1)
"""
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root.parent}"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")
