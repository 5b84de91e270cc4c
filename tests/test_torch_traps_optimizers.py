"""What optimizers, schedulers and gradient scalers do to frozen layers. One test per trap."""

import copy
import io
import math

import numpy as np
import pytest
from numpy_adapter import ScriptedPredictor, make_info

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim import lr_scheduler as schedulers  # noqa: E402
from torch_runs import NET, Net, attach, batch, loss_of, mlp, moved, parts, train, values  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ, trace_layers  # noqa: E402
from smartfrz.control.tailoring import tailoring_positions  # noqa: E402

MLP = (5, 6, 7, 3)  # layers "0", "2" and "4"
INPUTS = (8, 5)


def muon(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1), torch.optim.AdamW(vectors, lr=0.01)]


OPTIMIZERS = {
    "sgd": lambda m: [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)],
    "nesterov": lambda m: [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)],
    "adamw": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True)],
    "adamw-fused": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, fused=True)],
    "adamw-foreach": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, foreach=True)],
    "rmsprop": lambda m: [torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)],
    "adagrad": lambda m: [
        torch.optim.Adagrad(m.parameters(), lr=0.05, weight_decay=0.1, initial_accumulator_value=0.1)
    ],
    "adafactor": lambda m: [torch.optim.Adafactor(m.parameters(), lr=0.05, weight_decay=0.1)],
    "nadam": lambda m: [torch.optim.NAdam(m.parameters(), lr=0.01, weight_decay=0.1)],
    "muon": muon,
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.1)


# Weights that are said to be frozen


def test_batch_norm_statistics_stay_through_train_and_a_reset_of_the_whole_model():
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"})
    train(model, optimizer, freezer, 0, 2)
    before = values(model)
    train(model, optimizer, freezer, 2, 6)
    model.eval()
    model.train()
    loss_of(model, 6)
    assert moved(before, model) == set(before) - parts(before, ["conv1"])


def test_update_bn_gathers_statistics_anew_also_for_a_frozen_batch_norm():
    # It resets them and calls model.train(); a norm that stays in eval mode would then compute with 0 and 1.
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"})
    train(model, optimizer, freezer, 0, 4)
    expected = copy.deepcopy(model)
    del expected.norm1.__dict__["train"]
    averaged = torch.optim.swa_utils.AveragedModel(model)
    loader = [batch(step)[0] for step in range(3)]
    torch.optim.swa_utils.update_bn(loader, expected)
    for twin, norm in (averaged, averaged.module.norm1), (model, model.norm1):
        torch.optim.swa_utils.update_bn(loader, twin)
        assert torch.equal(norm.running_mean, expected.norm1.running_mean)
        assert torch.equal(norm.running_var, expected.norm1.running_var)
        twin.train()
        assert not norm.training
    before = values(model)
    train(model, optimizer, freezer, 4, 6)
    assert not parts(moved(before, model), ["conv1"])


@every_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_weights_are_bit_identical_after_100_steps(optimizer, set_to_none):
    model = mlp(*MLP)
    optimizers = OPTIMIZERS[optimizer](model)
    freezer = attach(model, optimizers, ["0", "2", "4"], {"0"}, {"2"})
    train(model, optimizers, freezer, 0, 4, *INPUTS, set_to_none=set_to_none)
    assert freezer.frozen_layers == ["0", "2"]
    before = values(model)
    train(model, optimizers, freezer, 4, 104, *INPUTS, set_to_none=set_to_none)
    assert moved(before, model) == {"4.weight", "4.bias"}


def test_lbfgs_does_not_move_frozen_weights_by_remembered_directions():
    model = mlp(*MLP)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=3)
    freezer = attach(model, optimizer, ["0", "2", "4"], (), {"2"})

    def run(model, optimizer, freezer, start, end):
        for step in range(start, end):

            def closure(step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step // 4, *INPUTS)
                loss.backward()
                return loss

            optimizer.step(closure)
            freezer.step()

    run(model, optimizer, freezer, 0, 4)
    assert freezer.frozen_layers == ["2"]
    before = values(model)
    run(model, optimizer, freezer, 4, 6)
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, freezer)])
    run(model, optimizer, freezer, 6, 10)
    assert moved(before, model) == {"0.weight", "0.bias", "4.weight", "4.bias"}

    twin = mlp(*MLP, seed=1)
    twin_optimizer = torch.optim.LBFGS(twin.parameters(), lr=0.3, max_iter=3)
    resumed = attach(twin, twin_optimizer, ["0", "4"])
    for part, state in zip((twin, twin_optimizer, resumed), saved, strict=True):
        part.load_state_dict(state)
    run(twin, twin_optimizer, resumed, 6, 10)
    assert not moved(values(model), twin)


