import dataclasses

import numpy as np
import pytest
import torch
from builder_fixtures import SMALL, labelled_run, labelled_runs

from smartfrz.control.learned import RECORDS_PER_STAGE
from smartfrz.predictor.training.fit import fit
from smartfrz.predictor.training.judging import mean_auc, score


@pytest.fixture(scope="module")
def trained():
    return fit(labelled_runs(), [labelled_run("unseen", "cnn", seed=50)], SMALL)


def options(**changes):
    return dataclasses.replace(SMALL, **changes)


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


def one_label(run):
    return dataclasses.replace(run, labels=np.ones_like(run.labels))


def test_validation_runs_of_one_label_are_refused_before_training():
    seen, runs = [], labelled_runs()
    with pytest.raises(
        ValueError, match=r"No validation run has both labels: received \['cnn-a'\].*Change the tolerance"
    ):
        fit(runs[1:], [one_label(runs[0])], SMALL, lambda done, text: seen.append(done))
    assert seen == []


def test_only_labels_at_freezing_stages_count_for_validation():
    run = labelled_run("unseen", "cnn", seed=50)
    labels = np.ones_like(run.labels)
    labels[:, RECORDS_PER_STAGE::RECORDS_PER_STAGE] = 0  # one record after each stage
    with pytest.raises(ValueError, match="No validation run has both labels"):
        fit(labelled_runs(), [dataclasses.replace(run, labels=labels)], SMALL)


def test_one_validation_run_with_both_labels_is_enough():
    runs = labelled_runs()
    fit(runs[2:], [one_label(runs[0]), runs[1]], options(epochs=1, steps_per_epoch=2))


def test_training_that_diverges_is_named():
    runs = labelled_runs()
    with pytest.raises(ValueError, match=r"answers with NaN after training at a learning rate of 1e\+30.*Lower"):
        fit(runs[1:], runs[:1], options(optimizer="sgd", learning_rate=1e30))
