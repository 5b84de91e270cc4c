"""Costs of freezing in files, the surface through them, and what is made of it."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from builder_fixtures import recorded_run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from smartfrz.dataset_builder.costs import CostSurface, FreezeCosts, cost_targets, fit_monotone, judge, prefix_schedule
from smartfrz.dataset_builder.storage import read_run, write_run
from smartfrz.errors import DatasetFormatError

MOMENTS, DEPTHS = [0.1, 0.25, 0.45, 0.65], [1, 2, 4, 5, 6]
NAN = float("nan")
GRIDS = arrays(np.float64, (4, 5), elements=st.floats(-0.2, 1.0))


def costs_of(lost, **more):
    """Costs of a run of 6 layers that ends with 0.9, and whose branches lose this much accuracy."""
    lost = np.asarray(lost, np.float64)
    values = {
        "steps": np.array([10, 25, 45, 65]),
        "depths": np.array(DEPTHS),
        "loss": lost * 3 + 0.4,
        "accuracy": 0.8 - lost,
        "final_loss": 0.4,
        "final_accuracy": 0.8,
        "total_steps": 100,
        "num_examples": 2000,
        "saved": np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0]),
    }
    return FreezeCosts(**(values | more))


def monotone(lowest=0.01):
    """Costs that fall with the moment and rise with the depth."""
    return lowest * np.arange(1, 6)[None] * np.array([4, 3, 2, 1])[:, None]


@pytest.fixture
def costs():
    return costs_of(monotone())


# In files


def test_costs_survive_a_round_trip(tmp_path, costs):
    lost = monotone()
    lost[1, 3] = NAN
    run = dataclasses.replace(recorded_run(), costs=costs_of(lost))
    write_run(tmp_path / "run.parquet", run)
    after = read_run(tmp_path / "run.parquet")
    assert "costs" not in after.facts
    for field in dataclasses.fields(FreezeCosts):
        np.testing.assert_array_equal(getattr(after.costs, field.name), getattr(run.costs, field.name))
    assert after.require_costs() is after.costs
    write_run(tmp_path / "again.parquet", after)
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "run.parquet").read_bytes()


def test_a_file_without_costs_reads_as_before(tmp_path):
    write_run(tmp_path / "run.parquet", recorded_run())
    run = read_run(tmp_path / "run.parquet")
    assert run.costs is None
    with pytest.raises(DatasetFormatError, match=r"'cnn-a' has no costs of freezing\. Add them with"):
        run.require_costs()


WRONG = {
    "missing": ({"loss": None}, "losses or accuracies are not one for each moment and depth"),
    "no numbers": ({"loss": "many"}, "could not convert"),
    "ragged": ({"loss": [[0.1], [0.1, 0.2]]}, "inhomogeneous"),
    "other shape": ({"accuracy": [[0.5]]}, "not one for each moment and depth"),
    "no moments": ({"steps": []}, "expected integers"),
    "fractions": ({"steps": [0.1, 0.2, 0.3, 0.4]}, "expected integers"),
    "steps that fall": ({"steps": [10, 45, 25, 65]}, "steps do not increase"),
    "a step beyond the end": ({"steps": [10, 25, 45, 100]}, "steps do not increase from 1 to less than the total"),
    "too deep": ({"depths": [1, 2, 4, 5, 7]}, "depths do not increase"),
    "an accuracy of 2": ({"accuracy": [[2.0] * 5] * 4}, "an accuracy is neither"),
    "a loss without bounds": (
        {"loss": [[float("inf")] * 5] * 4, "accuracy": [[None] * 5] * 4},
        "neither NaN nor finite",
    ),
    "only a loss": ({"accuracy": [[None] * 5] * 4}, "a loss or an accuracy, and not both"),
    "no final loss": ({"final_loss": NAN}, "its own loss or accuracy is not finite"),
    "nothing saved": ({"saved": []}, "not three lists"),
    "saved falls": ({"saved": [0, 0.2, 0.1, 0.3, 0.4, 0.5, 1]}, "what is saved does not grow"),
    "another network": ({"saved": [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1]}, "of 7 layers, and it has 6"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_costs_are_refused(tmp_path, costs, case):
    wrong, message = WRONG[case]

    class Wrong:
        def to_dict(self):
            return costs.to_dict() | wrong

    write_run(tmp_path / "run.parquet", dataclasses.replace(recorded_run(), costs=Wrong()))
    with pytest.raises(
        DatasetFormatError, match=rf"(?s)is no recorded run: its costs are .*{message}.*Record the run again"
    ):
        read_run(tmp_path / "run.parquet")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_costs_are_read_or_refused(data):
    wrong = costs_of(monotone()).to_dict()
    key = data.draw(st.sampled_from(sorted(wrong)))
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    wrong[key] = data.draw(st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=6))
    try:
        costs = FreezeCosts.from_dict(wrong)
    except ValueError:
        return
    assert json.dumps(FreezeCosts.from_dict(costs.to_dict()).to_dict()) == json.dumps(costs.to_dict())


# The surface


def is_monotone(matrix, slack=1e-12):
    return (np.diff(matrix, axis=0) <= slack).all() and (np.diff(matrix, axis=1) >= -slack).all()


@settings(max_examples=60, deadline=None)
@given(GRIDS, GRIDS)
def test_the_fit_is_the_nearest_monotone_matrix(values, other):
    fitted = fit_monotone(values)
    assert is_monotone(fitted, slack=0.0)
    rival = np.maximum.accumulate(np.maximum.accumulate(other[::-1], axis=0)[::-1], axis=1)
    assert is_monotone(rival, slack=0.0)
    # The angle at a projection is not acute, towards any point of a convex set.
    assert ((values - fitted) * (rival - fitted)).sum() <= 1e-6
    np.testing.assert_allclose(fit_monotone(fitted), fitted, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=3))
def test_the_surface_is_monotone(values, diverged):
    for place in diverged:
        values[place] = NAN
    surface = CostSurface(MOMENTS, DEPTHS, values)
    moments, depths = np.linspace(0, 1, 41), np.linspace(0, 6, 25)
    cost = surface(moments[:, None], depths[None])
    assert (cost >= 0).all()
    assert (cost[:, 0] == 0).all()
    assert (cost[-1] == 0).all()
    assert is_monotone(np.where(np.isinf(cost), 1e9, cost))
    for i, j in diverged:
        assert np.isinf(surface(MOMENTS[: i + 1], DEPTHS[j])).all()
        assert np.isinf(surface(MOMENTS[i], DEPTHS[j:])).all()
    if not diverged:
        assert np.isfinite(cost).all()


def test_the_surface_passes_through_what_is_monotone(costs):
    surface = CostSurface.of(costs)
    np.testing.assert_allclose(surface(np.array(MOMENTS)[:, None], DEPTHS), monotone(), atol=1e-12)
    # between two depths, two moments, before the first moment, after the last one, beyond the greatest depth
    assert surface(0.1, 3) == pytest.approx(0.1)
    assert surface(0.35, 1) == pytest.approx(0.025)
    assert surface(0.0, 1) == pytest.approx(0.04 + 0.01 / 0.15 * 0.1)
    assert surface(0.825, 6) == pytest.approx(0.025)
    assert surface(0.1, 60) == surface(0.1, 6)
    assert CostSurface.of(costs, "loss")(0.1, 1) == pytest.approx(0.12)


def test_noise_is_averaged_and_a_gain_costs_nothing():
    noisy = np.array([[0.01, 0.03, 0.02], [-0.02, -0.01, 0.02]])
    surface = CostSurface([0.2, 0.6], [1, 2, 3], noisy)
    np.testing.assert_allclose(surface(0.2, [1, 2, 3]), [0.01, 0.025, 0.025], atol=1e-9)
    np.testing.assert_allclose(surface(0.6, [1, 2, 3]), [0, 0, 0.02], atol=1e-9)


@pytest.mark.parametrize(
    ("moments", "depths", "shape"),
    [([0.2, 0.1], [1, 2], (2, 2)), ([0.0, 0.1], [1], (2, 1)), ([0.5, 1.0], [1], (2, 1)), ([0.5], [0, 1], (1, 2)),
     ([0.5], [1, 2], (2, 1)), ([], [1], (0, 1)), ([NAN], [1], (1, 1))],
)  # fmt: skip
def test_a_grid_that_does_not_increase_is_refused(moments, depths, shape):
    with pytest.raises(ValueError, match="expected increasing moments"):
        CostSurface(moments, depths, np.zeros(shape))


# Targets


def test_targets_say_what_costs_at_most_the_limit(costs):
    progress = np.array([0.05, 0.1, 0.25, 0.45, 0.65, 1.0])
    targets = cost_targets(costs, progress, limit=0.045)
    assert targets.hard.dtype == np.int8
    assert targets.hard.tolist() == [
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 1],
    ]
    assert ((targets.soft >= 0.5) == targets.hard).all()
    assert targets.soft[0, 1] == pytest.approx(1 / (1 + np.exp(-1)))  # 0.04, which is 0.005 below the limit
    assert is_monotone(targets.cost.T)
    assert (np.diff(targets.soft, axis=1) >= 0).all()


def test_what_diverges_is_no_target():
    lost = monotone()
    lost[1, 1] = NAN
    targets = cost_targets(costs_of(lost), [0.05, 0.25, 0.5], limit=10.0, measure="loss")
    assert targets.hard.tolist() == [[1, 1, 1], *[[0, 0, 1]] * 5]
    assert (targets.soft[1:, :2] == 0).all()


def test_all_branches_may_diverge():
    costs = costs_of(np.full((4, 5), NAN))
    assert np.isinf(CostSurface.of(costs)(0.5, 0.1))
    assert cost_targets(costs, [0.5, 1.0], 0.1).hard.tolist() == [[0, 1]] * 6


@pytest.mark.parametrize("wrong", [{"limit": -0.1}, {"limit": NAN}, {"softness": 0.0}, {"measure": "speed"}])
def test_options_out_of_range_are_refused(costs, wrong):
    with pytest.raises(ValueError, match=r"received|`measure` is 'speed'; expected"):
        cost_targets(costs, [0.5], **({"limit": 0.1} | wrong))


# Judging a schedule


def test_one_stage_costs_what_the_surface_says(costs):
    for stage in ((0.1, 2), (0.3, 4), (0.65, 6)):
        judged = judge(costs, [stage])
        assert judged.cost == pytest.approx(CostSurface.of(costs)(*stage))
        assert judged.saved == pytest.approx(costs.saved[stage[1]] * (1 - stage[0]))


def test_stages_add_up(costs):
    judged = judge(costs, [(0.1, 1), (0.45, 4), (0.65, 6)])
    assert judged.cost == pytest.approx(0.04 + (0.06 - 0.02) + (0.05 - 0.03))
    assert judged.saved == pytest.approx(0.35 * 0.1 + 0.2 * 0.4 + 0.35 * 1.0)
    assert judge(costs, []) == judge(costs, [(0.3, 0)])
    assert judge(costs, []).cost == judge(costs, []).saved == 0
    assert judge(costs, [(0.1, 1)], measure="loss").cost == pytest.approx(0.12)


def test_a_schedule_that_diverges_costs_infinity():
    lost = monotone()
    lost[0, 2] = NAN
    costs = costs_of(lost)
    assert judge(costs, [(0.05, 4), (0.5, 6)]).cost == np.inf
    assert np.isfinite(judge(costs, [(0.05, 2), (0.5, 6)]).cost)


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6)), max_size=5))
def test_more_stages_cost_and_save_no_less(values, stages):
    moments, depths = sorted(m for m, _ in stages), sorted(d for _, d in stages)
    costs = costs_of(values, accuracy=np.clip(0.8 - values, 0, 1))
    schedule = list(zip(moments, depths, strict=True))
    judgements = [judge(costs, schedule[:number]) for number in range(len(schedule) + 1)]
    for fewer, more in itertools.pairwise(judgements):
        assert more.cost >= fewer.cost - 1e-9
        assert more.saved >= fewer.saved - 1e-9
    assert judgements[-1].saved <= 1


@pytest.mark.parametrize(
    "schedule", [[(0.5, 7)], [(-0.1, 1)], [(NAN, 1)], [(0.5, 2), (0.4, 3)], [(0.5, 2), (0.6, 1)], [(0.5, -1)]]
)
def test_a_schedule_that_falls_is_refused(costs, schedule):
    with pytest.raises(ValueError, match="expected \\(moment, depth\\) with moments"):
        judge(costs, schedule)


def test_what_a_policy_froze_becomes_a_schedule(costs):
    frozen = np.zeros((6, 5), bool)
    frozen[0, 1:], frozen[2, 2:], frozen[1, 3:] = True, True, True  # the third layer counts once the second is frozen
    schedule = prefix_schedule(frozen, [0.1, 0.2, 0.4, 0.6, 0.8])
    assert schedule == [(0.2, 1), (0.6, 3)]
    assert judge(costs, schedule).saved == pytest.approx(0.4 * 0.1 + 0.4 * 0.3)
    assert prefix_schedule(np.zeros((6, 5), bool), np.arange(5)) == []
