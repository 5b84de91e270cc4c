"""The prefix cache: skip the forward pass of a frozen prefix, too."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smartfrz.adapters.torch.cache.batch import Batch, check_number, list_keys
from smartfrz.adapters.torch.cache.cut import CutFinder, find_obstacle, is_close
from smartfrz.adapters.torch.cache.fingerprints import batch_size, fingerprints, signature
from smartfrz.adapters.torch.cache.kept import KeptRows
from smartfrz.adapters.torch.cache.missing import Refusal
from smartfrz.adapters.torch.cache.options import PrefixCache
from smartfrz.adapters.torch.cache.routing import route
from smartfrz.adapters.torch.cache.store import StoreDtype
from smartfrz.adapters.torch.cache.trial import try_out
from smartfrz.adapters.torch.cache.walk import Cut
from smartfrz.control.report import CacheUse

logger = logging.getLogger("smartfrz")
SEARCHES = 4  # Searches without success after which the cache switches itself off.
AUDIT_EVERY = 64  # Batches with hits between two checks.
PAUSE = 10.0  # Pause after a search, in durations of it: searching takes a tenth of the time at most.
# What rounding may change in a kept value, as a share of the largest one
ERRORS: dict[StoreDtype, float] = {"float32": 0.0, "float16": 4e-3, "bfloat16": 3e-2}
IDLE_STEPS = 4  # Steps without a call of the model after which the cache switches itself off.
_PARTS = "the training step calls the parts of the model one by one. Put them in one module, and call that"
_ADVICE = "Wrap the data set in PrefixCache.indexed(dataset, views=2), and pad to one length"


@dataclass
class _Counts:
    """Counts of the whole run, and seconds since reading was last compared with computing."""

    hits: int = 0
    misses: int = 0
    seconds_saved: float = 0.0
    overhead: float = 0.0
    batches: int = 0
    read: float = 0.0
    computed: float = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Add the duration of the block to the overhead."""
        start = time.perf_counter()
        yield
        self.overhead += time.perf_counter() - start


class _RunLength:
    """How much of the run is done, and how many samples are left in it."""

    def __init__(self) -> None:
        self.progress = 0.0
        self.begun: float | None = None  # progress when the first cut was used
        self._samples = 0

    def begin(self) -> None:
        """Count samples from now on, if they are not counted yet."""
        if self.begun is None:
            self.begun = self.progress

    def count(self, samples: int) -> None:
        """Note that samples are trained with."""
        self._samples += samples * (self.begun is not None)

    def samples_left(self) -> float:
        """Return the number of samples in the rest of the run; infinite while its length is not known."""
        done = self.progress - (self.begun or 0.0)
        return self._samples * (1.0 - self.progress) / done if done > 0.0 else float("inf")


