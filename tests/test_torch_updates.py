"""When a step counts: `auto_step`, micro-batches, steps beyond the end, and what is no optimizer."""

import copy
from pathlib import Path

import pytest
from torch_runs import NET, Net, attach, batch, loss_of, mlp, train, values

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402
from smartfrz.adapters.torch.updates import WATCHED_CALLS  # noqa: E402
from smartfrz.baselines import LinearFreezing  # noqa: E402
from smartfrz.errors import StateError, UsageError  # noqa: E402
from smartfrz.zoo import embedded_folder  # noqa: E402
from smartfrz.zoo.urls import registry_url  # noqa: E402

STAGES = [(), {"conv1"}, {"conv2"}]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def said(caplog, text):
    return [r.getMessage() for r in caplog.records if text in r.getMessage()]


def automatic_and_manual(make_optimizers=sgd, **options):
    runs = []
    for auto in True, False:
        model = Net()
        optimizers = make_optimizers(model)
        freezer = attach(model, optimizers, NET, *STAGES, auto_step=auto, **options)
        runs.append((model, optimizers, freezer))
    return runs


def assert_alike(runs):
    (one, _, automatic), (other, _, manual) = runs
    assert repr(automatic.events) == repr(manual.events)
    assert automatic.frozen_layers == manual.frozen_layers == ["conv1", "conv2"]
    assert automatic.report().num_steps == manual.report().num_steps
    assert all(torch.equal(a, b) for a, b in zip(values(one).values(), values(other).values(), strict=True))


def test_without_a_call_of_step_the_run_is_the_same():
    runs = automatic_and_manual()
    for model, optimizer, freezer in runs:
        train(model, optimizer, freezer if freezer is runs[1][2] else None, 0, 10)
    assert_alike(runs)


def test_a_call_of_step_is_allowed_and_counts_once():
    runs = automatic_and_manual()
    for run in runs:
        train(*run, 0, 10)
    assert_alike(runs)


def test_step_returns_the_decisions_of_the_step_before_once():
    model = Net()
    freezer = attach(model, optimizer := sgd(model), NET, *STAGES, auto_step=True)
    train(model, optimizer, None, 0, 2)
    assert [decision.layer for decision in freezer.step()] == NET
    assert freezer.step() == []


def test_a_freezer_that_nobody_holds_works():
    model = Net()
    optimizer = sgd(model)
    attach(model, optimizer, NET, *STAGES, auto_step=True)
    train(model, optimizer, None, 0, 10)
    assert not any(p.requires_grad for p in model.conv2.parameters())


def test_a_round_of_several_optimizers_is_one_step():
    def two(model):
        return [sgd(model.head), torch.optim.AdamW([*model.conv1.parameters(), *model.conv2.parameters()], lr=0.01)]

    model = Net()
    optimizers = two(model)
    freezer = attach(model, optimizers, NET, (), {"conv1"}, auto_step=True)
    train(model, optimizers, None, 0, 8)
    assert freezer.report().num_steps == 8
    assert freezer.frozen_layers == ["conv1"]


def test_an_optimizer_that_rests_is_named_once(caplog):
    model = Net()
    optimizers = [sgd(model.head), torch.optim.AdamW(model.conv1.parameters(), lr=0.01)]
    freezer = attach(model, optimizers, NET, auto_step=True)
    train(model, optimizers[:1], None, 0, 105)
    assert freezer.report().num_steps == 0
    (line,) = said(caplog, "SmartFRZ: SGD took")
    assert "AdamW took none" in line


