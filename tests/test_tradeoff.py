"""The tradeoff of `benchmarks.compare` on the digits of scikit-learn, and what it shows of made-up lines."""

import re

import pytest
from benchmark_source import torch  # noqa: F401  (or the tests are skipped)
from PIL import Image

from benchmarks import compare, pictures, tables
from benchmarks.methods import TRADEOFF
from smartfrz.comparing.lines import read_lines

SMALL = ("--tier", "digits", "--tasks", "vgg-digits", "--samples", "96", "--epochs", "6", "--seeds", "0")


def line(method, accuracy, share, seed=0, task="a"):
    early = method.startswith("early")
    return {
        "tier": "cpu", "task": task, "settings": {}, "predictor": {"name": "p", "sha256": "0"}, "device": "cpu",
        "metric": "accuracy", "method": method, "seed": seed, "accuracy": accuracy, "cpu_seconds": 100 * share,
        "full_cpu_seconds": 100.0, "steps": round(100 * share) if early else 100, "full_steps": 100,
    }  # fmt: skip


def lines_of(task, seed=0):
    made = [line("full", 0.8, 1.0), line("early-stop-50", 0.7, 0.5), line("smartfrz", 0.79, 0.6)]
    made += [line(name, 0.78 - 0.01 * i, 0.8 - 0.1 * i) for i, name in enumerate(TRADEOFF)]
    return [x | {"task": task, "seed": seed} for x in made]


def test_the_settings_are_run_once_and_differ_in_threshold_and_length(tmp_path, capsys):
    compared, results = tmp_path / "c.jsonl", tmp_path / "t.jsonl"
    # Such a small network freezes at confidences that this predictor reaches.
    predictor = ("--predictor", "smartfrz-vision")
    methods = (
        "--methods",
        "full,smartfrz,early-stop-50",
        "--results",
        str(compared),
        "--folder",
        str(tmp_path),
        *predictor,
    )
    compare.main(["run", *SMALL, *methods])
    command = [
        *SMALL,
        *predictor,
        "--methods",
        "tradeoff",
        "--results",
        str(results),
        "--compared",
        str(compared),
        "--folder",
        str(tmp_path),
    ]
    compare.main(["run", *command])
    lines = {x["method"]: x for x in read_lines(results)}
    assert list(lines) == list(TRADEOFF)
    whole = lines["threshold-0.5"]["full_steps"]
    for name, setting in TRADEOFF.items():
        assert lines[name]["steps"] == round(setting.get("share", 1.0) * whole)
    flops = [lines[f"threshold-{threshold}"]["total_flops"] for threshold in (0.5, 0.85, 0.95)]
    assert flops == sorted(flops)
    assert flops[0] < flops[2]
    before = results.read_text("utf-8")
    capsys.readouterr()
    compare.main(["run", *command])
    assert results.read_text("utf-8") == before
    assert re.search(r"\| threshold-0\.5 \| 1 \| [+-][0-9.]+ \| .* \| [0-9.]+ % \| [+-]", capsys.readouterr().out)

    path = tmp_path / "new" / "tradeoff.png"
    compare.main(["plots", *command, "--pictures", str(path.parent)])
    assert capsys.readouterr().out == f"{path}\n"
    with Image.open(path) as picture:
        assert min(picture.size) > 400


def test_only_tasks_with_all_settings_are_in_the_means():
    whole = lines_of("a") + lines_of("a", 1)
    part = [x for x in lines_of("b") if x["method"] != "threshold-0.5"]
    assert tables.tradeoff(whole + part) == tables.tradeoff(whole)
    assert "| threshold-0.85 | 1 | -3.00 (0.00) | -3.00 (cpu a) | 70.0 % | +3.00 (0.00) | 1 of 1 |" in tables.tradeoff(
        whole
    )


def test_points_are_means_of_tasks_and_none_where_a_task_lacks_the_method():
    groups = tables.with_all_settings(lines_of("a") + lines_of("a", 1) + lines_of("b") + lines_of("b", 1))
    assert pictures.tradeoff_point(groups, "smartfrz") == pytest.approx((60.0, -1.0, 0.0))
    assert pictures.tradeoff_point(groups, "linear") is None
    groups["cpu b"] = [x for x in groups["cpu b"] if x["method"] != "smartfrz"]
    assert pictures.tradeoff_point(groups, "smartfrz") is None


def test_without_results_it_says_so(tmp_path, capsys):
    assert tables.tradeoff([]) == tables.tradeoff(lines_of("a")[:3]) == "No task has all settings yet."
    nothing = str(tmp_path / "none.jsonl")
    given = ["--methods", "tradeoff", "--results", nothing, "--compared", nothing]
    compare.main(["plots", *given, "--pictures", str(tmp_path / "pictures")])
    assert capsys.readouterr().out == "No task has all settings yet.\n"
    assert not list(tmp_path.iterdir())
