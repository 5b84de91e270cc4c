"""Training a predictor further: its weights back out of the file, the pull, old runs mixed in."""

import copy
import dataclasses
import shutil

import numpy as np
import onnx
import pytest
import torch
from builder_fixtures import (
    RULE,
    SMALL,
    invoke,
    labelled,
    labelled_runs,
    recorded_runs,
    write_digit_recipes,
    write_runs,
)

from smartfrz.dataset_builder import labelling
from smartfrz.dataset_builder.building import Base, Material, Plan, build_predictor
from smartfrz.dataset_builder.cli import main as build
from smartfrz.dataset_builder.recipes import load_recipe
from smartfrz.dataset_builder.recording import record
from smartfrz.dataset_builder.storage import read_run
from smartfrz.errors import PredictorFileError
from smartfrz.predictor.contract import REPRESENTATIONS, PredictorInfo, seal
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.export import export, parity, restore
from smartfrz.predictor.training.fit import fit
from smartfrz.predictor.training.judging import mean_auc, score
from smartfrz.predictor.training.model import FreezePredictor
from smartfrz.zoo import embedded_folder

FURTHER = dataclasses.replace(SMALL, learning_rate=5e-4, pull=1000.0)


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    """A predictor of made-up runs, `cnn-a` to `vit-b`."""
    path, old = tmp_path_factory.mktemp("base") / "base.onnx", recorded_runs()
    build_predictor(Material(old, labelled(old), "0" * 64), Plan("base", RULE, SMALL, cross_validate=False), path)
    return path


@pytest.fixture(scope="module")
def base(base_file):
    predictor = Predictor(base_file)
    return Base(predictor.info, predictor.sha256, restore(base_file))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Four real runs: two small networks on sklearn's digits and on MNIST."""
    folder = tmp_path_factory.mktemp("digits")
    return [read_run(record(load_recipe(path), folder / "runs")) for path in write_digit_recipes(folder)]


def new_runs(recorded):
    return labelling.labelled_runs(recorded, RULE, 16)


# Weights out of the file


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_the_network_comes_back_bit_for_bit(tmp_path, representation):
    torch.manual_seed(1)
    model = FreezePredictor(40, representation)
    export(model, PredictorInfo("x", 40, 10, representation, 0.5, 0.1), tmp_path / "x.onnx")
    restored = restore(tmp_path / "x.onnx").state_dict()
    assert list(restored) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, restored[name]), name


def test_the_predictor_of_the_package_comes_back():
    path = embedded_folder() / "smartfrz-base.onnx"
    model = restore(path)
    assert (model.tailored_size, model.representation, model.training) == (1024, "trajectory+loss", False)
    assert parity(model, Predictor(path), seed=5) <= 1e-5


def without_biases(graph):
    for tensor in graph.initializer:
        if tensor.name == "head.4.bias":
            tensor.name = "other"
    for node in graph.node:
        node.input[:] = ["other" if name == "head.4.bias" else name for name in node.input]


def with_another_scale(graph):
    (division,) = [node for node in graph.node if node.op_type == "Softmax" and "confidence" in node.output]
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(2.0), "two"))
    index = list(graph.node).index(division)
    graph.node.insert(index, onnx.helper.make_node("Mul", [division.input[0], "two"], ["scaled"]))
    graph.node[index + 1].input[0] = "scaled"


@pytest.mark.parametrize(
    ("change", "message"), [(without_biases, r"head\.4\.bias"), (with_another_scale, "the answers differ by")]
)
def test_a_file_of_another_network_is_refused(predictor_file, tmp_path, change, message):
    proto = onnx.load(predictor_file)
    change(proto.graph)
    for entry in proto.metadata_props:
        if entry.key == "smartfrz.sha256":
            entry.value = "0" * 64
    path = tmp_path / "other.onnx"
    path.write_bytes(seal(proto.SerializeToString(deterministic=True)))
    with pytest.raises(PredictorFileError, match=rf"cannot be read back into a network.*(?s:.*){message}"):
        restore(path)


# Training further


