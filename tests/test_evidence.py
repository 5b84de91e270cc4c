"""Sweeps of the baselines, one decision explained, and the tables of benchmarks/README.md, at a size of seconds."""

import json
import re

import numpy as np
import pytest
from benchmark_source import ROOT, torch
from builder_fixtures import recorded_run, write_runs
from PIL import Image
from torch.nn.functional import cross_entropy

from benchmarks import compare, costs, explain, paper, tables
from benchmarks.methods import SWEPT
from smartfrz import zoo
from smartfrz.adapters.torch import trace_layers
from smartfrz.comparing.lines import read_lines


def test_sweeps_are_run_once_and_their_lengths_make_them_cost_the_same(tmp_path, capsys):
    results = tmp_path / "r.jsonl"
    command = ["run", "--tier", "digits", "--tasks", "vgg-digits", "--samples", "96", "--epochs", "6", "--seeds", "0"]
    command += ["--methods", "sweeps", "--folder", str(tmp_path), "--results", str(results)]
    compare.main(command)
    lines = {line["method"]: line for line in read_lines(results)}
    assert list(lines) == ["full", *SWEPT]
    steps = [lines[f"linear:{t_0}"]["steps"] for t_0 in (0.3, 0.4, 0.5, 0.6)]
    assert steps == sorted(steps, reverse=True)
    assert steps[2] == lines["full"]["steps"] == lines["autofreeze:3"]["steps"]
    flops = [lines[f"linear:{t_0}"]["total_flops"] for t_0 in (0.3, 0.4, 0.5, 0.6)]
    assert max(flops) / min(flops) < 1.15  # to a step, and to the stage at which a layer freezes
    assert flops[2] < lines["full"]["total_flops"]
    before = results.read_text("utf-8")
    capsys.readouterr()
    compare.main(command)
    assert results.read_text("utf-8") == before
    shown = capsys.readouterr().out
    assert re.search(r"\| 0\.3 \| 1 \| [0-9.]+ \| [0-9.]+ \| 1[0-9]{2} \| 95\.62 % \| 76\.7 % \|", shown)
    assert "| M | seeds |" in shown


def test_the_cost_of_a_step_falls_with_each_layer_that_is_frozen():
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)
    )
    inputs, targets = torch.randn(10, 8), torch.zeros(10, dtype=torch.long)
    layers = trace_layers(model, inputs)
    found = costs.costs_by_frozen(model, lambda twin: cross_entropy(twin(inputs), targets), layers)
    weights = [8 * 16, 16 * 16, 16 * 4]
    forward = 2 * 10 * sum(weights)
    both = 2 * forward + 2 * 10 * sum(weights[1:])  # the first layer passes nothing on
    assert found == [both, both - 2 * 10 * (weights[0] + weights[1]), forward + 2 * 10 * weights[2]]
    assert all(parameter.requires_grad for parameter in model.parameters())
    # frozen at a half, at three quarters, never
    assert costs.mean_cost(found, 0.5) == pytest.approx(0.5 * found[0] + 0.25 * found[1] + 0.25 * found[2])


@pytest.fixture(scope="module")
def decision():
    return explain.decide(zoo.load("smartfrz-base"), recorded_run(layers=12, pool=1024))


def test_a_decision_is_explained_by_what_the_predictor_answered(decision):
    assert decision.confidence >= decision.threshold
    assert decision.attention.sum() == pytest.approx(1.0, abs=1e-5)
    assert len(decision.attention) == len(decision.steps) == len(decision.distances) == len(decision.progress)
    assert decision.distances[-1] == 0.0
    assert np.isnan(decision.steps[0])
    # the last step is the distance of the record before
    assert decision.steps[-1] == pytest.approx(decision.distances[-2], rel=1e-5)
    known = explain.facts(decision)
    assert known["most_attended"][0]["attention"] == pytest.approx(float(decision.attention.max()), abs=1e-4)
    oldest = len(decision.attention) - 1
    assert 0 <= known["mean_records_ago"] <= oldest


def test_the_picture_of_a_decision(tmp_path, capsys):
    write_runs(tmp_path, {"cnn-a": "cnn"}, layers=12, pool=1024)
    explain.main(["--runs", str(tmp_path), "--run", "cnn-a", "--output", str(tmp_path / "a.png")])
    printed = json.loads(capsys.readouterr().out)
    assert printed["run"] == "cnn-a"
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (800, 600)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"would freeze layer99 at no moment in cnn-a; .* one of its layers: layer0, "):
        explain.decide(zoo.load("smartfrz-base"), recorded_run(layers=4, pool=1024), "layer99")


def test_the_readme_has_all_parts_and_is_what_the_results_say():
    tables.main(["--check"])


def line(method, seed, accuracy, seconds, **others):
    """A line of a run that nobody has run."""
    made = {"tier": "cpu", "task": "minilm-mrpc", "seed": seed, "settings": {}, "device": "cpu", "metric": "accuracy"}
    made |= {"predictor": {"name": "p", "sha256": "0"}, "machine": "a machine", "method": method, "full_steps": 10}
    made |= {"accuracy": accuracy, "test_samples": 400, "train_seconds": seconds, "cpu_seconds": seconds}
    made |= {"full_train_seconds": 10.0, "full_cpu_seconds": 10.0, "backward_flops": 100, "total_flops": 200}
    made |= {"memory": [[0, 50], [5, 40]], "peak_memory_bytes": 50, "decision_seconds": 0.1, "events": [], "steps": 10}
    return made | others


