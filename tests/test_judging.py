import dataclasses

import numpy as np
import pytest
from builder_fixtures import SMALL, labelled_run, labelled_runs

from smartfrz.control.learned import PATIENCE, RECORDS_PER_STAGE
from smartfrz.predictor.training.fit import fit
from smartfrz.predictor.training.judging import (
    Reliability,
    best_accuracy_threshold,
    calibrate,
    first_freezes,
    measure_quality,
    reliability_table,
    score,
)
from smartfrz.predictor.training.runs import LabelledRun, TrainingOptions

NAN = float("nan")
ANY = TrainingOptions(min_records=1)


@pytest.fixture(scope="module")
def trained():
    return fit(labelled_runs(), [labelled_run("unseen", "cnn", seed=50)], SMALL)


def hand_made(labels, weights=None, name="hand", architecture="cnn"):
    """A run of the given labels, `[num_layers][timestamps]`."""
    labels = np.array(labels, np.int8)
    weights = np.ones((*labels.shape, 4), np.float32) if weights is None else np.array(weights, np.float32)
    return LabelledRun(name, architecture, weights, labels)


def scores_of(*values):
    return [np.array(v, np.float32) for v in values]


def test_scores_are_given_where_something_is_decided(trained):
    run = labelled_run("new", "mlp", seed=9)
    run.labels[2, 10] = -1
    run.weights[3, 12, 0] = NAN
    (all_of_them,) = score(trained, [run], SMALL)
    assert np.isnan(all_of_them[:, :3]).all()  # shorter than min_records
    assert np.isnan(all_of_them[2, 10])
    assert np.isnan(all_of_them[3, 12])
    assert np.isfinite(all_of_them[[0, 1, 4, 5], 3:]).all()
    (at_stages,) = score(trained, [run], SMALL, every=3)
    decided = np.flatnonzero(np.isfinite(at_stages[0]))
    assert decided.tolist() == [5, 8, 11, 14, 17, 20, 23, 26, 29]
    np.testing.assert_array_equal(at_stages[:, decided], all_of_them[:, decided])


