import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz.control.tailoring import split_positions, tailor, tailoring_positions

# (layer, num_weights, tailored_size, seed) -> positions. Stored recordings and resumed runs rely on them.
GOLDEN = [
    (("conv1", 1000, 8, 0), [21, 197, 331, 391, 553, 704, 802, 944]),
    (("conv1", 1000, 8, 1), [84, 128, 345, 409, 565, 720, 774, 963]),
    (("layer4.1.conv2", 1000, 8, 0), [62, 184, 323, 482, 547, 723, 783, 902]),
    (("conv1", 3, 8, 0), [0, 0, 1, 1, 2, 2, 2, 2]),
]
sizes = st.integers(1, 5000), st.integers(1, 300), st.integers(0, 2**64)


@pytest.mark.parametrize(("arguments", "expected"), GOLDEN)
def test_golden_positions(arguments, expected):
    *given_, seed = arguments
    assert tailoring_positions(*given_, seed=seed).tolist() == expected


def test_positions_do_not_depend_on_the_process():
    code = (
        "from smartfrz.control.tailoring import tailoring_positions as t;"
        "print(*t('block.3', 777, 16, seed=5), *t('block.3', 7, 16, seed=5))"
    )
    environment = {"PYTHONHASHSEED": "123"}  # str hashes differ there
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [*tailoring_positions("block.3", 777, 16, seed=5), *tailoring_positions("block.3", 7, 16, seed=5)]
    assert [int(p) for p in result.stdout.split()] == here


@given(*sizes)
def test_positions_are_valid_ascending_and_distinct_where_possible(num_weights, tailored_size, seed):
    positions = tailoring_positions("layer", num_weights, tailored_size, seed=seed)
    assert positions.dtype == np.int64
    assert positions.shape == (tailored_size,)
    assert positions.min() >= 0
    assert positions.max() < num_weights
    steps = np.diff(positions)
    assert (steps > 0).all() if num_weights >= tailored_size else (steps >= 0).all()


def test_a_small_layer_is_sampled_with_replacement():
    positions = tailoring_positions("layer", 10, 1000)
    counts = np.bincount(positions, minlength=10)
    # Binomial, mean 100, standard deviation 9.5: neither a plain repetition nor far from uniform.
    assert counts.min() > 60
    assert counts.max() < 140
    assert len(set(counts)) > 1


def test_a_layer_of_exactly_the_tailored_size_is_read_whole():
    np.testing.assert_array_equal(tailoring_positions("layer", 50, 50), np.arange(50))


def test_every_weight_is_sampled_equally_often_where_the_strata_are_equal():
    hits = np.zeros(90)
    for seed in range(2000):
        hits[tailoring_positions("layer", 90, 30, seed=seed)] += 1
    # One of three in each draw: mean 667, standard deviation 21.
    assert hits.min() > 667 - 5 * 21
    assert hits.max() < 667 + 5 * 21


@given(st.integers(1, 300), st.integers(0, 5000), st.integers(0, 100))
def test_one_position_in_each_stratum(tailored_size, more, seed):
    num_weights = tailored_size + more
    positions = tailoring_positions("layer", num_weights, tailored_size, seed=seed)
    edges = [index * num_weights // tailored_size for index in range(tailored_size + 1)]
    assert all(low <= p < high for low, p, high in zip(edges[:-1], positions, edges[1:], strict=True))


@pytest.mark.parametrize("other", [("b", 500, 0), ("a", 501, 0), ("a", 500, 1)])
def test_name_size_and_seed_each_change_the_positions(other):
    layer, num_weights, seed = other
    first = tailoring_positions("a", 500, 50, seed=0)
    assert not np.array_equal(first, tailoring_positions(layer, num_weights, 50, seed=seed))


@pytest.mark.parametrize(("num_weights", "tailored_size"), [(0, 4), (-1, 4), (4, 0)])
def test_nothing_to_draw_from(num_weights, tailored_size):
    message = f"received num_weights={num_weights} and tailored_size={tailored_size} for layer 'act'.*Leave out layers"
    with pytest.raises(ValueError, match=message):
        tailoring_positions("act", num_weights, tailored_size)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_any_float_is_read_as_float32(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    # Eighths up to 3 are exact in all of them.
    weights = np.array([[0.125, -1.5], [3.0, 0.0]]).astype(dtype)
    read = tailor(weights, np.array([0, 1, 1, 2]))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.array([0.125, -1.5, -1.5, 3.0], np.float32))


def test_the_result_is_a_copy_in_the_order_of_the_shape():
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    read = tailor(weights, np.arange(6))
    read += 1
    np.testing.assert_array_equal(weights.ravel(), np.arange(6))
    np.testing.assert_array_equal(tailor(weights.T, np.arange(6)), [0, 3, 1, 4, 2, 5])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 2**32))
def test_split_positions_read_what_the_joined_weights_hold(tensor_sizes, seed):
    tensors = np.split(np.arange(float(sum(tensor_sizes))), np.cumsum(tensor_sizes)[:-1])
    total = sum(tensor_sizes)
    positions = np.sort(np.random.default_rng(seed).integers(0, total, 30)) if total else np.zeros(0, np.int64)
    parts = split_positions(positions, tensor_sizes)
    read = [tensor[part] for tensor, part in zip(tensors, parts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(read), positions)
