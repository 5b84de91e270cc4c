"""Bodies of requests: read whole, never more than allowed, and never more at once than there is room for."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from smartfrz.serving import metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY = "smartfrz.body"
READ_SECONDS = 60.0  # for the whole of a body
DISCARD_BYTES, DISCARD_SECONDS = 2**28, 5.0
MAX_QUEUE = 2000  # requests that wait for room


class Refused(Exception):
    """A request that is not read."""

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status = status
        self.reason = reason


class Room:
    """So many bytes of requests are held at once; the next one waits, and nobody overtakes.

    Args:
        size: In bytes.
    """

    def __init__(self, size: int):
        self._free = size
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        """While the block lasts, so many bytes are taken.

        Raises:
            Refused: If too many wait already.
        """
        if len(self._queue) >= MAX_QUEUE:
            raise Refused(
                503, "queue", "The server has more requests than it can read; expected fewer. Try again later."
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((size, turn))
        self._let_in()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._free += size
            else:
                turn.cancel()
            self._let_in()

    def _let_in(self) -> None:
        while self._queue and (self._queue[0][1].done() or self._queue[0][0] <= self._free):
            size, turn = self._queue.popleft()
            if not turn.done():
                self._free -= size
                turn.set_result(None)


class Intake:
    """Reads the body of each request, and lets the application have it as `scope[BODY]`.

    Args:
        app: The application.
        max_bytes: Of one body. One that says that it is longer is refused before it is read, one that
            turns out to be longer there.
        room: Of the bodies that are held at once; None for eight times `max_bytes`.
    """

    def __init__(self, app: App, max_bytes: int, room: Room | None = None):
        self._app = app
        self._max_bytes = max_bytes
        self._room = room or Room(8 * max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._serve(scope, receive, send)
        except Refused as refused:
            metrics.REJECTED.labels(refused.reason).inc()
            await _refuse(refused, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if scope["method"] in ("GET", "HEAD") and b"transfer-encoding" not in headers:
            length = int(headers.get(b"content-length", b"0"))  # the server has checked that it is a number
        else:
            length = int(headers.get(b"content-length", str(self._max_bytes).encode()))
        if length > self._max_bytes:
            raise self._too_large(f"{length} bytes long")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "encoding", "The body is compressed; expected it as it is.")
        # What has no body, as questions about the server's health, waits for nobody.
        async with self._room.taken(length) if length else contextlib.nullcontext():
            try:
                async with asyncio.timeout(READ_SECONDS):
                    scope[BODY] = await self._read(receive)
            except TimeoutError:
                raise Refused(408, "slow", f"The body did not come within {READ_SECONDS:.0f} seconds.") from None
            if scope[BODY] is not None:
                await self._app(scope, receive, send)

    async def _read(self, receive: Receive) -> bytearray | None:
        """The body; None if the client has gone."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_large("longer")
            more = message.get("more_body", False)
        return body

    def _too_large(self, what: str) -> Refused:
        return Refused(
            413,
            "size",
            f"The body is {what}; expected at most {self._max_bytes} bytes. Send tensors as binary data, and ask about "
            "fewer layers at once.",
        )


async def _refuse(refused: Refused, receive: Receive, send: Send) -> None:
    body = orjson.dumps({"error": str(refused)})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    if refused.status == 503:
        headers.append((b"retry-after", b"1"))
    # Who is still sending would not read the answer, and would find the connection reset.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            discarded, more = 0, True
            while more and discarded < DISCARD_BYTES:
                message = await receive()
                discarded += len(message.get("body", b""))
                more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
