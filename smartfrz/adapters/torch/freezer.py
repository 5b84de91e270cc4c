"""`SmartFRZ`: layer freezing for a plain PyTorch training loop."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from smartfrz import zoo
from smartfrz.adapters.torch.freezing import TorchAdapter
from smartfrz.adapters.torch.layers import Layer, LayerTracer
from smartfrz.errors import StateError, UsageError
from smartfrz.predictor.controller import PATIENCE, AsksPredictor, FreezeController, schedule
from smartfrz.predictor.decision import FreezeDecision
from smartfrz.predictor.runtime import Device


class SmartFRZ:
    """Freezes layers of a model while it is trained, when the predictor says that they have converged.

    Args:
        model: The model. Its first forward pass in training mode shows which layers it has, and in
            which order they run.
        optimizer: The optimizer, or several, of the model's parameters.
        predictor: A name of the zoo, the path of an ONNX file, or a loaded `Predictor`.
        total_steps: Optimizer steps of the whole run, `len(loader) * epochs`. Gives `record_every`.
        record_every: Steps between two records of the weights.
        decide_every: Records between two freezing stages. Defaults to 2.
        threshold: Confidence from which a layer is frozen. Defaults to the predictor's own.
        patience: Freezing stages in a row at which a layer must be confident. The thresholds of the
            zoo are calibrated for the default.
        dry_run: Decide, log and report, but freeze nothing.
        seed: The run seed of the sampled positions.
        device: Where ONNX Runtime runs: `"cpu"`, `"cuda"`, or `"auto"`.
        norm_batches: Batches before a freezing stage over which the statistics of a frozen batch
            norm are averaged. 0 keeps its running statistics as they are.

    Raises:
        PredictorFileError: If the predictor cannot be used.
        UnknownPredictorError: If the zoo has no predictor of that name.
        ValueError: If an argument is out of range.

    Example:
        >>> freezer = SmartFRZ(model, optimizer, total_steps=len(loader) * epochs)  # doctest: +SKIP
        >>> for inputs, targets in loader:  # doctest: +SKIP
        ...     criterion(model(inputs), targets).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     freezer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        predictor: str | os.PathLike[str] | AsksPredictor = zoo.DEFAULT,
        *,
        total_steps: int | None = None,
        record_every: int | None = None,
        decide_every: int | None = None,
        threshold: float | None = None,
        patience: int = PATIENCE,
        dry_run: bool = False,
        seed: int = 0,
        device: Device = "auto",
        norm_batches: int = 24,
    ):
        self.predictor = zoo.load(predictor, device=device)
        # complain now, not after the first batch
        schedule(self.predictor.info, total_steps, record_every, decide_every, threshold, patience)
        if norm_batches < 0:
            raise ValueError(f"`norm_batches` is {norm_batches}; expected 0 or more batches.")
        self._model = model
        self._optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._options: dict[str, Any] = {
            "total_steps": total_steps,
            "record_every": record_every,
            "decide_every": decide_every,
            "threshold": threshold,
            "patience": patience,
            "dry_run": dry_run,
            "seed": seed,
        }
        self._norm_batches = norm_batches
        self._adapter: TorchAdapter | None = None
        self._controller: FreezeController | None = None
        self._all_layers: list[Layer] = []
        self._started: float | None = None
        self._seconds = 0.0
        self._saw_gradient = False
        self._tracer: LayerTracer | None = LayerTracer(model)
        trainable = tuple(p for p in model.parameters() if p.requires_grad)
        self._gradient_hook: Any = None
        if trainable:
            self._gradient_hook = torch.autograd.graph.register_multi_grad_hook(
                trainable, self._on_gradient, mode="any"
            )

    def _on_gradient(self, gradient: torch.Tensor) -> None:
        self._saw_gradient = True

    def step(self) -> list[FreezeDecision]:
        """Record, decide and freeze, where it is time to. Call it once after each `optimizer.step()`.

        Returns:
            The decisions of this step; empty if it was not a freezing stage.

        Raises:
            UsageError: If the model has not run forward and backward in training mode yet.
            UnsupportedModelError: If the model has no layers to freeze.
        """
        controller = self._controller or self._start()
        if self._started is None:
            self._started = time.perf_counter()
        decisions = controller.step()
        self._snapshot_before_stage(controller)
        self._seconds = time.perf_counter() - self._started
        return decisions

    def _start(self) -> FreezeController:
        if self._tracer is None or not self._tracer.done or not self._saw_gradient:
            done = (
                "no forward pass in training mode" if not (self._tracer and self._tracer.done) else "no backward pass"
            )
            raise UsageError(
                f"freezer.step() was called, but the model had {done} since SmartFRZ was made; expected one. Call "
                "freezer.step() after loss.backward() and optimizer.step(), and run the model that you passed to "
                "SmartFRZ."
            )
        controller, adapter = self._control(self._tracer.layers())
        if self._norm_batches:
            adapter.snapshot_statistics()  # for a first stage that comes before the next snapshot
        return controller

    def _control(self, layers: list[Layer]) -> tuple[FreezeController, TorchAdapter]:
        adapter = TorchAdapter(self._model, self._optimizers, layers)
        controller = FreezeController(adapter, self.predictor, **self._options)
        self._all_layers, self._adapter, self._controller = layers, adapter, controller
        self.close()
        return controller, adapter

    def close(self) -> None:
        """Remove the hooks that watch the first pass. Frozen layers stay frozen."""
        if self._tracer is not None:
            self._tracer.close()
            self._tracer = None
        if self._gradient_hook is not None:
            self._gradient_hook.remove()
            self._gradient_hook = None

    def _snapshot_before_stage(self, controller: FreezeController) -> None:
        interval = controller.record_every * controller.decide_every
        ahead = min(self._norm_batches, interval)
        if self._adapter is not None and ahead and controller.num_steps % interval == interval - ahead:
            self._adapter.snapshot_statistics()

    @property
    def layers(self) -> list[str]:
        """Every layer that can be frozen, in execution order; empty before the first step."""
        return self._adapter.layers() if self._adapter else []

    @property
    def frozen_layers(self) -> list[str]:
        """Names of the frozen layers, as in `model.named_modules()`, in the order in which they froze."""
        return [] if self._controller is None or self._controller.dry_run else list(self._controller.frozen)

    @property
    def events(self) -> list[FreezeDecision]:
        """One record per decision, oldest first."""
        return list(self._controller.events) if self._controller else []

    def report(self) -> "Report":
        """What froze when, what that saved, and what deciding cost."""
        controller = self._controller
        if controller is None:
            return Report([], {}, set(), 0, 0.0, 0.0, False)
        user_frozen = {layer.name for layer in self._all_layers} - set(self.layers)
        return Report(
            self._all_layers,
            dict(controller.frozen),
            user_frozen,
            controller.num_steps,
            self._seconds,
            controller.decision_seconds,
            controller.dry_run,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as an uninterrupted one.

        It holds plain data and tensors: `torch.load(..., weights_only=True)` reads it.
        """
        if self._controller is None or self._adapter is None:
            return {"started": False}
        state = self._controller.state_dict()
        state["history"] = {layer: torch.from_numpy(rows) for layer, rows in state["history"].items()}
        return {
            "started": True,
            "seconds": self._seconds,
            "layers": [layer.to_dict() for layer in self._all_layers],
            "controller": state,
            "norms": self._adapter.norm_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run: load the model and the optimizer first, then this.

        What the saved run had frozen is frozen again at once.

        Raises:
            StateError: If the state is of another model or predictor.
        """
        if "started" not in state:
            raise StateError(
                f"SmartFRZ.load_state_dict received a dict with keys {sorted(map(str, state))[:5]}; expected what "
                "SmartFRZ.state_dict() returned. Save and load that."
            )
        if not state["started"]:
            return
        controller_state = dict(state["controller"])
        controller_state["history"] = {k: np.asarray(v) for k, v in controller_state["history"].items()}
        if self._controller is not None and self._adapter is not None:
            self._adapter.unfreeze(list(self._controller.frozen))  # or they would pass for the user's own
        controller, adapter = self._control([Layer.from_dict(layer) for layer in state["layers"]])
        controller.load_state_dict(controller_state)
        adapter.load_norm_state(state["norms"])
        self._seconds = state["seconds"]
        self._started = time.perf_counter() - self._seconds


@dataclass(frozen=True)
class Report:
    """What SmartFRZ did in a run; `print` it.

    Attributes:
        layers: Every layer, in execution order.
        frozen: Layer name to the step at which it froze (in a dry run: would have).
        user_frozen: Layers that the user had frozen before.
        num_steps: Optimizer steps so far.
        seconds: From the first to the latest `freezer.step()`.
        decision_seconds: Part of that spent recording, deciding and freezing.
        dry_run: Whether nothing was really frozen.
    """

    layers: list[Layer]
    frozen: dict[str, int]
    user_frozen: set[str]
    num_steps: int
    seconds: float
    decision_seconds: float
    dry_run: bool

    def _backward_flops(self, frozen: Iterable[str]) -> int:
        """Of one step. A weight gradient costs as much as the forward pass; so does an input gradient.

        Neither is computed in a frozen prefix; behind it a frozen layer still passes gradients on.
        """
        stopped = set(frozen) | self.user_frozen
        first_active = next((i for i, layer in enumerate(self.layers) if layer.name not in stopped), len(self.layers))
        total = 0
        for index, layer in enumerate(self.layers):
            needs_weight = layer.name not in stopped
            needs_input = index > first_active
            total += layer.forward_flops * (int(needs_weight) + int(needs_input))
        return total

    @property
    def backward_flops(self) -> int:
        """Of the layers over the whole run so far, without freezing, estimated from the first batch."""
        return self.num_steps * self._backward_flops([])

    @property
    def backward_flops_saved(self) -> int:
        """The part of `backward_flops` that freezing saved (in a dry run: would have)."""
        saved, stopped = 0, []
        full = self._backward_flops([])
        marks = sorted(set(self.frozen.values()))
        for start, end in zip(marks, [*marks[1:], self.num_steps], strict=True):
            stopped = [layer for layer, step in self.frozen.items() if step <= start]
            saved += (end - start) * (full - self._backward_flops(stopped))
        return saved

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a log."""
        return {
            "num_layers": len(self.layers),
            "frozen": dict(self.frozen),
            "user_frozen": sorted(self.user_frozen),
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "decision_seconds": self.decision_seconds,
            "backward_flops": self.backward_flops,
            "backward_flops_saved": self.backward_flops_saved,
            "dry_run": self.dry_run,
        }

    def __str__(self) -> str:
        if not self.num_steps:
            return "SmartFRZ: no step yet."
        what = "would have frozen" if self.dry_run else "froze"
        lines = [f"SmartFRZ {what} {len(self.frozen)} of {len(self.layers)} layers in {self.num_steps} steps."]
        stopped = set(self.frozen) | self.user_frozen
        prefix = next((i for i, layer in enumerate(self.layers) if layer.name not in stopped), len(self.layers))
        if self.user_frozen:
            lines.append(f"{len(self.user_frozen)} layers were frozen before.")
        if stopped:
            lines.append(
                f"The frozen prefix is {prefix} layers long; {len(stopped) - prefix} frozen layers lie behind it."
            )
        by_step: dict[int, list[str]] = {}
        for layer, step in self.frozen.items():
            by_step.setdefault(step, []).append(layer)
        for step, names in by_step.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"  step {step:>6} ({step / self.num_steps:4.0%}): {shown}")
        if self.backward_flops:
            share = self.backward_flops_saved / self.backward_flops
            lines.append(
                f"Backward computation saved: {self.backward_flops_saved / 1e12:.3g} of "
                f"{self.backward_flops / 1e12:.3g} TFLOPs ({share:.0%}), estimated from the first batch."
            )
        share = self.decision_seconds / self.seconds if self.seconds else 0.0
        lines.append(
            f"Recording and deciding took {self.decision_seconds:.2f} s ({share:.1%} of {self.seconds:.1f} s)."
        )
        return "\n".join(lines)
