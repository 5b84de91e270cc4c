"""What a predictor should be labelled by: `python -m benchmarks.labels run|table --dataset FILE`.

`run` trains predictors on labels by CKA, by what freezing costs, and by both, with and without the training loss, each
without one architecture or data set in turn, and judges them on the runs that were left out: what would freezing by their
confidences have cost and saved there, read off the measured cost surfaces (`smartfrz.dataset_builder.qualities.simulate`)?
Nothing is trained again for that, so it takes minutes. Beside each predictor are the baselines of its card, fitted on the
same labels; with the loss, logistic regression reads it, too.

One JSON line a round is added to `--results`, and none is made twice. `table` needs nothing else. In it

- *one threshold* is accuracy lost, in points, if all runs freeze at one threshold that leaves a share of the computation, in
  the mean over runs. A confidence that does not mean the same in every run is punished here.
- *own threshold* is the same if each run had the threshold that leaves this share in it: how well layers are ranked.
- *right freezes* is the share of freezes that were labelled right, at the threshold at which a third of all layers'
  training time comes after their freezes. Labels here are those by costs, whatever was trained on.

Figures are means over runs, with the standard deviation over seeds.

The row *hindsight* is the schedule from front to back that is best once the costs are known, where each point of accuracy is
worth as much computation in every run: no policy that freezes from front to back can be better on these surfaces.
"""

import argparse
import hashlib
import itertools
import statistics
from collections import defaultdict
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from benchmarks.arguments import errors_as_messages, lines_of, list_of, positive, progress_printer, seeds
from smartfrz.comparing.lines import add_line, matching
from smartfrz.control.learned import PATIENCE, RECORDS_PER_STAGE
from smartfrz.dataset_builder.costs import CostSurface, judge
from smartfrz.dataset_builder.datasets import read_dataset
from smartfrz.dataset_builder.labelling import labelled_runs
from smartfrz.dataset_builder.labels import LabelRule, Source
from smartfrz.dataset_builder.qualities import Outcomes, simulate, with_costs
from smartfrz.predictor.training.cross_validation import leave_one_out, make_adjuster
from smartfrz.predictor.training.judging import first_freezes
from smartfrz.predictor.training.runs import TrainingOptions

RESULTS = Path(__file__).parent / "results" / "labels.jsonl"
DATASET = Path("dataset/smartfrz.parquet")
METHODS = ("predictor", "schedule", "logistic_regression", "weight_change_calibrated")
SHARES = (0.85, 0.75, 0.65)  # of full training's computation
GROUPS = ("architecture", "dataset")
FROZEN = 1 / 3
RECORDS = 30
HINDSIGHT = "hindsight"
ERROR = "calibration error, mean of groups"
PRICES = np.geomspace(1, 1000, 41)
THRESHOLDS = np.linspace(0.0, 1.0, 51)  # shares of all confidences that are lower


def run(options):
    """Train without each group; one line for each kind of labels, with and without the loss, and seed."""
    rules = {labels: LabelRule(source=labels, cost_limit=options.limit) for labels in options.labels}
    recorded, _ = read_dataset(options.dataset)
    right = {one.name: one.labels for one in labelled_runs(with_costs(recorded), LabelRule(source="costs"), RECORDS)}
    digest = hashlib.sha256(options.dataset.read_bytes()).hexdigest()
    facts = {"group": "none", "dataset": digest}
    if not matching(lines_of(options.results), facts):
        held_out = {one.name: in_hindsight(one.costs) for one in with_costs(recorded)}
        add_line(options.results, facts | {"held_out": {HINDSIGHT: held_out}})
    for (labels, rule), seed, heard in itertools.product(rules.items(), options.seeds, options.heard):
        facts = {"seed": seed, "labels": rule.to_dict(), "dataset": digest, "epochs": options.epochs, "loss": heard}
        known = [line["group"] for line in matching([_defaults(line) for line in lines_of(options.results)], facts)]
        groups = [group for group in options.groups if group not in known]
        if not groups:
            continue
        runs = labelled_runs(with_costs(recorded) if labels == "costs" else recorded, rule, RECORDS)
        smaller = {"epochs": options.epochs} if options.epochs else {}
        training = TrainingOptions(seed=seed, representation=f"trajectory{'+loss' * heard}", **smaller)
        name = f"{labels}{' with the loss' * heard}, seed {seed}"
        adjuster = None
        if heard:
            alone = leave_one_out(runs, training, "name", progress_printer(f"{name}, each run"), num_seeds=1)
            adjuster = make_adjuster(runs, alone, training)
        for group in groups:
            judged = leave_one_out(runs, training, group, progress_printer(f"{name}, each {group}"), 1, None, adjuster)
            add_line(options.results, facts | {"group": group} | _judge(judged, runs, recorded, right, group))


