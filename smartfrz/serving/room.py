"""Room in memory for request bodies: it is given to bytes that have arrived, not to those that a client announces."""

import asyncio
from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class Upload:
    """A body on its way.

    Attributes:
        largest: Most bytes that it can have.
        held: Bytes that have arrived and hold room.
    """

    largest: int
    held: int = 0


class Room:
    """A number of bytes that uploads share. Those that do not fit wait in the order in which they came.

    Uploads that all wait for each other would never end. So the last `largest` bytes are kept for one upload at a time,
    the first in the line, which can end whatever the others do.

    Args:
        size: Number of bytes.
        largest: Most bytes that an upload can have.
    """

    def __init__(self, size: int, largest: int):
        self._free = size
        self._reserve = largest
        self._first: Upload | None = None  # may use the reserve
        self._line: deque[tuple[Upload, int, asyncio.Future[None]]] = deque()
        self._moved = 0.0  # when the line has moved, or begun

    @property
    def stuck_seconds(self) -> float:
        """For how long uploads have waited for room and none has got any."""
        return asyncio.get_running_loop().time() - self._moved if self._line else 0.0

    async def take(self, upload: Upload, size: int) -> None:
        """Hold `size` bytes more for an upload, once they are free."""
        if upload is self._first or (not self._line and self._free - size >= self._reserve):
            self._grant(upload, size)
            return
        if not self._line:
            self._moved = asyncio.get_running_loop().time()
        entry = (upload, size, asyncio.get_running_loop().create_future())
        self._line.append(entry)
        self._move_up()
        try:
            await entry[2]
        finally:
            if entry in self._line:  # it has been refused
                self._line.remove(entry)
                self._move_up()

    def complete(self, upload: Upload) -> None:
        """Leave the reserve to another upload; what it holds stays held."""
        if self._first is upload:
            self._first = None
            self._move_up()

    def give_back(self, upload: Upload) -> None:
        """Free all that an upload holds."""
        self._free += upload.held
        upload.held = 0
        self.complete(upload)
        self._move_up()

    def _grant(self, upload: Upload, size: int) -> None:
        upload.held += size
        self._free -= size

    def _move_up(self) -> None:
        while self._line:
            upload, size, turn = self._line[0]
            if self._free - size < self._reserve:
                if self._first is not None or self._free < upload.largest - upload.held:
                    return
                self._first = upload
            self._line.popleft()
            if not turn.done():  # its task may have been cancelled in this very moment
                self._grant(upload, size)
                self._moved = asyncio.get_running_loop().time()
                turn.set_result(None)
            elif self._first is upload:
                self._first = None
