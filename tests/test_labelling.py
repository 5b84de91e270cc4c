"""Labels of recorded runs by CKA, by what freezing costs, or by both; and predictors that are made from them."""

from dataclasses import replace

import numpy as np
import pytest
from builder_fixtures import PLAN, SMALL, invoke, recorded_run
from click.testing import CliRunner
from numpy_adapter import make_info
from test_freeze_costs import costs_of, monotone

from smartfrz.control.quality import TARGETS
from smartfrz.dataset_builder.building import Material, Plan, build_predictor
from smartfrz.dataset_builder.cli import main
from smartfrz.dataset_builder.costs import FreezeCosts
from smartfrz.dataset_builder.labelling import label_run, labelled_runs, rule_of
from smartfrz.dataset_builder.labels import LabelRule
from smartfrz.dataset_builder.storage import write_run
from smartfrz.errors import DatasetFormatError
from smartfrz.predictor.runtime import Predictor

COSTS, BOTH = LabelRule(source="costs", cost_limit=2), LabelRule(source="both", cost_limit=2)


def with_costs(run, worst=0.2):
    """Freezing everything at once costs `worst`; later and less cost less."""
    steps, depths = np.array([30, 135, 240]), np.array([2, 4, 6])
    lost = worst * (1 - steps / 300)[:, None] * depths / 6
    costs = FreezeCosts(steps, depths, 0.5 + 3 * lost, 0.9 - lost, 0.5, 0.9, 300, 2000, np.linspace(0, 0.6, 7))
    return replace(run, costs=costs)


@pytest.fixture(scope="module")
def run():
    return with_costs(recorded_run())


# Labels


def test_costs_grow_with_depth_and_fall_with_time(run):
    labels = label_run(run, COSTS)
    assert (np.diff(labels.hard, axis=1) >= 0).all()
    assert (np.diff(labels.hard, axis=0) <= 0).all()
    assert set(labels.hard.ravel()) == {0, 1}
    clear = np.abs(labels.soft - 0.5) > 1e-6
    assert np.array_equal((labels.soft >= 0.5)[clear], (labels.hard == 1)[clear])
    # 0.2 * 0.5 * 2 / 6 is 3.3 points, and half of that three quarters through the run.
    half, three_quarters = (int(np.argmin(np.abs(run.progress - moment))) for moment in (0.5, 0.75))
    assert labels.hard[1, half] == 0
    assert labels.hard[1, three_quarters] == 1


def test_both_is_the_mean_and_cka_alone_without_costs(run):
    by_cka, by_costs, both = (label_run(run, rule) for rule in (LabelRule(), COSTS, BOTH))
    assert both.soft == pytest.approx((by_cka.soft + by_costs.soft) / 2)
    assert np.array_equal(both.hard, both.soft >= 0.5)
    bare = recorded_run()
    for one, other in zip(label_run(bare, BOTH), label_run(bare, LabelRule()), strict=True):
        assert np.array_equal(one, other)


def test_where_cka_is_unknown_both_is_unknown(run):
    cka = run.cka.copy()
    cka[2] = np.nan
    labels = label_run(replace(run, cka=cka), BOTH)
    assert (labels.hard[2] == -1).all()
    assert (labels.hard[[0, 1, 3]] >= 0).all()
    assert (label_run(replace(run, cka=cka), COSTS).hard >= 0).all()


def test_where_training_diverged_freezing_is_wrong(run):
    loss, accuracy = run.costs.loss.copy(), run.costs.accuracy.copy()
    loss[0, 0] = accuracy[0, 0] = np.nan
    labels = label_run(replace(run, costs=replace(run.costs, loss=loss, accuracy=accuracy)), COSTS)
    assert labels.hard[1, 0] == 0
    assert labels.soft[1, 0] == 0
    assert np.isfinite(labels.soft).all()


def test_costs_that_were_not_measured_are_an_error():
    with pytest.raises(DatasetFormatError, match=r"'cnn-a' has no costs of freezing.*record --costs"):
        labelled_runs([recorded_run()], COSTS, 30)


@pytest.mark.parametrize("wrong", [{"source": "guesses"}, {"cost_limit": -1}, {"cost_limit": float("nan")}])
def test_bad_rules(wrong):
    with pytest.raises(ValueError, match="expected one of cka, costs, both"):
        LabelRule(**wrong)


