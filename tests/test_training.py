import dataclasses

import numpy as np
import pytest
import torch
from builder_fixtures import PLAN, SMALL, labelled_run, labelled_runs

from smartfrz.control.learned import PATIENCE, RECORDS_PER_STAGE
from smartfrz.predictor.training.fit import (
    LabelledRun,
    TrainingOptions,
    best_accuracy_threshold,
    calibrate,
    first_freezes,
    fit,
    leave_one_architecture_out,
    mean_auc,
    quality,
    score,
    split,
    weight_change,
)

NAN = float("nan")
ANY = TrainingOptions(min_records=1)


@pytest.fixture(scope="module")
def trained():
    return fit(labelled_runs(), [labelled_run("unseen", "cnn", seed=50)], SMALL)


def options(**changes):
    return dataclasses.replace(SMALL, **changes)


def hand_made(labels, weights=None, name="hand", architecture="cnn"):
    """A run of the given labels, `[num_layers][timestamps]`."""
    labels = np.array(labels, np.int8)
    weights = np.ones((*labels.shape, 4), np.float32) if weights is None else np.array(weights, np.float32)
    return LabelledRun(name, architecture, weights, labels)


def scores_of(*values):
    return [np.array(v, np.float32) for v in values]


# Training


def test_it_learns_when_layers_are_ready(trained):
    held_out = [labelled_run(f"new-{seed}", "mlp", seed=seed) for seed in (100, 101, 102)]
    assert mean_auc(score(trained, held_out, SMALL), held_out, SMALL) > 0.9


def test_it_learns_what_the_labels_say():
    # Else the test above could pass by the luck of the initial weights.
    turned = [dataclasses.replace(run, labels=1 - run.labels) for run in labelled_runs()]
    held_out = [labelled_run(f"new-{seed}", "mlp", seed=seed) for seed in (100, 101, 102)]
    model = fit(turned[1:], turned[:1], SMALL)
    assert mean_auc(score(model, held_out, SMALL), held_out, SMALL) < 0.1


def test_the_same_seed_trains_the_same_network(trained):
    validation = [labelled_run("unseen", "cnn", seed=50)]
    torch.manual_seed(123)  # whatever came before
    again = fit(labelled_runs(), validation, SMALL).state_dict()
    for key, value in trained.state_dict().items():
        assert torch.equal(value, again[key]), key
    other = fit(labelled_runs(), validation, options(seed=1, epochs=1)).state_dict()
    assert any(not torch.equal(value, other[key]) for key, value in again.items())


@pytest.mark.parametrize("representation", ["displacement", "log_displacement", "sorted_displacement", "steps"])
def test_other_representations_learn_it_too(representation):
    runs = labelled_runs()
    model = fit(runs[1:], runs[:1], options(representation=representation))
    assert mean_auc(score(model, runs[:1], SMALL), runs[:1], SMALL) > 0.9


def test_sgd_with_momentum_learns_it_too():
    runs = labelled_runs()
    used = options(optimizer="sgd", learning_rate=0.05, weight_decay=1e-4)
    model = fit(runs[1:], runs[:1], used)
    assert mean_auc(score(model, runs[:1], used), runs[:1], used) > 0.9
    adamw = fit(runs[1:], runs[:1], dataclasses.replace(used, optimizer="adamw"))
    assert not torch.equal(model.state_dict()["key.0.weight"], adamw.state_dict()["key.0.weight"])


def test_training_stops_early():
    seen, runs = [], labelled_runs()
    used = options(epochs=40, steps_per_epoch=2, stop_after=1, learning_rate=1e-9)
    fit(runs[1:], runs[:1], used, lambda done, text: seen.append(done))
    assert 4 <= len(seen) < 40


def test_the_best_state_is_kept():
    runs = labelled_runs()
    used = options(epochs=3, steps_per_epoch=15, learning_rate=1e-3)
    reported = []
    model = fit(runs[1:], runs[:1], used, lambda done, text: reported.append(text))
    best_so_far = float(reported[-1].rpartition(" ")[2])
    assert mean_auc(score(model, runs[:1], used, every=RECORDS_PER_STAGE), runs[:1], used) >= best_so_far - 5e-4
    assert not model.training


def test_runs_are_left_as_they_are():
    run, other = labelled_runs()[:2]
    weights, labels = run.weights.copy(), run.labels.copy()
    fit([run], [other], options(epochs=1, steps_per_epoch=2))
    np.testing.assert_array_equal(run.weights, weights)
    np.testing.assert_array_equal(run.labels, labels)


def test_a_pool_smaller_than_the_tailored_size_is_refused():
    runs = labelled_runs()
    with pytest.raises(
        ValueError, match=r"'cnn-b' was recorded with pool_size=20, .* tailored_size=32\. Record it again"
    ):
        fit([labelled_run("cnn-b", "cnn", pool=20)], runs[:1], SMALL)
    with pytest.raises(ValueError, match="'small' was recorded with pool_size=31"):
        fit(runs, [labelled_run("small", "cnn", pool=31)], SMALL)


@pytest.mark.parametrize(("train", "validation"), [(0, 1), (1, 0), (0, 0)])
def test_runs_are_needed_on_both_sides(train, validation):
    run = labelled_run("one", "cnn")
    with pytest.raises(ValueError, match=rf"received {train} and {validation}\. Record more runs"):
        fit([run] * train, [run] * validation, SMALL)


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


