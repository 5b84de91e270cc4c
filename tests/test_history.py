import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz.control.history import WeightHistory

WINDOW, SIZE = 4, 3


def vector(value):
    return np.full(SIZE, value, np.float32)


def filled(**counts):
    """A history in which a layer's vectors are 1, 2, 3, ..."""
    history = WeightHistory(WINDOW, SIZE)
    for layer, count in counts.items():
        for value in range(1, count + 1):
            history.append(layer, vector(value))
    return history


@given(st.integers(1, 6), st.integers(1, 20))
def test_the_ring_keeps_the_newest_oldest_first(window, count):
    history = WeightHistory(window, 1)
    for value in range(count):
        history.append("a", np.array([value], np.float32))
    assert history.length("a") == min(count, window)
    assert history.rows("a").ravel().tolist() == list(range(count))[-window:]


def test_windows_are_padded_on_the_left():
    history, lengths = filled(a=1, b=3).windows(["b", "a"])
    assert history.dtype == np.float32
    assert lengths.dtype == np.int64
    assert lengths.tolist() == [3, 1]
    # The window is as long as the longest history, not 4.
    assert history[..., 0].tolist() == [[1, 2, 3], [0, 0, 1]]
    assert history.shape == (2, 3, SIZE)


def test_windows_never_grow_over_the_window():
    history, lengths = filled(a=9).windows(["a"])
    assert history[0, :, 0].tolist() == [6, 7, 8, 9]
    assert lengths.tolist() == [4]


def test_a_dropped_layer_starts_anew():
    history = filled(a=3, b=2)
    history.drop("a")
    history.drop("never there")
    assert history.length("a") == 0
    assert history.length("b") == 2
    history.append("a", vector(7))
    assert history.rows("a")[:, 0].tolist() == [7]


def test_callers_cannot_change_what_is_kept():
    history = WeightHistory(WINDOW, SIZE)
    given_ = vector(1)
    history.append("a", given_)
    given_ += 1
    for count in (1, WINDOW):
        while history.length("a") < count:
            history.append("a", vector(1))
        history.rows("a")[:] = 9
        history.windows(["a"])[0][:] = 9
        history.state_dict()["a"][:] = 9
        assert history.rows("a").tolist() == [[1] * SIZE] * count


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite_until_a_bad_value_and_again_when_it_has_left_the_window(bad):
    history = filled(a=2, b=2)
    assert history.is_finite("a")
    history.append("a", np.array([0, bad, 0], np.float32))
    for _ in range(WINDOW - 1):
        assert not history.is_finite("a")
        assert history.is_finite("b")
        history.append("a", vector(1))
    assert not history.is_finite("a")
    history.append("a", vector(1))
    assert history.is_finite("a")


@pytest.mark.parametrize("count", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 2])
def test_a_restored_history_goes_on_as_the_saved_one(count):
    saved = filled(a=count, b=2)
    restored = filled(c=1)
    restored.load_state_dict(saved.state_dict())
    assert restored.length("c") == 0
    for value in range(100, 100 + WINDOW + 1):
        for name in "a", "b":
            np.testing.assert_array_equal(restored.rows(name), saved.rows(name))
        np.testing.assert_array_equal(restored.windows(["a", "b"])[0], saved.windows(["a", "b"])[0])
        saved.append("a", vector(value))
        restored.append("a", vector(value))


def test_of_a_longer_saved_history_the_newest_is_kept():
    history = WeightHistory(WINDOW, SIZE)
    history.load_state_dict({"a": np.arange(7 * SIZE, dtype=np.float32).reshape(7, SIZE)})
    assert history.rows("a")[:, 0].tolist() == [9, 12, 15, 18]


@pytest.mark.parametrize("shape", [(SIZE + 1,), (1, SIZE), ()])
def test_a_vector_of_another_shape(shape):
    history = WeightHistory(WINDOW, SIZE)
    with pytest.raises(ValueError, match=r"layer 'conv1' holds vectors of length 3.*Tailor with tailored_size=3"):
        history.append("conv1", np.zeros(shape, np.float32))
    assert history.length("conv1") == 0


def test_a_saved_state_of_another_tailored_size():
    with pytest.raises(ValueError, match="vectors of length 3"):
        WeightHistory(WINDOW, SIZE).load_state_dict({"a": np.zeros((2, SIZE + 1), np.float32)})
