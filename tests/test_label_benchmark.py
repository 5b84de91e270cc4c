"""`benchmarks.labels`: what freezing by predictors of other labels would have cost, at a size of seconds."""

import hashlib

import numpy as np
import pytest
from benchmark_source import ROOT
from builder_fixtures import PLAN, recorded_run
from test_freeze_costs import costs_of, monotone
from test_labelling import with_costs

from benchmarks import labels
from benchmarks.labels import at_one_threshold, at_own_threshold, best_schedule, main, right_freezes
from smartfrz.comparing.lines import add_line, read_lines
from smartfrz.dataset_builder.costs import judge
from smartfrz.dataset_builder.datasets import PathOptions, with_paths, write_dataset

assert ROOT
FOUND = {
    "a": {
        "points": [4.0, 2.0, 0.0],
        "computation": [0.4, 0.6, 1.0],
        "right": [0.2, 0.6, None],
        "frozen": [0.8, 0.4, 0.0],
    },
    "b": {
        "points": [2.0, 0.0, 0.0],
        "computation": [0.6, 1.0, 1.0],
        "right": [0.6, 1.0, None],
        "frozen": [0.4, 0.0, 0.0],
    },
}


@pytest.mark.parametrize("price", [0.5, 3.0, 10.0, 40.0])
def test_in_hindsight_no_other_schedule_is_better(price):
    costs = costs_of(monotone())
    moments = np.array([0.2, 0.4, 0.6, 0.8])

    def worth(schedule):
        judged = judge(costs, schedule)
        return judged.saved - price * judged.cost

    best = worth(best_schedule(costs, price, moments))
    rng = np.random.default_rng(0)
    for _ in range(200):
        depths = np.sort(rng.integers(0, costs.num_layers, len(moments)))
        assert worth(list(zip(moments.tolist(), depths.tolist(), strict=True))) <= best + 1e-9


def test_where_accuracy_is_dear_nothing_is_frozen():
    assert best_schedule(costs_of(monotone(0.1)), 1e6) == []


def test_one_threshold_for_all_runs_and_one_for_each():
    # at the second threshold 0.8 of the computation is left, and 1 point is lost in the mean
    assert at_one_threshold(FOUND, 0.8) == pytest.approx(1.0)
    # at 0.8 the first run loses 1 point, the second one 1
    assert at_own_threshold(FOUND, 0.8) == pytest.approx(1.0)
    assert right_freezes(FOUND, 0.2) == pytest.approx(0.8)


def test_all_kinds_of_labels_are_judged_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(labels, "TrainingOptions", lambda **given: labels_options(**given))
    options = PathOptions(tailored_size=32, draws=1)
    runs = [with_costs(recorded_run(name, kind, seed=i)) for i, (name, kind) in enumerate(PLAN.items())]
    dataset, results = tmp_path / "d.parquet", tmp_path / "r.jsonl"
    write_dataset(dataset, [with_paths(run, options) for run in runs], options)
    command = ["run", "--dataset", str(dataset), "--results", str(results), "--groups", "architecture", "--seeds", "0"]
    command += ["--epochs", "1"]
    main([*command, "--loss", "without"])
    lines = read_lines(results)
    assert [line["group"] for line in lines] == ["none", "architecture", "architecture", "architecture"]
    assert [line["labels"].get("source", "cka") for line in lines[1:]] == ["cka", "costs", "both"]
    for line in lines[1:]:
        assert set(line["held_out"]["predictor"]) == set(PLAN)
    shown = capsys.readouterr().out
    assert shown.count("| predictor |") == 3
    assert shown.count("| hindsight |") == 1
    main([*command, "--labels", "costs"])
    with_loss = read_lines(results)[len(lines) :]
    assert [(line["group"], line["loss"]) for line in with_loss] == [("architecture", True)]
    assert "| costs, with the loss | predictor |" in capsys.readouterr().out
    before = results.read_bytes()
    main([*command, "--labels", "costs", "--loss", "both"])
    assert results.read_bytes() == before


def written(points, *, seed=0, digest="d", **facts):
    method = {name: one | {"points": points} for name, one in FOUND.items()}
    rule = {
        "kind": "forward",
        "tolerance": 0.02,
        "records": 10,
        "source": "costs",
        "cost_limit": facts.pop("limit", 0.5),
    }
    held_out, errors = dict.fromkeys(labels.METHODS, method), dict.fromkeys(labels.METHODS, 0.1)
    line = {"group": "architecture", "seed": seed, "labels": rule, "dataset": digest}
    return line | facts | {"held_out": held_out, "calibration_error": errors}


def test_what_was_measured_otherwise_is_in_rows_of_its_own():
    same = [written([4.0, 2.0, 0.0], seed=seed, epochs=4) for seed in (0, 1)]
    others = [
        written([9.0, 9.0, 9.0], **one) for one in ({}, {"epochs": 1}, {"epochs": 4, "digest": "e"}, {"limit": 2.0})
    ]
    rows = [row for row in labels.table([*same, *others]) if row["method"] == "predictor"]
    assert [row["seeds"] for row in rows] == ["2", "1", "1", "1", "1"]
    assert [row["labels"] for row in rows] == [
        "costs, up to 0.5 points, 4 epochs, dataset d",
        "costs, up to 0.5 points, 10 epochs, dataset d",
        "costs, up to 0.5 points, 1 epochs, dataset d",
        "costs, up to 0.5 points, 4 epochs, dataset e",
        "costs, up to 2 points, 10 epochs, dataset d",
    ]
    assert [row["labels"] for row in labels.table(same) if row["method"] == "predictor"] == ["costs"]


def test_a_round_of_fewer_epochs_does_not_pass_for_one_of_all(tmp_path, monkeypatch):
    options = PathOptions(tailored_size=32, draws=1)
    dataset, results = tmp_path / "d.parquet", tmp_path / "r.jsonl"
    runs = [with_costs(recorded_run(name, kind, seed=i)) for i, (name, kind) in enumerate(PLAN.items())]
    write_dataset(dataset, [with_paths(run, options) for run in runs], options)
    add_line(results, written([4.0, 2.0, 0.0], digest=hashlib.sha256(dataset.read_bytes()).hexdigest(), epochs=1))
    monkeypatch.setattr(labels, "leave_one_out", lambda *given, **more: pytest.fail("training"))
    command = ["run", "--dataset", str(dataset), "--results", str(results), "--labels", "costs"]
    command += ["--groups", "architecture", "--seeds", "0", "--loss", "without"]
    main([*command, "--epochs", "1"])
    with pytest.raises(pytest.fail.Exception, match="training"):
        main(command)


@pytest.mark.parametrize("limit", ["nan", "-1", "100"])
def test_a_limit_that_is_none_is_said_at_once(tmp_path, limit):
    with pytest.raises(SystemExit, match=r"points from 0 to less than 100"):
        main(["run", "--limit", limit, "--results", str(tmp_path / "r.jsonl")])
    assert not (tmp_path / "r.jsonl").exists()


def test_a_dataset_without_costs_cannot_be_judged(tmp_path):
    options = PathOptions(tailored_size=32, draws=1)
    write_dataset(tmp_path / "d.parquet", [with_paths(recorded_run(), options)], options)
    with pytest.raises(SystemExit, match="0 recordings with costs; expected at least 3"):
        main(["run", "--dataset", str(tmp_path / "d.parquet"), "--results", str(tmp_path / "r.jsonl")])


def labels_options(**given):
    from smartfrz.predictor.training.runs import TrainingOptions

    return TrainingOptions(window=8, tailored_size=32, steps_per_epoch=4, **given)
