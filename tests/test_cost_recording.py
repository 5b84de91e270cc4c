"""`record --costs`: real trainings and their branches."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from builder_fixtures import invoke, tiny_recipe, write_recipe
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from smartfrz.adapters.torch.layers import trace_layers
from smartfrz.dataset_builder import branches as branching
from smartfrz.dataset_builder.branches import Branches
from smartfrz.dataset_builder.cli import main as build
from smartfrz.dataset_builder.recipes import load_recipe
from smartfrz.dataset_builder.recording import is_recorded, record
from smartfrz.dataset_builder.storage import branches_file, read_run, run_files, write_run
from smartfrz.errors import DatasetFormatError, RecipeError
from smartfrz.hyperparameters import TrainingSpec
from smartfrz.training import Training

ARRAYS = ("step", "progress", "loss", "learning_rate", "cka", "weights")
# A layer whose frozen weights give NaN, but not the trained ones: the run goes well, and every branch diverges.
FRAGILE = """

class Fragile(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1.0 if self.weight.requires_grad or not self.training else float("nan"))


def fragile():
    return nn.Sequential(nn.Flatten(), Fragile(192, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


class Stubborn(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


def stubborn():
    return nn.Sequential(nn.Flatten(), Stubborn(192, 6), nn.Linear(6, 3))
"""


class Jittered(Dataset):
    """Random points in three classes, with fresh noise each time that one is read."""

    def __init__(self, number):
        generator = torch.Generator().manual_seed(3)
        self.labels = torch.arange(number) % 3
        self.points = torch.randn(number, 6, generator=generator) + self.labels[:, None]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.points[index] + 0.3 * torch.randn(6) + 0.1 * float(np.random.rand()), self.labels[index]  # noqa: NPY002


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12, momentum=0.01), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip


def trained(on_step, optimizer="AdamW", num_train=40, num_test=60):
    """Train 20 steps in 4 epochs, and call `on_step` with the branches, the step and the training."""
    np.random.seed(5)  # noqa: NPY002 - the training seeds PyTorch only
    model, spec = network(), TrainingSpec(epochs=4, batch_size=8, optimizer=optimizer, learning_rate=0.02)
    layers = trace_layers(model.eval(), torch.zeros(2, 6))
    training = Training(model, Jittered(num_train), spec, seed=1)
    test = TensorDataset(*Jittered(num_test)[:])
    branches = Branches(training, layers, test)
    training.run(lambda step, *_: on_step(branches, step, training))
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(one, other):
    assert all(torch.equal(one[name], other[name]) for name in one)


def record_counting(recipe, runs, stop_at=None):
    """Record with costs; return what was done for at least one step, stopped as by Ctrl-C at the first step of `stop_at`."""
    seen = []

    def progress(fraction, text):
        assert not seen or fraction >= seen[-1][0] - 1e-9
        assert fraction <= 1 + 1e-9
        seen.append((fraction, text))
        if text == stop_at:
            raise KeyboardInterrupt

    try:
        record(recipe, runs, progress, costs=True)
    except KeyboardInterrupt:
        assert stop_at is not None
    return list(dict.fromkeys(text for _, text in seen)), seen[-1][0]


# One branch


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("moment", [3, 10, 19])  # within an epoch, between two, before the last step
def test_a_branch_that_freezes_nothing_ends_as_the_run_itself(optimizer, moment):
    ends = {}

    def on_step(branches, step, training):
        if step in {1, moment + 1} - {training.total}:  # as the branch does
            branches.note_norms()
        if step == moment:
            ends["branch"] = branches.finish(0)
        if step == training.total:
            ends["run"] = branches.finish(branches.num_layers)

    with_branches = trained(on_step, optimizer)
    assert ends["branch"] == ends["run"]
    assert_same_state(with_branches.state_dict(), trained(lambda *_: None, optimizer).state_dict())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("moment", [3, 10, 19])
def test_a_branch_takes_the_same_batches_random_numbers_and_rates(optimizer, moment):
    twins = []

    def on_step(branches, step, training):
        if step == moment:
            twin = training.branch()
            with branching.random_numbers_kept(torch.device("cpu")):
                torch.manual_seed(99)  # whatever came between
                twin.run(lambda *_: None)
            twins.append(twin)

    model = trained(on_step, optimizer)
    assert_same_state(twins[0].model.state_dict(), model.state_dict())
    assert twins[0].model is not model


def test_a_branch_keeps_what_it_froze_and_corrects_its_norms(monkeypatch):
    judged, before, norms = [], {}, {}
    monkeypatch.setattr(branching, "validate", lambda model, data: judged.append(state(model)) or (0.5, 0.5))

    def on_step(branches, step, training):
        if step == 2:
            branches.note_norms()
            norms.update(state(training.model))
        if step == 8:
            before.update(state(training.model))
            branches.finish(1)

    after = trained(on_step).state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert torch.equal(judged[0][name], before[name]), name
        assert not torch.equal(after[name], before[name]), name
    assert not torch.equal(judged[0]["6.weight"], before["6.weight"])
    # running = old share of the statistics at step 2 + the rest of those since then, which freezing leaves alone
    share = 0.99**6
    recent = (before["1.running_mean"] - share * norms["1.running_mean"]) / (1 - share)
    torch.testing.assert_close(judged[0]["1.running_mean"], recent, rtol=1e-3, atol=1e-4)


def test_at_most_so_many_examples_are_judged(monkeypatch):
    monkeypatch.setattr(branching, "MOST_EXAMPLES", 50)
    sizes, ends = [], []

    def on_step(branches, step, training):
        if step == 1:
            sizes.append(branches.num_examples)
            ends.extend(branches.finish(branches.num_layers) for _ in range(2))

    trained(on_step)
    trained(on_step, num_test=20)
    assert sizes == [50, 20]
    assert ends[0] == ends[1]


# A recording


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with a recipe of 3 epochs (24 steps), and its recording with costs."""
    folder = tmp_path_factory.mktemp("costs")
    recipe = tiny_recipe(folder, epochs=3)
    record(recipe, folder / "runs", costs=True)
    return recipe, folder / "runs"


def same_run(one, other):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name, strict=True)
    assert one.facts["accuracies"] == other.facts["accuracies"]
    return True


def same_costs(one, other):
    return json.dumps(one.costs.to_dict()) == json.dumps(other.costs.to_dict())


def test_the_run_is_the_same_as_without_costs(recorded, tmp_path):
    recipe, runs = recorded
    run, plain = read_run(runs / "tiny.parquet"), read_run(record(recipe, tmp_path))
    assert same_run(run, plain)
    assert plain.costs is None
    with pytest.raises(DatasetFormatError, match=r"'tiny' has no costs of freezing\. Add them with: .* record --costs"):
        plain.require_costs()
    costs = run.require_costs()
    assert costs.steps.tolist() == [2, 6, 11, 16]
    assert costs.depths.tolist() == [1, 2, 3]
    assert (costs.total_steps, costs.num_examples, costs.num_layers) == (24, 48, 3)
    assert np.isfinite(costs.loss).all()
    assert costs.loss.std(axis=0).min() > 0
    assert costs.lost("loss")[0, -1] > 0  # it had hardly been trained
    np.testing.assert_array_equal(costs.lost("accuracy"), costs.final_accuracy - costs.accuracy)
    assert (np.diff(costs.saved) > 0).all()
    assert sorted(path.name for path in runs.iterdir()) == ["tiny.parquet", "tiny.reference.safetensors"]


def test_a_recording_with_costs_is_kept(recorded):
    recipe, runs = recorded
    assert is_recorded(recipe, runs)
    assert is_recorded(recipe, runs, costs=True)
    before = (runs / "tiny.parquet").stat().st_mtime_ns
    record(recipe, runs, costs=True)
    record(recipe, runs)
    assert (runs / "tiny.parquet").stat().st_mtime_ns == before


def test_finished_branches_are_kept_when_it_is_interrupted(recorded, tmp_path):
    recipe, runs = recorded
    texts, _ = record_counting(recipe, tmp_path, stop_at="branch 5 of 12")
    assert texts == ["reference", "recording", "branch 1 of 12", "branch 2 of 12", "branch 4 of 12", "branch 5 of 12"]
    assert not (tmp_path / "tiny.parquet").exists()
    with pytest.raises(DatasetFormatError, match="Found no recorded run"):
        run_files(tmp_path)
    texts, fraction = record_counting(recipe, tmp_path)
    assert texts[:2] == ["recording", "branch 5 of 12"]
    assert not {"reference", "branch 1 of 12", "branch 2 of 12", "branch 4 of 12"} & set(texts)
    assert fraction == pytest.approx(1.0)
    again, whole = read_run(tmp_path / "tiny.parquet"), read_run(runs / "tiny.parquet")
    assert same_run(again, whole)
    assert same_costs(again, whole)
    assert not branches_file(tmp_path, "tiny").exists()


def test_branches_of_other_weights_are_made_again(recorded, tmp_path):
    recipe, runs = recorded
    record_counting(recipe, tmp_path, stop_at="branch 4 of 12")
    path = branches_file(tmp_path, "tiny")
    kept = json.loads(path.read_text())
    assert len(kept["branches"]) == 3
    for branch in kept["branches"]:
        branch["loss"] = 7.0
    kept["branches"][0]["weights_sha256"] = "of another machine"
    path.write_text(json.dumps(kept))
    record(recipe, tmp_path, costs=True)
    costs, whole = (read_run(folder / "tiny.parquet").costs for folder in (tmp_path, runs))
    assert costs.loss[0, 0] == whole.loss[0, 0]
    assert costs.loss[0, 1] == 7.0


@pytest.mark.parametrize("text", ["", "[]", '{"recipe_sha256": 1}', "{" * 100_000])
def test_a_damaged_file_of_branches_is_made_again(recorded, tmp_path, caplog, text):
    recipe, _ = recorded
    branches_file(tmp_path, "tiny").write_text(text)
    with caplog.at_level(logging.WARNING, "smartfrz"):
        record_counting(recipe, tmp_path, stop_at="branch 2 of 12")
    assert ("cannot be read" in caplog.text) == ("sha" not in text)
    assert len(json.loads(branches_file(tmp_path, "tiny").read_text())["branches"]) == 1


def test_a_recording_without_costs_is_completed(recorded, tmp_path, caplog):
    recipe, runs = recorded
    record(recipe, tmp_path)
    assert not is_recorded(recipe, tmp_path, costs=True)
    with caplog.at_level(logging.WARNING, "smartfrz"):
        texts, _ = record_counting(recipe, tmp_path)
    assert "reference" not in texts
    assert caplog.text == ""
    assert same_costs(read_run(tmp_path / "tiny.parquet"), read_run(runs / "tiny.parquet"))


def test_a_recording_that_comes_out_otherwise_is_named(recorded, tmp_path, caplog):
    recipe, runs = recorded
    run = read_run(record(recipe, tmp_path))
    other = dataclasses.replace(run, cka=run.cka * 0.99)  # as on another machine
    write_run(tmp_path / "tiny.parquet", other)
    with caplog.at_level(logging.WARNING, "smartfrz"):
        record(recipe, tmp_path, costs=True)
    assert "The recording tiny came out otherwise than before" in caplog.text
    assert same_run(read_run(tmp_path / "tiny.parquet"), read_run(runs / "tiny.parquet"))


def own_recipe(folder, source, **entries):
    path = write_recipe(folder, **entries)
    (folder / "tiny_parts.py").write_text((folder / "tiny_parts.py").read_text() + FRAGILE)
    path.write_text(path.read_text().replace("tiny_parts:network", f"tiny_parts:{source}"))
    return load_recipe(path)


def test_a_branch_that_diverges_is_nan(tmp_path):
    run = read_run(record(own_recipe(tmp_path, "fragile"), tmp_path / "runs", costs=True))
    assert run.costs.depths.tolist() == [1, 2, 3]
    for ends in (run.costs.loss, run.costs.accuracy):
        assert np.isnan(ends[:, :2]).all()
        assert np.isfinite(ends[:, 2]).all()  # nothing was trained


def test_what_cannot_be_branched_is_said(tmp_path):
    with pytest.raises(RecipeError, match=r"needs a copy of Sequential, and copy\.deepcopy raised RuntimeError"):
        record(own_recipe(tmp_path, "stubborn"), tmp_path / "runs", costs=True)
    with pytest.raises(RecipeError, match="trains for 1 step; expected at least 2"):
        record(tiny_recipe(tmp_path, epochs=0.1), tmp_path / "short", costs=True)


def test_the_command_records_costs(tmp_path):
    path = write_recipe(tmp_path, epochs=3)
    result = invoke(build, "record", path, "--output", tmp_path / "runs", "--threads", 1, "--costs")
    assert result.exit_code == 0, result.output
    assert read_run(tmp_path / "runs" / "tiny.parquet").costs.steps.tolist() == [2, 6, 11, 16]
