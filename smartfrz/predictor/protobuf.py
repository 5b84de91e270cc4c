"""Fields of protobuf messages, read without the classes that protoc makes of them."""

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_HIGH = bytes(range(0x80, 0x100))  # bytes of a number that goes on


def read_varint(view: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return a number of protobuf's variable length, and the position behind it.

    Raises:
        IndexError: If the bytes end within it.
        ValueError: If it has more than ten bytes.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than ten bytes")


def read_fields(view: memoryview, start: int, end: int, message: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, start and end of the value of each field of a message.

    Args:
        view: The bytes.
        start: Where the message begins in them.
        end: Where it ends.
        message: Its name, for errors.

    Raises:
        IndexError: If the bytes end within a number.
        ValueError: If it is no message.
    """
    position = start
    while position < end:
        tag, position = read_varint(view, position)
        number, kind = tag >> 3, tag & 7
        if tag >= 2**32 or number == 0:
            raise ValueError(f"field {number}")
        first = position
        if kind == BYTES:
            length, first = read_varint(view, position)
            position = first + length
            if position > end:
                raise ValueError(f"field {number} of {message} extends beyond its message")
        elif kind == VARINT:
            _, position = read_varint(view, position)
        elif kind in (FIXED64, FIXED32):
            position += 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        yield number, kind, first, position
    if position != end:
        raise ValueError(f"{message} ends inside a field")


class Message:
    """A message, by the numbers of its fields. A field of another wire type than is asked for does not count.

    Args:
        view: Its bytes.
        left: How many fields may still be read, in a list of one number: of this message, and of those inside of it that
            are asked for.

    Raises:
        IndexError: If they end within a number.
        ValueError: If they are no message, or one of too many fields.
    """

    def __init__(self, view: memoryview, left: list[int]):
        self._view = view
        self._left = left
        self._places: dict[tuple[int, int], list[slice]] = {}
        for number, kind, start, end in read_fields(view, 0, len(view), "a message"):
            left[0] -= 1
            if left[0] < 0:
                raise ValueError("too many fields")
            self._places.setdefault((number, kind), []).append(slice(start, end))

    @property
    def numbers(self) -> set[int]:
        """The numbers of its fields."""
        return {number for number, _ in self._places}

    def texts(self, number: int) -> list[memoryview]:
        """Return the bytes of each text, message or packed list in a field."""
        return [self._view[place] for place in self._places.get((number, BYTES), [])]

    def text(self, number: int) -> memoryview:
        """Return the bytes of a field that may be there once; none if it is not there.

        Raises:
            ValueError: If it is there twice, of which readers merge messages, and take the last text.
        """
        found = self.texts(number)
        if len(found) > 1:
            raise ValueError(f"field {number} is there {len(found)} times; expected one")
        return found[0] if found else memoryview(b"")

    def messages(self, number: int) -> Iterator["Message"]:
        """Yield each message in a field."""
        return (Message(text, self._left) for text in self.texts(number))

    def message(self, number: int) -> "Message":
        """Return the message in a field that may be there once; an empty one if it is not there."""
        return Message(self.text(number), self._left)

    def count(self, number: int, kind: int = VARINT) -> int:
        """Return how many numbers a field has, packed or not.

        Args:
            number: The field.
            kind: `VARINT`, `FIXED32` or `FIXED64`.
        """
        packed = [
            len(bytes(text).translate(None, _HIGH)) if kind == VARINT else len(text) // (8 if kind == FIXED64 else 4)
            for text in self.texts(number)
        ]
        return len(self._places.get((number, kind), [])) + sum(packed)

    def integers(self, number: int) -> list[int]:
        """Return the integers in a field, packed or not, as int64."""
        places = [(self._view, place.start) for place in self._places.get((number, VARINT), [])]
        found = [_signed(read_varint(view, start)[0]) for view, start in places]
        for text in self.texts(number):
            position = 0
            while position < len(text):
                value, position = read_varint(text, position)
                found.append(_signed(value))
        return found

    def integer(self, number: int) -> int | None:
        """Return the integer in a field that may be there once; None if it is not there."""
        found = self.integers(number)
        if len(found) > 1:
            raise ValueError(f"field {number} is there {len(found)} times; expected one")
        return found[0] if found else None


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