class CachedPrefix:
    """The cache of one run: finds the cut, keeps what crosses it, and skips the modules before it.

    Args:
        options: What the user asked for.
        model: The model itself, without wrappers.

    Attributes:
        off: Whether the cache has been switched off for the rest of the run.
    """

    def __init__(self, options: PrefixCache, model: nn.Module):
        self._options = options
        self._model = model
        self._entry = model  # the module whose forward passes are cut
        self._kept: KeptRows | None = None
        self._seen: dict[int, int] = {}  # fingerprints of named samples
        self._flops: dict[str, int] = {}
        self._ids: list[int] | None = None  # of the current batch
        self._is_named = False  # whether the user names the samples of batches
        self._automatic = ExitStack()  # routes forward passes here where the user does not
        self._length = _RunLength()
        self._search_due = False
        self._idle_steps = 0  # since the last call of the model in training
        self._in_vain = 0
        self._not_before = 0.0
        self._counts = _Counts()
        self._row_seconds = 0.0  # of the skipped modules
        self._reason = "no layer is frozen yet"
        self.off = False

    @property
    def active(self) -> bool:
        """Whether there is anything to do; before layers freeze, there is not."""
        return self._search_due or self._kept is not None

    @property
    def use(self) -> CacheUse:
        """What the cache did so far."""
        counts, kept = self._counts, self._kept
        return CacheUse(
            cut=kept.cut.name if kept else None,
            reason=None if kept else self._reason,
            hits=counts.hits,
            misses=counts.misses,
            memory_bytes=kept.store.memory_bytes if kept else 0,
            disk_bytes=kept.store.disk_bytes if kept else 0,
            seconds_saved=counts.seconds_saved - counts.overhead,
        )

    def note_step(self) -> None:
        """Note a training step. Where steps go by without any call of the model, there is nothing to cut."""
        self._idle_steps = self._idle_steps + 1 if self.active else 0
        if self._idle_steps > IDLE_STEPS and not self.off:
            self.switch_off(_PARTS)

    def note_progress(self, progress: float) -> None:
        """Note the share of the run that is done."""
        self._length.progress = progress

    def frozen_set_changed(self, flops: Mapping[str, int], entry: nn.Module | None) -> None:
        """Look for another cut at the next batch, since layers froze or thawed.

        Args:
            flops: FLOPs of each layer in one forward pass.
            entry: The model, or the part of it whose one call in a training step runs every layer; None if
                there is no such part.
        """
        if entry is None:
            self.switch_off(_PARTS)
            return
        self._entry = entry
        self._flops = dict(flops)
        self._search_due = not self.off
        if self._search_due and not self._is_named:
            self._automatic.close()
            self._automatic.enter_context(route(self._entry, self._forward))

    @contextmanager
    def batch(self, ids: Any) -> Iterator[None]:
        """Tell which samples the model's forward passes inside the block are of.

        Args:
            ids: An integer for each sample of the batch, in a sequence, an array or a tensor.
        """
        self._is_named = True
        self._automatic.close()
        keys = list_keys(ids)
        if self.off or not self.active:
            yield
            return
        self._ids = keys
        try:
            with route(self._entry, self._forward):
                yield
        finally:
            self._ids = None

    def switch_off(self, reason: str) -> None:
        """Stop for the rest of the run; training goes on without the cache.

        Args:
            reason: For the log and the report.
        """
        if not self.off:
            logger.warning("The activation cache is off: %s.", reason)
            self._end(reason)

    def close(self) -> None:
        """End, and drop what is kept."""
        self._end("it was closed")

    def _end(self, reason: str) -> None:
        self.off, self._search_due = True, False
        self._drop(reason)
        self._seen = {}
        self._automatic.close()

    def _drop(self, reason: str) -> None:
        self._kept, self._reason = None, reason

    # Forward passes

    def _forward(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.off or not self.active or not self._entry.training or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        self._idle_steps = 0
        with self._counts.counted():
            batch = self._describe(forward, args, kwargs)
        try:
            given = None if batch is None else self._given(batch)
            if batch is not None and given is not None and self._kept is not None:
                return batch.run_behind(self._kept.cut, given)
        except Refusal as refusal:
            self.switch_off(f"the model no longer does what it did when it was checked: {refusal}")
        return forward(*args, **kwargs)

    def _describe(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Batch | None:
        """Return the batch, or None if the cache has nothing to do with this forward pass."""
        ids, inputs = self._ids, (args, kwargs)
        if ids is not None:
            check_number(ids, inputs)
        # Without gradients dropout may be wanted, by users who average over it.
        elif self._is_named or not torch.is_grad_enabled():
            return None
        size = batch_size(inputs) if ids is None else len(ids)
        if not size:
            return None
        try:
            described = signature(inputs, size)
        except TypeError as error:
            self.switch_off(f"{error}. Pass tensors and plain values to the model")
            return None
        # Without ids, two independent numbers are a sample's name: two samples share both with a chance of 2^-60.
        keys = fingerprints(inputs, size, which=1) if ids is None else ids
        return Batch(forward, args, kwargs, keys, fingerprints(inputs, size), described, ids is not None)

    def _given(self, batch: Batch) -> dict[int, torch.Tensor] | None:
        """Return what crosses the cut for this batch; None if the model has to run as it is."""
        self._length.count(len(batch))
        with self._counts.counted():
            if batch.is_named and not self._knows(batch):
                return None
            self._search_if_due(batch)
        kept = self._kept
        if kept is None or (not batch.is_named and not self._may_come_back()):
            return None
        if batch.signature != kept.signature or batch.wants_gradient():
            self._counts.misses += len(batch)
            return None
        return self._collect(kept, batch)

    def _knows(self, batch: Batch) -> bool:
        """Whether no named sample differs from what it was before; if one does, the cache is switched off."""
        for key, number in zip(batch.keys, batch.fingerprints, strict=True):
            if self._seen.setdefault(key, number) != number:
                self.switch_off(
                    f"sample {key} is not what it was when it was last seen. Are samples augmented at random, or padded "
                    f"to the longest one of a batch? {_ADVICE}"
                )
                return False
        return True

    def _may_come_back(self) -> bool:
        """Whether samples may still be seen again; if there is no hope left, the cache is switched off."""
        begun, progress = self._length.begun or 0.0, self._length.progress
        if self._counts.hits or progress <= (1 + begun) / 2:
            return True
        self.switch_off(
            f"no sample came back between {begun:.0%} and {progress:.0%} of the run. Is it of one epoch, or are samples "
            f"augmented at random, or padded to the longest one of a batch? {_ADVICE}"
        )
        return False

    def _collect(self, kept: KeptRows, batch: Batch) -> dict[int, torch.Tensor] | None:
        """Read the rows that are kept, compute and keep the others."""
        start = time.perf_counter()
        hits = kept.find(batch)
        parts: list[tuple[list[int], dict[int, torch.Tensor]]] = []
        if hits:
            parts.append((hits, kept.read(batch, hits)))
            read = time.perf_counter() - start
            if not self._is_true(kept, batch, *parts[0]) or not self._is_worth_it(read, len(hits)):
                return None
        left = sorted(set(range(len(batch))) - set(hits))
        if left:
            parts.append((left, batch.compute(kept.cut, left)))
            with self._counts.counted():
                kept.put(batch, *parts[-1])
        self._counts.hits += len(hits)
        self._counts.misses += len(left)
        return kept.join(parts, len(batch))

    def _is_true(self, kept: KeptRows, batch: Batch, hits: list[int], tensors: dict[int, torch.Tensor]) -> bool:
        """Now and then, compute one sample again; switch off if the result is not what was kept."""
        number, self._counts.batches = self._counts.batches, self._counts.batches + 1
        if number % AUDIT_EVERY:
            return True
        with self._counts.counted():
            place = number // AUDIT_EVERY % len(hits)
            computed = batch.compute(kept.cut, [hits[place]])
            extra = ERRORS[self._options.dtype]
            alike = all(is_close(tensors[i][place : place + 1], computed[i], extra) for i in computed)
        if not alike:
            self.switch_off("what was kept is not what the model computes now: its weights or its inputs changed")
        return alike

    def _is_worth_it(self, read: float, rows: int) -> bool:
        """Count what was saved; switch off where reading took longer than computing."""
        counts, computed = self._counts, rows * self._row_seconds
        counts.seconds_saved += computed - read
        counts.read += read
        counts.computed += computed
        if not self._options.profile or counts.batches % AUDIT_EVERY:
            return True
        if counts.read > counts.computed:
            self.switch_off(
                f"reading took {counts.read:.2f} s for {AUDIT_EVERY} batches, computing {counts.computed:.2f} s"
            )
            return False
        counts.read = counts.computed = 0.0
        return True

    # Looking for a cut

    def _search_if_due(self, batch: Batch) -> None:
        if self._kept is not None and not self._kept.is_valid():
            self._drop("the prefix has changed")
            self._search_due = True
        elif not self._search_due or time.perf_counter() < self._not_before:
            return
        start = time.perf_counter()
        self._search(batch)
        if self._options.profile:
            end = time.perf_counter()
            self._not_before = end + PAUSE * (end - start)

    def _search(self, batch: Batch) -> None:
        """Look for a cut, and start at it if that is of use."""
        if len(batch) < 2:
            return
        self._search_due = False
        if refused := find_obstacle(self._model):
            self.switch_off(refused)
            return
        if all(parameter.requires_grad for parameter in self._entry.parameters()):
            return
        previous = self._kept
        if previous is not None and batch.signature != previous.signature:
            self._search_due = True  # at a batch like the ones that are kept
            return
        finder = self._finder(batch)
        cut = finder.find(previous.cut if previous else None)
        if cut is None:
            self._note_failure(finder.reasons)
            return
        self._in_vain = 0
        if previous is None or (cut is not previous.cut and self._pays_to_move(previous, cut)):
            self._start_at(cut, finder, batch)

    def _finder(self, batch: Batch) -> CutFinder:
        # The module that stands for a LightningModule's training step does not contain that module, but has its names.
        prefix = next((name for name, module in self._model.named_modules() if module is self._entry), "")
        compression = 1.0 if self._options.dtype == "float32" else 0.5
        return CutFinder(
            self._entry, batch.forward, len(batch), batch.args, batch.kwargs, self._flops, compression, prefix
        )

    def _note_failure(self, reasons: list[str]) -> None:
        if not reasons:
            self._reason = "no frozen layer comes before the first one that is trained"
            return
        self._in_vain += 1
        self._reason = reasons[0]
        logger.info("The activation cache has no place yet: %s", "; ".join(reasons))
        if self._in_vain == SEARCHES:
            self.switch_off("; ".join(reasons))

    def _pays_to_move(self, previous: KeptRows, cut: Cut) -> bool:
        """Whether a cut that skips more saves more in the rest of the run, although what is kept is lost.

        Each sample has to be computed once more before it can be skipped.
        """
        gain = 1.0 - previous.cut.flops / cut.flops
        return gain > 0.0 and len(previous.store) <= gain * self._length.samples_left()

    def _start_at(self, cut: Cut, finder: CutFinder, batch: Batch) -> None:
        """Start at a cut if a trial says so; until then what is kept at the previous one stays."""
        options = self._options
        kept = KeptRows(cut, batch.signature, memory=options.memory, disk=options.disk, dtype=options.dtype)
        verdict = try_out(kept, batch, finder, has_to_pay=options.profile)
        logger.info("The activation cache at %r %s", cut.name, verdict.says)
        if not verdict.starts:
            self._reason = verdict.says
            return
        self._kept, self._row_seconds = kept, verdict.row_seconds
        self._length.begin()
        # The rows of this batch were computed just now, although `_collect` will read them.
        self._counts.hits -= len(batch)
        self._counts.misses += len(batch)
        self._counts.seconds_saved -= len(batch) * verdict.row_seconds
