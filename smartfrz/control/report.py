"""`Report`: what SmartFRZ did in a run; the same for every framework."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

from smartfrz.control.controller import FreezeController
from smartfrz.control.ordering import LayerCost, backward_cost
from smartfrz.control.saying import explain_nothing_frozen

_LAYER_CHANGES = {
    "joined": "Unfrozen by the training script, and watched since",
    "appeared": "Ran for the first time later, and watched since",
    "left": "Frozen or removed by the training script, and no longer watched",
}


class ReportedLayer(Protocol):
    """What a report needs to know about a layer."""

    @property
    def name(self) -> str:
        """Name of the layer."""
        ...

    @property
    def forward_flops(self) -> int:
        """Floating point operations of the layer's forward pass."""
        ...


@dataclass(frozen=True)
class CacheUse:
    """What an activation cache did in a run.

    Attributes:
        cut: The module whose inputs are kept; None if nothing is kept.
        reason: Why nothing is kept.
        hits: Samples whose prefix was not run.
        misses: Samples that were computed since the cache began.
        memory_bytes: Memory in use.
        disk_bytes: Disk space in use.
        seconds_saved: Time of the prefixes that were not run, minus what the cache itself cost.
    """

    cut: str | None = None
    reason: str | None = None
    hits: int = 0
    misses: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    seconds_saved: float = 0.0

    def __str__(self) -> str:
        state = f"keeps the inputs of {self.cut!r}" if self.cut is not None else f"is not in use: {self.reason}"
        return (
            f"The activation cache {state}. {self.hits} samples read, {self.misses} computed; "
            f"{self.memory_bytes / 1e6:.1f} MB of memory and {self.disk_bytes / 1e6:.1f} MB of disk; "
            f"{self.seconds_saved:.1f} s of forward passes saved, its own cost deducted."
        )


