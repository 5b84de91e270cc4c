"""The Keras callback among others, and what it does besides freezing; `test_keras_backends.py` runs it on each backend."""

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from adapter_contract import same
from keras_runs import (
    BACKEND,
    FREEZE_FIRST,
    FREEZE_TWO,
    LAYERS,
    STEPS,
    WARNINGS,
    Watch,
    compiled,
    data,
    fit,
    freezer,
    keras,
    make_model,
    read,
)
from numpy_adapter import ChangePredictor, SlowPredictor, make_info

from smartfrz.adapters.keras import trace_layers
from smartfrz.adapters.keras.compiling import CompileClock
from smartfrz.control.options import COMPILED_STAGES
from smartfrz.errors import StateError

pytestmark = WARNINGS
RUN = {"threshold": 0.8, "decide_every": 2, "patience": 2, "total_steps": 48}


class At(keras.callbacks.Callback):
    """Calls a function at the end of one batch, counted over epochs from 0."""

    def __init__(self, batch, function):
        super().__init__()
        self.left, self.function = batch, function

    def on_train_batch_end(self, batch, logs=None):
        if self.left == 0:
            self.function()
        self.left -= 1


def change_freezer(**options):
    return freezer(predictor=ChangePredictor(make_info(tailored_size=16), scale=6.0), **RUN | options)


def decaying_model():
    return make_model(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.02, 48)))


def test_thawed_layers_are_trained_again_and_may_freeze_again():
    callback, watch = freezer([*FREEZE_TWO, {"conv1": 0.9, "conv2": 0.1, "head": 0.1}]), Watch()
    thaw = At(13, lambda: callback.thaw(["conv1"]))
    thaw_all = At(14, callback.thaw)
    fit(make_model(), [callback, watch, thaw, thaw_all], epochs=3)
    assert watch.moved(6) == ["conv2", "head"]
    assert watch.moved(12) == ["head"]
    assert watch.moved(14) == ["conv1", "head"]
    assert watch.moved(15) == LAYERS
    assert watch.moved(20) == ["conv2", "head"]
    assert [(e.step, e.layer, e.reason) for e in callback.events if e.action == "thaw"] == [
        (14, "conv1", "by_hand"),
        (15, "conv2", "by_hand"),
    ]
    assert callback.report().frozen_spans() == {"conv1": [(6, 14), (20, 24)], "conv2": [(12, 15)]}
    with pytest.raises(ValueError, match=r"`layers` names \['conv9'\]"):
        fit(make_model(), [callback, At(1, lambda: callback.thaw(["conv9"]))])
    assert freezer().thaw() == []


@pytest.mark.parametrize("kind", ["schedule", "callback"])
def test_layers_thaw_when_the_learning_rate_is_raised_again(kind):
    schedule, others = keras.optimizers.schedules.PiecewiseConstantDecay([4, 8], [0.05, 0.01, 0.05]), []
    if kind == "callback":  # raised at the second epoch
        schedule = 0.01
        others = [keras.callbacks.LearningRateScheduler(lambda epoch, rate: [0.01, 0.05][epoch])]
    callback, watch = freezer(FREEZE_FIRST, thaw_on_restart=True), Watch()
    fit(make_model(keras.optimizers.SGD(schedule)), [callback, watch, *others])
    thawed = [(e.layer, e.reason) for e in callback.events if e.action == "thaw"]
    assert thawed == [("conv1", "learning_rate_raised")]
    assert watch.moved(7) == ["conv2", "head"]
    assert watch.moved(12) == LAYERS


def test_cost_aware_order_asks_less_of_the_layer_that_closes_the_prefix():
    for order, frozen in (("free", []), ("cost_aware", ["conv1"])):
        callback = freezer([{"conv1": 0.77, "conv2": 0.77, "head": 0.1}], freeze_order=order, threshold=0.8)
        fit(make_model(), [callback])
        assert callback.frozen_layers == frozen
    bars = {event.layer: event.threshold for event in callback.events[:3]}
    assert bars["conv1"] < 0.77 < bars["conv2"] < bars["head"]


