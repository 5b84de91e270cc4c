"""`SmartFRZ`: layer freezing for a plain PyTorch training loop."""

import os
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from smartfrz import zoo
from smartfrz.adapters.torch.cache.options import PrefixCache
from smartfrz.adapters.torch.cache.prefix import CachedPrefix
from smartfrz.adapters.torch.compiling import CompileWatch, EagerHold
from smartfrz.adapters.torch.costs import CostProfiler
from smartfrz.adapters.torch.distributed import RANK_TIMEOUT, TrainingProcesses, processes_of, reshard
from smartfrz.adapters.torch.freezing import TorchAdapter
from smartfrz.adapters.torch.layers import Layer, LayerTracer
from smartfrz.adapters.torch.optimizer_steps import OptimizerSteps
from smartfrz.adapters.torch.report import Report
from smartfrz.adapters.torch.sharding import GradientWatch
from smartfrz.control.controller import FreezeController, require_version, schedule, stages_apart
from smartfrz.control.decision import FreezeDecision
from smartfrz.control.learned import AsksPredictor, policy_of
from smartfrz.control.ordering import FreezeOrder
from smartfrz.control.policy import Policy
from smartfrz.errors import StateError, UsageError
from smartfrz.predictor.runtime import Device


class SmartFRZ:
    """Freezes layers of a model while it is trained, when the predictor says that they have converged.

    Args:
        model: The model, wrapped (DistributedDataParallel, `torch.compile`) or not. Its first forward
            pass in training mode shows which layers it has, and in which order they run; that pass
            is not compiled.
        optimizer: The optimizer, or several, of the model's parameters.
        predictor: A name of the zoo, the path or address of an ONNX file, the address of a predictor on a
            server (`http://host:port/NAME`), a loaded `Predictor`, or another policy,
            such as those of `smartfrz.baselines`.
        total_steps: Optimizer steps of the whole run, `len(loader) * epochs`. Gives `record_every`.
        record_every: Steps between two records of the weights.
        decide_every: Records between two freezing stages. Defaults to the policy's own, 2 for predictors.
        threshold: Confidence from which a layer is frozen. Defaults to the predictor's own.
        patience: Freezing stages in a row at which a layer must be confident. Defaults to the policy's
            own, 2 for predictors; the thresholds of the zoo are calibrated for that.
        dry_run: Decide, log and report, but freeze nothing.
        seed: The run seed of the sampled positions.
        device: Where ONNX Runtime runs: `"cpu"`, `"cuda"`, or `"auto"`.
        norm_batches: Batches before a freezing stage over which the statistics of a frozen batch
            norm are averaged. 0 keeps its running statistics as they are.
        freeze_order: `"free"`: wherever the predictor is confident, as in the paper. `"prefix"`:
            front to back only. `"cost_aware"`: layers whose freezing would save much time now are
            frozen at a lower confidence, others at a higher one; the second to fourth training
            step measure each layer's time for that, and take about twice as long. Defaults to the
            policy's own, `"free"` for predictors.
        thaw_on_restart: Thaw every layer when the learning rate is raised to more than twice its
            lowest value since layers froze, as in warm restarts.
        rank_timeout: Where several processes train together (`torch.distributed`): seconds to wait
            for one that does not come to a freezing stage.
        cache: Keeps what a frozen prefix computes, so that it need not run again for the same
            samples.

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
        predictor: str | os.PathLike[str] | AsksPredictor | Policy = zoo.DEFAULT,
        *,
        total_steps: int | None = None,
        record_every: int | None = None,
        decide_every: int | None = None,
        threshold: float | None = None,
        patience: int | None = None,
        dry_run: bool = False,
        seed: int = 0,
        device: Device = "auto",
        norm_batches: int = 24,
        freeze_order: FreezeOrder | None = None,
        thaw_on_restart: bool = False,
        rank_timeout: float = RANK_TIMEOUT,
        cache: PrefixCache | None = None,
    ):
        self.predictor = zoo.load(predictor, device=device)
        # complain now, not after the first batch
        self._policy = policy_of(self.predictor)
        schedule(self._policy, total_steps, record_every, decide_every, threshold, patience, freeze_order)
        if norm_batches < 0:
            raise ValueError(f"`norm_batches` is {norm_batches}; expected 0 or more batches.")
        if not rank_timeout > 0:
            raise ValueError(f"`rank_timeout` is {rank_timeout!r}; expected a positive number of seconds.")
        if cache is not None and isinstance(model, nn.DataParallel):
            raise ValueError(
                "SmartFRZ received `cache` and a model in nn.DataParallel, whose copies run at once; expected one copy in "
                "each process. Use DistributedDataParallel."
            )
        self._given = weakref.ref(model)
        self._model = model = _unwrapped(model)
        reshard(model)
        self._rank_timeout = rank_timeout
        self._processes: TrainingProcesses | None = None
        self._optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._steps: OptimizerSteps | None = None
        if self._policy.scales_learning_rates or self._policy.reads_gradients:
            self._steps = OptimizerSteps(
                self._optimizers,
                before_step=self._before_optimizer_step if self._policy.scales_learning_rates else None,
                accumulate=self._policy.reads_gradients,
            )
        self._options: dict[str, Any] = {
            "total_steps": total_steps,
            "record_every": record_every,
            "decide_every": decide_every,
            "threshold": threshold,
            "patience": patience,
            "dry_run": dry_run,
            "seed": seed,
            "freeze_order": freeze_order,
            "thaw_on_restart": thaw_on_restart,
        }
        self._norm_batches = norm_batches
        self._compiling = CompileWatch()
        self._eager = EagerHold()
        self._cache: CachedPrefix | None = None
        if cache is not None:
            self._cache = CachedPrefix(cache, model)
        self._tracer: LayerTracer | None = None
        self._profiler: CostProfiler | None = None
        self._gradient_hook: GradientWatch | None = None
        self._watch()

    def _watch(self) -> None:
        """Begin anew: learn the layers from the next forward pass."""
        self._adapter: TorchAdapter | None = None
        self._controller: FreezeController | None = None
        self._all_layers: list[Layer] = []
        self._started: float | None = None
        self._seconds = 0.0
        self._eager.acquire()
        self._tracer = LayerTracer(self._model, on_done=self._eager.release)
        self._saw_gradient = any(is_lazy(p) for p in self._model.parameters())  # which take no hook yet
        trainable = tuple(p for p in self._model.parameters() if p.requires_grad and not is_lazy(p))
        if trainable:
            self._gradient_hook = GradientWatch(trainable, self._on_gradient)

    def _on_gradient(self, gradient: torch.Tensor) -> None:
        self._saw_gradient = True

    def _before_optimizer_step(self) -> None:
        """Before the first one: it shall have learning rates of single layers, too."""
        if self._controller is None and self._tracer is not None and self._tracer.done and self._saw_gradient:
            self._start()

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
        self._finish_profile(controller)
        if self._compiling.compiled and controller.freeze_every == 1:
            controller.freeze_every = stages_apart(
                self._policy, self._options["total_steps"], controller.record_every, controller.decide_every
            )
        if self._cache is not None:
            controller.prefix_is_cached = not self._cache.off
            self._no_cache_where_compiled(self._cache)
        decisions = controller.step()
        if self._cache is not None and controller.total_steps:
            self._cache.note_progress(controller.num_steps / controller.total_steps)
        if self._steps is not None:
            controller.decision_seconds += self._steps.seconds
            self._steps.seconds = 0.0
        if controller.thaw_on_restart:
            rates = [float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups]
            decisions = decisions + controller.observe_learning_rates(rates)
        if any(decision.action in ("freeze", "thaw") for decision in decisions):
            self._frozen_set_changed()
        self._snapshot_before_stage(controller)
        self._seconds = time.perf_counter() - self._started
        return decisions

    def thaw(self, layers: Sequence[str] | None = None) -> list[FreezeDecision]:
        """Train frozen layers again, with a clean optimizer state; they may freeze again later.

        Call it between `optimizer.step()` and the next backward pass; on every process, where
        several train together.

        Args:
            layers: Names among `frozen_layers`; all of them by default. Layers that you froze
                yourself stay frozen.

        Returns:
            One decision for each layer that was thawed.

        Raises:
            ValueError: If a name is that of no layer, or of one that you froze yourself.
        """
        if self._controller is None:
            return []
        decisions = self._controller.thaw(layers)
        if decisions and not self._controller.dry_run:
            self._frozen_set_changed()
        return decisions

    def batch(self, ids: Any) -> AbstractContextManager[None]:
        """While it lasts, forward passes of the model are of these samples: `with freezer.batch(ids): ...`.

        A cache knows samples by the content of the model's inputs. With ids it also notices at once,
        and says, when a sample is another one than at the last epoch. Use it for every batch or for
        none: forward passes outside of it then run as if there were no cache, as those in eval mode
        always do. Without a cache it does nothing.

        Args:
            ids: An integer for each sample of the batch, the same one at every epoch: a sequence, an
                array or a tensor `[batch]`. `PrefixCache.indexed` yields them.

        Raises:
            TypeError: If `ids` are not integers.
            ValueError: In the forward pass, if the batch is not of as many samples.
        """
        if self._cache is None:
            return nullcontext()
        self._no_cache_where_compiled(self._cache)
        return self._cache.batch(ids)

    def _no_cache_where_compiled(self, cache: CachedPrefix) -> None:
        # A compiled model would be compiled anew at every batch.
        if cache.active and not cache.off and self._compiling.compiled:
            cache.switch_off("torch.compile is in use in this process, and the cache cannot cut a compiled model")

    def _frozen_set_changed(self) -> None:
        self._compiling.frozen_set_changed()
        self._look_for_a_cut()

    def _look_for_a_cut(self) -> None:
        # The first passes of a run are watched, module by module, by others.
        if self._cache is not None and self._controller is not None and self._profiler is None:
            if self._reentrant:
                self._cache.switch_off(
                    "gradients pass through the frozen prefix under reentrant gradient checkpointing"
                )
            flops = {layer.name: layer.forward_flops for layer in self._all_layers}
            self._cache.frozen_set_changed(flops, getattr(self._model, "entry", self._model))
            self._no_cache_where_compiled(self._cache)

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
        reshard(self._model)
        controller, adapter = self._control(self._tracer.layers(), self._tracer.reentrant)
        if self._norm_batches:
            adapter.snapshot_statistics()  # for a first stage that comes before the next snapshot
        return controller

    def _control(
        self, layers: list[Layer], reentrant: bool, state: dict[str, Any] | None = None
    ) -> tuple[FreezeController, TorchAdapter]:
        """Take control of these layers, as the controller's saved state says; if it is refused, nothing changes."""
        reshard(self._model)
        if self._processes is None:
            wrappers = (self._given(), self._tracer.wrapper if self._tracer else None)
            self._processes = processes_of(self._model, self._rank_timeout, wrappers)
        adapter = TorchAdapter(
            self._model,
            self._optimizers,
            layers,
            processes=self._processes,
            reentrant=reentrant,
            previous=self._adapter if state else None,
            steps=self._steps,
        )
        # GradScaler refuses to step an optimizer none of whose parameters has a gradient.
        keep_one_of = adapter.layers_of_each_optimizer()
        controller = FreezeController(
            adapter, self.predictor, keep_one_of=keep_one_of, ranks=self._processes, **self._options
        )
        if state is not None:
            controller.check_state(state)
            if self._adapter is not None:
                self._adapter.unfreeze(self.frozen_layers)
            if self._steps is not None:
                self._steps.clear()
            controller.load_state_dict(state)
        controller.set_lr_scales()
        self._all_layers, self._adapter, self._controller = layers, adapter, controller
        self._reentrant = reentrant
        self._stop_watching()
        if controller.freeze_order == "cost_aware" and not controller.costs:
            self._eager.acquire()
            self._profiler = CostProfiler(self._model, self._all_layers, repeats=1, passes=3)
        self._look_for_a_cut()  # of what the user has frozen, or a loaded state
        return controller, adapter

    def _finish_profile(self, controller: FreezeController) -> None:
        if self._profiler is not None and self._profiler.done:
            controller.costs = self._profiler.costs()
            self._profiler.close()
            self._profiler = None
            self._eager.release()
            self._look_for_a_cut()

    def close(self) -> None:
        """Remove the hooks of model and optimizer, and let go of the cache. Frozen layers stay frozen."""
        self._stop_watching()
        if self._steps is not None:
            self._steps.close()
        if self._cache is not None:
            self._cache.close()

    def _stop_watching(self) -> None:
        self._eager.release()
        if self._profiler is not None:
            self._profiler.close()
            self._profiler = None
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
            return Report(cache=None if self._cache is None else self._cache.use)
        num_compilations, compile_seconds = self._compiling.total
        num_again, seconds_again = self._compiling.because_of_freezing
        return Report.of(
            controller,
            self._all_layers,
            self.layers,
            self._seconds,
            reentrant=self._reentrant,
            num_compilations=num_compilations,
            compile_seconds=compile_seconds,
            num_recompilations=num_again,
            recompile_seconds=seconds_again,
            cache=None if self._cache is None else self._cache.use,
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
            "gradients": self._adapter.gradient_state(),
            "reentrant": self._reentrant,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run: load the model and the optimizer first, then this.

        What the saved run had frozen is frozen again at once.

        Raises:
            StateError: If the state is of another model, predictor or version. Nothing is changed then.
        """
        if "started" not in state:
            raise StateError(
                f"SmartFRZ.load_state_dict received a dict with keys {sorted(map(str, state))[:5]}; expected what "
                "SmartFRZ.state_dict() returned. Save and load that."
            )
        if not state["started"]:
            if self._adapter is not None:
                self._adapter.unfreeze(self.frozen_layers)
                if self._steps is not None:
                    self._steps.clear()
                self._stop_watching()
                self._watch()
            return
        require_version(state["controller"])
        controller_state = dict(state["controller"])
        controller_state["history"] = {k: np.asarray(v) for k, v in controller_state["history"].items()}
        layers = [Layer.from_dict(layer) for layer in state["layers"]]
        _, adapter = self._control(layers, state["reentrant"], controller_state)
        adapter.load_norm_state(state["norms"])
        adapter.load_gradient_state(state.get("gradients", {}))  # states of earlier versions have none
        self._seconds = state["seconds"]
        self._started = time.perf_counter() - self._seconds


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside of DistributedDataParallel and `torch.compile`."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
