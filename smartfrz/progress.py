"""Progress of a long command on standard error: a bar on a terminal, elsewhere a line a minute."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

import click

from smartfrz import commands

MINUTE = 60.0  # between two lines; with --verbose a sixth of it
_BAR = 60  # columns of a bar besides its label; a line that is longer than the terminal would not be overwritten
Tell = Callable[[float, str], None]


@contextlib.contextmanager
def progress(label: str) -> Iterator[Tell]:
    """Yield a function that takes the fraction done, in [0, 1], and what is being done.

    On a terminal the bar is drawn from the first call on. Elsewhere there is a line a minute, even if nothing is called:
    who reads a log wants to know that the command lives. With `--quiet` there is neither.

    Args:
        label: What the command does, for example `"training"`.
    """
    if commands.quiet():
        yield lambda fraction, text: None
    elif sys.stderr.isatty():
        with contextlib.ExitStack() as stack:
            yield _bar(label, stack)
    else:
        with lines(label) as tell:
            yield tell


@contextlib.contextmanager
def lines(label: str) -> Iterator[Tell]:
    """Yield the same function; what it is told is written a line a minute, terminal or not, and never with `--quiet`."""
    told = _Lines(label, MINUTE / 6 if commands.verbose() else MINUTE)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(max(told.interval, 0.05)):
            told.write()

    thread = threading.Thread(target=watch, daemon=True)
    if not commands.quiet():
        thread.start()
    try:
        yield (lambda fraction, text: None) if commands.quiet() else told.tell
    finally:
        ended.set()


class _Lines:
    """The last news, and when they were written."""

    def __init__(self, label: str, interval: float):
        self.interval = interval
        self._label, self._fraction, self._text = label, 0.0, ""
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def tell(self, fraction: float, text: str) -> None:
        self._fraction, self._text = fraction, text
        self.write()

    def write(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._last < self.interval:
                return
            self._last = now
            left = ""
            if self._fraction > 0:
                left = f", about {(now - self._start) * (1 / self._fraction - 1) / 60:.0f} min left"
            line = f"{self._label}: {self._fraction:.0%} done{left}   {self._text}"
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, which is no reason to stop working
            click.echo(line.rstrip(), err=True)


def _bar(label: str, stack: contextlib.ExitStack) -> Tell:
    bar = click.progressbar(length=1000, label=label, file=sys.stderr, item_show_func=lambda text: text)
    width = max(0, shutil.get_terminal_size().columns - _BAR - len(label))

    def tell(fraction: float, text: str) -> None:
        if not bar.entered:
            stack.enter_context(bar)
        bar.update(round(1000 * fraction) - bar.pos, text[:width])

    return tell