@every_optimizer
@pytest.mark.parametrize("moment", ["after forward", "after backward", "during accumulation"])
def test_a_stale_gradient_does_not_move_a_layer_that_is_frozen_in_the_middle_of_a_step(optimizer, moment):
    model = mlp(*MLP)
    optimizers = OPTIMIZERS[optimizer](model)
    freezer = attach(model, optimizers, ["0", "2", "4"], {"0"})
    train(model, optimizers, freezer, 0, 1, *INPUTS)
    for part in optimizers:
        part.zero_grad(set_to_none=False)
    if moment == "during accumulation":
        loss_of(model, 1, *INPUTS).backward()
    elif moment == "after backward":
        loss_of(model, 1, *INPUTS).backward()
        loss_of(model, 2, *INPUTS).backward()
    loss = loss_of(model, 3, *INPUTS)
    if moment == "after backward":
        loss.backward()
    before = values(model)
    freezer.step()
    if moment != "after backward":
        loss.backward()
    assert freezer.frozen_layers == ["0"]
    for part in optimizers:
        part.step()
    train(model, optimizers, freezer, 4, 8, *INPUTS, set_to_none=False)
    assert moved(before, model) == {"2.weight", "2.bias", "4.weight", "4.bias"}


def test_statistics_are_corrected_between_forward_and_backward():
    # The graph holds the running statistics: altered in place, they would make backward() fail.
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"})
    train(model, optimizer, freezer, 0, 1)
    loss = loss_of(model, 1)
    statistics = model.norm1.running_mean.clone()
    freezer.step()
    assert not torch.equal(model.norm1.running_mean, statistics)
    loss.backward()
    before = values(model)
    optimizer.step()
    assert not parts(moved(before, model), ["conv1"])


def test_a_freeze_in_eval_mode_corrects_the_statistics_too():
    # As when the validation of an epoch stands between optimizer.step() and freezer.step().
    one, other = Net(), Net()
    for model, validates in (one, False), (other, True):
        optimizer = sgd(model)
        freezer = attach(model, optimizer, NET, {"conv1"})
        train(model, optimizer, freezer, 0, 1)
        train(model, optimizer, None, 1, 2)
        model.train(not validates)
        freezer.step()
        assert freezer.frozen_layers == ["conv1"]
        freezer.thaw()
        assert model.norm1.training is not validates
        model.train()
        assert model.norm1.training
    assert not moved(values(one), other)


def test_accumulated_gradients_of_live_layers_survive_a_freeze():
    model, plain = mlp(*MLP), mlp(*MLP)
    optimizer = sgd(model)
    freezer = attach(model, optimizer, ["0", "2", "4"], {"0"})
    train(model, optimizer, freezer, 0, 1, *INPUTS)
    plain.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    for step in (1, 2, 3):
        loss_of(model, step, *INPUTS).backward()
        loss_of(plain, step, *INPUTS).backward()
        if step == 2:
            freezer.step()
    assert freezer.frozen_layers == ["0"]
    assert model[0].weight.grad is None
    for index in (2, 4):
        assert torch.equal(model[index].weight.grad, plain[index].weight.grad)


# Optimizer state


def three(model_seed, optimizer, freezer_layers, *stages):
    model = mlp(*MLP, seed=model_seed)
    optimizers = OPTIMIZERS[optimizer](model)
    return model, optimizers, attach(model, optimizers, freezer_layers, *stages)


@every_optimizer
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_optimizer_state_round_trip_in_the_middle_of_freezing(optimizer, optimizer_first):
    model, optimizers, freezer = three(0, optimizer, ["0", "2", "4"], {"0"})
    train(model, optimizers, freezer, 0, 5, *INPUTS)
    assert freezer.frozen_layers == ["0"]
    saved = io.BytesIO()
    state = [model.state_dict(), [part.state_dict() for part in optimizers], freezer.state_dict()]
    torch.save(state, saved)
    saved.seek(0)
    model_state, optimizer_states, freezer_state = torch.load(saved, weights_only=True)

    twin, twin_optimizers, twin_freezer = three(1, optimizer, ["2", "4"])
    twin.load_state_dict(model_state)
    if not optimizer_first:
        twin_freezer.load_state_dict(freezer_state)
    for part, part_state in zip(twin_optimizers, optimizer_states, strict=True):
        part.load_state_dict(part_state)
    if optimizer_first:
        twin_freezer.load_state_dict(freezer_state)
    train(model, optimizers, freezer, 5, 9, *INPUTS)
    train(twin, twin_optimizers, twin_freezer, 5, 9, *INPUTS)
    for either in freezer, twin_freezer:
        assert [decision.layer for decision in either.thaw()] == ["0"]
    train(model, optimizers, freezer, 9, 13, *INPUTS)
    train(twin, twin_optimizers, twin_freezer, 9, 13, *INPUTS)
    assert not moved(values(model), twin)


