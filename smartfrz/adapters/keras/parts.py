"""Finds the parts of a model that train apart from each other, such as generator and discriminator of a GAN."""

from typing import Any

import keras

from smartfrz.adapters.keras.layers import Layer, find_variable, named_layers


def list_inner_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizer with the ones inside of a `LossScaleOptimizer` (mixed_float16) or `MultiOptimizer`."""
    inner = getattr(optimizer, "inner_optimizer", None)
    passed_to = getattr(optimizer, "optimizers", []) if inner is None else [inner]
    return [optimizer, *(each for one in passed_to for each in list_inner_optimizers(one))]


def list_own_optimizers(model: keras.Model) -> list[Any]:
    """Return the optimizers that a model holds besides the one that it was compiled with."""
    known = {id(optimizer) for optimizer in list_inner_optimizers(model.optimizer)}
    found = []
    for value in list(vars(model).values()):
        several = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        for each in several:
            if isinstance(each, keras.optimizers.Optimizer) and id(each) not in known:
                known.add(id(each))
                found.append(each)
    return found


def group_parts(model: keras.Model, layers: list[Layer]) -> list[list[str]]:
    """Return groups of layers of which one has to stay active each: none, if Keras' own training step trains the model.

    A training step of the user's asks the parts of the model for their trainable variables, and differentiates with
    respect to them. It, or an optimizer, may fail if there are none.

    Returns:
        The layers of each layer or model that the model holds and that has layers inside, and of each optimizer that
        the model holds and that has been built.
    """
    kind: Any = type(model)
    if kind.train_step is keras.Model.train_step:
        return []
    named = named_layers(model)
    parts = [name for name, layer in named.items() if layer in model._layers and getattr(layer, "_layers", None)]
    groups = [[layer.name for layer in layers if f"{layer.name}/".startswith(f"{part}/")] for part in parts]
    for optimizer in list_own_optimizers(model):
        trained = {id(variable) for variable in optimizer._trainable_variables} if optimizer.built else set()
        groups.append(
            [layer.name for layer in layers if any(id(find_variable(named, n)) in trained for n in layer.parameters)]
        )
    return [group for group in groups if group]
