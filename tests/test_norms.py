"""The statistics of the last batches, from two snapshots of a running average."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz.control.norms import compute_old_share, compute_recent_statistics


@pytest.mark.parametrize(
    ("kept", "before", "since", "expected"),
    [
        (0.5, 10, 3, 0.125),
        (0.99, 0, 1, 0.99),
        (0.5, 10, 0, 1.0),
        (None, 30, 10, 0.75),
        (None, 0, 4, 0.0),
        (None, 0, 0, 1.0),
    ],
)
def test_old_share(kept, before, since, expected):
    assert compute_old_share(kept, before=before, since=since) == expected


@given(st.floats(0.01, 0.999), st.integers(1, 20), st.integers(1, 20))
def test_batches_before_the_snapshot_no_longer_count(kept, before, since):
    generator = np.random.default_rng(before)
    running = np.zeros(3)
    for value in generator.normal(size=(before, 3)):
        running = kept * running + (1 - kept) * value
    old, recent, weight = running, np.zeros(3), 0.0
    for value in generator.normal(size=(since, 3)):
        running = kept * running + (1 - kept) * value
        recent, weight = kept * recent + (1 - kept) * value, kept * weight + (1 - kept)
    share = compute_old_share(kept, before=before, since=since)
    mean, _ = compute_recent_statistics((old, old**2), (running, running**2), share)
    np.testing.assert_allclose(mean, recent / weight, rtol=1e-6, atol=1e-9)


def test_a_plain_average():
    values = np.arange(10.0)
    share = compute_old_share(None, before=6, since=4)
    mean, variance = compute_recent_statistics(
        (values[:6].mean(), np.float64(2)), (values.mean(), np.float64(2)), share
    )
    assert mean == pytest.approx(values[6:].mean())
    assert variance == 2.0


def test_rounding_leaves_no_negative_variance():
    _, variance = compute_recent_statistics((np.zeros(2), np.ones(2)), (np.zeros(2), np.array([0.4, 0.6])), 0.5)
    np.testing.assert_allclose(variance, [0.0, 0.2])


@pytest.mark.parametrize("share", [1.0, 1.5, -0.1, float("nan")])
def test_nothing_to_tell_from(share):
    assert compute_recent_statistics((1.0, 1.0), (2.0, 2.0), share) is None


def test_tensors_are_taken_as_they_are():
    torch = pytest.importorskip("torch")
    old = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    new = torch.full((2,), 1.0, dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64)
    mean, variance = compute_recent_statistics(old, new, 0.5)
    assert mean.tolist() == [2.0, 2.0]
    assert variance.tolist() == pytest.approx([0.0, 0.2])