def test_quality_of_hand_made_scores():
    # freezing stages are the timestamps 2 and 5
    labels = [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    values = [[0.1, 0.2, 0.3, 0.6, 0.7, 0.8], [0.1, 0.1, 0.9, 0.1, 0.1, 0.1], [0.9, 0.9, 0.4, 0.4, 0.4, 0.4]]
    q = measure_quality(scores_of(values), [hand_made(labels)], 0.5, ANY, stage=3, patience=1)
    assert q.accuracy == pytest.approx(13 / 18)
    assert q.precision == pytest.approx(5 / 6)
    assert q.recall == pytest.approx(5 / 9)
    assert q.positive == pytest.approx(9 / 18)
    # layer 0 freezes rightly at 5, layer 1 wrongly at 2, layer 2 never
    assert q.freeze_precision == pytest.approx(0.5)
    assert q.frozen_share == pytest.approx((0 + 3) / 18)
    # pairs in the right order, ties none: 0.9 of layer 1 is above all but the two 0.9 of layer 2
    right = sum(
        (p > n) + 0.5 * (p == n)
        for p in [0.6, 0.7, 0.8, 0.9, 0.9, 0.4, 0.4, 0.4, 0.4]
        for n in [0.1, 0.2, 0.3, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1]
    )
    assert q.auc == pytest.approx(right / 81)


def test_unknown_labels_do_not_count():
    q = measure_quality(scores_of([[0.9, 0.9, 0.1, 0.1]]), [hand_made([[1, -1, 0, -1]])], 0.5, ANY, stage=3, patience=1)
    assert (q.accuracy, q.precision, q.recall, q.auc) == (1.0, 1.0, 1.0, 1.0)


def test_runs_count_alike_whatever_their_size():
    right, wrong = hand_made([[1, 1, 1]]), hand_made([[0] * 40] * 10)
    q = measure_quality(
        scores_of([[0.9, 0.9, 0.9]], np.full((10, 40), 0.9)), [right, wrong], 0.5, ANY, stage=3, patience=1
    )
    assert q.accuracy == pytest.approx(0.5)


def test_what_is_undefined_is_nan_without_a_warning():
    q = measure_quality(scores_of([[0.1, 0.1, 0.1]]), [hand_made([[0, 0, 0]])], 0.5, ANY, stage=3, patience=1)
    assert np.isnan([q.auc, q.precision, q.recall, q.freeze_precision]).all()
    assert (q.accuracy, q.frozen_share) == (1.0, 0.0)


def test_quality_is_rounded_for_cards():
    q = measure_quality(scores_of([[0.9, 0.1, 0.9]]), [hand_made([[1, 0, 0]])], 0.5, ANY, stage=3, patience=1)
    assert q.to_dict()["accuracy"] == 0.6667


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


# Thresholds


def test_a_layer_freezes_once_it_was_confident_often_enough():
    # with two records a stage the stages are the timestamps 1, 3, 5 and 7
    (values,) = scores_of(
        [
            [0, 0.9, 0, 0.9, 0, 0.9, 0, 0.9],  # from the first stage on
            [0.9, 0, 0.9, 0.9, 0.9, 0.1, 0.9, 0.9],  # never twice in a row at a stage
            [NAN, NAN, NAN, NAN, NAN, 0.5, NAN, 0.5],  # the threshold itself counts
        ]
    )
    assert first_freezes(values, 0.5, 2, 2) == [(0, 3), (2, 7)]
    assert first_freezes(values, 0.5, 1, 2) == [(0, 1), (1, 3), (2, 5)]
    assert first_freezes(values, 0.95, 1, 2) == []


def climbing(seed=0, runs=3):
    """Scores that climb through each run; each layer is ready from some moment on."""
    rng = np.random.default_rng(seed)
    values = [np.tile(np.linspace(0.05, 0.95, 30, dtype=np.float32), (20, 1)) for _ in range(runs)]
    ready = [rng.integers(5, 20, 20) for _ in range(runs)]
    return values, [hand_made(np.arange(30) >= r[:, None], name=str(i)) for i, r in enumerate(ready)]


def share_right(values, runs, threshold):
    frozen = [
        (run, first_freezes(v, threshold, PATIENCE, RECORDS_PER_STAGE)) for v, run in zip(values, runs, strict=True)
    ]
    return np.mean([np.mean([run.labels[place] for place in places]) for run, places in frozen if places])


@pytest.mark.parametrize("precision", [0.5, 0.75, 0.9])
def test_calibration_reaches_the_precision(precision):
    values, runs = climbing()
    threshold = calibrate(values, runs, ANY, precision)
    assert share_right(values, runs, threshold) >= precision
    # and not by waiting for ever: four records earlier it is missed
    assert share_right(values, runs, threshold - 4 * 0.9 / 29) < precision


def test_a_precision_out_of_reach_gives_the_best_there_is():
    values, runs = climbing()
    never = [
        dataclasses.replace(run, labels=run.labels * (np.arange(20) < 10)[:, None].astype(np.int8)) for run in runs
    ]
    threshold = calibrate(values, never, ANY, 0.9)
    assert share_right(values, never, threshold) == pytest.approx(0.5)


def test_best_accuracy_threshold():
    values, run = scores_of([[0.9, 0.8, 0.6, 0.4, 0.3, 0.2]]), hand_made([[1, 1, 0, 1, 0, 0]])
    # 0.8: one of six wrong; 0.4 as well; the higher one is taken
    assert best_accuracy_threshold(values, [run], ANY) == pytest.approx(0.8)
    assert best_accuracy_threshold(values, [hand_made([[1, 1, 1, 1, 0, 0]])], ANY) == pytest.approx(0.4)
