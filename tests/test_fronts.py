"""Time to the same accuracy: what is read off fronts that are known, and a run of it on digits."""

import json
import math

import numpy as np
import pytest
from benchmark_source import torch  # noqa: F401  (or the tests are skipped)
from PIL import Image

from benchmarks import fronts, tables
from benchmarks import time_to_accuracy as reading
from smartfrz import zoo
from smartfrz.comparing.lines import read_lines
from smartfrz.predictor.contract import PredictorInfo

PREDICTOR = "p 012345"
SMALL = ("--tier", "digits", "--tasks", "vgg-digits", "--samples", "96", "--epochs", "6")


def line(method, accuracy, share, seed=0, kind="freezing", task="a"):
    return {
        "tier": "cpu", "task": task, "settings": {}, "training": {"epochs": 1}, "norm_batches": 24, "device": "cpu",
        "method": method, "kind": kind, "seed": seed, "accuracy": accuracy, "steps": round(100 * share), "full_steps": 100,
        "cpu_seconds": 100 * share, "train_seconds": 100 * share, "pace": {"cpu_seconds": 1.0, "train_seconds": 1.0},
        "machine": "m",
    }  # fmt: skip


def lines_of(seed=0, gain=0.0, task="a"):
    """Plain training reaches 80 % in 80 % of the time, and loses afterwards."""
    plain = [(0.5, 0.6), (0.8, 0.8)]
    made = [line(f"{100 * t:g} % of the steps", a, t, seed, "fewer", task) for t, a in plain]
    made.append(line("full training", 0.79, 1.0, seed, "full", task))
    made.append(line("grades, 100 %", 0.7, 0.9, seed, task=task))
    made += [line(f"{PREDICTOR}, x, {t:g} %", a + gain, t / 100, seed, task=task) for t, a in ((40, 0.7), (60, 0.9))]
    made += [line(f"{PREDICTOR}, y, {t:g} %", a + gain, t / 100, seed, task=task) for t, a in ((32, 0.7), (90, 0.75))]
    return made


def test_a_front_leaves_out_what_is_slower_and_worse():
    front = reading.Front.over([0.5, 0.3, 0.8, 0.6, 0.6], [0.7, 0.4, 0.8, 0.6, 0.5])
    np.testing.assert_array_equal(front.times, [0.3, 0.5, 0.8])
    np.testing.assert_array_equal(front.accuracies, [0.4, 0.7, 0.8])
    assert front.time_to(0.75) == pytest.approx(0.65)
    assert front.time_to(0.1) == 0.3
    assert front.time_to(0.8) == 0.8
    assert math.isinf(front.time_to(0.81))


def test_the_time_is_that_to_the_best_of_plain_training_over_the_shortest_of_plain_training():
    found = reading.groups_of(lines_of())[PREDICTOR]["cpu a"]
    groups = found.groups()
    assert found.front(found.plain).accuracies[-1] == 0.8
    assert list(groups) == ["grades", f"{PREDICTOR}, x", f"{PREDICTOR}, y", reading.ANY]
    ratios = {name: found.time_to_same(group) for name, group in groups.items()}
    assert ratios[f"{PREDICTOR}, x"] == ratios[reading.ANY] == pytest.approx(0.5 / 0.8)  # half way between its two runs
    assert math.isinf(ratios["grades"])
    assert math.isinf(ratios[f"{PREDICTOR}, y"])
    # 78 % are reached by plain training before 80 % are, too
    expected = (0.4 + 0.2 * 0.4) / (0.5 + 0.3 * 0.9)
    assert found.time_to_same(groups[f"{PREDICTOR}, x"], 0.02) == pytest.approx(expected)


def test_plain_training_is_as_fast_as_itself_in_every_sample_of_the_seeds():
    found = reading.groups_of([x for seed in range(3) for x in lines_of(seed, 0.02 * seed)])[PREDICTOR]["cpu a"]
    assert found.seeds == 3
    values = reading.distribution(found, [found.plain])
    assert len(values) == reading.DRAWS
    assert reading.interval(values) == (1.0, 1.0)


