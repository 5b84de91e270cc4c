"""Learning rates of the benchmarks' tasks: real training on digits, at a size of seconds."""

import pytest
from benchmark_source import torch

from benchmarks import rates, tables
from benchmarks.compare import Job
from smartfrz.comparing.lines import read_lines

SIZE = {"samples": 96, "epochs": 2}


def job(name="vgg-digits"):
    return Job("digits", name, rates.SEED, SIZE, predictor=None, folder=None, device="cpu")


def test_each_rate_is_trained_once_and_judged_on_validation_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rates, "GRIDS", {"SGD": (1e-5, 0.03)})
    results = tmp_path / "rates.jsonl"
    command = ["run", "--tier", "digits", "--tasks", "vgg-digits", "--samples", "400", "--epochs", "6"]
    rates.main([*command, "--results", str(results)])
    lines = read_lines(results)
    found = {line["rate"]: line["validation"] for line in lines}
    assert {1e-5, 0.03} <= set(found)
    assert found[0.03] > found[1e-5]
    assert {line["samples"] for line in lines} == {40}  # a tenth of the training data
    assert {line["seed"] for line in lines} == {rates.SEED}
    before = results.read_text("utf-8")
    shown = capsys.readouterr().out
    assert "| vgg-digits | 1e-05: " in shown
    assert shown.rstrip().endswith("| 0.05 |")  # the task's own
    rates.main([*command, "--results", str(results)])
    assert results.read_text("utf-8") == before


def test_the_rate_reaches_the_optimizer(monkeypatch):
    seen = []
    real = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: seen.append(self.param_groups[0]["lr"]) or real(self))
    (line, *_) = rates.rate_lines(job(), {0.01: 0.5, 0.03: 0.5, 0.1: 0.5})
    assert line["rate"] == 0.003
    assert seen[0] == pytest.approx(0.003)


@pytest.mark.parametrize(
    ("known", "new"),
    [
        ({0.003: 0.9, 0.01: 0.5, 0.03: 0.2, 0.1: 0.1}, 0.001),
        ({0.003: 0.1, 0.01: 0.2, 0.03: 0.3, 0.1: 0.9}, 0.3),
        ({0.003: 0.1, 0.01: 0.9, 0.03: 0.3, 0.1: 0.2}, None),
        ({0.003: 0.0, 0.01: 0.0, 0.03: 0.0, 0.1: 0.0}, None),  # nothing is learned at any rate
    ],
)
def test_the_grid_grows_where_its_edge_is_best(known, new):
    assert next((line["rate"] for line in rates.rate_lines(job(), known)), None) == new


def test_of_equal_rates_the_smallest_is_taken():
    assert rates.best_rate({0.1: 0.5, 0.01: 0.7, 0.03: 0.7}) == 0.01


def test_without_measurements_there_is_no_table():
    assert tables.rates([], "cpu", {}) == ""
