"""Cards of datasets: Markdown for people who want to know what is in one."""

from collections.abc import Sequence
from pathlib import Path

from smartfrz.dataset_builder.datasets import DATASET_VERSION, PathOptions
from smartfrz.dataset_builder.labelling import dataset_of
from smartfrz.dataset_builder.storage import RecordedRun

_COLUMNS = """\
| column | type | meaning |
|---|---|---|
| `run` | text | name of the recording |
| `layer` | text | name of the layer; layers are in execution order |
| `timestamp` | int64 | from 0 |
| `step` | int64 | optimizer steps taken |
| `progress` | float64 | the same as a fraction of the run, in (0, 1] |
| `loss` | float64 | training loss since the timestamp before, in nats |
| `learning_rate` | float64 | of the first parameter group |
| `cka` | float64 | similarity of the layer's output to the finished reference model's, in [0, 1]; NaN where undefined |
| `scale` | list of float32 | largest magnitude of the step since the record before, one for each draw |
| `steps` | list of float16 | that step divided by `scale`, draw after draw; record `j` (from 0) has `j + 1` dimensions |
| `evenness` | list of float16 | mean magnitude over rms of the displacement from each earlier record; `j` a draw |
"""


def dataset_card(path: Path, runs: Sequence[RecordedRun], options: PathOptions, notes: str = "") -> str:
    """Return the card of a dataset, Markdown.

    Args:
        path: The dataset's file, which exists.
        runs: Its runs.
        options: How it was made.
        notes: More Markdown, such as the licences of the data.
    """
    layers = sum(len(run.layers) for run in runs)
    counted = "1 recorded training run" if len(runs) == 1 else f"{len(runs)} recorded training runs"
    lines = [
        f"# {path.name}",
        "",
        f"{counted}, {layers} layers together: how the layers moved, how similar they were to "
        "those of a finished model, and what freezing them cost. Freeze predictors are trained from it:",
        "",
        "```",
        f"smartfrz-build train {path.name} --output my.onnx",
        "```",
        "",
        f"Format version {DATASET_VERSION}; {path.stat().st_size:,} bytes.",
        "",
        "## Rows and columns",
        "",
        "One row for each run, layer and timestamp.",
        "",
        _COLUMNS,
        "The last three describe the path of a layer through weight space, without its weights. They are of "
        f"{options.draws} draws of {options.tailored_size} weights of the layer, and of about {options.records} records "
        "a run: the lists of all other timestamps are empty. A path is rotated into as many dimensions as it has records, "
        "which changes no distance and no angle. The first step leads from the origin to the first record, so the "
        "cumulative sum of `scale` times `steps` gives the place at each record; lengths are root mean squares over the "
        "weights of a draw.",
        "",
        "```python",
        "import json",
        "import numpy as np",
        "import pandas as pd",
        "import pyarrow.parquet as pq",
        "",
        f'table = pd.read_parquet("{path.name}")',
        f'about = json.loads(pq.ParquetFile("{path.name}").metadata.metadata[b"smartfrz.dataset"])',
        'recipes = {run["name"]: run["recipe"] for run in about["runs"]}',
        'costs = {run["name"]: run.get("costs") for run in about["runs"]}',
        "",
        '(run, layer), rows = next(iter(table.groupby(["run", "layer"], sort=False)))',
        'rows = rows[rows["scale"].str.len() > 0]  # the records',
        "place = np.zeros((len(rows), len(rows)))  # of the first draw",
        'for j, (scale, steps) in enumerate(zip(rows["scale"], rows["steps"])):',
        "    place[j, : j + 1] = scale[0] * steps[: j + 1]",
        "place = place.cumsum(axis=0)",
        "distance = np.linalg.norm(place[-1] - place, axis=1)  # of each record from the last one",
        "```",
        "",
        "`costs` holds accuracies and losses at the end of the run if the first `depths` layers are frozen after `steps`; "
        "those of the run itself; and the share of a step's operations that is saved. Runs without are marked below.",
        "",
        "## Recordings",
        "",
        "Each is a recipe of the same name (`recipe` in the file's metadata has all of it).",
        "",
        "| recording | architecture | model | data | layers | timestamps | accuracy of reference, recorded | costs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda run: run.name):
        accuracies, has_costs = run.facts["accuracies"], "no" if run.costs is None else "yes"
        source = run.facts["recipe"].get("model", {}).get("source", "unknown")
        lines.append(
            f"| {run.name} | {run.architecture} | {source} | {dataset_of(run.facts)} | {len(run.layers)} "
            f"| {len(run.step)} | {accuracies['reference']:.3f}, {accuracies['recorded']:.3f} | {has_costs} |"
        )
    return "\n".join([*lines, "", *([notes.strip(), ""] if notes else [])])
