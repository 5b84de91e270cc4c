"""Recorded runs on disk: one Parquet file each, with a row per (layer, timestamp).

Windows and labels are not stored. They are derived at load, so that one recording serves every
window size and every label rule.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from smartfrz.dataset_builder.costs import FreezeCosts
from smartfrz.dataset_builder.recipes import MANY, is_name, is_plain
from smartfrz.errors import DatasetFormatError
from smartfrz.files import open_regular, replacing
from smartfrz.predictor.training.paths import PackedPaths

FORMAT_VERSION = 1
_FACTS = b"smartfrz.run"
_CHECKSUM = b"smartfrz.sha256"
_TYPES = {
    "timestamp": pa.int64(),
    "step": pa.int64(),
    "progress": pa.float64(),
    "loss": pa.float64(),
    "learning_rate": pa.float64(),
    "cka": pa.float64(),
}
_COLUMNS = ("layer", *_TYPES, "weights")
# A dictionary or a run length lets a few bytes stand for any number of values. So much memory is granted to every file,
# and so many times its own size besides; what we wrote takes less than twice its size, unless layers stand still.
_ROOM = 2**28
_TIMES = 32
# Others, such as DELTA_BYTE_ARRAY, repeat long texts in a few bytes.
_TEXT_ENCODINGS = {"PLAIN", "RLE", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}


@dataclass(frozen=True)
class RecordedRun:
    """One recorded training run.

    Attributes:
        facts: What is known of the run: `name`, `architecture`, `recipe`, `accuracies`, seeds, versions.
        layers: Layer names in execution order, `num_layers` of them.
        step: Optimizer steps taken at each timestamp, int64 `[timestamps]`.
        progress: The same as a fraction of the run, float64 `[timestamps]`.
        loss: Training loss since the timestamp before, float64 `[timestamps]`.
        learning_rate: Of the first parameter group, float64 `[timestamps]`.
        cka: Similarity to the reference, float64 `[num_layers, timestamps]`, NaN where undefined.
        weights: A pool of sampled weights, float32 `[num_layers, timestamps, pool_size]`; of size 0 if there are `paths`.
        costs: What freezing costs; None if that was not measured (`record --costs`).
        paths: How the weights moved, in a run of a dataset (`smartfrz.dataset_builder.datasets`), instead of `weights`.
    """

    facts: dict[str, Any]
    layers: list[str]
    step: NDArray[np.int64]
    progress: NDArray[np.float64]
    loss: NDArray[np.float64]
    learning_rate: NDArray[np.float64]
    cka: NDArray[np.float64]
    weights: NDArray[np.float32]
    costs: FreezeCosts | None = None
    paths: PackedPaths | None = None

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.facts["name"])

    @property
    def architecture(self) -> str:
        """The architecture family, which leave-one-architecture-out evaluation holds out together."""
        return str(self.facts["architecture"])

    def has_same_values(self, other: "RecordedRun") -> bool:
        """Return whether everything that was recorded along the way is the same, bit for bit; facts and costs aside."""
        return self.sha256() == other.sha256()

    def sha256(self) -> str:
        """Return the SHA-256 of everything that was recorded along the way; facts and costs aside."""
        return _checksum(b"", self)

    def require_costs(self) -> FreezeCosts:
        """Return the costs.

        Raises:
            DatasetFormatError: If they were not measured.
        """
        if self.costs is None:
            raise DatasetFormatError(
                f"The recording {self.name!r} has no costs of freezing. Add them with: smartfrz-build record --costs "
                "RECIPE, to the same --output, or leave that recording out. Labels by CKA (--labels cka) need none."
            )
        return self.costs

    def require_paths(self) -> PackedPaths:
        """Return the paths.

        Raises:
            DatasetFormatError: If there are weights instead.
        """
        if self.paths is None:
            raise DatasetFormatError(
                f"The run {self.name!r} has weights; expected paths. Make them with: smartfrz.dataset_builder.datasets."
                "with_paths."
            )
        return self.paths


def write_run(path: str | os.PathLike[str], run: RecordedRun) -> None:
    """Write a run to a temporary file and rename it to `path`.

    Args:
        path: The Parquet file to make.
        run: The finished run.

    Raises:
        OSError: If it cannot be written; nothing is left behind then.
    """
    num_layers, timestamps, pool = run.weights.shape
    tiled = {
        "timestamp": np.arange(timestamps),
        "step": run.step,
        "progress": run.progress,
        "loss": run.loss,
        "learning_rate": run.learning_rate,
    }
    columns = {"layer": pa.array(np.repeat(run.layers, timestamps)).dictionary_encode()}
    columns |= {name: pa.array(np.tile(values, num_layers), _TYPES[name]) for name, values in tiled.items()}
    columns["cka"] = pa.array(run.cka.reshape(-1), _TYPES["cka"])
    columns["weights"] = pa.FixedSizeListArray.from_arrays(pa.array(run.weights.reshape(-1), pa.float32()), pool)
    described = run.facts | {"format_version": FORMAT_VERSION, "layers": run.layers}
    if run.costs is not None:
        described["costs"] = run.costs.to_dict()
    facts = json.dumps(described).encode()
    table = pa.table(columns).replace_schema_metadata({_FACTS: facts, _CHECKSUM: _checksum(facts, run).encode()})
    with replacing(path) as temporary:
        # Weights hardly compress; byte stream split makes the most of the shared exponents.
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=["layer"],
            column_encoding={"weights.list.element": "BYTE_STREAM_SPLIT"},
            write_page_checksum=True,
        )


def _checksum(facts: bytes, run: RecordedRun) -> str:
    """SHA-256 of the facts as written and of every value, in the order of layers and timestamps."""
    digest = hashlib.sha256(facts)
    for values, dtype in (
        (run.step, "<i8"),
        (run.progress, "<f8"),
        (run.loss, "<f8"),
        (run.learning_rate, "<f8"),
        (run.cka, "<f8"),
        (run.weights, "<f4"),
    ):
        digest.update(str(values.shape).encode())
        digest.update(np.ascontiguousarray(values, dtype).data)
    return digest.hexdigest()


def read_run(path: str | os.PathLike[str]) -> RecordedRun:
    """Read one recorded run. Rows may be in any order: the columns `layer` and `timestamp` say what they are.

    Args:
        path: A file that `write_run` made.

    Returns:
        The run.

    Raises:
        DatasetFormatError: If the file is missing, cut or changed, or not a recorded run.
    """
    path = Path(path)
    again = f"Record the run again with: smartfrz-build record RECIPE (after deleting {path.name})."
    with open_parquet(path, again) as file:
        schema = file.schema_arrow
        metadata = schema.metadata or {}
        missing = [column for column in _COLUMNS if column not in schema.names]
        if _FACTS not in metadata or missing:
            raise DatasetFormatError(
                f"{str(path)!r} is a Parquet file, but no recorded run: it lacks {missing or 'the run facts'}. "
                "Pass files that smartfrz-build record wrote."
            )
        facts = read_facts(metadata[_FACTS])
        check_version(path, facts, FORMAT_VERSION, again)
        refuse(path, (*problems_of_facts(facts), *_problems_of_types(schema)), again)
        refuse(path, _problems_of_size(file.metadata, schema, path.stat().st_size), again)
    with open_parquet(
        path, again, read_dictionary=["layer"]
    ) as file:  # a name stays one text, however often it is repeated
        table = file.read(list(_COLUMNS))
    refuse(path, _missing_values(table), again)
    num_layers = len(facts["layers"])
    if table.num_rows % num_layers or not table.num_rows:
        raise DatasetFormatError(f"{str(path)!r} has {table.num_rows} rows for {num_layers} layers. {again}")
    columns = {name: _values(table, name) for name in _COLUMNS}
    refuse(path, _sort_rows(columns, facts["layers"]), again)
    costs = take_costs(path, facts, again)
    run = _assemble(facts, columns, costs)
    refuse(path, problems_of_values(run), again)
    if metadata.get(_CHECKSUM) != _checksum(metadata[_FACTS], run).encode():
        what = "was changed after it was recorded" if _CHECKSUM in metadata else "has no checksum"
        raise DatasetFormatError(
            f"{str(path)!r} {what}: expected facts and values whose SHA-256 is in its metadata. {again}"
        )
    return run


def refuse(path: Path, problems: Iterable[str], again: str) -> None:
    """Raise an error that names the first problem, if there is one."""
    for problem in problems:
        raise DatasetFormatError(f"{str(path)!r} is no recorded run: {problem}. {again}")


@contextlib.contextmanager
def open_parquet(path: Path, again: str, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Raises:
        DatasetFormatError: If it is missing, or damaged, also where it is read in the block; the message ends with `again`.
    """
    try:
        open_regular(path).close()  # pyarrow waits for the other end of a pipe
        with pq.ParquetFile(path, page_checksum_verification=True, **options) as file:
            yield file
    except FileNotFoundError as error:
        raise DatasetFormatError(f"No recorded run at {str(path)!r}. Make one with: smartfrz-build record.") from error
    # pyarrow raises ValueError for names that are not UTF-8, and OverflowError or MemoryError for impossible sizes.
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DatasetFormatError(f"{str(path)!r} is not a complete Parquet file ({error}). {again}") from error


