"""When to record, when to decide, and what has been decided. Knows no framework."""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

from smartfrz.control.budget import AskingBudget
from smartfrz.control.decision import FreezeDecision, Reason, decide
from smartfrz.control.learned import AsksPredictor, policy_of
from smartfrz.control.options import FreezeOptions, Schedule, stages_apart
from smartfrz.control.ordering import LayerCost, Ordering, backward_cost
from smartfrz.control.policy import Policy
from smartfrz.control.protocols import Adapter, OneProcess, OptimizerAdapter, Ranks, ReadsLater
from smartfrz.control.restarts import RestartWatch
from smartfrz.control.saying import warn_differences, warn_held, warn_moved, warn_unfrozen, warn_untrained
from smartfrz.control.state import check_contents, check_fields, sealed
from smartfrz.control.watch import Disturbance, FrozenWatch
from smartfrz.errors import StateError, UnsupportedModelError

logger = logging.getLogger("smartfrz")
STATE_VERSION = 3
# The attributes that a saved state carries over into the run that loads it.
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


class FreezeController:
    """Has the policy record, asks it at every freezing stage, and has layers frozen.

    Where the adapter reads weights later (`ReadsLater`) and the policy waits for weights, all that follows from a record,
    looking at the frozen layers included, happens after the next step; after the last step of the run it happens at once.

    Args:
        adapter: The model, as its framework's adapter shows it.
        predictor: A loaded predictor, or another policy.
        options: What the user chose.
        keep_one_of: Returns groups of layers, such as the layers of one optimizer. One layer of each group stays active.
        ranks: The processes that train together.

    Attributes:
        num_steps: Optimizer steps taken so far.
        num_records: Records taken so far.
        frozen: Layer name to the step at which it froze (in a dry run: would have).
        events: Every decision so far, oldest first.
        acts: Those of them that changed something (in a dry run: would have).
        just_looked: Whether layers were looked at, and decided about if it was a freezing stage, after the latest step.
        unpaid_steps: Steps of the stages at which layers were ready, but freezing them did not pay.
        decision_seconds: Time spent recording, deciding and freezing.
        costs: What each layer costs; empty if unknown.
        freeze_every: Freezing stages for each one at which anything is frozen; see `note_compiled`.
        steps_per_change: What a change of the frozen set costs, in training steps; see `set_change_cost`.
        layer_changes: Changes of the layers that may be frozen: the step, `joined` (the user unfroze it), `appeared`
            (it ran for the first time) or `left` (the user froze or removed it), and the layer.

    Raises:
        ValueError: If the length of the run is needed and unknown.
        UnsupportedModelError: If there is no layer to freeze, or the policy needs what the adapter lacks.
    """

    def __init__(
        self,
        adapter: Adapter,
        predictor: AsksPredictor | Policy,
        options: FreezeOptions,
        *,
        keep_one_of: Callable[[], Collection[Collection[str]]] | None = None,
        ranks: Ranks | None = None,
    ):
        self._policy = copy.copy(policy_of(predictor))  # one policy object may serve several runs
        self._options = options
        schedule = options.schedule(self._policy)
        self.record_every, self.decide_every, self.threshold, self.patience, self.freeze_order = schedule
        self.thaw_on_restart = options.thaw_on_restart
        self.total_steps = options.total_steps
        self.dry_run = options.dry_run
        self.seed = int(options.seed)
        self.freeze_every = 1
        self.costs: dict[str, LayerCost] = {}
        self.steps_per_change = 0.0
        self._prefix_is_cached = False
        self._adapter = adapter
        self._layers = adapter.layers()
        self._keep_one_of = keep_one_of
        self._ranks = ranks or OneProcess()
        _require_layers(self._layers)
        _require_methods(adapter, self._policy)
        self._policy.begin(adapter, self._layers, total_steps=self.total_steps, seed=self.seed)
        self.num_steps = 0
        self.num_records = 0
        self.frozen: dict[str, int] = {}
        self.events: list[FreezeDecision] = []
        self.acts: list[FreezeDecision] = []
        self.unpaid_steps: set[int] = set()
        self.decision_seconds = 0.0
        self._budget = AskingBudget()
        self._streaks: dict[str, int] = {}
        self._warned: set[str] = set()
        self._restarts = RestartWatch()
        self._watch = FrozenWatch()
        self._looked_at = 0  # the step at which the frozen layers were last seen to stand still
        self.just_looked = False
        self.layer_changes: list[tuple[int, str, str]] = []
        self._ranks.meet("the first step", self._facts())
        self._due: Literal["", "look", "stage"] = ""  # what follows, after the next step, from the latest record
        self._begun: Callable[[], Mapping[str, Disturbance]] | None = None  # looking at the frozen layers
        self._later = bool(self._policy.waits_for_weights and self._ranks.share(self._reads_later))

    def _reads_later(self) -> bool:
        return bool(getattr(self._adapter, "reads_later", False))

    def _facts(self) -> dict[str, Any]:
        """Return what has to be the same in every process."""
        return {
            "layers": {layer: self._adapter.num_weights(layer) for layer in self._layers},
            "predictor": self._policy.sha256,
            **{name: getattr(self, name) for name in _SCHEDULE},
        }

    @property
    def schedule(self) -> Schedule:
        """When this run records and decides, and how."""
        return Schedule(self.record_every, self.decide_every, self.threshold, self.patience, self.freeze_order)

    @property
    def steps_to_stage(self) -> int:
        """Steps until layers may freeze, at the next freezing stage; at least 1."""
        apart = self.record_every * self.decide_every
        return apart - max(0, self.num_steps - self._later) % apart

    @property
    def is_before_first_stage(self) -> bool:
        """True if the next step is the first freezing stage of the run."""
        return self.num_steps + 1 == self.record_every * self.decide_every

    @property
    def active(self) -> list[str]:
        """Layers that are still trained (in a dry run: would be), in execution order."""
        return [layer for layer in self._layers if layer not in self.frozen]

    # What adapters learn while training runs.

    def set_costs(self, costs: Mapping[str, LayerCost]) -> None:
        """Set what each layer costs in a training step."""
        self.costs = dict(costs)

    def note_compiled(self) -> None:
        """Freeze at a few stages of the run only: a change of the frozen set has the model compiled again.

        Layers that are ready at other stages wait. Calling it again changes nothing.
        """
        if self.freeze_every == 1:
            self.freeze_every = stages_apart(self._policy, self.total_steps, self.record_every, self.decide_every)

    def set_change_cost(self, steps: float) -> None:
        """Freeze nothing that saves less in the rest of the run than this.

        It takes known costs and a run of known length; else everything counts as worth freezing.

        Args:
            steps: What a change of the frozen set costs, in training steps.
        """
        self.steps_per_change = float(steps)

    def set_prefix_cached(self, cached: bool) -> None:
        """Set whether the outputs of a frozen prefix are cached: closing a prefix then saves its forward pass, too."""
        self._prefix_is_cached = cached

    def add_decision_seconds(self, seconds: float) -> None:
        """Count time that the adapter spent for the policy outside of `step`."""
        self.decision_seconds += seconds

    # The life of a run.

    def skip_step(self) -> None:
        """Count an optimizer step at which nothing is recorded or decided."""
        self.num_steps += 1
        self.just_looked = False

    @property
    def looks_next(self) -> bool:
        """Whether the next step is one at which layers are looked at and recorded."""
        return bool(self._due) or (self.num_steps + 1) % self.record_every == 0

    def records_within(self, steps: int) -> bool:
        """Return whether something is recorded in the next so many steps."""
        return (self.num_steps + steps) // self.record_every > self.num_steps // self.record_every

    def note_loss(self, loss: Any, weight: int = 1) -> None:
        """Tell the policy the training loss of the step that `step` counts next, if the policy reads losses.

        Args:
            loss: A float, or a scalar on a device, which is read with the weights.
            weight: The number of losses of which it is the mean.
        """
        if self._policy.reads_loss:
            self._policy.note_loss(loss, weight)

    def step(self) -> list[FreezeDecision]:
        """Record, decide and freeze if it is time to. Call it after every optimizer step.

        Returns:
            The decisions of this step; empty if it was not a freezing stage.
        """
        self.num_steps += 1
        self.just_looked = False
        start = time.perf_counter()
        decisions = self._catch_up()
        if self.num_steps % self.record_every == 0:
            decisions += self._record()
        self.set_lr_scales()
        self.decision_seconds += time.perf_counter() - start
        return decisions

    def _catch_up(self) -> list[FreezeDecision]:
        """Do what follows from the record after the step before, if it was put off."""
        due, self._due = self._due, ""
        decisions = self._look(seen_at=self.num_steps - 1) if due else []
        return decisions + (self._stage() if due == "stage" else [])

    def _record(self) -> list[FreezeDecision]:
        later = self._later and self.num_steps != self.total_steps
        decisions = [] if later or self.just_looked else self._look(seen_at=self.num_steps)
        asks = False
        if len(self.active) > 1:  # the last layer is always kept
            self.num_records += 1
            asks = self.num_records % self.decide_every == 0
            self._policy.record(self.active, ask=asks)
        if later:
            self._due = "stage" if asks else "look"
            self._begun = self._begin_to_look()
            return []
        return decisions + (self._stage() if asks else [])

    def _begin_to_look(self) -> Callable[[], Mapping[str, Disturbance]] | None:
        """Compare the frozen layers of now without waiting for the answer."""
        if self.dry_run or not self.frozen:
            return None
        return cast(ReadsLater, self._adapter).disturbed_later(list(self.frozen))

    def _look(self, *, seen_at: int) -> list[FreezeDecision]:
        """Look whether the layers are still the same, and whether what is frozen stands still.

        Args:
            seen_at: The step after which the weights were what they are compared as.
        """
        self._ranks.meet(f"step {self.num_steps}", {"active": self.active})
        found = self._ranks.share(self._find)
        self._follow(found["layers"])
        thawed = self._settle(found["disturbed"])
        self._looked_at, self._begun, self.just_looked = seen_at, None, True
        return thawed

    def _find(self) -> dict[str, Any]:
        layers = self._adapter.find_layers()
        disturbed = self._find_disturbed() if self._begun is None else self._begun()
        return {"layers": layers, "disturbed": {key: what for key, what in disturbed.items() if key in self.frozen}}

    def _find_disturbed(self) -> dict[str, Disturbance]:
        return {} if self.dry_run or not self.frozen else dict(self._adapter.disturbed(list(self.frozen)))

    def _follow(self, layers: list[str]) -> None:
        """Go on with these layers: others than before if the user froze or unfroze some, or if some ran only now."""
        if layers == self._layers:
            return
        known, before = set(self._adapter.all_layers()), set(self._layers)
        self._adapter.set_layers(layers)
        self._layers = list(layers)
        for layer in layers:
            if layer not in before:
                self.layer_changes.append((self.num_steps, "joined" if layer in known else "appeared", layer))
        for layer in sorted(before.difference(layers)):
            self.layer_changes.append((self.num_steps, "left", layer))
            self.frozen.pop(layer, None)
            self._policy.drop(layer)
            self._streaks.pop(layer, None)
        self._policy.layers_changed(self._layers)
        logger.info("From step %d on %d layers may be frozen; before, %d.", self.num_steps, len(layers), len(before))

    def _settle(self, disturbed: Mapping[str, Disturbance]) -> list[FreezeDecision]:
        """Freeze disturbed layers again, or thaw them; see `FrozenWatch`."""
        verdict = self._watch.judge(disturbed, list(self.frozen))
        if verdict.set_back:
            self._adapter.freeze(verdict.set_back)
        if verdict.held:
            warn_held(verdict.held)
        decisions = []
        if verdict.believed:
            trained = [layer for layer in verdict.believed if disturbed.get(layer) == "trained"]
            decisions = self.thaw(verdict.believed, "unfrozen_by_user", self._stood_still(trained))
            warn_unfrozen(verdict.believed, self.num_steps)
        for what in dict.fromkeys(verdict.moved.values()):
            layers = [layer for layer, found in verdict.moved.items() if found == what]
            since = self._stood_still(layers)
            decisions += self.thaw(layers, "moved_while_frozen", since)
            warn_moved(layers, what, min(since.values()), self.num_steps)
        return decisions

    def _stood_still(self, layers: Sequence[str]) -> dict[str, int]:
        """Return the last step at which each of these frozen layers was seen to stand still."""
        return {layer: max(self.frozen[layer], self._looked_at) for layer in layers}

    def set_lr_scales(self) -> None:
        """Have the policy scale the learning rate of each active layer for the next step.

        `step` and `thaw` do it; adapters call it before the first step, and after a state was loaded.
        """
        if self.dry_run:
            return
        for layer, scale in self._policy.lr_scales(self.active, step=self.num_steps).items():
            cast(OptimizerAdapter, self._adapter).set_lr_scale(layer, scale)

    def _stage(self) -> list[FreezeDecision]:
        active = self.active
        if len(active) <= 1:  # the others have left since the record
            return []
        shared = self._ranks.share(lambda: self._decide(active))
        decisions = [FreezeDecision(**decision) for decision in shared["decisions"]]
        self._streaks = dict(shared["streaks"])
        self.events += decisions
        chosen = [d for d in decisions if d.action != "keep"]
        self.acts += chosen
        self._freeze(chosen)
        return decisions

    def _freeze(self, chosen: list[FreezeDecision]) -> None:
        if chosen and not self.dry_run:
            self._adapter.freeze([decision.layer for decision in chosen])
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

    def _decide(self, active: list[str]) -> dict[str, Any]:
        """Return decisions and streaks as plain data: no decisions and the same streaks where asking takes too long."""
        excused = self._excused(active)
        asked = [layer for layer in active if layer not in excused]
        hold = self.num_records // self.decide_every % self.freeze_every != 0
        if asked and self._policy.has_budget and not self._budget.allows(freezes=not hold):
            return {"decisions": [], "streaks": self._streaks}
        with self._budget:
            confidence = self._policy.confidence(asked, step=self.num_steps)
        make = partial(
            decide,
            active,
            confidence,
            excused,
            self._streaks,
            step=self.num_steps,
            timestamp=self.num_records - 1,
            ordering=self._ordering(),
            patience=self.patience,
            dry_run=self.dry_run,
            keep_one_of=self._keep_one_of() if self._keep_one_of else (),
        )
        decisions, streaks = make(hold=hold)
        chosen = [decision.layer for decision in decisions if decision.action != "keep"]
        if not self._pays(active, chosen):
            decisions, streaks = make(hold=True)
            self.unpaid_steps.add(self.num_steps)
        return {"decisions": [dataclasses.asdict(decision) for decision in decisions], "streaks": streaks}

    def _ordering(self) -> Ordering:
        return Ordering(
            self._adapter.all_layers(), self.threshold, self.freeze_order, self.costs, self._prefix_is_cached
        )

    def _excused(self, active: list[str]) -> dict[str, Reason]:
        excused = self._policy.excused(active)
        excused |= self._find_untrained([layer for layer in active if excused.get(layer) != "not_finite"])
        excused |= {layer: "moved_while_frozen" for layer in active if layer in self._watch.barred}
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

    def _find_untrained(self, active: list[str]) -> dict[str, Reason]:
        """Return the layers that are not trained: standing still, they would pass for converged."""
        found = self._adapter.untrained(active)
        for why in dict.fromkeys(found.values()):
            new = [x for x, reason in found.items() if reason == why and f"{why}: {x}" not in self._warned]
            self._warned.update(f"{why}: {layer}" for layer in new)
            # Schedules may end with a learning rate of 0.
            if new and self.num_steps != self.total_steps:
                warn_untrained(new, why, self.num_steps)
        return dict.fromkeys(found, "not_trained")

    def _pays(self, active: list[str], chosen: list[str]) -> bool:
        """Return whether freezing these layers saves more in the rest of the run than the change costs."""
        if not (chosen and self.steps_per_change and self.costs and self.total_steps):
            return True
        layers = self._adapter.all_layers()
        stopped = set(layers).difference(active)
        now = backward_cost(layers, stopped, self.costs)[0]
        then = backward_cost(layers, stopped.union(chosen), self.costs)[0]
        step = now + sum(self.costs[layer].forward for layer in layers)
        return (self.total_steps - self.num_steps) * (now - then) >= self.steps_per_change * step

    def thaw(
        self,
        layers: Sequence[str] | None = None,
        reason: Reason = "by_hand",
        since: Mapping[str, int] | None = None,
    ) -> list[FreezeDecision]:
        """Train layers again that this controller froze; they may freeze again later.

        A decision that is still due from the latest record is dropped, even if nothing is frozen yet.

        Args:
            layers: Names of the layers; all by default. Layers that are not frozen stay as they are.
            reason: The reason that the decisions give.
            since: For layers that were trained or moved while frozen, the last step at which they stood still.

        Returns:
            One decision for each layer that was thawed.

        Raises:
            ValueError: If a name belongs to no layer, or to a layer that the user froze.
        """
        thawed = self._frozen_among(layers)
        if not thawed and self._due != "stage":  # else the decision that is due is dropped
            return []
        self._ranks.meet(f"thawing after step {self.num_steps}", {"layers": thawed})
        if not self.dry_run:
            self._adapter.unfreeze(thawed)
        self._watch.thawed(thawed)
        # The other layers were judged while these were frozen, perhaps long ago: patience starts over, and nothing is
        # decided from a record before.
        self._streaks.clear()
        self._due = "look" if self._due else ""
        decisions = [self._thawing(layer, reason, (since or {}).get(layer)) for layer in thawed]
        for layer in thawed:
            del self.frozen[layer]
            logger.info("thaw %s at step %d (%s)", layer, self.num_steps, reason)
        self.events += decisions
        self.acts += decisions
        self.set_lr_scales()
        return decisions

    def _thawing(self, layer: str, reason: Reason, since: int | None) -> FreezeDecision:
        return FreezeDecision(self.num_steps, self.num_records - 1, layer, float("nan"), "thaw", reason, since=since)

    def _frozen_among(self, layers: Sequence[str] | None) -> list[str]:
        if isinstance(layers, str):
            layers = [layers]
        unknown = [layer for layer in layers or () if layer not in self._layers]
        if unknown:
            raise ValueError(
                f"`layers` names {unknown[:3]}, which SmartFRZ cannot thaw; expected names among frozen_layers: "
                f"{list(self.frozen)}."
            )
        return [layer for layer in self.frozen if layers is None or layer in layers]

    def observe_learning_rates(self, rates: Sequence[float]) -> list[FreezeDecision]:
        """Thaw every layer if the learning rate was raised again: what had converged no longer has.

        Call it after every step if `thaw_on_restart` is set.

        Args:
            rates: The learning rate of each parameter group.

        Returns:
            One decision for each layer that was thawed.
        """
        freezes = bool(self.frozen) or self._due == "stage"  # it may freeze layers one step later
        raised = self._restarts.is_restart(rates, frozen=freezes)
        return self.thaw(reason="learning_rate_raised") if raised else []

    # Saving and resuming.

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to decide as an uninterrupted one: plain data and arrays.

        What has moved since the last record, although it is frozen, is not frozen in the state.
        """
        thaws, watch = self._find_moved()
        state = {
            "version": STATE_VERSION,
            "predictor": self._policy.sha256,
            "layers": list(self._layers),
            "schedule": {name: getattr(self, name) for name in _SCHEDULE},
            "total_steps": self.total_steps,
            "num_steps": self.num_steps,
            "num_records": self.num_records,
            "frozen": {layer: step for layer, step in self.frozen.items() if layer not in {e.layer for e in thaws}},
            "streaks": dict(self._streaks),
            "warned": sorted(self._warned),
            "learning_rates": self._restarts.state(),
            "costs": {layer: dataclasses.astuple(cost) for layer, cost in self.costs.items()},
            "decision_seconds": self.decision_seconds,
            "events": [dataclasses.asdict(event) for event in [*self.events, *thaws]],
            "unpaid_steps": sorted(self.unpaid_steps),
            "history": self._policy.state_dict(),
            "watch": watch.state(),
            "looked_at": self._looked_at,
            "layer_changes": [list(change) for change in self.layer_changes],
        }
        return sealed(state | ({"due": self._due} if self._due else {}))

    def _find_moved(self) -> tuple[list[FreezeDecision], FrozenWatch]:
        """Return how frozen layers that have moved will be thawed at the next look, without doing it."""
        moved = {layer: what for layer, what in self._find_disturbed().items() if what != "trainable"}
        watch = copy.deepcopy(self._watch)
        verdict = watch.judge(moved, list(moved))
        since = self._stood_still(list(moved))
        thaws = [self._thawing(layer, "unfrozen_by_user", since[layer]) for layer in verdict.believed]
        thaws += [self._thawing(layer, "moved_while_frozen", since[layer]) for layer in verdict.moved]
        return thaws, watch

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise if `load_state_dict` would refuse this state. Nothing is changed.

        Raises:
            StateError: If the state belongs to another model, predictor or version, or was damaged.
        """
        require_version(state)
        check_fields(state)
        if state["predictor"] != self._policy.sha256:
            raise StateError(
                f"The saved state was made with predictor {state['predictor'][:12]}..., this run has "
                f"{self._policy.name!r} ({self._policy.sha256[:12]}...). Resume with the same predictor file, or policy "
                "with the same settings."
            )
        if state["layers"] != self._layers:
            unknown = sorted(set(state["layers"]) ^ set(self._layers))
            raise StateError(
                f"The saved state belongs to a model with {len(state['layers'])} layers, this one has {len(self._layers)}; "
                f"they differ in {unknown[:4] or 'their order'}. Resume with the same model."
            )
        self._policy.check_state_dict(state["history"])
        check_contents(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called: what it had frozen is frozen, and nothing else.

        What the options of this run leave open goes on as it was saved. Where they differ from the saved run, the
        options count, except for the seed, and the differences are logged: records that were taken at other
        distances are forgotten, and so is what a dry run would have frozen.

        Raises:
            StateError: If the state belongs to another model, predictor or version, or was damaged. Nothing is changed
                then.
        """
        self.check_state(state)
        frozen = dict(state["frozen"])
        if state["schedule"]["dry_run"] and not self.dry_run:
            frozen = {}  # it was trained all the time, and has no history
        chosen = self._chosen(state)
        saved = {name: state[name] for name in ("num_steps", "num_records")}
        self._ranks.meet("loading a state", {"schedule": chosen, "frozen": frozen, **saved})
        warn_differences(state, chosen, self._options)
        for name, value in chosen.items():
            setattr(self, name, value)
        self._policy.begin(self._adapter, self._layers, total_steps=self.total_steps, seed=self.seed)
        self.num_steps = state["num_steps"]
        self.num_records = state["num_records"]
        thawed = [layer for layer in self.frozen if layer not in frozen]
        self.frozen = frozen
        same_pace = self.record_every == state["schedule"]["record_every"]
        self._streaks = dict(state["streaks"]) if same_pace else {}
        self._due = state.get("due", "") if same_pace else ""
        self._begun, self.just_looked = None, False
        self._warned = set(state["warned"])
        self._restarts.load_state(state["learning_rates"])
        self.costs = {layer: LayerCost(*cost) for layer, cost in state["costs"].items()}
        self.decision_seconds = state["decision_seconds"]
        fields = [field.name for field in dataclasses.fields(FreezeDecision)]
        self.events = [FreezeDecision(**{name: event[name] for name in fields}) for event in state["events"]]
        self.acts = [event for event in self.events if event.action != "keep"]
        self.unpaid_steps = set(state["unpaid_steps"])
        if same_pace:
            self._policy.load_state_dict(state["history"])
        self._watch.load_state(state["watch"])
        self._looked_at = state["looked_at"]
        self.layer_changes = [(step, what, layer) for step, what, layer in state["layer_changes"]]
        self._adapter.unfreeze(thawed)  # what froze after the state was saved
        if not self.dry_run:
            self._adapter.freeze(list(self.frozen))

    def _chosen(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return how a saved run goes on: every name of `_SCHEDULE`, and `total_steps`."""
        saved = state["schedule"]
        schedule, total_steps = self._options.continuing(
            self._policy, {name: saved[name] for name in Schedule._fields}, state["total_steps"]
        )
        same_pace = (total_steps, schedule.record_every) == (state["total_steps"], saved["record_every"])
        return {
            **{name: saved[name] for name in _SCHEDULE},
            **schedule._asdict(),
            "total_steps": total_steps,
            "dry_run": self._options.dry_run,
            # False is what it is when left out.
            "thaw_on_restart": self._options.thaw_on_restart or saved["thaw_on_restart"],
            # Adapters set it again where the model is compiled.
            "freeze_every": saved["freeze_every"] if same_pace else 1,
        }


def require_version(state: Mapping[str, Any]) -> None:
    """Refuse a state that another version of smartfrz saved.

    Raises:
        StateError: If it did.
    """
    version = state.get("version")
    if not isinstance(version, int) or version != STATE_VERSION:
        raise StateError(
            f"The saved state has version {version!r}; this version of smartfrz reads {STATE_VERSION}. "
            "Pass what state_dict() returned."
        )


def _require_layers(layers: list[str]) -> None:
    if not layers:
        raise UnsupportedModelError(
            "The model has 0 layers that can be trained; SmartFRZ expected at least two, since the last one is always "
            "kept. Train without it, or unfreeze layers before the first step."
        )


def _require_methods(adapter: Adapter, policy: Policy) -> None:
    needs = {
        "set_lr_scale": policy.scales_learning_rates,
        "gradient_norm": policy.reads_gradients,
        "gradient_changes": policy.compares_gradients,
    }
    lacking = [method for method, needed in needs.items() if needed and not hasattr(adapter, method)]
    if lacking:
        raise UnsupportedModelError(
            f"The policy {policy.name!r} needs an adapter with the method `{lacking[0]}`, which "
            f"{type(adapter).__name__} does not have. Train with PyTorch's SmartFRZ, or with another policy "
            "(LinearFreezing(anneal=False) leaves learning rates alone)."
        )