def test_spectral_normalization_freezes():
    inner = keras.layers.Dense(4, name="inner")
    wrapper = keras.layers.SpectralNormalization(inner, name="spectral")
    model = keras.Sequential([keras.Input((5,)), wrapper, keras.layers.Dense(3, name="head")])
    values = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            assert self.model is model  # on JAX, asking for it gives the variables their values back
            values.append([read(v) for v in [*inner.weights, wrapper.vector_u]])

    callback = freezer([{"spectral/layer": 0.9, "head": 0.1}])
    fit(compiled(model), [callback, Keep()], inputs=data(shape=(5,)))
    assert callback.frozen_layers == ["spectral/layer"]
    changes = [not same(a, b) for a, b in pairwise(values)]
    assert changes == [True] * 5 + [False] * 10
    assert "call" not in vars(wrapper)


class ShrinksItsHead(keras.Model):
    """Changes a weight by itself, frozen or not."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, inputs, training=False):
        if training:
            kernel = self.inner.layers[1].kernel
            kernel.assign(kernel.value * 0.99)
        return self.inner(inputs, training=training)


def test_a_model_that_changes_frozen_layers_is_noticed_and_told():
    layers = [keras.Input((5,)), keras.layers.Dense(4, name="first"), keras.layers.Dense(3, name="head")]
    model = compiled(ShrinksItsHead(keras.Sequential(layers)))
    callback = freezer([{"inner/first": 0.1, "inner/head": 0.9}] * 2)
    with pytest.warns(
        UserWarning, match="SmartFRZ froze 'inner/head', but the step after that changed it all the same"
    ):
        fit(model, [callback], inputs=data(shape=(5,)))
    assert callback.frozen_layers == []
    assert callback.report().num_steps == 16
    assert [e.reason for e in callback.events if e.action == "thaw"] == ["moved_while_frozen"]


class OneMoreAtEveryStage:
    """Is sure of one more of twelve layers at every freezing stage."""

    info, sha256, num_stages = make_info(), "1e" * 32, 0

    def predict(self, history, lengths):
        self.num_stages += 1
        ready = max(0, self.num_stages - (12 - len(history)))
        freeze = np.repeat(np.array([0.9, 0.1], np.float32), [ready, len(history) - ready])
        return np.stack([1 - freeze, freeze], axis=1), np.zeros(history.shape[:2], np.float32)


def test_a_slow_predictor_is_asked_less_often(monkeypatch, caplog):
    predictor = SlowPredictor(monkeypatch, sure_from=3)

    class Passes(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            predictor.now += 60.0

    callback = freezer(predictor=predictor, record_every=1, decide_every=1)
    fit(make_model(), [callback, Passes()], epochs=15)
    assert 4 <= len(predictor.asked_at) <= 20  # of 120 stages
    assert callback.frozen_layers[:1] == ["conv1"]
    assert sum("asking the predictor took" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.skipif(BACKEND == "torch", reason="compiles nothing on PyTorch, if not asked to")
def test_few_freezing_stages_where_each_compiles_and_the_report_says_what_that_took():
    layers = [keras.layers.Dense(4, name=f"dense{i}") for i in range(12)]
    model = compiled(keras.Sequential([keras.Input((5,)), *layers]), jit_compile=BACKEND == "jax")
    callback = freezer(predictor=OneMoreAtEveryStage(), decide_every=1)
    fit(model, [callback], epochs=3, inputs=data(shape=(5,)))
    stages = sorted(set(callback.report().frozen.values()))
    assert 2 <= len(stages) <= COMPILED_STAGES
    assert "grouped" in {event.reason for event in callback.events}
    report = callback.report()
    stages = [step for step in stages if step < report.num_steps]
    assert report.num_recompilations == len(stages)
    assert report.num_compilations == 1 + len(stages)
    assert 0.0 < report.recompile_seconds < report.compile_seconds < report.seconds + 60.0
    assert f"Keras compiled {1 + len(stages)} times" in str(report)


def test_nothing_freezes_that_saves_less_than_compiling_costs():
    script = [{"conv1": 0.9, "conv2": 0.9, "head": 0.1}]
    callback = freezer(script, recompile_steps=1000)
    fit(make_model(), [callback])
    reasons = [event.reason for event in callback.events[:2]]
    if BACKEND == "torch":  # where nothing is compiled
        assert (callback.frozen_layers, reasons) == (["conv1", "conv2"], ["confident", "confident"])
    else:
        assert (callback.frozen_layers, reasons) == ([], ["grouped", "grouped"])


def test_what_compiling_costs_is_measured_in_steps(monkeypatch):
    now = 100.0
    monkeypatch.setattr("smartfrz.adapters.keras.compiling.time.perf_counter", lambda: now)
    clock = CompileClock()
    assert clock.cost == 0.0
    for seconds, new in ((5.0, True), (0.1, False), (0.15, False), (0.1, False), (3.1, True), (0.1, False)):
        clock.note_new_function(new)
        clock.call_begins()
        now += seconds
        clock.call_ended()
    assert clock.cost == 64.0  # 49 steps, as a power of two
    facts = clock.facts()
    assert (facts["num_compilations"], facts["num_recompilations"]) == (2, 1)
    assert facts["compile_seconds"] == pytest.approx(7.9)
    assert facts["recompile_seconds"] == pytest.approx(3.0)


def test_the_state_beside_a_backup_belongs_to_what_is_restored(tmp_path):
    """A process is killed in its fourth epoch; `BackupAndRestore` and SmartFRZ go on as if it had not been."""
    whole, watch = change_freezer(), Watch()
    fit(decaying_model(), [whole, watch], epochs=6)
    steps = list(whole.report().frozen.values())
    assert any(step <= 24 for step in steps)
    assert any(step > 24 for step in steps)

    folder = tmp_path / "backup"
    code = "import sys, test_keras_fit as t; t.train_until_killed(sys.argv[1])"
    died = subprocess.run([sys.executable, "-c", code, folder], env=os.environ | {"PYTHONPATH": _paths()})
    assert died.returncode == -signal.SIGKILL
    assert len(list(folder.glob("smartfrz-*.npz"))) == 2

    resumed, rest = change_freezer(), Watch()
    # Listed before and behind it: neither must matter.
    fit(decaying_model(), [rest, keras.callbacks.BackupAndRestore(folder), resumed], epochs=6)
    assert repr(resumed.events) == repr(whole.events)  # repr: NaN differs from itself
    assert resumed.frozen_layers == whole.frozen_layers
    for mine, other in zip(rest.layers, watch.layers[3 * STEPS :], strict=True):
        assert all(same(mine[layer], other[layer]) for layer in LAYERS)
    assert not folder.exists()


def _paths():
    return os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def train_until_killed(folder):
    """The other process of the test above."""
    kill = At(3 * STEPS + 2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fit(decaying_model(), [keras.callbacks.BackupAndRestore(folder), change_freezer(), kill], epochs=6)


@pytest.mark.parametrize("save_freq", ["epoch", 13])
def test_a_checkpoint_of_a_half_frozen_model_keeps_its_momenta(save_freq, tmp_path):
    path = str(tmp_path / "{epoch}.keras")
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_freq=save_freq)
    callback, watch = freezer(FREEZE_TWO), Watch()
    model = make_model("adam")
    fit(model, [checkpoint, watch, callback])  # listed before: it comes after all the same
    loaded = keras.saving.load_model(path.format(epoch=2))
    step = 15 if save_freq == "epoch" else 12
    for variable, value in zip(loaded.optimizer.variables, watch.optimizer[step], strict=True):
        assert same([read(variable)], [value])
    assert all(layer.trainable for layer in loaded.layers)
    assert "_save_model" not in vars(checkpoint)


def test_what_joins_the_logs_and_tensorboard(tmp_path):
    pytest.importorskip("tensorflow")
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=False)
    csv = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    callback = freezer(FREEZE_TWO)
    history = fit(make_model(), [csv, board, callback])
    assert history.history["smartfrz/frozen_layers"] == [1.0, 2.0]
    assert history.history["smartfrz/backward_saved"][1] > history.history["smartfrz/backward_saved"][0] > 0.0
    assert "smartfrz/frozen_layers" in (tmp_path / "log.csv").read_text().splitlines()[0]
    values = events(tmp_path / "train")
    assert {step: round(float(v), 3) for step, v in values["smartfrz/confidence/conv1"].items()} == {6: 0.9}
    assert set(values["smartfrz/confidence/head"]) == {6, 12}
    assert {step: float(v) for step, v in values["smartfrz/frozen_layers"].items()} == {6: 1.0, 12: 2.0}
    assert set(values["epoch_smartfrz/frozen_layers"]) == {0, 1}
    pictures = values["smartfrz/layers"]
    assert set(pictures) == {6, 12, 16}
    assert all(picture[2].startswith(b"\x89PNG") for picture in pictures.values())


def events(folder):
    """What the event files in a folder hold: name to step to value."""
    import tensorflow as tf

    found = {}
    for file in sorted(folder.glob("events*")):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = tf.make_ndarray(value.tensor)
    return found


def test_a_damaged_backup_of_the_state_is_told(tmp_path):
    folder = tmp_path / "backup"
    model, backup = decaying_model(), keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
    fit(model, [backup, change_freezer()], epochs=2)
    newest = max(folder.glob("smartfrz-*.npz"), key=lambda path: int(path.stem.partition("-")[2]))
    assert newest.name == "smartfrz-16.npz"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(StateError, match=r"smartfrz-16.npz holds no state of SmartFRZ"):
        fit(decaying_model(), [backup, change_freezer()], epochs=3)
    newest.unlink()  # without it: freeze anew
    callback = change_freezer()
    fit(decaying_model(), [backup, callback], epochs=3)
    assert callback.report().num_steps == STEPS


def test_a_shared_batch_norm_has_seen_several_batches_in_a_step():
    def make():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        dense, norm = keras.layers.Dense(5, name="dense"), keras.layers.BatchNormalization(momentum=0.9, name="norm")
        outputs = keras.layers.Dense(3, name="head")(norm(dense(norm(dense(inputs)))))
        return compiled(keras.Model(inputs, outputs)), norm

    def statistics(norm):
        return [read(v).astype(np.float64) for v in (norm.moving_mean, norm.moving_variance)]

    class Keep(keras.callbacks.Callback):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.values = norm, []

        def on_train_batch_end(self, batch, logs=None):
            assert self.model is not None  # on JAX, asking for it gives the variables their values back
            self.values.append(statistics(self.norm))

    model, norm = make()
    callback = freezer([{"dense": 0.9, "head": 0.1}])
    fit(model, [callback], inputs=data(shape=(5,)))
    assert callback.frozen_layers == ["dense"]
    twin, same_norm = make()
    plain = Keep(same_norm)
    fit(twin, [plain], inputs=data(shape=(5,)))
    share = 0.9 ** (2 * 4)  # two calls in each of four steps
    for mine, before, after in zip(statistics(norm), plain.values[1], plain.values[5], strict=True):
        np.testing.assert_allclose(mine, (after - share * before) / (1 - share), rtol=1e-4, atol=1e-5)


def test_a_second_branch_behind_a_norm_that_comes_first_loses_nothing():
    inputs = keras.Input((5,))
    first = keras.layers.LayerNormalization(name="first")(inputs)
    x = keras.layers.Dense(4, name="dense")(first)
    beside = keras.layers.LayerNormalization(name="beside")(first)
    outputs = keras.layers.Dense(3, name="head")(keras.layers.Concatenate()([x, beside]))
    layers = trace_layers(keras.Model(inputs, outputs))
    assert [layer.name for layer in layers] == ["dense", "head"]
    assert sorted(name for layer in layers for name in layer.parameters) == sorted(
        f"{name}:{i}" for name in ("first", "dense", "beside", "head") for i in (0, 1)
    )


def test_log_is_called_at_each_record_and_the_report_has_the_logs_of_epochs():
    seen = []
    callback = freezer([()], log=lambda values, step: seen.append((step, values)))
    fit(make_model(), [callback])
    every = callback.schedule.record_every
    assert [step for step, _ in seen] == list(range(every, callback.num_steps + 1, every))
    assert any(key.startswith("smartfrz/confidence/") for _, values in seen for key in values)
    assert all(type(value) is float for _, values in seen for value in values.values())
    assert [step for step, _ in callback.report().curves["loss"]] == [callback.num_steps // 2, callback.num_steps]
