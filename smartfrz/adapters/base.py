"""`Freezer`: what SmartFRZ is in every framework. Loads none of them."""

import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from smartfrz import zoo
from smartfrz.control.controller import FreezeController, require_version
from smartfrz.control.curves import Curves, chosen_from
from smartfrz.control.decision import FreezeDecision
from smartfrz.control.learned import AsksPredictor, policy_of
from smartfrz.control.options import FreezeOptions, Schedule
from smartfrz.control.pace import Pace
from smartfrz.control.policy import Policy
from smartfrz.control.protocols import Adapter
from smartfrz.control.report import Report, ReportedLayer
from smartfrz.control.saying import describe_stage, say
from smartfrz.control.state import Check, check_extent, check_run, sealed
from smartfrz.errors import StateError
from smartfrz.predictor.runtime import Device, Providers

logger = logging.getLogger("smartfrz")


class StatefulAdapter(Adapter, Protocol):
    """An adapter that corrects the statistics of batch norms when they freeze."""

    def snapshot_statistics(self) -> None:
        """Note the running statistics now; a norm that freezes takes the average of the batches since."""
        ...

    def norm_state(self) -> dict[str, Any]:
        """Return the snapshot, for a saved state."""
        ...

    def check_norm_state(self, state: dict[str, Any]) -> None:
        """Raise `StateError` if `load_norm_state` could not use this. Nothing is changed."""
        ...

    def load_norm_state(self, state: dict[str, Any]) -> None:
        """Replace the snapshot by what `norm_state` returned."""
        ...


class StoredLayer(ReportedLayer, Protocol):
    """A layer that can be written into a saved state."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        ...


A = TypeVar("A", bound=StatefulAdapter)
# Receives a flat dict of numbers, and the optimizer steps so far.
Log = Callable[[dict[str, float], int], object]


@dataclass(frozen=True)
class Run(Generic[A]):
    """A run whose layers are known.

    Attributes:
        layers: Every layer, in execution order, including layers that the user froze.
        adapter: The model, as the controller sees it.
        controller: Decides for these layers.
    """

    layers: Sequence[StoredLayer]
    adapter: A
    controller: FreezeController


class Stopwatch:
    """Seconds from the first to the latest step of a run, continued after a resume."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Start if it is not running."""
        if self._started is None:
            self._started = time.perf_counter() - self.seconds

    def read(self) -> None:
        """Update `seconds`."""
        if self._started is not None:
            self.seconds = time.perf_counter() - self._started

    def resume(self, seconds: float) -> None:
        """Stop, and continue from these seconds at the next `start`."""
        self.seconds, self._started = seconds, None


