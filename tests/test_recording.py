import copy
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from builder_fixtures import tiny_recipe, write_recipe
from torch import nn

from smartfrz.adapters.torch.layers import collect_outputs, trace_layers
from smartfrz.dataset_builder.checking import check_recipe
from smartfrz.dataset_builder.cka import centered_gram
from smartfrz.dataset_builder.models import build_model
from smartfrz.dataset_builder.recipes import load_recipe
from smartfrz.dataset_builder.recording import is_recorded, record
from smartfrz.dataset_builder.similarity import layer_grams, probe_batch
from smartfrz.dataset_builder.storage import read_run, reference_file, run_files
from smartfrz.errors import DatasetFormatError, RecipeError
from smartfrz.hyperparameters import OPTIMIZERS, TrainingSpec
from smartfrz.training import evaluate, forward, schedule_factor, torch_device, train

ARRAYS = ("step", "progress", "loss", "learning_rate", "cka", "weights")
LAYERS = ["0", "3", "7"]

# schedule, warmup, progress, factor
FACTORS = [
    ("constant", 0.0, 0.7, 1.0),
    ("linear", 0.0, 0.25, 0.75),
    ("cosine", 0.0, 0.5, 0.5),
    ("cosine", 0.0, 1.0, 0.0),
    ("step", 0.0, 0.49, 1.0),
    ("step", 0.0, 0.5, 0.1),
    ("step", 0.0, 0.8, 0.01),
    ("linear", 0.2, 0.1, 0.505),
    ("linear", 0.2, 0.6, 0.5),
]


def assert_same_run(one, other):
    assert one.layers == other.layers
    assert one.facts["accuracies"] == other.facts["accuracies"]
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def recorded(folder, **entries):
    return read_run(record(tiny_recipe(folder, **entries), folder / "runs"))


class Network(nn.Module):
    """Batch norm, dropout and an in-place activation right behind a layer."""

    def __init__(self, inplace=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, momentum=0.3)
        self.plain = nn.Conv2d(4, 6, 3)
        self.act = nn.ReLU(inplace=inplace)
        self.drop = nn.Dropout(0.5)
        self.frozen_norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = self.drop(self.act(self.plain(x)))
        return self.head(self.frozen_norm(x).mean((2, 3)))


@pytest.fixture
def network():
    model = Network().train()
    model.frozen_norm.eval()
    model(torch.randn(8, 3, 6, 6))  # running statistics that are not the initial ones
    return model


@pytest.fixture
def probe():
    return torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 + 1


# Two runs


def test_a_recording_holds_both_runs(tmp_path):
    run = recorded(tmp_path)
    assert run.layers == LAYERS
    assert run.step.tolist() == [2, 4, 6, 8, 10, 12, 14, 16]
    assert run.progress.tolist() == [step / 16 for step in run.step]
    assert run.weights.shape == (3, 8, 64)
    assert run.cka.shape == (3, 8)
    assert ((run.cka > 0) & (run.cka <= 1)).all()
    assert run.loss[-1] < run.loss[0]
    assert (np.diff(run.learning_rate) < 0).all()
    assert run.facts["recipe"]["training"]["epochs"] == 2
    assert 0.5 < run.facts["accuracies"]["reference"] <= 1
    assert [layer["name"] for layer in run.facts["layer_facts"]] == LAYERS
    assert (np.abs(np.diff(run.weights, axis=1)).max(axis=(0, 2)) > 0).all()


def test_the_same_training_again_ends_in_the_reference(tmp_path):
    # The recorded run with the reference's own data order is the reference.
    run = recorded(tmp_path, recording="seed = 0")
    assert run.cka[:, -1] == pytest.approx(1.0, abs=1e-9)
    assert (run.cka[:, 0] < 0.9999).any()
    assert run.facts["accuracies"]["recorded"] == run.facts["accuracies"]["reference"]


def test_another_data_order_ends_elsewhere(tmp_path):
    assert recorded(tmp_path, recording="seed = 1").cka[:, -1].min() < 0.9999


