"""What layers cost. Times are only compared with zero: a busy machine is no failure."""

import random
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from smartfrz.adapters.torch import Layer, trace_layers  # noqa: E402
from smartfrz.adapters.torch import costs as costs_module  # noqa: E402
from smartfrz.adapters.torch.costs import CostProfiler, measure_step  # noqa: E402
from smartfrz.control.ordering import LayerCost  # noqa: E402
from smartfrz.errors import UsageError  # noqa: E402

IMAGES = (4, 3, 8, 8)


class Noisy(nn.Module):
    """A linear layer that draws random numbers, and keeps what it did in attributes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((5, 5), 0.1))
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.penalty, self.number = [], None, 0

    def forward(self, x, *, scale=1.0):
        self.calls += 1
        self.number += 1
        self.seen.append(self.number)
        self.penalty = self.weight.square().sum()
        noise = torch.rand(()) + random.random() + np.random.random()  # noqa: NPY002
        return x @ self.weight * scale * noise


class Net(nn.Module):
    """Batch norm, dropout, a module called twice, a tuple as output, keywords."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.noisy = Noisy()
        self.drop = nn.Dropout(0.4)
        self.recurrent = nn.LSTM(5, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, dropout=0.1, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        x = self.drop(self.noisy(self.noisy(x, scale=2.0)))
        x, _ = self.recurrent(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return {"logits": self.head(x.mean(1)), "penalty": self.noisy.penalty}


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 11, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.middle(self.embedding(tokens)))


class Fragile(nn.Linear):
    """Raises whenever it is called once more in a pass, as some caches do."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("called twice")
        return super().forward(x)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def layers_of(model, *example):
    with torch.random.fork_rng():
        was_training = model.training
        layers = trace_layers(model.eval(), *example)
        model.train(was_training)
    return layers


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def train(profiled, steps=3, frozen=(), autocast=False):
    """All that a short training leaves behind; with a profiler attached before the second step."""
    model = seeded(Net).train()
    layers = layers_of(model, torch.zeros(IMAGES))
    model = seeded(Net).train()  # untouched by the trace
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    profiler, losses, gradients = None, [], []
    for step in range(steps):
        if profiled and step == 1:
            profiler = CostProfiler(model, layers, repeats=2)
        inputs = torch.randn(IMAGES)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(inputs)
        loss = output["logits"].float().square().mean() + output["penalty"]
        optimizer.zero_grad()
        loss.backward()
        gradients += [p.grad for p in model.parameters()]
        optimizer.step()
        losses.append(loss.detach())
    left = [*model.state_dict().values(), *losses, *gradients, torch.rand(2), random.random(), np.random.random()]  # noqa: NPY002
    return model, profiler, [*left, model.noisy.number, model.noisy.seen, model.noisy.training]


def costs_of(model, layers, *example):
    """What a profiler measures in one forward pass in training mode."""
    profiler = CostProfiler(model.train(), layers)
    model(*example)
    return profiler.costs()


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.fixture
def fake_time(monkeypatch):
    """Every timed run takes one second."""
    monkeypatch.setattr(costs_module, "time_fastest", lambda run, repeats, cuda: (1.0, run()))


# The training that goes on


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [(), ("conv.weight", "norm.weight", "norm.bias", "noisy.weight")])
def test_training_is_bit_identical_with_a_profiler(frozen, autocast):
    plain, _, expected = train(False, frozen=frozen, autocast=autocast)
    model, profiler, left = train(True, frozen=frozen, autocast=autocast)
    assert profiler.done
    assert profiler.estimated == {}
    assert len(left) == len(expected)
    assert all(equal(a, b) for a, b in zip(left, expected, strict=True))
    assert num_hooks(model) == num_hooks(plain) == 0
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert not torch.equal(model.state_dict()["head.weight"], seeded(Net).state_dict()["head.weight"])
    # frozen or not, every part was measured
    assert list(profiler.costs()) == ["conv", "noisy", "recurrent", "attention", "head"]
    for cost in profiler.costs().values():
        assert min(cost.forward, cost.input_gradient, cost.weight_gradient) > 0


def test_the_modules_attributes_are_the_same_objects():
    model = seeded(Net).train()
    layers = layers_of(model, torch.zeros(IMAGES))
    seen, weights = model.noisy.seen, dict(model.named_parameters())
    profiler = CostProfiler(model, layers)
    output = model(torch.randn(IMAGES))
    assert profiler.done
    assert model.noisy.seen is seen
    assert output["penalty"] is model.noisy.penalty
    assert all(weights[name] is parameter for name, parameter in model.named_parameters())
    assert all(a is b for a, b in zip(model.recurrent._flat_weights, model.recurrent.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_the_users_hooks_and_counters_see_one_pass():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    layers = layers_of(model, torch.zeros(3, 4))
    seen = []

    def run():
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
        with FlopCounterMode(display=False) as counter, hooks:
            model(torch.ones(3, 4)).sum().backward()
        return counter.get_total_flops(), len(saved), len(seen)

    for module in model:
        module.register_forward_hook(lambda *_: seen.append(1))
    plain = run()
    seen.clear()
    profiler = CostProfiler(model, layers)
    assert run() == plain
    assert profiler.done


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # while layers are traced
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))

        def forward(self, x):
            return checkpoint(self.inner, self.first(x), use_reentrant=reentrant)

    def gradients(profiled):
        model = seeded(Checkpointed)
        layers = layers_of(model, torch.zeros(3, 4))
        profiler = CostProfiler(model, layers) if profiled else None
        torch.manual_seed(1)
        model(torch.ones(3, 4)).sum().backward()
        return [p.grad for p in model.parameters()], profiler

    plain, (with_profiler, profiler) = gradients(False)[0], gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_profiler, strict=True))
    assert profiler.estimated == {}
    assert all(cost.weight_gradient > 0 for cost in profiler.costs().values())


def test_the_first_pass_in_training_mode_with_gradients_is_measured():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    profiler = CostProfiler(model, layers_of(model, torch.zeros(3, 4)))
    model.eval()(torch.ones(3, 4))
    with torch.no_grad():
        model.train()(torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(3, 5))
    assert not profiler.done
    with pytest.raises(
        UsageError, match=r"No forward pass has been measured yet\. Run the model once in training mode"
    ):
        profiler.costs()
    model(torch.ones(3, 4))
    assert profiler.done
    assert profiler.estimated == {}
    assert num_hooks(model) == 0


def test_close_removes_the_hooks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    profiler = CostProfiler(model, layers_of(model, torch.zeros(3, 4)))
    assert num_hooks(model) > 0
    profiler.close()
    assert num_hooks(model) == 0
    model(torch.ones(3, 4))
    assert not profiler.done


# What is measured


def test_an_embedding_has_no_input_gradient():
    tied = Tokens()
    costs = costs_of(tied, layers_of(tied, torch.zeros(2, 3, dtype=torch.int64)), torch.zeros(2, 3).long())
    assert list(costs) == ["embedding", "middle"]
    assert costs["embedding"].input_gradient > 0  # its weight is also the decoder's
    tied.decoder.weight = nn.Parameter(torch.zeros(11, 6))
    costs = costs_of(tied, layers_of(tied, torch.zeros(2, 3, dtype=torch.int64)), torch.zeros(2, 3).long())
    assert list(costs) == ["embedding", "middle", "decoder"]
    assert costs["embedding"].input_gradient == 0
    assert costs["embedding"].weight_gradient > 0


@pytest.mark.usefixtures("fake_time")
def test_all_modules_and_all_calls_of_a_layer_are_summed():
    model = seeded(Net)
    layers = layers_of(model, torch.zeros(IMAGES))
    costs = costs_of(model, layers, torch.randn(IMAGES))
    assert costs["conv"] == LayerCost(2, 2, 2)  # and its batch norm
    assert costs["noisy"] == LayerCost(2, 2, 2)  # called twice
    assert costs["attention"] == LayerCost(1, 1, 1)  # its projection is part of it
    assert costs["head"] == LayerCost(1, 1, 1)


def test_the_fastest_of_several_passes_counts(monkeypatch):
    times = iter([3.0, 2.0, 5.0, 1.0, 4.0, 5.0])
    monkeypatch.setattr(costs_module, "time_fastest", lambda run, repeats, cuda: (next(times), run()))
    model = nn.Linear(4, 2)
    profiler = CostProfiler(model, layers_of(model, torch.ones(3, 4)), passes=2)
    model(torch.ones(3, 4))
    assert not profiler.done
    model(torch.ones(3, 4))
    assert profiler.costs() == {"": LayerCost(1, 2, 5)}
    assert num_hooks(model) == 0


@pytest.mark.usefixtures("fake_time")
def test_a_norm_without_weights_counts():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    assert costs_of(model, layers_of(model, torch.zeros(IMAGES)), torch.ones(IMAGES)) == {"0": LayerCost(2, 2, 1)}


@pytest.mark.usefixtures("fake_time")
def test_the_root_may_be_the_only_layer():
    model = nn.Linear(4, 2)
    assert costs_of(model, layers_of(model, torch.ones(3, 4)), torch.ones(3, 4)) == {"": LayerCost(1, 1, 1)}


@pytest.mark.usefixtures("fake_time")
def test_a_computed_weight_is_its_modules():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    layers = layers_of(model, torch.ones(3, 4))
    profiler = CostProfiler(model, layers)
    model(torch.ones(3, 4))
    assert list(profiler.costs().values()) == [LayerCost(1, 1, 1)] * 2
    assert profiler.estimated == {}


@pytest.mark.usefixtures("fake_time")
def test_a_container_with_a_weight_of_its_own_is_not_run_again():
    class Container(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))
            self.position = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return super().forward(x + self.position)

    model = nn.Sequential(Container(), nn.Linear(2, 2))
    layers = layers_of(model, torch.ones(3, 4))
    assert layers[0].parameters == ("0.position", "0.0.weight", "0.0.bias")
    assert set(costs_of(model, layers, torch.ones(3, 4)).values()) == {LayerCost(1, 1, 1)}


def test_one_tensor_passed_twice_is_one_copy():
    class Same(nn.Linear):
        def forward(self, x, *, key):
            seen.append((x is key, x is inputs))
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Same(4, 4)

        def forward(self, x):
            return self.attention(x, key=x)

    seen, model, inputs = [], Model(), torch.ones(3, 4)
    layers = layers_of(model, inputs)
    seen.clear()
    costs_of(model, layers, inputs)
    assert seen[0] == (True, True)
    assert set(seen[1:]) == {(True, False)}


def test_one_gradient_at_a_time(monkeypatch):
    """Each of the three runs computes what it has to, and no more."""
    counted = []

    def count(run, repeats, cuda):
        with FlopCounterMode(display=False) as counter:
            result = run()
        counted.append(counter.get_total_flops())
        return 1.0, result

    monkeypatch.setattr(costs_module, "time_fastest", count)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(144, 2))
    layers = layers_of(model, torch.zeros(IMAGES))
    costs_of(model, layers, torch.ones(IMAGES))
    conv, linear = 2 * 4 * 36 * 4 * 27, 2 * 4 * 144 * 2
    assert counted == [conv] * 3 + [linear] * 3


def test_repeats_below_one():
    with pytest.raises(ValueError, match="repeats is 0 and passes is 1; expected 1 or more"):
        CostProfiler(nn.Linear(2, 2), [], repeats=0)


# What cannot be measured


@pytest.mark.usefixtures("fake_time")
def test_a_module_that_cannot_run_again_is_estimated():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Fragile(4, 8), nn.Linear(8, 2))
    layers = layers_of(model, torch.ones(3, 4))
    model[2].calls = 0
    profiler = CostProfiler(model, layers)
    model(torch.ones(3, 4)).sum().backward()
    assert model[2].calls == 1
    assert model[2].weight.grad is not None
    costs = profiler.costs()
    assert profiler.estimated == {"2": "RuntimeError: called twice"}
    assert costs["1"] == LayerCost(1, 1, 1)
    share = (4 * 8) / (4 * 4 + 4 * 4 + 8 * 2)
    assert costs["2"] == LayerCost(*[pytest.approx(3 * share)] * 3)


@pytest.mark.usefixtures("fake_time")
def test_foreign_tensors_are_not_touched():
    class Foreign(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    layers = layers_of(model, torch.ones(3, 4))
    model[1].weight = Foreign(model[1].weight.detach())
    profiler = CostProfiler(model, layers)
    model(torch.ones(3, 4))
    assert profiler.costs()["1"] == LayerCost(0.5, 0.5, 0.5)
    assert "tensors of type ['Foreign']" in profiler.estimated["1"]


@pytest.mark.usefixtures("fake_time")
def test_a_weight_that_a_hook_computes_is_estimated():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[1])
    layers = layers_of(model, torch.ones(3, 4))
    profiler = CostProfiler(model, layers)
    model(torch.ones(3, 4)).sum().backward()
    assert model[1].weight_g.grad is not None
    assert profiler.costs()["1"] == LayerCost(1, 1, 1)
    assert list(profiler.estimated) == ["1"]


def test_if_nothing_can_be_measured_costs_are_flops():
    model = nn.Sequential(Fragile(4, 4), Fragile(4, 2))
    layers = layers_of(model, torch.ones(3, 4))
    for module in model:
        module.calls = 0
    costs = costs_of(model, layers, torch.ones(3, 4))
    assert costs == {"0": LayerCost(96, 96, 96), "1": LayerCost(48, 48, 48)}


def test_a_layer_that_does_not_run_or_does_not_exist():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    layers = layers_of(model, torch.ones(3, 4))
    gone = Layer("gone", ("gone.weight",), ("gone.weight",), (), "gone", 0)
    profiler = CostProfiler(model, [*layers, gone])
    model(torch.ones(3, 4))
    assert profiler.costs()["gone"] == LayerCost(0, 0, 0)
    assert profiler.estimated == {"gone": "it did not run"}


# A whole step


def test_work_of_a_step():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False))
    inputs = torch.ones(5, 4)
    work = measure_step(model, lambda: model(inputs).mean())
    first, second = 2 * 5 * 4 * 6, 2 * 5 * 6 * 2
    assert work.forward_flops == first + second
    assert work.backward_flops == first + 2 * second  # the inputs need no gradient
    assert work.activation_bytes == 4 * (5 * 4 + 5 * 6)
    model[0].requires_grad_(False)
    work = measure_step(model, lambda: model(inputs).mean())
    assert (work.forward_flops, work.backward_flops, work.activation_bytes) == (first + second, second, 4 * 5 * 6)


def test_work_of_a_recurrent_step():
    model, inputs = nn.LSTM(5, 7), torch.randn(3, 2, 5)
    work = measure_step(model, lambda: model(inputs)[0].sum())
    assert work.forward_flops == 2 * 3 * 2 * 4 * 7 * (5 + 7)
    assert work.backward_flops == 2 * work.forward_flops


def test_costs_of_a_model_that_returns_nothing_and_of_one_whose_parts_are_called():
    class StoresItsLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            self.loss = self.b(self.a(x)).sum()

    for parts in False, True:
        model = StoresItsLoss()
        layers = trace_layers(model, torch.randn(2, 4))
        profiler = CostProfiler(model, layers)
        if parts:
            model.b(model.a(torch.randn(2, 4))).sum().backward()
            profiler.end_step()
        else:
            model(torch.randn(2, 4))
        assert profiler.done
        assert not profiler.estimated
        assert set(profiler.costs()) == {"a", "b"}
