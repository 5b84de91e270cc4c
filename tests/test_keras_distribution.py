"""The Keras callback on two devices of one process: MirroredStrategy on TensorFlow, keras.distribution on JAX.

`test_keras_backends.py` runs it, in a process of its own: the number of devices is fixed when a backend starts.
"""

import os

import numpy as np
import pytest

if "SMARTFRZ_DEVICES" not in os.environ:
    pytest.skip("run by test_keras_backends.py; or set KERAS_BACKEND and SMARTFRZ_DEVICES", allow_module_level=True)
if os.environ.get("KERAS_BACKEND") == "tensorflow":
    import tensorflow as tf

    # Before anything else runs: devices cannot be added later.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

from adapter_contract import same
from keras_runs import (
    BACKEND,
    FREEZE_FIRST,
    FREEZE_TWO,
    LAYERS,
    STEPS,
    WARNINGS,
    Watch,
    fit,
    freezer,
    keras,
    make_model,
    read,
)
from numpy_adapter import ChangePredictor, make_info

from smartfrz.adapters.keras import KerasAdapter, trace_layers
from smartfrz.errors import UnsupportedModelError

pytestmark = WARNINGS
# One for all tests: a second one in the same process collides with the collective operations of the first.
STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) if BACKEND == "tensorflow" else None
only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution works on JAX only")


def on_two_devices(make):
    """What `make` returns, a model that is trained on two devices."""
    if BACKEND == "tensorflow":
        with STRATEGY.scope():
            return make()
    assert len(keras.distribution.list_devices()) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    return make()


@pytest.fixture(autouse=True)
def _no_distribution_left():
    yield
    if BACKEND == "jax":
        keras.distribution.set_distribution(None)


def copies(variable):
    """The variable's value on each device."""
    value = variable.value
    if BACKEND == "tensorflow":
        return [np.array(x) for x in value.values]
    return [np.array(shard.data) for shard in value.addressable_shards]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
# With MirroredStrategy, XLA refuses variables of another device, with SmartFRZ and without.
@pytest.mark.parametrize("options", [{}] if BACKEND == "tensorflow" else [{}, {"jit_compile": True}])
def test_frozen_on_every_device(optimizer, options):
    seen = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            layers = ["conv1", "norm1", "conv2", "norm2", "head"]
            seen.append({x: [c for v in self.model.get_layer(x).weights for c in copies(v)] for x in layers})

    model = on_two_devices(lambda: make_model(optimizer, **options))
    callback, watch = freezer(FREEZE_TWO), Watch()
    fit(model, [callback, watch, Keep()])
    assert callback.report().frozen == {"conv1": 6, "conv2": 12}
    assert len(seen[0]["conv1"]) == 2 * len(model.get_layer("conv1").weights)
    for step in range(1, 16):
        moved = [layer for layer in seen[0] if not same(seen[step - 1][layer], seen[step][layer])]
        still = ["conv1", "norm1"] * (step > 5) + ["conv2", "norm2"] * (step > 11)
        assert moved == [layer for layer in seen[0] if layer not in still]
    assert model.get_layer("conv1").trainable


def test_two_devices_decide_as_one():
    predictor = ChangePredictor(make_info(tailored_size=16), scale=6.0)
    options = {"predictor": predictor, "threshold": 0.8, "decide_every": 2, "patience": 2}

    def make():
        model = make_model()
        for name in ("norm1", "norm2"):  # whose statistics are those of half a batch on each TensorFlow device
            model.get_layer(name).trainable = False
        return model

    one = freezer(**options)
    fit(make(), [one], epochs=3)
    two = freezer(**options)
    fit(on_two_devices(make), [two], epochs=3)
    assert one.frozen_layers == two.frozen_layers != []
    for mine, other in zip(one.events, two.events, strict=True):
        assert (mine.step, mine.layer, mine.action) == (other.step, other.layer, other.action)
        np.testing.assert_allclose(mine.confidence, other.confidence, atol=1e-3)


