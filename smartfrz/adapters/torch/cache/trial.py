"""Try a cut out with the real store: whether there is room, and whether it makes the forward pass faster."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from smartfrz.adapters.torch.cache.batch import Batch
from smartfrz.adapters.torch.cache.cut import CutFinder
from smartfrz.adapters.torch.cache.fingerprints import fingerprints, signature
from smartfrz.adapters.torch.cache.kept import KeptRows
from smartfrz.adapters.torch.cache.walk import Walk
from smartfrz.adapters.torch.sandbox import synchronize

WORTH = 0.95  # A forward pass with the cache may take this share of one without it.


class Verdict(NamedTuple):
    """The outcome of a trial.

    Attributes:
        starts: Whether the cache should start at the cut.
        says: The reason, for logs and the report.
        row_seconds: Seconds that the modules before the cut take for one sample.
    """

    starts: bool
    says: str
    row_seconds: float = 0.0


def try_out(kept: KeptRows, batch: Batch, finder: CutFinder, *, has_to_pay: bool) -> Verdict:
    """Time forward passes with and without the cache; the rows of the batch are kept afterwards.

    Args:
        kept: The cut and its store, which is empty.
        batch: The batch.
        finder: The finder of the cut.
        has_to_pay: Whether the cache should start only where it saves time.
    """

    def timed(run: Callable[[], Any]) -> float:
        return _seconds(finder, run)

    cut, store, size = kept.cut, kept.store, len(batch)
    computed = Walk(size, stop=cut)
    prefix = timed(lambda: computed.run(batch.forward, batch.args, batch.kwargs))
    kept.put(batch, range(size), computed.captured)
    if not all(key in store for key in batch.keys):
        return Verdict(False, f"has no room: a sample takes {store.row_bytes:,} bytes, and {len(store)} of {size} fit")

    def with_cache() -> None:
        inputs = batch.args, batch.kwargs
        signature(inputs, size), fingerprints(inputs, size)
        batch.run_behind(cut, kept.read(batch, range(size)) | cut.copied_constants())

    faster, slower = timed(with_cache), timed(batch.run)
    if has_to_pay and faster > WORTH * slower:  # Once more, since something else may have run at that moment.
        faster, slower = min(faster, timed(with_cache)), min(slower, timed(batch.run))
    facts = (
        f"{store.row_bytes:,} bytes a sample; forward pass of {size} samples {1000 * slower:.1f} ms, with the cache "
        f"{1000 * faster:.1f} ms"
    )
    if has_to_pay and faster > WORTH * slower:
        return Verdict(False, f"would not pay: {facts}")
    return Verdict(True, f"starts: {facts}", prefix / size)


def _seconds(finder: CutFinder, run: Callable[[], Any]) -> float:
    def timed() -> float:
        synchronize(finder.cuda)
        start = time.perf_counter()
        run()
        synchronize(finder.cuda)
        return time.perf_counter() - start

    return float(finder.run_aside(timed))
