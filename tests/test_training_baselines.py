import dataclasses
import json

import numpy as np
import pytest
from builder_fixtures import SMALL, labelled_run, labelled_runs

from smartfrz.baselines import WeightChange
from smartfrz.predictor.training.baselines import (
    METHODS,
    STATISTICS,
    Baselines,
    Regression,
    compute_statistics,
    score_weight_change,
    weight_change_confidence,
)
from smartfrz.predictor.training.fit import fit
from smartfrz.predictor.training.judging import mean_auc, score
from smartfrz.predictor.training.runs import LabelledRun, TrainingOptions, is_decidable

ANY = TrainingOptions(min_records=1)


@pytest.fixture(scope="module")
def trained():
    return fit(labelled_runs(), [labelled_run("unseen", "cnn", seed=50)], SMALL)


def hand_made(labels, weights=None, name="hand", architecture="cnn"):
    """A run of the given labels, `[num_layers][timestamps]`."""
    labels = np.array(labels, np.int8)
    weights = np.ones((*labels.shape, 4), np.float32) if weights is None else np.array(weights, np.float32)
    return LabelledRun(name, architecture, weights, labels)


def still_then_moving(timestamps=12):
    """One layer of one weight pair: it stands still for 4 records, then grows by a tenth a record."""
    sizes = np.concatenate([np.ones(4), 1.1 ** np.arange(1, timestamps - 3)])
    weights = np.repeat(sizes[None, :, None], 2, axis=2).astype(np.float32)
    return LabelledRun("one", "cnn", weights, np.zeros((1, timestamps), np.int8))


def test_statistics_of_a_hand_made_history():
    run = still_then_moving()
    found = compute_statistics(run, window=8)
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
    slope = compute_statistics(run, 30)[0, :, STATISTICS.index("slope")]
    assert slope[1] == 0.0
    assert slope[3] == pytest.approx(-1.0, abs=1e-3)


def test_statistics_see_no_further_than_the_window():
    run = labelled_run("a", "cnn", timestamps=30)
    cut = dataclasses.replace(run, weights=run.weights[:, 20:], labels=run.labels[:, 20:])
    np.testing.assert_allclose(compute_statistics(run, 6)[:, 25:], compute_statistics(cut, 6)[:, 5:], atol=1e-6)


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
    for probability, change in zip(model.score(runs, SMALL), score_weight_change(runs, SMALL), strict=True):
        known = np.isfinite(change)
        order = np.argsort(change[known], kind="stable")
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


def test_probabilities_of_the_regressions_are_calibrated_where_they_were_fitted():
    runs = labelled_runs(layers=20, noise=0.3)
    fitted = Baselines.fit(runs, runs, SMALL)
    judged = fitted.judge(runs, runs, SMALL)
    assert list(judged) == list(METHODS)
    assert judged["weight_change_calibrated"].reliability.error < 0.1
    assert judged["logistic_regression"].reliability.error < 0.1
    assert judged["logistic_regression"].quality.auc > judged["weight_change"].quality.auc


def test_weight_change_of_a_hand_made_run():
    # |(3, 4) - (0, 4)| / |(3, 4)| = 0.6 after one record, nothing after that
    run = hand_made([[0, 0, 1]], weights=[[[0.0, 4.0], [3.0, 4.0], [3.0, 4.0]]])
    (change,) = score_weight_change([run], ANY, records=1)
    assert change[0, 1:] == pytest.approx([-np.log10(0.6), 12.0], abs=1e-5)


def test_weight_change_looks_back_so_many_records():
    run = hand_made([[0] * 4], weights=[[[1.0], [2.0], [4.0], [8.0]]])
    (change,) = score_weight_change([run], ANY, records=2)
    # at the start as far as there is something
    assert change[0] == pytest.approx([12.0, -np.log10(1 / 2), -np.log10(3 / 4), -np.log10(6 / 8)], abs=1e-5)


def test_weight_change_decides_where_the_predictor_does(trained):
    run = labelled_run("new", "mlp", seed=9)
    run.labels[2, 10] = -1
    assert np.array_equal(np.isnan(score_weight_change([run], SMALL)[0]), np.isnan(score(trained, [run], SMALL)[0]))
