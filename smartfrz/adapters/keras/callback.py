"""`SmartFRZ`: layer freezing as a callback of `model.fit`."""

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import keras

from smartfrz import zoo
from smartfrz.adapters.base import Freezer, Log, Run, require_state
from smartfrz.adapters.keras.compiling import CompileClock
from smartfrz.adapters.keras.continuing import End, note_trained, warn_of_new_run
from smartfrz.adapters.keras.freezing import KerasAdapter, thaw_leftovers
from smartfrz.adapters.keras.layers import CallRecorder, Layer, group_layers, trace_graph
from smartfrz.adapters.keras.losses import LoggedLosses
from smartfrz.adapters.keras.neighbours import Board, Saving, come_first
from smartfrz.adapters.keras.parts import group_parts, list_own_optimizers
from smartfrz.adapters.state_file import read_state, write_state
from smartfrz.control.controller import FreezeController
from smartfrz.control.decision import FreezeDecision
from smartfrz.control.learned import AsksPredictor
from smartfrz.control.options import FreezeOptions
from smartfrz.control.ordering import FreezeOrder, LayerCost
from smartfrz.control.policy import Policy
from smartfrz.control.state import check_unchanged
from smartfrz.errors import StateError, UnsupportedModelError, UsageError
from smartfrz.predictor.runtime import Device, Providers


