"""The paper's Tables 4 and 5, Fig. 3 and Appendix C: `python -m benchmarks.predictor_tables run|figure|costs|table`.

`run`: how good a predictor is with other attention windows (Table 4: 20, 30, 40, 50; all 60 records of a run, so that
each of them is shorter than a run) and tailored sizes (Table 5: 512, 1024, 2048, 4096; 30 records, window 30). The paper
reports the accuracy of one network that was trained with each; here it is the AUC on architectures that the predictor never
saw, which tells them apart with less noise, from the recordings in `--runs`. Representation, label rule and shortest
history are those of `--like`.

`figure`: whether the gradients of a tailored subset are distributed as those of the whole layer. One real training of the
task, gradients of every layer at five moments, and two distances between subset and whole: Kolmogorov-Smirnov's
statistic, and Wasserstein's in standard deviations of the whole.

`costs`: bytes of the file, parameters, FLOPs of one layer's decision, memory of the history of 54 layers (as many as
ResNet-50 has), for `--like` and for an untrained network of the paper's form (`raw`).

`run` also trains with other inputs (`representation`, not in the paper): the paper's raw weights, and `trajectory`
with and without the layer's position (with `unplaced` 1 the position is always hidden).

One JSON line a result is added to `--results`, and none is made twice. `table` prints them, and needs nothing else.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import ks_2samp, wasserstein_distance
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import paper
from benchmarks.arguments import errors_as_messages, lines_of, list_of, positive, progress_printer, seeds
from benchmarks.compare import Job
from benchmarks.decision import kept_bytes, untrained
from benchmarks.pictures import save
from benchmarks.tables import predictor_tables
from benchmarks.tasks import TIERS
from smartfrz import zoo
from smartfrz.adapters.torch import trace_layers
from smartfrz.comparing.lines import add_line, matching
from smartfrz.control.history import WeightHistory
from smartfrz.control.tailoring import tailoring_positions
from smartfrz.dataset_builder.labelling import labelled_runs, rule_of
from smartfrz.dataset_builder.storage import read_run, run_files
from smartfrz.predictor.runtime import Predictor
from smartfrz.predictor.training.cross_validation import leave_one_out
from smartfrz.predictor.training.export import restore
from smartfrz.predictor.training.runs import TrainingOptions
from smartfrz.training import arguments, forward, optimizer_of, schedule_factor, training_loader

RESULTS = Path(__file__).parent / "results" / "predictor_tables.jsonl"
SIZES = paper.SETTINGS["size"]
TABLES = {
    "window": [{"window": window, "tailored_size": 1024, "records": 60} for window in paper.SETTINGS["window"]],
    "size": [{"window": 30, "tailored_size": size, "records": 30} for size in SIZES],
    "representation": [
        {"window": 30, "tailored_size": 1024, "records": 30, "representation": name} | more
        for name, more in (("raw", {}), ("trajectory", {"unplaced": 1.0}), ("trajectory", {}))
    ],
}
MOMENTS = (0.02, 0.25, 0.5, 0.75, 1.0)  # of the training whose gradients are looked at
NUM_LAYERS = 54  # of ResNet-50


def run(options):
    """Train predictors without each architecture; one line for each setting and seed."""
    predictor = zoo.load(options.like, device="cpu")
    recorded = [read_run(path) for path in run_files(options.runs)]
    rule = rule_of(predictor.info, recorded)
    smaller = {"epochs": options.epochs, "steps_per_epoch": options.steps}
    smaller = {key: value for key, value in smaller.items() if value is not None}
    for name in options.tables:
        for setting in TABLES[name]:
            for seed in options.seeds:
                facts = {"table": name, "representation": predictor.info.representation, **setting, "seed": seed}
                facts |= {"label_rule": rule.to_dict(), "runs": [one.name for one in recorded], "settings": smaller}
                if matching(lines_of(options.results), facts):
                    continue
                chosen = {key: facts[key] for key in ("representation", "window", "tailored_size", "seed")}
                chosen |= {"unplaced": setting["unplaced"]} if "unplaced" in setting else {}
                training = TrainingOptions(min_records=predictor.info.min_records, **chosen, **smaller)
                told = f"{name} {facts['window']}/{facts['tailored_size']}"
                start = time.perf_counter()
                runs = labelled_runs(recorded, rule, setting["records"])
                judged = leave_one_out(runs, training, progress=progress_printer(told), num_seeds=1)
                line = facts | {"held_out": plain(judged), "seconds": time.perf_counter() - start}
                add_line(options.results, line)


def plain(judged):
    """Held out to method to its figures, as JSON has them."""
    return {
        group: {
            method: {k: None if math.isnan(v) else v for k, v in found[0].quality.to_dict().items()}
            | {"calibration_error": round(found[0].reliability.error, 4)}
            for method, found in methods.items()
        }
        for group, methods in judged.items()
    }


# Fig. 3


def gradients_of(job, moments=MOMENTS):
    """Train a task, and yield (step, share of the run, layer, its gradient) at these moments.

    Args:
        job: The task.
        moments: Shares of the run.
    """
    data, model, spec = job.data(), job.model(job.seed), job.benchmark.training
    loader = training_loader(data.train, spec)
    total = max(1, round(len(loader) * spec.epochs))
    chosen = {max(1, round(total * moment)) for moment in moments}
    optimizer = optimizer_of(model, spec)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(spec, step / total))
    args, keywords = arguments(next(iter(loader))[0])
    layers = trace_layers(model.eval(), *args, **keywords)
    model.train()
    torch.manual_seed(job.seed)
    step = 0
    while step < total:
        for inputs, targets in loader:
            cross_entropy(forward(model, inputs), targets).backward()
            step += 1
            if step in chosen:
                for layer in layers:
                    found = [model.get_parameter(name).grad.flatten() for name in layer.parameters]
                    yield step, step / total, layer.name, torch.cat(found).numpy().copy()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if step == total:
                break


def distances(layer, gradient, sizes=SIZES):
    """Of subsets of a layer's gradient to all of it, by size; layers that are smaller than a size have none.

    Args:
        layer: Its name: it decides what is sampled.
        gradient: float32 `[n]`.
        sizes: Of subsets.
    """
    scale = float(gradient.std()) or 1.0
    found = {}
    for size in sizes:
        if size < len(gradient):
            subset = gradient[tailoring_positions(layer, len(gradient), size)]
            found[str(size)] = {
                "ks": float(ks_2samp(subset, gradient, method="asymp").statistic),
                "wasserstein": wasserstein_distance(subset / scale, gradient / scale),
            }
    return found


def figure(options):
    """Measure the distances on one training, and draw its largest layer in the middle of it."""
    job = Job(options.tier, options.task, 0, options.settings, zoo.load(options.like), options.folder, "cpu")
    facts = {"table": "gradients", "tier": options.tier, "task": options.task, "settings": options.settings}
    if matching(lines_of(options.results), facts):
        return
    lines, shown, best = [], None, (0, 0.0)
    for step, share, layer, gradient in gradients_of(job):
        lines.append({"step": step, "layer": layer, "weights": len(gradient), "distances": distances(layer, gradient)})
        if (len(gradient), -abs(share - 0.5)) > best:
            shown, best = (step, layer, gradient), (len(gradient), -abs(share - 0.5))
    save(draw_gradients(*shown), options.pictures / "gradient_distribution.png", dpi=110)
    add_line(options.results, facts | {"layers": lines})


def draw_gradients(step, layer, gradient, size=1024):
    """Histograms of a layer's gradient and of a subset of it, as in the paper's Fig. 3."""
    subset = gradient[tailoring_positions(layer, len(gradient), size)]
    made = Figure(figsize=(8, 3), layout="constrained")
    limit = 4 * float(gradient.std()) or 1.0
    bins = np.linspace(-limit, limit, 61)
    parts = ((gradient, f"all {len(gradient):,} weights"), (subset, f"{len(subset):,} of them"))
    for axes, (values, name) in zip(made.subplots(1, 2), parts, strict=True):
        axes.hist(values, bins, weights=np.full(len(values), 100 / len(values)), color="#2f6690")
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("gradient")
    made.axes[0].set_ylabel("% of the weights")
    made.suptitle(f"Gradients of layer {layer} at step {step}", fontsize=10, x=0.01, ha="left")
    return made


# Appendix C


def costs(options):
    """Measure what a predictor costs."""
    with tempfile.TemporaryDirectory() as folder, zoo.file_of(options.like) as path:
        like = Predictor(path, device="cpu")
        made = untrained("raw", like.info, folder)
        files = {like.info.name: (like, path), "raw, untrained": (made, Path(folder) / "raw.onnx")}
        for name, (predictor, file) in files.items():
            facts = {"table": "costs", "predictor": name, "sha256": predictor.seal}
            if not matching(lines_of(options.results), facts):
                add_line(options.results, facts | costs_of(predictor, file))


def costs_of(predictor, file, num_layers=NUM_LAYERS):
    """Size, FLOPs and memory, and median milliseconds of one decision over all layers on one thread."""
    info, network = predictor.info, restore(file)
    rng = np.random.default_rng(0)
    shape = num_layers, info.window, info.tailored_size
    start = rng.normal(size=(shape[0], 1, shape[2])) * 0.05
    weights = (start + rng.normal(size=shape).cumsum(axis=1) * 1e-3).astype(np.float32)
    lengths = np.full(num_layers, info.window)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.from_numpy(weights[:1]), torch.from_numpy(lengths[:1]))
    seconds = []
    for _ in range(12):
        begin = time.perf_counter()
        predictor.predict(weights, lengths)
        seconds.append(time.perf_counter() - begin)
    return {
        "representation": info.representation,
        "window": info.window,
        "tailored_size": info.tailored_size,
        "num_layers": num_layers,
        "file_bytes": file.stat().st_size,
        "parameters": sum(p.numel() for p in network.parameters()),
        "flops_per_layer": counter.get_total_flops(),
        "record_bytes": num_layers * info.tailored_size * 4,
        "history_bytes": kept_bytes(WeightHistory(*shape[1:]), weights),
        "milliseconds": 1e3 * statistics.median(seconds[2:]),
    }


@errors_as_messages()
def main(given=None):
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "figure", "costs", "table"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of recordings.")
    parser.add_argument("--like", default=zoo.DEFAULT, help="Predictor whose form to take: a name or a file.")
    parser.add_argument("--tables", type=list_of(TABLES), default=list(TABLES))
    parser.add_argument("--seeds", type=seeds, default=[0])
    parser.add_argument("--epochs", type=positive, help="Of training a predictor, to try something out.")
    parser.add_argument("--steps", type=positive, help="Of an epoch, to try something out.")
    parser.add_argument("--tier", choices=TIERS, default="cpu", help="Of the training whose gradients are looked at.")
    parser.add_argument("--task", default="vgg-cifar10")
    parser.add_argument("--samples", type=positive, help="At most, to try something out.")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="Of pretrained weights.")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent / "pictures")
    options = parser.parse_args(given)
    options.settings = {} if options.samples is None else {"samples": options.samples}
    torch.set_num_threads(1)
    {"run": run, "figure": figure, "costs": costs, "table": lambda _: None}[options.what](options)
    settings = {"window": [one["window"] for one in TABLES["window"]]}
    settings |= {"size": [one["tailored_size"] for one in TABLES["size"]]}
    print(predictor_tables(lines_of(options.results), settings))


if __name__ == "__main__":
    main()