def check_version(path: Path, facts: dict[str, Any], expected: int, again: str) -> None:
    """Raise `DatasetFormatError` if a file is of another version; `again` says how to get one of this."""
    version = facts.get("format_version")
    if type(version) is not int or version != expected:
        raise DatasetFormatError(
            f"{str(path)!r} has format_version {version!r:.100}; this version reads {expected}. {again}"
        )


def read_facts(text: bytes) -> dict[str, Any]:
    """Parse facts; empty if they are no JSON object, which has no `format_version`."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):  # a damaged text may nest without end
        return {}
    return facts if isinstance(facts, dict) else {}


def take_costs(path: Path, facts: dict[str, Any], again: str) -> FreezeCosts | None:
    """Take the costs out of the facts; None if there are none."""
    if "costs" not in facts:
        return None
    try:
        costs = FreezeCosts.from_dict(facts.pop("costs"))
    except ValueError as error:
        raise DatasetFormatError(f"{str(path)!r} is no recorded run: its costs are wrong: {error}. {again}") from error
    if costs.num_layers != len(facts["layers"]):
        refuse(path, [f"its costs are of {costs.num_layers} layers, and it has {len(facts['layers'])}"], again)
    return costs


def problems_of_facts(facts: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the facts of a run."""
    for key, fine, expected in (
        ("name", is_name, "text that a file can be called by: no folders, no dot in front, nothing invisible"),
        ("architecture", is_plain, "text, one line of visible characters"),
    ):
        if not isinstance(facts.get(key), str) or not fine(facts[key]):
            yield f"its {key} is {facts.get(key)!r:.100}; expected {expected}"
    layers = facts.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, str) for layer in layers):
        yield f"its layers are {layers!r:.100}; expected a list of names"
    elif not all(map(is_plain, layers)):
        wrong = next(layer for layer in layers if not is_plain(layer))
        yield f"one of its layers is {wrong!r:.100}; expected one line of visible characters"
    elif len(set(layers)) < len(layers):
        yield "two of its layers have the same name"
    recipe = facts.get("recipe")
    recording, data = (recipe.get(key) if isinstance(recipe, dict) else None for key in ("recording", "data"))
    records = recording.get("records") if isinstance(recording, dict) else None
    if type(records) is not int or not 1 <= records <= MANY:
        yield f"recipe.recording.records is {records!r:.100}; expected a positive integer up to {MANY}"
    if not isinstance(data, dict) or not isinstance(data.get("arguments", {}), dict):
        yield f"recipe.data is {data!r:.100}; expected a table"
    else:
        for text in (data.get("source"), data.get("folder"), data.get("arguments", {}).get("name")):
            if isinstance(text, str) and text and not is_plain(text):
                yield f"recipe.data names {text!r:.100}; expected one line of visible characters"
    accuracies = facts.get("accuracies")
    for key in ("reference", "recorded"):
        accuracy = accuracies.get(key) if isinstance(accuracies, dict) else None
        if isinstance(accuracy, bool) or not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
            yield f"accuracies.{key} is {accuracy!r:.100}; expected a number in [0, 1]"


