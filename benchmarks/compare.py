"""SmartFRZ and what it is compared with: `python -m benchmarks.compare run|pretrain|table|plots [--tier cpu|gpu]`.

`run` trains tasks of `benchmarks.tasks` by methods of `benchmarks.methods`, with several seeds. All methods of a task and
seed see the same samples in the same order, in one process, and take turns of a few steps (`smartfrz.comparing`).
`--methods tradeoff` are SmartFRZ at other thresholds and in fewer steps. `--methods sweeps` are Linear Freezing with other
t_0, in as many steps as make all of them cost the same FLOPs, and AutoFreeze with other numbers of evaluations an epoch.

`early-stop-30` and its like are full training with its whole schedule in 30 % of the steps: what a user would do who
has less time. Between them and `full` the accuracy of stopping early is interpolated, so that each method can be
compared with it at its own time. Two methods come after the others, since they need to know how those ended:
`similarity-guided` (the finished `full` run is its reference, kept in `--folder`) and `early-stop`, which has the share of
the time that `smartfrz` took.

One JSON line a run is added to `--results`; runs that are there are not repeated. What a missing run is compared with
is trained along, and not written a second time; `early-stop-30` and its like need no other run, since their time is
their share of the steps. A run that was interrupted begins again. Several processes may write to one file, if each has
its own tasks, seeds or methods.

A line holds a `smartfrz.comparing.engine.Result` and what was trained, and

- `accuracy` is Matthews correlation for CoLA, from `confusion` (rows are true classes);
- `full_train_seconds` and `full_cpu_seconds` are those of the full run that took turns with it, or came before;
- `drift`, for the two methods that come later: how much longer a step of `early-stop`, which is full training, took than one
  of `full` before. The machine may have become slower, or fewer runs may share its caches. Tables divide by it.
  `early-stop` also says how its seconds compare with those of `smartfrz` as they are (`time_of_smartfrz`);
- `cka` of `full`: similarity of each layer at some steps to the same layer at the end.

Linear freezing brings its own schedule, the cosine of each layer: it keeps the task's warm-up, and no other.

`pretrain` makes the weights that tasks of the tier start from and that nobody offers. `--smoke` does everything
with a few dozen samples, pretraining included, to see that it works. `table` and `plots` read the lines.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_model
from torch.utils.data import DataLoader

from benchmarks import costs
from benchmarks.arguments import errors_as_messages, lines_of, list_of, seeds
from benchmarks.methods import EARLY, METHODS, SWEPT, TRADEOFF, methods_of
from benchmarks.options import add_job_options, parse_job
from benchmarks.pictures import plots
from benchmarks.tables import tables
from benchmarks.tasks import PRETRAINING, TIERS, data_of, load_except_head
from smartfrz import __version__, zoo
from smartfrz.adapters.torch import trace_layers
from smartfrz.baselines import EarlyStop
from smartfrz.comparing.engine import take_turns
from smartfrz.comparing.lines import add_line, matching, read_lines
from smartfrz.comparing.pytorch import JUDGED_AT_ONCE, Task, TorchRun
from smartfrz.dataset_builder.cka import cka_of_grams
from smartfrz.dataset_builder.similarity import layer_grams, probe_batch
from smartfrz.errors import SmartFRZError
from smartfrz.files import replacing
from smartfrz.training import arguments, device_of, evaluate, forward, optimizer_of, schedule_factor, to_device, train

RESULTS = Path(__file__).parent / "results"
SETS = {"all": METHODS, "tradeoff": tuple(TRADEOFF), "sweeps": ("full", *SWEPT)}
LATER = ("similarity-guided", "early-stop")
MOMENTS = 8  # of a run at which it is evaluated on the validation part
PROBE = 64  # samples that CKA is measured on
SMOKE = {"samples": 48, "epochs": 2, "batch_size": 8}


class Job(NamedTuple):
    """One benchmark and seed, and where and how it is run.

    Attributes:
        tier: Name in `TIERS`.
        name: Name of the benchmark.
        seed: Seed of the head, the order of samples and dropout.
        settings: `samples`, `epochs` and `batch_size` of runs that are smaller than the benchmark's own.
        predictor: Predictor of the methods that have one.
        folder: Folder of pretrained weights and references.
        device: Where to train.
        norm_batches: Last batches whose statistics batch norms are judged with; 0 for the running ones.
    """

    tier: str
    name: str
    seed: int
    settings: dict[str, int]
    predictor: Any
    folder: Path
    device: str
    norm_batches: int = 0

    @property
    def benchmark(self):
        """What is trained, with the settings in place."""
        benchmark = TIERS[self.tier][self.name]
        changes = {key: value for key, value in self.settings.items() if key != "samples"}
        return benchmark._replace(training=dataclasses.replace(benchmark.training, **changes))

    @property
    def facts(self):
        """What tells its lines from those of other jobs."""
        known = {"name": self.predictor.info.name, "sha256": self.predictor.seal}
        facts = {"tier": self.tier, "task": self.name, "seed": self.seed, "settings": self.settings}
        facts["training"] = dataclasses.asdict(self.benchmark.training)  # a line of another rate is another task's
        return facts | {"predictor": known, "device": self.device}

    @property
    def reference(self):
        """Where the weights of the finished full run are kept."""
        size = "-".join(f"{key}{value}" for key, value in sorted(self.settings.items())) or "whole"
        return self.folder / "references" / f"{self.tier}-{self.name}-{self.seed}-{size}.safetensors"

    def data(self):
        """The benchmark's data, as much of it as the settings say."""
        return data_of(self.benchmark, self.settings.get("samples"))

    def model(self, seed):
        """Make the model with the weights that training starts from, on the device.

        Raises:
            FileNotFoundError: If they have not been pretrained.
        """
        torch.manual_seed(seed)
        model = self.benchmark.network(self.benchmark.classes)
        if self.benchmark.pretrained:
            path = pretrained_file(self.folder, self.benchmark.pretrained)
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing. Make it with: python -m benchmarks.compare pretrain --tier {self.tier} "
                    f"--tasks {self.name} --folder {self.folder}"
                )
            load_except_head(model, load_file(path))
        torch.manual_seed(seed)  # the random numbers of training do not depend on those of the weights
        return model.to(self.device)

    def probe(self, samples):
        """A few of these samples, on which similarity is measured."""
        return to_device(probe_batch(samples, PROBE), self.device)

    def task(self, data):
        """The benchmark as a task of `smartfrz.comparing`."""
        spec = self.benchmark.training
        constant = dataclasses.replace(spec, schedule="constant")
        return Task(
            model=self.model,
            optimizer=lambda model: optimizer_of(model, spec),
            train=data.train,
            validation=data.validation,
            test=data.test,
            steps=max(1, round(len(data.train) // spec.batch_size * spec.epochs)),
            batch_size=spec.batch_size,
            schedule=functools.partial(schedule_factor, spec),
            warmup=functools.partial(schedule_factor, constant),
            judge=judge_matthews if self.benchmark.metric == "matthews" else judge,
            evaluations=MOMENTS,
            norm_batches=self.norm_batches,
        )


def judge(model, data):
    """Accuracy, and for two classes the confusion, rows are true ones."""
    right, confusion = 0, torch.zeros(2, 2, dtype=torch.long)
    classes = 0
    with torch.no_grad():
        for inputs, targets in DataLoader(data, JUDGED_AT_ONCE):
            logits = forward(model, to_device(inputs, device_of(model)))
            classes, found = logits.shape[1], logits.argmax(1).cpu()
            right += int((found == targets).sum())
            if classes == 2:
                confusion += torch.bincount(2 * targets + found, minlength=4).reshape(2, 2)
    return right / len(data), {"confusion": confusion.tolist()} if classes == 2 else {}


def judge_matthews(model, data):
    """Matthews correlation instead of accuracy."""
    _, details = judge(model, data)
    return matthews(details["confusion"]), details


def matthews(confusion):
    """Matthews correlation, in [-1, 1]; 0 where it is undefined.

    Args:
        confusion: Counts `[2, 2]`, rows are true classes.
    """
    (tn, fp), (fn, tp) = confusion
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / below if below else 0.0


def pretrained_file(folder, name):
    return folder / "pretrained" / f"{name}.safetensors"


def pretrain(name, folder, settings, device):
    """Train and keep the weights that tasks start from, unless they exist; returns a line about them."""
    benchmark = PRETRAINING[name]
    path = pretrained_file(folder, name)
    if path.exists():
        return f"{path} is there already"
    changes = {key: value for key, value in settings.items() if key != "samples"}
    torch.manual_seed(0)
    model = benchmark.network(benchmark.classes).to(device)
    samples, test = benchmark.data(settings.get("samples"))

    def progress(step, total, loss, rate):
        if step % max(1, total // 20) == 0:
            print(f"{name}: step {step} of {total}, loss {loss:.3f}", file=sys.stderr, flush=True)

    train(model, samples, dataclasses.replace(benchmark.training, **changes), seed=0, on_step=progress)
    accuracy = evaluate(model, test)
    with replacing(path) as temporary:
        save_model(model, str(temporary), {"accuracy": repr(accuracy), "settings": json.dumps(settings)})
    return f"{path}: {100 * accuracy:.1f} % on {len(test):,} test samples"


class Similarity:
    """Watches a run: how similar its layers are to what they are at the end."""

    def __init__(self, job):
        self._job, self._grams = job, {}

    def __call__(self, run):
        """Look at the layers now."""
        if not self._grams:
            self._probe = self._job.probe(run.task.validation)
            args, keywords = arguments(self._probe)
            self._layers = trace_layers(run.model.eval(), *args, **keywords)
        self._grams[run.result.steps] = layer_grams(run.model, self._layers, self._probe)

    def facts(self):
        """Layers, and CKA by step and layer; null where it is undefined."""
        *_, last = self._grams.values()
        values = [
            [round(float(cka_of_grams(last[name], now[name])), 4) for name in last] for now in self._grams.values()
        ]
        cka = {"steps": list(self._grams), "values": [[None if v != v else v for v in row] for row in values]}
        return {"layers": [layer.name for layer in self._layers], "cka": cka}


class Runs:
    """The runs of one job: starts them, and turns their results into lines."""

    def __init__(self, job, data):
        self._job, self._data = job, data
        self._task, self._methods = job.task(data), methods_of(job)
        self._similarity = Similarity(job)

    def start(self, name, share=None):
        """Start the run of a method, in another share of the steps if one is given."""
        method = self._methods[name]
        if share is not None:
            method = dataclasses.replace(method, share=share)
        elif name.startswith("linear:"):
            method = dataclasses.replace(method, share=self._equal_cost[name])
        watch = {"watch": self._similarity} if name == "full" else {}
        return TorchRun(self._task, method, self._job.seed, **watch)

    @functools.cached_property
    def _equal_cost(self):
        return costs.equal_cost_shares(self._task, self._job.seed, SWEPT)

    def line(self, run, full):
        """Finish a run, and return its line, with the seconds of full training."""
        result = run.finish().to_dict()
        sizes = {f"{part}_samples": len(getattr(self._data, part)) for part in ("train", "validation", "test")}
        line = self._job.facts | {"metric": self._job.benchmark.metric} | result | result.pop("details") | sizes
        line |= {"full_train_seconds": full["train_seconds"], "full_cpu_seconds": full["cpu_seconds"]}
        line |= {"peak_memory_bytes": max(size for _, size in result["memory"])}
        if run.method.name == "full":
            line |= self._similarity.facts()
        return line | {"versions": versions(), "machine": machine(self._job.device)}


def seconds_of(run):
    """Seconds so far, by clock."""
    return {"train_seconds": run.result.train_seconds, "cpu_seconds": run.result.cpu_seconds}


def versions():
    names = ("torch", "numpy", "onnxruntime", "transformers")
    return {name: version(name) for name in names} | {"smartfrz": __version__, "python": platform.python_version()}


def machine(device):
    """Describe the machine in words, without names of hosts."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        processor = names[0] if names else processor
    words = f"{platform.system()}, {processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{words}, {torch.cuda.get_device_name()}" if device == "cuda" else words


def compare(job, names, known, load=None):
    """Yield one line for each of `names` that is missing in `known`.

    Args:
        job: What is trained.
        names: Names of methods.
        known: Method to line, for this job.
        load: Returns the data, and is called only if there is something to do; the job's own by default.
    """
    missing = [name for name in names if name not in known and (job.benchmark.repeats or name != "smartfrz+cache")]
    if not missing:
        return
    runs, known = Runs(job, (load or job.data)()), dict(known)
    now = {name: runs.start(name) for name in needed(job, missing, known)}
    take_turns(list(now.values()))
    full = known.get("full", dict.fromkeys(("train_seconds", "cpu_seconds")))
    if "full" in now:
        with replacing(job.reference) as temporary:
            save_model(now["full"].model, str(temporary))
        full = seconds_of(now["full"])
    while now:
        name = next(iter(now))
        known[name] = runs.line(now.pop(name), full)  # and the run makes room for others
        if name in missing:
            yield known[name]
    yield from compare_later(job, runs, [name for name in LATER if name in missing], known)


def needed(job, missing, known):
    """Names of the methods that run first: the missing ones, and what those are compared with."""
    first = {name for name in missing if name not in LATER}
    if "early-stop" in missing:
        first |= {"smartfrz"} - set(known)
    later_needs_it = set(missing) & set(LATER) and not ("full" in known and job.reference.exists())
    if first - set(EARLY) or later_needs_it:
        first.add("full")
    return [name for name in dict.fromkeys((*METHODS, *TRADEOFF, *SWEPT)) if name in first]


def compare_later(job, runs, names, known):
    """Yield the lines of the methods that need to know how others ended."""
    now, clock = {}, "cpu_seconds" if job.device == "cpu" else "train_seconds"
    for name in names:
        share = None
        if name == "early-stop":
            fast = known["smartfrz"]
            share = EarlyStop.at_time_of(fast[clock], fast[f"full_{clock}"]).share
        now[name] = runs.start(name, share)
    take_turns(list(now.values()))
    for name, run in now.items():
        line = runs.line(run, known["full"])
        if name == "early-stop":
            line["time_of_smartfrz"] = line[clock] / fast[clock]
        if "early-stop" in now:
            line["drift"] = drift(now["early-stop"].result, known["full"])
        yield line


def drift(early, full):
    """How much longer a step of full training takes now, by clock."""
    seconds = {"cpu_seconds": early.cpu_seconds, "train_seconds": early.train_seconds}
    return {key: value / early.steps / (full[key] / full["steps"]) for key, value in seconds.items()}


def job_of(options, name, seed, predictor):
    """The job that options read by `benchmarks.options.parse_job` describe."""
    return Job(options.tier, name, seed, options.settings, predictor, options.folder, options.device)


def run_all(options, predictor, results):
    """Run all jobs and keep their lines; tasks that lack a file are left out, with a message.

    Args:
        options: Options read by `benchmarks.options.parse_job`, with `seeds` and `methods`.
        predictor: Predictor of the methods that have one.
        results: File of JSON lines.
    """
    for name in options.tasks:
        # one copy for all seeds and methods of a task, and none once it is over
        load = functools.cache(job_of(options, name, 0, predictor).data)
        for seed in options.seeds:
            job = job_of(options, name, seed, predictor)
            known = {line["method"]: line for line in matching(read_lines(results), job.facts)}
            try:
                for line in compare(job, options.methods, known, load):
                    add_line(results, line)
                    print(f"{name}, seed {seed}, {line['method']}: {100 * line['accuracy']:.1f}", file=sys.stderr)
            except (OSError, SmartFRZError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                break


def pretrain_all(options):
    """Pretrain what the tasks start from; what lacks a file is left out, with a message."""
    found = {TIERS[options.tier][name].pretrained for name in options.tasks}
    for name in sorted(filter(None, found)):
        try:
            print(pretrain(name, options.folder, options.settings, options.device), file=sys.stderr)
        except OSError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)


def methods(text):
    """Read a set of methods, or a list of their names, for argparse."""
    return SETS.get(text) or list_of([*METHODS, *TRADEOFF, *SWEPT])(text)


@errors_as_messages()
def main(given=None):
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "pretrain", "table", "plots"))
    add_job_options(parser)
    parser.add_argument(
        "--results", type=Path, help="JSON lines. Default: results/SET.jsonl, results/TIER.jsonl for all."
    )
    parser.add_argument(
        "--compared", type=Path, help="Lines that `--methods tradeoff` is compared with. Default: results/TIER.jsonl."
    )
    parser.add_argument("--methods", type=methods, default=METHODS, help=f"{', '.join(SETS)}, or names. Default: all.")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2])
    parser.add_argument("--predictor", default=zoo.DEFAULT, help="Name or file.")
    parser.add_argument("--smoke", action="store_true", help="A few dozen samples, one seed, files that are not kept.")
    parser.add_argument("--pictures", type=Path, default=Path("runs/compare/pictures"), help="Where plots go.")
    options = parse_job(parser, given)
    chosen = next((name for name in ("tradeoff", "sweeps") if SETS[name] == options.methods), options.tier)
    results = options.results or RESULTS / f"{chosen}.jsonl"
    with tempfile.TemporaryDirectory() as temporary:
        if options.smoke:
            options.settings, options.folder = SMOKE | options.settings, Path(temporary)
            options.seeds = options.seeds[:1]
            results = options.results or Path(temporary) / "smoke.jsonl"
        lines_of(results)  # a damaged file is found before anything is trained
        if options.what == "pretrain" or (options.what == "run" and options.smoke):
            pretrain_all(options)
        if options.what == "run":
            run_all(options, zoo.load(options.predictor), results)
        lines = lines_of(results)
        if options.methods == SETS["tradeoff"]:
            lines += lines_of(options.compared or RESULTS / f"{options.tier}.jsonl")
        if options.what in ("run", "table"):
            print(tables(lines, options.methods))
        if options.what == "plots":
            written = plots(lines, options.methods, options.pictures)
            print(*(written or [tables(lines, options.methods)]), sep="\n")


if __name__ == "__main__":
    main()