def test_recorded_weights_are_those_of_the_model(tmp_path):
    # Layers smaller than the pool are sampled with replacement: every value is one of the layer's.
    recipe = tiny_recipe(tmp_path, recording="seed = 0")
    run = read_run(record(recipe, tmp_path / "runs"))
    reference = build_model(tiny_recipe(tmp_path, model='init = "tiny"'), 0, tmp_path / "runs")
    for index, name in enumerate(LAYERS):
        weights = reference.get_submodule(name).weight.detach().numpy()
        assert np.isin(run.weights[index, -1], weights).all()


def test_the_same_seed_gives_the_same_recording(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    one, again, other = recorded(tmp_path / "a"), recorded(tmp_path / "b"), recorded(tmp_path / "c", seed=5)
    assert_same_run(one, again)
    assert not np.array_equal(one.weights, other.weights)


def test_reinitialize_starts_from_other_weights(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    same = recorded(tmp_path / "a", learning_rate=1e-9)
    other = recorded(tmp_path / "b", learning_rate=1e-9, recording="reinitialize = true")
    assert same.cka == pytest.approx(1.0, abs=1e-6)
    assert other.cka[:, -1].max() < 0.99


def test_a_recipe_starts_from_what_another_made(tmp_path):
    record(tiny_recipe(tmp_path, name="first"), tmp_path / "runs")
    path = write_recipe(tmp_path, name="second", model='init = "first"', learning_rate=1e-9)
    run = read_run(record(load_recipe(path), tmp_path / "runs"))
    # Nothing moves at this learning rate, so that the network is still as good as the first one.
    assert run.facts["accuracies"]["recorded"] > 0.5
    assert run.cka == pytest.approx(1.0, abs=1e-6)


def test_fewer_steps_than_records_record_every_step(tmp_path):
    assert recorded(tmp_path, epochs=0.5, records=60).step.tolist() == [1, 2, 3, 4]


def test_progress_rises_to_one(tmp_path):
    seen = []
    record(tiny_recipe(tmp_path), tmp_path / "runs", lambda done, text: seen.append((done, text)))
    assert seen == sorted(seen, key=lambda entry: entry[0])
    assert seen[-1] == (1.0, "recording")
    assert [text for _, text in seen] == ["reference"] * 16 + ["recording"] * 16


def test_a_loss_that_is_not_finite_is_reported(tmp_path):
    with pytest.raises(RecipeError, match=r"The loss is (nan|inf) at step \d+\. Lower training\.learning_rate"):
        recorded(tmp_path, learning_rate=1e30)
    assert [path.name for path in (tmp_path / "runs").glob("*")] == []


# What is finished is kept


def test_weights_that_are_not_finite_after_the_last_step_are_reported(tmp_path):
    """The loss of one step is from before its update."""
    path = write_recipe(tmp_path, epochs=1e-9, learning_rate=3e38)
    path.write_text(path.read_text().replace("[training]", "[training]\nweight_decay = 1e3"))
    with pytest.raises(RecipeError, match=r"The weights are not finite after step 1\. Lower training\.learning_rate"):
        record(load_recipe(path), tmp_path)
    assert not list(tmp_path.glob("*.parquet"))


def test_a_gpu_that_is_not_there_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = tiny_recipe(tmp_path)
    for try_it in (record, check_recipe):
        with pytest.raises(RecipeError, match=r"device='cuda' was asked for, but PyTorch sees no GPU .* device='cpu'"):
            try_it(recipe, tmp_path / "runs", device="cuda")
    assert not (tmp_path / "runs").exists()
    assert torch_device("auto") == torch_device("cpu") == torch.device("cpu")


def test_a_finished_recording_is_kept(tmp_path):
    recipe, calls = tiny_recipe(tmp_path), []
    target = record(recipe, tmp_path / "runs")
    before = target.stat().st_mtime_ns
    assert is_recorded(recipe, tmp_path / "runs")
    assert record(recipe, tmp_path / "runs", lambda *call: calls.append(call)) == target
    assert target.stat().st_mtime_ns == before
    assert calls == []


def test_a_changed_recipe_is_recorded_again(tmp_path, caplog):
    first = recorded(tmp_path)
    with caplog.at_level(logging.WARNING, "smartfrz"):
        second = recorded(tmp_path, learning_rate=0.01)
    assert "Recording tiny again: its recipe has changed" in caplog.text
    assert second.facts["recipe"]["training"]["learning_rate"] == 0.01
    # also the reference, which belongs to the old recipe
    assert second.learning_rate[0] < first.learning_rate[0]
    (tmp_path / "fresh").mkdir()
    assert_same_run(second, recorded(tmp_path / "fresh", learning_rate=0.01))


@pytest.mark.parametrize("damaged", ["tiny.parquet", "tiny.reference.safetensors"])
def test_a_damaged_file_is_made_again(tmp_path, caplog, damaged):
    whole = recorded(tmp_path)
    path = tmp_path / "runs" / damaged
    path.write_bytes(path.read_bytes()[:200])
    if damaged.endswith("safetensors"):
        (tmp_path / "runs" / "tiny.parquet").unlink()
    with caplog.at_level(logging.WARNING, "smartfrz"):
        assert_same_run(recorded(tmp_path), whole)
    assert "again" in caplog.text


def test_a_reference_that_is_finished_is_not_trained_again(tmp_path):
    whole, seen = recorded(tmp_path), []
    (tmp_path / "runs" / "tiny.parquet").unlink()
    path = record(tiny_recipe(tmp_path), tmp_path / "runs", lambda done, text: seen.append(text))
    assert set(seen) == {"recording"}
    assert_same_run(read_run(path), whole)


@pytest.mark.slow
def test_a_recording_killed_in_the_middle_is_finished_by_the_next_call(tmp_path):
    recipe_file = write_recipe(tmp_path)
    recipe, runs = load_recipe(recipe_file), tmp_path / "runs"
    command = [
        sys.executable,
        "-c",
        "from smartfrz.dataset_builder.cli import main; main()",
        "record",
        str(recipe_file),
    ]
    process = subprocess.Popen(
        [*command, "--output", str(runs), "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"WAIT_AFTER": str(reference_file(runs, "tiny"))},
    )
    try:
        while not reference_file(runs, "tiny").exists():
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL

    assert not (runs / "tiny.parquet").exists()
    assert not is_recorded(recipe, runs)
    (runs / ".tiny-half.parquet").write_bytes(b"PAR1 and no more")  # as a kill during the last write leaves it
    with pytest.raises(DatasetFormatError, match="Found no recorded run"):
        run_files(runs)

    seen = []
    path = record(recipe, runs, lambda done, text: seen.append(text))
    assert set(seen) == {"recording"}
    assert run_files(runs) == [path]
    assert_same_run(read_run(path), read_run(record(recipe, tmp_path / "uninterrupted")))


# CKA on the probe batch


def test_taking_grams_leaves_the_model_as_it_was(network, probe):
    layers = trace_layers(network, probe)
    before, modes = state(network), {name: m.training for name, m in network.named_modules()}
    assert before["norm.num_batches_tracked"] > 0
    layer_grams(network, layers, probe)
    for name, tensor in state(network).items():
        assert torch.equal(tensor, before[name]), name
    assert {name: m.training for name, m in network.named_modules()} == modes
    for name, module in network.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_failing_forward_pass_leaves_the_model_as_it_was(network, probe):
    layers = trace_layers(network, probe)
    before = state(network)
    with pytest.raises(RuntimeError, match="size"):
        layer_grams(network, layers, torch.zeros(10, 3, 2, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(network).items())
    assert network.norm.training
    assert not network.frozen_norm.training
    assert not any(module._forward_hooks for module in network.modules())


def test_grams_do_not_depend_on_running_statistics_nor_dropout(network, probe):
    layers = trace_layers(network, probe)
    before = layer_grams(network, layers, probe)
    network.norm.running_mean += 5.0
    network.norm.running_var *= 9.0
    after = layer_grams(network, layers, probe)
    assert [*before] == ["conv", "plain", "head"]
    for name, gram in before.items():
        np.testing.assert_array_equal(after[name], gram)


def test_an_in_place_activation_does_not_overwrite_a_layers_output(probe):
    outputs = {}
    for inplace in (True, False):
        model = Network(inplace).eval()
        layers = trace_layers(model, probe)
        with collect_outputs(model, layers) as kept, torch.no_grad():
            model(probe)
        outputs[inplace] = kept
    assert outputs[True]["conv"].min() < 0
    for name, output in outputs[False].items():
        assert torch.equal(outputs[True][name], output)


def test_grams_are_those_of_the_layers_outputs(network, probe):
    grams = layer_grams(network, trace_layers(network, probe), probe)
    assert [gram.shape for gram in grams.values()] == [(10, 10)] * 3
    with torch.no_grad():
        x = nn.functional.batch_norm(
            network.conv(probe), None, None, network.norm.weight, network.norm.bias, training=True
        )
    np.testing.assert_allclose(grams["conv"], centered_gram(x.numpy()), rtol=1e-4, atol=1e-3)


def test_outputs_without_examples_have_no_cka_and_folded_ones_are_unfolded():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.inside = nn.Embedding(3, 4), nn.Linear(4, 2)

        def forward(self, x):  # [examples, 6, 4] as windows of three
            return self.inside(x.reshape(-1, 3, 4) + self.position(torch.arange(3))).reshape(len(x), -1)

    torch.manual_seed(0)
    model, x = Windows(), torch.randn(8, 6, 4)
    grams = layer_grams(model, trace_layers(model, x), x)
    assert np.isnan(grams["position"]).all()
    with torch.no_grad():
        np.testing.assert_allclose(grams["inside"], centered_gram(model(x).numpy()), rtol=1e-5, atol=1e-5)


# Parts


def test_the_probe_batch_is_fixed():
    data = [(torch.full((2,), float(i)), 0) for i in range(30)]
    one, again = probe_batch(data, 8), probe_batch(data, 8)
    assert torch.equal(one, again)
    assert len(one[:, 0].unique()) == 8


def test_dict_inputs_are_spread():
    class Tokens(nn.Module):
        def forward(self, ids, mask):
            return type("Output", (), {"logits": ids * mask})()

    assert forward(Tokens(), {"mask": torch.tensor([2]), "ids": torch.tensor([3])}).tolist() == [6]


@pytest.mark.parametrize(("schedule", "warmup", "progress", "factor"), FACTORS)
def test_schedules(schedule, warmup, progress, factor):
    spec = TrainingSpec(epochs=1, schedule=schedule, warmup=warmup)
    assert schedule_factor(spec, progress) == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(optimizer):
    torch.manual_seed(0)
    inputs = torch.randn(40, 4)
    data = list(zip(inputs, (inputs[:, 0] > 0).long(), strict=True))
    model, losses = nn.Linear(4, 2), []
    spec = TrainingSpec(epochs=8, batch_size=8, optimizer=optimizer, learning_rate=0.05)
    train(model, data, spec, seed=0, on_step=lambda step, total, loss, rate: losses.append(loss))
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert evaluate(model, data) > 0.8


def test_the_seed_decides_the_data_order_and_dropout():
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    data = list(zip(inputs, (inputs[:, 0] > 0).long(), strict=True))
    torch.manual_seed(0)
    initial = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(losses))  # whatever came before
        losses.append([])
        spec = TrainingSpec(epochs=2, batch_size=8)
        train(copy.deepcopy(initial), data, spec, seed=seed, on_step=lambda *step: losses[-1].append(step))
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_parameters_without_gradient_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    data = [(torch.randn(4), 0) for _ in range(6)]
    spec = TrainingSpec(epochs=2, batch_size=3, weight_decay=0.1)
    train(model, data, spec, seed=0, on_step=lambda *_: None)
    assert torch.equal(model[0].weight, before)
