"""Freezing layers of a PyTorch model in the middle of training. PyTorch's traps live here."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from smartfrz.adapters.torch.layers import Layer, LayerReader


class Processes(Protocol):
    """The processes that train copies, or parts, of the model together."""

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in place."""
        ...

    def parameters_changed(self) -> None:
        """Some parameters begin or cease to have gradients; every process calls it at the same moment."""
        ...


class TorchAdapter(LayerReader):
    """Reads, freezes and unfreezes the layers of one model.

    Call `freeze` and `unfreeze` between an optimizer step and the next backward pass.

    Args:
        model: The model.
        optimizers: Every optimizer that holds parameters of the model.
        layers: The model's layers, in execution order. Layers that the user has frozen are left
            out of `layers()`, and are never unfrozen.
        processes: Told when parameters freeze, where several processes train together.
        reentrant: Whether the model uses reentrant gradient checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        layers: list[Layer],
        *,
        processes: Processes | None = None,
        reentrant: bool = False,
    ):
        super().__init__(model, layers)
        self._optimizers = list(optimizers)
        self._parameters = dict(model.named_parameters())
        self._model = model
        # A partly frozen layer is frozen in its trainable part, and unfrozen in that part only.
        self._trainable = {
            layer.name: [self._parameters[n] for n in layer.parameters if self._parameters[n].requires_grad]
            for layer in layers
        }
        self._norms: dict[str, list[_NormBase]] = {
            layer.name: [model.get_submodule(n) for n in layer.norms]  # type: ignore[misc]
            for layer in layers
        }
        self._processes = processes
        self._reentrant = reentrant
        self._outputs = {layer.name: model.get_submodule(layer.output) for layer in layers}
        self._gradient_hooks: dict[str, Any] = {}
        self._kept_in_eval: dict[_NormBase, Any] = {}  # with the user's own override of `train`, or None
        self._snapshots: dict[_NormBase, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def layers(self) -> list[str]:
        """Names of the layers that the user did not freeze, in execution order."""
        return [name for name in super().layers() if self._trainable[name]]

    def all_layers(self) -> list[str]:
        """Names of all layers, those that the user froze included, in execution order."""
        return super().layers()

    def layers_of_each_optimizer(self) -> list[list[str]]:
        """For each optimizer the names of the layers that it trains."""
        owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in self._optimizers]
        return [[name for name in self.layers() if any(id(p) in ids for p in self._trainable[name])] for ids in owned]

    def freeze(self, layers: list[str]) -> None:
        """Stop training these layers: from now on their weights and statistics stay bit-identical."""
        for layer in layers:
            for parameter in self._trainable[layer]:
                parameter.requires_grad_(False)
                # Not merely zeroed: with a zero gradient momentum and weight decay go on moving the
                # weight. Without one every optimizer skips it.
                parameter.grad = None
                # It stays in its param group. Removed from there, optimizer.state_dict() raises
                # KeyError and schedulers and checkpoints lose count.
                for optimizer in self._optimizers:
                    optimizer.state.pop(parameter, None)
            if self._reentrant and layer not in self._gradient_hooks:
                self._gradient_hooks[layer] = self._outputs[layer].register_forward_hook(_let_gradients_pass)
        self._freeze_norms([norm for layer in layers for norm in self._norms[layer] if norm not in self._kept_in_eval])
        if self._processes is not None and layers:
            self._processes.parameters_changed()

    def unfreeze(self, layers: list[str]) -> None:
        """Train these layers again; their optimizer state starts anew."""
        for layer in layers:
            for parameter in self._trainable[layer]:
                parameter.requires_grad_(True)
            for norm in self._norms[layer]:
                if norm in self._kept_in_eval:
                    override = self._kept_in_eval.pop(norm)
                    del norm.__dict__["train"]
                    if override is not None:
                        norm.__dict__["train"] = override
                    norm.train(self._model.training)
            if layer in self._gradient_hooks:
                self._gradient_hooks.pop(layer).remove()
        if self._processes is not None and layers:
            self._processes.parameters_changed()

    def _freeze_norms(self, norms: list[_NormBase]) -> None:
        statistics = []
        for norm in norms:
            if norm.training:
                self._correct_statistics(norm)
            norm.eval()
            # model.train() at the start of each epoch would undo eval(). Not a forward hook: the
            # compiler would see the flag change within the pass and compile twice.
            self._kept_in_eval[norm] = norm.__dict__.get("train")
            norm.__dict__["train"] = partial(_stay_in_eval, norm)
            statistics += [t for t in (norm.running_mean, norm.running_var) if t is not None]
        if self._processes is not None and statistics:
            # Each process has seen its own batches; from now on all of them compute the same.
            self._processes.average(statistics)

    def snapshot_statistics(self) -> None:
        """Remember the running statistics, so that `freeze` can tell what was added since.

        Call it a few batches before a freezing stage.
        """
        self._snapshots = {
            norm: (norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked or 0))
            for name in self.layers()
            for norm in self._norms[name]
            if norm not in self._kept_in_eval and norm.running_mean is not None and norm.running_var is not None
        }

    def _correct_statistics(self, norm: _NormBase) -> None:
        """Make the running statistics those of the batches since the snapshot.

        A norm of momentum 0.01 lags hundreds of batches behind its weights: in eval mode the layer
        suddenly computes something else, and training on top of it suffers. A running average that
        was `old` and is `new` after n batches is `(1 - m)^n old + (1 - (1 - m)^n) recent`, so the
        recent average follows from two snapshots, at no cost in the forward pass.
        """
        if norm not in self._snapshots or norm.num_batches_tracked is None:
            return
        mean, variance, batches_before = self._snapshots[norm]
        batches = int(norm.num_batches_tracked)
        if batches == batches_before:
            return
        if norm.momentum is None:  # a plain average over all batches
            old_share = batches_before / batches
        else:
            old_share = (1.0 - norm.momentum) ** (batches - batches_before)
        if old_share >= 1.0:
            return
        for new, old in ((norm.running_mean, mean), (norm.running_var, variance)):
            if new is not None:
                new.copy_((new.double() - old_share * old.double()) / (1.0 - old_share))
        if norm.running_var is not None:
            norm.running_var.clamp_(min=0.0)  # rounding

    def norm_state(self) -> dict[str, Any]:
        """The snapshot, for a saved state."""
        names = {module: name for name, module in self._model.named_modules()}
        return {names[norm]: list(values) for norm, values in self._snapshots.items()}

    def load_norm_state(self, state: dict[str, Any]) -> None:
        """Restore what `norm_state` returned."""
        self._snapshots = {
            self._model.get_submodule(name): (mean.clone(), variance.clone(), int(batches))  # type: ignore[misc]
            for name, (mean, variance, batches) in state.items()
        }


def _stay_in_eval(norm: nn.Module, mode: bool = True) -> nn.Module:
    """Takes the place of a frozen norm's `train`. Bound by `partial`, which copies and pickles with the norm."""
    return norm


def _let_gradients_pass(module: nn.Module, args: Any, output: Any) -> Any:
    """Have the output of a frozen layer require a gradient.

    A reentrant checkpoint none of whose inputs requires one yields no gradient at all, that of live
    layers inside of it included. Where the layer itself runs inside of a checkpoint, gradients are
    disabled and nothing is done.
    """
    needless = not isinstance(output, torch.Tensor) or output.requires_grad or not output.is_floating_point()
    if needless or not torch.is_grad_enabled():
        return None
    return output.detach().requires_grad_().clone()  # a leaf itself must not be altered in place
