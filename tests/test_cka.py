import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz.dataset_builder.cka import centered_gram, cka_of_grams

CENTERED = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
ONE_AXIS = np.array([[1.0], [-1.0], [0.0], [0.0]])

UNDEFINED = {
    "constant": np.full((8, 3), 0.1),
    "constant float32": np.full((8, 3), 0.1, np.float32),
    "constant columns": np.tile([0.1, 1e8, -3.7], (8, 1)),
    "zero": np.zeros((8, 3)),
    "inf": np.where(np.eye(8) > 0, np.inf, 1.0),
    "both infinities": np.where(np.eye(8) > 0, np.inf, -np.inf),
    "nan": np.where(np.eye(8) > 0, np.nan, 1.0),
    "overflowing": np.random.default_rng(0).normal(size=(8, 3)) * 1e200,
    "overflowing norm": np.random.default_rng(0).normal(size=(8, 3)) * 1e100,
}


def features(seed, examples=12, size=5):
    return np.random.default_rng(seed).normal(size=(examples, size))


def linear_cka(x, y):
    return cka_of_grams(centered_gram(x), centered_gram(y))


def rotation(seed, size):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def feature_form(x, y):
    """Kornblith et al. 2019, written out as in Eq. 5, on centered features."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


seeds = st.integers(0, 10_000)
# 1e-9: float64 rounding of Gram matrices of a few dozen entries stays far below.
close = dict(rel=0, abs=1e-9)


@given(seeds, st.integers(4, 20), st.integers(1, 30))
def test_equal_features_have_cka_one(seed, examples, size):
    x = features(seed, examples, size)
    assert linear_cka(x, x) == pytest.approx(1.0, **close)


@given(seeds, st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_rotation_scale_and_shift_change_nothing(seed, scale, shift):
    x, y = features(seed), features(seed + 1, size=7)
    moved = scale * (x @ rotation(seed, 5)) + shift
    assert linear_cka(moved, y) == pytest.approx(linear_cka(x, y), **close)
    assert linear_cka(moved, x) == pytest.approx(1.0, **close)


@given(seeds, st.integers(1, 30))
def test_gram_form_equals_feature_form(seed, size):
    x, y = features(seed) + 3.0, features(seed + 1, size=size) - 5.0
    assert linear_cka(x, y) == pytest.approx(feature_form(x, y), **close)
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y), **close)


def test_centering_matters():
    # Without it, a common offset makes unrelated features look equal.
    x, y = features(0), features(1)
    assert linear_cka(x + 100.0, y + 100.0) < 0.9


def test_hand_computed_value():
    # X X^T has norm sqrt(8), Y Y^T norm 2, their inner product is 4: 4 / (2 sqrt 8) = 1 / sqrt 2.
    assert linear_cka(CENTERED, ONE_AXIS) == pytest.approx(np.sqrt(0.5), **close)


def test_orthogonal_features_have_cka_zero():
    assert linear_cka(CENTERED[:, :1], CENTERED[:, 1:]) == 0.0


def test_feature_maps_are_flattened():
    maps = np.random.default_rng(0).normal(size=(6, 2, 3, 3))
    assert linear_cka(maps, features(0, 6)) == linear_cka(maps.reshape(6, -1), features(0, 6))


def test_float32_features_are_computed_in_float64():
    gram = centered_gram(features(0).astype(np.float32))
    assert gram.dtype == np.float64
    assert gram.shape == (12, 12)


def test_features_are_left_as_they_are():
    x = features(0)
    before = x.copy()
    linear_cka(x, x)
    np.testing.assert_array_equal(x, before)


def test_a_small_variation_upon_a_large_constant_still_counts():
    # What float32 can hold: 1e-6 of the mean is a signal, not rounding.
    x = features(0)
    assert linear_cka(1.0 + 1e-6 * x, x) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", UNDEFINED)
def test_undefined_is_nan_without_a_warning(kind):
    assert np.isnan(linear_cka(UNDEFINED[kind], features(0, 8)))
    assert np.isnan(linear_cka(features(0, 8), UNDEFINED[kind]))


def test_different_numbers_of_examples_are_refused():
    with pytest.raises(ValueError, match=r"received 12 and 10 examples\. Pass features taken from one shared probe"):
        linear_cka(features(0, 12), features(0, 10))
    with pytest.raises(ValueError, match="received 4 and 5 examples"):
        cka_of_grams(np.eye(4), np.eye(5))


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (10,)])
def test_too_few_examples_are_refused(shape):
    with pytest.raises(ValueError, match=r"at least 4 examples: received features of shape .* larger probe batch"):
        centered_gram(np.zeros(shape))
