"""The paper's Tables 8 and 9, the baselines' own settings: `python -m benchmarks.sweeps run|table`.

Linear Freezing with t_0 of 0.3, 0.4, 0.5 and 0.6, and with as many steps as make all of them cost the same: an earlier
t_0 saves more of a step, and so gets more of them, as in the paper. What a step costs with the first layers frozen is
counted in FLOPs, before training. AutoFreeze with 2, 3, 4 and 5 evaluations an epoch (M), at full length.

One task of `benchmarks.compare` (by default `vgg-cifar10` of the CPU tier, where the paper has ResNet-50), three seeds; all
settings of a seed and full training take turns in one process. One JSON line a run, as `benchmarks.compare` writes them;
runs that are there are not repeated. `table` prints ours beside the paper's.
"""

import argparse
import copy
import statistics
from pathlib import Path

from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.compare import Run, run_all, take_turns
from benchmarks.compare_results import cell, share_of_full
from benchmarks.lines import read_lines
from benchmarks.options import add_job_options, parse_job, seeds
from smartfrz import zoo
from smartfrz.adapters.torch import trace_layers
from smartfrz.adapters.torch.costs import measure_step
from smartfrz.baselines.linear_freezing import moments
from smartfrz.training import arguments, forward

RESULTS = Path(__file__).parent / "results" / "sweeps.jsonl"
SETTINGS = {"linear": (0.3, 0.4, 0.5, 0.6), "autofreeze": (2, 3, 4, 5)}
SWEPT = tuple(f"{method}:{value}" for method, values in SETTINGS.items() for value in values)
PAPER = {
    "linear": {0.3: (95.62, 1989), 0.4: (95.81, 1986), 0.5: (96.05, 1980), 0.6: (95.97, 2015)},
    "autofreeze": {2: (96.19, 2536), 3: (96.28, 2487), 4: (96.24, 2424), 5: (95.69, 2378)},
}
PAPER_FULL = 96.10, 2594  # Table 2: ResNet-50 on CIFAR-10
GRID = 200  # moments of a run at which its cost is looked at


def costs_by_frozen(model, loss, layers):
    """FLOPs of a step with the first 0, 1, ... layers frozen; the last one always trains.

    Args:
        model: Left as it is.
        loss: From a model to the loss of one batch.
        layers: In the order of execution.
    """
    twin, costs = copy.deepcopy(model), []
    for layer in [None, *layers[:-1]]:
        for name in layer.parameters if layer is not None else ():
            twin.get_parameter(name).requires_grad_(False)
        work = measure_step(twin, lambda: loss(twin))
        costs.append(work.forward_flops + work.backward_flops)
    return costs


def mean_cost(costs, t_0):
    """FLOPs of the mean step of a run of Linear Freezing."""
    ends = moments(len(costs), t_0)
    frozen = [sum(end <= (k + 0.5) / GRID for end in ends) for k in range(GRID)]
    return statistics.mean(costs[min(number, len(costs) - 1)] for number in frozen)


def lengths(job, data):
    """Swept settings to their share of the steps of full training."""
    model, spec = job.model(), job.task.training
    inputs, targets = next(iter(DataLoader(data.train, spec.batch_size)))
    args, keywords = arguments(inputs)
    layers = trace_layers(model.eval(), *args, **keywords)
    costs = costs_by_frozen(model.train(), lambda twin: cross_entropy(forward(twin, inputs), targets), layers)
    usual = mean_cost(costs, 0.5)
    linear = {f"linear:{t_0}": usual / mean_cost(costs, t_0) for t_0 in SETTINGS["linear"]}
    return dict.fromkeys(SWEPT, 1.0) | linear


def sweep(job, known, load):
    """One line for each of `full` and `SWEPT` that `known`, method to line, lacks; `load` returns the job's data."""
    missing = [method for method in ("full", *SWEPT) if method not in known]
    if not missing:
        return
    data = load()
    shares = {"full": 1.0} | lengths(job, data)
    runs = {method: Run(job, method, data, shares[method]) for method in dict.fromkeys(["full", *missing])}
    take_turns(runs)
    full = runs["full"].times()
    for method in missing:
        yield runs.pop(method).line(full) | {"length": shares[method]}


def tables(lines):
    """Tables 8 and 9, Markdown."""
    made = []
    for name, title in (("linear", "t_0"), ("autofreeze", "M")):
        found = {value: [line for line in lines if line["method"] == f"{name}:{value}"] for value in SETTINGS[name]}
        if not any(found.values()):
            continue
        rows = [
            f"| {title} | seeds | accuracy, % | time, % of full training | steps, % | paper: accuracy | paper: time |",
            "|---" * 7 + "|",
        ]
        for value, chosen in found.items():
            accuracy, seconds = PAPER[name][value]
            ours = [str(len(chosen)), cell([100 * line["accuracy"] for line in chosen], ".1f")]
            ours.append(cell([100 * share_of_full(line) for line in chosen], ".1f"))
            ours.append(f"{100 * statistics.mean(line['length'] for line in chosen):.0f}" if chosen else "")
            paper = f"{accuracy:.2f} % | {100 * seconds / PAPER_FULL[1]:.1f} %"
            rows.append(f"| {value} | {' | '.join(ours)} | {paper} |")
        full = cell([100 * line["accuracy"] for line in lines if line["method"] == "full"], ".1f")
        rows.append(f"| full training |  | {full} | 100 | 100 | {PAPER_FULL[0]:.2f} % | 100 % |")
        made.append("\n".join(rows))
    return "\n\n".join(made) or "There are no results yet."


def main(given=None):
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    add_job_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2])
    parser.set_defaults(tasks="vgg-cifar10")
    options = parse_job(parser, given)
    if options.what == "run":
        # no method here asks the predictor
        run_all(options, zoo.load(zoo.DEFAULT, device="cpu"), options.results, sweep)
    print(tables(read_lines(options.results)))


if __name__ == "__main__":
    main()
