import dataclasses
import json

import numpy as np
import pytest
from builder_fixtures import SMALL, labelled_run, labelled_runs

from smartfrz.baselines import WeightChange
from smartfrz.dataset_builder.building import dataset_of
from smartfrz.predictor.training.fit import LabelledRun, TrainingOptions, is_decidable, mean_auc, weight_change
from smartfrz.predictor.training.judging import (
    METHODS,
    STATISTICS,
    Baselines,
    Regression,
    Reliability,
    leave_one_out,
    reliability_table,
    statistics,
    weight_change_confidence,
)

ANY = TrainingOptions(min_records=1)


def still_then_moving(timestamps=12):
    """One layer of one weight pair: it stands still for 4 records, then grows by a tenth a record."""
    sizes = np.concatenate([np.ones(4), 1.1 ** np.arange(1, timestamps - 3)])
    weights = np.repeat(sizes[None, :, None], 2, axis=2).astype(np.float32)
    return LabelledRun("one", "cnn", weights, np.zeros((1, timestamps), np.int8))


def test_statistics_of_a_hand_made_history():
    run = still_then_moving()
    found = statistics(run, window=8)
    assert found.shape == (1, 12, len(STATISTICS))
    at = dict(zip(STATISTICS, found[0, -1], strict=True))
    assert at["progress"] == 1.0
    assert at["change_1"] == pytest.approx(np.log10(1 - 1 / 1.1), abs=1e-4)
    assert at["change_3"] == pytest.approx(np.log10(1 - 1.1**-3), abs=1e-4)
    # the window begins 7 records ago: neither 10 records nor all of them reach further back
    assert at["change_10"] == at["change_all"] == pytest.approx(np.log10(1 - 1.1**-7), abs=1e-4)
    assert at["ratio_1_3"] == pytest.approx(at["change_1"] - at["change_3"])
    assert at["ratio_10_all"] == 0.0
    assert at["slope"] == pytest.approx(0.0, abs=1e-4)  # all steps of the window are alike
    early = dict(zip(STATISTICS, found[0, 2], strict=True))
    assert early["progress"] == pytest.approx(3 / 8)
    assert early["change_1"] == -7  # what stood still does not become infinite
    assert np.isfinite(found).all()


def test_the_slope_is_that_of_the_steps_of_the_window():
    steps = 10.0 ** -np.arange(1.0, 9.0) * np.array([1, -1] * 4)
    weights = (1000 + np.cumsum([0, *steps]))[None, :, None].astype(np.float64)
    run = LabelledRun("falling", "cnn", weights, np.zeros((1, 9), np.int8))
    slope = statistics(run, 30)[0, :, STATISTICS.index("slope")]
    assert slope[1] == 0.0
    assert slope[3] == pytest.approx(-1.0, abs=1e-3)


def test_statistics_see_no_further_than_the_window():
    run = labelled_run("a", "cnn", timestamps=30)
    cut = dataclasses.replace(run, weights=run.weights[:, 20:], labels=run.labels[:, 20:])
    np.testing.assert_allclose(statistics(run, 6)[:, 25:], statistics(cut, 6)[:, 5:], atol=1e-6)


def test_logistic_regression_learns_when_layers_are_ready():
    runs, new = labelled_runs(), [labelled_run("new", "mlp", seed=77)]
    model = Regression.fit("statistics", runs, SMALL)
    scores = model.score(new, SMALL)
    assert mean_auc(scores, new, SMALL) > 0.9
    decided = is_decidable(new[0], SMALL)
    assert np.array_equal(np.isfinite(scores[0]), decided)
    assert ((scores[0][decided] >= 0) & (scores[0][decided] <= 1)).all()
    again = Regression.from_dict(json.loads(json.dumps(model.to_dict())))
    np.testing.assert_allclose(again.score(new, SMALL)[0], scores[0], atol=1e-4)


def test_a_probability_of_weight_change_ranks_as_weight_change_does():
    runs = labelled_runs()
    model = Regression.fit("change", runs, SMALL)
    assert len(model.coefficients) == 1
    for probability, score in zip(model.score(runs, SMALL), weight_change(runs, SMALL), strict=True):
        known = np.isfinite(score)
        order = np.argsort(score[known], kind="stable")
        assert (np.diff(probability[known][order]) >= -1e-6).all()


