"""The paper's Tables 4 and 5, Fig. 3 and Appendix C, at a size of seconds."""

import numpy as np
import pytest
from benchmark_source import torch
from builder_fixtures import write_runs
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import predictor_tables
from benchmarks.predictor_tables import SIZES, distances, main
from benchmarks.tables import mean_auc
from smartfrz import zoo
from smartfrz.comparing.lines import read_lines
from smartfrz.predictor.training.cross_validation import METHODS


@pytest.fixture
def results(tmp_path):
    return tmp_path / "r.jsonl"


def test_windows_and_sizes_are_judged_on_architectures_that_were_held_out(tmp_path, results, monkeypatch, capsys):
    write_runs(tmp_path / "runs", timestamps=60, pool=64)
    smaller = {
        "window": [{"window": window, "tailored_size": 16, "records": 60} for window in (20, 40)],
        "size": [{"window": 30, "tailored_size": size, "records": 30} for size in (16, 32)],
    }
    monkeypatch.setattr(predictor_tables, "TABLES", smaller)
    command = ["run", "--runs", str(tmp_path / "runs"), "--results", str(results), "--epochs", "1", "--steps", "4"]
    main(command)
    lines = read_lines(results)
    assert [(line["window"], line["tailored_size"]) for line in lines] == [(20, 16), (40, 16), (30, 16), (30, 32)]
    for line in lines:
        assert list(line["held_out"]) == ["cnn", "transformer"]
        assert all(list(methods) == list(METHODS) for methods in line["held_out"].values())
        assert 0 <= mean_auc(line, "predictor") <= 1
        assert line["runs"] == ["cnn-a", "cnn-b", "vit-a", "vit-b"]
    before = results.read_text("utf-8")
    capsys.readouterr()
    main(command)
    assert results.read_text("utf-8") == before
    shown = capsys.readouterr().out
    assert "| attention window | 20 | 40 |" in shown
    value = mean_auc(lines[1], "predictor")
    assert any(row.startswith("| ours, AUC (") and f" {value:.3f} |" in row for row in shown.splitlines())
    assert "| paper, accuracy of VGG11 on CIFAR-100 | 73.98 % |" in shown


def test_a_random_subset_is_as_near_as_chance_allows_and_another_distribution_is_not():
    gradient = np.random.default_rng(0).standard_t(3, 50_000).astype(np.float32)
    near = distances("layer", gradient)
    assert list(near) == [str(size) for size in SIZES]
    assert near["1024"]["ks"] < 1.63 / np.sqrt(1024)  # 1 % of samples lie farther
    assert near["4096"]["wasserstein"] < 0.1
    assert list(distances("layer", gradient[:600])) == ["512"]
    other = gradient.copy()
    positions = predictor_tables.tailoring_positions("layer", len(gradient), 1024)
    other[positions] += 2 * gradient.std()
    assert distances("layer", other, [1024])["1024"]["ks"] > 0.5
    assert distances("layer", other, [1024])["1024"]["wasserstein"] > 1.5


def test_gradients_are_those_of_a_real_training(tmp_path, results, capsys):
    command = ["figure", "--tier", "digits", "--task", "vgg-digits", "--samples", "96", "--results", str(results)]
    main([*command, "--pictures", str(tmp_path / "pictures")])
    (line,) = read_lines(results)
    steps = sorted({one["step"] for one in line["layers"]})
    assert len(steps) == 5
    assert len(line["layers"]) == 5 * len({one["layer"] for one in line["layers"]})
    assert all(set(one["distances"]) <= {str(size) for size in SIZES} for one in line["layers"])
    assert max(one["weights"] for one in line["layers"]) > 2048
    with Image.open(tmp_path / "pictures" / "gradient_distribution.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert "| vgg-digits | 1024 |" in capsys.readouterr().out


def test_costs_are_measured(results, capsys):
    main(["costs", "--results", str(results)])
    base, raw = read_lines(results)
    known = zoo.load(zoo.DEFAULT)
    assert base["file_bytes"] == known.path.stat().st_size
    assert base["sha256"] == known.seal
    # three MLPs over 30 records and one query's, two operations a weight
    mlp = 1024 * 256 + 256 * 256 + 256 * 64
    assert raw["flops_per_layer"] == pytest.approx(2 * mlp * (30 + 30 + 1), rel=0.02)
    assert raw["parameters"] == pytest.approx(3 * mlp, rel=0.02)
    assert raw["history_bytes"] >= 54 * 30 * 1024 * 4
    assert base["milliseconds"] > 0
    shown = capsys.readouterr().out
    assert f"| {raw['flops_per_layer'] / 1e9:.3f} GFLOPs | 216 KiB |" in shown
    assert "0.12 GFLOPs" in shown


def test_flops_of_an_answer_grow_with_the_layers():
    from smartfrz.predictor.training.model import FreezePredictor

    counts = []
    for layers in (1, 3):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            FreezePredictor(64)(torch.randn(layers, 8, 64), torch.full((layers,), 8))
        counts.append(counter.get_total_flops())
    assert counts[1] == 3 * counts[0]
