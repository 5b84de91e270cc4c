"""One decision explained: `python -m benchmarks.explain --runs RUNS [--run NAME] [--layer NAME] [--predictor FILE]`.

Takes a recorded training, finds the moment at which the predictor would freeze a layer, and draws what it looked
at: its attention over the records, beside how the layer moved, and (which it cannot see) how similar the layer was to
that of the finished reference model. Prints one JSON line with the figures.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.arguments import errors_as_messages
from smartfrz import zoo
from smartfrz.control.learned import PATIENCE, RECORDS_PER_STAGE
from smartfrz.dataset_builder.labelling import labelled_runs, rule_of
from smartfrz.dataset_builder.storage import read_run, run_file, run_files
from smartfrz.errors import DatasetFormatError
from smartfrz.files import replacing
from smartfrz.predictor.training.judging import first_freezes, score
from smartfrz.predictor.training.runs import TrainingOptions

PICTURE = Path(__file__).parent.parent / "docs" / "attention.png"


class Decision(NamedTuple):
    """What is known of one decision.

    Attributes:
        run: The recording's name.
        layer: The layer's name.
        confidence: That freezing is right.
        threshold: From which it is frozen.
        progress: Shares of the run at which the records were made, float64 `[records]`; the last one is the decision.
        attention: float32 `[records]`.
        steps: Relative change since the record before, float64 `[records]`; NaN for the first.
        distances: Relative distance to the weights of the decision, float64 `[records]`.
        later: Progress and CKA of the whole run, float64 `[timestamps]` each.
    """

    run: str
    layer: str
    confidence: float
    threshold: float
    progress: Any
    attention: Any
    steps: Any
    distances: Any
    later: tuple[Any, Any]


def decide(predictor, recorded, layer=None):
    """The decision to freeze a layer: the given one, or the one that freezes in the middle of all.

    Args:
        predictor: The predictor.
        recorded: A `RecordedRun`.
        layer: Its name.

    Raises:
        ValueError: If nothing would be frozen, or the layer would not, or there is no such layer.
    """
    info = predictor.info
    options = TrainingOptions(window=info.window, tailored_size=info.tailored_size, min_records=info.min_records)
    records = round(1 / info.record_fraction)
    (run,) = labelled_runs([recorded], rule_of(info, [recorded]), records)
    places = sorted(
        first_freezes(score(predictor, [run], options)[0], info.threshold, PATIENCE, RECORDS_PER_STAGE),
        key=lambda place: place[1],
    )
    if layer is not None:
        places = [place for place in places if recorded.layers[place[0]] == layer]
    if not places:
        raise ValueError(
            f"{info.name} would freeze {layer or 'nothing'} {'at no moment ' if layer else ''}in {recorded.name}; "
            f"expected a layer that it freezes. Name another run, or one of its layers: "
            f"{', '.join(recorded.layers)}."
        )
    index, now = places[len(places) // 2]
    length = min(now + 1, info.window)
    positions = np.arange(info.tailored_size) * run.weights.shape[2] // info.tailored_size
    history = run.weights[index, now + 1 - length : now + 1][:, positions]
    asked = [np.ascontiguousarray(history[None]), np.array([length])]
    if predictor.positional:
        asked.append(np.array([index / max(1, len(run.labels) - 1)], np.float32))
    loss = {}
    if predictor.reads_loss and run.loss is not None:
        loss["loss"] = np.ascontiguousarray(run.loss[None, now + 1 - length : now + 1])
    answer = predictor.predict(*asked, **loss)
    scale = np.linalg.norm(history[-1])
    steps = np.linalg.norm(np.diff(history, axis=0), axis=1) / scale
    every = round(len(recorded.step) / run.weights.shape[1])
    progress = recorded.progress[every - 1 :: every][: run.weights.shape[1]]
    return Decision(
        recorded.name,
        recorded.layers[index],
        float(answer.confidence[0, 1]),
        info.threshold,
        progress[now + 1 - length : now + 1],
        answer.attention[0][-length:],
        np.concatenate([[np.nan], steps]),
        np.linalg.norm(history - history[-1], axis=1) / scale,
        (recorded.progress, recorded.cka[index]),
    )


def draw(decision):
    """Attention, movement and CKA over the run."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    attention, movement, cka = figure.subplots(3, 1, sharex=True)
    x = 100 * decision.progress
    width = 0.8 * (x[1] - x[0] if len(x) > 1 else 1.0)
    attention.bar(x, 100 * decision.attention, width, color="#2f6690")
    attention.axhline(100 / len(x), color="#7d8597", linestyle="--", linewidth=1, label="all alike")
    attention.set_ylabel("attention, %")
    movement.plot(x, decision.steps, color="#f2813a", marker="o", markersize=3, label="since the record before")
    far = np.where(decision.distances > 0, decision.distances, np.nan)
    movement.plot(x, far, color="#3a3d98", marker="s", markersize=3, label="to where it is frozen")
    movement.set_yscale("log")
    movement.set_ylabel("relative change")
    cka.plot(100 * decision.later[0], decision.later[1], color="#588157", label="not seen by the predictor")
    cka.set_ylabel("CKA to the end")
    cka.set_xlabel("% of the training")
    for axes in (attention, movement, cka):
        axes.axvline(x[-1], color="#c1121f", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"{decision.layer} of {decision.run}: frozen at {x[-1]:.0f} % with a confidence of {decision.confidence:.2f}",
        x=0.01,
        ha="left",
        fontsize=9,
    )
    return figure


def facts(decision):
    """What the picture shows, in figures."""
    order = np.argsort(-decision.attention)
    ages = len(decision.attention) - 1 - np.arange(len(decision.attention))
    return {
        "run": decision.run,
        "layer": decision.layer,
        "frozen_at": round(float(decision.progress[-1]), 4),
        "confidence": round(decision.confidence, 4),
        "threshold": round(decision.threshold, 4),
        "records": len(decision.attention),
        "most_attended": [
            {"records_ago": int(ages[i]), "attention": round(float(decision.attention[i]), 4)} for i in order[:5]
        ],
        "mean_records_ago": round(float(decision.attention @ ages), 2),
        "last_step": round(float(decision.steps[-1]), 6),
        "first_step": round(float(decision.steps[1]), 6),
    }


def find_run(folder, name=None):
    """The file of a recorded run: of that name, or the first one.

    Args:
        folder: Folder of recordings.
        name: The run's name.

    Raises:
        DatasetFormatError: If there is no such run.
    """
    files = run_files(folder)
    if name is None:
        return files[0]
    path = run_file(folder, name)
    if path not in files:
        raise DatasetFormatError(
            f"No recorded run {name!r} in {str(folder)!r}; expected one of {', '.join(file.stem for file in files)}."
        )
    return path


@errors_as_messages()
def main(given=None):
    """Explain, draw, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of recordings.")
    parser.add_argument("--run", help="One of them. Default: the first by name.")
    parser.add_argument("--layer", help="By default the one that freezes in the middle of all.")
    parser.add_argument("--predictor", default=zoo.DEFAULT, help="A name, or a file.")
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args(given)
    predictor = zoo.load(options.predictor, device="cpu")
    recorded = read_run(find_run(options.runs, options.run))
    with errors_as_messages(ValueError):
        decision = decide(predictor, recorded, options.layer)
    with replacing(options.output) as temporary:
        draw(decision).savefig(temporary, dpi=100, format="png")
    print(json.dumps({"predictor": predictor.info.name} | facts(decision)))


if __name__ == "__main__":
    main()
