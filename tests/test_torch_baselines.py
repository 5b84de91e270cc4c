"""Baselines in real training: learning rates of single layers, gradient norms, and whole runs on digits."""

import copy
import math
from collections import defaultdict

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch_runs import NET, Net, batch, loss_of, mlp, values  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ, TorchAdapter, trace_layers  # noqa: E402
from smartfrz.adapters.torch.optimizer_steps import OptimizerSteps  # noqa: E402
from smartfrz.baselines import AutoFreeze, FullTraining, GradES, LinearFreezing, WeightChange  # noqa: E402
from smartfrz.baselines.similarity_guided import SimilarityGuided  # noqa: E402
from smartfrz.dataset_builder.cka import centered_gram, cka_of_grams  # noqa: E402
from smartfrz.dataset_builder.labels import LabelRule  # noqa: E402
from smartfrz.errors import StateError, UnsupportedModelError, UsageError  # noqa: E402

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "a rate that is a tensor": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, lr_decay=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05, lambd=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}
SCALES = {"conv1": 0.3, "conv2": 0.0, "head": 1.7}
DIGIT_LAYERS = ["0", "2", "4", "6", "9"]
STEPS = 120


def adapter_of(model, *optimizers):
    layers = trace_layers(copy.deepcopy(model).eval(), batch(0)[0])
    return TorchAdapter(model, optimizers, layers)


def parameters_of(model, layer):
    """Of a layer of `Net`, with its batch norm."""
    modules = [getattr(model, layer), *([getattr(model, layer.replace("conv", "norm"))] if "conv" in layer else [])]
    return [parameter for module in modules for parameter in module.parameters()]


def one_step(model, optimizer, step):
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


# Learning rates of single layers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_rate_is_bit_for_bit_that_of_a_parameter_group_of_its_own(name):
    ours, reference = Net(), Net()
    optimizer = OPTIMIZERS[name]([{"params": list(ours.parameters())}])
    separate = OPTIMIZERS[name]([{"params": parameters_of(reference, layer)} for layer in NET])
    decay = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (optimizer, separate)]
    adapter, groups = adapter_of(ours, optimizer), optimizer.param_groups
    rate = float(groups[0]["lr"])
    for step in range(8):
        for index, (layer, scale) in enumerate(SCALES.items()):
            factor = scale if step < 4 else 1.0 / (index + step)  # as in training, they change
            adapter.set_lr_scale(layer, factor)
            separate.param_groups[index]["lr"] = decay[1].get_last_lr()[index] * factor
        rates = decay[1].get_last_lr()
        one_step(ours, optimizer, step)
        one_step(reference, separate, step)
        for group, unscaled in zip(separate.param_groups, rates, strict=True):
            group["lr"] = unscaled
        for scheduler in decay:
            scheduler.step()
        assert optimizer.param_groups is groups
    assert len(groups) == 1
    assert float(groups[0]["lr"]) == pytest.approx(0.8**8 * rate)
    theirs = reference.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())
    for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
        assert optimizer.state[mine].keys() == separate.state[other].keys()
        for key, value in optimizer.state[mine].items():
            torch.testing.assert_close(value, separate.state[other][key], rtol=0, atol=0)


def test_at_zero_weights_stand_still_and_momentum_goes_on():
    model = Net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    adapter = adapter_of(model, optimizer)
    adapter.set_lr_scale("conv2", 0.0)
    one_step(model, optimizer, 0)
    weight, momentum = (
        model.conv2.weight.detach().clone(),
        optimizer.state[model.conv2.weight]["momentum_buffer"].clone(),
    )
    one_step(model, optimizer, 1)
    assert torch.equal(model.conv2.weight, weight)
    assert not torch.equal(optimizer.state[model.conv2.weight]["momentum_buffer"], momentum)


