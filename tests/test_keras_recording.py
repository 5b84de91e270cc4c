"""Recordings of small Keras networks on real handwritten digits, on the backend that KERAS_BACKEND names."""

import dataclasses
import sys
import types

import numpy as np
import pytest
from builder_fixtures import invoke
from keras_runs import BACKEND, WARNINGS, keras

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")

from smartfrz.dataset_builder import keras_models
from smartfrz.dataset_builder.cka import centered_gram
from smartfrz.dataset_builder.cli import main as build
from smartfrz.dataset_builder.models import build_model, is_keras
from smartfrz.dataset_builder.recipes import load_recipe
from smartfrz.dataset_builder.recording import record
from smartfrz.dataset_builder.storage import read_run, reference_file
from smartfrz.errors import RecipeError

pytestmark = WARNINGS
LAYERS = ["stem", "body", "head"]
PARTS = """
import keras
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


def network(classes=10):
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(6, 3, use_bias=False, name="stem"),
        keras.layers.BatchNormalization(momentum=0.5, name="norm"),
        keras.layers.ReLU(),
        keras.layers.Conv2D(8, 3, strides=2, name="body"),
        keras.layers.ReLU(),
        keras.layers.Dropout(0.1),
        keras.layers.Flatten(),
        keras.layers.Dense(classes, name="head"),
    ])


def digits(num_train=256):
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float()[..., None] / 8 - 1, torch.from_numpy(data.target)
    return TensorDataset(images[:num_train], labels[:num_train]), TensorDataset(images[-400:], labels[-400:])
"""
RECIPE = """
architecture = "cnn"
[model]
source = "{source}"
{model}
[data]
source = "keras_parts:digits"
[training]
epochs = {epochs}
learning_rate = 0.02
optimizer = "Adam"
{training}
[recording]
records = 8
pool_size = 32
probe_size = 24
{recording}
"""


def recipe_of(folder, name="digits", **entries):
    (folder / "keras_parts.py").write_text(PARTS)
    path = folder / f"{name}.toml"
    defaults = {"source": "keras_parts:network", "model": "", "epochs": 2, "training": "", "recording": ""}
    path.write_text(RECIPE.format(**(defaults | entries)))
    return load_recipe(path)


def test_what_freezing_costs_is_not_measured(tmp_path):
    with pytest.raises(RecipeError, match=r"'digits' has a Keras model; .* Record it without --costs"):
        record(recipe_of(tmp_path), tmp_path / "runs", costs=True)
    assert not (tmp_path / "runs").exists()


