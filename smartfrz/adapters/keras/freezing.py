"""Freezes layers of a Keras model in the middle of `fit`, around the traps of Keras and its backends."""

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from smartfrz.adapters.keras.layers import Layer, find_variable, from_torch_positions, named_layers, torch_axes
from smartfrz.adapters.keras.parts import list_inner_optimizers, list_own_optimizers
from smartfrz.control.grouping import choose_judged
from smartfrz.control.norms import compute_old_share, compute_recent_statistics
from smartfrz.control.protocols import Untrained
from smartfrz.control.tailoring import split_positions
from smartfrz.control.watch import Disturbance
from smartfrz.errors import StateError, UnsupportedModelError, UsageError

_ADAPTER = "_smartfrz_adapter"


class KerasAdapter:
    """Reads, freezes and unfreezes the layers of one model.

    Call `freeze` and `unfreeze` between two training steps, which inside of `fit` means from a callback.

    Args:
        model: The model, compiled and built.
        layers: The model's layers, in execution order. Layers that the user has frozen are left
            out of `layers()`, and are never unfrozen.

    Attributes:
        model: The model.
        shown_unfrozen: Whether frozen layers look as if they were not, for another callback that saves the model.

    Raises:
        StateError: If the model lacks a variable that a layer names.
        UnsupportedModelError: If the model is not compiled, or trained by several processes.
    """

    def __init__(self, model: keras.Model, layers: list[Layer]):
        if getattr(model, "optimizer", None) is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} {model.name!r} has no optimizer. Call compile() first."
            )
        _require_one_process(model)
        self.model = model
        self.shown_unfrozen = False
        self._named = named_layers(model)
        self._layers = {layer.name: layer for layer in layers}
        self._variables = {x.name: [find_variable(self._named, n) for n in x.parameters] for x in layers}
        self._trainable: dict[str, list[Any]] = {}
        self._members: dict[str, list[Any]] = {}
        self._read: dict[str, list[tuple[Any, tuple[int, ...]]]] = {}
        self._parts: dict[str, tuple[NDArray[np.int64], list[tuple[Any, Any]]]] = {}
        around = {
            x.name: [self._named.get(member.rpartition("/")[0]) for member in x.members if "/" in member]
            for x in layers
        }
        self._spectral: dict[str, list[Any]] = {
            name: [w for w in wrappers if isinstance(w, keras.layers.SpectralNormalization) and w.trainable]
            for name, wrappers in around.items()
        }
        self._frozen: set[str] = set()
        self._kept: dict[str, NDArray[np.float32]] = {}  # what frozen layers were when they froze
        self._new: list[str] = []  # frozen layers that `find_moved` has not looked at
        self._flagged: set[str] = set()  # frozen layers that somebody has made trainable
        self._lists: list[_OptimizerLists] = []
        self._num_batches = 0
        self._snapshots: dict[str, tuple[NDArray[np.float64], NDArray[np.float64], int]] = {}
        for name in self._layers:
            self._describe(name)
        self._unmoved = self._gather({name: self._trained_pieces(name) for name in self.layers()})
        self._joined: set[str] = set()  # layers of which no step was seen since they joined

    def _describe(self, name: str) -> None:
        """Note which parts of a layer are trained."""
        layer = self._layers[name]
        # A partly frozen layer is frozen in its trainable part, and unfrozen in that part only.
        self._trainable[name] = [v for v in self._variables[name] if v.trainable]
        # Only layers without layers inside: the setter of a container would freeze everything that it holds.
        self._members[name] = [
            member
            for member in map(self._named.__getitem__, layer.members)
            if member.trainable and not getattr(member, "_layers", None)
        ]
        trained = {id(v): n for n, v in zip(layer.parameters, self._variables[name], strict=True) if v.trainable}
        matrices = [(n, find_variable(self._named, n)) for n in layer.weights]
        # It is judged by what is trained: what the user froze does not move, and would look converged.
        judged = choose_judged(
            [v for _, v in matrices if id(v) in trained],
            self._trainable[name],
            lambda v: math.prod(v.shape),
            lambda v: len(v.shape),
        )
        if not judged:
            self._trainable[name] = []  # what is left to train has no values
        read = [(trained[id(v)], v) for v in judged] or matrices
        self._read[name] = [(v, torch_axes(self._named[n.rpartition(":")[0]], len(v.shape))) for n, v in read]

    def layers(self) -> list[str]:
        """Return the names of the layers that the user did not freeze, in execution order."""
        return [name for name in self._layers if self._trainable[name]]

    def all_layers(self) -> list[str]:
        """Return the names of all layers in execution order, even if the user froze them."""
        return list(self._layers)

    def num_weights(self, layer: str) -> int:
        """Return the number of weights that the layer is judged by; a complex one counts as two."""
        return sum(_count_values(v) for v, _ in self._read[layer])

    def weights(self, layer: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a copy of the layer's flattened weights at `indices`.

        Args:
            layer: Name of the layer.
            indices: Positions in the layer's weights, flattened in PyTorch's order of axes, int64 `[n]`, ascending. Pass
                the same array at every call, so that it is translated only once.

        Returns:
            float32 `[n]`, whatever the dtype of the weights.
        """
        return self.tailored({layer: indices})[layer]

    def tailored(self, positions: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float32]]:
        """Return what `weights` does for several layers, and wait for the GPU only once."""
        return self._gather({layer: self._split(layer, indices) for layer, indices in positions.items()})

    def _gather(self, parts: Mapping[str, list[tuple[Any, Any]]]) -> dict[str, NDArray[np.float32]]:
        """Return the values of variables at positions, for each layer."""
        self.sync()
        picked = [
            keras.ops.cast(keras.ops.take(_flatten(v), where), "float32")
            for pieces in parts.values()
            for v, where in pieces
        ]
        if not picked:
            return {layer: np.empty(0, np.float32) for layer in parts}
        # A copy: on the PyTorch backend the array may share memory with the weights.
        joined = np.array(keras.ops.convert_to_numpy(keras.ops.concatenate(picked)), np.float32)
        ends = np.cumsum([sum(len(where) for _, where in pieces) for pieces in parts.values()])
        return dict(zip(parts, np.split(joined, ends[:-1]), strict=True))

    def _split(self, layer: str, indices: NDArray[np.int64]) -> list[tuple[Any, Any]]:
        """Return each of the layer's variables with the positions in it."""
        known, parts = self._parts.get(layer, (None, []))
        if known is indices:
            return parts
        read = self._read[layer]
        positions = split_positions(indices, [_count_values(variable) for variable, _ in read])
        parts = []
        for (variable, axes), inside in zip(read, positions, strict=True):
            if len(inside):
                times = 2 if _is_complex(variable) else 1  # each real part is followed by its imaginary part
                elements = from_torch_positions(inside // times, tuple(variable.shape), axes)
                where = elements * times + inside % times
                parts.append((variable, keras.ops.convert_to_tensor(where.astype(np.int32))))
        self._parts[layer] = indices, parts
        return parts

    def sync(self) -> None:
        """Write current values to the model's variables.

        On JAX, `fit` holds the values during an epoch, and reading a variable raises "'NoneType' object is not callable".
        """
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()

    def freeze(self, layers: list[str]) -> None:
        """Stop training these layers. From the next step on their weights and statistics stay bit-identical."""
        self._flagged.difference_update(layers)
        new = [layer for layer in layers if layer not in self._frozen]
        if not new:
            return
        self.sync()  # before the flags change: see `_switch`
        for layer in new:
            for name in dict.fromkeys(self._layers[layer].norms):
                self._correct_statistics(name)
        self._switch(new, False)
        self._kept |= self.read_pieces(new)
        self._new += new

    def unfreeze(self, layers: list[str]) -> None:
        """Train these layers again, with the momenta that they had when they froze."""
        old = [layer for layer in layers if layer in self._frozen]
        if old:
            self._switch(old, True)
        for layer in old:
            self._kept.pop(layer, None)
            self._flagged.discard(layer)

    def find_moved(self) -> list[str]:
        """Return the frozen layers that have moved. Each is checked once, in the first call after `freeze`.

        Keras' own training step does not touch them. A training step of the user's might, if it has its own list of
        variables: the layers would then count as frozen, and be trained.
        """
        new, self._new = [layer for layer in self._new if layer in self._frozen], []
        now = self.read_pieces(new)
        return [layer for layer in new if self._kept[layer].tobytes() != now[layer].tobytes()]

    def switched_on(self, layers: Iterable[str]) -> bool:
        """Return whether somebody has made one of these layers trainable since `hold` was called."""
        return any(v.trainable for layer in layers for v in self._trainable[layer])

    def read_pieces(self, layers: list[str]) -> dict[str, NDArray[np.float32]]:
        """Return some values of all that must not move while these layers are frozen."""
        return self._gather({layer: self._pieces(layer) for layer in layers}) if layers else {}

    def _pieces(self, layer: str, statistics: bool = True) -> list[tuple[Any, Any]]:
        """Return positions in all that must not move while the layer is frozen: weights, and then statistics."""
        watched = list(self._variables[layer])
        if statistics:
            norms = [self._named[name] for name in dict.fromkeys(self._layers[layer].norms)]
            watched += [v for norm in norms for v in (norm.moving_mean, norm.moving_variance)]
            watched += [wrapper.vector_u for wrapper in self._spectral[layer]]
        return [(v, _spread_positions(_count_values(v))) for v in watched if 0 not in v.shape]

    def _trained_pieces(self, layer: str) -> list[tuple[Any, Any]]:
        """Return positions in what is trained of the layer."""
        return [(v, _spread_positions(_count_values(v))) for v in self._trainable[layer] if 0 not in v.shape]

    def hold(self) -> None:
        """Freeze again what another callback has made trainable since the last step; `disturbed` tells of it.

        Without that, JAX would mix up the values of variables, and an optimizer refuse those that it does not expect.
        """
        again = [
            layer
            for layer in (() if self.shown_unfrozen else self.frozen_layers())
            if any(v.trainable for v in self._trainable[layer]) or any(x.trainable for x in self._members[layer])
        ]
        if again:
            self._flagged.update(again)
            self.set_flags(again, False)

    def disturbed(self, layers: list[str]) -> dict[str, Disturbance]:
        """Return which of these frozen layers no longer stand still; see `Adapter`."""
        self.hold()
        watched = [layer for layer in layers if layer in self._kept]
        now = self.read_pieces(watched)
        found: dict[str, Disturbance] = {}
        for layer in watched:
            size = sum(len(where) for _, where in self._pieces(layer, statistics=False))
            before, after = self._kept[layer], now[layer]
            if before[:size].tobytes() != after[:size].tobytes():
                found[layer] = "trained" if layer in self._flagged else "moved"
            elif before.tobytes() != after.tobytes():
                found[layer] = "statistics"
            elif layer in self._flagged:
                found[layer] = "trainable"
        return found

    def untrained(self, layers: list[str]) -> dict[str, Untrained]:
        """Return which of these active layers are not trained, and why; see `Adapter`."""
        still = [layer for layer in layers if layer in self._unmoved]
        now = self._gather({layer: self._trained_pieces(layer) for layer in still}) if still else {}
        for layer in still:
            if self._unmoved[layer].tobytes() != now[layer].tobytes():
                del self._unmoved[layer]
        optimizer = self.model.optimizer
        alone = not hasattr(optimizer, "optimizers") and not list_own_optimizers(self.model)
        self.sync()
        if alone and float(keras.ops.convert_to_numpy(optimizer.learning_rate)) == 0.0:
            return dict.fromkeys(layers, "learning_rate_zero")
        joined, self._joined = self._joined, set()
        return {
            layer: "no_update_yet" if layer in joined else "never_moved" for layer in layers if layer in self._unmoved
        }

    def find_layers(self) -> list[str]:
        """Return the names of the layers that may be frozen now; see `Adapter`."""
        return [
            x
            for x, variables in self._variables.items()
            if x in self._frozen or any(v.trainable and 0 not in v.shape for v in variables)
        ]

    def set_layers(self, layers: list[str]) -> None:
        """Have `layers` return these names from now on."""
        before = set(self.layers())
        changed = [layer for layer in self._layers if (layer in layers) != (layer in before)]
        for layer in changed:
            self._describe(layer)
            self._parts.pop(layer, None)
            self._unmoved.pop(layer, None)
        joined = {layer: self._trained_pieces(layer) for layer in changed if self._trainable[layer]}
        self._unmoved |= self._gather(joined) if joined else {}
        self._joined.update(joined)

    def frozen_layers(self) -> list[str]:
        """Return the names of the layers that `freeze` has frozen."""
        return [layer for layer in self._layers if layer in self._frozen]

    def is_trained_by(self, optimizer: Any) -> bool:
        """Return whether the layers were frozen for this optimizer."""
        return any(lists.belongs_to(optimizer) for lists in self._lists)

    def set_flags(self, layers: Iterable[str], trainable: bool) -> None:
        """Set `trainable` of layers and variables, without `fit` noticing; see `SmartFRZ.thawed`."""
        for layer in layers:
            for member in self._members[layer]:
                # This flag alone puts a batch norm into inference mode. Without it, its statistics go on moving.
                member.trainable = trainable
            for variable in self._variables[layer]:  # the setter above thaws everything that a layer owns
                variable.trainable = trainable and any(variable is v for v in self._trainable[layer])
            for wrapper in self._spectral[layer]:
                _hold_spectral(wrapper, not trainable)

    def _frozen_penalties(self) -> list[Any]:
        """Return the penalties of frozen weights, which Keras leaves out of the loss."""
        # Flags may be set while another callback saves the model.
        variables = [v for x in self.frozen_layers() for v in self._trainable[x] if not v.trainable]
        return [v.regularizer(v) for v in variables if v.regularizer is not None]

    def _hold_penalties(self) -> None:
        """Keep the weight regularizers of frozen layers in the loss, which would fall by them at every freeze.

        Callbacks that wait for a better loss would be misled. It has no gradient any more.
        """
        model = self.model
        if self._frozen:
            original = type(model)._get_regularization_losses
            object.__setattr__(
                model, "_get_regularization_losses", lambda: [*original(model), *self._frozen_penalties()]
            )
        else:
            vars(model).pop("_get_regularization_losses", None)

    def _switch(self, layers: list[str], trainable: bool) -> None:
        model, optimizer = self.model, self.model.optimizer
        jax = keras.backend.backend() == "jax"
        # JAX keeps the values in two lists, of trained and untrained ones, and matches them to variables by position. If
        # the flags changed first, weights would silently move from one layer into another.
        self.sync()
        # An optimizer that is built after layers froze has no slots for them, and would refuse them later.
        if not optimizer.built:
            with _enter_scope(model):
                optimizer.build(model.trainable_variables)
        if not self._lists:
            own = [o for o in list_own_optimizers(model) if o.built]
            self._lists = [_OptimizerLists(o) for o in (*list_inner_optimizers(optimizer), *own)]
        self.set_flags(layers, trainable)
        self._frozen = self._frozen.difference(layers) if trainable else self._frozen.union(layers)
        self._hold_penalties()
        # JAX applies gradients to exactly the variables in the optimizer's list, and raises if there are fewer. On any
        # backend an optimizer of several optimizers does so, too, and an EMA writes its averages into every variable in
        # that list.
        if jax or hasattr(optimizer, "optimizers") or any(lists.averages is not None for lists in self._lists):
            live = {id(v) for v in model.trainable_variables}
            dead = {id(v) for layer in self._frozen for v in self._trainable[layer]}
            own = list_own_optimizers(model)  # what they train may not be trainable just now, as in some GANs
            for lists in self._lists:
                mine = any(lists.belongs_to(each) for each in own)
                lists.restrict({id(v) for v in lists.variables} - dead if mine else live)
        # Without this, TensorFlow silently goes on training the variables in its traced function.
        model.make_train_function(force=True)
        if jax:
            # Otherwise the end of the epoch would write the values back in the order of the previous lists.
            model._jax_state = None
        if self._frozen:
            # The callback after an interrupted one finds here what to thaw. Keras would track a plain assignment as a part
            # of the model.
            object.__setattr__(model, _ADAPTER, self)
        else:
            vars(model).pop(_ADAPTER, None)

    def add_batches(self, number: int) -> None:
        """Count batches that were trained. Keras does not."""
        self._num_batches += number

    def snapshot_statistics(self) -> None:
        """Remember the moving statistics, so that `freeze` can compute them for the batches since.

        Call it a few batches before a freezing stage.
        """
        self.sync()
        self._snapshots = {
            name: (*self._read_statistics(name), self._num_batches)
            for layer in self.layers()
            if layer not in self._frozen
            for name in self._layers[layer].norms
            if self._named[name].trainable
        }

    def _read_statistics(self, norm: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        layer = self._named[norm]
        mean, variance = (_stack_replicas(v).mean(axis=0) for v in (layer.moving_mean, layer.moving_variance))
        return mean, variance

    def _correct_statistics(self, norm: str) -> None:
        """Replace the moving statistics by those of the batches since the snapshot: see `control.norms`."""
        layer = self._named[norm]
        if norm not in self._snapshots or not layer.trainable:
            return
        mean, variance, before = self._snapshots[norm]
        calls = sum(x.norms.count(norm) for x in self._layers.values())  # in one step
        since = calls * (self._num_batches - before)
        old_share = compute_old_share(float(layer.momentum), before=calls * before, since=since)
        recent = compute_recent_statistics((mean, variance), self._read_statistics(norm), old_share)
        if recent is not None:
            layer.moving_mean.assign(recent[0].astype(np.float32))
            layer.moving_variance.assign(recent[1].astype(np.float32))

    def norm_state(self) -> dict[str, Any]:
        """Return the snapshot, for a saved state."""
        return {
            name: [mean, variance, self._num_batches - before]
            for name, (mean, variance, before) in self._snapshots.items()
        }

    def check_norm_state(self, state: dict[str, Any]) -> None:
        """Raise `StateError` if `load_norm_state` could not use this. Nothing is changed."""
        for name, (mean, _, _) in state.items():
            running = getattr(self._named.get(name), "moving_mean", None)
            if name in self._named and (running is None or tuple(running.shape) != mean.shape):
                here = "no statistics" if running is None else f"statistics of shape {tuple(running.shape)}"
                raise StateError(
                    f"The saved state has statistics of shape {mean.shape} of the layer {name!r}, which has {here} in this "
                    "model. Use the state of a run of this same model."
                )

    def load_norm_state(self, state: dict[str, Any]) -> None:
        """Restore what `norm_state` returned."""
        self._snapshots = {
            name: (np.asarray(mean), np.asarray(variance), self._num_batches - int(ago))
            for name, (mean, variance, ago) in state.items()
            if name in self._named
        }


def _is_complex(variable: Any) -> bool:
    return "complex" in str(variable.dtype)


def _count_values(variable: Any) -> int:
    """Return the number of real values in a variable: two for each element of a complex one."""
    return math.prod(variable.shape) * (2 if _is_complex(variable) else 1)


def _flatten(variable: Any) -> Any:
    """Return a variable's real values, each real part followed by its imaginary part."""
    value = keras.ops.stop_gradient(variable.value)
    if _is_complex(variable):
        value = keras.ops.stack([keras.ops.real(value), keras.ops.imag(value)], axis=-1)
    return keras.ops.reshape(value, (-1,))


def _require_one_process(model: keras.Model) -> None:
    """Refuse a model that several processes train. One process may use any number of devices."""
    strategy = getattr(model, "distribute_strategy", None)
    backend = keras.backend.backend()
    found = None
    if backend == "tensorflow" and strategy is not None and strategy.num_replicas_in_sync > 1:
        import tensorflow as tf

        if not isinstance(strategy, tf.distribute.MirroredStrategy):
            found = type(strategy).__name__
    elif backend == "jax":
        import jax

        if jax.process_count() > 1:
            found = f"JAX with {jax.process_count()} processes"
    if found is not None:
        raise UnsupportedModelError(
            f"The model is trained by {found}, which SmartFRZ does not handle in Keras. Expected one process, with one "
            "device or several: tf.distribute.MirroredStrategy, or keras.distribution on JAX. Train without SmartFRZ, or "
            "in one process."
        )


def _enter_scope(model: keras.Model) -> Any:
    """Return the context in which variables are created on all devices of this model."""
    strategy = getattr(model, "distribute_strategy", None)
    return nullcontext() if strategy is None else strategy.scope()


def _stack_replicas(variable: Any) -> NDArray[np.float64]:
    """Stack the variable's values on the devices that have one of their own.

    Under MirroredStrategy moving statistics differ between devices, since each sees its part of the batch, and reading
    the variable gives those of the first device.
    """
    values = getattr(variable.value, "values", None)
    values = [variable.value] if values is None or callable(values) else values
    return np.stack([np.asarray(keras.ops.convert_to_numpy(value), np.float64) for value in values])


def _spread_positions(size: int, most: int = 256) -> NDArray[np.int32]:
    """Return at most `most` positions, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int32))


def _hold_spectral(wrapper: Any, hold: bool) -> None:
    """Make a `SpectralNormalization` run as in inference, or as before if `hold` is False.

    In training mode it divides its weights by their spectral norm in every forward pass, whatever `trainable` says: a
    frozen layer would go on moving.
    """
    if hold:
        object.__setattr__(wrapper, "call", lambda inputs, training=False: type(wrapper).call(wrapper, inputs))
    else:
        vars(wrapper).pop("call", None)


def thaw_leftovers(model: keras.Model) -> None:
    """Thaw what an interrupted run has left frozen. Otherwise the user would seem to have frozen it.

    Raises:
        UsageError: If the model was compiled in between. The layers are thawed nevertheless.
    """
    adapter = vars(model).get(_ADAPTER)
    if adapter is None:
        return
    frozen = adapter.frozen_layers()
    if adapter.is_trained_by(model.optimizer):
        adapter.unfreeze(frozen)
        return
    adapter.set_flags(frozen, True)
    vars(model).pop("_get_regularization_losses", None)
    vars(model).pop(_ADAPTER)
    # fit() has built the optimizer by now, and it accepts no more variables.
    raise UsageError(
        f"compile() was called while {frozen} were still frozen by an interrupted run, so the new optimizer does not "
        "know them. They are trainable again now: call compile() again, and then fit()."
    )


class _OptimizerLists:
    """An optimizer's lists of the variables that it trains, as they were when it was built.

    Slots stay in `optimizer.variables`, and their numbers in the index do not change. So momenta, iterations and learning
    rate of what is still trained are not affected.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self.variables = list(optimizer._trainable_variables)
        self._index = dict(optimizer._trainable_variables_indices)
        averages = getattr(optimizer, "_model_variables_moving_average", None)  # none yet, if it trains nothing
        self.averages = list(averages) if optimizer.use_ema and averages is not None else None

    def belongs_to(self, optimizer: Any) -> bool:
        """Return whether they are this optimizer's."""
        return self._optimizer is optimizer

    def restrict(self, live: set[int]) -> None:
        """Restrict the lists to the variables with these ids."""
        kept = [i for i, v in enumerate(self.variables) if id(v) in live]
        keys = [self._optimizer._var_key(self.variables[i]) for i in kept]
        changes: dict[str, Any] = {
            "_trainable_variables": [self.variables[i] for i in kept],
            "_trainable_variables_indices": {key: self._index[key] for key in keys},
        }
        if self.averages is not None:
            changes["_model_variables_moving_average"] = [self.averages[i] for i in kept]
        for name, value in changes.items():
            # Keras tracks a plain assignment: it would append every model variable in the list to optimizer.variables,
            # and JAX would raise "Attempt to donate the same buffer twice".
            object.__setattr__(self._optimizer, name, value)
