"""Activations kept by sample: in memory up to a budget, then in memory-mapped files. Knows no framework."""

import contextlib
import hashlib
import json
import logging
import math
import mmap
import os
import re
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from smartfrz.errors import UsageError
from smartfrz.files import replacing

logger = logging.getLogger("smartfrz")
StoreDtype = Literal["float32", "float16", "bfloat16", "int8"]
DTYPES: tuple[str, ...] = get_args(StoreDtype)
FORMAT_VERSION = 1
SLAB_BYTES = 64 * 2**20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_OURS = ("*.rows", "*.index.npz")


def parse_bytes(value: int | str, name: str) -> int:
    """A number of bytes, from a number or from text such as "2GB" or "512MiB".

    Args:
        value: What the user gave.
        name: Of the argument, for the error.

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
    """One array that is kept of every sample.

    Attributes:
        shape: Of one sample's row.
        dtype: As NumPy names it; or `bfloat16`, which NumPy lacks: its bits travel as uint16.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def carrier(self) -> np.dtype[Any]:
        """The NumPy dtype in which rows go in and come out."""
        return np.dtype(np.uint16 if self.dtype == "bfloat16" else self.dtype)


class Budget:
    """Bytes that may still be used. Several stores may share one.

    Args:
        memory: Bytes of memory.
        disk: Bytes of disk.
    """

    def __init__(self, memory: int, disk: int):
        self.memory = memory
        self.disk = disk


