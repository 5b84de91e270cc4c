"""Freezes layers of a PyTorch model in the middle of training, around the traps of PyTorch."""

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from smartfrz.adapters.torch.layers import Layer, LayerReader, Uncopied, group_later
from smartfrz.adapters.torch.norms import NormSnapshot, correct_statistics, count_batches, take_snapshot
from smartfrz.adapters.torch.optimizer_steps import OptimizerSteps
from smartfrz.adapters.torch.updates import unwrap
from smartfrz.adapters.torch.watching import Samples, StepGuard, find_optimizers, mark, thaw_leftovers
from smartfrz.control.grouping import choose_judged
from smartfrz.control.protocols import Untrained
from smartfrz.control.watch import Disturbance
from smartfrz.errors import StateError, UnsupportedModelError

logger = logging.getLogger("smartfrz")


class Processes(Protocol):
    """The processes that together train copies or shards of the model."""

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in place."""
        ...

    def parameters_changed(self) -> None:
        """Prepare for other parameters having gradients. Every process calls it between the same two steps."""
        ...


class TorchAdapter(LayerReader):
    """Reads, freezes and unfreezes the layers of one model.

    Call `freeze` and `unfreeze` between an optimizer step and the next backward pass.

    Args:
        model: The model.
        optimizers: Every optimizer that holds parameters of the model.
        layers: The model's layers, in execution order. Layers that the user has frozen are left
            out of `layers()`, and are never unfrozen.
        processes: The processes that train the model together, if there are several. They are notified of every
            change of what is frozen.
        reentrant: Whether the model uses reentrant gradient checkpointing.
        previous: The adapter that this one replaces. What it froze does not count as frozen by the user.
        steps: Hooks of the optimizers, for `set_lr_scale`, `gradient_norm` and `gradient_changes`. Made on first use by
            default.
        guard: Looks at the optimizers' steps. Without it nothing is known of them.

    Raises:
        UnsupportedModelError: If the model's weights have no data.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        layers: list[Layer],
        *,
        processes: Processes | None = None,
        reentrant: bool = False,
        previous: Self | None = None,
        steps: OptimizerSteps | None = None,
        guard: StepGuard | None = None,
    ):
        super().__init__(model, layers)
        if any(tensor.is_meta for tensors in self._tensors.values() for tensor in tensors):
            raise UnsupportedModelError(
                f"Weights of {type(model).__name__} are on the meta device: they have no values. Load the weights "
                "(`to_empty`, then `load_state_dict`) before you make the optimizer and SmartFRZ."
            )
        self._optimizers = list(optimizers)
        self._given_steps = steps
        self._parameters = dict(model.named_parameters())
        self._model = model
        self._parameter_ids = {id(p) for p in self._parameters.values()}
        self._guard = StepGuard(model, []) if guard is None else guard
        self._kept, self._kept_buffers, self._unmoved = Samples(), Samples(), Samples(spread=True)
        self._unmoved_since: dict[str, int] = {}
        self._newcomers: list[Layer] = []
        self._named_optimizers = False
        ours = {id(p) for p in previous._frozen_parameters()} if previous is not None else set()
        self._all: dict[str, list[nn.Parameter]] = {}
        self._trainable: dict[str, list[nn.Parameter]] = {}
        self._norms: dict[str, list[nn.Module]] = {}
        self._owners: dict[str, list[nn.Module]] = {}
        self._first_versions: dict[nn.Module, dict[str, tuple[int, int]]] = {}
        self._outputs: dict[str, nn.Module] = {}
        self._processes = processes
        self._reentrant = reentrant
        self._gradient_hooks: dict[str, Any] = {}
        # The user's own override of `train`, or None, and whether the norm was in training mode
        self._held_for: dict[str, list[nn.Module]] = {}
        self._held_in_eval: dict[nn.Module, tuple[Any, bool]] = {}
        self._held_observers: dict[str, list[Any]] = {}
        self._snapshots: dict[_NormBase, NormSnapshot] = {}
        for layer in layers:
            self._describe(layer, ours)

    def _describe(self, layer: Layer, ours: Collection[int]) -> None:
        """Note the parts of a layer, and which of them are trained or, by their ids, were frozen by us."""
        name, model = layer.name, self._model
        everything = [self._parameters[n] for n in layer.parameters]
        self._all[name] = everything
        # A partly frozen layer is frozen in its trainable part, and unfrozen in that part only.
        trained = [p for p in everything if id(p) in ours or self._guard.is_live(p)]
        self._trainable[name] = trained
        # It is also judged by that part: what the user froze does not move, and would look converged.
        ids = {id(p) for p in trained}
        matrices = [self._parameters[n] for n in layer.weights]
        judged = [p for p in matrices if id(p) in ids] or [p for p in trained if p.dim() >= 2]
        judged = choose_judged(judged, trained, torch.Tensor.numel, torch.Tensor.dim)
        if not judged:
            trained.clear()  # what is left to train has no values
        self._tensors[name] = judged or matrices
        self._norms[name] = [model.get_submodule(n) for n in layer.norms]
        names = {n.rpartition(".")[0] for n in layer.parameters} | set(layer.norms)
        self._owners[name] = [model.get_submodule(n) for n in sorted(names)]
        for module in self._owners[name]:
            self._first_versions.setdefault(module, self._versions(module))
        self._outputs[name] = model.get_submodule(layer.output)
        if trained:
            self._unmoved.keep(name, trained)
            self._unmoved_since[name] = self._guard.num_steps

    def layers(self) -> list[str]:
        """Return the names of the layers that the user did not freeze, in execution order."""
        return [name for name in super().layers() if self._trainable[name]]

    def all_layers(self) -> list[str]:
        """Return the names of all layers in execution order, even if the user froze them."""
        return super().layers()

    def descriptions(self) -> list[Layer]:
        """Return every layer, in execution order."""
        return list(self._layers.values())

    def _frozen_parameters(self) -> list[nn.Parameter]:
        return [p for trainable in self._trainable.values() for p in trainable if not p.requires_grad]

    def layers_of_each_optimizer(self) -> list[list[str]]:
        """Return, for each optimizer, the names of the layers that it trains; nothing if each has one parameter."""
        owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in self._optimizers]
        if len(owned) > 1 and all(len(ids) == 1 for ids in owned):
            # Optimizers of single parameters step inside of the backward pass, and not at all without a gradient.
            return []
        return [[name for name in self.layers() if any(id(p) in ids for p in self._trainable[name])] for ids in owned]

    def keep_one_of(self) -> list[list[str]]:
        """Return groups of layers of which one has to stay active.

        That is one layer of each optimizer, and one that runs at every step: a backward pass in which nothing requires a
        gradient raises.
        """
        idle = self._guard.idle
        always = [name for name in self.layers() if any(id(p) not in idle for p in self._trainable[name])]
        return [*self.layers_of_each_optimizer(), always]

    @property
    def _steps(self) -> OptimizerSteps:
        if self._given_steps is None:
            self._given_steps = OptimizerSteps(self._optimizers)
        return self._given_steps

    def set_lr_scale(self, layer: str, scale: float) -> None:
        """Multiply the learning rate of a layer by `scale`, until the next call or until the layer freezes.

        The optimizer's groups stay as they are: schedulers go on setting the rate that is multiplied.

        Args:
            layer: Name of the layer.
            scale: At least 0. With 0 the weights do not move, but the momentum is still updated.

        Raises:
            ValueError: If the scale is negative or not finite.
        """
        if not 0.0 <= scale < float("inf"):
            raise ValueError(f"`scale` of layer {layer!r} is {scale!r}; expected a finite number of at least 0.")
        self._steps.scale(self._trainable[layer], float(scale))

    def gradient_norm(self, layer: str) -> float:
        """Return the L1 norm of the layer's gradients, added up over the optimizer steps since the last call.

        Adding up begins with the first call, unless `steps` already did so. Gradients count as the optimizer sees them:
        averaged over processes, unscaled and clipped.
        """
        return self._steps.take_norm(self._trainable[layer])

    def gradient_changes(self, layers: Sequence[str]) -> dict[str, float]:
        """Return how little the gradients of each layer changed from one optimizer step to the next, since the last call.

        The change of a matrix at a step is the L1 norm of its gradient less its gradient at the step before. Its smallest
        change counts, and of a layer with several matrices the largest of these; infinity if one has none that is finite.
        Matrices are the weights that the layer is judged by. Gradients count as the optimizer sees them. Measuring begins
        with the first call, unless `steps` already did so.
        """
        return self._steps.take_changes({layer: self._tensors[layer] for layer in layers})

    def gradient_change_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the latest gradients and their smallest changes by the name of the parameter, for a saved state."""
        return {} if self._given_steps is None else self._given_steps.changes.state(self._parameters)

    def load_gradient_change_state(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restore what `gradient_change_state` returned."""
        if state or self._given_steps is not None:
            self._steps.changes.load(state, self._parameters)

    def gradient_state(self) -> dict[str, torch.Tensor]:
        """Return the sums of gradients by the name of the parameter, for a saved state."""
        if self._given_steps is None:
            return {}
        sums = self._given_steps.sums()
        return {name: sums[p] for name, p in self._parameters.items() if p in sums}

    def check_gradient_state(self, sums: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise `StateError` if the two methods that load these could not use them. Nothing is changed."""
        latest = changes.get("latest", {})
        if stray := [name for name in changes.get("smallest", {}) if name not in latest]:
            raise StateError(
                f"The saved state has a change of the gradient of {stray[0]!r}, but no gradient. Resume from another "
                "checkpoint, or start without a state."
            )
        for name, gradient in [*sums.items(), *latest.items()]:
            parameter = self._parameters.get(name)
            if parameter is None or tuple(parameter.shape) != gradient.shape:
                here = "no such parameter" if parameter is None else f"one of shape {tuple(parameter.shape)}"
                raise StateError(
                    f"The saved state has the gradient of a parameter {name!r} of shape {gradient.shape}, and "
                    f"{type(self._model).__name__} has {here}. Use the state of a run of this same model."
                )

    def load_gradient_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `gradient_state` returned."""
        if state or self._given_steps is not None:
            self._steps.load_sums({self._parameters[name]: gradient for name, gradient in state.items()})

    def freeze(self, layers: list[str]) -> None:
        """Stop training these layers. From now on their weights and statistics stay bit-identical."""
        for layer in layers:
            if self._given_steps is not None:
                self._given_steps.forget(self._trainable[layer])
            for parameter in self._trainable[layer]:
                parameter.requires_grad_(False)
                # Zeroing it would not do: with a zero gradient, momentum and weight decay still move the weight.
                # Every optimizer skips a parameter that has no gradient.
                parameter.grad = None
                # The parameter stays in its group. If it were removed, optimizer.state_dict() would raise KeyError, and
                # schedulers and checkpoints would lose count.
                for optimizer in self._optimizers:
                    _drop_state(optimizer, parameter)
            if self._reentrant and layer not in self._gradient_hooks:
                self._gradient_hooks[layer] = self._outputs[layer].register_forward_hook(_LetsGradientsPass())
        new = [layer for layer in layers if layer not in self._kept]
        changing = dict.fromkeys(norm for layer in new for norm in self._changing(layer))
        self._held_for |= {layer: self._changing(layer) for layer in new}
        self._freeze_norms([norm for norm in changing if norm not in self._held_in_eval])
        for layer in new:
            self._hold_observers(layer)
        for layer in layers:
            self._keep(layer)
        if self._processes is not None and new:
            self._processes.parameters_changed()

    def unfreeze(self, layers: list[str]) -> None:
        """Train these layers again. Their optimizer state starts from scratch."""
        for layer in layers:
            self._let_go(layer)
            for parameter in self._trainable[layer]:
                parameter.requires_grad_(True)
                for optimizer in self._optimizers:
                    _renew_state(optimizer, parameter)
            for norm in self._held_for.pop(layer, []):
                if norm in self._held_in_eval:
                    override, was_trained = self._held_in_eval.pop(norm)
                    del norm.__dict__["train"]
                    if override is not None:
                        norm.__dict__["train"] = override
                    norm.train(self._model.training and was_trained)
            self._free_observers(layer)
            if layer in self._gradient_hooks:
                self._gradient_hooks.pop(layer).remove()
        if self._processes is not None and layers:
            self._processes.parameters_changed()

    def _quantizers(self, layer: str) -> list[Any]:
        """Return the fake quantizers of a layer (quantization-aware training), whose scales follow what they observe."""
        return [
            module
            for owner in self._owners[layer]
            if owner is not self._model
            for module in owner.children()
            if _is_quantizer(module)
        ]

    def _hold_observers(self, layer: str) -> None:
        """Stop what sets the scales of a layer's fake quantizers: it goes on in eval mode, too."""
        self._held_observers[layer] = [module for module in self._quantizers(layer) if module.observer_enabled[0]]
        for module in self._held_observers[layer]:
            module.disable_observer()

    def _free_observers(self, layer: str) -> None:
        held = self._held_observers.pop(layer, [])
        others = (module for module in self._model.modules() if _is_quantizer(module))
        # Quantization-aware training ends with all observers off. Then they stay so.
        if held and any(module.observer_enabled[0] for module in others):  # type: ignore[index]
            for module in held:
                module.enable_observer()

    def _keep(self, layer: str) -> None:
        """Note what a frozen layer is, to see later whether it stands still."""
        for parameter in self._trainable[layer]:
            self._guard.frozen[id(parameter)] = parameter, layer
            mark(parameter, frozen=True)
        self._guard.flagged.discard(layer)
        if layer not in self._kept:
            self._kept.keep(layer, self._trainable[layer])
            self._kept_buffers.keep(layer, self._buffers(layer))

    def _let_go(self, layer: str) -> None:
        for parameter in self._trainable[layer]:
            self._guard.frozen.pop(id(parameter), None)
            mark(parameter, frozen=False)
        self._guard.flagged.discard(layer)
        self._kept.forget(layer)
        self._kept_buffers.forget(layer)

    def forget_marks(self) -> None:
        """Have later runs take what is frozen for frozen by the user."""
        for parameter, _ in self._guard.frozen.values():
            mark(parameter, frozen=False)

    def _buffers(self, layer: str) -> list[torch.Tensor]:
        """Return what a layer holds besides parameters and has to stand still: buffers that checkpoints hold.

        PyTorch's own norms are held in eval mode. There only the user moves them, who may let `update_bn` gather their
        statistics anew.
        """
        return [
            buffer
            for module in (*self._owners[layer], *self._quantizers(layer))
            if not (isinstance(module, _NormBase) and type(module).__module__.startswith("torch."))
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set
        ]

    def _versions(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """Return the identity and the version of each buffer that holds numbers: any change in place counts it up."""
        return {
            name: (id(buffer), -1 if buffer.is_inference() else buffer._version)
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set
        }

    def _changing(self, layer: str) -> list[nn.Module]:
        """Return the modules that training changes besides their parameters: norms, also of the user's own classes."""
        known = self._norms[layer]
        own = [
            m for m in self._owners[layer] if m not in known and self._versions(m) != self._first_versions.get(m, {})
        ]
        return [*known, *own]

    def disturbed(self, layers: list[str]) -> dict[str, Disturbance]:
        """Return which of these frozen layers no longer stand still; see `Adapter`."""
        watched = [layer for layer in layers if layer in self._kept]
        moved = self._kept.moved({layer: self._trainable[layer] for layer in watched})
        statistics = self._kept_buffers.moved({layer: self._buffers(layer) for layer in watched})
        return self._name_disturbances(watched, moved, statistics)

    def disturbed_later(self, layers: list[str]) -> Callable[[], dict[str, Disturbance]]:
        """Begin what `disturbed` does, and return what waits for it; see `ReadsLater`."""
        watched = [layer for layer in layers if layer in self._kept]
        moved = self._kept.moved_later({layer: self._trainable[layer] for layer in watched})
        statistics = self._kept_buffers.moved_later({layer: self._buffers(layer) for layer in watched})
        return lambda: self._name_disturbances(
            [layer for layer in watched if layer in self._kept], moved(), statistics()
        )

    def _name_disturbances(
        self, watched: list[str], moved: Collection[str], statistics: Collection[str]
    ) -> dict[str, Disturbance]:
        found: dict[str, Disturbance] = {}
        for layer in watched:
            trainable = layer in self._guard.flagged or any(p.requires_grad for p in self._trainable[layer])
            if layer in moved:
                found[layer] = "trained" if trainable else "moved"
            elif layer in statistics:
                found[layer] = "statistics"
            elif trainable:
                found[layer] = "trainable"
        return found

    def untrained(self, layers: list[str]) -> dict[str, Untrained]:
        """Return which of these active layers are not trained, and why; see `Adapter`."""
        pending = [layer for layer in layers if layer in self._unmoved]
        for layer in self._unmoved.moved({layer: self._trainable[layer] for layer in pending}):
            self._unmoved.forget(layer)
        rates: dict[int, float] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                rate = float(group.get("lr", 1.0))
                for parameter in group["params"]:
                    rates[id(parameter)] = max(rate, rates.get(id(parameter), 0.0))
        found: dict[str, Untrained] = {}
        for layer in layers:
            owned = [rates[id(p)] for p in self._trainable[layer] if id(p) in rates]
            if rates.keys() & self._parameter_ids and not owned:
                found[layer] = "no_optimizer" if layer in self._unmoved else "unknown_optimizer"
            elif owned and not any(owned):
                found[layer] = "learning_rate_zero"
            elif layer in self._unmoved and (why := self._why_unmoved(layer)) is not None:
                found[layer] = why
        unknown = [layer for layer, why in found.items() if why == "unknown_optimizer"]
        if unknown and not self._named_optimizers:
            self._named_optimizers = True
            names = find_optimizers(p for layer in unknown for p in self._trainable[layer])
            if names:
                logger.warning("%s trains layers of the model, and was not given to SmartFRZ.", " and ".join(names))
        return found

    def _why_unmoved(self, layer: str) -> Untrained | None:
        """Return why a layer may not have moved since the first step; None if it was updated in that step alone."""
        guard, since = self._guard, self._unmoved_since[layer]
        last = max((guard.updated.get(id(p), 0) for p in self._trainable[layer]), default=0)
        if last > since:
            return "never_moved"
        if not last and any(id(p) in guard.rested for p in self._trainable[layer]):
            return "never_moved"
        # Such as a generator that is trained at every fifth step, or what LayerDrop left out.
        return "no_update_yet" if guard.num_steps > since or (guard.num_steps and not last) else None

    def find_layers(self) -> list[str]:
        """Return the names of the layers that may be frozen now; see `Adapter`."""
        named = dict(self._model.named_parameters())
        present = {id(p): p for p in named.values()}
        known = {id(p) for layer in self._all.values() for p in layer}
        for parameter in self._guard.strangers:
            if parameter.grad is not None:  # an optimizer without hooks
                self._guard.arrived.append(parameter)
        arrived = {id(p) for p in self._guard.arrived}
        self._guard.strangers = [p for i, p in present.items() if i not in known | arrived and not is_lazy(p)]
        self._newcomers = []
        if arrived - known:
            names = {name for layer in self._layers.values() for name in layer.parameters}
            later = group_later(self._model, [p for p in self._guard.arrived if id(p) in present], names)
            self._newcomers = [layer for layer in later if layer.name not in self._layers]
        described = self._with_newcomers([layer.name for layer in self._newcomers])
        return [
            name
            for name in described
            if name not in self._all or self._may_freeze(name, present) or self._has_come_back(name, named)
        ]

    def _has_come_back(self, layer: str, named: Mapping[str, nn.Parameter]) -> bool:
        """Return whether a layer that the user removed has new parameters now, such as a head for other classes."""
        if self._trainable[layer]:
            return False
        now = [named[name] for name in self._layers[layer].parameters if name in named]
        old = {id(p) for p in self._all[layer]}
        return len(now) == len(self._all[layer]) and any(
            id(p) not in old and p.numel() and self._guard.is_live(p) for p in now if not is_lazy(p)
        )

    def _may_freeze(self, layer: str, present: Mapping[int, nn.Parameter]) -> bool:
        ours = {id(p) for p in self._trainable[layer]} if layer in self._kept else set()
        return any(
            id(p) in present and p.numel() and (id(p) in ours or id(p) in self._guard.frozen or self._guard.is_live(p))
            for p in self._all[layer]
        )

    def _with_newcomers(self, names: Collection[str]) -> list[str]:
        """Return the names of all layers with new ones after the layers that are registered before them."""
        order = {name: index for index, (name, _) in enumerate(self._model.named_modules())} if names else {}
        every = list(self._layers)
        for name in names:
            before = [known for known in every if order.get(known, 0) < order.get(name, 0)]
            place = every.index(max(before, key=lambda known: order.get(known, 0))) + 1 if before else 0
            every.insert(place, name)
        return every

    def set_layers(self, layers: list[str]) -> None:
        """Have `layers` return these names from now on; see `Adapter`."""
        new = {layer.name: layer for layer in self._newcomers if layer.name in layers}
        missing = [name for name in layers if name not in self._layers and name not in new]
        for name in missing:  # it has run in another process only
            names = {n for layer in self._layers.values() for n in layer.parameters}
            for layer in group_later(self._model, list(self._model.get_submodule(name).parameters()), names):
                if layer.name == name:
                    new[name] = layer
        self._parameters = dict(self._model.named_parameters())
        self._parameter_ids = {id(p) for p in self._parameters.values()}
        described = {**self._layers, **new}
        self._layers = {name: described[name] for name in self._with_newcomers(list(new))}
        self._guard.arrived = []
        self._newcomers = []
        for layer in new.values():
            self._describe(layer, ours=set())
            self._unmoved.forget(layer.name)  # it has had a gradient
        for name in self._layers:
            if name not in layers and name in self._trainable:
                self._let_go(name)
                self._trainable[name] = []
                self._unmoved.forget(name)
            elif name in layers and not self._trainable[name]:
                self._describe(self._layers[name], ours=set())

    def _freeze_norms(self, norms: list[nn.Module]) -> None:
        statistics: list[torch.Tensor] = []
        for norm in norms:
            if isinstance(norm, _NormBase):
                if norm in self._snapshots:
                    correct_statistics(norm, self._snapshots[norm])
                statistics += [t for t in (norm.running_mean, norm.running_var) if t is not None]
            self._held_in_eval[norm] = norm.__dict__.get("train"), norm.training or not self._model.training
            norm.eval()
            # model.train() at the start of each epoch would undo eval(). A forward hook is no alternative: the compiler
            # would see the flag change within the pass, and compile twice.
            norm.__dict__["train"] = _StaysInEval(norm, count_batches(norm) > 0)
        if self._processes is not None and statistics:
            # Each process has seen batches of its own; from now on all of them have to compute the same.
            self._processes.average(statistics)

    def snapshot_statistics(self) -> None:
        """Remember the running statistics, so that `freeze` can compute them for the batches since.

        Call it a few batches before a freezing stage.
        """
        found = {
            norm: take_snapshot(norm)
            for name in self.layers()
            for norm in self._norms[name]
            if isinstance(norm, _NormBase) and norm not in self._held_in_eval
        }
        self._snapshots = {norm: snapshot for norm, snapshot in found.items() if snapshot is not None}
        if self._processes is not None and self._snapshots:
            # One process saves the state for all of them.
            self._processes.average([t for *statistics, _ in self._snapshots.values() for t in statistics])

    def norm_state(self) -> dict[str, Any]:
        """Return the snapshot, for a saved state."""
        names = {module: name for name, module in self._model.named_modules()}
        return {
            names[norm]: [mean, variance, int(batches)] for norm, (mean, variance, batches) in self._snapshots.items()
        }

    def check_norm_state(self, state: Mapping[str, Any]) -> None:
        """Raise `StateError` if `load_norm_state` could not use this. Nothing is changed."""
        modules = dict(self._model.named_modules())
        for name, (mean, _, _) in state.items():
            running = getattr(modules.get(name), "running_mean", None)
            if running is None or tuple(running.shape) != mean.shape:
                here = "no such batch norm" if running is None else f"one of shape {tuple(running.shape)}"
                raise StateError(
                    f"The saved state has statistics of a batch norm {name!r} of shape {mean.shape}, and "
                    f"{type(self._model).__name__} has {here}. Use the state of a run of this same model."
                )

    def load_norm_state(self, state: dict[str, Any]) -> None:
        """Restore what `norm_state` returned."""
        self._snapshots = {}
        for name, (mean, variance, batches) in state.items():
            norm: Any = self._model.get_submodule(name)
            statistics = [x.to(norm.running_mean.device, copy=True) for x in (mean, variance)]
            self._snapshots[norm] = NormSnapshot(statistics[0], statistics[1], int(batches))


def _is_quantizer(module: nn.Module) -> bool:
    return "observer_enabled" in module._buffers and hasattr(module, "disable_observer")


def _drop_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Drop what the optimizer remembers of a parameter that freezes."""
    if not isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.pop(parameter, None)
        return
    # LBFGS has one state for all parameters. Past directions would move a frozen weight, though its gradient counts as
    # zero. When a resumed run freezes its layers again, the directions are zero already, and the state is kept.
    parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
    direction = optimizer.state.get(parameters[0], {}).get("d")
    start = 0
    for other in parameters:
        if direction is not None and other is parameter and direction[start : start + other.numel()].any():
            optimizer.state.clear()
        start += other.numel()


def _renew_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Give a thawed parameter what the optimizer made for it at the start, if it makes nothing in a step.

    That is Adagrad before PyTorch 2.10: its step looks for a sum, and raises KeyError.
    """
    inner = unwrap(optimizer)
    if not isinstance(inner, torch.optim.Adagrad) or inner.state.get(parameter):
        return
    for group in inner.param_groups:
        if any(other is parameter for other in group["params"]):
            options = {name: group[name] for name in ("initial_accumulator_value", "fused") if name in group}
            fresh = torch.optim.Adagrad([parameter], **options)
            if fresh.state:
                inner.state[parameter] = fresh.state[parameter]


class _StaysInEval:
    """Replaces a frozen norm's `train`. A copy of the norm has a copy of it.

    A norm whose statistics were reset may train until it has new ones: `swa_utils.update_bn` collects them for averaged
    weights, also in a copy of the frozen model.

    Args:
        norm: The norm.
        has_statistics: Whether it has seen batches.
    """

    def __init__(self, norm: nn.Module, has_statistics: bool):
        self._norm, self._has_statistics = norm, has_statistics

    def __call__(self, mode: bool = True) -> nn.Module:
        """Stay in eval mode."""
        self._norm.training = mode and self._has_statistics and count_batches(self._norm) == 0
        return self._norm

    def __deepcopy__(self, memo: dict[int, Any]) -> "_StaysInEval":
        return _StaysInEval(copy.deepcopy(self._norm, memo), self._has_statistics)

    def __reduce__(self) -> Any:
        # A saved model has to load where smartfrz is not installed. The bound method of a dict returns the norm, whatever
        # the mode, and leaves it as it is.
        return partial, ({None: self._norm}.get, None)


class _LetsGradientsPass:
    """A hook that makes the output of a frozen layer require a gradient.

    A reentrant checkpoint gives no gradient at all if none of its inputs requires one, not even to live layers inside of
    it. Where the layer itself runs inside of a checkpoint, gradients are disabled, and nothing is done.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        tensors = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
        if any(tensor.requires_grad for tensor in tensors) or not torch.is_grad_enabled():
            return None
        return tree_map(_require_gradient, output)

    def __reduce__(self) -> Any:
        return Uncopied(self).__reduce__()  # nothing in a file may name smartfrz

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LetsGradientsPass":
        return self


def _require_gradient(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_().clone()  # cloned, since a leaf must not be changed in place


def take_back(model: nn.Module) -> None:
    """Train again what an interrupted run has left frozen in this model."""
    thaw_leftovers(model, _is_ours)


def _is_ours(function: Any) -> bool:
    """Return whether a function that hangs at a module was put there to freeze it, perhaps in a file that was loaded."""
    from_a_file = isinstance(function, partial) and isinstance(getattr(function.func, "__self__", None), dict)
    return from_a_file or isinstance(function, (_StaysInEval, _LetsGradientsPass))