def test_groups_of_the_user_keep_their_own_settings():
    ours, reference = Net(), Net()

    def groups(model):
        decayed = [p for p in model.parameters() if p.dim() > 1]
        return [{"params": decayed, "weight_decay": 0.2}, {"params": [p for p in model.parameters() if p.dim() < 2]}]

    optimizer = torch.optim.SGD(groups(ours), 0.05, momentum=0.9)
    twin = torch.optim.SGD(groups(reference), 0.05 * 0.25, momentum=0.9)
    adapter = adapter_of(ours, optimizer)
    for layer in NET:
        adapter.set_lr_scale(layer, 0.25)
    for step in range(3):
        one_step(ours, optimizer, step)
        one_step(reference, twin, step)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), reference.parameters(), strict=True))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0]


def test_a_frozen_layer_starts_anew_and_a_closed_one_too():
    model = Net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    steps = OptimizerSteps([optimizer])
    first = adapter_of(model, optimizer)
    adapter = TorchAdapter(model, [optimizer], first._layers.values(), steps=steps)
    adapter.set_lr_scale("conv1", 0.0)
    adapter.set_lr_scale("conv2", 0.0)
    adapter.freeze(["conv1"])
    adapter.unfreeze(["conv1"])
    before = values(model)
    one_step(model, optimizer, 0)
    assert not torch.equal(model.conv1.weight, before["conv1.weight"])
    assert torch.equal(model.conv2.weight, before["conv2.weight"])
    steps.close()
    one_step(model, optimizer, 1)
    assert not torch.equal(model.conv2.weight, before["conv2.weight"])
    for closed in (first, adapter):
        closed.forget_marks()  # as SmartFRZ.close does; adapters look at the steps, too
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    assert [len(of_kind) for of_kind in hooks] == [0, 0]


class Interrupted(torch.optim.SGD):
    """Raises in the middle of its step, when told to."""

    interrupt = False

    def step(self, closure=None):
        if self.interrupt:
            raise KeyboardInterrupt
        return super().step(closure)


def test_a_step_that_raises_leaves_a_checkpoint_as_it_should_be_and_a_step_inside_of_a_step_scales_once():
    ours, reference = Net(), Net()
    optimizer, plain = Interrupted(ours.parameters(), 0.05), torch.optim.SGD(reference.parameters(), 0.025)
    adapter = adapter_of(ours, optimizer)
    for layer in NET:
        adapter.set_lr_scale(layer, 0.5)
    for step in range(2):
        one_step(ours, optimizer, step)  # SGD.step inside of Interrupted.step: both have hooks
        one_step(reference, plain, step)
    optimizer.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        one_step(ours, optimizer, 2)
    saved = optimizer.state_dict()
    assert [len(group["params"]) for group in saved["param_groups"]] == [len(list(ours.parameters()))]
    assert saved["param_groups"][0]["lr"] == 0.05
    optimizer.interrupt = False
    for step in range(2, 4):
        one_step(ours, optimizer, step)
        one_step(reference, plain, step)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), reference.parameters(), strict=True))


class Wrapping(torch.optim.Optimizer):
    """Steps with an optimizer of its own, whose groups are others: no rate of ours reaches it."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, {"lr": 0.1})
        self.inner = torch.optim.SGD(parameters, 0.1)

    def step(self, closure=None):
        self.inner.step()


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as some optimizers that need no schedule do."""

    def _init_group(self, group, *lists):
        group["k"] = group.get("k", 0) + 1
        return super()._init_group(group, *lists)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Counting(p, 0.1), r"Counting took a step .*or wrote to them; .*Pass the optimizer inside of it"),
        (Wrapping, r"Wrapping took a step without reading the learning rate of each .*anneal=False"),
        (lambda p: torch.optim.LBFGS(p, max_iter=1), r"LBFGS takes one step for all parameters .*anneal=False"),
    ],
)
def test_an_optimizer_that_does_not_heed_the_rates_of_its_groups_is_refused(make, message):
    model = Net()
    optimizer = make(model.parameters())
    adapter, groups = adapter_of(model, optimizer), optimizer.param_groups
    one_step_with_closure(model, optimizer)  # nothing is scaled yet
    adapter.set_lr_scale("conv2", 0.5)
    with pytest.raises(UsageError, match=message):
        one_step_with_closure(model, optimizer)
    assert optimizer.param_groups is groups


