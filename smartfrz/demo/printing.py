"""What the demo shows: a sentence, a table, figures and a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from smartfrz.comparing.engine import Result
from smartfrz.comparing.study import line_of, pace_of
from smartfrz.comparing.verdict import judge
from smartfrz.demo.data import DemoOptions, demo_methods
from smartfrz.files import replacing


def sentence(results: Sequence[Result], options: DemoOptions, chance: float | None = None) -> str:
    """Say what the two runs show, as `smartfrz compare` does.

    Args:
        results: Of full training and of SmartFRZ.
        options: What was run.
        chance: Accuracy that a model which has learned nothing may reach, from 0 to 1; None if it is not known.
    """
    pace = pace_of(results[0])
    methods = demo_methods(options)
    lines = [{**line_of(method, result, pace), "seed": 0} for method, result in zip(methods, results, strict=True)]
    return judge(lines, clock="train_seconds", chance=chance).sentence


def save(results: Sequence[Result], options: DemoOptions, folder: Path) -> list[Path]:
    """Write the figures as JSON and the picture as PNG.

    Returns:
        The two files.
    """
    from smartfrz.plots import plot_results

    figures, picture = folder / "demo.json", folder / "demo.png"
    with replacing(figures) as temporary:
        temporary.write_text(
            json.dumps({"options": asdict(options), "runs": [result.to_dict() for result in results]}, indent=1)
        )
    with replacing(picture) as temporary:
        plot_results(results, temporary)
    return [figures, picture]


def table(results: Sequence[Result]) -> Sequence[tuple[str, ...]]:
    """Rows of the comparison, the header first. The column of activations is left out where they were not counted."""
    header = (
        "",
        "test accuracy",
        "training seconds",
        "backward TFLOPs",
        "deciding",
        "activations, first to last step",
    )
    rows = [header]
    for result in results:
        memory = [size / 2**20 for _, size in sorted(result.activation_bytes.items())]
        rows.append(
            (
                result.method,
                f"{result.accuracy:.2%}",
                f"{result.train_seconds:.1f}",
                f"{result.backward_flops / 1e12:.2f}",
                f"{result.decision_seconds:.2f} s",
                f"{memory[0]:.0f} to {memory[-1]:.0f} MiB" if memory else "",
            )
        )
    full, frozen = results
    rows.append(
        (
            "difference",
            f"{100 * (frozen.accuracy - full.accuracy):+.2f} points",
            f"{frozen.train_seconds / full.train_seconds - 1:+.1%}",
            f"{frozen.backward_flops / full.backward_flops - 1:+.1%}",
            f"{frozen.decision_seconds / frozen.train_seconds:.1%} of training",
            "",
        )
    )
    return rows if full.activation_bytes else [row[:-1] for row in rows]