# Judging


def test_quality_of_hand_made_scores():
    # freezing stages are the timestamps 2 and 5
    labels = [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    values = [[0.1, 0.2, 0.3, 0.6, 0.7, 0.8], [0.1, 0.1, 0.9, 0.1, 0.1, 0.1], [0.9, 0.9, 0.4, 0.4, 0.4, 0.4]]
    q = quality(scores_of(values), [hand_made(labels)], 0.5, ANY, stage=3, patience=1)
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
    q = quality(scores_of([[0.9, 0.9, 0.1, 0.1]]), [hand_made([[1, -1, 0, -1]])], 0.5, ANY, stage=3, patience=1)
    assert (q.accuracy, q.precision, q.recall, q.auc) == (1.0, 1.0, 1.0, 1.0)


def test_runs_count_alike_whatever_their_size():
    right, wrong = hand_made([[1, 1, 1]]), hand_made([[0] * 40] * 10)
    q = quality(scores_of([[0.9, 0.9, 0.9]], np.full((10, 40), 0.9)), [right, wrong], 0.5, ANY, stage=3, patience=1)
    assert q.accuracy == pytest.approx(0.5)


def test_what_is_undefined_is_nan_without_a_warning():
    q = quality(scores_of([[0.1, 0.1, 0.1]]), [hand_made([[0, 0, 0]])], 0.5, ANY, stage=3, patience=1)
    assert np.isnan([q.auc, q.precision, q.recall, q.freeze_precision]).all()
    assert (q.accuracy, q.frozen_share) == (1.0, 0.0)


def test_quality_is_rounded_for_cards():
    q = quality(scores_of([[0.9, 0.1, 0.9]]), [hand_made([[1, 0, 0]])], 0.5, ANY, stage=3, patience=1)
    assert q.to_dict()["accuracy"] == 0.6667


def test_weight_change_of_a_hand_made_run():
    # |(3, 4) - (0, 4)| / |(3, 4)| = 0.6 after one record, nothing after that
    run = hand_made([[0, 0, 1]], weights=[[[0.0, 4.0], [3.0, 4.0], [3.0, 4.0]]])
    (change,) = weight_change([run], ANY, records=1)
    assert change[0, 1:] == pytest.approx([-np.log10(0.6), 12.0], abs=1e-5)


def test_weight_change_looks_back_so_many_records():
    run = hand_made([[0] * 4], weights=[[[1.0], [2.0], [4.0], [8.0]]])
    (change,) = weight_change([run], ANY, records=2)
    # at the start as far as there is something
    assert change[0] == pytest.approx([12.0, -np.log10(1 / 2), -np.log10(3 / 4), -np.log10(6 / 8)], abs=1e-5)


def test_weight_change_decides_where_the_predictor_does(trained):
    run = labelled_run("new", "mlp", seed=9)
    run.labels[2, 10] = -1
    assert np.array_equal(np.isnan(weight_change([run], SMALL)[0]), np.isnan(score(trained, [run], SMALL)[0]))


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


# Splitting


@pytest.mark.parametrize("seed", range(5))
def test_no_run_is_on_both_sides(seed):
    runs = labelled_runs(PLAN | {"mlp-a": "mlp"})
    train, validation = split(runs, seed)
    assert sorted(run.name for run in (*train, *validation)) == sorted(run.name for run in runs)
    assert sorted(run.architecture for run in validation) == ["cnn", "transformer"]  # the only mlp trains


def test_the_split_depends_on_the_seed_alone():
    runs = labelled_runs()
    names = [{run.name for run in split(runs, seed)[1]} for seed in range(8)]
    assert names[0] == {run.name for run in split(runs[::-1], 0)[1]}
    assert any(chosen != names[0] for chosen in names)


def test_with_one_run_an_architecture_the_last_run_validates():
    runs = labelled_runs({"b": "vit", "c": "mlp", "a": "cnn"})
    train, validation = split(runs)
    assert [run.name for run in validation] == ["c"]
    assert [run.name for run in train] == ["b", "a"]


def test_leaving_one_architecture_out(monkeypatch):
    from smartfrz.predictor.training import fit as training

    used = []

    def spy(train, validation, options, progress):
        used.append(({run.architecture for run in (*train, *validation)}, *(len(x) for x in (train, validation))))
        return fit(train, validation, options, progress)

    monkeypatch.setattr(training, "fit", spy)
    seen = []
    runs = labelled_runs()
    results = leave_one_architecture_out(runs, SMALL, lambda done, text: seen.append((done, text)), num_seeds=2)
    assert used == [({"transformer"}, 1, 1)] * 2 + [({"cnn"}, 1, 1)] * 2
    assert list(results) == ["cnn", "transformer"]
    for methods in results.values():
        assert list(methods) == [
            "predictor",
            "weight_change",
            "weight_change_calibrated",
            "schedule",
            "logistic_regression",
        ]
        first, second = methods["predictor"]
        assert first != second
        assert first.auc > 0.9
        assert methods["weight_change"][0].auc > 0.5
    assert seen[-1][0] == pytest.approx(1.0)
    assert seen[0][1].startswith("without cnn: ")


def test_leaving_the_only_architecture_out_is_refused():
    with pytest.raises(ValueError, match=r"needs at least two: received runs of \['cnn'\]\. Record another one"):
        leave_one_architecture_out(labelled_runs({"a": "cnn", "b": "cnn"}), SMALL)