def test_parts_are_written_from_the_lines_alone(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    lines = [line("full", 0, 0.8, 10.0), line("early-stop-50", 0, 0.7, 5.0, steps=5), line("smartfrz", 0, 0.76, 7.5)]
    lines[2] |= {"total_flops": 120, "layers": ["a", "b"], "events": [[3, "freeze", "a"]]}
    (tmp_path / "results" / "cpu.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), "utf-8")
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "benchmarks" / "README.md").read_text("utf-8"), "utf-8")
    with pytest.raises(SystemExit, match=r"is not what the results say; run: python -m benchmarks\.tables"):
        tables.main(["--check", "--folder", str(tmp_path)])
    tables.main(["--folder", str(tmp_path)])
    text = readme.read_text("utf-8")
    assert "| cpu minilm-mrpc | smartfrz | 76.0 | -4.0 | 75.0 % | 60.0 % | +1.0 |" in text
    assert "| cpu minilm-mrpc | smartfrz | 2 | 30 |  | 1.0 |" in text
    assert text.index("## Table 6") < text.index("| cpu minilm-mrpc | smartfrz |") < text.index("## Tables 8 and 9")
    tables.main(["--check", "--folder", str(tmp_path)])
    readme.unlink()
    with pytest.raises(SystemExit):
        tables.main(["--folder", str(tmp_path)])
    assert "README.md does not exist; expected the file" in capsys.readouterr().err


def test_on_a_gpu_flops_stand_beside_the_time_and_the_summary_is_of_cpus_alone(tmp_path):
    gpu = {"tier": "gpu", "task": "vgg11-cifar10", "device": "cuda"}
    lines = [line("full", 0, 0.8, 10.0, **gpu), line("early-stop-50", 1, 0.7, 5.0, steps=5, **gpu)]
    lines.append(line("smartfrz", 0, 0.76, 8.0, backward_flops=50, total_flops=120, **gpu))
    lines.append(line("smartfrz+cache", 0, 0.75, 5.0, backward_flops=50, total_flops=None, **gpu))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gpu.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), "utf-8")
    made = tables.sections(tmp_path)
    assert "| gpu vgg11-cifar10 | smartfrz | 50 % | 60 % | 80 % | 1.2 % |" in made["gpu"]
    assert "| gpu vgg11-cifar10 | smartfrz+cache | 50 % |  | 50 % | 2.0 % |" in made["gpu"]
    assert "| gpu vgg11-cifar10 | early-stop-50 | 70.0 |  | 50.0 % |" in made["gpu"]
    assert made["summary"] == tables.NOTHING


def test_other_predictors_stand_beside_the_base_and_the_full_runs_of_their_seeds():
    events = [[2, "freeze", "a"], [6, "freeze", "b"]]
    known = [line("full", 0, 0.8, 10.0), line("full", 1, 0.7, 10.0)]
    known.append(line("smartfrz", 0, 0.76, 7.5, total_flops=100, events=events))
    other = {"name": "q", "sha256": "1"}
    ran = [line("smartfrz", seed, 0.79, 9.0, total_flops=150, events=events[1:], predictor=other) for seed in (0, 1, 2)]
    *_, base, found = tables.other_predictors(ran, known).splitlines()
    assert base == "| cpu minilm-mrpc | p | 76.0 | -4.0 | 50.0 % | 40 % of the run |"
    assert found.startswith(
        "| cpu minilm-mrpc | q | 79.0 ± 0.0 (0.0) | +4.0 ± 7.1 (5.0) | 75.0 ± 0.0 (0.0) % | 60 % of"
    )
    assert tables.other_predictors([], known) == tables.NOTHING


def test_the_papers_rows_are_relative_to_full_training():
    made = tables.of_paper(paper.TABLE_2).splitlines()
    assert "| ResNet50, CIFAR-10 | Full Training | 96.10 |  | 100.0 % | 100.0 % |" in made
    assert "| VGG11, CIFAR-10 | SmartFRZ | 93.58 | +0.22 | 57.6 % | 43.8 % |" in made
    assert "| BERT-base, MRPC | Linear Freezing | 85.80 | -0.71 | 69.9 % |  |" in tables.of_paper(paper.TABLE_6)


def test_marks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"The marks are \['a'\]; expected each of \['b'\] once"):
        tables.filled("<!-- begin a -->\n<!-- end a -->", {"b": "x"})
    with pytest.raises(ValueError, match="has no `<!-- end a -->` after it"):
        tables.filled("<!-- begin a -->\n", {"a": "x"})
    assert tables.filled("<!-- begin a -->\nold\n<!-- end a -->!", {"a": r"\1 new"}) == (
        "<!-- begin a -->\n\\1 new\n<!-- end a -->!"
    )