def _problems_of_types(schema: pa.Schema) -> Iterator[str]:
    for name in _COLUMNS:
        if schema.names.count(name) > 1:
            yield f"several columns are named {name}"
            return
        kind, expected = schema.field(name).type, str(_TYPES.get(name, "text"))
        if name == "layer":
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            fine = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        elif name == "weights":
            expected = "a list of float32 of one size"
            fine = pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32() and kind.list_size > 0
        else:
            fine = kind == _TYPES[name]
        if not fine:
            yield f"its column {name} is {kind}; expected {expected}"


def _problems_of_size(metadata: pq.FileMetaData, schema: pa.Schema, size: int) -> Iterator[str]:
    """Yield why the columns would take more memory than a file of this size, in bytes, may; nothing of them is read."""
    pool = schema.field("weights").type.list_size
    stored = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.partition(".")[0]
            if name not in _COLUMNS:
                continue
            expected = group.num_rows * (pool if name == "weights" else 1)
            if column.num_values != expected:
                yield f"its column {name} has {column.num_values} values in {group.num_rows} rows; expected {expected}"
            if name == "layer" and not _TEXT_ENCODINGS.issuperset(column.encodings):
                yield f"its column layer is stored as {column.encodings}; expected {sorted(_TEXT_ENCODINGS)}"
            stored += abs(column.total_uncompressed_size)
    needed = max(stored, metadata.num_rows * (4 * pool + 8 * len(_COLUMNS)))
    if needed > _ROOM + _TIMES * size:
        yield (
            f"it has {metadata.num_rows} rows of {pool} weights, which would take {needed} bytes, and the file has {size}; "
            f"expected at most {_ROOM + _TIMES * size} of such a file"
        )


