"""Cross-validation: training without one architecture or data set, and judging on it."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Literal

from smartfrz.predictor.training import baselines
from smartfrz.predictor.training.adjusting import Adjuster, apply_adjustment
from smartfrz.predictor.training.baselines import Baselines, Judged
from smartfrz.predictor.training.fit import check_runs, fit
from smartfrz.predictor.training.judging import Reliability, calibrate, measure_quality, score
from smartfrz.predictor.training.runs import LabelledRun, TrainingOptions, split

Group = Literal["architecture", "dataset", "name"]
_SAID: dict[Group, str] = {"architecture": "an architecture", "dataset": "a data set", "name": "a run"}
METHODS = ("predictor", *baselines.METHODS)
HeldOut = dict[str, dict[str, dict[str, list[Judged]]]]  # kind, group held out, method: one judgement per seed


def can_hold_out(groups: Sequence[str]) -> bool:
    """Return whether there are two groups, and two runs remain without each: to train on and to validate on.

    Args:
        groups: The group of each run.

    Example:
        >>> can_hold_out(["cnn", "cnn", "vit", "vit"]), can_hold_out(["cnn", "vit", "vit"])
        (True, False)
    """
    rest = [len(groups) - list(groups).count(group) for group in set(groups)]
    return len(rest) > 1 and min(rest) > 1


def leave_one_out(
    runs: Sequence[LabelledRun],
    options: TrainingOptions,
    group: Group = "architecture",
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    num_seeds: int = 3,
    only: Collection[str] | None = None,
    adjuster: Adjuster | None = None,
) -> dict[str, dict[str, list[Judged]]]:
    """Train without one architecture, data set or run, and judge on it; repeat for each.

    Args:
        runs: All runs.
        options: How to train.
        group: Attribute of `LabelledRun` whose runs are held out together.
        progress: Called with the fraction done, and a description of the current step.
        num_seeds: Number of seeds, each for the predictor and for the split into training and validation runs.
        only: Groups to hold out; all by default.
        adjuster: Fits an adjustment by the loss, without the runs that are held out; None for no adjustment.

    Returns:
        For each group that was held out and each of `METHODS`, one judgement per seed.

    Raises:
        ValueError: If `check_rounds` refuses the runs.
    """
    check_rounds(runs, options, group, num_seeds, only)
    rounds = _rounds(runs, options, group, num_seeds, only)
    results: dict[str, dict[str, list[Judged]]] = {name: {method: [] for method in METHODS} for name, _ in rounds}
    for done_before, (held_out, seed) in enumerate(rounds):

        def report(done: float, text: str, done_before: int = done_before, held_out: str = held_out) -> None:
            progress((done_before + done) / len(rounds), f"without {held_out}: {text}")

        rest = [run for run in runs if getattr(run, group) != held_out]
        test = [run for run in runs if getattr(run, group) == held_out]
        chosen = dataclasses.replace(options, seed=seed)
        for method, judged in _judge_without(test, rest, chosen, report, adjuster).items():
            results[held_out][method].append(judged)
    return results


def make_adjuster(
    runs: Sequence[LabelledRun], held_out: dict[str, dict[str, list[Judged]]], options: TrainingOptions
) -> Adjuster:
    """Return what fits adjustments to the runs that were held out alone.

    Args:
        runs: All runs.
        held_out: What `leave_one_out` found with the group `name`, without an adjuster.
        options: How was trained.
    """
    seeds = range(len(next(iter(held_out.values()))["predictor"]))
    said = [{name: found["predictor"][seed].confidence[0] for name, found in held_out.items()} for seed in seeds]
    return Adjuster(runs, said, options.window)


def adjust_all(
    adjuster: Adjuster, held_out: dict[str, dict[str, list[Judged]]], *, loss: bool = True
) -> dict[str, dict[str, list[Judged]]]:
    """Adjust confidences in runs that were held out alone, each by an adjustment that was fitted on the others.

    Args:
        adjuster: What `make_adjuster` returned for them.
        held_out: What was found there.
        loss: Whether the loss is known.

    Returns:
        `held_out` with other confidences of the predictor. Their quality and reliability are those from before.
    """
    by_name = {run.name: run if loss else dataclasses.replace(run, loss=None) for run in adjuster.runs}
    adjusted = dict(held_out)
    for name, found in held_out.items():
        factors = adjuster.without([name])
        if factors is not None:
            confidences = (
                apply_adjustment(factors, said[name], by_name[name], adjuster.window) for said in adjuster.said
            )
            judged = zip(found["predictor"], confidences, strict=True)
            adjusted[name] = found | {"predictor": [one._replace(confidence=[values]) for one, values in judged]}
    return adjusted


def check_rounds(
    runs: Sequence[LabelledRun],
    options: TrainingOptions,
    group: Group = "architecture",
    num_seeds: int = 3,
    only: Collection[str] | None = None,
) -> None:
    """Refuse before training what `leave_one_out` cannot train in one of its rounds; the arguments are the same.

    Raises:
        ValueError: If there are fewer than two groups, or if what remains without one of them cannot be trained on.
    """
    groups = sorted({getattr(run, group) for run in runs})
    if len(groups) < 2:
        raise ValueError(
            f"Holding out {_SAID[group]} needs at least two: received runs of {groups}. Record another one."
        )
    for held_out, seed in _rounds(runs, options, group, num_seeds, only):
        train, validation = split([run for run in runs if getattr(run, group) != held_out], seed)
        try:
            check_runs(train, validation, options)
        except ValueError as error:
            what = _SAID[group].partition(" ")[2]
            raise ValueError(
                f"Nothing can be trained without the {what} {held_out!r}, which is to be held out: {error} Or hold nothing "
                "out (--no-cross-validate)."
            ) from error


def _rounds(
    runs: Sequence[LabelledRun], options: TrainingOptions, group: Group, num_seeds: int, only: Collection[str] | None
) -> list[tuple[str, int]]:
    """Return the group to hold out and the seed of each round."""
    groups = sorted(only if only is not None else {getattr(run, group) for run in runs})
    return [(name, options.seed + number) for name in groups for number in range(num_seeds)]


def _judge_without(
    test: Sequence[LabelledRun],
    rest: Sequence[LabelledRun],
    options: TrainingOptions,
    progress: Callable[[float, str], None],
    adjuster: Adjuster | None,
) -> dict[str, Judged]:
    """Train on `rest`, and judge the predictor and the baselines on `test`."""
    train, validation = split(rest, options.seed)
    model = fit(train, validation, options, progress)
    factors = adjuster.without([run.name for run in test]) if adjuster else None
    if factors is not None:
        model.adjust(factors)
    threshold = calibrate(score(model, validation, options), validation, options, options.precision)
    said = score(model, test, options)
    quality = measure_quality(said, test, threshold, options)
    predictor = Judged(quality, Reliability.of(said, test, options), said)
    return {"predictor": predictor} | Baselines.fit(train, rest, options).judge(test, validation, options)
