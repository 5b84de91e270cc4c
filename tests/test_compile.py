"""torch.compile: what SmartFRZ costs it, and that it never loses it. The backend is `aot_eager`, for speed."""

import gc
import threading

import pytest
from numpy_adapter import ScriptedPredictor

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._higher_order_ops.map import map as map_rows  # noqa: E402
from torch._higher_order_ops.scan import scan  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402
from smartfrz.adapters.torch.compiling import EagerHold, EagerOperators  # noqa: E402
from smartfrz.baselines import AutoFreeze, GradES, LinearFreezing  # noqa: E402
from smartfrz.control.options import COMPILED_STAGES  # noqa: E402

DEPTH = 16
NAMES = [f"blocks.{i}.conv" for i in range(DEPTH)] + ["head"]


@pytest.fixture(autouse=True)
def _nobody_holds_the_compiler():
    """A freezer of another test that never began, and waits for the garbage collector, would have all run eagerly."""
    gc.collect()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    def __init__(self, depth=DEPTH):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.head = nn.Linear(2, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def fresh_compiler():
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def compiled_before(model, backend):
    return torch.compile(model, backend=backend)


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


def compiled_function(model, backend):
    return torch.compile(lambda x: model(x), backend=backend)


def train(model, run, freezer, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        model.train()
        loss = run(torch.randn(4, 2, 5, 5, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if freezer is not None:
            freezer.step()


def setup(script, compiler=compiled_before, depth=DEPTH, late=False, **options):
    model = Net(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    backend = CompileCounterWithBackend("aot_eager")
    # `total_steps` only says how many stages there will be: four, so that they are not grouped
    settings = {"record_every": 1, "decide_every": 2, "patience": 1, "total_steps": 8} | options
    settings["predictor"] = ScriptedPredictor(script)
    if late:
        freezer = SmartFRZ(model, optimizer, **settings)
        return model, compiler(model, backend), freezer, optimizer, backend
    run = compiler(model, backend)
    return model, run, SmartFRZ(model, optimizer, **settings), optimizer, backend


def stages(per_stage, num_stages, names=NAMES):
    """A script that freezes the next `per_stage` layers at each stage."""
    left, script = list(names), []
    for _ in range(num_stages):
        script.append({name: 0.9 if index < per_stage else 0.1 for index, name in enumerate(left)})
        left = left[per_stage:]
    return script


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("compiler", [compiled_before, compiled_in_place, compiled_function])
def test_tracing_does_not_make_the_compiler_give_up(compiler, late):
    model, run, freezer, optimizer, backend = setup([], compiler, late=late)
    train(model, run, freezer, optimizer, 4)
    assert freezer.layers == NAMES
    assert backend.frame_count == 1
    assert freezer.report().num_compilations >= 1


def test_a_freezing_stage_costs_one_compilation_however_many_layers_it_freezes():
    model, run, freezer, optimizer, backend = setup([dict.fromkeys(NAMES, 0.1), *stages(7, 1)])
    train(model, run, freezer, optimizer, 3)
    before = backend.frame_count
    train(model, run, freezer, optimizer, 6, start=3)
    for _ in range(2):  # model.train() and eval() as at the ends of epochs
        model.eval()
        model.train()
        train(model, run, freezer, optimizer, 2, start=20)
    assert len(freezer.frozen_layers) == 7
    assert backend.frame_count == before + 1
    report = freezer.report()
    assert report.num_recompilations >= 1
    assert report.recompile_seconds > 0
    assert "after layers froze" in str(report)


def test_frozen_layers_stay_bit_identical_under_the_compiler():
    model, run, freezer, optimizer, _ = setup(stages(5, 1))
    train(model, run, freezer, optimizer, 2)
    assert len(freezer.frozen_layers) == 5
    before = {name: value.clone() for name, value in model.blocks[:5].state_dict().items()}
    train(model, run, freezer, optimizer, 5, start=2)
    assert all(torch.equal(before[name], value) for name, value in model.blocks[:5].state_dict().items())
    assert not torch.equal(model.blocks[5].conv.weight, Net().blocks[5].conv.weight)


def test_the_recompile_limit_is_never_hit():
    """Six stages freeze, three variants are allowed: naively the model would run eagerly from the third stage on."""
    torch._dynamo.config.recompile_limit = 3
    model, run, freezer, optimizer, backend = setup(stages(1, 6))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train(model, run, freezer, optimizer, 14)
    assert len(freezer.frozen_layers) == 6
    assert backend.frame_count == 7


def test_stages_are_grouped_to_a_few():
    model, run, freezer, optimizer, backend = setup(grouped_script(15), total_steps=30)
    train(model, run, freezer, optimizer, 30)
    steps = {event.step for event in freezer.events if event.action == "freeze"}
    assert 1 <= len(steps) <= COMPILED_STAGES
    assert len(freezer.frozen_layers) > len(steps)
    assert {"grouped"} <= {event.reason for event in freezer.events}
    assert backend.frame_count <= 1 + COMPILED_STAGES


def grouped_script(num_stages):
    """One more layer is ready at each stage; it stays so until a stage freezes."""
    every = -(-num_stages // COMPILED_STAGES)
    left, ready, script = list(NAMES), 0, []
    for stage in range(1, num_stages + 1):
        ready = min(ready + 1, len(left) - 1)
        script.append({name: 0.9 if index < ready else 0.1 for index, name in enumerate(left)})
        if stage % every == 0:
            left, ready = left[ready:], 0
    return script


def test_without_compiling_nothing_is_grouped_and_the_limit_stays():
    limit = torch._dynamo.config.recompile_limit
    model, run, freezer, optimizer, _ = setup(stages(1, 6), lambda model, backend: model, total_steps=12)
    train(model, run, freezer, optimizer, 12)
    assert len(freezer.frozen_layers) == 6
    assert torch._dynamo.config.recompile_limit == limit
    assert freezer.report().num_compilations == 0
    assert "compile" not in str(freezer.report())


def test_thawing_costs_one_compilation():
    model, run, freezer, optimizer, backend = setup(stages(5, 1))
    train(model, run, freezer, optimizer, 4)
    before, weight = backend.frame_count, model.blocks[0].conv.weight.detach().clone()
    assert [decision.layer for decision in freezer.thaw(NAMES[:2])] == NAMES[:2]
    train(model, run, freezer, optimizer, 2, start=4)
    assert backend.frame_count == before + 1
    assert not torch.equal(model.blocks[0].conv.weight, weight)


def test_the_compiler_is_given_back_as_it_was_found():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compiled = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda x: x + 1, backend=compiled)
    first, second = (SmartFRZ(model, optimizer, ScriptedPredictor(), record_every=1) for _ in range(2))
    function(torch.ones(2))
    assert compiled.frame_count == 0  # held
    first.close()
    function(torch.ones(2))
    assert compiled.frame_count == 0
    second.close()
    second.close()
    function(torch.ones(2))
    assert compiled.frame_count == 1


def test_a_freezer_that_is_dropped_lets_the_compiler_go():
    model = Net()
    freezer = SmartFRZ(model, torch.optim.SGD(model.parameters(), lr=0.01), ScriptedPredictor(), record_every=1)
    assert EagerHold.holders == 1
    del freezer, model
    gc.collect()
    assert EagerHold.holders == 0


def test_a_freezer_that_is_dropped_after_a_backward_pass_but_before_a_step_lets_the_compiler_go():
    model = Net()
    freezer = SmartFRZ(model, torch.optim.SGD(model.parameters(), lr=0.01), ScriptedPredictor(), record_every=1)
    model.eval()(torch.ones(4, 2, 5, 5)).sum().backward()
    assert EagerHold.holders == 1
    del freezer, model
    gc.collect()
    assert EagerHold.holders == 0


def test_compiled_costs_are_profiled_eagerly_and_compiling_goes_on():
    model, run, freezer, optimizer, backend = setup(stages(3, 1), freeze_order="cost_aware")
    train(model, run, freezer, optimizer, 6)
    assert set(freezer.state_dict()["controller"]["costs"]) == set(NAMES)
    assert backend.frame_count >= 1


class Branches(nn.Module):
    """Calls a layer inside of an operator that PyTorch compiles even where the model is not compiled."""

    def __init__(self, operator):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.inside, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.operator = operator

    def forward(self, x):
        return self.head(getattr(self, self.operator)(self.first(x.mean((2, 3)))))

    def cond(self, x):
        def either(x):
            return torch.cond(x.sum() > 1e9, torch.sin, lambda y: self.inside(y).cos(), (x,))

        return torch.cond(x.shape[0] * x.square().sum() > 0, either, lambda y: y.sin(), (x,))

    def while_loop(self, x):
        return torch.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, self.inside(y)), (torch.tensor(0), x))[1]

    def map(self, x):
        return map_rows(lambda row: self.inside(row).cos(), x)


@pytest.mark.parametrize("order", ["free", "cost_aware"])
@pytest.mark.parametrize("compiler", [compiled_before, lambda model, backend: model])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's own
@pytest.mark.parametrize("operator", ["cond", "while_loop", "map"])
def test_a_model_with_operators_that_have_to_be_compiled(operator, compiler, order):
    gradients = []
    for watched in False, True:
        model = Branches(operator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        freezer = None
        if watched:
            script = [dict.fromkeys(["first", "inside", "head"], 0.1) | {"first": 0.9}]
            options = {"record_every": 1, "decide_every": 6, "total_steps": 24, "patience": 1, "freeze_order": order}
            freezer = SmartFRZ(model, optimizer, ScriptedPredictor(script), **options)
        run = compiler(model, CompileCounterWithBackend("aot_eager"))
        with torch.no_grad():
            model.eval()
            run(torch.ones(4, 2, 5, 5))
        train(model, run, freezer, optimizer, 3)
        gradients.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    train(model, run, freezer, optimizer, 9)
    assert freezer.layers == ["first", "inside", "head"]
    assert freezer.frozen_layers == ["first"]
    calls = 3 if operator == "while_loop" else 1
    assert [layer.forward_flops for layer in freezer.report().layers] == [2 * 4 * 8, calls * 2 * 4 * 16, 2 * 4 * 12]


def test_a_scan_runs_as_a_loop_while_compiling_is_held():
    layer, rows, hold = nn.Linear(3, 3), torch.randn(4, 3), EagerHold()
    hold.acquire()
    with EagerOperators():
        last, outputs = scan(lambda carry, row: (layer(carry) + row, carry.cos()), torch.ones(3), rows)
    hold.release()
    carry, expected = torch.ones(3), []
    for row in rows:
        expected.append(carry.cos())
        carry = layer(carry) + row
    torch.testing.assert_close([last, outputs], [carry, torch.stack(expected)])
    (last.sum() + outputs.sum()).backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    "policy", [LinearFreezing(0.3, scale_lr=True), AutoFreeze(steps_per_epoch=8), GradES(100.0, alpha=0.2)]
)
def test_baselines_freeze_at_few_stages_too_and_train_as_uncompiled_until_then(policy):
    weights = []
    for compiler in (compiled_before, lambda model, backend: model):
        model, backend = Net(depth=6), CompileCounterWithBackend("aot_eager")
        run = compiler(model, backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        freezer = SmartFRZ(model, optimizer, policy, total_steps=40)
        train(model, run, freezer, optimizer, 3)
        weights.append([p.detach().clone() for p in model.parameters()])
        train(model, run, freezer, optimizer, 37, start=3)
        stages = set(freezer.report().frozen.values())
        assert stages
        if backend.frame_count:
            assert len(stages) <= COMPILED_STAGES
            assert backend.frame_count == 1 + len(stages - {40})  # after the last step nothing runs
    for compiled, plain in zip(*weights, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_a_hold_that_the_garbage_collector_ends_while_another_is_taken(monkeypatch):
    """It did wait for itself. In a thread, so that a failure ends."""
    other, hold, real = [EagerHold()], EagerHold(), torch.compiler.set_stance

    def collect_and_set(stance):
        other.clear()
        return real(stance)

    monkeypatch.setattr(torch.compiler, "set_stance", collect_and_set)
    thread = threading.Thread(target=hold.acquire, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    hold.release()
    assert not other
