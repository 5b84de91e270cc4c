import dataclasses

import numpy as np
import pytest
from builder_fixtures import SMALL, labelled_runs

from smartfrz.predictor.training import cross_validation
from smartfrz.predictor.training.cross_validation import leave_one_out
from smartfrz.predictor.training.fit import fit


def test_leaving_one_architecture_out(monkeypatch):
    used = []

    def spy(train, validation, options, progress):
        used.append(({run.architecture for run in (*train, *validation)}, *(len(x) for x in (train, validation))))
        return fit(train, validation, options, progress)

    monkeypatch.setattr(cross_validation, "fit", spy)
    seen = []
    runs = labelled_runs()
    results = leave_one_out(runs, SMALL, progress=lambda done, text: seen.append((done, text)), num_seeds=2)
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
        assert first.quality != second.quality
        assert first.quality.auc > 0.9
        assert methods["weight_change"][0].quality.auc > 0.5
    assert seen[-1][0] == pytest.approx(1.0)
    assert seen[0][1].startswith("without cnn: ")


def test_leaving_the_only_architecture_out_is_refused():
    with pytest.raises(ValueError, match=r"needs at least two: received runs of \['cnn'\]\. Record another one"):
        leave_one_out(labelled_runs({"a": "cnn", "b": "cnn"}), SMALL)


def test_data_sets_are_held_out_together(monkeypatch):
    used, seen = [], []

    class Stop(Exception):
        pass

    def spy(train, validation, options, progress):
        used.append({run.dataset for run in (*train, *validation)})
        raise Stop

    monkeypatch.setattr(cross_validation, "fit", spy)
    runs = labelled_runs({"cnn-a": "cnn", "cnn-b": "cnn", "vit-a": "transformer", "vit-b": "transformer"})
    assert [run.dataset for run in runs] == ["data_a", "data_b"] * 2
    with pytest.raises(Stop):
        leave_one_out(runs, SMALL, "dataset", lambda done, text: seen.append(text), num_seeds=1)
    assert used == [{"data_b"}]


def test_the_only_data_set_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"Holding out a data set needs at least two: received runs of \['data_a'\]"):
        leave_one_out(labelled_runs({"x-a": "cnn", "y-a": "vit"}), SMALL, "dataset")


def test_a_round_that_cannot_be_trained_is_refused_before_the_first():
    seen = []
    runs = [
        dataclasses.replace(r, labels=np.ones_like(r.labels)) if r.name[:3] == "cnn" else r for r in labelled_runs()
    ]
    expected = r"without the architecture 'transformer', which is to be held out: No validation run has both labels"
    with pytest.raises(
        ValueError, match=expected
    ):  # without the networks of the other one, which come first, all is well
        leave_one_out(runs, SMALL, progress=lambda done, text: seen.append(text))
    with pytest.raises(ValueError, match=r"without the architecture 'vit'.*received 0 and 1\. Record more runs"):
        leave_one_out(
            labelled_runs({"a": "cnn", "b": "vit", "c": "vit"}), SMALL, progress=lambda done, text: seen.append(text)
        )
    assert seen == []
