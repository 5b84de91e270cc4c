"""PyTorch models whose weights are read while a GPU goes on; forced on the CPU here. The GPU itself: test_cuda.py."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from numpy_adapter import ChangePredictor, make_info  # noqa: E402
from torch_runs import NET, Net, attach, batch, loss_of, moved, num_hooks, parts, seeded, train, values  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ, TorchAdapter, trace_layers, watching  # noqa: E402
from smartfrz.adapters.torch.layers import LayerReader  # noqa: E402

EVERY_SECOND = {"record_every": 2, "decide_every": 3}


@pytest.fixture
def forced_later(monkeypatch):
    monkeypatch.setattr(LayerReader, "_always_later", True)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def network():
    return seeded(Net)


def adapter_of(model):
    layers = trace_layers(model.eval(), batch(0)[0])
    model.train()
    return TorchAdapter(model, [sgd(model)], layers)


def test_weights_on_a_cpu_are_read_at_once():
    assert not adapter_of(network()).reads_later


def test_weights_that_are_asked_for_later_are_those_of_when_reading_began():
    model = network()
    adapter = adapter_of(model)
    positions = {layer: np.arange(0, 18, 3) for layer in NET}
    expected = adapter.tailored(positions)
    later = adapter.tailored_later(positions)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    found = later()
    assert list(found) == NET
    for layer in NET:
        np.testing.assert_array_equal(found[layer], expected[layer])
        assert found[layer].dtype == np.float32


def test_frozen_layers_are_compared_as_they_were_when_looking_began(monkeypatch):
    model = network()
    adapter = adapter_of(model)
    adapter.freeze(["conv1", "conv2"])
    adapter.snapshot_statistics()
    still = adapter.disturbed_later(["conv1", "conv2"])
    with torch.no_grad():
        model.conv1.weight.add_(1.0)
    gone, thawed = (adapter.disturbed_later(["conv1", "conv2"]) for _ in range(2))
    model.conv2.weight.requires_grad_(True)
    with monkeypatch.context() as patched:
        patched.setattr(watching, "_same", None)  # which would wait for a GPU
        assert still() == {"conv2": "trainable"}
    assert gone() == {"conv1": "moved", "conv2": "trainable"}
    adapter.unfreeze(["conv1"])
    assert thawed() == {"conv2": "trainable"}
    assert adapter.disturbed_later([])() == {}


@pytest.mark.parametrize("auto_step", [False, True])
def test_forced_later_a_layer_freezes_one_step_later_and_stands_still(forced_later, auto_step):
    model = network()
    optimizer, logged = sgd(model), []
    freezer = attach(
        model, optimizer, NET, {"conv1"}, {"conv2"}, auto_step=auto_step, log=lambda *line: logged.append(line)
    )
    train(model, optimizer, freezer, 0, 2)
    assert freezer.frozen_layers == []
    train(model, optimizer, freezer, 2, 3)
    assert freezer.frozen_layers == ["conv1"]
    before = values(model)
    train(model, optimizer, freezer, 3, 8)
    assert not parts(moved(before, model), ["conv1"])
    assert [list(change) for change in freezer.report().changes] == [[3, "freeze", "conv1"], [5, "freeze", "conv2"]]
    assert [step for _, step in logged] == [2, 3, 4, 5, 6, 7, 8]
    assert [step for line, step in logged if "smartfrz/confidence/head" in line] == [3, 5]
    freezer.close()


@pytest.mark.parametrize(("norm_batches", "first"), [(1, 6), (3, 4), (6, 1), (24, 1)])
def test_forced_later_a_frozen_batch_norm_has_the_statistics_of_the_last_batches(forced_later, norm_batches, first):
    model = network()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"}, norm_batches=norm_batches, **EVERY_SECOND)
    seen = []
    hook = model.norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
    train(model, optimizer, freezer, 0, 7)
    hook.remove()
    assert freezer.frozen_layers == ["conv1"]
    used = seen[first:]  # the first stage is decided after the seventh step
    share = 0.9 ** torch.arange(len(used) - 1, -1, -1, dtype=torch.double)
    mean = ((share / share.sum())[:, None] * torch.stack([x.mean((0, 2, 3)) for x in used])).sum(0)
    torch.testing.assert_close(model.norm1.running_mean.double(), mean, rtol=1e-4, atol=1e-4)
    freezer.close()


def change_freezer(model, optimizer, **options):
    """Decides from the whole history, so that a resumed run is right only if all of it came back."""
    predictor = ChangePredictor(make_info(tailored_size=16), scale=3.0)
    defaults = {"record_every": 2, "decide_every": 2, "patience": 1, "threshold": 0.84, "total_steps": 24}
    return SmartFRZ(model, optimizer, predictor, **defaults | options)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 9, 12, 16, 23])
def test_forced_later_a_run_resumed_between_record_and_decision_is_bit_identical(forced_later, tmp_path, stop):
    def start():
        model = network()
        optimizer = sgd(model)
        return model, optimizer, change_freezer(model, optimizer, norm_batches=3)

    whole, first, second = start(), start(), start()
    train(*whole, 0, 24)
    assert len(set(whole[2].report().frozen.values())) == 2
    train(*first, 0, stop)
    state = [part.state_dict() for part in first]
    assert ("due" in state[2]["controller"]) == (stop % 2 == 0)
    torch.save(state, tmp_path / "run.pt")
    for part, saved in zip(second, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(saved)
    train(*second, stop, 24)
    assert repr(second[2].events) == repr(whole[2].events)
    assert not moved(values(whole[0]), second[0])
    for _, _, freezer in (whole, first, second):
        freezer.close()


@pytest.mark.parametrize("unfreeze", [False, True])
def test_forced_later_closing_between_record_and_decision_leaves_the_model_as_it_is(forced_later, unfreeze):
    model = network()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"}, {"conv2"})
    train(model, optimizer, freezer, 0, 4)  # conv2 would freeze after the fifth step
    events = freezer.events
    freezer.close(unfreeze=unfreeze)
    assert freezer.frozen_layers == ["conv1"]
    assert freezer.events == events
    assert {step.step for step in events} == {3}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == (set() if unfreeze else {"conv1.weight", "norm1.weight", "norm1.bias"})
    assert num_hooks(model) == 0
    before = values(model)
    train(model, optimizer, None, 5, 6)
    assert ("conv1.weight" in moved(before, model)) == unfreeze


def test_forced_later_a_thaw_and_a_report_between_record_and_decision(forced_later):
    model = network()
    optimizer = sgd(model)
    freezer = attach(model, optimizer, NET, {"conv1"}, {"conv2"})
    train(model, optimizer, freezer, 0, 4)
    assert freezer.report().frozen == {"conv1": 3}
    freezer.thaw()
    train(model, optimizer, freezer, 4, 5)
    assert freezer.frozen_layers == []
    before = values(model)
    loss_of(model, 5).backward()
    optimizer.step()
    assert parts(moved(before, model), NET) == parts(before, NET)
    freezer.close()
