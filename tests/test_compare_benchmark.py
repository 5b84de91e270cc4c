"""The comparison of all methods, on digits: real training, at a size of seconds."""

import gc
import json
import statistics
import weakref
from pathlib import Path

import numpy as np
import pytest
from benchmark_source import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, frames, pictures
from benchmarks.compare import matthews
from benchmarks.methods import EARLY, METHODS
from benchmarks.tables import FREEZING, standard_error, tables
from benchmarks.tasks import DIGITS, PRETRAINING, TIERS, Benchmark, data_of
from smartfrz import zoo
from smartfrz.adapters.torch import trace_layers
from smartfrz.comparing.lines import read_lines

TASKS = ["vgg-digits", "vit-digits"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, eager_predictor):
    folder = tmp_path_factory.mktemp("compare")
    files = ["--folder", folder, "--results", folder / "digits.jsonl", "--pictures", folder / "pictures"]
    size = ["--samples", 160, "--epochs", 3, "--seeds", 0]
    return [str(part) for part in ("--tier", "digits", *files, *size, "--predictor", eager_predictor)]


@pytest.fixture(scope="module")
def results(arguments):
    compare.main(["pretrain", *arguments])
    compare.main(["run", *arguments])
    return Path(arguments[5])


@pytest.fixture(scope="module")
def lines(results):
    return read_lines(results)


def of(lines, task, method):
    (line,) = [line for line in lines if (line["task"], line["method"]) == (task, method)]
    return line