def test_a_rule_survives_as_plain_data():
    assert LabelRule(**COSTS.to_dict()) == COSTS
    assert set(LabelRule().to_dict()) == {"kind", "tolerance", "records"}  # as older versions read it


def test_without_costs_a_predictor_that_was_trained_on_them_is_judged_by_cka(run, caplog):
    info = make_info(metrics={"label_rule": COSTS.to_dict()})
    assert rule_of(info, [run]) == COSTS
    assert rule_of(info, [run, recorded_run("bare")]).source == "cka"
    assert "which bare lacks. All recordings are labelled by CKA instead" in caplog.text
    assert rule_of(make_info(), [recorded_run("bare")]) == LabelRule()


# Accuracy that is expected for a loss


def test_noise_of_accuracies_is_left_out_where_losses_explain_them():
    noise = np.random.default_rng(0).normal(scale=0.005, size=(4, 5))
    lost = monotone()
    found = costs_of(lost, accuracy=0.8 - lost - noise).lost("expected")
    assert np.abs(found - lost)[:, :4].max() < 0.2 * np.abs(noise[:, :4]).max()
    assert found[:, 4] == pytest.approx(lost[:, 4] + noise[:, 4])  # all layers: the network as it was


def test_where_losses_say_nothing_accuracies_are_taken_as_they_are():
    noise = np.random.default_rng(0).normal(scale=0.1, size=(4, 5))
    costs = costs_of(monotone(), loss=0.4 + noise)
    assert costs.lost("expected") == pytest.approx(costs.lost("accuracy"))


def test_a_loss_that_falls_while_accuracy_is_lost_says_nothing():
    costs = costs_of(monotone(), loss=0.4 - 3 * monotone())
    assert costs.lost("expected") == pytest.approx(costs.lost("accuracy"))


def test_a_branch_that_diverged_stays_unknown():
    lost = monotone()
    lost[0, 2] = np.nan
    found = costs_of(lost).lost("expected")
    assert np.array_equal(np.isnan(found), np.isnan(lost))


# Predictors


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    recorded = [with_costs(recorded_run(name, kind, seed=i)) for i, (name, kind) in enumerate(PLAN.items())]
    output = tmp_path_factory.mktemp("costs") / "mine.onnx"
    plan = Plan("mine", BOTH, SMALL, cross_validate=True)
    card = build_predictor(Material(recorded, labelled_runs(recorded, BOTH, 30), "0" * 64), plan, output)
    return output, card


def test_a_predictor_from_recordings_with_costs_has_qualities(built):
    info = Predictor(built[0]).info
    assert info.qualities
    assert set(info.qualities) <= set(TARGETS)
    assert {one.runs for one in info.qualities.values()} == {4}
    if "fast" in info.qualities:
        assert info.threshold == info.qualities["fast"].threshold
    assert LabelRule(**info.metrics["label_rule"]) == BOTH


def test_the_card_says_what_freezing_costs(built):
    card = built[1]
    section = card[card.index("## What freezing by it costs") : card.index("## An architecture that it never saw")]
    for quality in Predictor(built[0]).info.qualities:
        assert f"| {quality} |" in section
    for method in ("predictor", "schedule", "logistic regression", "weight change"):
        assert section.count(f"| {method} |") == 1
    for name in PLAN:
        assert section.count(f"| {name} |") == 1
    assert "the mean of two targets" in card
    assert "2 points" in card


def test_the_command_trains_on_costs_and_says_what_lacks_them(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for i, (name, kind) in enumerate(PLAN.items()):
        made = recorded_run(name, kind, seed=i, pool=64)
        write_run(folder / f"{name}.parquet", made if i == 2 else with_costs(made))
    options = ["--labels", "costs", "--tailored-size", "32", "--epochs", "1", "-o", str(tmp_path / "mine.onnx")]
    result = CliRunner().invoke(main, ["train", str(folder), "--no-cross-validate", *options])
    assert result.exit_code == 1
    assert "'vit-a' has no costs of freezing" in result.output
    assert not (tmp_path / "mine.onnx").exists()
    (folder / "vit-a.parquet").unlink()
    invoke(main, "train", folder, "--no-cross-validate", *options)
    assert "costs at most 0.5 points" in (tmp_path / "mine.md").read_text()
