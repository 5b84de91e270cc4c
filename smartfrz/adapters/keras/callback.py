"""`SmartFRZ`: layer freezing as a callback of `model.fit`."""

import copy
import json
import math
import os
import statistics
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from smartfrz import zoo
from smartfrz.adapters.keras.freezing import KerasAdapter, thaw_leftovers
from smartfrz.adapters.keras.layers import CallRecorder, Layer, group_layers, trace_graph
from smartfrz.adapters.keras.neighbours import Board, Saving, come_first
from smartfrz.control.controller import FreezeController, require_version, schedule, stages_apart
from smartfrz.control.decision import FreezeDecision
from smartfrz.control.learned import AsksPredictor, policy_of
from smartfrz.control.ordering import FreezeOrder, LayerCost
from smartfrz.control.policy import Policy
from smartfrz.control.report import Report
from smartfrz.errors import StateError, UnsupportedModelError, UsageError
from smartfrz.files import replacing
from smartfrz.predictor.runtime import Device


class SmartFRZ(keras.callbacks.Callback):  # type: ignore[misc]
    """Freezes layers of a model while `fit` trains it, when the predictor says that they have converged.

    Each `fit` starts anew, unless a state was loaded before, or `BackupAndRestore` is among the
    callbacks and goes on with an interrupted run. When training ends, everything that this callback
    froze can be trained again. With `TensorBoard` among the callbacks, confidences and a picture of
    the layers are written there; `smartfrz/frozen_layers` and `smartfrz/backward_saved` join the
    logs of every epoch.

    Args:
        predictor: A name of the zoo, the path or address of an ONNX file, the address of a predictor on a
            server (`http://host:port/NAME`), a loaded `Predictor`, or another policy:
            those of `smartfrz.baselines` that need no gradients and no learning rates of single layers.
        total_steps: Optimizer steps of the whole run. By default what `fit` says: steps times epochs.
        record_every: Steps between two records of the weights. Needed, or `total_steps`, if `fit`
            does not know the number of steps, as with generators.
        decide_every: Records between two freezing stages. Defaults to the policy's own, 2 for predictors.
        threshold: Confidence from which a layer is frozen. Defaults to the predictor's own.
        patience: Freezing stages in a row at which a layer must be confident. Defaults to the policy's
            own, 2 for predictors; the thresholds of the zoo are calibrated for that.
        dry_run: Decide, log and report, but freeze nothing.
        seed: The run seed of the sampled positions.
        device: Where ONNX Runtime runs: `"cpu"`, `"cuda"`, or `"auto"`.
        norm_batches: Steps before a freezing stage over which the statistics of a frozen batch norm
            are averaged. 0 keeps its moving statistics as they are.
        freeze_order: `"free"`: wherever the predictor is confident, as in the paper. `"prefix"`:
            front to back only. `"cost_aware"`: as `"free"`, but a layer needs the more confidence the
            less its freezing would save now. What layers cost is estimated from their shapes. Defaults
            to the policy's own, `"free"` for predictors.
        thaw_on_restart: Thaw every layer when the learning rate is raised to more than twice its
            lowest value since anything froze (a restart of its schedule).
        recompile_steps: What making the training function anew costs, in training steps. Nothing is
            frozen that saves less in the rest of the run. By default it is measured at the first
            step. 0: freeze whatever has converged.

    Raises:
        PredictorFileError: If the predictor cannot be used.
        UnknownPredictorError: If the zoo has no predictor of that name.
        ValueError: If an argument is out of range.

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
        patience: int | None = None,
        dry_run: bool = False,
        seed: int = 0,
        device: Device = "auto",
        norm_batches: int = 24,
        freeze_order: FreezeOrder | None = None,
        thaw_on_restart: bool = False,
        recompile_steps: float | None = None,
    ):
        super().__init__()
        self.predictor = zoo.load(predictor, device=device)
        if norm_batches < 0:
            raise ValueError(f"`norm_batches` is {norm_batches}; expected 0 or more steps.")
        if recompile_steps is not None and not recompile_steps >= 0.0:
            raise ValueError(
                f"`recompile_steps` is {recompile_steps}; expected 0 or more steps, or None to measure it."
            )
        self._policy = policy_of(self.predictor)
        # complain now, not when training begins; how long the run is shows then
        schedule(self._policy, total_steps or 1, record_every, decide_every, threshold, patience, freeze_order)
        if total_steps is not None:
            schedule(self._policy, total_steps)
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
        self._recompile_steps = recompile_steps
        self._pending: dict[str, Any] | None = None
        self._training = False
        self._recorder: CallRecorder | None = None
        self._uncompiled = False
        self._saving: Saving | None = None
        self._board: Board | None = None
        self._reset()

    def _reset(self) -> None:
        self._adapter: KerasAdapter | None = None
        self._controller: FreezeController | None = None
        self._all_layers: list[Layer] = []
        self._seconds = 0.0
        self._started: float | None = None
        self._iterations = 0  # batches that the optimizer has seen, those before this run included
        self._begun = False
        self._given_up = False
        self._compiling = CompileClock()

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
        self._run_options = self._schedule()
        neighbours = come_first(self)
        if sum(isinstance(callback, SmartFRZ) for callback in neighbours) > 1:
            raise UsageError(
                "fit() was given several SmartFRZ callbacks; expected one: each would undo what others froze."
            )
        self._training = True
        self._saving = Saving(neighbours, self.thawed, self.save, self._read_iterations)
        self._board = Board(neighbours)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """At the first: learn the layers, if they can be known yet, and freeze what a saved state says.

        Not when training begins: `BackupAndRestore` loads its weights then, perhaps after us.
        """
        if self._begun or not self._training:
            return
        self._begun = True
        self._compiling.made_anew(self._compiles)
        self._iterations = self._read_iterations()
        state, self._pending = self._pending, None
        backup = self._saving.find_state(self._iterations) if self._saving else None
        if state is None and backup is not None:
            state = _read_state(backup)
        if state is not None and not state["started"]:
            state = None
        run = trace_graph(self._model)
        if state is not None:
            layers = [Layer.from_dict(x) for x in state["layers"]] if run is None else group_layers(self._model, run)
            self._restore(state, layers)
        elif run is not None:
            self._control(group_layers(self._model, run))
        else:
            self._watch()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Look at the clock."""
        self._compiling.call_begins()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Record, decide and freeze, where it is time to."""
        if not self._training:
            raise UsageError("SmartFRZ was called outside of fit(). Pass it to fit(callbacks=[...]).")
        self._compiling.call_ended()
        if self._started is None:
            self._started = time.perf_counter() - self._seconds
        if self._recorder is not None:
            recorder = self._recorder
            self._stop_watching()
            self._control(group_layers(self._model, recorder.run()))
        controller, adapter = self._controller, self._adapter
        if controller is None or adapter is None:
            return
        before = self._iterations
        # Else every batch is one, and nobody has to wait for the device to tell.
        self._iterations = self._read_iterations() if self._must_ask else before + 1
        adapter.add_batches(self._iterations - before)
        for _ in range(self._iterations // self._accumulation - before // self._accumulation):
            self._step(controller, adapter)
        self._seconds = time.perf_counter() - self._started

    def _step(self, controller: FreezeController, adapter: KerasAdapter) -> None:
        """After one optimizer step."""
        if self._given_up:
            controller.num_steps += 1
            return
        self._check_frozen(controller, adapter)
        if self._compiles:
            self._spare_compilations(controller)
        decisions = controller.step()
        if controller.thaw_on_restart:
            decisions = decisions + controller.observe_learning_rates([self._learning_rate()])
        if any(decision.action in ("freeze", "thaw") for decision in decisions):
            self._compiling.made_anew(self._compiles)
        if decisions and self._board is not None:
            self._board.stage(decisions, self.report())
        self._snapshot_before_stage(controller, adapter)

    def _spare_compilations(self, controller: FreezeController) -> None:
        """Tell the controller, before its first freezing stage, that changing the frozen set has its price."""
        if controller.freeze_every == 1:
            controller.freeze_every = stages_apart(
                self._policy, controller.total_steps, controller.record_every, controller.decide_every
            )
        if controller.num_steps + 1 == controller.record_every * controller.decide_every:
            steps = self._recompile_steps
            if steps is None:
                steps = self._compiling.cost * int(self._model.steps_per_execution) / self._accumulation
            controller.steps_per_change = float(steps)

    def _check_frozen(self, controller: FreezeController, adapter: KerasAdapter) -> None:
        """Freeze nothing any more in a run that trains frozen layers on."""
        moved = adapter.find_moved()
        if not moved:
            return
        self._given_up = True
        controller.thaw(reason="moved_while_frozen")
        self._compiling.made_anew(self._compiles)
        warnings.warn(
            f"SmartFRZ froze {moved[0]!r}{f' and {len(moved) - 1} more layers' if len(moved) > 1 else ''}, but the step "
            f"after that changed it all the same: train_step of {type(self._model).__name__} or a layer keeps variables "
            "of its own instead of model.trainable_variables. Everything was thawed, and nothing is frozen any more in "
            "this run. In train_step compute gradients of self.trainable_variables and apply them with "
            "self.optimizer.",
            stacklevel=2,
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Join the logs of the epoch, which every callback and the history see."""
        if self._training and logs is not None:
            logs.update(self.report().scalars())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Leave the model as it was found: what stayed frozen would pass for the user's own in the next run."""
        self._stop_watching()
        self._training = False
        if self._adapter is not None:
            self._adapter.unfreeze(self._adapter.frozen_layers())
        if self._board is not None:
            self._board.close(self.report())
        self._let_go()

    def _let_go(self) -> None:
        if self._saving is not None:
            self._saving.close()
        self._saving = self._board = None

    def thaw(self, layers: Sequence[str] | None = None) -> list[FreezeDecision]:
        """Train frozen layers again, from another callback between two batches; they may freeze again later.

        Their momenta are those of the moment at which they froze. The training function is made anew.

        Args:
            layers: Names among `frozen_layers`; all of them by default. Layers that you froze
                yourself stay frozen.

        Returns:
            One decision for each layer that was thawed.

        Raises:
            ValueError: If a name is that of no layer, or of one that you froze yourself.
        """
        if self._controller is None or not self._training:
            return []
        decisions = self._controller.thaw(layers)
        if decisions and not self._controller.dry_run:
            self._compiling.made_anew(self._compiles)
        return decisions

    @property
    def _optimizer(self) -> Any:
        optimizer = self._model.optimizer
        while getattr(optimizer, "inner_optimizer", None) is not None:
            optimizer = optimizer.inner_optimizer
        return optimizer

    @property
    def _accumulation(self) -> int:
        return int(getattr(self._optimizer, "gradient_accumulation_steps", None) or 1)

    @property
    def _must_ask(self) -> bool:
        """Whether only the optimizer knows how many steps it took since the last call.

        Several batches may have passed, not each of them a step; with a loss scale, a step is skipped
        where gradients overflow.
        """
        several = int(self._model.steps_per_execution) > 1 or self._accumulation > 1
        return several or self._optimizer is not self._model.optimizer

    @property
    def _compiles(self) -> bool:
        """Whether changing the frozen set has a function traced or compiled again."""
        model = self._model
        return not model.run_eagerly and (keras.backend.backend() == "tensorflow" or bool(model.jit_compile))

    def _learning_rate(self) -> float:
        rate = self._optimizer._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            return float(keras.ops.convert_to_numpy(rate(self._iterations // self._accumulation)))
        if keras.backend.backend() == "jax":
            self._model.jax_state_sync()
        return float(keras.ops.convert_to_numpy(rate.value))

    def _read_iterations(self) -> int:
        if keras.backend.backend() == "jax":
            self._model.jax_state_sync()
        return int(keras.ops.convert_to_numpy(self._optimizer._iterations.value))

    def _schedule(self) -> dict[str, Any]:
        """The options of this run: how long it is, and records no closer than `fit` lets us look."""
        options = dict(self._options)
        params: dict[str, Any] = self.params or {}
        if options["total_steps"] is None:
            steps, epochs = params.get("steps"), params.get("epochs")
            if steps and epochs:
                options["total_steps"] = max(1, int(steps) * int(epochs) // self._accumulation)
            elif options["record_every"] is None:
                raise ValueError(
                    f"SmartFRZ needs to know how long the run is, but fit() has steps={steps} and epochs={epochs}, as "
                    "with a generator of unknown length. Pass total_steps= or record_every= to SmartFRZ, or "
                    "steps_per_epoch= to fit()."
                )
        apart = -(-int(self._model.steps_per_execution) // self._accumulation)
        if options["record_every"] is not None and options["record_every"] < apart:
            raise ValueError(
                f"`record_every` is {options['record_every']}, but {apart} optimizer steps pass at a time "
                f"(steps_per_execution={self._model.steps_per_execution}); expected at least as many, since nothing can "
                "be recorded in between."
            )
        if options["record_every"] is None:
            options["record_every"] = max(schedule(self._policy, options["total_steps"]).record_every, apart)
        return options

    def _watch(self) -> None:
        """Learn the order of the layers from the first step."""
        model = self._model
        if keras.backend.backend() == "torch" and model.jit_compile:
            # torch.compile would trace the recorder as well. One step without does no harm.
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

    def _control(self, layers: list[Layer], state: dict[str, Any] | None = None) -> KerasAdapter:
        """Take control of these layers, as the controller's saved state says."""
        adapter = KerasAdapter(self._model, layers)
        controller = FreezeController(adapter, self.predictor, **self._run_options)
        controller.costs = {x.name: LayerCost(*(x.forward_flops,) * 3) for x in layers}
        if state is not None:
            controller.load_state_dict(state)
        elif self._norm_batches:
            adapter.snapshot_statistics()  # for a first stage that comes before the next snapshot
        self._all_layers, self._adapter, self._controller = layers, adapter, controller
        return adapter

    def _restore(self, state: dict[str, Any], layers: list[Layer]) -> None:
        probe = KerasAdapter(self._model, layers)
        saved = dict(state["controller"])
        lost = [x for x in saved["layers"] if x in probe.all_layers() and x not in probe.layers()]
        if lost:
            raise StateError(
                f"The saved state says that {lost[:3]} were trained or frozen by SmartFRZ, but in this model "
                "trainable is False. A model that is saved while layers are frozen also loses its momenta: save it "
                "inside of `with freezer.thawed():`, or after fit()."
            )
        adapter = self._control(layers, saved)
        adapter.load_norm_state(state["norms"])
        self._seconds = state["seconds"]

    def _snapshot_before_stage(self, controller: FreezeController, adapter: KerasAdapter) -> None:
        interval = controller.record_every * controller.decide_every
        ahead = min(self._norm_batches, interval)
        if ahead and controller.num_steps % interval == (interval - ahead) % interval:
            adapter.snapshot_statistics()

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Have the model look unfrozen inside of the block, to save it from another callback in mid-training.

        A model that is saved while layers are frozen is loaded with an optimizer for the others
        only, which Keras then leaves without momenta and iterations. Train nothing in the block.
        """
        adapter = self._adapter
        frozen = adapter.frozen_layers() if adapter is not None else []
        if adapter is None or not frozen:
            yield
            return
        adapter.sync()
        adapter.set_flags(frozen, True)
        try:
            yield
        finally:
            adapter.set_flags(frozen, False)

    @property
    def layers(self) -> list[str]:
        """Every layer that can be frozen, in execution order; empty before training."""
        return self._adapter.layers() if self._adapter else []

    @property
    def frozen_layers(self) -> list[str]:
        """Names of the layers that were frozen, in the order in which they froze.

        After training they can be trained again, but are still listed here.
        """
        return [] if self._controller is None or self._controller.dry_run else list(self._controller.frozen)

    @property
    def events(self) -> list[FreezeDecision]:
        """One record per decision, oldest first."""
        return list(self._controller.events) if self._controller else []

    def report(self) -> Report:
        """What froze when, what that saved, and what deciding cost."""
        controller = self._controller
        if controller is None:
            return Report()
        return Report.of(
            controller,
            self._all_layers,
            self.layers,
            self._seconds,
            per_example=True,
            compiler="Keras",
            **self._compiling.facts(),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as an uninterrupted one: plain data and NumPy arrays."""
        if self._controller is None or self._adapter is None:
            return {"started": False}
        return copy.deepcopy(
            {
                "started": True,
                "seconds": self._seconds,
                "layers": [layer.to_dict() for layer in self._all_layers],
                "controller": self._controller.state_dict(),
                "norms": self._adapter.norm_state(),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next `fit` continue a saved run. Load the model with its optimizer as well.

        Pass `initial_epoch=` to `fit`. What the saved run had frozen is frozen when training begins,
        and the schedule, threshold and patience of the saved run replace those given to this one.

        Raises:
            StateError: If the state was not made by `state_dict`, or by another version. Whether it
                belongs to the model and predictor shows when training begins.
            UsageError: During training.
        """
        if "started" not in state:
            raise StateError(
                f"SmartFRZ.load_state_dict received a dict with keys {sorted(map(str, state))[:5]}; expected what "
                "SmartFRZ.state_dict() returned. Save and load that."
            )
        if self._training:
            raise UsageError("SmartFRZ.load_state_dict was called during training. Call it before fit().")
        if state["started"]:
            require_version(state["controller"])
        self._pending = copy.deepcopy(state) if state["started"] else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict()` to a file of NumPy's `.npz` format, without pickle."""
        arrays: dict[str, Any] = {}
        text = json.dumps(_pack(self.state_dict(), arrays))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, state=np.array(text), **arrays)

    def load(self, path: str | os.PathLike[str]) -> None:
        """`load_state_dict` of what `save` wrote.

        Raises:
            StateError: If the file is of another kind, or damaged.
        """
        self.load_state_dict(_read_state(path))


class CompileClock:
    """Counts how often the training function was made, and about how long that took.

    A function is traced and compiled inside of its first call. What that takes beyond other calls is the cost.
    """

    def __init__(self) -> None:
        self._begun = self._ended = 0.0
        self._new = False
        self._first: list[float] = []  # seconds of the first call of each function
        self._others: deque[float] = deque(maxlen=64)

    def made_anew(self, compiles: bool) -> None:
        """The next call is the first of a new function."""
        self._new = self._new or compiles

    def call_begins(self) -> None:
        """Look at the clock before each call of the training function."""
        self._begun = time.perf_counter()

    def call_ended(self) -> None:
        """Look at the clock after it."""
        now = time.perf_counter()
        if self._new:
            self._new = False
            self._first.append(now - self._begun)
        elif self._ended:
            # From end to end: on JAX a call returns before the device is done, and the next one waits for it.
            self._others.append(now - self._ended)
        self._ended = now

    @property
    def usual(self) -> float:
        """Seconds of a call that compiles nothing; 0 if there was none yet."""
        return statistics.median(self._others) if self._others else 0.0

    @property
    def cost(self) -> float:
        """What making the training function cost at the first time, in calls; rounded to a power of two.

        What is decided by it should not depend on how busy the machine is.
        """
        if not self._first or not self.usual:
            return 0.0
        return 2.0 ** round(math.log2(max(1.0, self._first[0] / self.usual - 1.0)))

    def facts(self) -> dict[str, Any]:
        """For the report."""
        seconds = [max(0.0, first - self.usual) for first in self._first]
        return {
            "num_compilations": len(seconds),
            "compile_seconds": sum(seconds),
            "num_recompilations": max(0, len(seconds) - 1),
            "recompile_seconds": sum(seconds[1:]),
        }


def _read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `SmartFRZ.save` wrote."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            state: dict[str, Any] = _unpack(json.loads(str(file["state"])), file)
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, AttributeError, TypeError) as error:
        raise StateError(
            f"{os.fspath(path)} holds no state of SmartFRZ ({error}); expected a file that SmartFRZ.save() wrote."
        ) from error
    return state


_ARRAY = "__array__"


def _pack(value: Any, arrays: dict[str, Any]) -> Any:
    """The value without its arrays, which go into `arrays`."""
    if isinstance(value, np.ndarray):
        name = f"array{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, dict):
        return {str(k): _pack(v, arrays) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(v, arrays) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def _unpack(value: Any, arrays: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {k: _unpack(v, arrays) for k, v in value.items()}
    return [_unpack(v, arrays) for v in value] if isinstance(value, list) else value