def backward_flops(task, line, inputs, targets):
    """Of a run, counted anew from what was frozen when."""
    total, frozen = 0, set()
    marks = sorted({0, *(step for step, _, _ in line["events"])})
    for start, end in zip(marks, [*marks[1:], line["steps"]], strict=True):
        frozen |= {layer for step, _, layer in line["events"] if step == start}
        model = DIGITS[task].network(10).eval()
        layers = trace_layers(model, inputs)
        model.train()
        for layer in layers:
            for name in layer.parameters if layer.name in frozen else ():
                model.get_parameter(name).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            loss = cross_entropy(model(inputs), targets)
            forward = counter.get_total_flops()
            loss.backward()
            total += (counter.get_total_flops() - forward) * (end - start)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_method_is_run_and_reported(lines, task):
    full = of(lines, task, "full")
    assert full["steps"] == full["full_steps"] == 3 * (144 // 32)
    for method in METHODS:
        line = of(lines, task, method)
        assert 0 <= line["accuracy"] <= 1
        assert round(line["accuracy"] * line["test_samples"], 6).is_integer()
        assert line["cpu_seconds"] > 0
        assert line["train_seconds"] > 0
        assert line["settings"] == {"samples": 160, "epochs": 3}
        assert (line["train_samples"], line["validation_samples"], line["test_samples"]) == (144, 16, 160)
        assert [step for step, *_ in line["curve"]] == sorted({step for step, *_ in line["curve"]})
        assert line["curve"][-1][0] == line["steps"]
        assert line["memory"][0][0] == 0
        assert line["peak_memory_bytes"] == max(size for _, size in line["memory"])
        assert line["versions"]["torch"] == torch.__version__
        assert "cores" in line["machine"]
        assert (line["total_flops"] is None) == (method == "smartfrz+cache")
        assert bool(line["events"]) <= (method in FREEZING)
    for method in ("smartfrz", "smartfrz-prefix", "smartfrz+cache", "linear"):
        line = of(lines, task, method)
        assert frames.frozen_at(line)
        assert line["backward_flops"] < full["backward_flops"]
        assert line["memory"][-1][1] < full["memory"][-1][1]
        assert line["decision_seconds"] > 0
    assert of(lines, task, "smartfrz+cache")["events"] == of(lines, task, "smartfrz")["events"]
    cka = np.array(full["cka"]["values"])
    assert cka.shape == (len(full["cka"]["steps"]), len(full["layers"]))
    assert np.all(cka[-1] == 1.0)
    assert cka[0].min() < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_flops_are_those_of_the_layers_that_were_trained(lines, task):
    inputs, targets = next(iter(torch.utils.data.DataLoader(data_of(DIGITS[task], 160).train, 32)))
    for method in METHODS:
        line = of(lines, task, method)
        assert line["backward_flops"] == backward_flops(task, line, inputs, targets), method


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_stopping_early_takes_the_share_of_steps_that_smartfrz_took_of_the_time(lines, task):
    early, fast = of(lines, task, "early-stop"), of(lines, task, "smartfrz")
    share = min(1.0, fast["cpu_seconds"] / fast["full_cpu_seconds"])  # a slower run is compared with full training
    assert early["steps"] == max(1, round(share * fast["full_steps"]))
    assert early["time_of_smartfrz"] == early["cpu_seconds"] / fast["cpu_seconds"]
    assert frames.share_of_full(early) == pytest.approx(early["steps"] / early["full_steps"])
    assert of(lines, task, "similarity-guided")["drift"] == early["drift"]
    if share < 1.0:
        rounding = abs(early["time_of_smartfrz"] / early["drift"]["cpu_seconds"] - 1)
        assert rounding <= 0.5 / (share * fast["full_steps"]) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_shorter_full_training_needs_no_other_method(lines, task, tmp_path):
    full = of(lines, task, "full")
    for method, share in EARLY.items():
        line = of(lines, task, method)
        assert line["steps"] == max(1, round(share * full["steps"]))
        assert line["backward_flops"] == full["backward_flops"] / full["steps"] * line["steps"]
        assert not line["events"]
        assert "drift" not in line


@pytest.mark.slow
def test_shorter_full_training_alone_has_no_times_of_full_training(tmp_path):
    job = compare.Job("digits", "vgg-digits", 0, compare.SMOKE, zoo.load("smartfrz-base"), tmp_path, "cpu")
    (line,) = compare.compare(job, ["early-stop-30"], {})
    assert (line["full_train_seconds"], line["full_cpu_seconds"]) == (None, None)
    assert frames.share_of_full(line) == pytest.approx(0.3, abs=0.1)
    assert not job.reference.exists()


@pytest.mark.slow
def test_runs_that_are_there_are_not_repeated_and_others_come_out_the_same(arguments, results, capsys):
    before = results.read_text("utf-8")
    compare.main(["run", *arguments])
    assert results.read_text("utf-8") == before
    assert "| smartfrz-cost_aware | 1 |" in capsys.readouterr().out
    for lost in ("linear", "similarity-guided", "full"):
        kept = [line for line in before.splitlines() if (of([json.loads(line)], *_key(line))["method"] != lost)]
        results.write_text("\n".join(kept) + "\n", "utf-8")
        compare.main(["run", *arguments, "--tasks", "vgg-digits"])
        again = results.read_text("utf-8").splitlines()
        assert again[:-1] == kept
        old, new = of(map(json.loads, before.splitlines()), "vgg-digits", lost), json.loads(again[-1])
        for key in ("method", "accuracy", "events", "steps", "backward_flops", "memory", "last_loss"):
            assert new[key] == old[key]
    results.write_text(before, "utf-8")


def _key(line):
    known = json.loads(line)
    return known["task"], known["method"]


@pytest.mark.slow
def test_pictures_are_drawn_from_the_lines_alone(arguments, results, capsys):
    compare.main(["plots", *arguments])
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.stem for path in written] == list(pictures.PICTURES)
    colours = {path.stem: colours_of(path) for path in written}
    assert all(len(found) > 50 for found in colours.values())
    for name, methods in (("accuracy_over_time", pictures.OVER_TIME), ("accuracy_against_time", METHODS[1:])):
        for method in methods:
            colour = [int(pictures.STYLES[method][0][i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(colours[name] - colour).max(1) < 12).any(), (name, method)


def colours_of(path):
    """The colours of a picture, int64 `[n, 3]`."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(np.int64) @ [65536, 256, 1]
    found = np.unique(pixels)
    return np.stack([found // 65536, found // 256 % 256, found % 256], axis=1)


@pytest.mark.slow
def test_smoke_runs_leave_nothing_behind(tmp_path, monkeypatch, eager_predictor, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--tier", "digits", "--tasks", "vit-digits", "--methods", "full,similarity-guided"]
    compare.main(["run", "--smoke", "--predictor", eager_predictor, *options])
    assert "| digits vit-digits (8 batch_size, 2 epochs, 48 samples) |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_pretrained_weights_a_task_is_left_out(arguments, tmp_path, capsys):
    options = [*arguments, "--folder", str(tmp_path), "--results", str(tmp_path / "r.jsonl"), "--tasks", "vit-digits"]
    compare.main(["run", *options])
    assert "compare pretrain --tier digits --tasks vit-digits" in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()


def made_up(method, seed, accuracy, seconds, **others):
    """A line of a run that nobody has run."""
    line = {"tier": "cpu", "task": "made-up", "seed": seed, "settings": {}, "device": "cpu", "metric": "accuracy"}
    line |= {"predictor": {"name": "p", "sha256": "0"}, "machine": "a machine", "method": method}
    line |= {"accuracy": accuracy, "test_samples": 400, "train_seconds": seconds, "cpu_seconds": seconds}
    line |= {"full_train_seconds": 10.0, "full_cpu_seconds": 10.0, "backward_flops": 100, "total_flops": 200}
    line |= {"memory": [[0, 50], [5, 40]], "peak_memory_bytes": 50, "decision_seconds": 0.1, "events": [], "steps": 10}
    return line | others


def test_differences_are_paired_by_seed():
    lines = [made_up("full", 0, 0.5, 10.0), made_up("full", 1, 0.7, 10.0)]
    lines += [made_up("linear", 1, 0.71, 6.0, backward_flops=60), made_up("linear", 0, 0.49, 4.0, backward_flops=20)]
    table = tables(lines).splitlines()
    row = next(row for row in table if row.startswith("| linear | 2"))
    deviation = statistics.stdev([49, 71])
    error = deviation / np.sqrt(2)
    times = "50.0 ± 14.1 (10.0) %"
    assert (
        f"| 60.0 ± {deviation:.1f} ({error:.1f}) | +0.0 ± 1.4 (1.0) |  | {times} | {times} | 40.0 % | 100.0 % |" in row
    )
    assert "test set (400): 2.4." in "\n".join(table)
    overall = next(row for row in table if row.startswith("| linear | 1"))
    assert overall.endswith("| +0.00 (1.00) | +0.00 (cpu made-up) | 50.0 % |  |  |")


def early(method, seed, accuracy, steps):
    return made_up(method, seed, accuracy, steps, steps=steps, full_steps=10)


def against_early(lines, method):
    return list(frames.frame({"made-up": lines}, (method,))["to_early"].dropna())


def test_stopping_early_is_interpolated_at_the_time_of_each_method_of_each_seed():
    lines = [made_up("full", 0, 0.8, 10.0), early("early-stop-50", 0, 0.7, 5), early("early-stop-30", 0, 0.4, 3)]
    lines += [made_up("full", 1, 0.9, 10.0), early("early-stop-50", 1, 0.8, 5), early("early-stop-30", 1, 0.5, 3)]
    lines += [made_up("linear", 0, 0.6, 4.0), made_up("linear", 1, 0.81, 7.5)]
    assert frames.early_curve([line for line in lines if line["seed"] == 0]) == (
        [0.3, 0.5, 1.0],
        pytest.approx([40.0, 70.0, 80.0]),
    )
    # halfway between 40 and 70; halfway between 80 and 90
    assert against_early(lines, "linear") == pytest.approx([60 - 55, 81 - 85])
    # before the shortest one that was measured, the shortest; of seeds without full training, nothing
    lines += [made_up("autofreeze", 0, 0.5, 1.0), made_up("autofreeze", 2, 0.5, 1.0)]
    assert against_early(lines, "autofreeze") == pytest.approx([50 - 40])
    table = tables(lines)
    assert "| linear | 2 | 70.5 ± 14.8 (10.5) | -14.5 ± 7.8 (5.5) | +0.5 ± 6.4 (4.5) |" in table
    assert "| linear | 1 | -14.50 (5.50) | -14.50 (cpu made-up) | 57.5 % | +0.50 (4.50) | 1 of 1 |" in table
    assert "| early-stop-50 | 1 | -10.00 (0.00) | -10.00 (cpu made-up) | 50.0 % |  |  |" in table
    assert pictures.early_point({"made-up": lines}, "early-stop-30") == pytest.approx((70.0, -40.0))
    assert pictures.early_point({"made-up": lines}, "early-stop-85") is None


def test_the_error_over_tasks_is_that_of_their_seeds():
    mean, error = frames.mean_of_tasks([[1.0, 3.0], [-1.0, 1.0, 0.0]])
    assert mean == 1.0
    assert error == pytest.approx(np.sqrt(2 / 2 + 1 / 3) / 2)
    assert frames.mean_of_tasks([[1.0], [2.0, 4.0]]) == (2.0, None)


def test_runs_of_a_job_share_its_data(tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(DIGITS, "vgg-digits", DIGITS["vgg-digits"]._replace(data=counted(made)))
    path, predictor = tmp_path / "r.jsonl", str(zoo.load("smartfrz-base").path)
    options = ["run", "--tier", "digits", "--tasks", "vgg-digits", "--samples", "48", "--epochs", "1", "--seeds", "0,1"]
    options += ["--methods", "full,early-stop-50", "--folder", str(tmp_path), "--predictor", predictor]
    compare.main([*options, "--results", str(path)])
    assert len(made) == 1
    compare.main([*options, "--results", str(path)])
    assert len(made) == 1  # nothing to do, nothing to read
    gc.collect()
    assert [reference() for reference in made] == [None]


def counted(made):
    def data(most):
        samples, test = DIGITS["vit-digits"].data(most)
        made.append(weakref.ref(samples))
        return samples, test

    return data


def test_standard_errors():
    assert standard_error(made_up("full", 0, 0.5, 1.0)) == pytest.approx(0.025)
    confusion = [[60, 40], [30, 70]]
    line = made_up("full", 0, matthews(confusion), 1.0, metric="matthews", confusion=confusion)
    # about sqrt((1 - r^2) / n) for a correlation of two balanced variables
    assert standard_error(line) == pytest.approx(np.sqrt((1 - 0.3**2) / 200), rel=0.1)


def test_matthews_correlation_is_that_of_scikit_learn():
    from sklearn.metrics import confusion_matrix, matthews_corrcoef

    true, said = np.random.default_rng(0).integers(0, 2, (2, 50))
    assert matthews(confusion_matrix(true, said).tolist()) == pytest.approx(matthews_corrcoef(true, said))
    assert matthews([[5, 0], [3, 0]]) == 0.0


def test_validation_data_is_part_of_the_training_data_and_not_trained_on():
    data = data_of(DIGITS["vgg-digits"], 100)
    train, validation = (set(part.indices) for part in (data.train, data.validation))
    assert not train & validation
    assert train | validation == set(range(100))
    assert data.train.dataset is data.validation.dataset
    pixels = [set(x.numpy().tobytes() for x, _ in part) for part in (data.validation, data.test)]
    assert not pixels[0] & pixels[1]


def test_all_tasks_are_of_known_metrics_and_pretraining():
    numbers = {"cpu": 9, "long": 3, "imagenet": 2, "gpu": 10, "digits": 2}
    assert {tier: len(tasks) for tier, tasks in TIERS.items()} == numbers
    for tasks in TIERS.values():
        for task in tasks.values():
            assert isinstance(task, Benchmark)
            assert task.metric in ("accuracy", "matthews")
            assert task.pretrained is None or task.pretrained in PRETRAINING
            if task.pretrained:
                assert PRETRAINING[task.pretrained].network is task.network


def test_where_samples_do_not_come_back_there_is_no_run_with_a_cache(tmp_path, monkeypatch):
    monkeypatch.setitem(DIGITS, "vgg-digits", DIGITS["vgg-digits"]._replace(repeats=False))
    job = compare.Job("digits", "vgg-digits", 0, compare.SMOKE, zoo.load("smartfrz-base"), tmp_path, "cpu")
    made = compare.compare(job, ["smartfrz+cache", "full"], {})
    assert [line["method"] for line in made] == ["full"]
