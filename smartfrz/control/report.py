"""`Report`: what SmartFRZ did in a run; the same for every framework."""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

from smartfrz.control.controller import FreezeController
from smartfrz.control.decision import FreezeDecision
from smartfrz.control.ordering import LayerCost, backward_cost
from smartfrz.control.pace import Interval, Saving, measure_saving
from smartfrz.control.saying import explain_nothing_frozen
from smartfrz.errors import MissingDependencyError
from smartfrz.files import replacing
from smartfrz.report_page import fragment, page

# A report of 10,000 records and 200 layers has a million confidences: so many stages, and points of a curve, are kept.
_MAX_STAGES = 300
_MAX_POINTS = 500
T = TypeVar("T")
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


@dataclass(frozen=True, repr=False)
class Report:
    """What SmartFRZ did in a run: `print` it, or `save` it as a page to look at.

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
        decisions: Every decision about a layer, oldest first, with its confidence.
        intervals: How fast training steps were, from record to record. After a resume it begins anew.
        curves: Loss, accuracy and whatever else is known: points (step, value) for each name. After a resume they begin
            anew.
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
    decisions: Sequence[FreezeDecision] = ()
    intervals: Sequence[Interval] = ()
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        controller: FreezeController,
        layers: Sequence[ReportedLayer],
        trained: Collection[str],
        seconds: float,
        *,
        whole: bool = True,
        **others: Any,
    ) -> "Report":
        """Make the report of a run.

        Args:
            controller: The controller of the run.
            layers: Every layer, in execution order.
            trained: Names of the layers that the user did not freeze.
            seconds: Time from the first to the latest step.
            whole: Whether it tells every decision, and why nothing froze. `scalars` needs neither, and they take time.
            **others: What only the adapter knows, as named in the attributes.
        """
        return cls(
            layers=layers,
            frozen=dict(controller.frozen),
            user_frozen={layer.name for layer in layers} - set(trained),
            changes=sorted(
                (
                    (e.step if e.since is None else e.since, e.action, e.layer)
                    for e in controller.acts
                    # A dry run that goes on for real has saved nothing so far.
                    if controller.dry_run or e.action != "would_freeze"
                ),
                key=lambda change: change[0],
            ),
            layer_changes=list(controller.layer_changes),
            moved=list(
                dict.fromkeys(
                    e.layer for e in controller.acts if e.action == "thaw" and e.reason == "moved_while_frozen"
                )
            ),
            decisions=list(controller.events) if whole else (),
            num_steps=controller.num_steps,
            seconds=seconds,
            decision_seconds=controller.decision_seconds,
            dry_run=controller.dry_run,
            why_nothing=explain_nothing_frozen(controller.events, controller.unpaid_steps, trained)
            if whole and not any(e.action != "thaw" for e in controller.acts)
            else [],
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
        for layer, parts in self.owned_spans().items():
            merged = spans.setdefault(layer, [])
            for start, end, _ in parts:
                if merged and merged[-1][1] == start:
                    start = merged.pop()[0]
                merged.append((start, end))
        return spans

    def owned_spans(self) -> dict[str, list[tuple[int, int, str]]]:
        """Return what `frozen_spans` returns, and who froze the layer in each span: `smartfrz` or `user`."""
        spans: dict[str, list[tuple[int, int, str]]] = {}
        appeared = {layer for _, action, layer in self.layer_changes if action == "appeared"}
        since = {layer: (0, "user") for layer in sorted(self._untrained(-1) - appeared)}
        for step, action, layer in sorted([*self.layer_changes, *self.changes], key=lambda change: change[0]):
            owner = {"freeze": "smartfrz", "would_freeze": "smartfrz", "left": "user"}.get(action)
            start, before = since.get(layer, (step, None))
            if owner == before:
                continue
            if before is not None:
                spans.setdefault(layer, []).append((start, step, before))
                del since[layer]
            if owner is not None:
                since[layer] = (step, owner)
        for layer, (start, owner) in since.items():
            spans.setdefault(layer, []).append((start, self.num_steps, owner))
        return spans

    @cached_property
    def saving(self) -> Saving | None:
        """What freezing did to the wall time of this run's own steps, what it cost deducted; see `measure_saving`.

        None in a dry run, and where nothing was frozen or nothing was measured before layers froze.
        """
        if self.dry_run:
            return None
        return measure_saving(self.intervals, self.decision_seconds + self.recompile_seconds)

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
        """Return plain data that JSON can hold; docs/report.md describes every key with its unit.

        Long runs are thinned out: at most 300 freezing stages, besides those at which something froze or thawed, and at
        most 500 points of a curve. Numbers that are not finite are None.
        """
        saving = self.saving
        return {
            "num_layers": len(self.layers),
            "layers": [layer.name for layer in self.layers],
            "frozen": dict(self.frozen),
            "user_frozen": sorted(self.user_frozen),
            "spans": {layer: [list(span) for span in spans] for layer, spans in self.owned_spans().items()},
            "changes": [list(change) for change in self.changes],
            "layer_changes": [list(change) for change in self.layer_changes],
            "moved": list(self.moved),
            "acts": [
                {key: _finite(value) for key, value in asdict(decision).items()}
                for decision in self.decisions
                if decision.action != "keep"
            ],
            "stages": self._stages(),
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "measured_seconds": {
                "saved": None if saving is None else saving.seconds,
                "step_before": None if saving is None else saving.before,
                "step_after": None if saving is None else saving.after,
                "steps": [list(point) for point in _thin(_paces(self.intervals), _MAX_POINTS)],
            },
            "curves": {
                name: [[step, _finite(value)] for step, value in _thin(points, _MAX_POINTS)]
                for name, points in self.curves.items()
            },
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

    def _stages(self) -> dict[str, Any]:
        """Return what each layer was judged at each freezing stage that is kept, None where it was not judged."""
        found: dict[int, dict[str, FreezeDecision]] = {}
        acted = set()
        for decision in self.decisions:
            if decision.action != "thaw":
                found.setdefault(decision.step, {})[decision.layer] = decision
                if decision.action != "keep":
                    acted.add(decision.step)
        steps = sorted({*_thin(list(found), _MAX_STAGES), *acted})
        columns = [found[step] for step in steps]
        layers = [layer.name for layer in self.layers if any(layer.name in column for column in columns)]
        return {
            "steps": steps,
            "confidence": {x: [_rounded(c[x].confidence) if x in c else None for c in columns] for x in layers},
            "threshold": {x: [_rounded(c[x].threshold) if x in c else None for c in columns] for x in layers},
            "reason": {x: [c[x].reason if x in c else None for c in columns] for x in layers},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file: a page to look at, or plain data.

        Args:
            path: A path that ends in `.html` or `.json`. The page is one file that loads nothing else, of at most a few
                megabytes. It needs jinja2, which the extra `plots` brings. JSON holds what `to_dict` returns.

        Raises:
            ValueError: If the path ends in something else.
            MissingDependencyError: If a page is asked for and jinja2 is not installed.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in (".html", ".htm", ".json"):
            raise ValueError(
                f"`path` is {os.fspath(path)!r}; expected a name that ends in .html for a page to look at, or in .json."
            )
        data = self.to_dict()
        text = json.dumps(data, indent=1) if suffix == ".json" else page(data | self._words())
        with replacing(path) as temporary:
            # A name of a layer may hold half of a surrogate pair, which UTF-8 cannot.
            temporary.write_text(text, "utf-8", errors="backslashreplace")

    def _repr_html_(self) -> str | None:
        """Return the page without its script, for a notebook; None if jinja2 is missing, which has it show the text."""
        try:
            return fragment(self.to_dict() | self._words())
        except MissingDependencyError:
            return None

    def _words(self) -> dict[str, str]:
        lines = str(self).splitlines()
        return {"title": lines[0].rstrip("."), "text": "\n".join(lines)}

    def __repr__(self) -> str:
        if not self.num_steps:
            return "Report(no step yet)"
        what = "would have frozen" if self.dry_run else "froze"
        return f"Report({what} {len(self._ever)} of {len(self.layers)} layers in {self.num_steps} steps)"

    @property
    def _ever(self) -> set[str]:
        return {layer for _, action, layer in self.changes if action != "thaw"}

    def __str__(self) -> str:
        if not self.num_steps:
            return "SmartFRZ: no step yet."
        what = "would have frozen" if self.dry_run else "froze"
        lines = [f"SmartFRZ {what} {len(self._ever)} of {len(self.layers)} layers in {self.num_steps} steps."]
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
        if self.saving is not None:
            lines.append(self._describe(self.saving))
        share = self.decision_seconds / self.seconds if self.seconds else 0.0
        lines.append(
            f"Recording and deciding took {self.decision_seconds:.2f} s ({share:.1%} of {self.seconds:.1f} s)."
        )
        if self.num_compilations:
            lines.append(
                f"{self.compiler} compiled {_times(self.num_compilations)} in {self.compile_seconds:.1f} s; "
                f"{_times(self.num_recompilations)} and {self.recompile_seconds:.1f} s of that after layers froze."
            )
        if self.cache is not None:
            lines.append(str(self.cache))
        return "\n".join(lines)

    def _describe(self, saving: Saving) -> str:
        whole = self.seconds + max(saving.seconds, 0.0)  # without freezing, or as it was
        share = abs(saving.seconds) / whole if whole else 0.0
        return (
            f"Time {'saved' if saving.seconds >= 0 else 'lost'}: about {abs(saving.seconds):.1f} s ({share:.0%}), as a step "
            f"took {1e3 * saving.before:.3g} ms before layers froze and {1e3 * saving.after:.3g} ms at the end; what "
            "SmartFRZ took is deducted."
        )

    def _share(self, flops: int) -> str:
        return f"{flops / self.backward_flops:.0%}"


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _thin(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many of the items, evenly spread, with the first and the last one."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _paces(intervals: Sequence[Interval]) -> list[tuple[int, float]]:
    return [(interval.step, interval.seconds) for interval in intervals]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
