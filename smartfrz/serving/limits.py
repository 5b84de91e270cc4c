"""Limits on requests over REST: the size, the rate and the time of bodies, and how many bytes are held at once."""

import asyncio
import contextlib
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smartfrz.predictor.remote import HEADER_LENGTH
from smartfrz.serving import metrics
from smartfrz.serving.connections import Connections
from smartfrz.serving.options import ServeOptions
from smartfrz.serving.room import Room, Upload

BODY = "smartfrz.body"
BODIES = 8  # of the largest size that are held at once
ROOM_SECONDS = 60.0  # by then a client has given up and asked again
DISCARD_BYTES, DISCARD_SECONDS = 2**28, 5.0
# While nobody gets room for so long, or there are too many connections, a body may not stop for longer, and has to arrive
# so many times as fast. Where many honest clients wait, room becomes free all the time.
PRESSED_SECONDS, PRESSED_RATE = 2.0, 16
_LOOK_SECONDS = 0.2
_NOT_READ = ("slow", "connections", "queue")  # reasons for which the server is not willing to read what is still sent
_HEALTH = ("/v2/health/", "/metrics")
_HEADER_LENGTH = HEADER_LENGTH.lower().encode()


class Refused(Exception):
    """A request that is refused before it is complete."""

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status = status
        self.reason = reason


@dataclass(eq=False, kw_only=True)
class _Timed(Upload):
    """A body on its way. Only the time in which the server waits for the client counts.

    Attributes:
        timeout: Ends reading, or waiting for room.
        received: Number of bytes so far.
        waited: Seconds that the server has waited for the client, up to the last bytes.
        behind: Seconds by which it is behind the lowest rate. What came faster earlier does not count.
        behind_pressed: The same for the rate while room is short.
        since: When it began to wait for the next bytes; None while it does something else.
    """

    timeout: asyncio.Timeout
    received: int = 0
    waited: float = 0.0
    behind: float = 0.0
    behind_pressed: float = 0.0
    since: float | None = None


