"""Recorded runs on disk: one Parquet file each, with a row per (layer, timestamp).

Windows and labels are not stored. They are derived at load, so that one recording serves every
window size and every label rule.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from smartfrz.errors import DatasetFormatError
from smartfrz.files import replacing

FORMAT_VERSION = 1
_FACTS = b"smartfrz.run"
_COLUMNS = ("layer", "timestamp", "step", "progress", "loss", "learning_rate", "cka", "weights")


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
        weights: A pool of sampled weights, float32 `[num_layers, timestamps, pool_size]`.
    """

    facts: dict[str, Any]
    layers: list[str]
    step: NDArray[np.int64]
    progress: NDArray[np.float64]
    loss: NDArray[np.float64]
    learning_rate: NDArray[np.float64]
    cka: NDArray[np.float64]
    weights: NDArray[np.float32]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.facts["name"])

    @property
    def architecture(self) -> str:
        """The architecture family, which leave-one-architecture-out evaluation holds out together."""
        return str(self.facts["architecture"])


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
    columns |= {name: pa.array(np.tile(values, num_layers)) for name, values in tiled.items()}
    columns["cka"] = pa.array(run.cka.reshape(-1))
    columns["weights"] = pa.FixedSizeListArray.from_arrays(pa.array(run.weights.reshape(-1)), pool)
    facts = json.dumps(run.facts | {"format_version": FORMAT_VERSION, "layers": run.layers})
    table = pa.table(columns).replace_schema_metadata({_FACTS: facts.encode()})
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


def read_run(path: str | os.PathLike[str]) -> RecordedRun:
    """Read one recorded run.

    Args:
        path: A file that `write_run` made.

    Returns:
        The run.

    Raises:
        DatasetFormatError: If the file is missing, cut, or not a recorded run.
    """
    path = Path(path)
    again = f"Record the run again with: smartfrz-build record RECIPE (after deleting {path.name})."
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise DatasetFormatError(f"No recorded run at {str(path)!r}. Make one with: smartfrz-build record.") from error
    except (pa.ArrowException, OSError) as error:
        raise DatasetFormatError(f"{str(path)!r} is not a complete Parquet file ({error}). {again}") from error
    metadata = table.schema.metadata or {}
    missing = [column for column in _COLUMNS if column not in table.column_names]
    if _FACTS not in metadata or missing:
        raise DatasetFormatError(
            f"{str(path)!r} is a Parquet file, but no recorded run: it lacks {missing or 'the run facts'}. "
            "Pass files that smartfrz-build record wrote."
        )
    facts = json.loads(metadata[_FACTS])
    if facts.get("format_version") != FORMAT_VERSION:
        raise DatasetFormatError(
            f"{str(path)!r} has format_version {facts.get('format_version')!r}; this version reads {FORMAT_VERSION}. "
            + again
        )
    layers = list(facts["layers"])
    timestamps, rest = divmod(table.num_rows, max(1, len(layers)))
    if rest or not timestamps:
        raise DatasetFormatError(f"{str(path)!r} has {table.num_rows} rows for {len(layers)} layers. {again}")

    def column(name: str) -> NDArray[Any]:
        return table[name].combine_chunks().to_numpy(zero_copy_only=False)

    weights = table["weights"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return RecordedRun(
        facts,
        layers,
        step=column("step")[:timestamps],
        progress=column("progress")[:timestamps],
        loss=column("loss")[:timestamps],
        learning_rate=column("learning_rate")[:timestamps],
        cka=column("cka").reshape(len(layers), timestamps),
        weights=weights.reshape(len(layers), timestamps, -1),
    )


def run_file(folder: Path, name: str) -> Path:
    """Return the path of a recipe's recording in a folder of recordings."""
    return folder / f"{name}.parquet"


def reference_file(folder: Path, name: str) -> Path:
    """Return the path of a recipe's finished reference model in a folder of recordings."""
    return folder / f"{name}.reference.safetensors"


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