def one_step_with_closure(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf])
def test_a_scale_out_of_range(scale):
    model = Net()
    with pytest.raises(ValueError, match=r"`scale` of layer 'conv1' is .*; expected a finite number of at least 0"):
        adapter_of(model, OPTIMIZERS["adam"](model.parameters())).set_lr_scale("conv1", scale)


# Gradient norms


def test_gradient_norms_are_those_of_gradients_added_up_by_hand():
    model = Net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    adapter = adapter_of(model, optimizer)
    adapter.gradient_norm("conv1")  # from now on
    sums = defaultdict(float)
    for step in range(6):
        optimizer.zero_grad()
        for part in range(2):  # two batches a step: they count as one gradient
            (0.5 * loss_of(model, 2 * step + part)).backward()
        for layer in NET:
            for index, parameter in enumerate(parameters_of(model, layer)):
                sums[layer, index] = sums[layer, index] + parameter.grad.double()
        optimizer.step()
        optimizer.zero_grad()  # before anybody reads the norm
        if step % 3 == 2:
            for layer in NET:
                expected = sum(float(sums.pop(key).abs().sum()) for key in list(sums) if key[0] == layer)
                assert adapter.gradient_norm(layer) == pytest.approx(expected, rel=1e-5)
    assert [adapter.gradient_norm(layer) for layer in NET] == [0.0] * 3


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_under_a_scaler_count_unscaled_and_those_that_overflow_not_at_all(fused):
    norms = []
    for scaled in (False, True):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=fused)
        adapter = adapter_of(model, optimizer)
        adapter.gradient_norm("conv1")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled)
        for step in range(4):
            optimizer.zero_grad()
            loss = loss_of(model, step) * (math.inf if step == 2 and scaled else 1.0)
            scaler.scale(loss).backward()
            if step != 2 or scaled:
                scaler.step(optimizer)
                scaler.update()
        norms.append([adapter.gradient_norm(layer) for layer in NET])
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_gradients_in_half_precision_are_added_up_in_float32():
    model = mlp(4, 8, 3).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    adapter = TorchAdapter(model, [optimizer], trace_layers(model, torch.ones(2, 4, dtype=torch.bfloat16)))
    adapter.gradient_norm("0")
    for _ in range(1000):  # 1 + 1 + ... stops at 256 in bfloat16
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.step()
    assert adapter.gradient_norm("0") == 32_000.0
    assert all(gradient.dtype == torch.float32 for gradient in adapter.gradient_state().values())


# Whole runs on scikit-learn's digits


def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:1200, None] / 8 - 1, torch.tensor(data.target)[:1200]


def network(seed=0, norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            *(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8) if norm else nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32, 10)),
        ]
        return nn.Sequential(*layers)


class Run:
    """Batch i is the same in every run; 30 steps are an epoch."""

    def __init__(self, policy, seed=0, norm=True, optimizer=None, **options):
        self.images, self.targets = digits()
        self.model = network(seed, norm)
        make = optimizer or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3))
        self.optimizer = make(self.model.parameters())
        if callable(policy):
            policy = policy(self)
        self.freezer = None
        if policy is not None:
            self.freezer = SmartFRZ(self.model, self.optimizer, policy, **{"total_steps": STEPS} | options)
        self.losses = []

    def forward_backward(self, step):
        self.model.train()
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(step))[:32]
        loss = cross_entropy(self.model(self.images[chosen]), self.targets[chosen])
        loss.backward()
        self.losses.append(loss.item())

    def run(self, start, end):
        for step in range(start, end):
            self.forward_backward(step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.freezer is not None:
                self.freezer.step()
        return self

    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "freezer": self.freezer}


def oracle(run, **options):
    reference = Run(None, seed=0).run(0, STEPS).model
    return SimilarityGuided(run.model, reference, digits()[0][:64], **options)


