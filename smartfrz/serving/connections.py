"""Limits on connections to REST: how many there are, how many of one peer, and how long each may take for its headers."""

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from smartfrz.serving import metrics
from smartfrz.serving.options import ServeOptions

logger = logging.getLogger("smartfrz")
FOR_HEALTH = 64  # connections beyond the limit, which may ask for health and metrics only
_OTHER_FILES = 128
_WRITE_SECONDS = 30.0  # for a client that does not read its answer


class Connections:
    """The open connections. If there are too many, the one that has been without a request for longest has to go.

    Args:
        options: The options of the server.
    """

    def __init__(self, options: ServeOptions):
        self._most = options.max_connections
        self._most_of_peer = options.max_connections_per_peer
        self._header_seconds = options.header_seconds
        self._of_peer: Counter[str] = Counter()
        self._idle: dict[str, OrderedDict[GuardedProtocol, None]] = {}
        self._all_idle: OrderedDict[GuardedProtocol, None] = OrderedDict()
        self._for_health: set[GuardedProtocol] = set()
        self._open: set[GuardedProtocol] = set()

    @property
    def full(self) -> bool:
        """Whether connections are turned away."""
        return bool(self._for_health)

    def is_for_health(self, client: tuple[str, int] | None) -> bool:
        """Return whether a connection may ask for health and metrics only."""
        return any(connection.client == client for connection in self._for_health)

    def admit(self, connection: "GuardedProtocol") -> None:
        """Take a new connection in, in the place of an idle one if need be, or close it."""
        peer = connection.peer
        room = self._of_peer[peer] < self._most_of_peer or self._close_idle(self._idle.get(peer))
        room = room and (self._count() < self._most or self._close_idle(self._all_idle))
        if not room and len(self._for_health) >= FOR_HEALTH and not self._close_idle(self._idle_for_health()):
            metrics.REJECTED.labels("connections").inc()
            connection.transport.abort()
            return
        self._open.add(connection)
        if room:
            self._of_peer[peer] += 1
        else:
            self._for_health.add(connection)
        self.idle(connection)

    def _count(self) -> int:
        return len(self._open) - len(self._for_health)

    def _idle_for_health(self) -> "OrderedDict[GuardedProtocol, None]":
        return OrderedDict.fromkeys(c for c in self._for_health if c in self._all_idle)

    def _close_idle(self, idle: "OrderedDict[GuardedProtocol, None] | None") -> bool:
        """Close the one of them that has been idle for longest, and return whether there was one."""
        if not idle:
            return False
        metrics.REJECTED.labels("connections").inc()
        oldest = next(iter(idle))
        self.remove(oldest)
        oldest.transport.abort()
        return True

    def idle(self, connection: "GuardedProtocol") -> None:
        """Expect the headers of a request in time."""
        if connection not in self._open:
            return
        self.busy(connection)
        self._idle.setdefault(connection.peer, OrderedDict())[connection] = None
        self._all_idle[connection] = None
        connection.timer = connection.loop.call_later(self._header_seconds, self._expire, connection)

    def busy(self, connection: "GuardedProtocol") -> None:
        """Expect no headers: a request is being answered."""
        if connection.timer is not None:
            connection.timer.cancel()
            connection.timer = None
        self._all_idle.pop(connection, None)
        idle = self._idle.get(connection.peer, OrderedDict())
        idle.pop(connection, None)
        if not idle:
            self._idle.pop(connection.peer, None)

    def remove(self, connection: "GuardedProtocol") -> None:
        """Forget a connection."""
        self.busy(connection)
        if connection not in self._open:
            return
        self._open.remove(connection)
        if connection in self._for_health:
            self._for_health.remove(connection)
            return
        self._of_peer[connection.peer] -= 1
        if not self._of_peer[connection.peer]:
            del self._of_peer[connection.peer]

    def _expire(self, connection: "GuardedProtocol") -> None:
        metrics.REJECTED.labels("headers").inc()
        self.remove(connection)
        connection.transport.abort()

    def protocol(self) -> "type[GuardedProtocol]":
        """Return the protocol for uvicorn."""

        class Protocol(GuardedProtocol):
            guard = self

        return Protocol


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol, which has a time-out for idle connections that have had an answer, and for no others."""

    guard: ClassVar[Connections]
    timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    @property
    def peer(self) -> str:
        """The address of the client, without its port."""
        return self.client[0] if self.client else ""

    def connection_made(self, transport: Any) -> None:
        """Admit the connection, or not."""
        super().connection_made(transport)
        self.guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room for another one."""
        self.guard.remove(self)
        self._stop_write_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Note whether the headers of a request are complete."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self.guard.busy(self)

    def on_response_complete(self) -> None:
        """Expect the next request."""
        self.guard.idle(self)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait for the client to read, but not for ever."""
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(_WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        self._stop_write_timer()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def fit_open_files(max_connections: int) -> int:
    """Raise the limit of open files of this process for that many connections to each of REST and gRPC.

    Returns:
        How many connections there can be.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return max_connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = 2 * max_connections + FOR_HEALTH + _OTHER_FILES
    if soft == unlimited or soft >= wanted:
        return max_connections
    allowed = wanted if hard == unlimited else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    possible = min(max_connections, max(8, (soft - FOR_HEALTH - _OTHER_FILES) // 2))
    if possible < max_connections:
        logger.warning(
            "This process may open %d files, enough for %d connections; --max-connections is %d. Raise `ulimit -n`.",
            soft,
            possible,
            max_connections,
        )
    return possible