def test_a_step_that_a_grad_scaler_skips_does_not_count():
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, *STAGES, auto_step=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(10):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss * (float("inf") if step == 3 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert freezer.report().num_steps == 9
    assert freezer.frozen_layers == ["conv1", "conv2"]


def test_lbfgs_evaluates_several_times_in_one_step():
    model = mlp(4, 4, 4, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    freezer = attach(model, optimizer, ["0", "2", "4"], (), {"0"}, auto_step=True)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0, 8, 4)
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    assert freezer.report().num_steps == 6
    assert freezer.frozen_layers == ["0"]


class Twice(torch.optim.SGD):
    """An optimizer whose step calls the step of its base class; it fails when told to."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise RuntimeError("no memory left")
        return super().step(closure)


def test_a_step_inside_of_a_step_and_a_step_that_fails():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on SGD.step runs hooks, too
    model = Net()
    optimizer = Twice(model.parameters(), lr=0.1)
    freezer = attach(model, optimizer, NET, *STAGES, auto_step=True)
    train(model, optimizer, None, 0, 3)
    assert freezer.report().num_steps == 3
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="no memory"):
        train(model, optimizer, None, 3, 4)
    optimizer.fails = False
    train(model, optimizer, None, 4, 10)
    assert freezer.report().num_steps == 9


def test_policies_that_scale_learning_rates_do_so_as_before():
    states = []
    for auto in True, False:
        model = Net()
        optimizer = sgd(model)
        freezer = SmartFRZ(model, optimizer, LinearFreezing(0.2), record_every=1, total_steps=12, auto_step=auto)
        train(model, optimizer, None if auto else freezer, 0, 12)
        states.append(values(model))
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def test_a_step_before_the_first_batch_is_let_pass_and_another_model_is_named(caplog):
    model, other = Net(), Net()
    optimizer = sgd(model)
    freezer = attach(other, optimizer, NET, auto_step=True)
    optimizer.step()
    train(model, optimizer, None, 0, 12)
    (line,) = said(caplog, "SmartFRZ: the optimizer took 10 steps")
    assert "no forward pass in training mode" in line
    assert freezer.report().num_steps == 0


def test_a_closed_freezer_counts_no_more_and_a_copied_optimizer_none_of_it():
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, auto_step=True)
    train(model, optimizer, None, 0, 3)
    copy.deepcopy(optimizer).step()
    assert freezer.report().num_steps == 3
    freezer.close()
    train(model, optimizer, None, 3, 5)
    assert freezer.report().num_steps == 3
    assert not optimizer._optimizer_step_post_hooks


# Calls of step that are no steps


@pytest.mark.parametrize("accumulated", [2, 4])
def test_step_after_each_micro_batch_is_noticed_and_said_once(accumulated, caplog):
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET)
    for number in range(3 * WATCHED_CALLS):
        loss_of(model, number).backward()
        if number % accumulated == accumulated - 1:
            optimizer.step()
            optimizer.zero_grad()
        freezer.step()
    (line,) = said(caplog, "one after each batch")
    assert f"{WATCHED_CALLS // accumulated} of the first {WATCHED_CALLS} calls" in line


def test_a_few_skipped_steps_are_not_remarkable(caplog):
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET)
    for number in range(2 * WATCHED_CALLS):
        loss_of(model, number).backward()
        if number not in (1, 2, 3, 9):
            optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    assert not said(caplog, "one after each batch")


def test_steps_beyond_total_steps_are_said_once(caplog):
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, total_steps=6)
    train(model, optimizer, freezer, 0, 6)
    assert not said(caplog, "beyond")
    train(model, optimizer, freezer, 6, 12)
    assert len(said(caplog, "the run goes on beyond its 6 steps")) == 1


def test_a_run_that_goes_on_with_fewer_steps_than_it_has_taken_is_said_to_go_beyond_them_once(caplog):
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, total_steps=20)
    train(model, optimizer, freezer, 0, 8)
    state = freezer.state_dict()
    freezer.close()
    freezer = attach(model, optimizer, NET, total_steps=4)
    freezer.load_state_dict(state)
    train(model, optimizer, freezer, 8, 12)
    assert len(said(caplog, "the run goes on beyond its 4 steps")) == 1


# What is no model, and no state


@pytest.mark.parametrize("model", [None, Net.forward, [Net()]])
def test_what_is_no_model_is_named(model):
    with pytest.raises(TypeError, match=r"`model` is .*; expected the torch.nn.Module that is trained"):
        SmartFRZ(model, sgd(Net()), total_steps=6)


def test_a_cache_and_a_timeout_of_another_type_are_named():
    model = Net()
    with pytest.raises(TypeError, match=r"`cache` is True; .* Pass cache=PrefixCache\(\)"):
        SmartFRZ(model, sgd(model), total_steps=6, cache=True)
    with pytest.raises(ValueError, match="`rank_timeout` is None"):
        SmartFRZ(model, sgd(model), total_steps=6, rank_timeout=None)


def test_a_state_that_is_none_is_named():
    model = Net()
    with pytest.raises(StateError, match=r"received None; expected what SmartFRZ.state_dict\(\) returned"):
        SmartFRZ(model, sgd(model), total_steps=6).load_state_dict(None)


# What is no optimizer


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_none_and_wrappers_are_no_optimizers():
    model = Net()
    with pytest.raises(TypeError, match=r"`optimizer` is None; expected a torch.optim.Optimizer.*Make the optimizer"):
        SmartFRZ(model, None, total_steps=9)
    with pytest.raises(TypeError, match=r"of type Wrapper;.*attribute `optimizer`: pass that"):
        SmartFRZ(model, Wrapper(sgd(model)), total_steps=9)
    with pytest.raises(TypeError, match="of type generator"):
        SmartFRZ(model, model.parameters(), total_steps=9)
    with pytest.raises(TypeError, match=r"of type StepLR;.*attribute `optimizer`"):
        SmartFRZ(model, torch.optim.lr_scheduler.StepLR(sgd(model), 1), total_steps=9)
    with pytest.raises(ValueError, match="`optimizer` is empty"):
        SmartFRZ(model, [], total_steps=9)


def test_auto_step_needs_an_optimizer_with_hooks():
    model = Net()
    duck = Wrapper(sgd(model))
    duck.param_groups, duck.state = duck.optimizer.param_groups, duck.optimizer.state
    attach(model, duck, NET, auto_step=True)  # the optimizer inside has hooks
    duck.optimizer = None
    attach(model, duck, NET)
    with pytest.raises(UsageError, match=r"received a Wrapper, expected a torch.*call freezer.step\(\)"):
        attach(model, duck, NET, auto_step=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_optimizer_steps_automatically():
    model = Net()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, auto_step=True)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        compiled()
    assert freezer.report().num_steps == 6


@pytest.mark.parametrize("predictor", [None, 3, 0.5, True, b"smartfrz-base", LinearFreezing, object()])
def test_what_is_no_predictor_is_refused_with_what_is_expected(predictor):
    model = Net()
    with pytest.raises(TypeError, match=r"`predictor` is .*; expected a name in the zoo.*smartfrz-base"):
        SmartFRZ(model, sgd(model), predictor, total_steps=9)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.onnx").write_bytes((embedded_folder() / "smartfrz-base.onnx").read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    model = Net()
    for path in "~/mine.onnx", Path("~/mine.onnx"):
        assert SmartFRZ(model, sgd(model), path, total_steps=9).predictor.path == tmp_path / "mine.onnx"
    assert registry_url("~/models") == (tmp_path / "models/registry.json").as_uri()


@pytest.mark.filterwarnings("ignore")
def test_accelerate_counts_where_its_optimizer_really_steps():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer = accelerator.prepare(net := Net(), sgd(net))
    freezer = attach(model, optimizer, NET, auto_step=True)
    for step in range(12):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            optimizer.step()
            optimizer.zero_grad()
    assert freezer.report().num_steps == 4
