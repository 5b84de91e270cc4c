"""`SmartFRZ`: layer freezing for a plain PyTorch training loop."""

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from smartfrz import zoo
from smartfrz.adapters.base import Freezer, Log, Run
from smartfrz.adapters.torch.cache.options import PrefixCache
from smartfrz.adapters.torch.cache.prefix import CachedPrefix
from smartfrz.adapters.torch.compiling import CompileWatch, EagerHold
from smartfrz.adapters.torch.costs import CostProfiler
from smartfrz.adapters.torch.distributed import RANK_TIMEOUT, TrainingProcesses, processes_of, reshard
from smartfrz.adapters.torch.freezing import TorchAdapter, take_back
from smartfrz.adapters.torch.layers import Layer, LayerTracer, list_uncounted
from smartfrz.adapters.torch.losses import check_loss, plain_loss
from smartfrz.adapters.torch.optimizer_steps import OptimizerSteps
from smartfrz.adapters.torch.saved import check_saved, seal, to_tensors
from smartfrz.adapters.torch.sharding import GradientWatch
from smartfrz.adapters.torch.updates import Rounds, UpdateWatch, list_optimizers, unwrap
from smartfrz.adapters.torch.watching import Samples, StepGuard, owned_by, sample_of_foreign
from smartfrz.control.controller import FreezeController
from smartfrz.control.decision import FreezeDecision
from smartfrz.control.learned import AsksPredictor
from smartfrz.control.options import FreezeOptions
from smartfrz.control.ordering import FreezeOrder
from smartfrz.control.policy import Policy
from smartfrz.control.state import check_unchanged
from smartfrz.errors import StateError, UnsupportedModelError, UsageError
from smartfrz.predictor.runtime import Device, Providers

logger = logging.getLogger("smartfrz")
_UNTRACED_STEPS = 10