@keras.saving.register_keras_serializable(package="smartfrz")
class SmartFRZ(Freezer[KerasAdapter], keras.callbacks.Callback):  # type: ignore[misc]
    """Freezes layers of a model while `fit` trains it, when the predictor says that they have converged.

    With `total_steps` given, a `fit` of the same model goes on with the run of the one before it until that many
    steps are taken, as where `fit(epochs=1)` is called in a loop. Else each `fit` starts over, unless a state was
    loaded before, or `BackupAndRestore` is among the callbacks and continues an interrupted run. When training
    ends, everything that this callback froze can be trained again. With `TensorBoard` among the callbacks,
    confidences and a picture of the layers are written there; `smartfrz/frozen_layers` and
    `smartfrz/backward_saved` join the logs of every epoch.

    Args:
        predictor: A predictor or policy, as for `smartfrz.adapters.base.Freezer`. A policy may need neither gradients
            nor learning rates of single layers.
        recompile_steps: What it costs to make the training function again, in training steps. Nothing is
            frozen that saves less in the rest of the run. By default it is measured at the first
            step. 0: freeze whatever has converged.

    `device`, `providers` and `log` are those of `Freezer`. The other arguments are the fields of
    `smartfrz.control.options.FreezeOptions`. `total_steps` is by default what `fit` announces, steps times epochs. If
    `fit` does not know the number of steps, as with generators, pass `total_steps` or `record_every`.

    Raises:
        ValueError: If an argument is out of range; and the errors of `Freezer`.

    Example:
        >>> freezer = SmartFRZ("smartfrz-base")  # doctest: +SKIP
        >>> model.fit(x, y, epochs=10, callbacks=[freezer])  # doctest: +SKIP
        >>> print(freezer.report())  # doctest: +SKIP
    """

    def __init__(
        self,
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
        recompile_steps: float | None = None,
        log: Log | None = None,
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
        if recompile_steps is not None and (
            not isinstance(recompile_steps, (int, float)) or not recompile_steps >= 0.0
        ):
            raise ValueError(
                f"`recompile_steps` is {recompile_steps!r}; expected 0 or more steps, or None to measure it."
            )
        self._begin(predictor, device, providers, options, recompile_steps, log)
        # Complain now, not when training begins. The length of the run may show only then.
        replace(options, total_steps=total_steps or 1).schedule(self._policy)

    def _begin(
        self,
        predictor: str | os.PathLike[str] | AsksPredictor | Policy,
        device: Device,
        providers: Providers | None,
        options: FreezeOptions,
        recompile_steps: float | None,
        log: Log | None = None,
    ) -> None:
        """Set the attributes of a callback that has seen no training."""
        keras.callbacks.Callback.__init__(self)
        Freezer.__init__(self, predictor, device, providers, options, log)
        self._origin = {"predictor": _name_of(predictor), "device": device, "providers": providers}
        self._recompile_steps = recompile_steps
        self._pending: dict[str, Any] | None = None
        self._end: End | None = None
        self._training = False
        self._recorder: CallRecorder | None = None
        self._uncompiled = False
        self._saving: Saving | None = None
        self._board: Board | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle of the callback holds: the options, and a state that the next `fit` continues.

        Keras Tuner copies the callbacks for each trial. A copy has no model and no run.
        """
        return {
            "predictor": self.predictor,
            "origin": self._origin,
            "options": self.options,
            "recompile_steps": self._recompile_steps,
            "log": self._log,
            "pending": self._pending,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the callback that `__getstate__` described."""
        self._begin(state["predictor"], "auto", None, state["options"], state["recompile_steps"], state["log"])
        self._origin = state["origin"]
        self._pending = state["pending"]

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of this callback as plain data, without a run, for `from_config` and `keras.saving`.

        Raises:
            UsageError: If the predictor is a policy, which has no name.
        """
        if self._origin["predictor"] is None:
            raise UsageError(
                "The config of SmartFRZ holds the name, path or address of a predictor, but the callback was made with a "
                f"{type(self.predictor).__name__}; expected a predictor of the zoo, a file or a server. Make this callback "
                "in code, without a config."
            )
        return self._origin | asdict(self.options) | {"recompile_steps": self._recompile_steps}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SmartFRZ":
        """Make the callback that `get_config` described."""
        return cls(**config)

    def _reset(self) -> None:
        super()._reset()
        self._iterations = 0  # batches that the optimizer has seen, including batches before this run
        self._begun = False
        self._given_up = False
        self._stepping: Any = None  # the optimizer whose steps count
        self._candidates: list[tuple[Any, int]] = []
        self._compiling = CompileClock()
        self._losses: LoggedLosses | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Undo what an interrupted run left behind, and get to know the other callbacks."""
        model = self._model
        if not isinstance(model, keras.Model):
            raise UnsupportedModelError(
                f"SmartFRZ was given a {type(model).__name__} by fit(); expected a keras.Model that is not wrapped, "
                "trained by one process."
            )
        self._stop_watching()
        self._let_go()
        thaw_leftovers(model)
        self._reset()
        self._run_options = self._options_of_fit()
        neighbours = come_first(self)
        if sum(isinstance(callback, SmartFRZ) for callback in neighbours) > 1:
            raise UsageError(
                "fit() was given several SmartFRZ callbacks; expected one: each would undo what others froze."
            )
        self._training = True
        self._losses = LoggedLosses(model) if self.reads_loss else None
        self._saving = Saving(neighbours, self.thawed, self.save, self._read_iterations)
        self._board = Board(neighbours)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Learn the layers at the first epoch, if they can be known yet, and freeze what a saved state says.

        This cannot happen when training begins: `BackupAndRestore` loads its weights then, perhaps after this call.
        """
        if self._losses is not None:
            self._losses.begin_epoch()
        if self._begun or not self._training:
            return
        self._begun = True
        self._iterations = self._read_iterations()
        self._candidates = [(o, self._read_iterations(o)) for o in list_own_optimizers(self._model)]
        state = self._saved_state()
        self._compiling.note_new_function(self._compiles)
        run = trace_graph(self._model)
        if state is not None:
            layers = [Layer.from_dict(x) for x in state["layers"]] if run is None else group_layers(self._model, run)
            self._restore(state, layers)
        elif run is not None:
            self._control(group_layers(self._model, run))
        else:
            self._learn_order()

    def _saved_state(self) -> dict[str, Any] | None:
        """Return the state that this run continues: one that was loaded, or one next to a backup."""
        state, self._pending = self._pending, None
        end, self._end = self._end, None
        backup = self._saving.find_state(self._iterations) if self._saving else None
        if state is None and backup is not None:
            state = read_state(backup)
            _require(state)
        if state is None and end is not None and end.describes(self._model, self._iterations):
            self._compiling, self._given_up = end.compiling, end.given_up
            return end.state
        if state is None:
            warn_of_new_run(self._model, self._iterations, self.options.total_steps)
        return state if state is not None and state["started"] else None

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Note the time, and keep frozen what another callback has made trainable again."""
        if self._training and self._run is not None:
            self._run.adapter.hold()
        self._compiling.call_begins()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Record, decide and freeze if it is time to."""
        if not self._training:
            raise UsageError("SmartFRZ was called outside of fit(). Pass it to fit(callbacks=[...]).")
        self._compiling.call_ended()
        self._clock.start()
        if self._losses is not None:
            self._losses.note(logs)
        if self._recorder is not None:
            recorder = self._recorder
            self._stop_watching()
            self._control(group_layers(self._model, recorder.run()))
        if self._run is None:
            return
        self._choose_optimizer()
        steps = self._count_steps(self._run.adapter)
        if self._losses is not None and self._run.controller.records_within(steps):
            self._pass_loss()
        for _ in range(steps):
            self._step(self._run)
        self._clock.read()

    def _pass_loss(self) -> None:
        """Tell the controller the mean loss of the batches since this was last called."""
        if self._losses is not None and self._run is not None:
            mean, batches = self._losses.take()
            if batches:
                self._run.controller.note_loss(mean, batches)

    def _choose_optimizer(self) -> None:
        """Count, from the first batch on, the steps of an optimizer that the model holds if the compiled one takes none.

        Of several the one with the fewest steps counts: the generator's, where the discriminator takes more.
        """
        candidates, self._candidates = self._candidates, []
        if not candidates or self._read_iterations() != self._iterations:
            return
        taken = [(self._read_iterations(optimizer) - start, start, optimizer) for optimizer, start in candidates]
        moved = [each for each in taken if each[0] > 0]
        if moved:
            _, self._iterations, self._stepping = min(moved, key=lambda each: each[0])

    def _count_steps(self, adapter: KerasAdapter) -> int:
        """Return how many optimizer steps were taken since the last call."""
        before = self._iterations
        # Where every batch is one iteration, counting them spares a wait for the device.
        self._iterations = self._read_iterations(self._optimizer) if self._must_ask else before + 1
        adapter.add_batches(self._iterations - before)
        return self._iterations // self._accumulation - before // self._accumulation

    def _step(self, run: Run[KerasAdapter]) -> None:
        """Act after one optimizer step."""
        if self._given_up:
            run.controller.skip_step()
            return
        self._check_frozen(run)
        if self._compiles:
            self._spare_compilations(run.controller)
        decisions = self._decide(run)
        if decisions and self._board is not None:
            self._board.stage(decisions, self.report())

    def _spare_compilations(self, controller: FreezeController) -> None:
        """Tell the controller, before its first freezing stage, what a change of the frozen set costs."""
        controller.note_compiled()
        if controller.is_before_first_stage:
            steps = self._recompile_steps
            if steps is None:
                steps = self._compiling.cost * int(self._model.steps_per_execution) / self._accumulation
            controller.set_change_cost(steps)

    def _check_frozen(self, run: Run[KerasAdapter]) -> None:
        """Stop freezing in a run that goes on training frozen layers."""
        moved = run.adapter.find_moved()
        if not moved:
            return
        switched_on = run.adapter.switched_on(moved)
        self._given_up = True
        self._react(run, run.controller.thaw(reason="moved_while_frozen"))
        names = f"{moved[0]!r}{f' and {len(moved) - 1} more layers' if len(moved) > 1 else ''}"
        if switched_on:
            why = (
                "a callback or train_step set `trainable` again after the batch had begun, when SmartFRZ had looked. "
                "Everything was thawed, and nothing is frozen any more in this run. Set `trainable` between epochs, "
                "and only of layers that are not in freezer.frozen_layers."
            )
        else:
            why = (
                f"train_step of {type(self._model).__name__} or a layer keeps variables of its own instead of "
                "model.trainable_variables. Everything was thawed, and nothing is frozen any more in this run. In "
                "train_step compute gradients of self.trainable_variables and apply them with self.optimizer."
            )
        warnings.warn(
            f"SmartFRZ froze {names}, but the step after that changed it all the same: {why}",
            stacklevel=2,
        )

    def _frozen_set_changed(self) -> None:
        self._compiling.note_new_function(self._compiles)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the scalars to the logs of the epoch, which every callback and the history see."""
        if self._training:
            self._pass_loss()
        if self._training and logs is not None:
            self.note_logs(logs)
            logs.update(self.scalars())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Leave the model as it was found: the next run would take frozen layers for layers that the user froze."""
        self._stop_watching()
        self._training = False
        iterations = self._read_iterations()
        note_trained(self._model, iterations)
        if self._run is not None:
            frozen = self._run.adapter.frozen_layers()
            self._run.adapter.unfreeze(frozen)
            self._end = self._note_end(self._run, frozen, iterations)
        if self._board is not None:
            self._board.close(self.report())
        if self._end is None:  # else the next call of fit goes on with this run
            self.say_report()
        self._let_go()

    def _note_end(self, run: Run[KerasAdapter], frozen: list[str], iterations: int) -> End | None:
        """Return what the next `fit` goes on with; None if the run is over."""
        total_steps = self.options.total_steps
        if total_steps is None or run.controller.num_steps >= total_steps:
            return None
        return End(
            run.adapter,
            self._model.optimizer,
            iterations,
            self._model.trainable_variables,
            run.adapter.read_pieces(frozen),
            self.state_dict(),
            self._compiling,
            self._given_up,
        )

    def _let_go(self) -> None:
        if self._saving is not None:
            self._saving.close()
        self._saving = self._board = None

    def thaw(self, layers: Sequence[str] | None = None) -> list[FreezeDecision]:  # noqa: D102
        return super().thaw(layers) if self._training else []

    @property
    def _optimizer(self) -> Any:
        return _innermost(self._stepping or self._model.optimizer)

    @property
    def _accumulation(self) -> int:
        return int(getattr(self._optimizer, "gradient_accumulation_steps", None) or 1)

    @property
    def _must_ask(self) -> bool:
        """True if only the optimizer knows how many steps it took since the last call.

        Several batches may have passed, and not every batch is a step. With a loss scale, a step is skipped
        when gradients overflow.
        """
        several = int(self._model.steps_per_execution) > 1 or self._accumulation > 1
        return several or self._optimizer is not (self._stepping or self._model.optimizer)

    @property
    def _compiles(self) -> bool:
        """True if a change of the frozen set makes Keras trace or compile a function again."""
        model = self._model
        return not model.run_eagerly and (keras.backend.backend() == "tensorflow" or bool(model.jit_compile))

    def _learning_rates(self) -> list[float]:
        if keras.backend.backend() == "jax":
            self._model.jax_state_sync()
        own = [o for o in list_own_optimizers(self._model) if o is not self._stepping]
        return [self._learning_rate(o, self._read_iterations(o)) for o in own] + [
            self._learning_rate(self._optimizer, self._iterations)
        ]

    def _learning_rate(self, optimizer: Any, iterations: int) -> float:
        rate = _innermost(optimizer)._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            return float(keras.ops.convert_to_numpy(rate(iterations // self._accumulation)))
        return float(keras.ops.convert_to_numpy(rate.value))

    def _read_iterations(self, optimizer: Any = None) -> int:
        """Return how many batches an optimizer has seen, by default the one that the model was compiled with."""
        if keras.backend.backend() == "jax":
            self._model.jax_state_sync()
        optimizer = _innermost(optimizer or self._model.optimizer)
        return int(keras.ops.convert_to_numpy(optimizer._iterations.value))

    def _options_of_fit(self) -> FreezeOptions:
        """Return the options of this run: its length, and no more records than `fit` lets callbacks take."""
        options = self.options
        if options.total_steps is None:
            options = replace(options, total_steps=self._steps_of_fit())
        apart = -(-int(self._model.steps_per_execution) // self._accumulation)
        if options.record_every is None:
            every = options.schedule(self._policy).record_every
            return replace(options, record_every=max(every, apart))
        if options.record_every < apart:
            raise ValueError(
                f"`record_every` is {options.record_every}, but {apart} optimizer steps pass at a time "
                f"(steps_per_execution={self._model.steps_per_execution}); expected at least as many, since nothing can "
                "be recorded in between."
            )
        return options

    def _steps_of_fit(self) -> int | None:
        """Return the number of optimizer steps that `fit` announced; None if it does not know and need not."""
        params: dict[str, Any] = self.params or {}
        steps, epochs = params.get("steps"), params.get("epochs")
        if steps and epochs:
            return max(1, int(steps) * int(epochs) // self._accumulation)
        if self.options.record_every is not None:
            return None
        raise ValueError(
            f"SmartFRZ needs to know how long the run is, but fit() has steps={steps} and epochs={epochs}, as "
            "with a generator of unknown length. Pass total_steps= or record_every= to SmartFRZ, or "
            "steps_per_epoch= to fit()."
        )

    def _learn_order(self) -> None:
        """Learn the order of the layers from the first step."""
        model = self._model
        if keras.backend.backend() == "torch" and model.jit_compile:
            # torch.compile would trace the recorder as well. One step without it does no harm.
            self._uncompiled, model.jit_compile = True, False
        # TensorFlow and JAX run no Python where a function was traced before, in an earlier fit().
        model.make_train_function(force=True)
        self._recorder = CallRecorder(model).start()

    def _stop_watching(self) -> None:
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        if self._uncompiled:
            self._uncompiled, self._model.jit_compile = False, True
            self._model.make_train_function(force=True)

    def _control(self, layers: list[Layer], state: dict[str, Any] | None = None) -> Run[KerasAdapter]:
        """Take control of these layers, as a saved state says."""
        adapter = KerasAdapter(self._model, layers)
        controller = FreezeController(
            adapter, self.predictor, self._run_options, keep_one_of=lambda: group_parts(adapter.model, layers)
        )
        controller.set_costs({x.name: LayerCost(*(x.forward_flops,) * 3) for x in layers})
        if state is not None:
            adapter.check_norm_state(state["norms"])
            controller.load_state_dict(state["controller"])
        elif self.options.norm_batches:
            adapter.snapshot_statistics()  # for a first stage that comes before the next snapshot
        self._run = Run(layers, adapter, controller)
        return self._run

    def _restore(self, state: dict[str, Any], layers: list[Layer]) -> None:
        probe = KerasAdapter(self._model, layers)
        lost = [x for x in state["controller"]["layers"] if x in probe.all_layers() and x not in probe.layers()]
        if lost:
            raise StateError(
                f"The saved state says that {lost[:3]} were trained or frozen by SmartFRZ, but in this model "
                "trainable is False. A model that is saved while layers are frozen also loses its momenta: save it "
                "inside of `with freezer.thawed():`, or after fit()."
            )
        self._control(layers, state).adapter.load_norm_state(state["norms"])
        self._clock.resume(state["seconds"])

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Make the model look unfrozen inside of the block, so that another callback can save it during training.

        A model that is saved while layers are frozen is loaded with an optimizer for the others
        only, which Keras then leaves without momenta and iterations. Train nothing in the block.
        """
        adapter = self.adapter
        frozen = adapter.frozen_layers() if adapter is not None else []
        if adapter is None or not frozen:
            yield
            return
        adapter.sync()
        adapter.shown_unfrozen = True
        adapter.set_flags(frozen, True)
        try:
            yield
        finally:
            adapter.set_flags(frozen, False)
            adapter.shown_unfrozen = False

    def _report_facts(self) -> dict[str, Any]:
        return {"per_example": True, "compiler": "Keras"} | self._compiling.facts()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        self._pass_loss()
        return copy.deepcopy(super().state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next `fit` continue a saved run. Load the model with its optimizer as well.

        Pass `initial_epoch=` to `fit`. What the saved run had frozen is frozen when training begins. Options that were
        passed to this SmartFRZ count, also where the saved run had others, and the differences are logged; options
        left out go on as they were saved.

        Raises:
            StateError: If the state was not made by `state_dict`, or by another version. Whether it
                belongs to the model and predictor shows when training begins.
            UsageError: During training.
        """
        _require(state)
        if self._training:
            raise UsageError("SmartFRZ.load_state_dict was called during training. Call it before fit().")
        self._pending = copy.deepcopy(state) if state["started"] else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict()` to a file of NumPy's `.npz` format, without pickle."""
        write_state(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load what `save` wrote, as `load_state_dict` does.

        Raises:
            StateError: If the file is of another kind, or damaged.
        """
        self.load_state_dict(read_state(path))


def _require(state: Any) -> None:
    require_state(state, Layer)
    if state["started"]:
        check_unchanged(state)


def _name_of(predictor: Any) -> str | None:
    """Return the text that names a predictor: as it was given, or its path or address. None for another policy."""
    if isinstance(predictor, (str, os.PathLike)):
        return os.fspath(predictor)
    place = getattr(predictor, "path", getattr(predictor, "url", None))
    return None if place is None else os.fspath(place)


def _innermost(optimizer: Any) -> Any:
    """Return the optimizer inside of one that scales the loss."""
    while getattr(optimizer, "inner_optimizer", None) is not None:
        optimizer = optimizer.inner_optimizer
    return optimizer
