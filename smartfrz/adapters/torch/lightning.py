"""SmartFRZ for the `Trainer` of Lightning."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from smartfrz.adapters.torch.callback import FreezingCallback
from smartfrz.adapters.torch.freezing import take_back
from smartfrz.adapters.torch.losses import BatchLosses
from smartfrz.adapters.torch.pictures import send_picture
from smartfrz.errors import UsageError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:
        try:  # the same framework under its other name
            from pytorch_lightning import Callback, LightningModule, Trainer
        except ImportError as error:
            from smartfrz.errors import not_installed

            raise not_installed("smartfrz.adapters.torch.lightning", "Lightning", "lightning") from error

__all__ = ["SmartFRZCallback"]


class SmartFRZCallback(FreezingCallback, Callback):
    """Freezes layers while a `Trainer` fits, when the predictor says that they have converged.

    Checkpoints carry its state, and `fit(ckpt_path=...)` restores it. `smartfrz/frozen_layers` and
    `smartfrz/backward_saved` (a share, 0 to 1) are logged. The confidences of single layers go to the loggers too, and at
    the end a picture of the run to TensorBoard, W&B and MLflow. When fitting ends, `requires_grad` is
    again what it was before.

    `smartfrz.adapters.torch.callback.FreezingCallback` documents the arguments and attributes.

    Example:
        >>> callback = SmartFRZCallback()
        >>> Trainer(max_epochs=5, callbacks=[callback]).fit(model, loader)  # doctest: +SKIP
        >>> print(callback.report())
        SmartFRZ: no step yet.
    """

    _saved: dict[str, Any] | None = None
    _step: "_TrainingStep | None" = None
    _global_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the state of a fit that this one continues; the checkpoint is read, and the optimizers made, later."""
        if stage != "fit":
            return
        self._end()
        take_back(pl_module)  # perhaps with another callback, whose run was interrupted
        # The same Trainer fits on where it stopped, with max_epochs raised.
        goes_on = self.freezer is not None and 0 < trainer.global_step == self._global_step
        self._saved = self._state() if goes_on else None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget the state of an earlier fit, even if the checkpoint has none of this callback."""
        self._saved = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until fitting starts: there are no optimizers yet."""
        self._saved = state_dict

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed fit needs to continue as an uninterrupted one."""
        if self.freezer is not None:
            return self._state()
        return self._saved or {"started": False}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the freezer: the optimizers exist by now, and are restored if fitting resumes."""
        saved, self._saved = self._saved, None
        self._losses = BatchLosses()
        self._step = _TrainingStep(pl_module)
        self._begin(
            self._step,
            trainer.optimizers,
            *_length_of(trainer, needed=self._needs_length),
            saved,
            trainer.global_step,
            self._step.entry,
        )
        self._global_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let SmartFRZ watch the training step, as long as it learns the layers."""
        if self._step is not None and self._step.is_watched:
            self._step.take_next()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act if an optimizer stepped: not while gradients are accumulated, once for several optimizers."""
        if self.freezer is None:
            return
        if self.freezer.reads_loss:
            self._losses.add(outputs.get("loss") if isinstance(outputs, Mapping) else outputs)
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        if not (outputs or self.freezer.num_steps) and pl_module.automatic_optimization:
            return  # `training_step` returned None: there was no backward pass yet, which `step` would ask for
        self.freezer.step(self._losses.take(mean=True))
        if not trainer.barebones:
            pl_module.log_dict(self._logs(), batch_size=1)
        if self.freezer.just_recorded:
            self._note(trainer)
            confidences = self.freezer.confidences()
            for logger in trainer.loggers if confidences else ():
                # Lightning counts the step of a batch from 0.
                logger.log_metrics(confidences, self.freezer.num_steps - 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics for the report."""
        self._note(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics for the report."""
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        if self._training and self.freezer is not None and not trainer.sanity_checking:
            self.freezer.note_logs(trainer.callback_metrics, only_new=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as it was found, and send the picture of the run to TensorBoard, W&B and MLflow."""
        self._finish()
        for logger in trainer.loggers if trainer.is_global_zero else ():
            send_picture(self.report(), logger)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was found, unless other processes would have to take part."""
        if trainer.world_size == 1:
            self._end()


def _length_of(trainer: Trainer, *, needed: bool) -> tuple[int | None, int | None]:
    """Return the number of batches, until the end and in all, after which an optimizer steps.

    Both are None if Lightning does not know them and they are not needed.
    """
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total) or total < 1:
        if not needed:
            return None, None
        raise UsageError(
            f"Lightning estimates {total} steps for this fit; SmartFRZ needs to know how long the run is. Pass "
            "SmartFRZCallback(total_steps=...) or record_every=..., or give the Trainer max_steps."
        )
    done = trainer.global_step
    optimizers = 1 if trainer.lightning_module.automatic_optimization else len(trainer.optimizers)
    if trainer.max_steps > 0:  # of all optimizers together
        total = min(total, math.ceil(trainer.max_steps / optimizers))
    return max(1, int(total) - done // optimizers), int(total)


class _TrainingStep(nn.Module):
    """A LightningModule whose forward pass is its training step.

    SmartFRZ learns the layers from the first forward pass. Many training steps never call the
    LightningModule itself, but `self.net(x)`, or an encoder and then a decoder.
    """

    def __init__(self, pl_module: LightningModule):
        super().__init__()
        # The very same dicts: names stay the same, and a change in the LightningModule is a change here.
        self._parameters, self._buffers, self._modules = pl_module._parameters, pl_module._buffers, pl_module._modules
        self.__dict__["lightning_module"] = pl_module  # not as a submodule: its names would change
        self.__dict__["step"] = pl_module.training_step
        self.__dict__["called"] = []
        del self.training

    def __getattr__(self, name: str) -> Any:
        return self.lightning_module.training if name == "training" else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called.clear()
        with register_module_forward_pre_hook(lambda module, args: self.called.append(module)):
            # A tuple: a step that optimizes by hand may return None, which hooks would take for a pass that raised.
            return (self.step(*args, **kwargs),)

    def entry(self) -> nn.Module | None:
        """Return the outermost module that the last step called and that has more than half of the weights."""
        total = sum(parameter.numel() for parameter in self.parameters())
        for module in self.called:
            if 2 * sum(parameter.numel() for parameter in module.parameters()) > total:
                return module
        return None

    @property
    def is_watched(self) -> bool:
        """True if the forward pass has hooks."""
        return bool(self._forward_pre_hooks or self._forward_hooks)

    def take_next(self) -> None:
        """Send the LightningModule's next training step through this module; later steps take the usual way."""
        pl_module: Any = self.lightning_module
        own = pl_module.__dict__.get("training_step")  # a compiled one, for example

        def once(*args: Any, **kwargs: Any) -> Any:
            del pl_module.training_step
            if own is not None:
                pl_module.training_step = own
            return self(*args, **kwargs)[0]

        # Lightning passes what the signature asks for, and looks behind one decorator only.
        once.__wrapped__ = getattr(self.step, "__wrapped__", self.step)  # type: ignore[attr-defined]
        pl_module.training_step = once
