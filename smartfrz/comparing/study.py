"""Trains a task by several methods with several seeds, and keeps each finished run, so that a second start goes on."""

import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smartfrz.comparing.engine import FULL, TURN, Method, Progress, Result, Run
from smartfrz.comparing.lines import add_line, matching, read_lines
from smartfrz.errors import ResultsError

PACE_EVERY = 10  # rounds; how often full training takes a turn if its result is known already
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "keras", "tensorflow", "jax", "onnxruntime", "numpy")
Start = Callable[[Method], Run]


def kind_of(method: Method) -> str:
    """What a method is: `full`, `freezing`, or `fewer` (full training in fewer steps)."""
    if method.policy is not None:
        return "freezing"
    return "full" if method.share == 1.0 else "fewer"


def finished(
    path: Path, facts: Mapping[str, Any], methods: Sequence[Method], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Lines of the runs that are asked for and finished, in the order of the methods."""
    lines = matching(read_lines(path), facts)
    found = {(line["method"], line["seed"]): line for line in lines}
    wanted = [(method.name, seed) for method in methods for seed in seeds]
    return [found[key] for key in wanted if key in found]


def run_study(
    start: Callable[[int], Start],
    methods: Sequence[Method],
    seeds: Sequence[int],
    facts: Mapping[str, Any],
    path: Path,
    progress: Progress = lambda fraction, text: None,
    turns: bool = True,
    about: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train all methods with all seeds; what the file has already is not trained again.

    The methods of a seed take turns of a few steps, so that a machine that gets slower or faster meanwhile does so for all
    of them.

    Args:
        start: Makes what starts the runs of a seed.
        methods: The methods; full training is added if it is missing.
        seeds: The seeds, one after the other.
        facts: What a line must have to count as a run of this comparison; every line gets them.
        path: File of JSON lines, one a run, each written as soon as the run is finished.
        progress: Called after each turn with the fraction that is done, and how the runs stand.
        turns: Whether runs can be interrupted. If not, they come one after the other, and the pace of a full training that
            is finished is the one that it had.
        about: What new lines say as well, and are not told apart by, such as the machine.

    Returns:
        The lines of all runs.

    Raises:
        ResultsError: If the loss of full training or a metric is not finite, or the file is damaged.
    """
    methods = [FULL, *(method for method in methods if method.name != FULL.name)]
    for number, seed in enumerate(seeds):
        known = {line["method"]: line for line in finished(path, facts, methods, [seed])}

        def told(fraction: float, text: str, number: int = number, seed: int = seed) -> None:
            progress((number + fraction) / len(seeds), f"seed {seed} ({number + 1} of {len(seeds)})   {text}")

        missing = [method for method in methods if method.name not in known]
        pace = None if turns else known.get(FULL.name, {}).get("pace")
        for line in _train(start(seed), missing, told, pace):
            add_line(path, {**facts, **(about or {}), "seed": seed, **line, "versions": versions()})
    return finished(path, facts, methods, seeds)


def _train(
    start: Start, methods: Sequence[Method], progress: Progress, pace: Mapping[str, float] | None
) -> Iterator[dict[str, Any]]:
    """Train the runs of a seed in turns, and yield the line of each as soon as it is finished.

    A line says at which pace full training went meanwhile. Where full training was finished by an earlier start and `pace`
    is None, it takes a turn now and then for that, and is left unfinished.
    """
    runs = [(method, start(method)) for method in methods]
    if not runs:
        return
    pacemaker = None if methods[0] is FULL or pace is not None else start(FULL)
    full = (pacemaker or runs[0][1]).result
    total, results, rounds = sum(run.total_steps for _, run in runs), [run.result for _, run in runs], 0

    def tell() -> None:
        for method, run in runs:
            _check_loss(run.result, method)
        texts = [f"{result.method} {result.curve[-1].accuracy:.4g}" for result in results if result.curve]
        progress(sum(result.steps for result in results) / total, "   ".join(texts))

    for _, run in runs:
        run.tell = tell
    while runs:
        if pacemaker is not None and rounds % PACE_EVERY == 0:
            pacemaker.advance(TURN)
        rounds += 1
        for method, run in list(runs):
            more = run.advance(TURN)
            tell()
            if not more:
                runs.remove((method, run))
                yield line_of(method, run.finish(), pace or pace_of(full))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that take part in this process."""
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in _LIBRARIES}
    return {"Python": platform.python_version()} | {name: str(text) for name, text in loaded.items() if text}


def _check_loss(result: Result, method: Method) -> None:
    if kind_of(method) == "full" and result.last_loss is not None and not math.isfinite(result.last_loss):
        raise ResultsError(
            f"The loss of full training is {result.last_loss} after {result.steps} steps; expected a finite number. Lower "
            "the learning rate, or look at the data and the loss of the task."
        )


def pace_of(full: Result) -> dict[str, float]:
    """Seconds of a step of full training, by both clocks."""
    return {clock: getattr(full, clock) / full.steps for clock in ("cpu_seconds", "train_seconds")}


def line_of(method: Method, result: Result, pace: Mapping[str, float]) -> dict[str, Any]:
    """What is kept of a finished run, and judged: plain data, ready for JSON."""
    fields = result.to_dict()
    diverged = fields["last_loss"] is not None and not math.isfinite(fields["last_loss"])
    if diverged:
        fields["last_loss"] = None  # JSON has no NaN
    return {"kind": kind_of(method), **fields, "diverged": diverged, "pace": dict(pace)}