def _defaults(line):
    """A line with what lines lack that were written before it was varied."""
    return {"epochs": None, "loss": False} | line


def _judge(judged, runs, recorded, right, group):
    """Calibration errors and outcomes of every method, from the runs that were held out."""
    errors, found = {}, {}
    for method in METHODS:
        each = {held_out: methods[method][0] for held_out, methods in judged.items()}
        counts = [int(one.reliability.counts.sum()) for one in each.values()]
        errors[method] = float(np.average([one.reliability.error for one in each.values()], weights=counts))
        said = {}
        for held_out, one in each.items():
            said |= dict(zip([r.name for r in runs if getattr(r, group) == held_out], one.confidence, strict=True))
        found[method] = outcomes_of(recorded, _ranks(said), right)
    return {"calibration_error": errors, "held_out": found}


def _ranks(said):
    """Confidences of all runs as shares of those that are lower, so that thresholds of every method are spread alike."""
    pooled = np.sort(np.concatenate([values[np.isfinite(values)] for values in said.values()]))
    return {
        name: np.where(np.isnan(values), np.nan, np.searchsorted(pooled, values) / len(pooled))
        for name, values in said.items()
    }


def outcomes_of(recorded, said, right):
    """Run to what each threshold costs, leaves, freezes and gets right."""
    made = {}
    for one in recorded:
        if one.name not in said or one.costs is None:
            continue
        outcomes = simulate([said[one.name]], [one], THRESHOLDS)
        rights, times = [], []
        for threshold in THRESHOLDS:
            frozen = first_freezes(said[one.name], threshold, PATIENCE, RECORDS_PER_STAGE)
            labels = right[one.name]
            rights.append(float(np.mean([labels[place] == 1 for place in frozen])) if frozen else None)
            times.append(sum(labels.shape[1] - record - 1 for _, record in frozen) / labels.size)
        made[one.name] = {
            "points": outcomes.points[0].round(3).tolist(),
            "computation": outcomes.computation[0].round(4).tolist(),
            "right": [None if value is None else round(value, 3) for value in rights],
            "frozen": [round(value, 4) for value in times],
        }
    return made


def best_schedule(costs, price, moments=None):
    """Stages `(moment, depth)` for which the share of saved computation less the price of what they cost is highest.

    Args:
        costs: What freezing costs.
        price: Share of the computation that one unit of accuracy is worth.
        moments: At which layers may freeze; by default those at which a policy decides.
    """
    moments = np.arange(2 * RECORDS_PER_STAGE, RECORDS, RECORDS_PER_STAGE) / RECORDS if moments is None else moments
    depths = np.arange(costs.num_layers)  # one layer always trains
    cost = np.minimum(CostSurface.of(costs)(moments[:, None], depths), 1.0)
    gain = np.diff(costs.saved[:-1]) * (1 - moments[:, None]) - price * np.diff(cost, axis=1)
    gain = np.vstack([gain, np.zeros(len(depths) - 1)])  # the last row: never
    value, choices = np.zeros(len(gain)), []
    for layer in reversed(range(gain.shape[1])):  # a layer freezes no earlier than those before it
        total = gain[:, layer] + value
        value = np.maximum.accumulate(total[::-1])[::-1]
        choices.append([place + int(np.argmax(total[place:])) for place in range(len(total))])
    place, stages = 0, []
    for layer, choice in enumerate(reversed(choices)):
        place = choice[place]
        if place < len(moments):
            stages.append((float(moments[place]), layer + 1))
    return stages


def in_hindsight(costs):
    """Points and computation of the best schedules at several prices, from cheap accuracy to dear."""
    judged = [judge(costs, best_schedule(costs, price)) for price in PRICES]
    return {
        "points": [round(100 * one.cost, 3) for one in judged],
        "computation": [round(1 - one.saved, 4) for one in judged],
    }


