"""How an answer is adjusted by the training loss."""

import dataclasses

import numpy as np
import pytest
import torch
from builder_fixtures import SMALL

from smartfrz.predictor.training.adjusting import Adjuster, apply_adjustment
from smartfrz.predictor.training.cross_validation import adjust_all, make_adjuster
from smartfrz.predictor.training.model import ADJUSTED_BY, FreezePredictor, fall_of_loss
from smartfrz.predictor.training.runs import LabelledRun

LAYERS, RECORDS, WINDOW = 5, 24, 30
NEUTRAL = np.eye(len(ADJUSTED_BY))[ADJUSTED_BY.index("margin")]


def made_up_run(name, end, seed):
    """A run in which the network's answer and the fall of the loss decide alike whether freezing is right."""
    rng = np.random.default_rng(seed)
    loss = np.geomspace(2.0, end, RECORDS).astype(np.float32)
    margin = np.linspace(-2, 2, RECORDS) + rng.normal(scale=0.3, size=(LAYERS, RECORDS))
    soft = 1 / (1 + np.exp(-(margin - 2 * np.log(loss / loss[0]) - 2)))
    run = LabelledRun(
        name,
        "cnn",
        np.zeros((LAYERS, RECORDS, 0), np.float32),
        (soft >= 0.5).astype(np.int8),
        soft.astype(np.float32),
        loss=loss,
    )
    return run, (1 / (1 + np.exp(-margin))).astype(np.float32)


@pytest.fixture
def adjuster():
    made = [made_up_run(f"run{seed}", end, seed) for seed, end in enumerate((1.5, 0.8, 0.2, 0.05))]
    return Adjuster([run for run, _ in made], [{run.name: said for run, said in made}], WINDOW)


def factors_of(adjuster, **changes):
    return dict(zip(ADJUSTED_BY, dataclasses.replace(adjuster, **changes).without([]), strict=True))


def test_a_loss_that_has_fallen_far_makes_freezing_more_likely(adjuster):
    found = factors_of(adjuster)
    assert found["loss_fall"] == pytest.approx(-2, abs=0.2)
    assert found["margin"] + found["margin_if_loss_known"] == pytest.approx(1, abs=0.1)
    assert found["one"] + found["loss_known"] == pytest.approx(-2, abs=0.2)


def test_without_a_loss_the_answer_is_that_of_a_regression_on_the_weights_alone(adjuster):
    deaf = [dataclasses.replace(run, loss=None) for run in adjuster.runs]
    with_loss, without = factors_of(adjuster), factors_of(adjuster, runs=deaf)
    assert (without["one"], without["margin"]) == pytest.approx((with_loss["one"], with_loss["margin"]))
    assert [without[name] for name in ("loss_known", "loss_fall", "margin_if_loss_known")] == [0, 0, 0]


def test_a_run_is_adjusted_by_what_the_others_say(adjuster):
    without = adjuster.without(["run3"])
    assert not np.allclose(without, adjuster.without([]))
    others = dataclasses.replace(adjuster, runs=adjuster.runs[:3])
    np.testing.assert_array_equal(without, others.without([]))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_targets_that_are_all_the_same_change_nothing(adjuster, value):
    same = [dataclasses.replace(run, targets=np.full_like(run.targets, value)) for run in adjuster.runs]
    np.testing.assert_array_equal(dataclasses.replace(adjuster, runs=same).without([]), NEUTRAL)


def test_more_confidence_never_becomes_less(adjuster):
    turned = [{name: 1 - said for name, said in adjuster.said[0].items()}]
    assert factors_of(adjuster, said=turned)["margin"] == 1


def test_there_is_nothing_to_fit_where_no_run_is_left(adjuster):
    assert adjuster.without([run.name for run in adjuster.runs]) is None
    unknown = [dataclasses.replace(run, labels=np.full_like(run.labels, -1)) for run in adjuster.runs]
    assert dataclasses.replace(adjuster, runs=unknown).without([]) is None


def test_confidences_that_were_held_out_are_adjusted_as_the_network_adjusts_them():
    torch.manual_seed(0)
    plain = FreezePredictor(8, "trajectory").eval()
    heard = FreezePredictor(8, "trajectory+loss").eval()
    heard.load_state_dict(plain.state_dict(), strict=False)
    factors = np.array([0.3, 0.8, -0.7, -1.1, 0.2])
    heard.adjust(factors)
    history = torch.randn(1, RECORDS, 8).cumsum(1)
    run, _ = made_up_run("run", 0.3, 0)
    for length in (4, RECORDS):
        seen = history[:, RECORDS - length :], torch.tensor([length])
        loss = torch.from_numpy(run.loss[None, :length])
        with torch.no_grad():
            alone, adjusted = plain(*seen)[0], heard(*seen, None, loss)[0]
        said = np.full((1, RECORDS), np.nan, np.float32)
        said[0, length - 1] = alone[0, 1]
        expected = apply_adjustment(factors, said, run, WINDOW)[0]
        assert expected[length - 1] == pytest.approx(float(adjusted[0, 1]), abs=1e-5)
        assert np.isnan(np.delete(expected, length - 1)).all()


def test_a_network_starts_with_the_answers_of_its_weights():
    torch.manual_seed(0)
    plain = FreezePredictor(8, "trajectory").eval()
    heard = FreezePredictor(8, "trajectory+loss").eval()
    heard.load_state_dict(plain.state_dict(), strict=False)
    history, lengths = torch.randn(3, 6, 8), torch.tensor([6, 5, 2])
    with torch.no_grad():
        for loss in (None, torch.rand(3, 6)):
            torch.testing.assert_close(heard(history, lengths, None, loss)[0], plain(history, lengths)[0])


def test_a_loss_that_is_none_counts_as_unknown():
    nan, inf = float("nan"), float("inf")
    loss = torch.tensor(
        [[9.0, nan, 2.0, 1.0], [4.0, 0.0, -1.0, 2.0], [4.0, 3.0, 2.0, nan], [inf, 1e31, 2.0, 1.0], [0, 0, 0, 1]]
    )
    real = torch.ones(5, 4, dtype=torch.bool)
    real[0, 0] = False
    fall, known = fall_of_loss(loss, real)
    log = np.log(0.5)
    torch.testing.assert_close(fall[:, 0], torch.tensor([log, log, 0.0, log, 0.0], dtype=torch.float32))
    assert known[:, 0].tolist() == [1, 1, 0, 1, 0]
    assert [part.any().item() for part in fall_of_loss(None, real)] == [False, False]


def test_each_run_that_was_held_out_alone_is_adjusted(adjuster):
    class Judged:
        def __init__(self, confidence):
            self.confidence = confidence

        def _replace(self, confidence):
            return Judged(confidence)

    held_out = {
        name: {"predictor": [Judged([said])], "schedule": ["as it was"]} for name, said in adjuster.said[0].items()
    }
    made = make_adjuster(adjuster.runs, held_out, SMALL)
    made = dataclasses.replace(made, window=WINDOW)
    with_loss, without = (adjust_all(made, held_out, loss=loss) for loss in (True, False))
    assert list(with_loss) == list(held_out)
    for run in adjuster.runs:
        said = adjuster.said[0][run.name]
        expected = apply_adjustment(adjuster.without([run.name]), said, run, WINDOW)
        np.testing.assert_array_equal(with_loss[run.name]["predictor"][0].confidence[0], expected)
        assert with_loss[run.name]["schedule"] == ["as it was"]
        assert not np.allclose(without[run.name]["predictor"][0].confidence[0], expected)