def test_the_interval_holds_what_the_seeds_say_and_is_the_same_each_time():
    lines = [x for seed in range(3) for x in lines_of(seed, -0.05 * seed)]
    found = reading.groups_of(lines)[PREDICTOR]["cpu a"]
    group = found.groups()[f"{PREDICTOR}, x"]
    low, high = reading.interval(reading.distribution(found, group))
    middle = found.time_to_same(group)
    assert low == pytest.approx(0.5 / 0.8)  # of the first seed alone
    assert low < middle < high
    assert high == pytest.approx(0.6 / 0.8)  # of the last seed alone
    assert (low, high) == reading.interval(reading.distribution(found, group))


def test_seeds_without_all_methods_are_left_out():
    lines = lines_of(0) + lines_of(1)[:-1]
    assert reading.groups_of(lines)[PREDICTOR]["cpu a"].seeds == 1
    assert reading.groups_of(lines_of(1)[:2]) == {}


def test_the_table_says_what_is_not_reached_and_the_mean_of_what_is():
    lines = [x for task in ("a", "b") for seed in (0, 1) for x in lines_of(seed, task=task)]
    shown = tables.fronts(lines)
    assert (
        "| cpu a | 2 | 80.0 % in 80 % of its time | not reached [not reached, not reached] | 0.62 [0.62, 0.62] |"
        in shown
    )
    assert (
        "| geometric mean |  |  | reached on 0 of 2 | 0.62 [0.62, 0.62] | reached on 0 of 2 | 0.62 [0.62, 0.62] |"
        in shown
    )
    assert "to the same accuracy less 0.5 points" in shown
    assert tables.fronts([]) == tables.NOTHING


def test_a_mean_over_some_of_the_tasks_says_so():
    lines = lines_of() + [x for x in lines_of(task="b") if ", x, " not in x["method"]]
    assert "| 0.62 (1 of 2 tasks) |" in tables.fronts(lines)


def test_everything_is_run_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fronts, "THRESHOLDS", (None, 0.3))
    monkeypatch.setattr(fronts, "SHARES", (100, 50))
    results = tmp_path / "fronts.jsonl"
    command = [*SMALL, "--results", str(results), "--folder", str(tmp_path), "--settings", "thresholds"]
    fronts.main(["run", *command, "--seeds", "0", "--cache"])
    lines = read_lines(results)
    assert len(lines) == 5 + 2 * (2 * 2 + 2)  # shares of thresholds, each with and without the cache, and rivals
    assert {line["norm_batches"] for line in lines} == {24}
    steps = {line["method"]: line["steps"] for line in lines}
    whole = steps["full training"]
    assert {number for name, number in steps.items() if name.endswith(", 50 %")} == {round(whole / 2)}
    before = results.read_bytes()
    fronts.main(["run", *command, "--seeds", "0", "--cache"])
    assert results.read_bytes() == before
    shown = capsys.readouterr().out
    assert "| digits vgg-digits (6 epochs, 96 samples) | 1 |" in shown

    # what an interrupted run lacks is added; another predictor trains its own methods only
    results.write_text("".join(json.dumps(x) + "\n" for x in lines if x["method"] != "grades, 50 %"), "utf-8")
    fronts.main(["run", *command, "--seeds", "0", "--predictor", "smartfrz-tiny"])
    again = read_lines(results)
    new = [x["method"] for x in again[len(lines) - 1 :]]
    assert "grades, 50 %" in new
    assert len(new) == 1 + 4
    assert len(reading.groups_of(again)) == 2

    picture = tmp_path / "fronts.png"
    fronts.main(["picture", *command, "--picture", str(picture)])
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 300


def test_qualities_need_a_predictor_that_is_calibrated(tmp_path):
    job = fronts.Job("digits", "vgg-digits", 0, {}, zoo.load("smartfrz-vision"), tmp_path, "cpu", 24)
    assert isinstance(job.predictor.info, PredictorInfo)
    shown = [method.name.partition(", ")[2] for method in fronts.methods_for(job, rivals=(), shares=[100])]
    assert shown[4:] == [f"{name}, 100 %" for name in ("own threshold", "threshold 0.3", "threshold 0.2")]
    with pytest.raises(ValueError, match=r"is not calibrated for same, balanced, fast; expected .* --settings"):
        fronts.methods_for(job, "qualities")
