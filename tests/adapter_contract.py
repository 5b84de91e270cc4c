"""What every adapter has to keep; `test_*_adapter.py` and `test_controller.py` subclass it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from smartfrz.control.tailoring import tailoring_positions


@dataclass
class Case:
    """A small model with at least three layers, trained with momentum and weight decay.

    Attributes:
        adapter: The adapter.
        layers: Names of the layers in execution order.
        everything: Layer name to copies of all that the layer holds: weights, biases, statistics.
        flat_weights: Layer name to all its weights, flattened, as the model has them.
        train_step: Takes one real optimizer step.
    """

    adapter: Any
    layers: list[str]
    everything: Callable[[str], list[np.ndarray]]
    flat_weights: Callable[[str], np.ndarray]
    train_step: Callable[[], None]


def same(before, after):
    """Whether two lists of arrays are bit-identical."""
    return len(before) == len(after) and all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))


class AdapterContract:
    @pytest.fixture
    def case(self) -> Case:
        raise NotImplementedError

    def half(self, dtype: str) -> tuple[Any, str, np.ndarray]:
        """An adapter, a layer whose weights have that dtype, and these weights, flattened, as float32."""
        raise NotImplementedError

    dtypes: tuple[str, ...] = ("float16", "bfloat16")

    def test_weights_of_half_precision_are_read_as_they_are(self):
        for dtype in self.dtypes:
            adapter, layer, flat = self.half(dtype)
            indices = np.arange(len(flat))
            read = adapter.weights(layer, indices)
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, flat)
            assert len(np.unique(flat)) > 2
            np.testing.assert_array_equal(adapter.tailored({layer: indices})[layer], flat)

    @pytest.mark.parametrize("more", [0.3, 1.0, 7.5])
    def test_samples_of_layers_smaller_and_larger_than_the_tailored_size(self, case, more):
        sizes = {layer: len(case.flat_weights(layer)) for layer in case.layers}
        indices = {x: tailoring_positions(x, n, max(1, int(more * n)), seed=3) for x, n in sizes.items()}
        case.train_step()
        together = case.adapter.tailored(indices)
        assert list(together) == case.layers
        for layer in case.layers:
            expected = case.flat_weights(layer)[indices[layer]]
            np.testing.assert_array_equal(together[layer], expected)
            np.testing.assert_array_equal(case.adapter.weights(layer, indices[layer]), expected)

    def test_layers_are_in_execution_order_and_stay_so(self, case):
        assert case.adapter.layers() == case.layers
        case.adapter.freeze(case.layers[:1])
        case.train_step()
        assert case.adapter.layers() == case.layers

    def test_weights_are_the_ones_at_the_indices(self, case):
        for layer in case.layers:
            flat = case.flat_weights(layer)
            assert case.adapter.num_weights(layer) == len(flat)
            # Two sets of indices: nothing of the first may stick to the second.
            for indices in np.arange(len(flat)), np.array([0, len(flat) // 2, len(flat) - 1]):
                read = case.adapter.weights(layer, indices)
                assert read.dtype == np.float32
                np.testing.assert_array_equal(read, flat[indices])

    def test_weights_are_a_copy(self, case):
        layer = case.layers[0]
        indices = np.arange(case.adapter.num_weights(layer))
        read = case.adapter.weights(layer, indices)
        kept = read.copy()
        case.train_step()
        np.testing.assert_array_equal(read, kept)
        assert not np.array_equal(case.adapter.weights(layer, indices), kept)
        moved = case.everything(layer)
        read += 1.0
        assert same(case.everything(layer), moved)

    @pytest.mark.parametrize("which", [[0], [1], [0, 1], [2]])
    def test_frozen_layers_stay_bit_identical_and_others_move(self, case, which):
        for _ in range(2):
            case.train_step()  # momentum is under way
        frozen = [case.layers[index] for index in which]
        case.adapter.freeze(frozen)
        before = {layer: case.everything(layer) for layer in case.layers}
        for _ in range(2):
            case.train_step()
        moved = {layer: not same(before[layer], case.everything(layer)) for layer in case.layers}
        assert moved == {layer: layer not in frozen for layer in case.layers}

    def test_freezing_twice_changes_nothing(self, case):
        case.train_step()
        case.adapter.freeze([case.layers[0]])
        before = case.everything(case.layers[0])
        case.adapter.freeze([case.layers[0]])
        case.train_step()
        case.adapter.freeze([case.layers[0]])
        assert same(before, case.everything(case.layers[0]))

    def test_unfrozen_layers_move_again(self, case):
        case.train_step()
        case.adapter.freeze(case.layers[:2])
        case.train_step()
        case.adapter.unfreeze([case.layers[0]])
        before = [case.everything(layer) for layer in case.layers]
        case.train_step()
        moved = [not same(b, case.everything(layer)) for b, layer in zip(before, case.layers, strict=True)]
        assert moved == [True, False] + [True] * (len(case.layers) - 2)

    def test_unfreezing_an_active_layer_changes_nothing(self, case):
        before = [case.everything(layer) for layer in case.layers]
        case.adapter.unfreeze(case.layers)
        assert all(same(b, case.everything(layer)) for b, layer in zip(before, case.layers, strict=True))

    def test_layers_frozen_one_after_another_thawed_in_part_and_frozen_again(self, case):
        first, second, *rest = case.layers
        frozen = set()
        for change, layers in [
            (case.adapter.freeze, [first]),
            (case.adapter.freeze, [second]),
            (case.adapter.unfreeze, [first]),
            (case.adapter.freeze, [first, second]),
            (case.adapter.unfreeze, [first, second, *rest]),
        ]:
            change(layers)
            frozen = frozen.union(layers) if change == case.adapter.freeze else frozen.difference(layers)
            before = {layer: case.everything(layer) for layer in case.layers}
            for _ in range(2):
                case.train_step()
            moved = [layer for layer in case.layers if not same(before[layer], case.everything(layer))]
            assert moved == [layer for layer in case.layers if layer not in frozen]

    def test_the_caller_s_lists_and_indices_stay_as_they_were(self, case):
        layers, indices = [case.layers[0]], np.arange(3)
        case.adapter.weights(layers[0], indices)
        case.adapter.freeze(layers)
        case.train_step()
        case.adapter.unfreeze(layers)
        assert layers == [case.layers[0]]
        np.testing.assert_array_equal(indices, np.arange(3))
        names = case.adapter.layers()
        names.clear()
        assert case.adapter.layers() == case.layers