class BodyLimits:
    """ASGI middleware that reads each request's body within the limits, and stores it as `scope[BODY]`.

    Bodies are read before the application sees the request, so that every path has the same limits and a connection stays
    usable whatever was sent on it.

    Args:
        app: The application.
        options: The options of the server.
        connections: The connections on which requests come.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions, connections: Connections):
        self._app = app
        self._options = options
        self._connections = connections
        self._room = Room(BODIES * options.max_request_bytes, options.max_request_bytes)
        self._uploads: set[_Timed] = set()
        self._looking = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body and pass the request on, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._serve(scope, receive, noting)
        except Refused as refused:
            metrics.REJECTED.labels(refused.reason).inc()
            if refused.reason not in _NOT_READ:
                await _discard(receive)
            headers = {"Connection": "close"} | ({"Retry-After": "1"} if refused.status == 503 else {})
            await JSONResponse({"error": str(refused)}, refused.status, headers)(scope, receive, send)
        except asyncio.CancelledError:  # uvicorn cancels what is left when the grace period ends, and would answer 500
            if started:
                raise
            message = "The server shuts down, and had no time left for this request. Try again later."
            headers = {"Connection": "close", "Retry-After": "1"}
            await JSONResponse({"error": message}, 503, headers)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._connections.is_for_health(scope.get("client")) and not scope["path"].startswith(_HEALTH):
            raise Refused(503, "connections", "There are too many connections. Try again later.")
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "encoding", "The body is compressed; expected it uncompressed.")
        largest, length = self._sizes(scope["method"], headers)
        if length > largest:
            raise self._too_large(f"{length} bytes long", largest)
        upload = _Timed(length, timeout=asyncio.timeout(None))
        try:
            body = await self._read(receive, upload)
            if body is not None:
                scope[BODY] = body
                del body  # the endpoint takes it out of the scope, so that it can be freed while the request waits
                await self._app(scope, receive, send)
        finally:
            self._room.give_back(upload)

    def _sizes(self, method: str, headers: dict[bytes, bytes]) -> tuple[int, int]:
        """Return the maximum size of a body with these headers, and its size, or the maximum if that is not known.

        Lists of numbers cost far more time and memory than binary data, so JSON has a limit of its own.
        """
        largest = most_json = min(self._options.max_json_bytes, self._options.max_request_bytes)
        json_length = headers.get(_HEADER_LENGTH)
        if json_length is not None:
            largest = self._options.max_request_bytes
        length = largest
        if b"content-length" in headers:
            length = int(headers[b"content-length"])  # h11 has checked that it is a number
        elif method in ("GET", "HEAD") and b"transfer-encoding" not in headers:
            length = 0
        # What is no number, or beyond the body, is refused before it is parsed.
        if json_length is not None and json_length.isdigit() and most_json < int(json_length[:12]) <= length:
            raise self._too_large(f"JSON of {json_length[:12].decode()} bytes and binary data", most_json)
        return largest, length

    async def _read(self, receive: Receive, upload: _Timed) -> bytearray | None:
        """Return the body, or None if the client disconnects."""
        self._uploads.add(upload)
        self._look_at_uploads()
        try:
            async with upload.timeout:
                body = await self._read_pieces(receive, upload)
        except TimeoutError:
            if upload.since is None:
                message = f"There was no room for this request within {ROOM_SECONDS:.0f} seconds. Try again later."
                raise Refused(503, "queue", message) from None
            message = (
                f"The body did not arrive within the time there is: {upload.received} bytes in {upload.waited:.1f} seconds, "
                f"and then none for {asyncio.get_running_loop().time() - upload.since:.1f} seconds. Send it at once."
            )
            raise Refused(408, "slow", message) from None
        finally:
            self._uploads.remove(upload)
        self._room.complete(upload)
        return body

    async def _read_pieces(self, receive: Receive, upload: _Timed) -> bytearray | None:
        body = bytearray()
        clock = asyncio.get_running_loop().time
        more = True
        while more:
            upload.since = clock()
            message = await receive()
            waited = clock() - upload.since
            upload.waited += waited
            upload.since = None
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            upload.received += len(piece)
            slack = len(piece) / self._options.min_rate
            upload.behind = max(0.0, upload.behind + waited - slack)
            upload.behind_pressed = max(0.0, upload.behind_pressed + waited - slack / PRESSED_RATE)
            if upload.received > upload.largest:
                raise self._too_large("longer", upload.largest)
            if message.get("more_body", False) and self._is_late(upload, 0.0, pressed=False):
                upload.since = clock()
                raise TimeoutError  # a piece that comes at the very moment of a look does not put the end off
            if piece:
                await self._take_room(upload, len(piece))
                body += piece
            more = message.get("more_body", False)
        return body

    async def _take_room(self, upload: _Timed, size: int) -> None:
        upload.timeout.reschedule(asyncio.get_running_loop().time() + ROOM_SECONDS)
        await self._room.take(upload, size)
        upload.timeout.reschedule(None)

    def _look_at_uploads(self) -> None:
        """Look from time to time, while there are uploads, which of them are too slow."""
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._end_slow_uploads)

    def _end_slow_uploads(self) -> None:
        self._looking = False
        now = asyncio.get_running_loop().time()
        pressed = self._room.stuck_seconds > PRESSED_SECONDS or self._connections.full
        for upload in self._uploads:
            if upload.since is None or upload.timeout.expired():
                continue
            if self._is_late(upload, now - upload.since, pressed):
                upload.timeout.reschedule(now)
        if self._uploads:
            self._look_at_uploads()

    def _is_late(self, upload: _Timed, silent: float, pressed: bool) -> bool:
        stall = self._options.stall_seconds
        late = upload.behind + silent > stall or upload.waited + silent > self._options.body_seconds
        return late or (pressed and upload.behind_pressed + silent > min(stall, PRESSED_SECONDS))

    def _too_large(self, what: str, largest: int) -> Refused:
        message = (
            f"The body is {what}; expected at most {largest} bytes. Send tensors as binary data, and ask about "
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