def _missing_values(table: pa.Table) -> Iterator[str]:
    for name in _COLUMNS:
        if table[name].null_count or (name == "weights" and table[name].combine_chunks().flatten().null_count):
            yield f"its column {name} has missing values"


def _values(table: pa.Table, name: str) -> NDArray[Any]:
    column = table[name].combine_chunks()
    if name == "layer":  # each row refers to the one text of its layer
        return np.array(column.dictionary.to_pylist(), object)[column.indices.to_numpy()]
    if name == "weights":
        size = column.type.list_size
        values: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
        return values
    values = column.to_numpy(zero_copy_only=False)
    return values


def _sort_rows(columns: dict[str, NDArray[Any]], layers: list[str]) -> Iterator[str]:
    """Sort the rows by layer and timestamp, in place, or yield why they are no run."""
    timestamps = len(columns["layer"]) // len(layers)
    place = {layer: index for index, layer in enumerate(layers)}
    unknown = sorted(set(columns["layer"]) - set(layers))
    if unknown:
        yield f"it has rows of layer {unknown[0]!r:.100}, which is none of its layers"
        return
    keys = np.array([place[layer] for layer in columns["layer"]]), columns["timestamp"]
    order = np.lexsort(keys[::-1])
    expected = np.repeat(np.arange(len(layers)), timestamps), np.tile(np.arange(timestamps), len(layers))
    for index, number in zip(keys, expected, strict=True):
        wrong = np.flatnonzero(index[order] != number)
        if len(wrong):
            row = order[wrong[0]]
            yield (
                f"its rows of layer {columns['layer'][row]!r:.100} are not one for each timestamp from 0 to {timestamps - 1}"
            )
            return
    if (np.diff(order) != 1).any():
        columns.update({name: values[order] for name, values in columns.items()})
    for name in ("step", "progress", "loss", "learning_rate"):
        tiled = columns[name].reshape(len(layers), timestamps)
        if not np.array_equal(tiled, np.broadcast_to(tiled[0], tiled.shape), equal_nan=tiled.dtype.kind == "f"):
            yield f"its layers differ in {name} at the same timestamp"


