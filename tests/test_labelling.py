"""Labels of recorded runs by CKA, by what freezing costs, or by both; and predictors that are made from them."""

from dataclasses import replace

import numpy as np
import pytest
from builder_fixtures import PLAN, RULE, SMALL, invoke, labelled, recorded_run, recorded_runs, write_recipe
from click.testing import CliRunner
from numpy_adapter import make_info
from test_freeze_costs import costs_of, monotone

from smartfrz import zoo
from smartfrz.control.quality import TARGETS
from smartfrz.dataset_builder import building
from smartfrz.dataset_builder.building import Material, Plan, build_predictor
from smartfrz.dataset_builder.cli import main
from smartfrz.dataset_builder.costs import FreezeCosts
from smartfrz.dataset_builder.labelling import label_run, labelled_runs, rule_of
from smartfrz.dataset_builder.labels import LabelRule
from smartfrz.dataset_builder.qualities import Outcomes
from smartfrz.dataset_builder.storage import write_run
from smartfrz.errors import DatasetFormatError
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.export import with_info

BASE = zoo.embedded_folder() / "smartfrz-base.onnx"
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


def test_a_predictor_from_recordings_with_costs_is_adjusted_by_the_loss(built):
    predictor = Predictor(built[0])
    adjustment = predictor.info.metrics["adjustment"]
    assert adjustment["loss_fall"]
    history, lengths = np.random.default_rng(0).normal(size=(1, 6, SMALL.tailored_size)), np.array([6])
    asked = history.astype(np.float32), lengths, None
    told = [predictor.predict(*asked, np.geomspace(2, end, 6, dtype=np.float32)[None]) for end in (2.0, 0.5)]
    logits = [np.log(one.confidence[0, 1] / one.confidence[0, 0]) for one in told]
    assert logits[1] - logits[0] == pytest.approx(adjustment["loss_fall"] * np.log(0.25), abs=1e-3)
    assert f"{adjustment['loss_fall']:.2f} times the logarithm of the loss" in built[1]
    assert built[1].count("| predictor without the loss |") == 1


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


OPTIONS = ("--tailored-size", "32", "--window", "8", "--epochs", "1", "--no-cross-validate")


def recordings(folder, without=()):
    folder.mkdir()
    for i, (name, kind) in enumerate(PLAN.items()):
        made = recorded_run(name, kind, seed=i, pool=64)
        write_run(folder / f"{name}.parquet", made if name in without else with_costs(made))
    return folder


def test_both_needs_costs_of_some_recording(tmp_path):
    folder = recordings(tmp_path / "runs", without=PLAN)
    result = invoke(main, "train", folder, "--labels", "both", "-o", tmp_path / "mine.onnx", *OPTIONS)
    assert result.exit_code == 1
    assert "None of the 4 recordings has costs of freezing, which --labels both needs of some" in result.output
    assert not (tmp_path / "mine.onnx").exists()


@pytest.mark.parametrize("labels", ["costs", "both"])
def test_costs_that_are_not_going_to_be_measured_are_said_before_recording(tmp_path, labels):
    recipes = [write_recipe(tmp_path, name) for name in ("one", "other")]
    places = ("--runs", tmp_path / "runs", "-o", tmp_path / "mine.onnx")
    result = invoke(main, "run", *recipes, *places, "--labels", labels, *OPTIONS)
    assert result.exit_code == 1
    assert f"(--labels {labels}), which is measured with --costs only. Add --costs" in result.output
    assert not (tmp_path / "runs").exists()


def test_a_base_that_was_labelled_by_costs_judges_recordings_without(tmp_path, caplog):
    base, info = tmp_path / "base.onnx", Predictor(BASE).info
    with_info(BASE, replace(info, metrics=info.metrics | {"label_rule": COSTS.to_dict()}), base)
    write_run(tmp_path / "new" / "cnn-a.parquet", recorded_run(pool=1024))
    more = ("-o", tmp_path / "more.onnx", "--base", base)
    result = invoke(main, "train", tmp_path / "new", *more, "--labels", "costs")
    assert "Labels by CKA (--labels cka) need none." in result.output
    judged = invoke(main, "evaluate", base, tmp_path / "new")
    assert "which cnn-a lacks. All recordings are labelled by CKA instead" in caplog.text
    assert "| cnn-a (held out) | predictor |" in judged.stdout


def test_a_run_that_cannot_be_held_out_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    recorded = [with_costs(run) for run in recorded_runs()]
    runs = [run if run.name == "cnn-b" else replace(run, labels=np.ones_like(run.labels)) for run in labelled(recorded)]
    monkeypatch.setattr(building, "check_runs", lambda *given: None)
    monkeypatch.setattr(building, "_hold_out", lambda *given: pytest.fail("something was trained"))
    with pytest.raises(ValueError, match=r"without the run '[a-z-]+', which is to be held out: .*--no-cross-validate"):
        build_predictor(Material(recorded, runs, "0" * 64), Plan("mine", RULE, SMALL), tmp_path / "mine.onnx")


COSTLY = np.array([5.0, 5.0, 0.1])


@pytest.fixture
def judged_as(monkeypatch, tmp_path):
    """Trains a predictor of which is claimed that its thresholds cost this."""

    def build(thresholds, points):
        points = np.broadcast_to(points, (3, len(points)))
        outcomes = Outcomes(np.array(thresholds), points, np.broadcast_to(np.linspace(0.75, 0.85, 3), points.shape))
        monkeypatch.setattr(building, "_hold_out", lambda *given: {})
        monkeypatch.setattr(building, "_find_costs", lambda *given: (None, {"predictor": outcomes}))
        monkeypatch.setattr(building, "export", lambda model, info, output: infos.append(info) or 0.0)
        infos, recorded = [], [with_costs(run) for run in recorded_runs()]
        recorded[1:2] = [replace(run, costs=None) for run in recorded[1:2]]
        options = replace(SMALL, epochs=1, steps_per_epoch=2)
        material = Material(recorded, labelled_runs(recorded, BOTH, 30), "0" * 64)
        card = build_predictor(material, Plan("mine", BOTH, options), tmp_path / "mine.onnx")
        return infos[0], card

    return build


def test_the_threshold_is_that_of_fast_however_high_it_is(judged_as):
    info, card = judged_as([0.5, 0.9, 0.9985], COSTLY)
    assert info.threshold == info.qualities["fast"].threshold == 0.9985
    assert "Threshold: that of the quality `fast`" in card
    assert "as measured (CKA alone without costs: cnn-b)." in card


def test_the_card_says_which_qualities_no_threshold_reaches(judged_as):
    info, card = judged_as([0.5, 0.9, 0.99], COSTLY + 0.2)
    assert set(info.qualities) == {"balanced", "fast"}
    assert "No threshold costs little enough in the mean for `same` (0.2 points)." in card
    assert "| predictor |  | 5.20 |  |  |" in card
    info, card = judged_as([0.5, 0.9, 0.99], COSTLY + 9)
    assert info.qualities == {}
    assert "for `same` (0.2 points), `balanced` (0.5 points), `fast` (1.5 points)." in card
    assert "| quality |" not in card
    assert "nan" not in card[: card.index("## Runs that it was validated on")]