def test_weights_that_are_not_finite_do_not_reach_the_regression():
    runs = labelled_runs()
    runs[0].weights[2, 12, 0] = np.nan
    model = Regression.fit("statistics", runs, SMALL)
    assert np.isfinite(model.coefficients).all()
    assert np.isnan(model.score(runs, SMALL)[0][2, 12])


def test_labels_of_one_kind_are_refused():
    run = labelled_run("a", "cnn")
    with pytest.raises(
        ValueError, match=r"received labels \[1\]; expected layers that are ready and layers that are not"
    ):
        Regression.fit("statistics", [dataclasses.replace(run, labels=np.ones_like(run.labels))], SMALL)


def test_the_confidence_of_weight_change_is_that_of_the_policy():
    run = labelled_run("a", "cnn")
    policy = WeightChange(limit=0.01, tailored_size=run.weights.shape[2])
    (ours,) = weight_change_confidence([run], ANY, threshold=2.0)
    history = run.weights[:, 10:14]
    expected, _ = policy.predict(history, np.full(len(history), 4))
    np.testing.assert_allclose(ours[:, 13], expected[:, 1], rtol=1e-4)
    assert (weight_change_confidence([run], ANY, np.inf)[0] < 1e-6).all()


def test_reliability_of_hand_made_confidences():
    labels = np.array([[1, 1, 0, 1, 0, -1]], np.int8)
    run = LabelledRun("hand", "cnn", np.ones((1, 6, 4), np.float32), labels)
    found = Reliability.of([np.array([[1.0, 0.95, 0.92, 0.41, 0.07, 0.5]], np.float32)], [run], ANY)
    assert found.counts.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 3]
    assert found.ready.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 2]
    assert found.error == pytest.approx((0.07 + 0.59 + (2.87 - 2)) / 5, abs=1e-6)
    twice = found + found
    assert twice.error == pytest.approx(found.error)
    assert twice.counts.sum() == 10
    *_, last = found.rows()
    assert last == (pytest.approx(2.87 / 3), pytest.approx(2 / 3), 3)
    table = reliability_table({"predictor": [found, found], "weight_change": [found]})
    assert table[0] == "| confidence | predictor | weight change |"
    assert table[-2] == "| 0.9 to 1.0 | 0.67 (6) | 0.67 (3) |"
    assert table[3] == "| 0.1 to 0.2 |  |  |"
    assert table[-1] == "| expected calibration error | 0.306 | 0.306 |"


def test_probabilities_of_the_regressions_are_calibrated_where_they_were_fitted():
    runs = labelled_runs(layers=20, noise=0.3)
    fitted = Baselines.fit(runs, runs, SMALL)
    judged = fitted.judge(runs, runs, SMALL)
    assert list(judged) == list(METHODS[1:])
    assert judged["weight_change_calibrated"].reliability.error < 0.1
    assert judged["logistic_regression"].reliability.error < 0.1
    assert judged["logistic_regression"].quality.auc > judged["weight_change"].quality.auc


def test_data_sets_are_held_out_together(monkeypatch):
    from smartfrz.predictor.training import fit as training

    used, seen = [], []

    class Stop(Exception):
        pass

    def spy(train, validation, options, progress):
        used.append({run.dataset for run in (*train, *validation)})
        raise Stop

    monkeypatch.setattr(training, "fit", spy)
    runs = labelled_runs({"cnn-a": "cnn", "cnn-b": "cnn", "vit-a": "transformer", "vit-b": "transformer"})
    assert [run.dataset for run in runs] == ["data_a", "data_b"] * 2
    with pytest.raises(Stop):
        leave_one_out(runs, SMALL, "dataset", lambda done, text: seen.append(text), num_seeds=1)
    assert used == [{"data_b"}]


def test_the_only_data_set_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"Holding out a data set needs at least two: received runs of \['data_a'\]"):
        leave_one_out(labelled_runs({"x-a": "cnn", "y-a": "vit"}), SMALL, "dataset")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"source": "recipe_data:cifar10", "arguments": {"num_train": 5}}, "cifar10"),
        ({"source": "mine:photos", "arguments": {"name": "clothing"}}, "photos clothing"),
        ({"folder": "pictures/birds", "source": "", "arguments": {}}, "pictures/birds"),
        ({}, "unknown"),
    ],
)
def test_the_data_set_of_a_recording(data, name):
    assert dataset_of({"recipe": {"data": data}}) == name
