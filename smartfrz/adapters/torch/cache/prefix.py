"""The prefix cache: a frozen prefix costs nothing, its forward pass included."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_leaves

from smartfrz.adapters.torch.cache.cut import Cut, CutFinder, Refusal, Walk, is_close, pick
from smartfrz.adapters.torch.cache.fingerprints import batch_size, content, fingerprints, signature
from smartfrz.adapters.torch.cache.store import (
    DTYPES,
    ActivationStore,
    Budget,
    CacheFolder,
    Field,
    StoreDtype,
    parse_bytes,
)
from smartfrz.adapters.torch.cache.views import IndexedDataset
from smartfrz.adapters.torch.costs import _synchronize
from smartfrz.adapters.torch.sharding import is_sharded
from smartfrz.control.report import CacheUse

logger = logging.getLogger("smartfrz")
SEARCHES = 4  # in vain, after which no cut is looked for any more
AUDIT_EVERY = 64  # batches with hits
WORTH = 0.95  # of a forward pass without a cache is what one with it may take, or it is not started
PAUSE = 10.0  # between two searches, in durations of the last one: looking for cuts takes a tenth of the time at most
FORWARD = 0.5  # of a step is taken for its forward pass, where it is asked whether another cut can still pay
# What rounding may change of a kept value, and again on the way to a later cut, as a share of the largest one
ERRORS = {"float32": 0.0, "float16": 4e-3, "bfloat16": 3e-2, "int8": 3e-2}
COMPRESSION = {"float32": 1.0, "float16": 0.5, "bfloat16": 0.5, "int8": 0.3}


class PrefixCache:
    """What may be kept of a frozen prefix's outputs; pass it to `SmartFRZ(..., cache=...)`.

    Once layers at the front of a model are frozen, their output for a given input never changes.
    It is computed at the first epoch after that, kept, and read from then on: the modules before
    the cut are not run any more. Where the inputs do not come back (random augmentation), the
    cache notices and switches itself off; nothing stale is ever used.

    Args:
        memory: Bytes of memory: a number, or text such as "2GB".
        disk: Bytes of disk for what does not fit. Each process has these budgets to itself.
        folder: Where files go. By default they have no name and vanish with the process. In a
            folder they stay, and a resumed run reads them if model, cut and inputs are the same.
            One run at a time may use it.
        dtype: How activations are kept: `float32` as they are; `float16` and `bfloat16` rounded;
            `int8` with 255 steps for each channel of each sample.
        profile: Start only where a forward pass is measured to be faster with the cache, and stop
            where reading takes longer than computing. False: start wherever it is possible.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        memory: int | str = "2GB",
        disk: int | str = 0,
        folder: str | os.PathLike[str] | None = None,
        dtype: StoreDtype = "float32",
        *,
        profile: bool = True,
    ):
        self.memory = parse_bytes(memory, "memory")
        self.disk = parse_bytes(disk, "disk")
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` is {dtype!r}; expected one of {', '.join(DTYPES)}.")
        if not self.memory + self.disk:
            raise ValueError("`memory` and `disk` are both 0; expected room for activations in one of them.")
        self.folder = None if folder is None else Path(folder)
        self.dtype: StoreDtype = dtype
        self.profile = profile

    @staticmethod
    def indexed(dataset: Any, views: int = 1, *, epoch: int = 0, seed: int = 0) -> IndexedDataset:
        """The data set with an id before each sample: `(id, *sample)`. Give the ids to `freezer.batch`.

        Args:
            dataset: With `__len__` and `__getitem__`.
            views: For augmented data: the random numbers of a sample repeat after so many epochs.
                A random flip that comes first loses nothing with 2.
            epoch: At which a resumed run goes on.
            seed: Of the views.

        Raises:
            TypeError: If the data set has no `__len__` and `__getitem__`.
            ValueError: If `views` or `epoch` is out of range.
        """
        return IndexedDataset(dataset, views, epoch, seed)


@dataclass
class _Kept:
    """A cut and the rows kept at it."""

    cut: Cut
    store: ActivationStore
    state: Any  # of the prefix, when the first row was kept
    content: tuple[list[int], list[int]]  # of its parameters and its buffers
    error: float = 0.0


@dataclass
class _Counts:
    hits: int = 0
    misses: int = 0
    advanced: int = 0
    seconds_saved: float = 0.0
    overhead: float = 0.0
    read: float = 0.0  # since the last comparison
    computed: float = 0.0
    batches: int = 0


class _Slot:
    """Leads a model's forward pass to its cache. A copy of the model has an empty one."""

    def __init__(self, run: Callable[..., Any] | None = None):
        self.run = run

    def __deepcopy__(self, memo: Any) -> "_Slot":
        return _Slot()

    def __reduce__(self) -> Any:
        return _Slot, ()


def _through(slot: _Slot, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a model's `forward` while a batch is under way."""
    if slot.run is None:
        return forward(*args, **kwargs)
    return slot.run(forward, args, kwargs)


class Pace:
    """How much of a run an epoch takes, and how long the run, from when the ids of the first batch come back.

    Attributes:
        epoch: Share of the run that one epoch takes; None as long as it is not known.
    """

    def __init__(self) -> None:
        self.epoch: float | None = None
        self._first: set[int] | None = None
        self._begun = 0.0, 0.0

    def batch(self, ids: Sequence[int], progress: float) -> None:
        """A batch of these samples comes; that share of the run is done."""
        if self._first is None:
            self._first = set(ids)
            self._begun = progress, time.perf_counter()
        elif self.epoch is None and not self._first.isdisjoint(ids):
            self.epoch = progress - self._begun[0]

    def pause(self, seconds: float) -> None:
        """So much of the time since was no training."""
        self._begun = self._begun[0], self._begun[1] + seconds

    def left(self, progress: float) -> float:
        """Seconds of the rest of the run in which what is kept now can be read: those after one more epoch.

        Infinite as long as there is nothing to tell them from.
        """
        done = progress - self._begun[0]
        if self.epoch is None or done <= 0.0:
            return float("inf")
        return max(0.0, 1.0 - progress - self.epoch) * (time.perf_counter() - self._begun[1]) / done


class CachedPrefix:
    """The cache of one run: finds the cut, keeps what crosses it, and skips what lies before.

    Args:
        options: What the user asked for.
        model: The model itself, without wrappers.
        rank: Of this process, where several train together.
    """

    def __init__(self, options: PrefixCache, model: nn.Module, rank: int | None = None):
        self._options = options
        self._model = model
        self._entry = model  # whose forward passes are cut
        folder = options.folder
        if folder is not None and rank is not None:
            folder = folder / f"rank-{rank}"
        self._folder = None if folder is None else CacheFolder(folder)
        self._budget = Budget(options.memory, options.disk)
        self._now: _Kept | None = None
        self._older: list[_Kept] = []
        self._seen: dict[int, int] = {}  # fingerprints
        self._signature: Any = None
        self._flops: dict[str, int] = {}
        self._numbers: dict[int, tuple[int, int, int]] = {}  # of tensors: where, version, content
        self._ids: list[int] | None = None  # of the batch under way
        self._named = False  # whether the user says which samples a batch has
        self._automatic = ExitStack()  # leads every forward pass here, where nobody says when a batch is under way
        self.progress = 0.0  # share of the run that is done, where its length is known
        self._begun: float | None = None  # at which progress
        self._pace = Pace()
        self._search_due = False
        self._in_vain = 0
        self._not_before = 0.0
        self._search_seconds = 0.0  # that the last search took
        self._share = 0.0  # of the forward FLOPs that the cut skips
        self._counts = _Counts()
        self._row_seconds = 0.0  # of the prefix's forward pass
        self._reason = "no layer is frozen yet"
        self.off = False

    @property
    def active(self) -> bool:
        """Whether it has anything to do: as long as nothing is frozen it costs nothing."""
        return self._search_due or self._now is not None

    @property
    def use(self) -> CacheUse:
        """For the report."""
        counts, now = self._counts, self._now
        stores = [kept.store for kept in (*self._older, *([now] if now else []))]
        return CacheUse(
            cut=now.cut.name if now else None,
            reason=None if now else self._reason,
            hits=counts.hits,
            misses=counts.misses,
            advanced=counts.advanced,
            memory_bytes=sum(store.memory_bytes for store in stores),
            disk_bytes=sum(store.disk_bytes for store in stores),
            seconds_saved=counts.seconds_saved - counts.overhead,
        )

    def frozen_set_changed(self, flops: Mapping[str, int], entry: nn.Module | None) -> None:
        """Layers froze or thawed: look for another cut at the next batch.

        Args:
            flops: By layer, of one forward pass.
            entry: The model, or the part of it whose one call in a training step runs every layer; None if
                there is no such part.
        """
        if entry is None:
            self.switch_off(
                "the training step calls the parts of the model one by one. Put them in one module, and call that"
            )
            return
        self._entry = entry
        self._flops = dict(flops)
        self._search_due = not self.off
        if self._search_due and not self._named:
            self._automatic.close()
            self._automatic.enter_context(self._led_here())

    @contextmanager
    def batch(self, ids: Any) -> Iterator[None]:
        """While it lasts, forward passes of the model are of these samples.

        Args:
            ids: An integer for each sample of the batch, in a sequence, an array or a tensor.
        """
        self._named = True
        self._automatic.close()
        keys = _keys(ids)
        self._pace.batch(keys, self.progress)
        if self.off or not self.active:
            yield
            return
        self._ids = keys
        try:
            with self._led_here():
                yield
        finally:
            self._ids = None

    def prefetch(self, ids: Any) -> None:
        """Have the system read from the disk what is kept of these samples, without waiting for it."""
        if self._now is not None:
            self._now.store.prefetch(_keys(ids))

    @contextmanager
    def _led_here(self) -> Iterator[None]:
        """While it lasts, the model's forward passes come to `_forward`."""
        own = self._entry.__dict__
        before = own.get("forward")
        slot = _Slot(self._forward)
        own["forward"] = led = partial(_through, slot, self._entry.forward)
        led.__wrapped__ = led.args[1]  # type: ignore[attr-defined]  # whoever asks for the signature gets the model's
        try:
            yield
        finally:
            slot.run = None
            if own.get("forward") is led:  # else somebody else wrapped it since
                if before is None:
                    del own["forward"]
                else:
                    own["forward"] = before

    def _forward(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.off or not self.active or not self._entry.training or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        keys = self._ids
        batch = batch_size((args, kwargs)) if keys is None else len(keys)
        if keys is not None:
            rows = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor) and value.dim()]
            if not any(len(value) == batch for value in rows):
                shapes = [tuple(value.shape) for value in rows]
                raise ValueError(
                    f"freezer.batch received {batch} ids, but the model's inputs have the shapes {shapes}; expected "
                    "one id for each sample. Give the ids of this very batch."
                )
        elif self._named or not torch.is_grad_enabled() or not batch:
            return forward(*args, **kwargs)  # without gradients dropout may be wanted, as by those who average over it
        try:
            given = self._given(keys, batch, forward, args, kwargs)
            if given is not None and self._now is not None:
                return Walk(batch, start=self._now.cut, given=given).run(forward, args, kwargs)
        except Refusal as refusal:
            self.switch_off(f"the model no longer does what it did when it was checked: {refusal}")
        return forward(*args, **kwargs)

    def _given(
        self, ids: list[int] | None, batch: int, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> dict[int, torch.Tensor] | None:
        """What crosses the cut for this batch; None if the model has to run as it is."""
        start = time.perf_counter()
        try:
            inputs = signature((args, kwargs), batch)
        except TypeError as error:
            self.switch_off(f"{error}. Pass tensors and plain values to the model")
            return None
        prints = fingerprints((args, kwargs), batch)
        # Without ids, two independent numbers are a sample's name: two samples share both with a chance of 2^-60.
        keys = fingerprints((args, kwargs), batch, which=1) if ids is None else ids
        for key, number in zip(keys, prints, strict=True):
            if ids is not None and self._seen.setdefault(key, number) != number:
                self.switch_off(
                    f"sample {key} is not what it was when it was last seen. Are samples augmented at random, or padded "
                    "to the longest one of a batch? Wrap the data set in PrefixCache.indexed(dataset, views=2), and pad "
                    "to one length"
                )
                return None
        invalid = self._now is not None and not self._is_valid(self._now)
        if not invalid and self._search_due and self._options.profile and not self._can_pay():
            self._search_due = False
            self._reason = "too little of the run is left for looking for a cut to pay"
        if invalid or (self._search_due and time.perf_counter() >= self._not_before):
            began = time.perf_counter()
            self._search(keys, prints, inputs, forward, args, kwargs)
            self._search_seconds = time.perf_counter() - began
            self._pace.pause(self._search_seconds)
            if self._options.profile:
                self._not_before = time.perf_counter() + PAUSE * self._search_seconds
        self._counts.overhead += time.perf_counter() - start
        now = self._now
        if now is None or (ids is None and not self._comes_back()):
            return None
        if inputs != self._signature or _wants_gradient((args, kwargs)):
            self._counts.misses += len(keys)
            return None
        return self._collect(now, keys, prints, forward, args, kwargs)

    def _can_pay(self) -> bool:
        """Whether a cut behind all that is frozen now could save more than looking for it takes.

        What is kept now is read after one more epoch, and not before: until then it has to be computed once.
        """
        seconds, total = self._pace.left(self.progress), sum(self._flops.values())
        if not seconds:
            return False
        if seconds == float("inf") or not self._search_seconds or not total:
            return True
        frozen = 0
        for layer, flops in self._flops.items():
            if any(parameter.requires_grad for parameter in self._model.get_submodule(layer).parameters()):
                break
            frozen += flops
        skipped = self._share if self._now else 0.0
        return seconds * FORWARD * (frozen / total - skipped) >= self._search_seconds

    def _comes_back(self) -> bool:
        """Whether there still is hope that samples are seen again; if not, it is switched off."""
        if self._counts.hits + self._counts.advanced > 0:
            return True
        if self._begun is None:
            self._begun = self.progress
        if self.progress <= (1 + self._begun) / 2:
            return True
        self.switch_off(
            f"no sample came back between {self._begun:.0%} and {self.progress:.0%} of the run. Is it of one epoch, or are "
            "samples augmented at random, or padded to the longest one of a batch? Wrap the data set in "
            "PrefixCache.indexed(dataset, views=2), and pad to one length"
        )
        return False

    def _collect(
        self, now: _Kept, keys: list[int], prints: list[int], forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> dict[int, torch.Tensor] | None:
        """Rows that are kept, those that can be advanced to this cut, and those computed from the inputs."""
        counts, batch = self._counts, len(keys)
        start = time.perf_counter()
        hits = [row for row, key in enumerate(keys) if now.store.has(key, prints[row])]
        found: list[tuple[list[int], dict[int, torch.Tensor]]] = []
        if hits:
            found.append((hits, _read(now, [keys[row] for row in hits])))
            read = time.perf_counter() - start
            if not self._is_true(now, hits, found[0][1], batch, forward, args, kwargs):
                self.switch_off("what was kept is not what the model computes now: its weights or its inputs changed")
                return None
            if not self._is_worth_it(read, len(hits)):
                return None
        left = sorted(set(range(batch)) - set(hits))
        for older in reversed(self._older):
            rows = [row for row in left if older.store.has(keys[row], prints[row])]
            if rows:
                given = _read(older, [keys[row] for row in rows])
                found.append((rows, self._compute(now, rows, batch, forward, args, kwargs, older, given)))
                older.store.discard([keys[row] for row in rows])  # first: their room may be all there is
                self._keep(now, rows, keys, prints, found[-1][1])
                left = [row for row in left if row not in rows]
                counts.advanced += len(rows)
        for older in [older for older in self._older if not len(older.store)]:
            older.store.clear()
            self._older.remove(older)
        if left:
            found.append((left, self._compute(now, left, batch, forward, args, kwargs)))
            self._keep(now, left, keys, prints, found[-1][1])
        counts.hits += len(hits)
        counts.misses += len(left)
        return _merged(now.cut, found, batch) | now.cut.copied_constants()

    def _compute(
        self,
        now: _Kept,
        rows: list[int],
        batch: int,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        older: _Kept | None = None,
        given: dict[int, torch.Tensor] | None = None,
    ) -> dict[int, torch.Tensor]:
        """What crosses the cut for some rows of a batch."""
        padded = rows
        if len(rows) == 1 < batch:  # many models take a batch of one for something else
            padded = [*rows, *rows]
            given = {index: torch.cat([tensor, tensor]) for index, tensor in (given or {}).items()}
        walk = Walk(
            len(padded),
            start=older.cut if older else None,
            given=(given or {}) | (older.cut.copied_constants() if older else {}),
            stop=now.cut,
        )
        args, kwargs = pick((args, kwargs), batch, padded)
        walk.run(forward, args, kwargs)
        if not all(is_close(walk.captured[index], value) for index, value in now.cut.constants.items()):
            raise Refusal("a tensor that seemed to be the same for every batch is not")
        return {index: walk.captured[index][: len(rows)] for index in now.cut.kept}

    def _keep(
        self, now: _Kept, rows: list[int], keys: list[int], prints: list[int], tensors: dict[int, torch.Tensor]
    ) -> None:
        """Keep these rows, those that have a place."""
        start = time.perf_counter()
        now.store.put(
            [keys[row] for row in rows],
            [_to_numpy(tensors[i]) for i in now.cut.kept],
            [prints[row] for row in rows],
        )
        self._counts.overhead += time.perf_counter() - start

    def _is_true(
        self,
        now: _Kept,
        hits: list[int],
        kept: dict[int, torch.Tensor],
        batch: int,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> bool:
        """Now and then: whether the model still computes what was kept of one sample."""
        number, self._counts.batches = self._counts.batches, self._counts.batches + 1
        if number % AUDIT_EVERY:
            return True
        start = time.perf_counter()
        place = number // AUDIT_EVERY % len(hits)
        computed = self._compute(now, [hits[place]], batch, forward, args, kwargs)
        self._counts.overhead += time.perf_counter() - start
        return all(is_close(kept[i][place : place + 1], computed[i], extra=now.error) for i in computed)

    def _is_worth_it(self, read: float, rows: int) -> bool:
        """Count what was saved; switch off where reading took longer than computing."""
        counts = self._counts
        counts.seconds_saved += rows * self._row_seconds - read
        counts.read += read
        counts.computed += rows * self._row_seconds
        if self._options.profile and counts.batches % AUDIT_EVERY == 0:
            if counts.read > counts.computed:
                self.switch_off(
                    f"reading took {counts.read:.2f} s for {AUDIT_EVERY} batches, computing {counts.computed:.2f} s"
                )
                return False
            counts.read = counts.computed = 0.0
        return True

    def _search(
        self, keys: list[int], prints: list[int], inputs: Any, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        """Look for a cut, and start at it if that is of use."""
        if len(keys) < 2:
            self._drop_invalid()
            return
        self._search_due = False
        refused = _unsupported(self._model)
        if refused:
            self.switch_off(refused)
            return
        self._drop_invalid()
        if all(parameter.requires_grad for parameter in self._entry.parameters()):
            return
        previous = self._now
        if previous is not None and inputs != self._signature:
            self._search_due = True  # at a batch like those that are kept
            return
        finder = CutFinder(
            self._entry,
            forward,
            len(keys),
            args,
            kwargs,
            self._flops,
            COMPRESSION[self._options.dtype],
            # A LightningModule is not among the modules of what stands for its training step, and has its names.
            prefix=next((name for name, module in self._model.named_modules() if module is self._entry), ""),
        )
        cut = finder.find(previous.cut if previous else None)
        if previous is not None and cut is previous.cut:
            return
        if cut is None and not finder.reasons:
            self._reason = "no frozen layer comes before the first one that is trained"
            return
        if cut is None:
            self._in_vain += 1
            self._reason = finder.reasons[0]
            logger.info("The activation cache has no place yet: %s", "; ".join(finder.reasons))
            if self._in_vain == SEARCHES:
                self.switch_off("; ".join(finder.reasons))
            return
        self._in_vain = 0
        self._signature = inputs
        self._start_at(cut, finder, keys, prints, forward, args, kwargs)

    def _start_at(
        self,
        cut: Cut,
        finder: CutFinder,
        keys: list[int],
        prints: list[int],
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> None:
        fields = [Field(leaf.shape[1:], str(leaf.dtype).removeprefix("torch.")) for leaf in cut.leaves]
        identity = self._identity(cut) if self._folder else None
        try:
            store = ActivationStore(
                fields, self._budget, dtype=self._options.dtype, folder=self._folder, identity=identity
            )
        except TypeError as error:  # of NumPy: float8, for example
            self.switch_off(f"activations of this dtype cannot be kept ({error})")
            return
        rounding = ERRORS[self._options.dtype]
        values = self._content(cut.parameters), self._content(cut.buffers())
        now = _Kept(cut, store, _state_of(cut), values, rounding)
        previous = self._now
        moves = previous is not None and store.row_bytes <= 2 * previous.store.row_bytes
        if previous is not None and moves:
            # More is skipped for about as much to read: it pays if the last one did, which is watched.
            row_seconds = self._row_seconds * cut.flops / previous.cut.flops
            says, starts = f"moves to {cut.name!r}: {store.row_bytes:,} bytes a sample", True
        else:
            row_seconds, says, starts = self._measured(now, finder, keys, prints, forward, args, kwargs)
        if not starts:
            store.clear()
            self._reason = says
            logger.info("The activation cache at %r %s", cut.name, says)
            return
        logger.info("The activation cache %s", says)
        self._now, self._row_seconds = now, row_seconds
        self._share = cut.flops * len(keys) / max(1, sum(self._flops.values()))
        if not moves:  # the rows of this batch were computed just now, though `_collect` will read them
            self._counts.hits -= len(keys)
            self._counts.misses += len(keys)
            self._counts.seconds_saved -= len(keys) * row_seconds
        if previous is not None:
            if not moves:
                previous.store.discard(keys)
            try:
                finder.check_way(previous.cut, cut)
                self._older.append(previous)
                now.error += previous.error
            except Refusal as refusal:
                logger.info("What was kept before is not used: %s", refusal)
                previous.store.clear()
        if self._folder is not None:
            self._folder.sweep([kept.store.name for kept in (now, *self._older)])

    def _measured(
        self,
        now: _Kept,
        finder: CutFinder,
        keys: list[int],
        prints: list[int],
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> tuple[float, str, bool]:
        """Seconds of the prefix for one sample, what was seen with the real store, and whether that pays.

        The rows of this batch are in the store afterwards.
        """
        cut, batch = now.cut, len(keys)
        cuda = finder.cuda

        def seconds(run: Callable[[], Any]) -> float:
            def timed() -> float:
                _synchronize(cuda)
                start = time.perf_counter()
                run()
                _synchronize(cuda)
                return time.perf_counter() - start

            return float(finder.aside(timed))

        computed = Walk(batch, stop=cut)
        prefix = seconds(lambda: computed.run(forward, args, kwargs))
        now.store.put(keys, [_to_numpy(computed.captured[i]) for i in cut.kept], prints)
        if not all(key in now.store for key in keys):
            fits = (self._budget.memory + self._budget.disk) // max(1, now.store.row_bytes)
            return 0.0, f"has no room: a sample takes {now.store.row_bytes:,} bytes, and {fits} more fit", False

        def with_cache() -> None:
            signature((args, kwargs), batch)
            fingerprints((args, kwargs), batch)
            given = _read(now, keys) | cut.copied_constants()
            Walk(batch, start=cut, given=given).run(forward, args, kwargs)

        with_it, without = [seconds(with_cache)], [seconds(lambda: forward(*args, **kwargs))]
        if self._options.profile and with_it[0] > WORTH * without[0]:  # a second look: something else may have run
            with_it.append(seconds(with_cache))
            without.append(seconds(lambda: forward(*args, **kwargs)))
        facts = (
            f"{now.store.row_bytes:,} bytes a sample; forward pass of {batch} samples {1000 * min(without):.1f} ms, with "
            f"the cache {1000 * min(with_it):.1f} ms"
        )
        if self._options.profile and min(with_it) > WORTH * min(without):
            return 0.0, f"would not pay: {facts}", False
        return prefix / batch, f"starts at {cut.name!r}: {facts}", True

    def _drop_invalid(self) -> None:
        """Forget what was kept at cuts whose prefix is trained again, or has changed."""
        for kept in [*self._older, *([self._now] if self._now else [])]:
            if not self._is_valid(kept):
                kept.store.clear()
                self._older = [older for older in self._older if older is not kept]
                if kept is self._now:
                    self._now, self._reason = None, "the prefix has changed"
        if self._now is None and self._older:
            self._now = self._older.pop()

    def _is_valid(self, kept: _Kept) -> bool:
        """Whether the prefix still is what the rows were computed with."""
        state = _state_of(kept.cut)
        if state == kept.state:
            return True
        trained = any(p.requires_grad for p in kept.cut.parameters) or any(norm.training for norm in kept.cut.norms)
        # Weights that were swapped for a moment, those of an average for example, are written again; and
        # DistributedDataParallel writes the buffers at every step.
        if trained or (state[0] != kept.state[0] and self._content(kept.cut.parameters) != kept.content[0]):
            return False
        if self._content(kept.cut.buffers()) != kept.content[1]:
            return False
        kept.state = state
        return True

    def _content(self, tensors: Iterable[torch.Tensor]) -> list[int]:
        """A number for the values of each tensor; computed again only where a tensor was written since."""
        numbers = []
        for tensor in tensors:
            known = self._numbers.get(id(tensor))
            if known is None or known[:2] != (tensor.data_ptr(), tensor._version):
                known = tensor.data_ptr(), tensor._version, content([tensor])
                self._numbers[id(tensor)] = known
            numbers.append(known[2])
        return numbers

    def _identity(self, cut: Cut) -> dict[str, Any]:
        """What kept rows depend on, for another process."""
        digest = hashlib.sha256()
        for name, module in cut.skipped:
            digest.update(f"{name} {module!r}\n".encode())
        for tensor in (*cut.parameters, *cut.buffers()):
            digest.update(str((tensor.shape, tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return {
            "prefix": digest.hexdigest(),
            "cut": cut.name,
            "kept": cut.kept,
            "inputs": repr(self._signature),
            "torch": torch.__version__,
        }

    def switch_off(self, reason: str) -> None:
        """For the rest of the run; training goes on without."""
        if self.off:
            return
        logger.warning("The activation cache is off: %s.", reason)
        self.off, self._search_due, self._reason = True, False, reason
        for kept in [*self._older, *([self._now] if self._now else [])]:
            kept.store.clear()
        self._now, self._older, self._seen = None, [], {}
        self._automatic.close()

    def flush(self) -> None:
        """Write down what the folder holds, so that a resumed run finds it."""
        if self._now is not None:
            self._now.store.flush()

    def close(self) -> None:
        """End; what lies in a folder stays for a resumed run."""
        self.flush()
        self._automatic.close()
        self.off, self._now, self._older, self._reason = True, None, [], "it was closed"
        if self._folder is not None:
            self._folder.close()


def _keys(ids: Any) -> list[int]:
    values = ids.tolist() if isinstance(ids, (torch.Tensor, np.ndarray)) else ids
    if not isinstance(values, Sequence) or not all(isinstance(v, (int, np.integer)) for v in values):
        raise TypeError(
            f"freezer.batch received {ids!r:.80}; expected one integer for each sample of the batch, in a sequence, an "
            "array or a tensor of one dimension."
        )
    return [int(value) for value in values]


def _state_of(cut: Cut) -> Any:
    """Changes if a weight or a statistic of the prefix may have changed, or is trained again."""
    return (
        [(p.data_ptr(), p._version, p.requires_grad) for p in cut.parameters],
        [(b.data_ptr(), b._version) for b in cut.buffers()],
        [norm.training for norm in cut.norms],
    )


def _wants_gradient(inputs: Any) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in tree_leaves(inputs))


def _unsupported(model: nn.Module) -> str | None:
    """Why no cut of this model is looked for."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return "the model is sharded over processes, and its prefix gathers weights that the cut would leave out"
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return f"{name or 'the model'} is compiled with torch.compile, which the cache does not cut"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name or 'the model'} is a TorchScript module, which the cache does not cut"
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if isinstance(module, nn.SyncBatchNorm) and module.training and several:
            return f"{name} synchronizes batch statistics, and checking a cut would wait for the other processes"
    return None


def _read(kept: _Kept, keys: Sequence[int]) -> dict[int, torch.Tensor]:
    arrays = kept.store.get(keys)
    return {
        index: _to_torch(array, leaf) for index, leaf, array in zip(kept.cut.kept, kept.cut.leaves, arrays, strict=True)
    }


def _to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _to_torch(array: NDArray[Any], leaf: Any) -> torch.Tensor:
    if leaf.dtype == torch.bfloat16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    layout = torch.channels_last if leaf.channels_last else torch.contiguous_format
    return tensor.to(leaf.device).contiguous(memory_format=layout)


def _merged(cut: Cut, found: list[tuple[list[int], dict[int, torch.Tensor]]], batch: int) -> dict[int, torch.Tensor]:
    """The rows of a batch, from parts of it."""
    if len(found) == 1:
        return found[0][1]
    merged = {}
    for index, leaf in zip(cut.kept, cut.leaves, strict=True):
        layout = torch.channels_last if leaf.channels_last else torch.contiguous_format
        whole = torch.empty((batch, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device, memory_format=layout)
        for rows, tensors in found:
            whole[torch.tensor(rows, device=leaf.device)] = tensors[index]
        merged[index] = whole
    return merged