POLICIES = {
    "full": lambda run: FullTraining(),
    "linear": lambda run: LinearFreezing(0.3, scale_lr=True),
    "autofreeze": lambda run: AutoFreeze(epochs=4),
    "grades": lambda run: GradES(2.0, alpha=0.2),
    "grades relative": lambda run: GradES(0.7, alpha=0.2, relative=True),
    "weight change": lambda run: WeightChange(limit=0.2, tailored_size=64),
    "oracle": lambda run: oracle(run),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_real_run_and_the_same_run_stopped_and_resumed(name, tmp_path):
    whole = Run(POLICIES[name]).run(0, STEPS)
    report = whole.freezer.report()
    assert bool(report.frozen) == (name != "full"), "the case shall freeze something"
    assert np.isfinite(whole.losses).all()
    assert np.mean(whole.losses[-20:]) < 0.4 * np.mean(whole.losses[:20])
    assert len(report.frozen) < len(DIGIT_LAYERS)
    for layer in DIGIT_LAYERS:
        trained = [p.requires_grad for p in whole.model.get_submodule(layer).parameters()]
        assert trained == [layer not in report.frozen] * 2
        known = [p in whole.optimizer.state for p in whole.model.get_submodule(layer).parameters()]
        assert known == trained
    assert len(whole.optimizer.param_groups) == 1
    assert whole.optimizer.param_groups[0]["lr"] == 0.1
    assert 0.0 < report.decision_seconds < report.seconds

    stops = [0, 1, 37, 60, 95]
    for stop in stops:  # 37 lies within an interval of AutoFreeze, and after its first evaluations
        first = Run(POLICIES[name]).run(0, stop)
        path = tmp_path / f"{stop}.pt"
        torch.save({key: part.state_dict() for key, part in first.parts().items()}, path)
        saved = torch.load(path, weights_only=True)
        second = Run(POLICIES[name], seed=99)
        for key, part in second.parts().items():
            part.load_state_dict(saved[key])
        second.run(stop, STEPS)
        assert second.losses == whole.losses[stop:]
        assert repr(second.freezer.events) == repr(whole.freezer.events)  # repr: NaN differs from itself
        final = second.model.state_dict()
        assert all(torch.equal(value, final[key]) for key, value in whole.model.state_dict().items())


def frozen_by_hand(model, optimizer, layers):
    for layer in layers:
        for parameter in model.get_submodule(layer).parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
            optimizer.state.pop(parameter, None)


@pytest.mark.parametrize("scale_lr", [False, True])
@pytest.mark.parametrize("spacing", ["linear", "cubic"])
def test_linear_freezing_trains_as_freezeout_with_a_group_for_each_layer(spacing, scale_lr):
    t_0 = 0.4 if spacing == "linear" else 0.75
    ours = Run(LinearFreezing(t_0, spacing=spacing, scale_lr=scale_lr), norm=False, record_every=1).run(0, STEPS)

    theirs = Run(None, norm=False)
    modules = [theirs.model.get_submodule(layer) for layer in DIGIT_LAYERS]
    theirs.optimizer = torch.optim.SGD(
        [{"params": list(module.parameters())} for module in modules], 0.1, momentum=0.9, weight_decay=1e-3
    )
    ends = [t_0 + (1 - t_0) * index / 4 for index in range(5)]
    ends = ends if spacing == "linear" else [end * end * end for end in ends]
    for step in range(STEPS):
        for layer, group, end in zip(DIGIT_LAYERS, theirs.optimizer.param_groups, ends, strict=True):
            if step / STEPS >= end:
                frozen_by_hand(theirs.model, theirs.optimizer, [layer])
            start = 1 / end if scale_lr else 1
            group["lr"] = 0.1 * (start * 0.5 * (1 + math.cos(math.pi * step / STEPS / end)))
        theirs.run(step, step + 1)
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        # Their factors and ours are rounded once each.
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert [ours.freezer.report().frozen[layer] for layer in DIGIT_LAYERS[:-1]] == [
        next(step for step in range(1, STEPS + 1) if step / STEPS >= end) for end in ends[:-1]
    ]


def test_autofreeze_trains_bit_for_bit_as_the_authors_rule_does():
    ours = Run(AutoFreeze(steps_per_epoch=30), norm=False).run(0, STEPS)
    every, start, previous, frozen_at = round(30 / 4), 0, None, {}
    theirs = Run(None, norm=False)
    sums = defaultdict(float)
    for step in range(STEPS):
        theirs.forward_backward(step)
        for name, parameter in theirs.model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums[name] + parameter.grad
        theirs.optimizer.step()
        theirs.optimizer.zero_grad()
        if (step + 1) % every:
            continue
        norms = dict.fromkeys(DIGIT_LAYERS, 0.0)
        for name, gradient in sums.items():
            norms[name.split(".")[0]] += torch.norm(gradient, p=1).item()
        sums.clear()
        active = DIGIT_LAYERS[start:]
        if previous is not None and len(active) > 1:
            ratios = {layer: abs(previous[layer] - norms[layer]) / previous[layer] for layer in active}
            limit = np.percentile(list(ratios.values()), 50)
            first = next(layer for layer in active if ratios[layer] >= limit)
            chosen = DIGIT_LAYERS[start : DIGIT_LAYERS.index(first)]
            frozen_by_hand(theirs.model, theirs.optimizer, chosen)
            frozen_at |= dict.fromkeys(chosen, step + 1)
            start = DIGIT_LAYERS.index(first)
        previous = norms
    assert ours.freezer.report().frozen == frozen_at != {}
    assert ours.losses == theirs.losses
    final = theirs.model.state_dict()
    assert all(torch.equal(value, final[key]) for key, value in ours.model.state_dict().items())


def test_full_training_is_training_without_a_freezer():
    ours, plain = Run(FullTraining()).run(0, 60), Run(None).run(0, 60)
    assert ours.losses == plain.losses
    assert len(ours.freezer.events) == 15 * len(DIGIT_LAYERS)


def test_a_closed_freezer_gives_learning_rates_back():
    run = Run(LinearFreezing(1.0)).run(0, 110)
    run.freezer.close()
    before, twin = values(run.model), copy.deepcopy(run.model)
    other = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    other.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.forward_backward(110)
    run.optimizer.step()
    for mine, copied in zip(run.model.parameters(), twin.parameters(), strict=True):
        copied.grad = mine.grad.clone()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), twin.parameters(), strict=True))
    assert not torch.equal(run.model[0].weight, before["0.weight"])


