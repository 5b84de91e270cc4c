"""Freezes layers of a PyTorch model in the middle of training, around the traps of PyTorch."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from smartfrz.adapters.torch.layers import Layer, LayerReader
from smartfrz.adapters.torch.optimizer_steps import OptimizerSteps
from smartfrz.control.norms import compute_old_share, compute_recent_statistics
from smartfrz.control.protocols import Untrained
from smartfrz.control.watch import Disturbance
from smartfrz.errors import UnsupportedModelError


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
        steps: Hooks of the optimizers, for `set_lr_scale` and `gradient_norm`. Made on first use by default.

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
        ours = {id(p) for p in previous._frozen_parameters()} if previous is not None else set()
        # A partly frozen layer is frozen in its trainable part, and unfrozen in that part only.
        self._trainable = {
            layer.name: [
                p for p in map(self._parameters.__getitem__, layer.parameters) if p.requires_grad or id(p) in ours
            ]
            for layer in layers
        }
        for name, trained in self._trainable.items():
            # It is also judged by that part: what the user froze does not move, and would look converged.
            ids = {id(p) for p in trained}
            judged = [p for p in self._tensors[name] if id(p) in ids] or [p for p in trained if p.dim() >= 2] or trained
            self._tensors[name] = judged or self._tensors[name]
        self._norms = {layer.name: [model.get_submodule(n) for n in layer.norms] for layer in layers}
        self._processes = processes
        self._reentrant = reentrant
        self._outputs = {layer.name: model.get_submodule(layer.output) for layer in layers}
        self._gradient_hooks: dict[str, Any] = {}
        # The user's own override of `train`, or None, and whether the norm was in training mode
        self._held_in_eval: dict[nn.Module, tuple[Any, bool]] = {}
        self._snapshots: dict[_NormBase, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def layers(self) -> list[str]:
        """Return the names of the layers that the user did not freeze, in execution order."""
        return [name for name in super().layers() if self._trainable[name]]

    def all_layers(self) -> list[str]:
        """Return the names of all layers in execution order, even if the user froze them."""
        return super().layers()

    def _frozen_parameters(self) -> list[nn.Parameter]:
        return [p for trainable in self._trainable.values() for p in trainable if not p.requires_grad]

    def layers_of_each_optimizer(self) -> list[list[str]]:
        """Return, for each optimizer, the names of the layers that it trains."""
        owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in self._optimizers]
        return [[name for name in self.layers() if any(id(p) in ids for p in self._trainable[name])] for ids in owned]

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

    def gradient_state(self) -> dict[str, torch.Tensor]:
        """Return the sums of gradients by the name of the parameter, for a saved state."""
        if self._given_steps is None:
            return {}
        sums = self._given_steps.sums()
        return {name: sums[p] for name, p in self._parameters.items() if p in sums}

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
                self._gradient_hooks[layer] = self._outputs[layer].register_forward_hook(_let_gradients_pass)
        self._freeze_norms([norm for layer in layers for norm in self._norms[layer] if norm not in self._held_in_eval])
        if self._processes is not None and layers:
            self._processes.parameters_changed()

    def unfreeze(self, layers: list[str]) -> None:
        """Train these layers again. Their optimizer state starts from scratch."""
        for layer in layers:
            for parameter in self._trainable[layer]:
                parameter.requires_grad_(True)
            for norm in self._norms[layer]:
                if norm in self._held_in_eval:
                    override, was_trained = self._held_in_eval.pop(norm)
                    del norm.__dict__["train"]
                    if override is not None:
                        norm.__dict__["train"] = override
                    norm.train(self._model.training and was_trained)
            if layer in self._gradient_hooks:
                self._gradient_hooks.pop(layer).remove()
        if self._processes is not None and layers:
            self._processes.parameters_changed()

    def disturbed(self, layers: list[str]) -> dict[str, Disturbance]:
        """Return which of these frozen layers no longer stand still."""
        return {}

    def untrained(self, layers: list[str]) -> dict[str, Untrained]:
        """Return which of these active layers are not trained, and why."""
        return {}

    def find_layers(self) -> list[str]:
        """Return the names of the layers that may be frozen now."""
        return self.layers()

    def set_layers(self, layers: list[str]) -> None:
        """Have `layers` return these names from now on."""

    def _freeze_norms(self, norms: list[nn.Module]) -> None:
        statistics: list[torch.Tensor] = []
        for norm in norms:
            if isinstance(norm, _NormBase):
                self._correct_statistics(norm)
                statistics += [t for t in (norm.running_mean, norm.running_var) if t is not None]
            self._held_in_eval[norm] = norm.__dict__.get("train"), norm.training or not self._model.training
            norm.eval()
            # model.train() at the start of each epoch would undo eval(). A forward hook is no alternative: the compiler
            # would see the flag change within the pass, and compile twice.
            norm.__dict__["train"] = partial(_stay_in_eval, norm, _count_batches(norm) > 0)
        if self._processes is not None and statistics:
            # Each process has seen batches of its own; from now on all of them have to compute the same.
            self._processes.average(statistics)

    def snapshot_statistics(self) -> None:
        """Remember the running statistics, so that `freeze` can compute them for the batches since.

        Call it a few batches before a freezing stage.
        """
        self._snapshots = {
            norm: (norm.running_mean.clone(), norm.running_var.clone(), _count_batches(norm))
            for name in self.layers()
            for norm in self._norms[name]
            if isinstance(norm, _NormBase) and norm not in self._held_in_eval
            if norm.running_mean is not None and norm.running_var is not None
        }
        if self._processes is not None and self._snapshots:
            # One process saves the state for all of them.
            self._processes.average([t for *statistics, _ in self._snapshots.values() for t in statistics])

    def _correct_statistics(self, norm: _NormBase) -> None:
        """Replace the running statistics by those of the batches since the snapshot: see `control.norms`."""
        if norm not in self._snapshots or norm.running_mean is None or norm.running_var is None:
            return
        mean, variance, before = self._snapshots[norm]
        # A momentum of None is a plain average over all batches.
        kept = None if norm.momentum is None else 1.0 - norm.momentum
        old_share = compute_old_share(kept, before=before, since=_count_batches(norm) - before)
        running = norm.running_mean, norm.running_var
        recent = compute_recent_statistics(
            (mean.double(), variance.double()), (running[0].double(), running[1].double()), old_share
        )
        if recent is None:
            return
        for statistic, value in zip(running, recent, strict=True):
            # .data: a backward pass in progress has saved the statistics, though it does not use them.
            statistic.data.copy_(value)

    def norm_state(self) -> dict[str, Any]:
        """Return the snapshot, for a saved state."""
        names = {module: name for name, module in self._model.named_modules()}
        return {names[norm]: list(values) for norm, values in self._snapshots.items()}

    def load_norm_state(self, state: dict[str, Any]) -> None:
        """Restore what `norm_state` returned."""
        self._snapshots = {
            self._model.get_submodule(name): (mean.clone(), variance.clone(), int(batches))  # type: ignore[misc]
            for name, (mean, variance, batches) in state.items()
        }


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


def _count_batches(norm: nn.Module) -> int:
    """Return how many batches the running statistics of a norm have seen; 0 if it does not count them."""
    tracked = getattr(norm, "num_batches_tracked", None)
    return 0 if tracked is None else int(tracked)


def _stay_in_eval(norm: nn.Module, has_statistics: bool, mode: bool = True) -> nn.Module:
    """Replace a frozen norm's `train`. Bound by `partial`, which is copied and pickled with the norm.

    A norm whose statistics were reset may train until it has new ones: `swa_utils.update_bn` collects them for averaged
    weights, also in a copy of the frozen model.
    """
    norm.training = mode and has_statistics and _count_batches(norm) == 0
    return norm


def _let_gradients_pass(module: nn.Module, args: Any, output: Any) -> Any:
    """Make the output of a frozen layer require a gradient.

    A reentrant checkpoint gives no gradient at all if none of its inputs requires one, not even to live layers inside of
    it. Where the layer itself runs inside of a checkpoint, gradients are disabled, and nothing is done.
    """
    tensors = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
    if any(tensor.requires_grad for tensor in tensors) or not torch.is_grad_enabled():
        return None
    return tree_map(_require_gradient, output)


def _require_gradient(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_().clone()  # cloned, since a leaf must not be changed in place
