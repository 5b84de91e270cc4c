"""Datasets: many recorded runs in one small Parquet file, with the paths of the layers instead of their weights.

A predictor that reads `trajectory` or `trajectory+loss` can be trained from it. Labels are derived at load, as with
recordings.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from smartfrz.dataset_builder.storage import (
    RecordedRun,
    check_version,
    open_parquet,
    problems_of_facts,
    problems_of_values,
    read_facts,
    read_run,
    refuse,
    take_costs,
)
from smartfrz.errors import DatasetFormatError
from smartfrz.files import replacing
from smartfrz.predictor.training.paths import PackedPaths, make_paths

DATASET_VERSION = 1
_FACTS = b"smartfrz.dataset"
_CHECKSUM = b"smartfrz.sha256"
_SERIES = {"step": pa.int64(), "progress": pa.float64(), "loss": pa.float64(), "learning_rate": pa.float64()}
_TEXTS = ("run", "layer")
_PATHS = {"scale": pa.float32(), "steps": pa.float16(), "evenness": pa.float16()}
_SCALARS = {"timestamp": pa.int64(), **_SERIES, "cka": pa.float64()}
_COLUMNS = (*_TEXTS, *_SCALARS, *_PATHS)
# As in storage.py: a few bytes can stand for any number of values.
_ROOM = 2**28
_TIMES = 32
_TEXT_ENCODINGS = {"PLAIN", "RLE", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}
_LEFT_OUT = ("layer_facts", "format_version", "layers")  # not needed for training, or said elsewhere
_AGAIN = "Make it again with: smartfrz-build dataset RUNS --output FILE, or get the file anew."


@dataclass(frozen=True)
class PathOptions:
    """How paths are made from recordings.

    Attributes:
        records: Records per run, to which recordings are thinned.
        tailored_size: Number of weights in a draw.
        draws: Number of draws for each layer.
        seed: Seed of the draws; they differ from run to run.
    """

    records: int = 30
    tailored_size: int = 1024
    draws: int = 3
    seed: int = 0

    def every(self, facts: Mapping[str, Any]) -> int:
        """Return how many timestamps of a run, of which these are the facts, stand for one record."""
        return thinning(facts, self.records)


def thinning(facts: Mapping[str, Any], records: int) -> int:
    """Return of how many timestamps one is kept, so that about `records` of a run remain."""
    return max(1, round(facts["recipe"]["recording"]["records"] / records))


def with_paths(run: RecordedRun, options: PathOptions) -> RecordedRun:
    """Replace the weights of a run by the paths of its layers.

    Raises:
        DatasetFormatError: If its pool is smaller than a draw, or it is too short.
    """
    every = options.every(run.facts)
    if len(run.step) < every:
        raise DatasetFormatError(
            f"The recording {run.name!r} has {len(run.step)} timestamps; expected at least {every} for one record. Leave it "
            "out, or raise --records."
        )
    digest = hashlib.sha256(f"{options.seed}\0{run.name}".encode()).digest()
    try:
        seed = int.from_bytes(digest[:8], "little")
        paths = make_paths(run.weights, options.tailored_size, options.draws, seed, every)
    except ValueError as error:
        raise DatasetFormatError(f"The recording {run.name!r} cannot be used: {error}") from error
    facts = {key: value for key, value in run.facts.items() if key not in _LEFT_OUT}
    facts |= {"layers": run.layers, "values_sha256": run.sha256()}
    return replace(run, facts=facts, weights=_no_weights(run.cka), paths=paths)


def _no_weights(cka: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.empty((*cka.shape, 0), np.float32)


def write_dataset(path: str | os.PathLike[str], runs: Sequence[RecordedRun], options: PathOptions) -> None:
    """Write runs with paths to one file. The same runs give the same bytes.

    Args:
        path: The Parquet file to make.
        runs: What `with_paths` returned, with the same options.
        options: The options.

    Raises:
        DatasetFormatError: If two runs are the same.
        OSError: If the file cannot be written; nothing is left behind then.
    """
    check_doubles(runs)
    runs = sorted(runs, key=lambda run: run.name)
    described = []
    for run in runs:
        described.append(run.facts | {"timestamps": len(run.step)})
        if run.costs is not None:
            described[-1]["costs"] = run.costs.to_dict()
    said = {
        "format_version": DATASET_VERSION,
        "records": options.records,
        "tailored_size": options.tailored_size,
        "draws": options.draws,
        "seed": options.seed,
        "runs": described,
    }
    facts = json.dumps(said).encode()
    parts = [_columns(run, options.every(run.facts)) for run in runs]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in _COLUMNS}
    lengths = {name: np.concatenate([_lengths(run, options)[name] for run in runs]) for name in _PATHS}
    arrays = {name: pa.array(columns[name]).dictionary_encode() for name in _TEXTS}
    arrays |= {name: pa.array(columns[name], kind) for name, kind in _SCALARS.items()}
    for name, kind in _PATHS.items():
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths[name])]), pa.int32())
        arrays[name] = pa.ListArray.from_arrays(offsets, pa.array(columns[name], kind))
    table = pa.table(arrays)
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(
            temporary,
            table.schema,
            compression="zstd",
            compression_level=9,
            use_dictionary=["run", "layer", "timestamp", *_SERIES],
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _PATHS},
            write_page_checksum=True,
            store_schema=False,  # it would hold all facts once more
        ) as writer,
    ):
        writer.write_table(table)
        writer.add_key_value_metadata({_FACTS: facts, _CHECKSUM: _checksum(facts, columns).encode()})


def check_doubles(runs: Sequence[RecordedRun]) -> None:
    """Refuse runs that occur twice: a run to validate on would be among those to train on.

    Raises:
        DatasetFormatError: If two have the same name, or the same values.
    """
    names: set[str] = set()
    values: dict[str, str] = {}
    for run in runs:
        digest = run.facts.get("values_sha256") or run.sha256()
        if run.name in names:
            raise DatasetFormatError(
                f"Two recordings are called {run.name!r}; expected different names. Leave one of them out."
            )
        if digest in values:
            raise DatasetFormatError(
                f"The recordings {values[digest]!r} and {run.name!r} have the same values; expected different runs. Leave "
                "one of them out."
            )
        names.add(run.name)
        values[digest] = run.name


def _kept(records: int) -> dict[str, NDArray[np.bool_]]:
    """Return which entries of dense paths are stored, bool broadcast with `[layers, records, draws, records]`."""
    place = np.arange(records)
    return {
        "steps": np.broadcast_to(place <= place[:, None], (records, records))[None, :, None],
        "evenness": np.broadcast_to(place < place[:, None], (records, records))[None, :, None],
    }


def _columns(run: RecordedRun, every: int) -> dict[str, NDArray[Any]]:
    """Return the values of a run in the order of the file: by layer, timestamp, draw and dimension."""
    paths, timestamps, layers = run.require_paths(), len(run.step), len(run.layers)
    columns: dict[str, NDArray[Any]] = {
        "run": np.repeat(np.array([run.name], object), layers * timestamps),
        "layer": np.repeat(np.array(run.layers, object), timestamps),
        "timestamp": np.tile(np.arange(timestamps), layers),
        "cka": run.cka.reshape(-1),
        "scale": np.moveaxis(paths.scale, 0, 2).reshape(-1),
    }
    columns |= {name: np.tile(getattr(run, name), layers) for name in _SERIES}
    for name, kept in _kept(paths.steps.shape[2]).items():
        dense = np.moveaxis(getattr(paths, name), 0, 2)
        columns[name] = dense[np.broadcast_to(kept, dense.shape)]
    return columns


def _lengths(run: RecordedRun, options: PathOptions) -> dict[str, NDArray[np.int64]]:
    """Return how many values each row of a run has."""
    every, timestamps = options.every(run.facts), len(run.step)
    number = np.zeros(timestamps, np.int64)
    records = number[every - 1 :: every]
    records[:] = np.arange(1, len(records) + 1)
    rows = {"scale": np.minimum(number, 1), "steps": number, "evenness": np.maximum(number - 1, 0)}
    return {name: np.tile(options.draws * row, len(run.layers)) for name, row in rows.items()}


def _checksum(facts: bytes, columns: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the facts as written and of every value."""
    digest = hashlib.sha256(facts)
    for name in (*_SCALARS, *_PATHS):
        values = columns[name]
        digest.update(f"{name} {len(values)}".encode())
        digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def is_dataset(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a dataset, and no single recording; of another version it is, too.

    Raises:
        DatasetFormatError: If there is no such file, or it is damaged.
    """
    path = Path(path)
    with open_parquet(path, _AGAIN) as file:
        return _FACTS in (file.metadata.metadata or {})


def read_dataset(path: str | os.PathLike[str]) -> tuple[list[RecordedRun], PathOptions]:
    """Read a dataset.

    Args:
        path: A file that `write_dataset` made.

    Returns:
        Its runs, which have paths and no weights, by name; and how the paths were made.

    Raises:
        DatasetFormatError: If the file is missing, cut or changed, of another version, or no dataset.
    """
    path = Path(path)
    with open_parquet(path, _AGAIN) as file:
        schema = file.schema_arrow
        metadata = file.metadata.metadata or {}
        if _FACTS not in metadata:
            raise DatasetFormatError(
                f"{str(path)!r} is a Parquet file, but no dataset: it lacks the facts about its runs. Pass a file that "
                "smartfrz-build dataset wrote."
            )
        facts = read_facts(metadata[_FACTS])
        check_version(path, facts, DATASET_VERSION, _AGAIN)
        _check(path, _problems_of_options(facts))
        options = PathOptions(*(facts[key] for key in ("records", "tailored_size", "draws", "seed")))
        _check(path, _problems_of_runs(facts, options))
        _check(path, _problems_of_columns(file.metadata, schema, path.stat().st_size))
    with open_parquet(path, _AGAIN, read_dictionary=list(_TEXTS)) as file:
        table = file.read(list(_COLUMNS))
    _check(path, (f"its column {name} has missing values" for name in _COLUMNS if _has_missing(table[name])))
    columns = {name: _values(table[name]) for name in _COLUMNS}
    if metadata.get(_CHECKSUM) != _checksum(metadata[_FACTS], columns).encode():
        what = "was changed after it was made" if _CHECKSUM in metadata else "has no checksum"
        raise DatasetFormatError(
            f"{str(path)!r} {what}: expected facts and values whose SHA-256 is in its metadata. {_AGAIN}"
        )
    lengths = {name: table[name].combine_chunks().value_lengths().to_numpy() for name in _PATHS}
    runs = _take_runs(path, facts["runs"], options, columns, lengths)
    check_doubles(runs)
    return runs, options


def read_together(files: Iterable[str | os.PathLike[str]]) -> list[RecordedRun]:
    """Read datasets and recordings. If there is a dataset among them, the recordings get paths, made as its own were.

    Raises:
        DatasetFormatError: If a file cannot be used, datasets were made with different options, or a recording is there
            twice.
    """
    files = [Path(path) for path in files]
    datasets = {path: read_dataset(path) for path in files if is_dataset(path)}
    if not datasets:
        recorded = [read_run(path) for path in files]
        check_doubles(recorded)
        return recorded
    first, (_, options) = next(iter(datasets.items()))
    for path, (_, other) in datasets.items():
        if other != options:
            raise DatasetFormatError(
                f"{str(path)!r} was made with {other}, and {str(first)!r} with {options}; expected the same. Make one of "
                "them again with: smartfrz-build dataset."
            )
    runs: list[RecordedRun] = []
    for path in files:
        runs += datasets[path][0] if path in datasets else [with_paths(read_run(path), options)]
    check_doubles(runs)
    return runs


def _check(path: Path, problems: Iterator[str]) -> None:
    for problem in problems:
        raise DatasetFormatError(f"{str(path)!r} is no dataset: {problem}. {_AGAIN}")


def _problems_of_options(facts: Mapping[str, Any]) -> Iterator[str]:
    for key, least, most in (
        ("records", 1, 10_000),
        ("tailored_size", 1, 2**20),
        ("draws", 1, 1000),
        ("seed", 0, 2**63),
    ):
        value = facts.get(key)
        if type(value) is not int or not least <= value <= most:
            yield f"its {key} is {value!r:.100}; expected an integer from {least} to {most}"


def _problems_of_runs(facts: Mapping[str, Any], options: PathOptions) -> Iterator[str]:
    runs = facts.get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        yield f"its runs are {runs!r:.100}; expected a list of tables"
        return
    for number, run in enumerate(runs):
        yield from (f"in run {number}, {problem}" for problem in problems_of_facts(run))
        timestamps = run.get("timestamps")
        if type(timestamps) is not int or not options.every(run) <= timestamps <= 10_000_000:
            yield f"in run {number}, its timestamps are {timestamps!r:.100}; expected at least {options.every(run)}"
        digest = run.get("values_sha256")
        if not isinstance(digest, str) or len(digest) != 64:
            yield f"in run {number}, its values_sha256 is {digest!r:.100}; expected 64 characters"


def _problems_of_columns(metadata: pq.FileMetaData, schema: pa.Schema, size: int) -> Iterator[str]:
    """Yield why the columns are of other types, or would take more memory than a file of this size, in bytes, may."""
    if sorted(schema.names) != sorted(_COLUMNS):
        yield f"its columns are {', '.join(schema.names):.200}; expected {', '.join(_COLUMNS)}"
        return
    for name in _COLUMNS:
        kind = schema.field(name).type
        if name in _TEXTS:
            fine, expected = pa.types.is_string(kind), "text"
        elif name in _PATHS:
            fine = pa.types.is_list(kind) and kind.value_type == _PATHS[name]
            expected = f"lists of {_PATHS[name]}"
        else:
            fine, expected = kind == _SCALARS[name], str(_SCALARS[name])
        if not fine:
            yield f"its column {name} is {kind}; expected {expected}"
    stored = needed = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in _TEXTS and not _TEXT_ENCODINGS.issuperset(column.encodings):
                name = column.path_in_schema
                yield f"its column {name} is stored as {column.encodings}; expected {sorted(_TEXT_ENCODINGS)}"
            stored += abs(column.total_uncompressed_size)
            needed += 8 * abs(column.num_values)
    if max(stored, needed, 8 * len(_COLUMNS) * metadata.num_rows) > _ROOM + _TIMES * size:
        yield f"it would take {max(stored, needed)} bytes, and the file has {size}; expected at most {_ROOM + _TIMES * size}"


def _has_missing(column: pa.ChunkedArray) -> bool:
    inner = column.combine_chunks()
    return bool(inner.null_count or (pa.types.is_list(inner.type) and inner.flatten().null_count))


def _values(column: pa.ChunkedArray) -> NDArray[Any]:
    inner = column.combine_chunks()
    if pa.types.is_dictionary(inner.type):
        return np.array(inner.dictionary.to_pylist(), object)[inner.indices.to_numpy()]
    inner = inner.flatten() if pa.types.is_list(inner.type) else inner
    values: NDArray[Any] = inner.to_numpy(zero_copy_only=False)
    return values


def _take_runs(
    path: Path,
    facts: Sequence[dict[str, Any]],
    options: PathOptions,
    columns: Mapping[str, NDArray[Any]],
    lengths: Mapping[str, NDArray[np.int64]],
) -> list[RecordedRun]:
    """Cut the columns into runs."""
    runs = []
    row, place = 0, dict.fromkeys(_PATHS, 0)
    for known in facts:
        timestamps, layers = known["timestamps"], len(known["layers"])
        rows = slice(row, row + layers * timestamps)
        row = rows.stop
        if row > len(columns["run"]):
            _check(path, iter([f"it has {len(columns['run'])} rows; its runs have more timestamps"]))
        cut = {name: columns[name][rows] for name in (*_TEXTS, *_SCALARS)}
        run = _without_paths(path, dict(known), cut)
        expected = _lengths(run, options)
        for name in _PATHS:
            if not np.array_equal(lengths[name][rows], expected[name]):
                _check(
                    path, iter([f"in run {run.name!r}, the lists of {name} are not as long as its timestamps ask for"])
                )
            cut[name] = columns[name][place[name] : place[name] + expected[name].sum()]
            place[name] += int(expected[name].sum())
            if not np.isfinite(cut[name]).all():
                _check(path, iter([f"in run {run.name!r}, {name} is not finite"]))
        runs.append(replace(run, paths=_paths(cut, layers, timestamps, options.every(known), options)))
    if row != len(columns["run"]):
        _check(path, iter([f"it has {len(columns['run'])} rows; expected {row}, as its runs have timestamps"]))
    return runs


def _without_paths(path: Path, facts: dict[str, Any], columns: Mapping[str, NDArray[Any]]) -> RecordedRun:
    timestamps, layers = facts["timestamps"], list(facts["layers"])
    expected = {
        "run": np.repeat(np.array([facts["name"]], object), len(layers) * timestamps),
        "layer": np.repeat(np.array(layers, object), timestamps),
        "timestamp": np.tile(np.arange(timestamps), len(layers)),
    }
    step, progress, loss, learning_rate = (columns[name][:timestamps] for name in _SERIES)
    expected |= {name: np.tile(columns[name][:timestamps], len(layers)) for name in _SERIES}
    for name, values in expected.items():
        if not np.array_equal(columns[name], values):
            _check(
                path, iter([f"in run {facts['name']!r}, the column {name} is not as its layers and timestamps ask for"])
            )
    costs = take_costs(path, facts, _AGAIN)
    cka = columns["cka"].reshape(len(layers), timestamps)
    run = RecordedRun(facts, layers, step, progress, loss, learning_rate, cka, _no_weights(cka), costs)
    refuse(path, problems_of_values(run), _AGAIN)
    return run


def _paths(
    columns: Mapping[str, NDArray[Any]], layers: int, timestamps: int, every: int, options: PathOptions
) -> PackedPaths:
    records = timestamps // every
    scale = np.moveaxis(columns["scale"].reshape(layers, records, options.draws), 2, 0)
    dense = {}
    for name, kept in _kept(records).items():
        values = np.zeros((layers, records, options.draws, records), np.float16)
        values[np.broadcast_to(kept, values.shape)] = columns[name]
        dense[name] = np.moveaxis(values, 2, 0)
    evenness = dense["evenness"] + np.swapaxes(dense["evenness"], 2, 3)
    return PackedPaths(scale, dense["steps"], evenness, options.tailored_size, every)


def names_in(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the runs in a dataset, or the name of the one that a recording's file is called by.

    Raises:
        DatasetFormatError: If the file cannot be used.
    """
    return [run.name for run in read_dataset(path)[0]] if is_dataset(path) else [Path(path).stem]