class CacheFolder:
    """A folder of activations that one process at a time may use.

    Args:
        path: The folder; it is made.

    Raises:
        UsageError: If another process, or another cache of this one, uses the folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        try:
            import fcntl
        except ImportError as error:  # pragma: no cover
            raise UsageError(
                f"`folder` is {os.fspath(path)!r}, but this system has no file locks that SmartFRZ knows. Leave out "
                "`folder`: the cache then lives in temporary files."
            ) from error
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        # The lock ends with this object, or with the process, however it ends.
        self._close = weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(lock, 100).decode(errors="replace").strip() or "another one"
            self.close()
            raise UsageError(
                f"The cache folder {self.path} is in use by process {owner}; expected a folder of this run alone. Give "
                "each run its own `folder`."
            ) from error
        os.truncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())

    def sweep(self, keep: Collection[str]) -> None:
        """Remove the files of every store but those of these names."""
        for pattern in _OURS:
            for file in self.path.glob(pattern):
                if not file.name.startswith(tuple(keep)):
                    file.unlink()

    def close(self) -> None:
        """Let others use the folder."""
        self._close()


class _Codec:
    """How one field becomes bytes and back."""

    def __init__(self, field: Field, dtype: StoreDtype):
        self.field = field
        is_float = field.dtype == "bfloat16" or np.dtype(field.dtype).kind == "f"
        narrower = {"float16": 2, "bfloat16": 2, "int8": 1}.get(dtype, 8) < field.carrier.itemsize
        self.kind = dtype if is_float and narrower and field.shape else "exact"
        size = math.prod(field.shape)
        # Channels: the first axis of pictures, the last one of tokens
        self._axis = 0 if len(field.shape) >= 3 else len(field.shape) - 1
        self._channels = field.shape[self._axis] if len(field.shape) >= 2 else 1
        if self.kind == "int8" and size <= 8 * self._channels:
            # the two numbers of each channel would take more than they spare
            self.kind = "float16" if field.carrier.itemsize > 2 else "exact"
        self.num_bytes = {
            "exact": size * field.carrier.itemsize,
            "float16": 2 * size,
            "bfloat16": 2 * size,
            "int8": size + 8 * self._channels,
        }[self.kind]

    def encode(self, rows: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Bytes `[n, num_bytes]`, and which rows they can represent, bool `[n]`."""
        n = len(rows)
        fine = np.ones(n, np.bool_)
        if self.kind == "exact":
            return _as_bytes(rows), fine
        values = self._floats(rows)
        if self.kind == "float16":
            with np.errstate(over="ignore"):
                half = values.astype(np.float16)
            fine = _finite(half)
            return _as_bytes(half), fine
        fine = _finite(values)
        if self.kind == "bfloat16":
            return _as_bytes(_to_bfloat16(values)), fine
        values = np.where(fine.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
        by_channel = self._by_channel(values)
        low, high = by_channel.min(2, keepdims=True), by_channel.max(2, keepdims=True)
        step = (high - low) / np.float32(255)
        fine &= _finite(step)
        codes = np.rint((by_channel - low) / np.where(step > 0, step, 1)).astype(np.uint8)
        return np.concatenate([codes.reshape(n, -1), _as_bytes(low), _as_bytes(step)], 1), fine

    def decode(self, data: NDArray[np.uint8]) -> NDArray[Any]:
        """Rows `[n, *shape]` of bytes `[n, num_bytes]`."""
        n, shape = len(data), (len(data), *self.field.shape)
        if self.kind == "exact":
            return data.view(self.field.carrier).reshape(shape)
        if self.kind == "float16":
            values = data.view(np.float16).astype(np.float32)
        elif self.kind == "bfloat16":
            values = _from_bfloat16(data.view(np.uint16))
        else:
            ends = -8 * self._channels, -4 * self._channels
            codes = data[:, : ends[0]].reshape(n, self._channels, -1)
            low = np.ascontiguousarray(data[:, ends[0] : ends[1]]).view(np.float32)[..., None]
            step = np.ascontiguousarray(data[:, ends[1] :]).view(np.float32)[..., None]
            values = codes * step + low
            if self._axis:
                values = np.ascontiguousarray(values.swapaxes(1, 2))
        values = values.reshape(shape)
        return _to_bfloat16(values) if self.field.dtype == "bfloat16" else values.astype(self.field.dtype, copy=False)

    def _floats(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            return _from_bfloat16(rows) if self.field.dtype == "bfloat16" else rows.astype(np.float32, copy=False)

    def _by_channel(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """`[n, channels, values of one channel]`."""
        if self._axis:
            return values.swapaxes(1, 2)
        return values.reshape(len(values), self._channels, -1)


def _finite(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows hold neither NaN nor infinity, bool `[n]`."""
    finite: NDArray[np.bool_] = np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)
    return finite


def _as_bytes(rows: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8).reshape(len(rows), -1)


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class ActivationStore:
    """Rows of activations by sample key, in memory first and then on disk.

    A row that no longer fits is not kept. When the disk is full no more rows go there, and nothing
    is raised. Without a folder the files have no name: they vanish with the process. With a folder
    they stay, and a later store of the same identity takes over the rows that the last `flush`
    wrote down.

    Args:
        fields: What is kept of each sample.
        budget: Bytes that may be used.
        dtype: How floating point fields are kept. `float32`: as they come, whatever their dtype.
            `float16`, `bfloat16`: rounded. `int8`: 255 steps between the least and the largest
            value of each channel of each sample; `float16` where a channel has no more than 8 values.
        folder: Where files with names go.
        identity: What the rows depend on: plain data. Needed with a folder.
        slab_bytes: Size of one file.

    Raises:
        ValueError: If `dtype` is none of these.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        budget: Budget,
        *,
        dtype: StoreDtype = "float32",
        folder: CacheFolder | None = None,
        identity: Mapping[str, Any] | None = None,
        slab_bytes: int = SLAB_BYTES,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` is {dtype!r}; expected one of {', '.join(DTYPES)}.")
        self.fields = list(fields)
        self._codecs = [_Codec(field, dtype) for field in fields]
        self._ends = np.cumsum([0, *(codec.num_bytes for codec in self._codecs)]).tolist()
        self.row_bytes: int = self._ends[-1]
        self.budget = budget
        self._slab_bytes = slab_bytes
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._slabs: list[tuple[Any, NDArray[np.uint8]]] = []  # the map itself, and its rows
        self._slab_rows = 0
        self._unproven: dict[int, int] = {}  # checksums of rows that an earlier process wrote
        self.fingerprints: dict[int, int] = {}
        self.disk_is_full = False
        self._folder = folder
        facts = {"format_version": FORMAT_VERSION, "dtype": dtype, "fields": [asdict(f) for f in fields]}
        self._identity = json.dumps(facts | {"of": dict(identity or {})}, sort_keys=True)
        self.name = hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        if folder is not None:
            self._reopen(folder)

    def __len__(self) -> int:
        return len(self._memory) + len(self._slots)

    def __contains__(self, key: int) -> bool:
        expected = self._unproven.pop(key, None)
        if expected is not None and zlib.crc32(self._at(key).data) != expected:
            self.discard([key])
        return key in self._memory or key in self._slots

    def has(self, key: int, fingerprint: int) -> bool:
        """Whether there is a row of this key that was computed from inputs of this fingerprint."""
        return key in self and self.fingerprints[key] == fingerprint

    @property
    def memory_bytes(self) -> int:
        """Of memory that the rows take."""
        return len(self._memory) * self.row_bytes

    @property
    def disk_bytes(self) -> int:
        """Of disk that the files take."""
        return sum(rows.nbytes for _, rows in self._slabs)

    def put(self, keys: Sequence[int], rows: Sequence[NDArray[Any]], fingerprints: Sequence[int]) -> int:
        """Keep these rows; those of keys that are there already are replaced.

        Args:
            keys: One for each sample.
            rows: For each field an array `[n, *shape]` of its carrier dtype.
            fingerprints: Of the inputs that the rows were computed from.

        Returns:
            How many rows were kept. A row that has no place, or that the dtype cannot represent
            (infinite values, or too large ones), is not.
        """
        encoded = [codec.encode(array) for codec, array in zip(self._codecs, rows, strict=True)]
        kept = 0
        for index, (key, fingerprint) in enumerate(zip(keys, fingerprints, strict=True)):
            self.discard([key])
            if not all(fine[index] for _, fine in encoded):
                continue
            place = self._place(key)
            if place is None:
                continue
            for (data, _), start, end in zip(encoded, self._ends, self._ends[1:], strict=False):
                place[start:end] = data[index]
            self.fingerprints[key] = fingerprint
            kept += 1
        return kept

    def get(self, keys: Sequence[int]) -> list[NDArray[Any]]:
        """For each field a new array `[n, *shape]` of its carrier dtype.

        Raises:
            KeyError: If a key is not there.
        """
        self.prefetch(keys)
        places = [self._row(key) for key in keys]
        arrays = []
        for codec, start, end in zip(self._codecs, self._ends, self._ends[1:], strict=False):
            data = np.empty((len(keys), end - start), np.uint8)
            for index, place in enumerate(places):
                data[index] = place[start:end]
            arrays.append(codec.decode(data))
        return arrays

    def prefetch(self, keys: Sequence[int]) -> None:
        """Have the system read these rows from the disk, without waiting for it."""
        for key in keys:
            slot = self._slots.get(key)
            if slot is None or not hasattr(mmap, "MADV_WILLNEED"):
                continue
            slab, offset = divmod(slot, self._slab_rows)
            start = offset * self.row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            end = min((offset + 1) * self.row_bytes, self._slabs[slab][1].nbytes)
            self._slabs[slab][0].madvise(mmap.MADV_WILLNEED, start, end - start)

    def discard(self, keys: Sequence[int]) -> None:
        """Forget these keys, where they are there."""
        for key in keys:
            self.fingerprints.pop(key, None)
            self._unproven.pop(key, None)
            if self._memory.pop(key, None) is not None:
                self.budget.memory += self.row_bytes
            elif (slot := self._slots.pop(key, None)) is not None:
                self._free.append(slot)

    def flush(self) -> None:
        """Write down which row is where, so that a later process can take them over; only with a folder."""
        if self._folder is None:
            return
        keys = list(self._slots)
        index = {
            "identity": np.array(self._identity),
            "key": np.array(keys, np.int64),
            "slot": np.array(list(self._slots.values()), np.int64),
            "fingerprint": np.array([self.fingerprints[key] for key in keys], np.int64),
            "checksum": np.array([self._unproven.get(k) or zlib.crc32(self._at(k).data) for k in keys], np.int64),
            "slab_rows": np.array(self._slab_rows),
        }
        with replacing(self._folder.path / f"{self.name}.index.npz") as path:
            np.savez(path, **index)  # type: ignore[arg-type]

    def clear(self) -> None:
        """Forget every row and give memory and disk back."""
        self.budget.memory += self.memory_bytes
        self.budget.disk += self.disk_bytes
        self._memory, self._slots, self._free, self._slabs = {}, {}, [], []
        self.fingerprints, self._unproven = {}, {}
        if self._folder is not None:
            for pattern in _OURS:
                for file in self._folder.path.glob(self.name + pattern):
                    file.unlink()

    def _row(self, key: int) -> NDArray[np.uint8]:
        if key not in self:
            raise KeyError(key)
        row = self._memory.get(key)
        return self._at(key) if row is None else row

    def _at(self, key: int) -> NDArray[np.uint8]:
        slab, offset = divmod(self._slots[key], self._slab_rows)
        row: NDArray[np.uint8] = self._slabs[slab][1][offset]
        return row

    def _place(self, key: int) -> NDArray[np.uint8] | None:
        """Where a new row may be written."""
        if self.row_bytes <= self.budget.memory:
            self.budget.memory -= self.row_bytes
            self._memory[key] = row = np.empty(self.row_bytes, np.uint8)
            return row
        if not self._free:
            self._add_slab()
        if not self._free:
            return None
        self._slots[key] = self._free.pop()
        return self._at(key)

    def _add_slab(self) -> None:
        if self.disk_is_full or not self.row_bytes:
            return
        if not self._slab_rows:
            self._slab_rows = min(max(1, self._slab_bytes // self.row_bytes), self.budget.disk // self.row_bytes)
        size = self._slab_rows * self.row_bytes
        if not 0 < size <= self.budget.disk:
            return
        try:
            self._open_slab(size, new=True)
        except OSError as error:
            self.disk_is_full = True
            where = self._folder.path if self._folder else tempfile.gettempdir()
            logger.warning(
                "The activation cache gets no more room in %s (%s); samples that are not in it yet are computed anew. "
                "Make room there, or lower `disk`.",
                where,
                error,
            )
            return
        self.budget.disk -= size
        start = (len(self._slabs) - 1) * self._slab_rows
        self._free += range(start + self._slab_rows - 1, start - 1, -1)

    def _open_slab(self, size: int, *, new: bool) -> None:
        """Map one more file.

        Its blocks are taken at once: writing to the map of a sparse file on a full disk ends the
        process with a signal.
        """
        if self._folder is None:
            file: Any = tempfile.TemporaryFile(prefix="smartfrz-")  # noqa: SIM115
        else:
            path = self._folder.path / f"{self.name}-{len(self._slabs):04d}.rows"
            file = path.open("w+b" if new else "r+b")
        with file:
            try:
                if new:
                    _allocate(file, size)
                if os.fstat(file.fileno()).st_size != size:
                    raise OSError(f"the file has {os.fstat(file.fileno()).st_size} bytes, not {size}")
                mapped = mmap.mmap(file.fileno(), size)
            except OSError:
                if self._folder is not None:
                    path.unlink()
                raise
        rows = np.frombuffer(mapped, np.uint8).reshape(-1, self.row_bytes)
        self._slabs.append((mapped, rows))

    def _reopen(self, folder: CacheFolder) -> None:
        """Take over what an earlier process left, if it is of the same identity."""
        path = folder.path / f"{self.name}.index.npz"
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                index = {name: file[name] for name in file.files}
            if str(index["identity"]) != self._identity:
                raise ValueError("another identity")
            self._slab_rows = int(index["slab_rows"])
            size = self._slab_rows * self.row_bytes
            while size and (folder.path / f"{self.name}-{len(self._slabs):04d}.rows").exists():
                if size > self.budget.disk:
                    break
                self._open_slab(size, new=False)
                self.budget.disk -= size
        # Whatever is wrong with it: it is a cache.
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if not isinstance(error, FileNotFoundError):
                logger.warning("The activation cache in %s cannot be used again (%s).", folder.path, error)
            self.clear()
            self._slab_rows = 0
            return
        end = len(self._slabs) * self._slab_rows
        for key, slot, fingerprint, checksum in zip(
            *(index[name].tolist() for name in ("key", "slot", "fingerprint", "checksum")), strict=True
        ):
            if slot < end:
                self._slots[key], self.fingerprints[key], self._unproven[key] = slot, fingerprint, checksum
        used = set(self._slots.values())
        self._free = [slot for slot in range(end - 1, -1, -1) if slot not in used]


def _allocate(file: Any, size: int) -> None:
    """Make the file this long, on blocks of its own."""
    if hasattr(os, "posix_fallocate"):
        with contextlib.suppress(InterruptedError):
            os.posix_fallocate(file.fileno(), 0, size)
            return
    zeros = bytes(2**20)  # pragma: no cover
    while size > 0:  # pragma: no cover
        size -= file.write(zeros[: min(size, len(zeros))])
    file.flush()  # pragma: no cover
