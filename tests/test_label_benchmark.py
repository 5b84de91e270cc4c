"""`benchmarks.labels`: what freezing by predictors of other labels would have cost, at a size of seconds."""

import numpy as np
import pytest
from benchmark_source import ROOT
from builder_fixtures import PLAN, recorded_run
from test_freeze_costs import costs_of, monotone
from test_labelling import with_costs

from benchmarks import labels
from benchmarks.labels import at_one_threshold, at_own_threshold, best_schedule, main, right_freezes
from smartfrz.comparing.lines import read_lines
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
    main([*command, "--epochs", "1"])
    lines = read_lines(results)
    assert [line["group"] for line in lines] == ["none", "architecture", "architecture", "architecture"]
    assert [line["labels"].get("source", "cka") for line in lines[1:]] == ["cka", "costs", "both"]
    for line in lines[1:]:
        assert set(line["held_out"]["predictor"]) == set(PLAN)
    shown = capsys.readouterr().out
    assert shown.count("| predictor |") == 3
    assert shown.count("| hindsight |") == 1
    before = results.read_bytes()
    main([*command, "--epochs", "1"])
    assert results.read_bytes() == before


def labels_options(**given):
    from smartfrz.predictor.training.runs import TrainingOptions

    return TrainingOptions(window=8, tailored_size=32, steps_per_epoch=4, **given)