@dataclass(frozen=True)
class Report:
    """What SmartFRZ did in a run; `print` it.

    Attributes:
        layers: Every layer, in execution order.
        frozen: Layer name to the step at which it froze (in a dry run: would have), without layers
            that were thawed since.
        user_frozen: Layers that the user has frozen.
        moved: Layers that moved although they were frozen. They were thawed, and count as trained from the last step on
            at which they were seen to stand still.
        changes: (step, `freeze`, `would_freeze` or `thaw`, layer), oldest first.
        num_steps: Optimizer steps so far.
        seconds: Time from the first to the latest `freezer.step()`.
        decision_seconds: The part of `seconds` spent recording, deciding and freezing.
        dry_run: Whether nothing was really frozen.
        reentrant: Whether the model uses reentrant gradient checkpointing, under which gradients
            must pass through the frozen prefix too.
        compiler: What compiles the model: `torch.compile`, or Keras, which compiles its training function.
        num_compilations: Number of compilations in this process since SmartFRZ was made.
        compile_seconds: Time that they took.
        num_recompilations: Number of compilations after layers first froze.
        recompile_seconds: Time that these took.
        per_example: Whether the layers' FLOPs are counted for one example instead of one step.
        uncounted: Layers that compute, but whose FLOPs are unknown, and 0 in all sums.
        cache: What the activation cache did; None without a cache.
        why_nothing: Why no layer ever froze, one line for each reason; empty if one did.
        layer_changes: (step, `joined`, `appeared` or `left`, layer): layers that the user unfroze, that ran for the first
            time, or that the user froze or removed, oldest first.
    """

    layers: Sequence[ReportedLayer] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    user_frozen: set[str] = field(default_factory=set)
    changes: list[tuple[int, str, str]] = field(default_factory=list)
    num_steps: int = 0
    seconds: float = 0.0
    decision_seconds: float = 0.0
    dry_run: bool = False
    reentrant: bool = False
    compiler: str = "torch.compile"
    num_compilations: int = 0
    compile_seconds: float = 0.0
    num_recompilations: int = 0
    recompile_seconds: float = 0.0
    per_example: bool = False
    uncounted: Collection[str] = ()
    cache: CacheUse | None = None
    why_nothing: list[str] = field(default_factory=list)
    layer_changes: list[tuple[int, str, str]] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        controller: FreezeController,
        layers: Sequence[ReportedLayer],
        trained: Collection[str],
        seconds: float,
        **others: Any,
    ) -> "Report":
        """Make the report of a run.

        Args:
            controller: The controller of the run.
            layers: Every layer, in execution order.
            trained: Names of the layers that the user did not freeze.
            seconds: Time from the first to the latest step.
            **others: What only the adapter knows, as named in the attributes.
        """
        return cls(
            layers=layers,
            frozen=dict(controller.frozen),
            user_frozen={layer.name for layer in layers} - set(trained),
            changes=sorted(
                (
                    (e.step if e.since is None else e.since, e.action, e.layer)
                    for e in controller.events
                    # A dry run that goes on for real has saved nothing so far.
                    if e.action != "keep" and (controller.dry_run or e.action != "would_freeze")
                ),
                key=lambda change: change[0],
            ),
            layer_changes=list(controller.layer_changes),
            moved=list(
                dict.fromkeys(
                    e.layer for e in controller.events if e.action == "thaw" and e.reason == "moved_while_frozen"
                )
            ),
            num_steps=controller.num_steps,
            seconds=seconds,
            decision_seconds=controller.decision_seconds,
            dry_run=controller.dry_run,
            why_nothing=[]
            if any(e.action in ("freeze", "would_freeze") for e in controller.events)
            else explain_nothing_frozen(controller.events, controller.unpaid_steps, trained),
            **others,
        )

    @cached_property
    def _savings(self) -> tuple[int, int, int]:
        """Backward FLOPs of the run: without freezing, saved in the prefix, and saved in the interior.

        A weight gradient costs as much as the forward pass; so does an input gradient.
        """
        names = [layer.name for layer in self.layers]
        marks = {0, *(step for step, _, _ in (*self.changes, *self.layer_changes))}
        total = prefix = interior = 0.0
        for start, end in pairwise([*sorted(marks), self.num_steps]):
            untrained, stopped = self._untrained(start), self._stopped(start)
            # What the user froze is no saving of SmartFRZ.
            costs = {
                layer.name: LayerCost(
                    layer.forward_flops, layer.forward_flops, 0 if layer.name in untrained else layer.forward_flops
                )
                for layer in self.layers
            }
            full = backward_cost(names, untrained, costs)
            total += (end - start) * full[0]
            if self.reentrant:
                interior += (end - start) * sum(costs[name].weight_gradient for name in stopped)
                continue
            now = backward_cost(names, untrained | stopped, costs)
            prefix += (end - start) * (now[1] - full[1])
            interior += (end - start) * (now[2] - full[2])
        return round(total), round(prefix), round(interior)

    def _stopped(self, step: int) -> set[str]:
        """Return the layers that SmartFRZ keeps frozen right after this step."""
        stopped: set[str] = set()
        everything = sorted([*self.layer_changes, *self.changes], key=lambda change: change[0])
        for when, action, layer in everything:
            if when <= step:
                (stopped.add if action in ("freeze", "would_freeze") else stopped.discard)(layer)
        return stopped

    def _untrained(self, step: int) -> set[str]:
        """Return the layers that the user had frozen, or that had not run yet, right after this step."""
        untrained = set(self.user_frozen)
        for when, action, layer in reversed(self.layer_changes):
            if when > step:
                (untrained.discard if action == "left" else untrained.add)(layer)
        return untrained

    def frozen_spans(self) -> dict[str, list[tuple[int, int]]]:
        """Return the spans (first step, last step) in which each layer was frozen (in a dry run: would have been).

        Layers that the user froze are frozen as long as the user keeps them so.
        """
        spans: dict[str, list[tuple[int, int]]] = {}
        appeared = {layer for _, action, layer in self.layer_changes if action == "appeared"}
        since = dict.fromkeys(sorted(self._untrained(-1) - appeared), 0)
        for step, action, layer in sorted([*self.layer_changes, *self.changes], key=lambda change: change[0]):
            if action in ("freeze", "would_freeze", "left"):
                since.setdefault(layer, step)
            elif layer in since:
                spans.setdefault(layer, []).append((since.pop(layer), step))
        for layer, step in since.items():
            spans.setdefault(layer, []).append((step, self.num_steps))
        return spans

    @property
    def backward_flops(self) -> int:
        """Backward FLOPs of all layers in the run so far, had nothing been frozen; estimated from the first step."""
        return self._savings[0]

    @property
    def backward_flops_saved(self) -> int:
        """The part of `backward_flops` that freezing saved (in a dry run: would have)."""
        return self._savings[1] + self._savings[2]

    @property
    def backward_flops_saved_by_prefix(self) -> int:
        """The part saved in the frozen prefix, where no gradient at all is computed."""
        return self._savings[1]

    @property
    def backward_flops_saved_by_interior(self) -> int:
        """The part saved behind a live layer: weight gradients only."""
        return self._savings[2]

    def scalars(self) -> dict[str, float]:
        """Return the number of frozen layers and the share of backward saved, for the logs of a framework."""
        saved = self.backward_flops_saved / max(self.backward_flops, 1)  # in a dry run: what would have been saved
        frozen = 0 if self.dry_run else len(self.frozen)
        return {"smartfrz/frozen_layers": float(frozen), "smartfrz/backward_saved": round(saved, 4)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for a log."""
        return {
            "num_layers": len(self.layers),
            "frozen": dict(self.frozen),
            "user_frozen": sorted(self.user_frozen),
            "changes": [list(change) for change in self.changes],
            "layer_changes": [list(change) for change in self.layer_changes],
            "moved": list(self.moved),
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "decision_seconds": self.decision_seconds,
            "backward_flops": self.backward_flops,
            "backward_flops_saved": self.backward_flops_saved,
            "backward_flops_saved_by_prefix": self.backward_flops_saved_by_prefix,
            "backward_flops_saved_by_interior": self.backward_flops_saved_by_interior,
            "num_compilations": self.num_compilations,
            "compile_seconds": self.compile_seconds,
            "num_recompilations": self.num_recompilations,
            "recompile_seconds": self.recompile_seconds,
            "per_example": self.per_example,
            "uncounted": list(self.uncounted),
            "dry_run": self.dry_run,
            "why_nothing": list(self.why_nothing),
            "cache": None if self.cache is None else asdict(self.cache),
        }

    def __str__(self) -> str:
        if not self.num_steps:
            return "SmartFRZ: no step yet."
        what = "would have frozen" if self.dry_run else "froze"
        ever = {layer for _, action, layer in self.changes if action != "thaw"}
        lines = [f"SmartFRZ {what} {len(ever)} of {len(self.layers)} layers in {self.num_steps} steps."]
        lines += [f"  {reason}" for reason in self.why_nothing]
        stopped = set(self.frozen) | self.user_frozen
        prefix = next((i for i, layer in enumerate(self.layers) if layer.name not in stopped), len(self.layers))
        left = {layer for _, action, layer in self.layer_changes if action == "left"}
        if self.user_frozen - left:
            lines.append(f"{len(self.user_frozen - left)} layers were frozen before.")
        if stopped:
            lines.append(
                f"The frozen prefix is {prefix} layers long; {len(stopped) - prefix} frozen layers are behind it."
            )
        groups: dict[tuple[int, bool], list[str]] = {}
        for step, action, layer in self.changes:
            groups.setdefault((step, action == "thaw"), []).append(layer)
        for (step, thawed), names in groups.items():
            lines.append(
                f"  step {step:>6} ({step / self.num_steps:4.0%}): {'thawed ' if thawed else ''}{_shorten(names)}"
            )
        for what, says in _LAYER_CHANGES.items():
            names = [layer for _, action, layer in self.layer_changes if action == what]
            if names:
                lines.append(f"{says}: {_shorten(names)}.")
        if self.moved:
            lines.append(f"Moved although they were frozen, and therefore thawed for good: {_shorten(self.moved)}.")
        if self.backward_flops:
            share = self.backward_flops_saved / self.backward_flops
            unit, name, basis = 1e12, "TFLOPs", "estimated from the first step"
            if self.per_example:
                unit, name, basis = 1e9, "GFLOPs for each example of a batch", "estimated from shapes"
            lines.append(
                f"Backward computation saved: {self.backward_flops_saved / unit:.3g} of "
                f"{self.backward_flops / unit:.3g} {name} ({share:.0%}), {basis}: "
                f"{self._share(self.backward_flops_saved_by_prefix)} in the frozen prefix, "
                f"{self._share(self.backward_flops_saved_by_interior)} behind it."
            )
            if self.uncounted:
                lines.append(
                    f"That leaves out layers whose operations cannot be counted: {_shorten(list(self.uncounted))}."
                )
        elif self.uncounted:
            lines.append("Backward computation saved: unknown, since operations of the layers cannot be counted.")
        share = self.decision_seconds / self.seconds if self.seconds else 0.0
        lines.append(
            f"Recording and deciding took {self.decision_seconds:.2f} s ({share:.1%} of {self.seconds:.1f} s)."
        )
        if self.num_compilations:
            lines.append(
                f"{self.compiler} compiled {self.num_compilations} times in {self.compile_seconds:.1f} s; "
                f"{self.num_recompilations} times and {self.recompile_seconds:.1f} s of that after layers froze."
            )
        if self.cache is not None:
            lines.append(str(self.cache))
        return "\n".join(lines)

    def _share(self, flops: int) -> str:
        return f"{flops / self.backward_flops:.0%}"


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
