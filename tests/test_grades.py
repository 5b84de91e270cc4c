"""GradES in real training of a small transformer, beside the rule computed on NumPy arrays."""

import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch_runs import mlp, seeded  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ, TorchAdapter, trace_layers  # noqa: E402
from smartfrz.baselines import FullTraining, GradES  # noqa: E402
from smartfrz.comparing.pytorch import kept_gradients  # noqa: E402
from smartfrz.errors import UnsupportedModelError  # noqa: E402

STEPS = 90
# Of each layer the matrices, in execution order
MATRICES = {
    "words": ["words.weight"],
    "blocks.0.self_attn": ["blocks.0.self_attn.in_proj_weight", "blocks.0.self_attn.out_proj.weight"],
    "blocks.0.linear1": ["blocks.0.linear1.weight"],
    "blocks.0.linear2": ["blocks.0.linear2.weight"],
    "blocks.1.self_attn": ["blocks.1.self_attn.in_proj_weight", "blocks.1.self_attn.out_proj.weight"],
    "blocks.1.linear1": ["blocks.1.linear1.weight"],
    "blocks.1.linear2": ["blocks.1.linear2.weight"],
    "head": ["head.weight"],
}


class Transformer(nn.Module):
    """Two blocks with dropout."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 16)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 24, 0.1, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(16, 3)

    def forward(self, words):
        return self.head(self.blocks(self.words(words)).mean(1))


class Run:
    """Sentences whose class is how many of their words are small; batch i is the same in every run."""

    def __init__(self, policy, seed=0, steps=STEPS, **options):
        self.model = seeded(Transformer, seed=seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 5e-3)
        self.freezer = SmartFRZ(self.model, self.optimizer, policy, total_steps=steps, **options)
        self.losses, self.gradients = [], []

    def run(self, start, end):
        for step in range(start, end):
            torch.manual_seed(step)
            words = torch.randint(12, (24, 6))
            loss = cross_entropy(self.model(words), (words < 6).sum(1) // 3)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.losses.append(loss.item())
            named = self.model.named_parameters()
            self.gradients.append({n: p.grad.numpy().astype(np.float64) for n, p in named if p.grad is not None})
            self.gradients[-1] = {name: gradient.copy() for name, gradient in self.gradients[-1].items()}
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.freezer.step()
        return self

    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "freezer": self.freezer}


def norms_of_changes(gradients):
    """For each step and matrix the norm of its gradient less the one before, on NumPy arrays; none at the first step."""
    changes = [{}]
    for before, now in itertools.pairwise(gradients):
        changes.append({name: float(np.abs(now[name] - before[name]).sum()) for name in now})
    return changes


def frozen_by_the_rule(gradients, tau, alpha, every):
    """When each layer freezes: at the first stage at which all its matrices were below tau since the last stage."""
    changes, frozen = norms_of_changes(gradients), {}
    for end in range(every, len(changes) + 1, every):
        active = [layer for layer in MATRICES if layer not in frozen]
        if end < int(alpha * len(changes)) or len(active) == 1:
            continue
        ready = [
            layer
            for layer in active
            if all(any(c.get(m, math.inf) < tau for c in changes[end - every : end]) for m in MATRICES[layer])
        ]
        frozen |= dict.fromkeys(ready[:-1] if ready == active else ready, end)
    return frozen


@pytest.mark.parametrize(("tau", "alpha", "every"), [(1.2, 0.5, 3), (0.8, 0.1, 1), (0.6, 0.3, 9)])
def test_a_transformer_freezes_when_the_norms_of_changes_computed_apart_say_so(tau, alpha, every):
    options = {} if every == 3 else {"record_every": every}
    run = Run(GradES(tau, alpha=alpha), **options).run(0, STEPS)
    assert run.freezer.layers == list(MATRICES)
    # The gradients are those of this very run: where a layer is frozen it has none.
    expected = frozen_by_the_rule(run.gradients, tau, alpha, every)
    assert run.freezer.report().frozen == expected
    assert len(expected) > 2, "the case shall freeze several layers"
    assert len(set(expected.values())) > 1, "the case shall freeze at several stages"
    assert min(expected.values()) >= alpha * STEPS
    for layer, matrices in MATRICES.items():
        last = max(step for step, gradients in enumerate(run.gradients, 1) if matrices[0] in gradients)
        assert last == expected.get(layer, STEPS)


def test_the_changes_themselves_are_those_computed_apart():
    run = Run(FullTraining()).run(0, 1)
    adapter, layers = run.freezer.adapter, list(MATRICES)
    assert set(adapter.gradient_changes(layers).values()) == {math.inf}  # measured from now on
    for start, end in ((1, 3), (3, 10)):
        run.run(start, end)
        read, changes = adapter.gradient_changes(layers), norms_of_changes(run.gradients)[max(2, start) : end]
        for layer, matrices in MATRICES.items():
            assert read[layer] == pytest.approx(max(min(c[m] for c in changes) for m in matrices), rel=1e-5)
    assert set(adapter.gradient_changes(layers).values()) == {math.inf}, "no step since the last call"


@pytest.mark.parametrize("stop", [0, 1, 44, 47, 70])
@pytest.mark.parametrize("policy", [GradES(1.2), GradES(0.3, alpha=0.3, relative=True)])
def test_a_transformer_stopped_and_resumed_is_bit_for_bit_the_one_that_went_on(policy, stop, tmp_path):
    whole = Run(policy).run(0, STEPS)
    frozen = whole.freezer.report().frozen
    assert len(set(frozen.values())) > 1
    first = Run(policy).run(0, stop)
    torch.save({name: part.state_dict() for name, part in first.parts().items()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = Run(policy, seed=9)
    for name, part in second.parts().items():
        part.load_state_dict(saved[name])
    second.run(stop, STEPS)
    assert second.losses == whole.losses[stop:]
    assert repr(second.freezer.events) == repr(whole.freezer.events)
    final = second.model.state_dict()
    assert all(torch.equal(value, final[name]) for name, value in whole.model.state_dict().items())


def test_a_dry_run_says_when_and_trains_all():
    plain, dry = Run(FullTraining()).run(0, STEPS), Run(GradES(1.2), dry_run=True).run(0, STEPS)
    assert dry.losses == plain.losses
    assert dry.freezer.report().frozen == frozen_by_the_rule(plain.gradients, 1.2, 0.5, 3)
    assert {event.action for event in dry.freezer.events} == {"keep", "would_freeze"}


def test_what_it_keeps_is_a_copy_of_the_gradients_that_goes_with_the_layers():
    run = Run(GradES(1.2)).run(0, 5)
    size = sum(p.numel() * p.element_size() for p in run.model.parameters())
    assert sum(g.numel() * g.element_size() for g in kept_gradients(run.freezer)) == size
    run.run(5, STEPS)
    frozen = {p for layer in run.freezer.report().frozen for p in run.freezer.adapter._trainable[layer]}
    left = sum(p.numel() * p.element_size() for p in run.model.parameters() if p not in frozen)
    assert sum(g.numel() * g.element_size() for g in kept_gradients(run.freezer)) == left < size
    run.freezer.close()
    assert kept_gradients(run.freezer) == []


def test_a_thawed_layer_is_compared_from_its_second_step_on():
    run = Run(GradES(1e9, alpha=0), record_every=1).run(0, 2)
    assert run.freezer.report().frozen == dict.fromkeys(list(MATRICES)[:-1], 2)  # the first step has no change
    run.freezer.thaw(["words", "blocks.0.linear1"])
    run.run(2, 3)
    assert {"words", "blocks.0.linear1"}.isdisjoint(run.freezer.report().frozen)
    run.run(3, 4)
    assert run.freezer.report().frozen["words"] == 4


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_scaler_gradients_count_unscaled_and_steps_that_overflow_not_at_all(fused):
    read = []
    for scaled in (False, True):
        model = mlp(4, 8, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, fused=fused)
        adapter = TorchAdapter(model, [optimizer], trace_layers(model, torch.ones(2, 4)))
        adapter.gradient_changes(["0", "2"])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled)
        for step in range(6):
            if step in (0, 3) and not scaled:
                continue  # these overflow, and are skipped
            optimizer.zero_grad()
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = model(inputs).square().mean() * (math.inf if step in (0, 3) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        read.append(list(adapter.gradient_changes(["0", "2"]).values()))
    np.testing.assert_allclose(*read, rtol=1e-4)
    assert np.isfinite(read).all()


def test_gradients_in_half_precision_are_compared_in_float32():
    model = mlp(4, 8, 3).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    adapter = TorchAdapter(model, [optimizer], trace_layers(model, torch.ones(2, 4, dtype=torch.bfloat16)))
    adapter.gradient_changes(["0"])
    for value in (256.0, 1.0):  # their difference, 255, is one that bfloat16 holds, 32 times that is not
        model[0].weight.grad = torch.full_like(model[0].weight, value)
        optimizer.step()
    assert adapter.gradient_changes(["0"]) == {"0": 32 * 255.0}
    assert {g.dtype for g in adapter.gradient_change_state()["latest"].values()} == {torch.bfloat16}


def test_sparse_gradients_of_an_embedding():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    adapter = TorchAdapter(model, [optimizer], trace_layers(model, torch.tensor([0, 1])))
    adapter.gradient_changes(["0"])
    expected = []
    for words in ([0, 1], [1, 4]):
        optimizer.zero_grad()
        model(torch.tensor(words)).square().sum().backward()
        expected.append(model[0].weight.grad.to_dense().numpy().copy())
        optimizer.step()
    assert adapter.gradient_changes(["0"])["0"] == pytest.approx(np.abs(expected[1] - expected[0]).sum(), rel=1e-5)


def test_a_run_of_unknown_length_is_refused_at_once():
    model = mlp(4, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"Pass total_steps=len\(loader\) \* epochs, or GradES\(alpha=0\)"):
        SmartFRZ(model, optimizer, GradES(1.0), record_every=5)


def test_an_adapter_without_gradients_says_what_is_missing():
    class NoGradients(TorchAdapter):
        gradient_changes = property()

    from smartfrz.control.controller import FreezeController
    from smartfrz.control.options import FreezeOptions

    model = mlp(4, 8, 3)
    adapter = NoGradients(model, [], trace_layers(model, torch.ones(2, 4)))
    with pytest.raises(UnsupportedModelError, match="'grades' needs an adapter with the method `gradient_changes`"):
        FreezeController(adapter, GradES(1.0), FreezeOptions(total_steps=9))
