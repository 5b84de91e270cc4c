"""The adapter on networks of keras.applications; `test_keras_backends.py` runs it on each backend."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from keras_runs import BACKEND, WARNINGS, compiled, data, fit, freezer, keras, read

from smartfrz.adapters.keras import trace_layers

pytestmark = WARNINGS
# Number of layers, and the first three and the last of them.
NETWORKS = {
    "MobileNetV2": (53, "Conv1 expanded_conv_depthwise expanded_conv_project predictions"),
    "ResNet50": (54, "conv1_conv conv2_block1_1_conv conv2_block1_2_conv predictions"),
    "VGG16": (16, "block1_conv1 block1_conv2 block2_conv1 predictions"),
    "EfficientNetB0": (82, "stem_conv block1a_dwconv block1a_se_reduce predictions"),
    "MobileNetV3Small": (
        54,
        "conv expanded_conv_depthwise expanded_conv_squeeze_excite_conv logits",
    ),
    "DenseNet121": (121, "conv1_conv conv2_block1_1_conv conv2_block1_2_conv predictions"),
    "ConvNeXtTiny": (
        59,
        "convnext_tiny_stem/convnext_tiny_stem_conv convnext_tiny_stage_0_block_0_depthwise_conv "
        "convnext_tiny_stage_0_block_0_pointwise_conv_1 convnext_tiny_head_dense",
    ),
    "Xception": (41, "block1_conv1 block1_conv2 block2_sepconv1 predictions"),
}
# What is tested of them knows of no backend, and JAX takes minutes to compile an initializer for each shape.
TESTED = ["MobileNetV2"] if BACKEND == "jax" else list(NETWORKS)


@cache
def network(name):
    keras.utils.set_random_seed(0)
    pixels = 71 if name == "Xception" else 32
    kind = getattr(keras.applications, name)
    width = {"alpha": 0.35} if name == "MobileNetV2" else {}
    return kind(input_shape=(pixels, pixels, 3), weights=None, classes=3, classifier_activation=None, **width)


def fed_by(operation):
    """The operations whose outputs it reads."""
    return [parent.operation for parent in operation._inbound_nodes[0].parent_nodes]


def parts_of(operation):
    """By the names that the adapter has for them: the layers in a nested model, or the one layer."""
    if isinstance(operation, keras.Sequential):
        return {f"{operation.name}/{layer.name}": layer for layer in operation.layers}
    return {operation.name: operation}


@pytest.mark.parametrize("name", TESTED)
def test_layers_of(name):
    model = network(name)
    layers = trace_layers(model)
    names = [layer.name for layer in layers]
    number, ends = NETWORKS[name]
    assert len(names) == len(set(names)) == number
    assert [*names[:3], names[-1]] == ends.split()

    parts = {path: part for operation in model.operations for path, part in parts_of(operation).items()}
    with_matrices = [p for p, x in parts.items() if any("kernel" in v.path for v in getattr(x, "weights", ()))]
    assert sorted(names) == sorted(with_matrices)
    owned = Counter(parameter for layer in layers for parameter in layer.parameters)
    assert set(owned.values()) == {1}
    assert len(owned) == len(model.trainable_variables)
    norms = [path for path, part in parts.items() if isinstance(part, keras.layers.BatchNormalization)]
    assert sorted(norms) == sorted(norm for layer in layers for norm in layer.norms)

    position = {member: index for index, layer in enumerate(layers) for member in layer.members}
    reached = {}  # the last layer in front of, and at, each operation
    for operation in model.operations:
        before = max((reached[id(other)] for other in fed_by(operation)), default=-1)
        own = [position[path] for path in parts_of(operation) if path in position]
        assert min(own, default=before) >= before, operation.name
        reached[id(operation)] = max([before, *own])


# In ResNet50 the convolution of a shortcut runs before the one beside it, and then the norms of both.
@pytest.mark.parametrize("name", TESTED)
def test_batch_norms_belong_to_the_convolution_that_they_normalise(name):
    model = network(name)
    layers = trace_layers(model)
    owner = {member: layer.name for layer in layers for member in layer.members}
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    behind = {norm.name: fed_by(norm)[0].name for norm in norms}
    wrong = [norm for norm, layer in behind.items() if layer in owner.values() and owner[norm] != layer]
    assert wrong == []


@pytest.mark.slow
def test_the_front_of_mobilenetv2_is_frozen_in_fit():
    whole = network("MobileNetV2")
    x = keras.layers.GlobalAveragePooling2D()(whole.get_layer("block_4_add").output)
    model = keras.Model(whole.inputs, keras.layers.Dense(3, name="head")(x))
    compiled(model, keras.optimizers.Adam(1e-3), jit_compile=BACKEND == "jax")
    layers = trace_layers(model)
    assert len(layers) == 16  # head included
    front = [layer.name for layer in layers[:8]]
    kept = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kept.append({layer.name: [read(v) for v in layer.weights] for layer in self.model.layers})

    callback = freezer([{layer.name: 0.9 if layer.name in front else 0.1 for layer in layers}], record_every=1)
    fit(model, [callback, Keep()], epochs=1, inputs=data(steps=6, shape=(32, 32, 3)))
    assert callback.report().frozen == dict.fromkeys(front, 3)
    for layer in layers:
        members = [member for member in layer.members if kept[2][member]]
        same = [all(map(np.array_equal, kept[2][member], kept[5][member])) for member in members]
        assert same == [layer.name in front] * len(members), layer.name
