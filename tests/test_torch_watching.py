"""Frozen stays frozen, or it is said, and the layers may change: PyTorch."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smartfrz.adapters.torch import SmartFRZ
from smartfrz.control.policy import Policy
from smartfrz.errors import UsageError


class Sure(Policy):
    """Sure about some layers from a step on."""

    name = "sure"

    def __init__(self, *layers, after=3):
        self.layers, self.after = layers, after

    def confidence(self, layers, *, step):
        return {layer: float(layer in self.layers and step >= self.after) for layer in layers}


def mlp(layers=4, width=6):
    torch.manual_seed(0)
    return nn.Sequential(
        *[x for _ in range(layers - 1) for x in (nn.Linear(width, width), nn.Tanh())], nn.Linear(width, 2)
    )


def attach(model, optimizers, *layers, after=3, **options):
    return SmartFRZ(model, optimizers, Sure(*layers, after=after), **{"record_every": 1, "total_steps": 40} | options)


def train(model, optimizers, freezer, steps, before_step=lambda step: None):
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    for step in range(steps):
        before_step(step)
        torch.manual_seed(step)
        model(torch.randn(8, 6)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        freezer.step()


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)


def values(*modules):
    return [t.clone() for module in modules for t in module.state_dict().values()]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("record_every", [1, 3])
def test_a_loop_that_switches_the_whole_model_never_moves_what_is_frozen(record_every, caplog):
    model = mlp()
    optimizer = adam(model)
    freezer = attach(model, optimizer, "0", "2", record_every=record_every)
    kept = []

    def switch(step):
        model.requires_grad_(False)
        model(torch.randn(8, 6))
        model.requires_grad_(True)
        if freezer.frozen_layers and not kept:
            kept.extend(values(model[:3]))

    train(model, optimizer, freezer, 20, switch)
    assert freezer.frozen_layers == ["0", "2"]
    assert same(kept, values(model[:3]))
    assert sum("again and again" in r.getMessage() for r in caplog.records) == 1
    # Where it comes back in every step, flags are set back before the forward pass, too: nothing is computed in vain.
    model.requires_grad_(True)
    model(torch.randn(8, 6)).sum().backward()
    assert model[0].weight.grad is None
    freezer.close()
    assert not model._forward_pre_hooks


def test_a_loop_that_leaves_the_model_switched_off_loses_no_layer():
    model = mlp()
    optimizer = adam(model)
    freezer = attach(model, optimizer, "0")
    for step in range(8):
        model.requires_grad_(True)
        torch.manual_seed(step)
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.requires_grad_(False)
        if step:
            freezer.step()
        else:
            model.requires_grad_(True)
            freezer.step()
    assert freezer.layers == ["0", "2", "4", "6"]
    assert freezer.frozen_layers == ["0"]


def test_one_layer_that_somebody_unfreezes_is_believed(caplog):
    model = mlp()
    optimizer = adam(model)
    freezer = attach(model, optimizer, "0", "2", record_every=2)
    train(model, optimizer, freezer, 6)
    assert freezer.frozen_layers == ["0", "2"]
    model[0].requires_grad_(True)
    freezer._policy.layers = freezer._run.controller._policy.layers = ()  # it does not freeze again at once
    train(model, optimizer, freezer, 6)
    assert freezer.frozen_layers == ["2"]
    assert model[0].weight.requires_grad
    before = values(model[0])
    train(model, optimizer, freezer, 2)
    assert not same(before, values(model[0]))
    assert [e.reason for e in freezer.events if e.action == "thaw"] == ["unfrozen_by_user"]
    assert sum("had frozen layer '0'" in r.getMessage() for r in caplog.records) == 1


class Decaying(torch.optim.Optimizer):
    """Takes a missing gradient for zero, and decays the weight."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.02, "decay": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                p.mul_(1 - group["lr"] * group["decay"]).sub_(gradient, alpha=group["lr"])


def test_an_optimizer_that_decays_weights_without_a_gradient_is_told_and_nothing_counts_as_saved(caplog):
    model = mlp()
    optimizers = [Decaying(model[:3].parameters()), adam(model[3:])]
    freezer = attach(model, optimizers, "0", "4")
    train(model, optimizers, freezer, 10)
    assert freezer.frozen_layers == ["4"]
    assert freezer.report().moved == ["0"]
    assert freezer.report().frozen_spans()["0"] == [(3, 3)]
    assert model[0].weight.requires_grad
    [told] = caplog.records
    assert "SmartFRZ thaws layer '0'" in told.getMessage()
    assert "weights that have no gradient" in told.getMessage()


class OwnNorm(nn.Module):
    """A batch norm that is no subclass of PyTorch's."""

    def __init__(self, size, obeys=True):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.register_buffer("mean", torch.zeros(size))
        self.obeys = obeys

    def forward(self, x):
        if self.training or not self.obeys:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return (x - (x.mean(0) if self.training else self.mean)) * self.scale


