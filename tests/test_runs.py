import pytest
from builder_fixtures import PLAN, labelled_runs

from smartfrz.predictor.training.runs import split


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
