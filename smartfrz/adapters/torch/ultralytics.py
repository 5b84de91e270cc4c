"""SmartFRZ for the YOLO models of ultralytics. Loads nothing of ultralytics, whose licence is AGPL-3.0."""

from typing import Any

from smartfrz.adapters.torch.callback import FreezingCallback
from smartfrz.adapters.torch.losses import is_loss

__all__ = ["SmartFRZCallback"]


class SmartFRZCallback(FreezingCallback):
    """Freezes layers while `YOLO.train` trains on one device, when the predictor says that they have converged.

    A checkpoint of ultralytics has no place for its state: a run that is resumed needs `allow_missing_state=True`, and
    is watched from there on. `smartfrz.adapters.torch.callback.FreezingCallback` documents the arguments and attributes.

    Example:
        >>> callback = SmartFRZCallback()
        >>> callback.attach(model)  # doctest: +SKIP
        >>> model.train(data="coco8.yaml", epochs=100)  # doctest: +SKIP
        >>> print(callback.report())
        SmartFRZ: no step yet.
    """

    def attach(self, model: Any) -> None:
        """Add the callback to an `ultralytics.YOLO`, or to a trainer."""
        self._options["auto_step"] = True  # there is no event after a step of the optimizer
        model.add_callback("on_train_start", self.on_train_start)
        model.add_callback("on_train_batch_end", self.on_train_batch_end)
        model.add_callback("on_train_end", self.on_train_end)

    def on_train_start(self, trainer: Any) -> None:
        """Make the freezer: model and optimizer exist by now."""
        steps = _count_steps(trainer)
        self._begin(trainer.model, trainer.optimizer, steps, steps, None, trainer.start_epoch)

    def on_train_batch_end(self, trainer: Any) -> None:
        """Pass the loss of the batch, for predictors that read losses."""
        loss = getattr(trainer, "loss", None)
        if self.freezer is not None and is_loss(loss):
            self.freezer.step(loss)

    def on_train_end(self, trainer: Any) -> None:
        """Leave the model as it was found."""
        self._finish()


def _count_steps(trainer: Any) -> int:
    """Return the number of optimizer steps from now on, as ultralytics 8.4 takes them.

    Gradients of more and more batches are added up during the warm-up, and of `accumulate` batches after it.
    """
    batches = len(trainer.train_loader)
    warm_up = round(min(trainer.args.warmup_epochs, trainer.epochs - 1) * batches)
    steps, latest = 0, -1
    for batch in range(trainer.start_epoch * batches, trainer.epochs * batches):
        share = min(1.0, batch / warm_up) if warm_up > 0 else 1.0
        if batch - latest >= max(1, round(1 + share * (trainer.accumulate - 1))):
            steps, latest = steps + 1, batch
    return max(1, steps)
