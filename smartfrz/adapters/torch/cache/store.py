"""Activations kept by sample: in memory up to a limit, then in one memory-mapped file."""

import contextlib
import logging
import math
import mmap
import os
import re
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

logger = logging.getLogger("smartfrz")
StoreDtype = Literal["float32", "float16", "bfloat16"]
ROUNDED: dict[StoreDtype, torch.dtype | None] = {
    "float32": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
GROWTH_BYTES = 64 * 2**20  # The file grows in steps of this size.
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(value: int | str, name: str) -> int:
    """Return a number of bytes, from a number or from text such as "2GB" or "512MiB".

    Args:
        value: What the user passed.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f'`{name}` is {value!r}; expected a number of bytes, or text such as "2GB" or "512MiB".')
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class Field:
    """One tensor that is kept for every sample.

    Attributes:
        shape: Shape of one sample's row.
        dtype: Dtype of the rows.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def kept_dtype(self, rounded: torch.dtype | None) -> torch.dtype:
        """Return the dtype in which rows are kept.

        Args:
            rounded: The dtype to which floating point values are rounded, where that is narrower.
        """
        is_narrower = self.dtype.is_floating_point and rounded is not None and rounded.itemsize < self.dtype.itemsize
        return rounded if rounded is not None and is_narrower and self.shape else self.dtype


class ActivationStore:
    """Rows of activations by sample key.

    A row for which there is no room is not kept. When the disk is full no more rows go there, and
    nothing is raised. The file has no name, and vanishes with the store or the process.

    Args:
        fields: What is kept of each sample.
        memory: Maximum number of bytes in memory.
        disk: Maximum number of bytes in the file.
        dtype: `float32` keeps floating point fields as they are, whatever their dtype; `float16` and
            `bfloat16` round them.
        growth: Bytes by which the file grows.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        *,
        memory: int,
        disk: int = 0,
        dtype: StoreDtype = "float32",
        growth: int = GROWTH_BYTES,
    ):
        self.fields = list(fields)
        self._dtypes = [field.kept_dtype(ROUNDED[dtype]) for field in fields]
        self._sizes = [math.prod(f.shape) * d.itemsize for f, d in zip(self.fields, self._dtypes, strict=True)]
        self.row_bytes = sum(self._sizes)
        self._memory_limit, self._disk_limit, self._growth = memory, disk, growth
        self._memory: dict[int, torch.Tensor] = {}
        self._file = _GrowingFile(self.row_bytes)
        self._slots: dict[int, int] = {}  # numbers of rows in the file
        self._free: list[int] = []
        self._fingerprints: dict[int, int] = {}
        self.disk_is_full = False

    def __len__(self) -> int:
        return len(self._fingerprints)

    def __contains__(self, key: int) -> bool:
        return key in self._fingerprints

    def has(self, key: int, fingerprint: int) -> bool:
        """Whether there is a row for this key that was computed from inputs with this fingerprint."""
        return self._fingerprints.get(key) == fingerprint

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory in use."""
        return len(self._memory) * self.row_bytes

    @property
    def disk_bytes(self) -> int:
        """Size of the file."""
        return len(self._file) * self.row_bytes

    def put(self, keys: Sequence[int], tensors: Sequence[torch.Tensor], fingerprints: Sequence[int]) -> int:
        """Keep these rows, in place of any that have the same keys.

        Args:
            keys: One for each sample.
            tensors: For each field the rows, `[n, *shape]`, on any device.
            fingerprints: Fingerprints of the inputs from which the rows were computed.

        Returns:
            How many rows were kept. A row for which there is no room, or that the dtype cannot
            represent (infinite values, or too large ones), is not.
        """
        rows, representable = self._encode(tensors)
        kept = 0
        for key, row, fits, fingerprint in zip(keys, rows, representable.tolist(), fingerprints, strict=True):
            self.discard([key])
            if fits and self._write(key, row):
                self._fingerprints[key] = fingerprint
                kept += 1
        return kept

    def get(self, keys: Sequence[int]) -> list[torch.Tensor]:
        """Return for each field a new tensor `[n, *shape]`.

        Raises:
            KeyError: If there is no row for a key.
        """
        rows = torch.stack([self._memory[key] if key in self._memory else self._file[self._slots[key]] for key in keys])
        tensors = []
        for field, dtype, part in zip(self.fields, self._dtypes, rows.split(self._sizes, 1), strict=True):
            if len(self.fields) > 1:  # a view of another dtype has to begin at a multiple of its size
                part = part.clone(memory_format=torch.contiguous_format)
            values = part.view(dtype) if part.numel() else part.to(dtype)
            tensors.append(values.reshape(len(keys), *field.shape).to(field.dtype))
        return tensors

    def discard(self, keys: Sequence[int]) -> None:
        """Forget the rows of these keys, if there are any."""
        for key in keys:
            self._fingerprints.pop(key, None)
            self._memory.pop(key, None)
            if key in self._slots:
                self._free.append(self._slots.pop(key))

    def _encode(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows as bytes, uint8 `[n, row_bytes]`, and which rows the dtype can represent, bool `[n]`."""
        representable = torch.ones(len(tensors[0]), dtype=torch.bool)
        parts = []
        for field, dtype, size, tensor in zip(self.fields, self._dtypes, self._sizes, tensors, strict=True):
            values = tensor.detach().cpu().to(dtype).contiguous().reshape(len(tensor), size // dtype.itemsize)
            if dtype != field.dtype:
                representable &= values.isfinite().all(1)
            parts.append(values.view(torch.uint8))
        return torch.cat(parts, 1), representable

    def _write(self, key: int, row: torch.Tensor) -> bool:
        """Write a row where there is room for it; return whether there was."""
        if self.memory_bytes + self.row_bytes <= self._memory_limit:
            self._memory[key] = row.clone()
            return True
        if not self._free:
            self._grow()
        if not self._free:
            return False
        self._slots[key] = slot = self._free.pop()
        self._file[slot].copy_(row)
        return True

    def _grow(self) -> None:
        if self.disk_is_full or not self.row_bytes:
            return
        before = len(self._file)
        more = min(max(1, self._growth // self.row_bytes), self._disk_limit // self.row_bytes - before)
        if more < 1:
            return
        try:
            self._file.grow(more)
        except OSError as error:
            self.disk_is_full = True
            logger.warning(
                "The activation cache gets no more room in %s (%s); samples that it does not hold are computed at every "
                "epoch. Make room there, set TMPDIR to another folder, or lower `disk`.",
                tempfile.gettempdir(),
                error,
            )
            return
        self._free += range(before + more - 1, before - 1, -1)


class _GrowingFile:
    """Rows of bytes in a memory-mapped temporary file; the file has no name."""

    def __init__(self, row_bytes: int):
        self._row_bytes = row_bytes
        self._rows: torch.Tensor | None = None
        self._file: Any = None

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._rows is None:
            raise KeyError(index)
        return self._rows[index]

    def grow(self, more: int) -> None:
        """Add rows.

        Raises:
            OSError: If there is no room for them.
        """
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="smartfrz-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        before, size = len(self) * self._row_bytes, (len(self) + more) * self._row_bytes
        _allocate(self._file, before, size - before)
        mapped = mmap.mmap(self._file.fileno(), size)
        self._rows = torch.frombuffer(mapped, dtype=torch.uint8).view(-1, self._row_bytes)


def _allocate(file: Any, start: int, size: int) -> None:
    """Give a file more blocks: writing to the map of a sparse file on a full disk kills the process."""
    if hasattr(os, "posix_fallocate"):
        with contextlib.suppress(InterruptedError):
            os.posix_fallocate(file.fileno(), start, size)
            return
    file.seek(start)  # pragma: no cover
    zeros = bytes(2**20)  # pragma: no cover
    while size > 0:  # pragma: no cover
        size -= file.write(zeros[: min(size, len(zeros))])
    file.flush()  # pragma: no cover