def test_going_back_to_an_earlier_state_sets_learning_rates_and_gradients_back():
    for make in (POLICIES["linear"], POLICIES["autofreeze"], POLICIES["grades"]):
        run = Run(make).run(0, 20)
        saved = copy.deepcopy({key: part.state_dict() for key, part in run.parts().items()})
        run.run(20, 100)
        losses = run.losses[20:]
        for key, part in run.parts().items():
            part.load_state_dict(saved[key])
        run.run(20, 100)
        assert run.losses[100:] == losses


def test_a_refused_state_changes_neither_rates_nor_gradients():
    for make in (POLICIES["linear"], POLICIES["autofreeze"], POLICIES["grades"]):
        alone = Run(make).run(0, STEPS)
        run, other = Run(make).run(0, 47), Run(POLICIES["full"]).run(0, 5)
        with pytest.raises(StateError, match="policy with the same settings"):
            run.freezer.load_state_dict(other.freezer.state_dict())
        run.run(47, STEPS)
        assert run.losses == alone.losses


# The rule of the heuristic, and the oracle


def test_the_heuristic_is_the_one_that_predictors_are_judged_beside():
    pytest.importorskip("sklearn")
    from smartfrz.predictor.training.baselines import score_weight_change
    from smartfrz.predictor.training.runs import LabelledRun, TrainingOptions

    weights = np.random.default_rng(0).normal(size=(3, 12, 16)).astype(np.float32).cumsum(axis=1)
    run = LabelledRun("run", "net", weights, np.zeros((3, 12), np.int8))
    scores = score_weight_change([run], TrainingOptions())[0]
    limit = 0.3
    policy = WeightChange(limit=limit, tailored_size=16)
    for timestamp in range(3, 12):
        window = weights[:, timestamp - 3 : timestamp + 1]
        confidence = policy.predict(window, np.full(3, 4))[0][:, 1]
        np.testing.assert_allclose(confidence, limit / (limit + 10.0 ** -scores[:, timestamp]), rtol=1e-5)