class Freezer(ABC, Generic[A]):
    """Freezes layers of a model while it is trained. The SmartFRZ classes of the frameworks derive from it.

    Args:
        predictor: A name in the zoo, the path or address of an ONNX file, the address of a predictor on a
            server (`http://host:port/NAME`), a loaded `Predictor`, or another policy, such as the policies in
            `smartfrz.baselines`.
        device: Where ONNX Runtime runs: `"cpu"`, `"cuda"`, or `"auto"`.
        providers: Execution providers of ONNX Runtime, in the place of `device`: names such as
            `"OpenVINOExecutionProvider"`, or pairs of a name and its options.
        options: What the user chose.
        log: Called at every record with a flat dict of floats and the number of optimizer steps, on the first process
            only: `wandb.log`, `mlflow.log_metrics`, or a function of your own. `docs/report.md` names the numbers.

    Attributes:
        predictor: The loaded predictor or policy.
        options: What the user chose.

    Raises:
        PredictorFileError: If the predictor cannot be used.
        UnknownPredictorError: If the zoo has no predictor of that name.
        TypeError: If `log` cannot be called.
    """

    def __init__(
        self,
        predictor: str | os.PathLike[str] | AsksPredictor | Policy,
        device: Device,
        providers: Providers | None,
        options: FreezeOptions,
        log: Log | None = None,
    ):
        if log is not None and not callable(log):
            raise TypeError(
                f"`log` is {log!r:.60}; expected a function of a dict of floats and the step, such as wandb.log."
            )
        self._log = log
        self.predictor = zoo.load(predictor, device=device, providers=providers)
        self.options = options
        self._policy = policy_of(self.predictor)
        self._reset()

    def _reset(self) -> None:
        """Forget the run, if there was one."""
        self._run: Run[A] | None = None
        self._clock = Stopwatch()
        self._said_too_long = False
        self._pace = Pace()
        self._curves = Curves()
        self._latest_stage: list[FreezeDecision] = []

    # What a framework adds.

    @abstractmethod
    def _frozen_set_changed(self) -> None:
        """React to layers that froze or thawed."""

    @abstractmethod
    def _learning_rates(self) -> list[float]:
        """Return the learning rate of each parameter group."""

    @abstractmethod
    def _report_facts(self) -> dict[str, Any]:
        """Return what only the adapter knows, as named in the attributes of `Report`."""

    # What every framework shares.

    @property
    def reads_loss(self) -> bool:
        """Whether the predictor, or policy, reads the training loss."""
        return self._policy.reads_loss

    def _decide(self, run: Run[A]) -> list[FreezeDecision]:
        """Record, decide, freeze and thaw, after one optimizer step."""
        controller = run.controller
        decisions = controller.step()
        if controller.total_steps and controller.num_steps > controller.total_steps and not self._said_too_long:
            self._said_too_long = True
            logger.warning(
                "SmartFRZ: the run goes on beyond its %d steps, total_steps; records and freezing were planned for so "
                "many. Pass the optimizer steps of the whole run, len(loader) * epochs, divided by the batches of which "
                "gradients are accumulated, and call step() once for each optimizer step.",
                controller.total_steps,
            )
        if controller.thaw_on_restart:
            decisions = decisions + controller.observe_learning_rates(self._learning_rates())
        self._react(run, decisions)
        if decisions and self._speaks:
            say(describe_stage(decisions, controller.total_steps, len(controller.frozen), len(run.adapter.layers())))
        if (
            min(self.options.norm_batches, controller.record_every * controller.decide_every)
            == controller.steps_to_stage
        ):
            run.adapter.snapshot_statistics()
        if controller.just_looked:
            self._pace.note(controller.num_steps, 0 if controller.dry_run else len(controller.frozen))
            self._latest_stage = decisions
            if self._log is not None and self._is_first:
                self._log(self.scalars() | self.confidences(), controller.num_steps)
        return decisions

    @property
    def _is_first(self) -> bool:
        """True in the process that speaks for all, where several train together."""
        return True

    @property
    def _speaks(self) -> bool:
        """True if this process says what happens."""
        return self.options.verbose and self._is_first

    def say_report(self) -> None:
        """Write the report where the lines of `verbose` go; nothing if `verbose` is False."""
        if self._speaks and self._run is not None:
            say(str(self.report()))

    def _react(self, run: Run[A], decisions: list[FreezeDecision]) -> None:
        changed = any(decision.action in ("freeze", "thaw") for decision in decisions)
        if changed and not run.controller.dry_run:
            self._frozen_set_changed()

    def thaw(self, layers: Sequence[str] | None = None) -> list[FreezeDecision]:
        """Train frozen layers again; they may freeze again later.

        Call it between two training steps; on every process, where several train together. The optimizer state
        of a thawed layer is empty in PyTorch, and what it was when the layer froze in Keras.

        Args:
            layers: Names among `frozen_layers`; all of them by default. Layers that you froze
                yourself stay frozen.

        Returns:
            One decision for each layer that was thawed.

        Raises:
            ValueError: If a name belongs to no layer, or to a layer that you froze yourself.
        """
        if self._run is None:
            return []
        decisions = self._run.controller.thaw(layers)
        self._react(self._run, decisions)
        return decisions

    @property
    def adapter(self) -> A | None:
        """The model, as the controller sees it; None before the layers are known."""
        return self._run.adapter if self._run else None

    @property
    def schedule(self) -> Schedule | None:
        """When this run records and decides, and how; None before the layers are known."""
        return self._run.controller.schedule if self._run else None

    @property
    def layers(self) -> list[str]:
        """Names of the layers that can be frozen, in execution order; empty before the first step."""
        return self._run.adapter.layers() if self._run else []

    @property
    def frozen_layers(self) -> list[str]:
        """Names of the layers that SmartFRZ froze, in the order in which they froze.

        They stay listed after training, when the callbacks have made them trainable again.
        """
        return [] if self._run is None or self._run.controller.dry_run else list(self._run.controller.frozen)

    @property
    def events(self) -> list[FreezeDecision]:
        """Every decision so far, oldest first."""
        return list(self._run.controller.events) if self._run else []

    def note(self, **values: float) -> None:
        """Tell the report a loss, an accuracy or another number of the present step: `freezer.note(loss=loss.item())`.

        The page of the report draws a curve for each name, and curves whose names differ by `train_`, `val_`, `eval_` or
        `test_` only into one picture. The callbacks of training frameworks do this with what the framework logs.

        Args:
            **values: Numbers by name. A tensor on a GPU is waited for, so note it every so many steps only.

        Raises:
            TypeError: If a value is no number.
        """
        self._curves.note(self.num_steps, values)

    def note_logs(self, logs: Mapping[str, Any], *, only_new: bool = False) -> None:
        """Note the losses and metrics among the logs of a training framework; see `note`.

        Args:
            logs: What the framework logs. Texts, times, learning rates and the like are left out.
            only_new: Leave out what has not changed since it was noted.
        """
        self._curves.note(self.num_steps, chosen_from(logs), only_new=only_new)

    @property
    def num_steps(self) -> int:
        """Optimizer steps so far."""
        return self._run.controller.num_steps if self._run else 0

    @property
    def just_recorded(self) -> bool:
        """Whether layers were looked at after the latest step: recorded then or, on a GPU, one step earlier."""
        return self._run is not None and self._run.controller.just_looked

    def scalars(self) -> dict[str, float]:
        """Return how many layers are frozen, the share of backward saved, and the pace, for the logs of a framework."""
        values = self._report(whole=False).scalars()
        if self._pace.intervals:
            values["smartfrz/seconds_per_step"] = self._pace.intervals[-1].seconds
        return values

    def confidences(self) -> dict[str, float]:
        """Return each layer's confidence at the latest record, if it was a freezing stage, for the logs of a framework."""
        return {
            f"smartfrz/confidence/{decision.layer}": decision.confidence
            for decision in (self._latest_stage if self.just_recorded else ())
            if not math.isnan(decision.confidence)
        }

    def report(self) -> Report:
        """Report what froze when, what that saved, and what deciding cost."""
        return self._report(whole=True)

    def _report(self, *, whole: bool) -> Report:
        facts = self._report_facts()
        if self._run is None:
            return Report(**facts)
        facts |= {"intervals": list(self._pace.intervals), "curves": self._curves.copy()} if whole else {}
        return Report.of(self._run.controller, self._run.layers, self.layers, self._clock.seconds, whole=whole, **facts)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to continue as an uninterrupted one: plain data and arrays."""
        state = self._unsealed_state()
        return sealed(state) if state["started"] else state

    def _unsealed_state(self) -> dict[str, Any]:
        run = self._run
        if run is None:
            return {"started": False}
        return {
            "started": True,
            "seconds": self._clock.seconds,
            "layers": [layer.to_dict() for layer in run.layers],
            "controller": run.controller.state_dict(),
            "norms": run.adapter.norm_state(),
        }


def require_state(state: Any, layer: type, more: Mapping[str, Check] | None = None) -> None:
    """Refuse what `Freezer.state_dict` did not return, what another version of smartfrz saved, and values no run has.

    Whether a value was changed since it was saved is found by `check_unchanged`, once it is known that the state belongs
    to this model.

    Args:
        state: What is checked. Tensors are arrays by now.
        layer: The dataclass of the stored layers.
        more: Checks of what only this framework saves, by the name.

    Raises:
        StateError: If it is such a state.
    """
    check_extent(state)
    if not isinstance(state, Mapping) or "started" not in state:
        received = (
            f"a dict with keys {sorted(map(str, state))[:5]}" if isinstance(state, Mapping) else repr(state)[:100]
        )
        raise StateError(
            f"SmartFRZ.load_state_dict received {received}; expected what SmartFRZ.state_dict() returned. Save and "
            "load that."
        )
    started = state["started"]
    if not isinstance(started, bool) or (not started and "controller" in state):
        expected = "True, as there is a state of the controller" if "controller" in state else "True or False"
        raise StateError(
            f"The saved state is damaged: started is {started!r:.100}; expected {expected}. Resume from another "
            "checkpoint, or start without a state."
        )
    if not started:
        return
    controller = state.get("controller")
    if not isinstance(controller, Mapping):
        raise StateError(
            f"The saved state is damaged: controller is {controller!r:.100}; expected a dict. Resume from another "
            "checkpoint, or start without a state."
        )
    require_version(controller)
    check_run(state, layer, more or {})