def test_a_base_that_does_not_fit_is_refused(base):
    runs = labelled_runs()
    for change in ({"tailored_size": 16}, {"representation": "raw"}):
        with pytest.raises(
            ValueError, match=r"`base` reads tailored_size=32 as 'trajectory\+loss', but the options say"
        ):
            fit(runs[1:], runs[:1], dataclasses.replace(SMALL, **change), base=base.network)


def test_the_base_itself_is_left_as_it_is(base, recorded):
    before = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    runs = new_runs(recorded)
    model = fit(runs[1:], runs[:1], FURTHER, base=base.network)
    for name, tensor in base.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_base_that_fits_better_than_all_that_follows_is_kept():
    runs = labelled_runs()
    good = fit(runs[1:], runs[:1], dataclasses.replace(SMALL, epochs=6))
    model = fit(runs[1:], runs[:1], dataclasses.replace(SMALL, epochs=1, learning_rate=5.0), base=good)
    for name, tensor in good.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_old_runs_are_mixed_in_as_often_as_new_ones_and_keep_their_sides(base):
    held = base.info.metrics["validated_on"]
    mixed = dataclasses.replace(base, runs=labelled_runs())
    new = labelled(recorded_runs({"new": "mlp"}))
    train, validation = mixed.split(new, 0)
    assert sorted(run.name for run in validation) == sorted(held)
    names = [run.name for run in train]
    assert sorted(set(names)) == sorted({"new", *base.info.metrics["trained_on"]})
    assert names.count("new") == len(base.info.metrics["trained_on"])


def test_a_base_of_a_base_is_known_to_have_seen_the_first_runs(base):
    metrics = {"trained_on": ["b"], "validated_on": ["c"], "base": {"trained_on": ["a"], "validated_on": ["b", "d"]}}
    facts = dataclasses.replace(base, info=dataclasses.replace(base.info, metrics=metrics)).facts()
    assert (facts["trained_on"], facts["validated_on"]) == (["a", "b"], ["c", "d"])


# The command


def test_a_folder_of_old_runs_is_mixed_in_by_the_command(base_file, tmp_path, recorded):
    from smartfrz.dataset_builder.storage import write_run

    old, new, output = write_runs(tmp_path), tmp_path / "new", tmp_path / "out" / "more.onnx"
    new.mkdir()
    (old / "vit-b.parquet").unlink()
    shutil.copy(old / "cnn-a.parquet", old / "stranger.parquet")
    for run in recorded:
        # 30 records as those of the base, else there is nothing to thin to: one at each of so few steps
        step = np.arange(1, len(run.step) + 1)
        facts = copy.deepcopy(run.facts)
        facts["recipe"]["recording"]["records"] = 30
        write_run(
            new / f"{run.name}.parquet", dataclasses.replace(run, facts=facts, step=step, progress=step / len(step))
        )
    result = invoke(
        build, "train", new, "-o", output, "--base", base_file, "--base-runs", old, "--epochs", 2, "--seed", 1
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "3 of 4 recordings of base are mixed in" in result.stderr
    assert "3 of its 4 recordings were trained on or validated on again" in " ".join(result.stdout.split())
    info = Predictor(output).info
    assert (info.window, info.tailored_size, info.record_fraction) == (8, 32, 1 / 30)
    assert info.metrics["label_rule"] == RULE.to_dict()
    assert info.metrics["base"]["sha256"] == Predictor(base_file).sha256
    used = {*info.metrics["trained_on"], *info.metrics["validated_on"]}
    assert used == {run.name for run in recorded} | {"cnn-a", "cnn-b", "vit-a"}
    assert {*info.metrics["base"]["moved"]} == used
    runs = labelled_runs({"new": "mlp"})
    options = dataclasses.replace(SMALL)
    assert mean_auc(score(Predictor(output), runs, options), runs, options) > 0.8

    (old / "stranger.parquet").unlink()  # or cnn-a would be there twice
    shown = invoke(build, "evaluate", output, old).stdout
    assert "| cnn-a (trained on) |" in shown or "| cnn-a (validated on) |" in shown
    alone = invoke(build, "train", new, "-o", output, "--base", base_file, "--epochs", 1)
    assert "None of its 4 recordings was at hand" in alone.stdout
    shown = invoke(build, "evaluate", output, old).stdout
    assert "(its base trained on)" in shown
    assert "(its base validated on)" in shown