@every_optimizer
def test_a_thawed_layer_steps_first_as_with_a_new_optimizer(optimizer):
    model, optimizers, freezer = three(0, optimizer, ["0", "2", "4"], (), (), {"0"})
    train(model, optimizers, freezer, 0, 16, *INPUTS)
    assert freezer.frozen_layers == ["0"]
    freezer.thaw(["0"])
    twin = copy.deepcopy(model)
    new = OPTIMIZERS[optimizer](twin)
    before = values(model)
    train(model, optimizers, None, 16, 17, *INPUTS)
    train(twin, new, None, 16, 17, *INPUTS)
    for name in "0.weight", "0.bias":
        update, first = (m.get_parameter(name).detach() - before[name] for m in (model, twin))
        assert update.any()
        torch.testing.assert_close(update, first, rtol=1e-5, atol=1e-8)
    assert not torch.equal(model[2].weight, twin[2].weight)  # of which the old optimizer knows more
    train(model, optimizers, freezer, 17, 20, *INPUTS)


# Learning rate schedulers

SCHEDULERS = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=30),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=5),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 30),
    "linear, then exponential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.ExponentialLR(o, 0.9)], milestones=[5]
    ),
}


def rates(model, optimizer, freezer, scheduler, start, end):
    """Learning rate and momentum of each group after each step."""
    seen = []
    for step in range(start, end):
        train(model, optimizer, freezer, step, step + 1)
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        seen.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
    return seen


def grouped(model):
    head = list(model.head.parameters())
    return torch.optim.SGD(
        [{"params": head}, {"params": [p for n, p in model.named_parameters() if "head" not in n], "lr": 0.01}],
        lr=0.05,
        momentum=0.9,
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_learning_rates_are_those_of_a_run_without_freezing(scheduler):
    make = SCHEDULERS[scheduler]
    plain, model, resumed = Net(), Net(), Net(1)
    plain_optimizer, optimizer, resumed_optimizer = map(grouped, (plain, model, resumed))
    expected = rates(plain, plain_optimizer, None, make(plain_optimizer), 0, 20)

    freezer = attach(model, optimizer, NET, {"conv1"}, {"conv2"})
    schedule = make(optimizer)
    assert rates(model, optimizer, freezer, schedule, 0, 8) == expected[:8]
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, freezer, schedule)])
    assert rates(model, optimizer, freezer, schedule, 8, 20) == expected[8:]
    assert freezer.frozen_layers == ["conv1", "conv2"]  # all of the second group

    resumed_freezer, resumed_schedule = attach(resumed, resumed_optimizer, ["head"]), make(resumed_optimizer)
    for part, state in zip((resumed, resumed_optimizer, resumed_freezer, resumed_schedule), saved, strict=True):
        part.load_state_dict(state)
    assert rates(resumed, resumed_optimizer, resumed_freezer, resumed_schedule, 8, 20) == expected[8:]
    assert not moved(values(model), resumed)


# Gradient scalers and precision


class Halves:
    """`Net` with one optimizer for the convolutions and one for the head, under a GradScaler."""

    def __init__(self, *stages, optimizers=None):
        self.model = Net()
        body, head = [], []
        for name, parameter in self.model.named_parameters():
            (head if name.startswith("head") else body).append(parameter)
        self.optimizers = [torch.optim.SGD(part, lr=0.05, momentum=0.9) for part in (body, head)]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        self.freezer = attach(self.model, self.optimizers, NET, *stages)

    def step(self, step, factor=1.0):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.scaler.scale(loss_of(self.model, step) * factor).backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()


def test_a_grad_scaler_finds_a_gradient_in_every_optimizer():
    trap = Halves()
    for name in NET[:2]:
        getattr(trap.model, name).requires_grad_(False)
    trap.model.norm1.requires_grad_(False)
    trap.model.norm2.requires_grad_(False)
    with pytest.raises((AssertionError, RuntimeError), match="No inf checks were recorded"):
        trap.step(0)

    halves = Halves({"conv1", "conv2", "head"}, {"conv2", "head"})
    for step in range(6):
        halves.step(step)
        halves.freezer.step()
    assert halves.freezer.frozen_layers == ["conv1"]
    kept = {event.layer for event in halves.freezer.events if event.reason == "last_active_layer"}
    assert kept == {"conv2", "head"}