def test_the_oracle_freezes_when_similarity_to_the_reference_has_settled():
    whole = Run(oracle)
    reference = Run(None, seed=0).run(0, STEPS).model
    probe = digits()[0][:64]

    def outputs(model):
        """Of each layer, its batch norm included, with the statistics of the probe."""
        twin, kept = copy.deepcopy(model), {}
        twin.train()
        for layer in DIGIT_LAYERS:
            module = twin.get_submodule("7" if layer == "6" else layer)
            # What the live model has frozen keeps its running statistics.
            module.register_forward_hook(lambda m, a, o, layer=layer: kept.update({layer: o.detach().clone().numpy()}))
        with torch.no_grad():
            twin(probe)
        return kept

    finished, curves, expected = outputs(reference), {layer: [] for layer in DIGIT_LAYERS}, {}
    for step in range(1, STEPS + 1):
        whole.forward_backward(step - 1)
        whole.optimizer.step()
        whole.optimizer.zero_grad()
        if step % 4 == 0 and len(expected) < len(DIGIT_LAYERS) - 1:
            live = outputs(whole.model)
            active = [layer for layer in DIGIT_LAYERS if layer not in expected]
            settled = []
            for layer in active:
                curves[layer].append(cka_of_grams(centered_gram(finished[layer]), centered_gram(live[layer])))
                last = curves[layer][-3:]
                if len(last) == 3 and max(abs(value - last[-1]) for value in last) <= 0.02:
                    settled.append(layer)
            if len(settled) == len(active):
                settled.pop()
            expected |= dict.fromkeys(settled, step)
        whole.freezer.step()
        assert whole.freezer.report().frozen == expected, f"after step {step}"
    assert len(set(expected.values())) > 1, "the case shall freeze at several stages"


def test_the_oracle_looks_without_touching():
    never = LabelRule("backward", tolerance=1e-9, records=3)
    watched, plain = Run(lambda run: oracle(run, rule=never)).run(0, 60), Run(None).run(0, 60)
    assert watched.losses == plain.losses
    final = plain.model.state_dict()
    assert all(torch.equal(value, final[key]) for key, value in watched.model.state_dict().items())
    reference = network().train()
    reference[7].eval()
    before, modes = values(reference), [module.training for module in reference.modules()]
    SimilarityGuided(watched.model, reference, digits()[0][:8])
    assert [module.training for module in reference.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in reference.state_dict().items())


def test_a_state_goes_on_with_the_same_reference_and_probe_only():
    model, probe = network(), digits()[0][:8]
    same = [SimilarityGuided(model, network(1), probe).sha256 for _ in range(2)]
    others = [
        SimilarityGuided(model, network(2), probe).sha256,
        SimilarityGuided(model, network(1), digits()[0][8:16]).sha256,
        SimilarityGuided(model, network(1), probe, rule=LabelRule("backward", 0.03, 3)).sha256,
    ]
    assert same[0] == same[1]
    assert len({*same, *others}) == 4


def test_what_the_oracle_refuses():
    model = network()
    with pytest.raises(ValueError, match=r"`rule` is of kind 'forward', which looks ahead .* expected 'backward'"):
        SimilarityGuided(model, network(1), digits()[0][:8], rule=LabelRule())
    with pytest.raises(ValueError, match="compares at least 4 examples"):
        SimilarityGuided(model, network(1), digits()[0][:3])
    other = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Flatten(), nn.Linear(384, 10))
    run = Run(lambda run: SimilarityGuided(run.model, other, digits()[0][:8]))
    with pytest.raises(UnsupportedModelError, match=r"layers that the reference does not have: \['4', '6', '9'\]"):
        run.run(0, 1)


def test_a_state_from_before_there_were_policies_is_read():
    predictor = WeightChange(limit=0.2, tailored_size=64)  # judges histories, as predictors do
    whole, first, second = Run(predictor).run(0, STEPS), Run(predictor).run(0, 50), Run(predictor, seed=5)
    for key, part in second.parts().items():
        state = copy.deepcopy(first.parts()[key].state_dict())
        if key == "freezer":
            assert state.pop("gradients") == {}
        part.load_state_dict(state)
    assert second.run(50, STEPS).losses == whole.losses[50:]