def test_a_norm_of_ones_own_stops_with_its_layer():
    model = nn.Sequential(nn.Linear(6, 6), OwnNorm(6), nn.Tanh(), *mlp(3))
    optimizer = adam(model)
    freezer = attach(model, optimizer, "0")
    train(model, optimizer, freezer, 5)
    before = values(model[:2])
    train(model, optimizer, freezer, 5, lambda step: model.train())
    assert same(before, values(model[:2]))
    assert freezer.frozen_layers == ["0"]
    freezer.thaw()
    assert model.train()[1].training
    train(model, optimizer, freezer, 0)
    model(torch.randn(8, 6))
    assert not same(before, values(model[:2]))


def test_a_norm_that_moves_even_in_eval_mode_is_told(caplog):
    model = nn.Sequential(nn.Linear(6, 6), OwnNorm(6, obeys=False), nn.Tanh(), *mlp(3))
    optimizer = adam(model)
    freezer = attach(model, optimizer, "0")
    train(model, optimizer, freezer, 8)
    assert freezer.frozen_layers == []
    assert "a norm updates its statistics even in eval mode" in caplog.text


def test_layers_that_are_unfrozen_later_join_and_may_freeze():
    model = mlp()
    model[:3].requires_grad_(False)
    optimizer = torch.optim.Adam(model[3:].parameters())
    freezer = attach(model, optimizer, "0", after=8)
    train(model, optimizer, freezer, 4)
    assert freezer.report().user_frozen == {"0", "2"}
    model[:3].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[:3].parameters())})
    train(model, optimizer, freezer, 8)
    assert freezer.layers == ["0", "2", "4", "6"]
    assert freezer.frozen_layers == ["0"]
    assert freezer.report().user_frozen == set()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.experts, self.head = (
            nn.Linear(6, 6),
            nn.ModuleList(nn.Linear(6, 6) for _ in range(3)),
            nn.Linear(6, 2),
        )
        self.turn = 0

    def forward(self, x):
        return self.head(self.experts[self.turn](self.stem(x)))


def test_experts_that_did_not_run_at_first_join_in_their_place_and_a_layer_that_always_runs_is_kept():
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = attach(model, optimizer, "stem", "experts.0", "experts.1", "head", after=8)
    train(model, optimizer, freezer, 18, lambda step: setattr(model, "turn", step % 3))
    assert freezer.layers == ["stem", "experts.0", "experts.1", "experts.2", "head"]
    assert [layer.name for layer in freezer.report().layers] == freezer.layers
    assert freezer.frozen_layers == ["stem", "experts.0", "experts.1"]
    state = freezer.state_dict()
    twin = copy.deepcopy(model).requires_grad_(True)
    resumed = attach(twin, torch.optim.SGD(twin.parameters(), 0.1), "stem", "experts.0", "experts.1", "head", after=8)
    resumed.load_state_dict(state)
    assert resumed.frozen_layers == freezer.frozen_layers


def test_a_second_run_takes_back_what_an_interrupted_one_left_frozen():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), *mlp(3))
    optimizer = adam(model)
    freezer = attach(model, optimizer, "0")
    train(model, optimizer, freezer, 5)
    assert not model[0].weight.requires_grad
    again = attach(model, optimizer, after=99)
    assert all(p.requires_grad for p in model.parameters())
    assert model[1].training
    before = values(model[:2])
    train(model, optimizer, again, 3)
    assert again.report().user_frozen == set()
    assert not same(before, values(model[:2]))


def test_what_a_closed_run_left_frozen_on_purpose_stays_so():
    model = mlp()
    optimizer = adam(model)
    freezer = attach(model, optimizer, "0")
    train(model, optimizer, freezer, 5)
    freezer.close(unfreeze=False)
    attach(model, optimizer)
    assert not model[0].weight.requires_grad