def test_a_resumed_run_on_two_devices(tmp_path):
    predictor = ChangePredictor(make_info(tailored_size=16), scale=6.0)
    options = {"predictor": predictor, "threshold": 0.8, "decide_every": 2, "total_steps": 48}
    whole, watch = freezer(**options), Watch()
    fit(on_two_devices(make_model), [whole, watch], epochs=5)
    assert any(step <= 24 for step in whole.report().frozen.values())
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    fit(on_two_devices(make_model), [backup, freezer(**options)], epochs=3)
    resumed, rest = freezer(**options), Watch()
    fit(on_two_devices(make_model), [backup, resumed, rest], epochs=5)
    assert repr(resumed.events) == repr(whole.events)
    for mine, other in zip(rest.layers, watch.layers[3 * STEPS :], strict=True):
        # A backup holds the statistics of the first TensorFlow device only: those of the second begin from there.
        names = LAYERS if BACKEND == "jax" else ["head"]
        for name in names:
            for a, b in zip(mine[name], other[name], strict=True):
                np.testing.assert_allclose(a, b, atol=2e-3 if BACKEND == "tensorflow" else 0.0)


@only_tensorflow
def test_statistics_of_a_frozen_norm_are_those_of_both_devices():
    model = on_two_devices(lambda: make_model(momentum=0.9))
    norm = model.get_layer("norm1")
    before = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            before.append([np.mean(copies(v), axis=0) for v in (norm.moving_mean, norm.moving_variance)])

    fit(model, [freezer(FREEZE_FIRST, norm_batches=4), Keep()])
    # Before the stage at step 6, steps 3 to 6: what is kept at index 1, and what the twin without freezing has at 5.
    twin = on_two_devices(lambda: make_model(momentum=0.9))
    plain, norm = [], twin.get_layer("norm1")

    class Plain(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            plain.append([np.mean(copies(v), axis=0) for v in (norm.moving_mean, norm.moving_variance)])

    fit(twin, [Plain()])
    share = 0.9**4
    for index, value in enumerate(before[5]):
        np.testing.assert_allclose(value, (plain[5][index] - share * plain[1][index]) / (1 - share), atol=1e-4)
    first, second = copies(model.get_layer("norm1").moving_mean)
    np.testing.assert_array_equal(first, second)


@only_jax
def test_weights_that_are_spread_over_devices():
    """Model parallel: each device holds half of every kernel."""
    mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], keras.distribution.list_devices())
    layout = keras.distribution.LayoutMap(mesh)
    layout["conv.*kernel"] = (None, None, None, "model")
    parallel = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False)
    keras.distribution.set_distribution(parallel)
    model = make_model("adam")
    kernel = model.get_layer("conv1").kernel
    assert kernel.value.addressable_shards[0].data.shape == (3, 3, 2, 2)
    adapter = KerasAdapter(model, trace_layers(model))
    indices = np.arange(adapter.num_weights("conv1"))
    expected = read(kernel).transpose(3, 2, 0, 1).reshape(-1)
    np.testing.assert_array_equal(adapter.weights("conv1", indices), expected)
    callback, watch = freezer(FREEZE_TWO), Watch()
    fit(model, [callback, watch])
    assert watch.moved(6) == ["conv2", "head"]
    assert watch.moved(15) == ["head"]
    assert kernel.value.addressable_shards[0].data.shape == (3, 3, 2, 2)


@only_tensorflow
def test_several_workers_are_refused_by_a_stand_in_for_their_strategy(monkeypatch):
    model = make_model()

    class MultiWorkerMirroredStrategy:
        num_replicas_in_sync = 2

    monkeypatch.setattr(model, "_distribute_strategy", MultiWorkerMirroredStrategy())
    with pytest.raises(UnsupportedModelError, match="trained by MultiWorkerMirroredStrategy, which"):
        KerasAdapter(model, trace_layers(model))


@only_jax
def test_several_processes_are_refused_by_a_stand_in_for_their_number(monkeypatch):
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    model = make_model()
    with pytest.raises(UnsupportedModelError, match="trained by JAX with 2 processes, which"):
        KerasAdapter(model, trace_layers(model))