class SmartFRZ(Freezer[TorchAdapter]):
    """Freezes layers of a model while it is trained, when the predictor says that they have converged.

    Args:
        model: The model, wrapped (DistributedDataParallel, `torch.compile`) or not. The forward passes in training mode
            before the first optimizer step, of the model or of parts of it, show which layers it has, in which order they
            run, and what they cost. These passes are not compiled.
        optimizer: The optimizer of the model's parameters, or several.
        predictor: A predictor or policy, as for `smartfrz.adapters.base.Freezer`.
        rank_timeout: Where several processes train together (`torch.distributed`): seconds to wait
            for a process that does not come to a freezing stage.
        cache: Keeps the outputs of the frozen prefix, so that it need not run again for the same samples.
        auto_step: Whether the optimizer calls `step` itself, after each of its steps; a training loop then needs no
            other line. With several optimizers, a step counts when each of them has taken one.

    `device`, `providers` and `log` are those of `Freezer`. The other arguments are the fields of
    `smartfrz.control.options.FreezeOptions`. Pass `total_steps` or `record_every`.

    Raises:
        ValueError: If an argument is out of range; and the errors of `Freezer`.

    Example:
        >>> freezer = SmartFRZ(model, optimizer, total_steps=len(loader) * epochs)  # doctest: +SKIP
        >>> for inputs, targets in loader:  # doctest: +SKIP
        ...     loss = criterion(model(inputs), targets)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     freezer.step(loss)
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
        quality: str | None = None,
        patience: int | None = None,
        dry_run: bool = False,
        seed: int = 0,
        device: Device = "auto",
        providers: Providers | None = None,
        norm_batches: int = 24,
        freeze_order: FreezeOrder | None = None,
        thaw_on_restart: bool = False,
        verbose: bool = True,
        rank_timeout: float = RANK_TIMEOUT,
        cache: PrefixCache | None = None,
        log: Log | None = None,
        auto_step: bool = False,
    ):
        options = FreezeOptions(
            total_steps=total_steps,
            record_every=record_every,
            decide_every=decide_every,
            threshold=threshold,
            quality=quality,
            patience=patience,
            dry_run=dry_run,
            seed=seed,
            norm_batches=norm_batches,
            freeze_order=freeze_order,
            thaw_on_restart=thaw_on_restart,
            verbose=verbose,
        )
        if not isinstance(rank_timeout, (int, float)) or not rank_timeout > 0:
            raise ValueError(f"`rank_timeout` is {rank_timeout!r}; expected a positive number of seconds.")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` is {'None' if model is None else f'of type {type(model).__name__}'}; expected the torch.nn.Module "
                "that is trained. Pass the model itself: SmartFRZ(model, optimizer, ...)."
            )
        if cache is not None and not isinstance(cache, PrefixCache):
            raise TypeError(f"`cache` is {cache!r}; expected a PrefixCache, or None. Pass cache=PrefixCache().")
        self._optimizers = list_optimizers(optimizer)
        super().__init__(predictor, device, providers, options, log)
        options.schedule(self._policy)  # complain now, not after the first batch
        _refuse_keras(model)
        self._given = weakref.ref(model)
        self._rank_timeout = rank_timeout
        self._processes: TrainingProcesses | None = None
        self._model = _unwrapped(model)
        reshard(self._model)
        take_back(self._model)
        self._foreign = sample_of_foreign(self._model, self._optimizers)
        self._cache = None if cache is None else _cached(cache, model, self._model)
        self._find_entry: Callable[[], nn.Module | None] | None = None
        self._steps = self._optimizer_steps()
        # Now, since hooks cannot be added while the optimizer calls its hooks, as `auto_step` has it do.
        self._guard = StepGuard(self._model, self._optimizers)
        # After the hooks of `_steps`: layers freeze when the optimizer's own parameter groups are back.
        self._rounds = Rounds(self._optimizers, self._on_round) if auto_step else None
        self._latest: list[FreezeDecision] = []
        self._untraced = 0
        self._updates: UpdateWatch | None = None
        self._compiling = CompileWatch()
        self._eager = EagerHold()
        self._profiler: CostProfiler | None = None
        self._learn_layers()

    def _optimizer_steps(self) -> OptimizerSteps | None:
        policy = self._policy
        if not (policy.scales_learning_rates or policy.reads_gradients or policy.compares_gradients):
            return None
        return OptimizerSteps(
            self._optimizers,
            before_step=self._before_optimizer_step if policy.scales_learning_rates else None,
            accumulate=policy.reads_gradients,
            compare=policy.compares_gradients,
        )

    def _learn_layers(self) -> None:
        """Watch the forward passes of the next step, to learn the layers."""
        self._reset()
        self._reentrant = False
        self._eager.acquire()
        tracer = LayerTracer(self._model, one_call=False, on_done=self._eager.release)
        self._tracer: LayerTracer | None = tracer
        self._step_hooks = [
            optimizer.register_step_pre_hook(lambda *_: tracer.end_step())
            for optimizer in map(unwrap, self._optimizers)
            # Where the policy scales learning rates, the run starts before the first step already.
            if hasattr(optimizer, "register_step_pre_hook") and not self._policy.scales_learning_rates
        ]
        self._saw_gradient = any(is_lazy(p) for p in self._model.parameters())  # which take no hook yet
        self._gradient_hook: GradientWatch | None = None
        trainable = tuple(p for p in self._model.parameters() if p.requires_grad and not is_lazy(p))
        if trainable:
            # Weakly, since the garbage collector does not see what an autograd graph's hooks hold.
            told = weakref.WeakMethod(self._on_gradient)
            self._gradient_hook = GradientWatch(trainable, lambda gradient: _call(told))

    def _on_gradient(self) -> None:
        self._saw_gradient = True

    def _before_optimizer_step(self) -> None:
        """Start before the first optimizer step, so that it, too, scales the learning rates of layers."""
        if self._run is None and self._tracer is not None and self._tracer.done and self._saw_gradient:
            self._start()

    def step(self, loss: float | torch.Tensor | None = None) -> list[FreezeDecision]:
        """Record, decide and freeze if it is time to. Call it once after each `optimizer.step()`.

        With `auto_step` the optimizer has done all this already, and calling it only passes a loss, which then counts for
        the next step.

        Args:
            loss: The training loss of this step, for predictors that read how it falls (`reads_loss`); others ignore it. A
                float, or a tensor of one number, of which the graph is not kept and which is not waited for on a GPU.
                Only ratios count: the loss of one of several accumulated batches will do, but not one that a gradient
                scaler has scaled. None, NaN, infinity and zero mean that it is not known. Where some are below zero,
                none is used.

        Returns:
            The decisions of this step; empty if it was not a freezing stage.

        Raises:
            UsageError: If the model has not run forward and backward in training mode yet.
            UnsupportedModelError: If the model has no layers to freeze.
            TypeError: If `loss` is something else, such as a tensor with a loss for each sample.
        """
        check_loss(loss)
        if self._rounds is not None:
            if self._run is not None:
                self._note_loss(self._run.controller, loss)
            decisions, self._latest = self._latest, []
            return decisions
        if self._updates is not None:
            self._updates.note_call()
        decisions = self._after_update(loss)
        if self._updates is None:
            self._updates = UpdateWatch(self._model.parameters())
        return decisions

    def _on_round(self) -> None:
        """Act after the optimizers have stepped, if `auto_step` is set."""
        if self._run is None and self._missing_pass():
            # A scheduler's warning is avoided by a step before the first batch, for example.
            self._untraced += 1
            if self._untraced == _UNTRACED_STEPS:
                logger.warning(
                    "SmartFRZ: the optimizer took %d steps, but the model had no %s since SmartFRZ was made. Nothing is "
                    "frozen until it has one. Pass the model that is trained to SmartFRZ.",
                    _UNTRACED_STEPS,
                    self._missing_pass(),
                )
            return
        self._latest = self._after_update()

    def _note_loss(self, controller: FreezeController, loss: float | torch.Tensor | None) -> None:
        if self.reads_loss and loss is not None:
            controller.note_loss(plain_loss(loss))

    def _after_update(self, loss: float | torch.Tensor | None = None) -> list[FreezeDecision]:
        run = self._run or self._start()
        controller = run.controller
        self._clock.start()
        self._finish_profile(controller)
        if self._compiling.compiled:
            controller.note_compiled()
        if self._cache is not None:
            controller.set_prefix_cached(not self._cache.off)
            self._no_cache_where_compiled(self._cache)
            self._cache.note_step()
            if controller.total_steps:
                self._cache.note_progress((controller.num_steps + 1) / controller.total_steps)
        if self._processes is not None and controller.looks_next:
            # On every process. After an evaluation, some modules show parameters that are not the ones that are trained.
            reshard(self._model)
        self._note_loss(controller, loss)
        decisions = self._decide(run)
        if len(run.adapter.all_layers()) != len(run.layers):
            self._run = replace(run, layers=run.adapter.descriptions())
        if self._steps is not None:
            controller.add_decision_seconds(self._steps.take_seconds())
        self._clock.read()
        return decisions

    @property
    def _is_first(self) -> bool:
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def _learning_rates(self) -> list[float]:
        return [float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups]

    def batch(self, ids: Any) -> AbstractContextManager[None]:
        """Name the samples of the forward passes inside of the block: `with freezer.batch(ids): ...`.

        Without ids a cache recognizes samples by the content of the model's inputs. With ids it also
        notices, and reports at once, when a sample differs from the last epoch. Use it for every batch or
        for none: forward passes outside of it then run without the cache, as forward passes in eval mode
        always do. Without a cache it does nothing.

        Args:
            ids: An integer for each sample of the batch, the same at every epoch: a sequence, an
                array or a tensor `[batch]`. `PrefixCache.indexed` yields them.

        Raises:
            TypeError: If `ids` are not integers.
            ValueError: In the forward pass, if the number of ids is not the number of samples.
        """
        if self._cache is None:
            return nullcontext()
        self._no_cache_where_compiled(self._cache)
        return self._cache.batch(ids)

    def _no_cache_where_compiled(self, cache: CachedPrefix) -> None:
        # A compiled model would be compiled again at every batch.
        if cache.active and not cache.off and self._compiling.compiled:
            cache.switch_off("torch.compile is in use in this process, and the cache cannot cut a compiled model")

    def _frozen_set_changed(self) -> None:
        self._compiling.frozen_set_changed()
        self._look_for_a_cut()

    def set_entry(self, find: Callable[[], nn.Module | None]) -> None:
        """Say where the cache finds the module that a training step calls, if that is not the model itself.

        Args:
            find: Called after layers froze or thawed. Returns the part of the model whose one call in the latest
                training step ran every layer; None if there is no such part, which switches the cache off.
        """
        self._find_entry = find

    def _look_for_a_cut(self) -> None:
        # Tracer and profiler watch the first passes of a run, module by module.
        if self._cache is None or self._run is None or self._profiler is not None:
            return
        if self._reentrant:
            self._cache.switch_off("gradients pass through the frozen prefix under reentrant gradient checkpointing")
        flops = {layer.name: layer.forward_flops for layer in self._run.layers}
        self._cache.frozen_set_changed(flops, self._find_entry() if self._find_entry else self._model)
        self._no_cache_where_compiled(self._cache)

    def _missing_pass(self) -> str:
        """Return what has not been seen of the model, so that its layers are unknown; "" if they can be known."""
        traced = self._tracer is not None and self._tracer.done
        if traced and self._saw_gradient:
            return ""
        return "backward pass" if traced else "forward pass in training mode"

    def _start(self) -> Run[TorchAdapter]:
        missing = self._missing_pass()
        if self._tracer is None or missing:
            raise UsageError(
                f"freezer.step() was called, but the model had no {missing} since SmartFRZ was made; expected one. Call "
                "freezer.step() after loss.backward() and optimizer.step(), and run the model that you passed to "
                "SmartFRZ."
            )
        reshard(self._model)
        _require_own_optimizer(self._model, self._optimizers, self._foreign)
        run = self._control(self._tracer.layers(), self._tracer.reentrant)
        if self.options.norm_batches:
            run.adapter.snapshot_statistics()  # for a first stage that comes before the next snapshot
        return run

    def _control(self, layers: list[Layer], reentrant: bool, state: dict[str, Any] | None = None) -> Run[TorchAdapter]:
        """Take control of these layers, as a saved state says; if it is refused, nothing changes."""
        adapter = self._adapter_of(layers, reentrant, previous=self.adapter if state else None)
        controller = FreezeController(
            adapter,
            self.predictor,
            self.options,
            # GradScaler refuses to step an optimizer none of whose parameters has a gradient.
            keep_one_of=adapter.keep_one_of,
            ranks=self._processes,
        )
        if state is not None:
            try:
                adapter.check_norm_state(state["norms"])
                adapter.check_gradient_state(state["gradients"], state["gradient_changes"])
                controller.check_state(state["controller"])
                check_unchanged(state)
            except StateError:
                adapter.forget_marks()  # and let go of the optimizers
                raise
            self._undo()
            controller.load_state_dict(state["controller"])
        controller.set_lr_scales()
        self._run, self._reentrant = Run(layers, adapter, controller), reentrant
        self._stop_watching()
        if controller.freeze_order == "cost_aware" and not controller.costs:
            self._eager.acquire()
            self._profiler = CostProfiler(self._model, layers, repeats=1, passes=3)
        self._look_for_a_cut()  # the user, or a loaded state, may have frozen a prefix
        return self._run

    def _adapter_of(self, layers: list[Layer], reentrant: bool, previous: TorchAdapter | None) -> TorchAdapter:
        reshard(self._model)
        if self._processes is None:
            wrappers = (self._given(), self._tracer.wrapper if self._tracer else None)
            self._processes = processes_of(self._model, self._rank_timeout, wrappers)
        return TorchAdapter(
            self._model,
            self._optimizers,
            layers,
            processes=self._processes,
            reentrant=reentrant,
            previous=previous,
            steps=self._steps,
            guard=self._guard,
        )

    def _undo(self) -> None:
        """Make what this run froze trainable again, and forget what it noted of the optimizer's steps."""
        if self._run is not None:
            self._run.adapter.unfreeze(self.frozen_layers)
        if self._steps is not None:
            self._steps.clear()

    def _finish_profile(self, controller: FreezeController) -> None:
        if self._profiler is not None:
            self._profiler.end_step()
        if self._profiler is not None and self._profiler.done:
            controller.set_costs(self._profiler.costs())
            self._profiler.close()
            self._profiler = None
            self._eager.release()
            self._look_for_a_cut()

    def close(self, *, unfreeze: bool = True) -> None:
        """Leave model and optimizer as they were found: remove the hooks, thaw every layer, let go of the cache.

        Args:
            unfreeze: Whether frozen layers are trainable again; `frozen_layers` and `report` list them in any case.
                With False they stay frozen, for a training that goes on without SmartFRZ.
        """
        self._stop_watching()
        if self._rounds is not None:
            self._rounds.close()
        if self._steps is not None:
            self._steps.close()
        if self._cache is not None:
            self._cache.close()
        if self._run is not None:
            if unfreeze:
                self._run.adapter.unfreeze(self.frozen_layers)
            self._run.adapter.forget_marks()
        self._guard.close()

    def _stop_watching(self) -> None:
        self._eager.release()
        if self._profiler is not None:
            self._profiler.close()
            self._profiler = None
        if self._tracer is not None:
            self._tracer.close()
            self._tracer = None
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []
        if self._gradient_hook is not None:
            self._gradient_hook.remove()
            self._gradient_hook = None

    def _report_facts(self) -> dict[str, Any]:
        num_compilations, compile_seconds = self._compiling.total
        num_again, seconds_again = self._compiling.because_of_freezing
        return {
            "reentrant": self._reentrant,
            "num_compilations": num_compilations,
            "compile_seconds": compile_seconds,
            "num_recompilations": num_again,
            "recompile_seconds": seconds_again,
            "uncounted": list_uncounted(self._model, self._run.adapter.descriptions()) if self._run else [],
            "cache": None if self._cache is None else self._cache.use,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to continue as an uninterrupted one.

        It holds plain data and tensors: `torch.load(..., weights_only=True)` reads it.
        """
        state = self._unsealed_state()
        if self._run is None:
            return state
        adapter = self._run.adapter
        state |= {"gradients": adapter.gradient_state(), "gradient_changes": adapter.gradient_change_state()}
        sealed: dict[str, Any] = to_tensors(seal(state | {"reentrant": self._reentrant}))
        return sealed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run. Load the model and the optimizer first, then this.

        What the saved run had frozen is frozen again at once. Options that were passed to this SmartFRZ count, also
        where the saved run had others, and the differences are logged; options left out go on as they were saved.

        Raises:
            StateError: If the state belongs to another model, predictor or version. Nothing is changed then.
        """
        saved = check_saved(state)
        if not saved["started"]:
            self._start_over()
            return
        layers = [Layer.from_dict(layer) for layer in saved["layers"]]
        run = self._control(layers, saved["reentrant"], saved)
        run.adapter.load_norm_state(to_tensors(saved["norms"]))
        run.adapter.load_gradient_state(to_tensors(saved["gradients"]))
        run.adapter.load_gradient_change_state(to_tensors(saved["gradient_changes"]))
        self._clock.resume(saved["seconds"])

    def _start_over(self) -> None:
        if self._run is not None:
            self._undo()
            self._stop_watching()
            self._learn_layers()


def _cached(cache: PrefixCache, given: nn.Module, model: nn.Module) -> CachedPrefix:
    if isinstance(given, nn.DataParallel):
        raise ValueError(
            "SmartFRZ received `cache` and a model in nn.DataParallel, whose copies run at once; expected one copy in "
            "each process. Use DistributedDataParallel."
        )
    return CachedPrefix(cache, model)


def _require_own_optimizer(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], samples: Samples | None
) -> None:
    """Refuse optimizers that hold no parameter of the model, unless the model moves: they may train copies of them."""
    parameters = list(model.parameters())
    owned = owned_by(optimizers)
    if owned & {id(p) for p in parameters} or samples is None or samples.moved({"": parameters}):
        return
    raise UsageError(
        f"SmartFRZ received {' and '.join(type(optimizer).__name__ for optimizer in optimizers)} with {len(owned)} "
        f"parameters, none of which is among the {len(parameters)} parameters of {type(model).__name__}; expected the "
        "optimizer that trains this model. Make the optimizer after the model, and pass that one."
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own module inside of DistributedDataParallel and `torch.compile`."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _call(method: "weakref.WeakMethod[Callable[[], None]]") -> None:
    alive = method()
    if alive is not None:
        alive()


def _refuse_keras(model: Any) -> None:
    """Refuse a Keras model, which is a PyTorch module, too, on that backend; but its layers are others."""
    if any(kind.__module__.partition(".")[0] == "keras" and kind.__name__ == "Layer" for kind in type(model).__mro__):
        raise UnsupportedModelError(
            f"smartfrz.adapters.torch.SmartFRZ received {type(model).__name__}, a Keras model; expected an nn.Module that "
            "is none. Train it with fit(), and pass it smartfrz.adapters.keras.SmartFRZ in `callbacks`."
        )