def test_the_mark_of_a_frozen_parameter_names_nothing_of_ours():
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, attach(model, optimizer, "0"), 5)
    assert b"smartfrz." not in pickle.dumps(model[0].weight)


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_group_whose_learning_rate_is_zero_does_not_freeze(rate, caplog):
    model = mlp()
    groups = [{"params": model[:3].parameters(), "lr": rate}, {"params": model[3:].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    freezer = attach(model, optimizer, "0", "2", after=1)
    train(model, optimizer, freezer, 8)
    assert freezer.frozen_layers == []
    assert sum("the learning rate of these weights is 0" in r.getMessage() for r in caplog.records) == 1
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, freezer, 3)
    assert freezer.frozen_layers == ["0", "2"]


def test_a_layer_that_has_never_moved_does_not_freeze(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = attach(model, optimizer, "0", "2")
    for parameter in model[0].parameters():
        parameter.register_hook(lambda gradient: gradient * 0)
    train(model, optimizer, freezer, 8)
    assert freezer.frozen_layers == ["2"]
    assert "layer '0' as converged, since these weights have not moved since training began" in caplog.text


def test_a_layer_whose_learning_rate_was_zero_in_its_only_step_so_far_does_not_freeze(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    optimizer.register_step_post_hook(lambda *args: warm_up.step())  # before freezer.step(), as in transformers
    freezer = attach(model, optimizer, "0", "2", after=1)
    train(model, optimizer, freezer, 1)
    assert freezer.frozen_layers == []
    train(model, optimizer, freezer, 2)
    assert freezer.report().frozen == {"0": 2, "2": 2}
    assert "have not moved" not in caplog.text


def test_what_is_updated_now_and_then_only_is_not_said_to_stand_still(caplog):
    generator, critic = mlp(), nn.Linear(2, 1)
    model = nn.ModuleList([generator, critic])
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in model]
    freezer = attach(model, optimizers, "0.0", "0.2", after=2)
    for step in range(8):
        for part, optimizer in zip((critic, generator), reversed(optimizers), strict=True):
            if part is critic or step % 5 == 0:
                optimizer.zero_grad()
                critic(generator(torch.randn(8, 6))).square().mean().backward()
                optimizer.step()
        freezer.step()
    assert freezer.report().frozen == {"0.0": 6, "0.2": 6}  # the generator's second step
    assert "have not moved" not in caplog.text


def test_layers_that_are_switched_off_when_the_first_step_ends_were_not_frozen_by_the_user(caplog):
    generator, critic = mlp(), nn.Linear(2, 1)
    model = nn.ModuleList([generator, critic])
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in model]
    freezer = attach(model, optimizers, "0.0", after=4)
    for _ in range(6):
        for part, optimizer in zip((critic, generator), reversed(optimizers), strict=True):
            critic.requires_grad_(part is critic)
            optimizer.zero_grad()
            critic(generator(torch.randn(8, 6))).square().mean().backward()
            optimizer.step()
        freezer.step()
    report = freezer.report()
    assert not report.user_frozen
    assert not report.layer_changes
    assert report.frozen_spans() == {"0.0": [(4, 6)]}


@pytest.mark.parametrize("replaced", [0, 6])
def test_a_layer_that_is_replaced_by_a_new_one_leaves_and_joins_again(replaced):
    model = mlp()
    optimizer = adam(model)
    freezer = attach(model, optimizer, "0", "2", record_every=2, after=4)

    def replace(step):
        if step == 9:
            model[replaced] = nn.Linear(6, model[replaced].out_features)
            optimizer.add_param_group({"params": list(model[replaced].parameters())})

    train(model, optimizer, freezer, 13, replace)
    name = str(replaced)
    assert freezer.report().layer_changes == [(10, "left", name), (12, "joined", name)]
    assert not freezer.report().user_frozen
    # The policy is sure about the new layer, too.
    assert freezer.report().frozen == ({"2": 4, "0": 12} if replaced == 0 else {"0": 4, "2": 4})
    frozen = values(model[0])
    train(model, optimizer, freezer, 3)
    assert same(frozen, values(model[0]))


def test_a_layer_that_no_optimizer_trains_does_not_freeze_and_an_optimizer_that_was_not_given_is_named(caplog):
    model = mlp()
    given, other = torch.optim.SGD(model[3:].parameters(), 0.1), torch.optim.RMSprop(model[2].parameters())
    freezer = attach(model, given, "0", "2", record_every=2)
    train(model, [given, other], freezer, 8)
    assert freezer.frozen_layers == []
    assert "layer '0' as converged, since no optimizer that it was given holds these weights" in caplog.text
    assert "layer '2' as converged, since an optimizer that it was not given trains these weights" in caplog.text
    assert "RMSprop trains layers of the model, and was not given to SmartFRZ" in caplog.text


def test_an_optimizer_of_another_model_is_refused_at_the_first_step():
    model = mlp()
    optimizer = adam(mlp())
    freezer = attach(model, optimizer, "0")
    F.mse_loss(model(torch.randn(8, 6)), torch.zeros(8, 2)).backward()
    optimizer.step()
    with pytest.raises(
        UsageError, match=r"Adam with 8 parameters, none of which is among the 8 .*Make the optimizer after"
    ):
        freezer.step()


def test_an_optimizer_of_copies_of_the_weights_is_not_refused():
    model = mlp()
    masters = [p.detach().clone().requires_grad_(True) for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, 0.1)
    freezer = attach(model, optimizer)
    for _ in range(3):
        model(torch.randn(8, 6)).square().mean().backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad, p.grad = p.grad, None
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)
        freezer.step()


def test_layers_freeze_where_each_parameter_has_an_optimizer_of_its_own():
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
    freezer = attach(model, list(optimizers.values()), "0", "2", "4", "6")

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for _ in range(6):
        model(torch.randn(8, 6)).square().mean().backward()
        freezer.step()
    assert freezer.frozen_layers == ["0", "2", "4"]
