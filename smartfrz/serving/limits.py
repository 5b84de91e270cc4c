"""Limits on request bodies: their size, their time, and how many bytes are held at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from smartfrz.serving import metrics

BODY = "smartfrz.body"
READ_SECONDS = 60.0  # for a whole body
DISCARD_BYTES, DISCARD_SECONDS = 2**28, 5.0
MAX_QUEUE = 2000  # requests that wait for room


class Refused(Exception):
    """A request that is refused before it is complete."""

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status = status
        self.reason = reason


class Room:
    """A number of bytes that requests share. Those that do not fit wait in the order of their arrival.

    Args:
        size: Number of bytes.
    """

    def __init__(self, size: int):
        self._free = size
        self._waiting = 0
        self._turn = asyncio.Lock()  # fair: the first to wait is the first to enter
        self._freed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes for the duration of the block, once they are free.

        Raises:
            Refused: If too many requests wait already.
        """
        if self._waiting >= MAX_QUEUE:
            raise Refused(503, "queue", f"{MAX_QUEUE} requests are waiting to be read. Try again later.")
        self._waiting += 1
        try:
            await self._take(size)
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._free += size
            self._freed.set()

    async def _take(self, size: int) -> None:
        async with self._turn:
            while size > self._free:
                self._freed.clear()
                await self._freed.wait()
            self._free -= size


class BodyLimits:
    """ASGI middleware that reads each request's body within the limits, and stores it as `scope[BODY]`.

    Bodies are read before the application sees the request, so that every path has the same limits and a connection stays
    usable whatever was sent on it.

    Args:
        app: The application.
        max_bytes: Maximum size of a body. Eight times as many bytes are held at once.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes
        self._room = Room(8 * max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body and pass the request on, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        try:
            await self._serve(scope, receive, send)
        except Refused as refused:
            metrics.REJECTED.labels(refused.reason).inc()
            await _discard(receive)
            headers = {"Connection": "close"} | ({"Retry-After": "1"} if refused.status == 503 else {})
            await JSONResponse({"error": str(refused)}, refused.status, headers)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        length = self._announced(scope["method"], headers)
        if length > self._max_bytes:
            raise self._too_large(f"{length} bytes long")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "encoding", "The body is compressed; expected it uncompressed.")
        # Requests without a body, such as health checks, do not wait for room.
        async with self._room.reserve(length) if length else contextlib.nullcontext():
            try:
                async with asyncio.timeout(READ_SECONDS):
                    body = await self._read(receive)
            except TimeoutError:
                raise Refused(408, "slow", f"The body did not arrive within {READ_SECONDS:.0f} seconds.") from None
            if body is not None:
                scope[BODY] = body
                del body  # the endpoint takes it out of the scope, so that it can be freed while the request waits
                await self._app(scope, receive, send)

    def _announced(self, method: str, headers: dict[bytes, bytes]) -> int:
        """Return the size of the body, or the maximum if the client does not give it."""
        if b"content-length" in headers:
            return int(headers[b"content-length"])  # h11 has checked that it is a number
        has_no_body = method in ("GET", "HEAD") and b"transfer-encoding" not in headers
        return 0 if has_no_body else self._max_bytes

    async def _read(self, receive: Receive) -> bytearray | None:
        """Return the body, or None if the client disconnects."""
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
        message = (
            f"The body is {what}; expected at most {self._max_bytes} bytes. Send tensors as binary data, and ask about "
            "fewer layers at once."
        )
        return Refused(413, "size", message)


async def _discard(receive: Receive) -> None:
    """Read what the client still sends: until then it would not read an answer, only find the connection reset."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            discarded, more = 0, True
            while more and discarded < DISCARD_BYTES:
                message = await receive()
                discarded += len(message.get("body", b""))
                more = message.get("more_body", False)