def test_the_kept_layer_is_one_that_the_only_optimizer_trains():
    # The rest of the model is in no optimizer: it never moves, and it must not count as what keeps learning.
    model = Net()
    optimizer = torch.optim.SGD(model.conv1.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    freezer = attach(model, optimizer, ["conv1"], {"conv1"})
    before = values(model)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        freezer.step()
    assert freezer.frozen_layers == []  # nor does what is never trained freeze as converged
    assert {e.layer for e in freezer.events if e.reason == "not_trained"} == {"conv2", "head"}
    assert "conv1.weight" in moved(before, model)


def test_a_grad_scaler_steps_an_optimizer_with_a_fully_frozen_group():
    model = Net()
    optimizer = grouped(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    freezer = attach(model, optimizer, NET, {"conv1", "conv2"})
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        freezer.step()
        if step == 1:
            before = values(model)
    assert freezer.frozen_layers == ["conv1", "conv2"]
    assert moved(before, model) == {"head.weight", "head.bias"}


def test_a_step_that_the_grad_scaler_skips_and_a_freeze_right_after_it():
    halves = Halves({"conv1"})
    halves.step(0)
    halves.freezer.step()
    before = {name: parameter.detach().clone() for name, parameter in halves.model.named_parameters()}
    halves.step(1, factor=math.inf)
    halves.freezer.step()
    assert halves.freezer.frozen_layers == ["conv1"]
    assert halves.scaler.get_scale() == 32.0
    assert all(torch.equal(before[name], parameter) for name, parameter in halves.model.named_parameters())
    for step in range(2, 5):
        halves.step(step)
        halves.freezer.step()
    now = dict(halves.model.named_parameters())
    assert {name for name in now if torch.equal(before[name], now[name])} == {
        "conv1.weight",
        "norm1.weight",
        "norm1.bias",
    }


def test_bfloat16_autocast():
    model = Net()
    layers = trace_layers(copy.deepcopy(model), batch(0)[0])
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"}, {"conv2"})

    def run(start, end):
        for step in range(start, end):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            freezer.step()

    run(0, 4)
    assert freezer.frozen_layers == ["conv1", "conv2"]
    assert freezer.report().layers == layers  # FLOPs, too
    before = values(model)
    run(4, 20)
    assert moved(before, model) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_are_sampled_and_freeze(dtype):
    model = mlp(*MLP).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    freezer = attach(model, optimizer, ["0", "2", "4"], {"0"}, seed=3)

    def run(start, end):
        for step in range(start, end):
            optimizer.zero_grad(set_to_none=False)
            inputs, targets = batch(step, *INPUTS)
            nn.functional.cross_entropy(model(inputs.to(dtype)), targets).backward()
            optimizer.step()
            freezer.step()

    run(0, 2)
    history, _ = freezer.predictor.calls[0]
    for layer, rows in zip((0, 2, 4), history, strict=True):
        weight = model[layer].weight.detach().float().numpy().ravel()
        np.testing.assert_array_equal(rows[-1], weight[tailoring_positions(str(layer), weight.size, 8, seed=3)])
    before = values(model)
    run(2, 12)
    assert moved(before, model) == {"2.weight", "2.bias", "4.weight", "4.bias"}


# A layer that the user froze in part


def test_a_layer_whose_biases_alone_are_trained_is_judged_by_them():
    # Its weights never move: sampled, they would pass for converged at the first stage.
    model = mlp(*MLP)
    for index in (0, 2):
        model[index].weight.requires_grad_(False)
    predictor = ScriptedPredictor(info=make_info(tailored_size=6))
    optimizer = sgd(model)
    freezer = SmartFRZ(model, optimizer, predictor, record_every=1, decide_every=2)
    train(model, optimizer, freezer, 0, 4, *INPUTS)
    assert freezer.layers == ["0", "2", "4"]
    history, _ = predictor.calls[-1]
    assert all(np.abs(np.diff(rows, axis=0)).sum(1).all() for rows in history)
    np.testing.assert_array_equal(np.unique(history[0][-1]), np.unique(model[0].bias.detach().numpy()))


# Options that end up in a checkpoint


def test_numpy_options_do_not_make_the_checkpoint_unreadable():
    model = mlp(*MLP)
    optimizer = sgd(model)
    predictor = ScriptedPredictor()
    freezer = SmartFRZ(
        model,
        optimizer,
        predictor,
        record_every=np.int64(1),
        decide_every=np.int64(2),
        patience=np.int64(1),
        seed=np.int64(3),
        threshold=np.float32(0.5),
    )
    train(model, optimizer, freezer, 0, 3, *INPUTS)
    file = io.BytesIO()
    torch.save(freezer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["controller"]["schedule"]["record_every"] == 1