def _assemble(facts: dict[str, Any], columns: dict[str, NDArray[Any]], costs: FreezeCosts | None) -> RecordedRun:
    layers = list(facts["layers"])
    timestamps = len(columns["layer"]) // len(layers)
    return RecordedRun(
        facts,
        layers,
        step=columns["step"][:timestamps],
        progress=columns["progress"][:timestamps],
        loss=columns["loss"][:timestamps],
        learning_rate=columns["learning_rate"][:timestamps],
        cka=columns["cka"].reshape(len(layers), timestamps),
        weights=columns["weights"].reshape(len(layers), timestamps, -1),
        costs=costs,
    )


def problems_of_values(run: RecordedRun) -> Iterator[str]:
    """Yield why no training gives the values of a run."""
    step, progress = run.step, run.progress
    if step[0] < 1 or (step[1:] <= step[:-1]).any():
        yield f"its steps do not increase from 1 or more: they are {_some(step)}"
    elif not (progress > 0).all() or not (progress <= 1).all() or (np.diff(progress) <= 0).any():
        yield f"its progress does not increase within (0, 1]: it is {_some(progress)}"
    else:
        yield from _problems_of_schedule(run)
    for name, values, fine, problem in (
        ("loss", run.loss, np.isfinite(run.loss), "its losses are not finite"),
        (
            "learning_rate",
            run.learning_rate,
            np.isfinite(run.learning_rate) & (run.learning_rate >= 0),
            "its learning rates are not numbers from 0 on",
        ),
        ("cka", run.cka, np.isnan(run.cka) | ((run.cka >= 0) & (run.cka <= 1)), "its CKA is not within [0, 1]"),
        ("weights", run.weights, np.isfinite(run.weights), "its weights are not finite"),
    ):
        if not fine.all():
            where = tuple(np.argwhere(~fine)[0])
            yield f"{problem}: {name}{[int(i) for i in where]} is {values[where]}"


def _some(values: NDArray[Any]) -> str:
    return " ".join(np.array2string(values, threshold=6, edgeitems=3).split())


def _problems_of_schedule(run: RecordedRun) -> Iterator[str]:
    """Yield why the steps are not those at which so many records of such a run are taken; see `Recorder.after_step`."""
    timestamps, last, records = len(run.step), int(run.step[-1]), run.facts["recipe"]["recording"]["records"]
    # The last record is taken less than one distance before the end, so in the second half.
    total = round(last / max(run.progress[-1], 0.5))
    if not np.allclose(run.progress, run.step / total, rtol=1e-9, atol=0):
        yield (
            f"its progress does not fit its steps: it ends with {run.progress[-1]} at step {last}; expected each step "
            "divided by the number of all steps"
        )
    every = max(1, round(total / records))
    if (np.diff(run.step, prepend=0) != every).any() or timestamps != total // every:
        yield (
            f"it has {timestamps} timestamps from step {run.step[0]} to {last} of {total}; expected {total // every}, one "
            f"each {every} steps, as its recipe asks for {records} records"
        )


def run_file(folder: Path, name: str) -> Path:
    """Return the path of a recipe's recording in a folder of recordings."""
    return folder / f"{name}.parquet"


def reference_file(folder: Path, name: str) -> Path:
    """Return the path of a recipe's finished reference model in a folder of recordings."""
    return folder / f"{name}.reference.safetensors"


def branches_file(folder: Path, name: str) -> Path:
    """Return the path at which branches are kept until a recording with costs is finished."""
    return folder / f"{name}.branches.json"


def run_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The recorded runs below a folder, by name; hidden and temporary files are left out.

    Raises:
        DatasetFormatError: If there are none.
    """
    files = sorted(p for p in Path(folder).glob("*.parquet") if not p.name.startswith("."))
    if not files:
        raise DatasetFormatError(
            f"Found no recorded run (*.parquet) in {str(folder)!r}. Make some with: smartfrz-build record RECIPE "
            f"--output {folder}"
        )
    return files