def test_a_recording_holds_both_runs_and_goes_on_after_an_interruption(tmp_path):
    recipe, seen = recipe_of(tmp_path), []
    path = record(recipe, tmp_path / "runs", lambda fraction, text: seen.append((fraction, text)))
    run = read_run(path)
    assert run.layers == LAYERS
    assert run.step.tolist() == [2, 4, 6, 8, 10, 12, 14, 16]
    assert run.weights.shape == (3, 8, 32)
    assert ((run.cka > 0) & (run.cka <= 1)).all()
    assert run.cka[:, -1].min() > run.cka[:, 0].min()
    assert run.loss[-1] < run.loss[0]
    assert run.facts["accuracies"]["reference"] > 0.25  # by chance 0.1
    assert run.facts["versions"]["backend"] == BACKEND
    assert (np.abs(np.diff(run.weights, axis=1)).max(axis=(0, 2)) > 0).all()
    assert [text for _, text in seen] == ["reference"] * 16 + ["recording"] * 16
    assert seen[-1] == (1.0, "recording")

    # The reference is kept, and not trained again.
    path.unlink()
    seen.clear()
    again = read_run(record(recipe, tmp_path / "runs", lambda fraction, text: seen.append(text)))
    assert set(seen) == {"recording"}
    np.testing.assert_allclose(again.weights, run.weights, atol=1e-5)
    np.testing.assert_allclose(again.cka, run.cka, atol=1e-4)

    # Labels, and another recipe that starts from this reference, with a head of its own.
    result = invoke(build, "label", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert "digits: " in result.stdout
    assert all(f"  {layer} " in result.stdout for layer in LAYERS)
    saved = build_model(recipe_of(tmp_path, "start", model='init = "digits"'), 0, tmp_path / "runs")
    plain = build_model(recipe, 0)
    assert reference_file(tmp_path / "runs", "digits").exists()
    assert not np.allclose(saved.get_layer("stem").get_weights()[0], plain.get_layer("stem").get_weights()[0])
    other = build_model(
        recipe_of(tmp_path, "other", model='init = "digits"\narguments = { classes = 4 }'), 0, tmp_path / "runs"
    )
    np.testing.assert_array_equal(other.get_layer("stem").get_weights()[0], saved.get_layer("stem").get_weights()[0])
    assert other.get_layer("head").get_weights()[0].shape[1] == 4


def test_the_seed_decides_the_initial_weights_and_names_stay(tmp_path):
    recipe = recipe_of(tmp_path)
    models = [build_model(recipe, seed) for seed in (0, 0, 1)]
    assert all(map(is_keras, models))
    assert len({tuple(layer.name for layer in model.layers) for model in models}) == 1
    first, same, other = (model.get_layer("head").get_weights()[0] for model in models)
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


def test_grams_are_those_of_the_layers_outputs_and_leave_the_model_as_it_was(tmp_path):
    model = build_model(recipe_of(tmp_path), 0)
    x = np.random.default_rng(0).normal(2.0, 3.0, (10, 8, 8, 1)).astype(np.float32)
    before = [np.array(w) for w in model.get_weights()]
    layers = keras_models.trace_layers(model)
    grams = keras_models.layer_grams(model, layers, x)
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    stem = keras.ops.convert_to_numpy(keras.ops.stop_gradient(model.get_layer("stem")(x)))
    np.testing.assert_allclose(grams["stem"], centered_gram(stem.reshape(10, -1)), rtol=1e-4, atol=1e-2)
    # The probe batch's own statistics, not those of the model, which are still 0 and 1.
    normed = np.maximum((stem - stem.mean((0, 1, 2))) / np.sqrt(stem.var((0, 1, 2)) + 1e-3), 0)
    body = keras.ops.convert_to_numpy(keras.ops.stop_gradient(model.get_layer("body")(normed)))
    np.testing.assert_allclose(grams["body"], centered_gram(body.reshape(10, -1)), rtol=1e-3, atol=1e-2)
    assert keras.layers.Layer.__call__.__name__ == "__call__"


def test_label_smoothing_and_a_loss_that_is_not_finite(tmp_path):
    recipe = recipe_of(tmp_path, epochs=0.5, training="label_smoothing = 0.1\nweight_decay = 0.01")
    assert read_run(record(recipe, tmp_path / "runs")).loss[0] > 0
    wild = dataclasses.replace(recipe.training, epochs=4.0, learning_rate=1e30, optimizer="SGD", label_smoothing=0.0)
    with pytest.raises(RecipeError, match=r"The loss is (nan|inf) at step \d+\. Lower training"):
        record(dataclasses.replace(recipe, name="wild", training=wild), tmp_path / "runs")
    assert not (tmp_path / "runs" / "wild.parquet").exists()


def test_applications_by_name(tmp_path):
    recipe = recipe_of(
        tmp_path,
        source="keras:MobileNetV2",
        model="arguments = { input_shape = [32, 32, 3], alpha = 0.35, classes = 5 }",
    )
    model = build_model(recipe, 0)
    assert is_keras(model)
    logits = np.asarray(model.predict_on_batch(np.zeros((1, 32, 32, 3), np.float32)))
    assert logits.shape == (1, 5)
    assert abs(logits.sum() - 1) > 1e-3  # no softmax
    with pytest.raises(RecipeError, match=r"Keras has no application 'MobileNetV9'; expected one of .*MobileNetV2"):
        build_model(recipe_of(tmp_path, source="keras:MobileNetV9"), 0)


def test_check_says_that_it_measures_pytorch_only(tmp_path):
    recipe_of(tmp_path)
    result = invoke(build, "check", tmp_path / "digits.toml")
    assert result.exit_code == 1
    assert "has a Keras model, but this command measures PyTorch models only" in " ".join(result.stderr.split())


def test_mock_presets_of_keras_hub_are_asked_for_without_a_preprocessor(tmp_path, monkeypatch):
    asked = {}

    class Task:
        @classmethod
        def from_preset(cls, name, **arguments):
            asked.update(arguments, name=name)
            return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])

    hub = types.ModuleType("keras_hub")
    hub.models = types.SimpleNamespace(Task=Task)
    monkeypatch.setitem(sys.modules, "keras_hub", hub)
    recipe = recipe_of(tmp_path, source="keras_hub:resnet_18_imagenet", model="arguments = { num_classes = 2 }")
    assert is_keras(build_model(recipe, 0))
    assert asked == {"name": "resnet_18_imagenet", "preprocessor": None, "num_classes": 2}
