import shutil
from dataclasses import replace

import numpy as np
import pytest
from builder_fixtures import recorded_run
from click.testing import CliRunner

from smartfrz import zoo
from smartfrz.dataset_builder import qualities
from smartfrz.dataset_builder.cli import main
from smartfrz.dataset_builder.costs import FreezeCosts
from smartfrz.dataset_builder.datasets import PathOptions, read_dataset, with_paths, write_dataset
from smartfrz.dataset_builder.qualities import Outcomes, calibrate_qualities, simulate_predictor
from smartfrz.dataset_builder.storage import write_run
from smartfrz.errors import DatasetFormatError
from smartfrz.predictor.runtime import Predictor

BASE = zoo.embedded_folder() / "smartfrz-base.onnx"


def run_with_costs(name, seed, worst=0.08):
    """A made-up run: freezing everything at once costs `worst`, later and less costs less."""
    run = recorded_run(name, seed=seed, timestamps=30, pool=1024)
    steps, depths = np.array([30, 135, 240]), np.array([2, 4, 6])
    lost = worst * (1 - steps / 300)[:, None] * depths / 6
    costs = FreezeCosts(steps, depths, 0.5 + lost, 0.9 - lost, 0.5, 0.9, 300, 2000, np.linspace(0, 0.6, 7))
    return replace(run, costs=costs)


@pytest.fixture(scope="module")
def runs():
    return [run_with_costs(f"cnn-{i}", i) for i in range(4)]


def test_a_higher_threshold_costs_less_and_saves_less(runs):
    outcomes = simulate_predictor(Predictor(BASE, device="cpu"), [recorded_run("bare"), *runs])
    assert outcomes.points.shape == outcomes.computation.shape == (4, len(outcomes.thresholds))
    assert (np.diff(outcomes.computation.mean(0)) >= -1e-9).all()
    assert outcomes.points[:, 0].mean() > outcomes.points[:, -1].mean()


def test_a_dataset_costs_what_its_recordings_cost(runs, tmp_path):
    options = PathOptions(draws=1)
    everything = [recorded_run("bare", pool=1024, seed=9), *runs]
    write_dataset(tmp_path / "d.parquet", [with_paths(run, options) for run in everything], options)
    read, _ = read_dataset(tmp_path / "d.parquet")
    assert [run.name for run in read if run.costs is None] == ["bare"]
    with pytest.raises(DatasetFormatError, match="The recording 'bare' has no costs of freezing"):
        read[0].require_costs()
    assert read[1].require_costs().to_dict() == runs[0].require_costs().to_dict()
    predictor = Predictor(BASE, device="cpu")
    expected, found = simulate_predictor(predictor, runs), simulate_predictor(predictor, read)
    # A confidence at a threshold may fall on either side of it.
    assert np.isclose(found.points, expected.points, atol=1e-6).mean() > 0.99
    assert np.isclose(found.computation, expected.computation, atol=1e-6).mean() > 0.99


def test_thresholds_are_chosen_on_all_runs_and_judged_on_the_one_left_out():
    thresholds = np.array([0.2, 0.4, 0.6, 0.8])
    points = np.array([[3.0, 1.0, 0.3, 0.0], [3.0, 1.0, 0.3, 0.0], [3.0, 2.5, 0.9, 0.1]])
    computation = np.array([[0.4, 0.6, 0.7, 0.9]] * 3)
    found = calibrate_qualities(Outcomes(thresholds, points, computation))
    assert {name: quality.threshold for name, quality in found.items()} == {"same": 0.8, "balanced": 0.6, "fast": 0.4}
    # With the third run left out, 0.4 is fast and 0.6 balanced; with another, 0.8 and 0.6.
    assert found["fast"].points == pytest.approx(-(0.3 + 0.3 + 2.5) / 3, abs=1e-3)
    assert found["fast"].computation == pytest.approx((0.7 + 0.7 + 0.6) / 3, abs=1e-3)
    assert found["balanced"].points == pytest.approx(-(0.0 + 0.0 + 0.9) / 3, abs=1e-3)
    assert found["same"].runs == 3


def test_a_quality_that_no_threshold_reaches_is_left_out():
    outcomes = Outcomes(np.array([0.3, 0.9]), np.array([[2.0, 1.0]] * 3), np.array([[0.5, 0.8]] * 3))
    assert set(calibrate_qualities(outcomes)) == {"fast"}