def at_one_threshold(found, share):
    """Points that are lost where the runs' mean computation is `share`; `found` maps runs to what was written down."""
    points, computation = (np.array([one[key] for one in found.values()]) for key in ("points", "computation"))
    return Outcomes(np.arange(points.shape[1]), points, computation).points_at(share)


def at_own_threshold(found, share):
    """Mean of the points that each run loses where its own computation is `share`.

    A run that has no threshold at which as much is saved counts with the most that it saves.
    """
    return float(np.mean([np.interp(share, one["computation"], one["points"]) for one in found.values()]))


def right_freezes(found, frozen=FROZEN):
    """Share of right freezes at one threshold, where `frozen` of all layers' time comes after their freezes."""
    times = np.mean([one["frozen"] for one in found.values()], axis=0)
    rights = np.array([[np.nan if v is None else v for v in one["right"]] for one in found.values()])
    mean = np.array([np.nanmean(column) if np.isfinite(column).any() else np.nan for column in rights.T])
    known = np.isfinite(mean)
    return float(np.interp(frozen, times[known][::-1], mean[known][::-1]))


def table(lines):
    """Rows: each kind of labels and method, means over seeds."""
    rows = []
    grouped = defaultdict(list)
    varied = [len(set(each) - {""}) > 1 for each in zip(*map(_settings, lines), strict=True)]
    for line in lines:
        settings = ", ".join(text for text, varies in zip(_settings(line), varied, strict=True) if text and varies)
        if line["group"] == "none":
            row = {"held out": "", "labels": settings, "method": HINDSIGHT, "seeds": ""}
            rows.append(row | _costs([line["held_out"][HINDSIGHT]]) | {"right freezes": "", ERROR: ""})
            continue
        grouped[line["group"], line["labels"].get("source", "cka"), settings].append(line)
    for (group, labels, settings), found in sorted(grouped.items(), key=lambda item: item[0][:2]):
        for method in METHODS:
            each = [line["held_out"][method] for line in found]
            told = f"{labels}, {settings}" if settings else labels
            row = {"held out": group, "labels": told, "method": method.replace("_", " "), "seeds": str(len(found))}
            row |= _costs(each)
            row["right freezes"] = _cell([right_freezes(one) for one in each])
            row[ERROR] = _cell([line["calibration_error"][method] for line in found])
            rows.append(row)
    return rows


def _settings(line):
    """Texts of what has to be the same in a row of the table: limit of the cost, epochs, dataset; "" where there is none."""
    if line["group"] == "none":
        return "", "", f"dataset {line['dataset'][:7]}", ""
    limit = line["labels"].get("cost_limit")
    epochs = line.get("epochs") or TrainingOptions().epochs
    told = "" if limit is None else f"up to {limit:g} points", f"{epochs} epochs"
    return *told, f"dataset {line['dataset'][:7]}", "with the loss" if line.get("loss") else "without the loss"


def _costs(each):
    """Cells of what is lost; `each` has one mapping from runs to what was written down a seed."""
    one = {f"one threshold, {share:.0%}": _cell([at_one_threshold(found, share) for found in each]) for share in SHARES}
    own = {f"own threshold, {share:.0%}": _cell([at_own_threshold(found, share) for found in each]) for share in SHARES}
    return one | own


def _cell(values):
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


@errors_as_messages(ValueError)
def main(given=None):
    """Measure, or show what was measured."""
    from benchmarks.tables import markdown

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dataset", type=Path, default=DATASET)
    parser.add_argument("--labels", type=list_of(get_args(Source)), default=list(get_args(Source)))
    parser.add_argument("--groups", type=list_of(GROUPS), default=list(GROUPS))
    parser.add_argument(
        "--loss",
        dest="heard",
        choices=("with", "without", "both"),
        default="both",
        help="Whether predictors read the training loss. Default: both.",
    )
    parser.add_argument("--limit", type=float, default=0.5, help="Points that freezing may cost.")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2])
    parser.add_argument("--epochs", type=positive, help="To try something out.")
    options = parser.parse_args(given)
    options.heard = {"with": [True], "without": [False], "both": [False, True]}[options.heard]
    torch.set_num_threads(1)
    if options.what == "run":
        run(options)
    print(markdown(table(lines_of(options.results))))


if __name__ == "__main__":
    main()
