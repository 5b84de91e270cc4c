"""When to record, when to decide, and what has been decided. Knows no framework."""

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from smartfrz.control.decision import FreezeDecision, Reason, decide
from smartfrz.control.learned import AsksPredictor, policy_of
from smartfrz.control.ordering import ORDERS, FreezeOrder, LayerCost, Ordering, backward_cost
from smartfrz.control.policy import Policy
from smartfrz.errors import StateError, UnsupportedModelError

logger = logging.getLogger("smartfrz")
STATE_VERSION = 3
# Where changing the frozen set has the model compiled again, which takes seconds to minutes, at most so
# many freezing stages of a run freeze anything.
COMPILED_STAGES = 4
# A learning rate is taken for restarted once it is so many times its lowest value since something
# froze, and no less than this share of its highest value so far.
RESTART_RATIO = 2.0
RESTART_SHARE = 0.05


class Adapter(Protocol):
    """What a framework has to offer. NumPy arrays at the border."""

    def layers(self) -> list[str]:
        """Names of the layers that may be frozen, in execution order."""
        ...

    def all_layers(self) -> list[str]:
        """Names of all layers, those that the user froze included, in execution order."""
        ...

    def num_weights(self, layer: str) -> int:
        """How many weights the layer has."""
        ...

    def weights(self, layer: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """A copy of the layer's flattened weights at `indices`, float32."""
        ...

    def tailored(self, positions: Mapping[str, NDArray[np.int64]]) -> Mapping[str, NDArray[np.float32]]:
        """As `weights`, of several layers at once: one transfer, or one message, for all of them."""
        ...

    def freeze(self, layers: list[str]) -> None:
        """Stop training these layers. Freezing a frozen layer changes nothing."""
        ...

    def unfreeze(self, layers: list[str]) -> None:
        """Train these layers again, if it was `freeze` that stopped them."""
        ...


class OptimizerAdapter(Adapter, Protocol):
    """What an adapter offers that reaches into the optimizer's steps; some policies need it."""

    def set_lr_scale(self, layer: str, scale: float) -> None:
        """Multiply the layer's learning rate by `scale`, until another one is set or the layer freezes."""
        ...

    def gradient_norm(self, layer: str) -> float:
        """L1 norm of the sum of the layer's gradients over the steps since this was last asked."""
        ...


class Ranks(Protocol):
    """The processes that train one model together, and have to decide alike."""

    def meet(self, moment: str, facts: Mapping[str, Any]) -> None:
        """Wait until every process is at this moment with the same facts (plain data).

        Raises:
            DistributedError: If one does not come, or comes with other facts.
        """
        ...

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` returned on the first process, plain data, on every process."""
        ...


class OneProcess:
    """`Ranks` of a process that trains alone."""

    def meet(self, moment: str, facts: Mapping[str, Any]) -> None:
        """Nobody to wait for."""

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` returns."""
        return make()


class FreezeController:
    """Has the policy record, asks it at every freezing stage, has layers frozen.

    Args:
        adapter: The model, as its framework's adapter shows it.
        predictor: A loaded predictor, or another policy.
        total_steps: Optimizer steps of the whole run. Gives `record_every`, so that the run has as
            many records as the runs that the predictor was trained on.
        record_every: Steps between two records; overrides what follows from `total_steps`.
        decide_every: Records between two freezing stages. Defaults to the policy's own, 2 for predictors.
        threshold: Confidence from which a layer is frozen. Defaults to the policy's own.
        patience: Freezing stages in a row at which a layer must be confident. Defaults to the policy's
            own, 2 for predictors.
        dry_run: Decide and log, but freeze nothing.
        seed: The run seed of the tailoring positions; equal on every rank.
        freeze_order: See `Ordering`. Defaults to the policy's own, `free` for predictors.
        thaw_on_restart: Thaw every layer when the learning rate is raised again; see `observe_learning_rates`.
        keep_one_of: Groups of layers of which one has to stay active, such as those of one optimizer.
        ranks: The processes that train together.

    Raises:
        ValueError: If an argument is out of range, or neither `total_steps` nor `record_every` is given.
        UnsupportedModelError: If there is no layer to freeze, or the policy needs what the adapter lacks.
    """

    def __init__(
        self,
        adapter: Adapter,
        predictor: AsksPredictor | Policy,
        *,
        total_steps: int | None = None,
        record_every: int | None = None,
        decide_every: int | None = None,
        threshold: float | None = None,
        patience: int | None = None,
        dry_run: bool = False,
        seed: int = 0,
        freeze_order: FreezeOrder | None = None,
        thaw_on_restart: bool = False,
        keep_one_of: Collection[Collection[str]] = (),
        ranks: Ranks | None = None,
    ):
        self._policy = copy.copy(policy_of(predictor))  # two runs may be given the same one
        self.record_every, self.decide_every, self.threshold, self.patience, self.freeze_order = schedule(
            self._policy, total_steps, record_every, decide_every, threshold, patience, freeze_order
        )
        self.thaw_on_restart = thaw_on_restart
        # Freezing stages per one at which anything is frozen: where freezing itself is expensive.
        self.freeze_every = 1
        self.costs: dict[str, LayerCost] = {}
        # What changing the frozen set costs, in training steps: nothing is frozen that saves less in the rest
        # of the run. Needs `costs`, and a run of known length.
        self.steps_per_change = 0.0
        self.total_steps = total_steps
        self.prefix_is_cached = False  # then closing a prefix saves its forward pass, too
        self.dry_run = dry_run
        self.seed = int(seed)
        self._adapter = adapter
        self._layers = adapter.layers()
        self._keep_one_of = [list(group) for group in keep_one_of]
        self._ranks = ranks or OneProcess()
        if len(self._layers) < 2:
            raise UnsupportedModelError(
                f"The model has {len(self._layers)} layers that can be trained, {self._layers}; SmartFRZ needs at least "
                "two, since the last one is always kept. Train without it."
            )
        self._require(adapter)
        self._policy.begin(adapter, self._layers, total_steps=total_steps, seed=self.seed)
        self.num_steps = 0
        self.num_records = 0
        self.frozen: dict[str, int] = {}
        self.events: list[FreezeDecision] = []
        self.decision_seconds = 0.0
        self._streaks: dict[str, int] = {}
        self._warned: set[str] = set()
        self._lowest_rates: list[float] = []
        self._highest_rates: list[float] = []
        self._ranks.meet("the first step", self._facts())

    def _require(self, adapter: Adapter) -> None:
        needs = {"set_lr_scale": self._policy.scales_learning_rates, "gradient_norm": self._policy.reads_gradients}
        lacking = [method for method, needed in needs.items() if needed and not hasattr(adapter, method)]
        if lacking:
            raise UnsupportedModelError(
                f"The policy {self._policy.name!r} needs an adapter with the method `{lacking[0]}`, which "
                f"{type(adapter).__name__} does not have. Train with PyTorch's SmartFRZ, or with another policy "
                "(LinearFreezing(anneal=False) leaves learning rates alone)."
            )

    def _facts(self) -> dict[str, Any]:
        """What has to be the same on every process."""
        return {
            "layers": {layer: self._adapter.num_weights(layer) for layer in self._layers},
            "predictor": self._policy.sha256,
            **{name: getattr(self, name) for name in _SCHEDULE},
        }

    @property
    def active(self) -> list[str]:
        """Layers that are still trained (in a dry run: would be), in execution order."""
        return [layer for layer in self._layers if layer not in self.frozen]

    def step(self) -> list[FreezeDecision]:
        """Call after every optimizer step.

        Returns:
            The decisions of this step; empty if it was not a freezing stage.
        """
        self.num_steps += 1
        start = time.perf_counter()
        decisions: list[FreezeDecision] = []
        if self.num_steps % self.record_every == 0:
            active = self.active
            if len(active) > 1:  # with one layer left there is nothing to decide any more
                self._ranks.meet(f"step {self.num_steps}", {"active": active})
                self.num_records += 1
                ask = self.num_records % self.decide_every == 0
                self._policy.record(active, ask=ask)
                if ask:
                    decisions = self._stage(active)
        self.set_lr_scales()
        self.decision_seconds += time.perf_counter() - start
        return decisions

    def set_lr_scales(self) -> None:
        """Have the policy scale the learning rate of each active layer for the next step.

        `step` and `thaw` do it; adapters call it before the first step, and after a state was loaded.
        """
        if self.dry_run:
            return
        for layer, scale in self._policy.lr_scales(self.active, step=self.num_steps).items():
            cast(OptimizerAdapter, self._adapter).set_lr_scale(layer, scale)

    def _stage(self, active: list[str]) -> list[FreezeDecision]:
        shared = self._ranks.share(lambda: self._decide(active))
        decisions = [FreezeDecision(**decision) for decision in shared["decisions"]]
        self._streaks = dict(shared["streaks"])
        self.events += decisions
        chosen = [d for d in decisions if d.action != "keep"]
        if chosen and not self.dry_run:
            self._adapter.freeze([d.layer for d in chosen])
        for decision in chosen:
            self.frozen[decision.layer] = decision.step
            self._policy.drop(decision.layer)
            self._streaks.pop(decision.layer, None)
            logger.info(
                "%s %s at step %d (confidence %.3f)",
                decision.action,
                decision.layer,
                decision.step,
                decision.confidence,
            )
        return decisions

    def _decide(self, active: list[str]) -> dict[str, Any]:
        """Decisions and streaks, as plain data."""
        excused = self._excused(active)
        asked = [layer for layer in active if layer not in excused]
        confidence = self._policy.confidence(asked, step=self.num_steps)
        make = partial(
            decide,
            active,
            confidence,
            excused,
            self._streaks,
            step=self.num_steps,
            timestamp=self.num_records - 1,
            ordering=Ordering(
                self._adapter.all_layers(), self.threshold, self.freeze_order, self.costs, self.prefix_is_cached
            ),
            patience=self.patience,
            dry_run=self.dry_run,
            keep_one_of=self._keep_one_of,
        )
        decisions, streaks = make(hold=self.num_records // self.decide_every % self.freeze_every != 0)
        if not self._pays(active, [decision.layer for decision in decisions if decision.action != "keep"]):
            decisions, streaks = make(hold=True)
        return {"decisions": [dataclasses.asdict(decision) for decision in decisions], "streaks": streaks}

    def _pays(self, active: list[str], chosen: list[str]) -> bool:
        """Whether freezing these layers now saves more in the rest of the run than changing the frozen set costs."""
        if not (chosen and self.steps_per_change and self.costs and self.total_steps):
            return True
        layers = self._adapter.all_layers()
        stopped = set(layers).difference(active)
        now = backward_cost(layers, stopped, self.costs)[0]
        then = backward_cost(layers, stopped.union(chosen), self.costs)[0]
        step = now + sum(self.costs[layer].forward for layer in layers)
        return (self.total_steps - self.num_steps) * (now - then) >= self.steps_per_change * step

    def thaw(self, layers: Sequence[str] | None = None, reason: Reason = "by_hand") -> list[FreezeDecision]:
        """Train layers again that this controller froze; they may freeze again later.

        Args:
            layers: Their names; all by default. Layers that are not frozen stay as they are.
            reason: For the record of the decision.

        Returns:
            One decision for each layer that was thawed.

        Raises:
            ValueError: If a name is that of no layer, or of one that the user froze.
        """
        if isinstance(layers, str):
            layers = [layers]
        unknown = [layer for layer in layers or () if layer not in self._layers]
        if unknown:
            raise ValueError(
                f"`layers` names {unknown[:3]}, which SmartFRZ cannot thaw; expected names among frozen_layers: "
                f"{list(self.frozen)}."
            )
        thawed = [layer for layer in self.frozen if layers is None or layer in layers]
        if not thawed:
            return []
        self._ranks.meet(f"thawing after step {self.num_steps}", {"layers": thawed})
        if not self.dry_run:
            self._adapter.unfreeze(thawed)
        # What is still trained was judged beside frozen layers, and perhaps long ago: it has to be patient anew.
        self._streaks.clear()
        decisions = []
        for layer in thawed:
            del self.frozen[layer]
            decisions.append(FreezeDecision(self.num_steps, self.num_records - 1, layer, float("nan"), "thaw", reason))
            logger.info("thaw %s at step %d (%s)", layer, self.num_steps, reason)
        self.events += decisions
        self.set_lr_scales()
        return decisions

    def observe_learning_rates(self, rates: Sequence[float]) -> list[FreezeDecision]:
        """Thaw every layer if the learning rate was raised again: what had converged has not any more.

        Call it after every step, if `thaw_on_restart` is set.

        Args:
            rates: Of each parameter group.

        Returns:
            As `thaw`.
        """
        if len(rates) != len(self._highest_rates):
            self._highest_rates, self._lowest_rates = list(rates), []
        self._highest_rates = [max(a, b) for a, b in zip(self._highest_rates, rates, strict=True)]
        if not self.frozen or len(rates) != len(self._lowest_rates):
            self._lowest_rates = list(rates)  # a warm-up before anything froze is no restart
        raised = any(
            now > RESTART_RATIO * lowest and now > RESTART_SHARE * highest
            for now, lowest, highest in zip(rates, self._lowest_rates, self._highest_rates, strict=True)
        )
        self._lowest_rates = [min(a, b) for a, b in zip(self._lowest_rates, rates, strict=True)]
        return self.thaw(reason="learning_rate_raised") if raised else []

    def _excused(self, active: list[str]) -> dict[str, Reason]:
        excused = self._policy.excused(active)
        for layer, reason in excused.items():
            if reason == "not_finite" and layer not in self._warned:
                self._warned.add(layer)
                logger.warning(
                    "The weights of layer %r hold NaN or infinity at step %d; it is not frozen as long as they are "
                    "in its history. Look at the loss and the learning rate.",
                    layer,
                    self.num_steps,
                )
        return excused

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to decide as an uninterrupted one: plain data and arrays."""
        return {
            "version": STATE_VERSION,
            "predictor": self._policy.sha256,
            "layers": list(self._layers),
            "schedule": {name: getattr(self, name) for name in _SCHEDULE},
            "total_steps": self.total_steps,
            "num_steps": self.num_steps,
            "num_records": self.num_records,
            "frozen": dict(self.frozen),
            "streaks": dict(self._streaks),
            "warned": sorted(self._warned),
            "learning_rates": [list(self._lowest_rates), list(self._highest_rates)],
            "costs": {layer: dataclasses.astuple(cost) for layer, cost in self.costs.items()},
            "decision_seconds": self.decision_seconds,
            "events": [dataclasses.asdict(event) for event in self.events],
            "history": self._policy.state_dict(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Whether `load_state_dict` would take this state; nothing is changed.

        Raises:
            StateError: If the state is of another model, predictor or version.
        """
        require_version(state)
        if state["predictor"] != self._policy.sha256:
            raise StateError(
                f"The saved state was made with predictor {state['predictor'][:12]}..., this run has "
                f"{self._policy.name!r} ({self._policy.sha256[:12]}...). Resume with the same predictor file, or policy "
                "with the same settings."
            )
        if state["layers"] != self._layers:
            unknown = sorted(set(state["layers"]) ^ set(self._layers))
            raise StateError(
                f"The saved state is of a model with {len(state['layers'])} layers, this one has {len(self._layers)}; "
                f"they differ in {unknown[:4] or 'their order'}. Resume with the same model."
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken: what it had frozen is frozen, nothing else.

        The schedule, threshold and patience of the saved run replace those given to this one.

        Raises:
            StateError: If the state is of another model, predictor or version. Nothing is changed then.
        """
        self.check_state(state)
        saved = {name: state[name] for name in ("num_steps", "num_records", "frozen")}
        self._ranks.meet("loading a state", {"schedule": state["schedule"], **saved})
        for name in _SCHEDULE:
            setattr(self, name, state["schedule"][name])
        self.total_steps = state["total_steps"]
        self._policy.begin(self._adapter, self._layers, total_steps=self.total_steps, seed=self.seed)
        self.num_steps = state["num_steps"]
        self.num_records = state["num_records"]
        thawed = [layer for layer in self.frozen if layer not in state["frozen"]]
        self.frozen = dict(state["frozen"])
        self._streaks = dict(state["streaks"])
        self._warned = set(state["warned"])
        self._lowest_rates, self._highest_rates = (list(rates) for rates in state["learning_rates"])
        self.costs = {layer: LayerCost(*cost) for layer, cost in state["costs"].items()}
        self.decision_seconds = state["decision_seconds"]
        self.events = [FreezeDecision(**event) for event in state["events"]]
        self._policy.load_state_dict(state["history"])
        self._adapter.unfreeze(thawed)  # what froze after the state was taken
        if not self.dry_run:
            self._adapter.freeze(list(self.frozen))


def stages_apart(policy: Policy, total_steps: int | None, record_every: int, decide_every: int) -> int:
    """`FreezeController.freeze_every` of a run in which at most `COMPILED_STAGES` stages freeze anything.

    Args:
        policy: Says how many records a run has if its length is not known; 1 if it does not either.
        total_steps: Optimizer steps of the whole run.
        record_every: In steps.
        decide_every: In records.
    """
    records = 1.0 if policy.record_fraction is None else 1.0 / policy.record_fraction
    if total_steps is not None:
        records = total_steps / record_every
    return max(1, math.ceil(records / decide_every / COMPILED_STAGES))


def require_version(state: dict[str, Any]) -> None:
    """Refuse a state that another version of smartfrz saved.

    Raises:
        StateError: If it did.
    """
    if state.get("version") != STATE_VERSION:
        raise StateError(
            f"The saved state has version {state.get('version')!r}; this version of smartfrz reads {STATE_VERSION}. "
            "Pass what state_dict() returned."
        )


_SCHEDULE = (
    "record_every",
    "decide_every",
    "threshold",
    "patience",
    "dry_run",
    "seed",
    "freeze_order",
    "freeze_every",
    "steps_per_change",
    "thaw_on_restart",
)


class Schedule(NamedTuple):
    """When a run records and decides, and how.

    Attributes:
        record_every: In steps.
        decide_every: In records.
        threshold: Confidence from which a layer is frozen.
        patience: In freezing stages.
        freeze_order: See `Ordering`.
    """

    record_every: int
    decide_every: int
    threshold: float
    patience: int
    freeze_order: FreezeOrder


def schedule(
    policy: Policy,
    total_steps: int | None = None,
    record_every: int | None = None,
    decide_every: int | None = None,
    threshold: float | None = None,
    patience: int | None = None,
    freeze_order: FreezeOrder | None = None,
) -> Schedule:
    """What is given by the user, and else what follows from the policy and the length of the run.

    Raises:
        ValueError: If a value is out of range, or neither `total_steps` nor `record_every` is given
            and the policy does not know either.
    """
    if freeze_order is None:
        freeze_order = policy.freeze_order
    if freeze_order not in ORDERS:
        raise ValueError(f"`freeze_order` is {freeze_order!r}; expected one of {', '.join(ORDERS)}.")
    counts = {
        "total_steps": total_steps,
        "record_every": record_every,
        "decide_every": decide_every,
        "patience": patience,
    }
    for name, value in counts.items():
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise ValueError(f"`{name}` is {value!r}; expected an integer of at least 1.")
    follows = policy.record_every(total_steps)
    if record_every is None:
        record_every = follows
    if record_every is None:
        raise ValueError(
            "SmartFRZ needs to know how long the run is: received neither `total_steps` nor `record_every`. Pass "
            "total_steps=len(loader) * epochs."
        )
    if threshold is None:
        threshold = policy.threshold
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` is {threshold!r}; expected a confidence in (0, 1].")
    # Not NumPy's integers: torch.load(weights_only=True) refuses those.
    return Schedule(
        int(record_every),
        int(policy.decide_every if decide_every is None else decide_every),
        float(threshold),
        int(policy.patience if patience is None else patience),
        freeze_order,
    )