def test_a_cost_that_is_low_by_chance_at_a_low_threshold_does_not_count():
    outcomes = Outcomes(np.array([0.3, 0.6, 0.9]), np.array([[0.0, 9.0, 0.0]] * 3), np.full((3, 3), 0.5))
    assert calibrate_qualities(outcomes)["same"].threshold == 0.9


def test_the_command_writes_qualities_and_nothing_else(runs, tmp_path):
    folder, output = tmp_path / "runs", tmp_path / "calibrated.onnx"
    folder.mkdir()
    for run in runs:
        write_run(folder / f"{run.name}.parquet", run)
    result = CliRunner().invoke(main, ["calibrate", str(BASE), str(folder), "-o", str(output)])
    assert result.exit_code == 0, result.output
    before, after = Predictor(BASE, device="cpu"), Predictor(output, device="cpu")
    assert set(after.info.qualities) >= {"fast"}
    assert replace(after.info, qualities={}) == replace(before.info, qualities={})
    history = np.random.default_rng(0).normal(size=(3, 12, after.info.tailored_size)).astype(np.float32)
    lengths = np.array([12, 8, 5])
    for one, other in zip(before.predict(history, lengths), after.predict(history, lengths), strict=True):
        assert np.array_equal(one, other)
    assert "threshold" in result.output


@pytest.fixture
def folder(runs, tmp_path):
    for run in runs:
        write_run(tmp_path / "runs" / f"{run.name}.parquet", run)
    return tmp_path / "runs"


def calibrate_as(monkeypatch, folder, output, points):
    points = np.broadcast_to(points, (4, 2))
    outcomes = Outcomes(np.array([0.5, 0.999]), points, np.full(points.shape, 0.5))
    monkeypatch.setattr(qualities, "simulate_predictor", lambda *given: outcomes)
    return CliRunner().invoke(main, ["calibrate", str(output), str(folder), "-o", str(output)])


def test_the_command_names_the_qualities_that_no_threshold_reaches(folder, tmp_path, monkeypatch):
    output = shutil.copy(BASE, tmp_path / "mine.onnx")
    result = calibrate_as(monkeypatch, folder, output, [9.0, 1.0])
    assert result.exit_code == 0, result.output
    assert "same      is left out: no threshold costs 0.2 points or less in the mean" in result.output
    assert set(Predictor(output).info.qualities) == {"fast"}


def test_a_file_keeps_its_qualities_where_none_is_reached(folder, tmp_path, monkeypatch):
    output = shutil.copy(BASE, tmp_path / "mine.onnx")
    before = output.read_bytes()
    result = calibrate_as(monkeypatch, folder, output, [9.0, 2.0])
    assert result.exit_code == 1
    assert "is good enough for any quality: the highest, 0.999, costs 2.0 points in the mean" in result.output
    assert output.read_bytes() == before


def test_runs_that_the_predictor_has_seen_are_named(runs, tmp_path):
    known = Predictor(BASE, device="cpu").info.metrics["trained_on"][0]
    for index, run in enumerate(runs):
        run = replace(run, facts=run.facts | {"name": known}) if index == 0 else run
        write_run(tmp_path / "runs" / f"{run.name}.parquet", run)
    result = CliRunner().invoke(main, ["calibrate", str(BASE), str(tmp_path / "runs"), "-o", str(tmp_path / "c.onnx")])
    assert f"was trained or validated on {known}, so the figures flatter" in result.stderr


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_a_dataset_of_other_records_is_an_error(runs, tmp_path, command):
    options = PathOptions(records=10, draws=1)
    write_dataset(tmp_path / "d.parquet", [with_paths(run, options) for run in runs], options)
    more = ["-o", str(tmp_path / "c.onnx")] if command == "calibrate" else []
    result = CliRunner().invoke(main, [command, str(BASE), str(tmp_path / "d.parquet"), *more])
    assert isinstance(result.exception, SystemExit)
    assert "of the 30 timestamps of 'cnn-0', but 30 records a run need one in 1" in " ".join(result.output.split())


def test_too_few_recordings_with_costs(runs):
    with pytest.raises(DatasetFormatError, match=r"2 recordings with costs; expected at least 3.*--costs"):
        simulate_predictor(Predictor(BASE, device="cpu"), [*runs[:2], recorded_run("bare")])
