"""SmartFRZ beside what it is compared with: `python -m benchmarks.compare run|pretrain|table|plots [--tier cpu|gpu]`.

`run`: tasks of `benchmarks.tasks` x `METHODS` x seeds. All methods of a task and seed see the same samples in the
same order, in one process, and take turns of a few steps, so that a machine that gets slower does so for all.
`early-stop-30` and its like are full training with its whole schedule in so many % of the steps: what a user would do who
has less time. Between them and `full` the accuracy of stopping early is interpolated, so that each method can be
compared with it at its own time. Two methods come after the others, since they need to know how those ended:
`similarity-guided` (the finished `full` run is its reference, kept in `--folder`) and `early-stop`, which has the share of
the time that `smartfrz` took.

One JSON line a run is added to `--results`; runs that are there are not repeated. What a missing run is compared with
is trained along, and not written a second time; `early-stop-30` and its like need nothing beside them, since their time is
their share of the steps. A run that was interrupted begins anew. Several processes may write to one file, if each has
its own tasks, seeds or methods.

- `accuracy` is of the test data, used once, at the end (`matthews` for CoLA, from `confusion`, rows are true classes);
  `curve` is of the validation part: step, CPU seconds, seconds, accuracy.
- `train_seconds` are by the clock on the wall, `cpu_seconds` are those of the process: batches, both passes, optimizer, and
  all that freezing and caching cost; no evaluation, no counting. `full_train_seconds` and `full_cpu_seconds` are those
  of the full run that took turns with it, or came before.
- `backward_flops` and `total_flops` come from PyTorch's counter, on a copy of the model at the first step and whenever the
  frozen set has changed, times the steps until the next change. `total_flops` is null with a cache, whose batches
  differ in what is computed; the oracle's own forward passes are in its seconds only.
- `memory` is, by step, the bytes of weights, gradients, optimizer, activations kept for the backward pass (of the same
  copies), of AutoFreeze's sums and of the cache. It is counted, since all runs share one process.
- The two that come later have a `drift`: how much longer a step of `early-stop`, which is full training, took than one of
  `full` before. The machine may have become slower, or fewer runs may share its caches. Tables divide by it.
  `early-stop` also says how its seconds compare with those of `smartfrz` as they are (`time_of_smartfrz`); its number
  of steps is right whatever the drift.
- `cka` of `full`: similarity of each layer at some steps to the same layer at the end.

Linear freezing brings its own schedule, the cosine of each layer: it keeps the task's warm-up, and no other.

`pretrain` makes the weights that tasks of the tier start from and that nobody offers. `--smoke` does everything
with a few dozen samples, pretraining included, to see that it works. `table` and `plots` read the lines.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, load_model, save_model
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from benchmarks.compare_results import EARLY, METHODS, matthews, plots, tables
from benchmarks.freeze_order import TURN
from benchmarks.lines import add_line, read_lines
from benchmarks.options import add_job_options, list_of, parse_job, seeds
from benchmarks.tasks import PRETRAINING, TIERS, data_of, load_except_head
from smartfrz import __version__, zoo
from smartfrz.adapters.torch import PrefixCache, SmartFRZ, trace_layers
from smartfrz.adapters.torch.costs import measure_step
from smartfrz.baselines import AutoFreeze, EarlyStop, LinearFreezing, WeightChange
from smartfrz.baselines.similarity_guided import SimilarityGuided
from smartfrz.dataset_builder.cka import cka_of_grams
from smartfrz.dataset_builder.labels import LabelRule
from smartfrz.dataset_builder.similarity import layer_grams, probe_batch
from smartfrz.errors import SmartFRZError
from smartfrz.files import replacing
from smartfrz.training import arguments, evaluate, forward, optimizer_of, schedule_factor, to_device, train

RESULTS = Path(__file__).parent / "results"
LATER = ("similarity-guided", "early-stop")
# Similarity has to have settled for a third of the run: with a tenth of it, the default, the oracle froze a VGG after 48
# of 472 steps, before it had learned anything, and lost ten points.
SETTLED = LabelRule("backward", tolerance=0.02, records=10)
MOMENTS = 8  # of a run at which it is evaluated on the validation part
PROBE = 64  # samples that CKA is measured on
SMOKE = {"samples": 48, "epochs": 2, "batch_size": 8}
OPTIONS = {
    "smartfrz": {},
    "smartfrz-prefix": {"freeze_order": "prefix"},
    "smartfrz-cost_aware": {"freeze_order": "cost_aware"},
    "smartfrz+cache": {},
}


class Job(NamedTuple):
    """One task and seed, and where and how it is run.

    Attributes:
        tier: A name of `TIERS`.
        name: Of the task.
        seed: Of the head, the order of samples and dropout.
        settings: `samples`, `epochs` and `batch_size` of runs that are smaller than the task's own.
        predictor: Of the methods that have one.
        folder: Of pretrained weights and references.
        device: Where to train.
    """

    tier: str
    name: str
    seed: int
    settings: dict[str, int]
    predictor: Any
    folder: Path
    device: str

    @property
    def task(self):
        """What is trained, with the settings in place."""
        task = TIERS[self.tier][self.name]
        changes = {key: value for key, value in self.settings.items() if key != "samples"}
        return task._replace(training=dataclasses.replace(task.training, **changes))

    @property
    def facts(self):
        """What tells its lines from those of other jobs."""
        known = {"name": self.predictor.info.name, "sha256": self.predictor.sha256}
        facts = {"tier": self.tier, "task": self.name, "seed": self.seed, "settings": self.settings}
        facts["training"] = dataclasses.asdict(self.task.training)  # a line of another rate is another task's
        return facts | {"predictor": known, "device": self.device}

    @property
    def reference(self):
        """Where the weights of the finished full run are kept."""
        size = "-".join(f"{key}{value}" for key, value in sorted(self.settings.items())) or "whole"
        return self.folder / "references" / f"{self.tier}-{self.name}-{self.seed}-{size}.safetensors"

    def model(self):
        """With the weights that training starts from, on the device.

        Raises:
            FileNotFoundError: If they have not been pretrained.
        """
        torch.manual_seed(self.seed)
        task = self.task
        model = task.network(task.classes)
        if task.pretrained:
            path = pretrained_file(self.folder, task.pretrained)
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing. Make it with: python -m benchmarks.compare pretrain --tier {self.tier} "
                    f"--tasks {self.name} --folder {self.folder}"
                )
            load_except_head(model, load_file(path))
        return model.to(self.device)

    def data(self):
        """The task's data, as much of it as the settings say."""
        return data_of(self.task, self.settings.get("samples"))


def pretrained_file(folder, name):
    return folder / "pretrained" / f"{name}.safetensors"


def pretrain(name, folder, settings, device):
    """Train and keep the weights that tasks start from; says how good they are. Nothing is done twice."""
    network, data, classes, spec = PRETRAINING[name]
    path = pretrained_file(folder, name)
    if path.exists():
        return f"{path} is there already"
    spec = dataclasses.replace(spec, **{key: value for key, value in settings.items() if key != "samples"})
    torch.manual_seed(0)
    model = network(classes).to(device)
    samples, test = data(settings.get("samples"))

    def progress(step, total, loss, rate):
        if step % max(1, total // 20) == 0:
            print(f"{name}: step {step} of {total}, loss {loss:.3f}", file=sys.stderr, flush=True)

    train(model, samples, spec, seed=0, on_step=progress)
    accuracy = evaluate(model, test)
    with replacing(path) as temporary:
        save_model(model, str(temporary), {"accuracy": repr(accuracy), "settings": json.dumps(settings)})
    return f"{path}: {100 * accuracy:.1f} % on {len(test):,} test samples"


def policy_of(method, job, model, steps_per_epoch, probe):
    """What `SmartFRZ` gets in the place of the predictor; `linear:0.3` and `autofreeze:2` have another t_0 and M."""
    method, _, value = method.partition(":")
    if method in OPTIONS:
        return job.predictor
    if method == "similarity-guided":
        reference = job.model()
        load_model(reference, str(job.reference), device=job.device)
        return SimilarityGuided(model, reference, probe, rule=SETTLED)
    if method == "weight-change":  # its limit was calibrated on the predictor's recordings, in the same way
        threshold = job.predictor.info.metrics.get("weight_change_calibrated_threshold")
        return WeightChange() if threshold is None else WeightChange(limit=10.0**-threshold)
    if method == "linear":
        return LinearFreezing(float(value or 0.5))
    return AutoFreeze(steps_per_epoch=steps_per_epoch, intervals_per_epoch=int(value or 4))


def without_schedule(spec, progress):
    """The task's warm-up, and then a constant learning rate."""
    return schedule_factor(dataclasses.replace(spec, schedule="constant"), progress)


class Run:
    """One run, a few steps at a time.

    Args:
        job: What is trained.
        method: One of `METHODS`, or as `policy_of` says.
        data: That of the job, which all of its runs share.
        share: Of the steps of full training, for a run that is shorter or longer; the schedule is scaled.
        **options: Of `SmartFRZ`, beside those that the method has.
    """

    def __init__(self, job, method, data, share=1.0, **options):
        self.job, self.method, self.task = job, method, job.task
        self.spec = self.task.training
        samples, self.validation, self.test = data
        self.model = job.model()
        order = torch.Generator().manual_seed(job.seed)
        indexed = PrefixCache.indexed(samples, seed=job.seed)
        self.loader = DataLoader(indexed, self.spec.batch_size, shuffle=True, drop_last=True, generator=order)
        self.full_steps = max(1, round(len(self.loader) * self.spec.epochs))
        self.total_steps, self.step = max(1, round(EARLY.get(method, share) * self.full_steps)), 0
        self.moments = {math.ceil(self.total_steps * (k + 1) / MOMENTS) for k in range(MOMENTS)}
        self.optimizer = optimizer_of(self.model, self.spec)
        factor = without_schedule if method.startswith("linear") else schedule_factor
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: factor(self.spec, step / self.total_steps)
        )
        probe = to_device(probe_batch(self.validation, PROBE), job.device)
        self.freezer, self.probe, self.grams = None, None, {}
        if method == "full":
            args, keywords = arguments(probe)
            self.probe, self.layers = probe, trace_layers(self.model.eval(), *args, **keywords)
            self.grams = {0: layer_grams(self.model, self.layers, probe)}
        elif not method.startswith("early-stop"):
            cache = PrefixCache(memory="4GB") if method == "smartfrz+cache" else None
            policy = policy_of(method, job, self.model, len(self.loader), probe)
            self.freezer = SmartFRZ(
                self.model,
                self.optimizer,
                policy,
                total_steps=self.total_steps,
                cache=cache,
                device="cuda" if job.device == "cuda" and "CUDAExecutionProvider" in _providers() else "cpu",
                **OPTIONS.get(method, {}) | options,
            )
        self.batches, self.cpu_seconds, self.seconds, self.losses = iter(()), 0.0, 0.0, []
        self.backward_flops = self.total_flops = 0
        self.memory, self.curve, self.cuda_peak = [], [], 0
        torch.manual_seed(job.seed)
        self.random = self._random_state()
        self.model.train()

    def _random_state(self):
        return torch.get_rng_state(), torch.cuda.get_rng_state() if self.job.device == "cuda" else None

    def _clock(self):
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def advance(self, number):
        """Whether there is more to do."""
        torch.set_rng_state(self.random[0])
        if self.job.device == "cuda":
            torch.cuda.set_rng_state(self.random[1])
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated()
        for _ in range(min(number, self.total_steps - self.step)):
            self._step()
        if self.job.device == "cuda":
            self.cuda_peak = max(self.cuda_peak, torch.cuda.max_memory_allocated() - others)
        self.random = self._random_state()
        return self.step < self.total_steps

    def _step(self):
        start = self._clock()
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        ids, *batch = batch
        inputs, targets = to_device(batch, self.job.device)
        if not self.step:
            self._count(inputs, targets)
            start = self._clock()
        changed = False
        if self.freezer is None:
            output = forward(self.model, inputs)
        else:
            with self.freezer.batch(ids):
                output = forward(self.model, inputs)
        loss = cross_entropy(output, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.freezer is not None:
            changed = any(decision.action in ("freeze", "thaw") for decision in self.freezer.step())
        self.scheduler.step()
        end = self._clock()
        self.cpu_seconds += end[0] - start[0]
        self.seconds += end[1] - start[1]
        self.step += 1
        self.backward_flops += self.work.backward_flops
        self.total_flops += self.work.forward_flops + self.work.backward_flops
        self.losses.append(loss.item())
        if changed:
            self._count(inputs, targets)
        if self.step in self.moments:
            self._look()

    def _count(self, inputs, targets):
        """FLOPs and activations of one step, on a copy."""
        twin = copy.deepcopy(self.model)
        with torch.random.fork_rng():
            self.work = measure_step(twin, lambda: cross_entropy(forward(twin, inputs), targets))
        self._note_memory()

    def _note_memory(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        kept = [*self.model.parameters(), *self.model.buffers(), *trained]  # gradients are as large as weights
        kept += [x for x in tree_leaves(dict(self.optimizer.state)) if isinstance(x, torch.Tensor)]
        if self.method.startswith("autofreeze") and self.freezer.adapter is not None:
            kept += self.freezer.adapter.gradient_state().values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in kept) + self.work.activation_bytes
        if self.freezer is not None and (use := self.freezer.report().cache) is not None:
            size += use.memory_bytes
        self.memory.append([self.step, size])

    def _look(self):
        """What is measured now and then, and costs no time of the run."""
        self._note_memory()
        metric, _ = self.judge(self.validation)
        self.curve.append([self.step, self.cpu_seconds, self.seconds, metric])
        if self.probe is not None:
            self.grams[self.step] = layer_grams(self.model, self.layers, self.probe)
        self.model.train()

    def judge(self, data):
        """The task's metric, and the confusion of two classes, rows are true ones; the model is in eval mode then."""
        self.model.eval()
        right, confusion = 0, [[0, 0], [0, 0]]
        with torch.no_grad():
            for inputs, targets in DataLoader(data, 250):
                found = forward(self.model, to_device(inputs, self.job.device)).argmax(1).cpu()
                right += int((found == targets).sum())
                if self.task.classes == 2:
                    for true in (0, 1):
                        for said in (0, 1):
                            confusion[true][said] += int(((targets == true) & (found == said)).sum())
        metric = matthews(confusion) if self.task.metric == "matthews" else right / len(data)
        return metric, confusion

    def times(self):
        """Seconds so far, by clock: what `line` is told of full training."""
        return {"train_seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def line(self, full):
        """What is reported, beside the seconds of full training; the run is over then."""
        metric, confusion = self.judge(self.test)
        line = self.job.facts | {"method": self.method, "metric": self.task.metric, "accuracy": metric}
        line |= {"test_samples": len(self.test)} | ({"confusion": confusion} if self.task.classes == 2 else {})
        line |= self.times()
        line |= {"full_train_seconds": full["train_seconds"], "full_cpu_seconds": full["cpu_seconds"]}
        line |= {"steps": self.step, "full_steps": self.full_steps, "train_samples": len(self.loader.dataset)}
        line |= {"validation_samples": len(self.validation)}
        cached = self.method == "smartfrz+cache"
        line |= {"backward_flops": self.backward_flops, "total_flops": None if cached else self.total_flops}
        line |= {"memory": self.memory, "peak_memory_bytes": max(size for _, size in self.memory)}
        if self.job.device == "cuda":
            line["cuda_peak_bytes"] = self.cuda_peak
        line |= {"curve": self.curve, "last_loss": sum(self.losses[-20:]) / len(self.losses[-20:])}
        if self.freezer is not None:
            report = self.freezer.report()
            line |= {"decision_seconds": report.decision_seconds, "layers": [layer.name for layer in report.layers]}
            line |= {"events": [list(change) for change in report.changes]}
            line |= {"cache": report.to_dict()["cache"]} if cached else {}
            self.freezer.close()
        else:
            line |= {"decision_seconds": 0.0, "events": []}
        if self.probe is not None:
            line |= {"layers": [layer.name for layer in self.layers], "cka": self._similarities()}
        return line | {"versions": versions(), "machine": machine(self.job.device)}

    def _similarities(self):
        *_, last = self.grams.values()
        values = [
            [round(float(cka_of_grams(last[name], now[name])), 4) for name in last] for now in self.grams.values()
        ]
        return {"steps": list(self.grams), "values": [[None if v != v else v for v in row] for row in values]}


def _providers():
    import onnxruntime

    return onnxruntime.get_available_providers()


def versions():
    names = ("torch", "numpy", "onnxruntime", "transformers")
    return {name: version(name) for name in names} | {"smartfrz": __version__, "python": platform.python_version()}


def machine(device):
    """In words; without names of hosts."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        processor = names[0] if names else processor
    words = f"{platform.system()}, {processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{words}, {torch.cuda.get_device_name()}" if device == "cuda" else words


def take_turns(runs):
    """Train all of them to the end, a few steps at a time."""
    while any([run.advance(TURN) for run in runs.values()]):
        pass


def compare(job, methods, known, load=None):
    """One line for each of `methods` that `known`, method to line of this job, lacks.

    Args:
        job: What is trained.
        methods: Of `METHODS`.
        known: Method to line.
        load: Returns the data, and is called only if there is something to do; the job's own by default.
    """
    missing = [method for method in methods if method not in known]
    if not job.task.repeats:
        missing = [method for method in missing if method != "smartfrz+cache"]
    known = dict(known)
    first = {method for method in missing if method not in LATER}
    if "early-stop" in missing:
        first |= {"smartfrz"} - set(known)
    later_needs_it = set(missing) & set(LATER) and not ("full" in known and job.reference.exists())
    if first - set(EARLY) or later_needs_it:
        first.add("full")
    if not missing:
        return
    data = (load or job.data)()
    runs = {method: Run(job, method, data) for method in METHODS if method in first}
    take_turns(runs)
    full = known.get("full", dict.fromkeys(("train_seconds", "cpu_seconds")))
    if "full" in runs:
        with replacing(job.reference) as temporary:
            save_model(runs["full"].model, str(temporary))
        full = runs["full"].times()
    while runs:
        method = next(iter(runs))
        run = runs.pop(method)
        line = run.line(full)
        del run  # room for others
        if method in missing:
            yield line
        known[method] = line
    later = {}
    if "similarity-guided" in missing:
        later["similarity-guided"] = Run(job, "similarity-guided", data)
    if "early-stop" in missing:
        fast = known["smartfrz"]
        clock = "cpu_seconds" if job.device == "cpu" else "train_seconds"
        share = EarlyStop.at_time_of(fast[clock], fast[f"full_{clock}"]).share
        later["early-stop"] = Run(job, "early-stop", data, share)
    take_turns(later)
    for method, run in later.items():
        line = run.line(known["full"])
        if method == "early-stop":
            line["time_of_smartfrz"] = line[clock] / fast[clock]
        if "early-stop" in later:
            line["drift"] = drift(later["early-stop"], known["full"])
        yield line


def drift(early, full):
    """How much longer a step of full training takes now, by clock."""
    seconds = {"cpu_seconds": early.cpu_seconds, "train_seconds": early.seconds}
    return {key: value / early.step / (full[key] / full["steps"]) for key, value in seconds.items()}


def job_of(options, name, seed, predictor):
    """Of the options that `benchmarks.options.parse_job` has read."""
    return Job(options.tier, name, seed, options.settings, predictor, options.folder, options.device)


def known_lines(job, results):
    """Method to line, of what a file of results has of a job."""
    return {line["method"]: line for line in read_lines(results) if job.facts.items() <= line.items()}


def run_all(options, predictor, results, measure):
    """All jobs; what they lack is printed, and they are left out.

    Args:
        options: As `benchmarks.options.parse_job` has read them, with `seeds`.
        predictor: Of the methods that have one.
        results: File of JSON lines.
        measure: Makes lines of a job, of the lines that are known of it, and of what loads its data.
    """
    for name in options.tasks:
        # one copy for all seeds and methods of a task, and none once it is over
        load = functools.cache(job_of(options, name, 0, predictor).data)
        for seed in options.seeds:
            job = job_of(options, name, seed, predictor)
            try:
                for line in measure(job, known_lines(job, results), load):
                    add_line(results, line)
                    print(f"{name}, seed {seed}, {line['method']}: {100 * line['accuracy']:.1f}", file=sys.stderr)
            except (OSError, SmartFRZError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                break


def main(arguments=None):
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("run", "pretrain", "table", "plots"))
    add_job_options(parser)
    parser.add_argument("--results", type=Path, help="Of JSON lines. By default results/<tier>.jsonl.")
    parser.add_argument("--methods", type=list_of(METHODS), default=METHODS, help="All by default.")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2])
    parser.add_argument("--predictor", default="smartfrz-base", help="A name, or a file.")
    parser.add_argument("--smoke", action="store_true", help="A few dozen samples, one seed, files that are not kept.")
    parser.add_argument("--pictures", type=Path, default=Path("runs/compare/pictures"), help="Where plots go.")
    options = parse_job(parser, arguments)
    results = options.results or RESULTS / f"{options.tier}.jsonl"
    with tempfile.TemporaryDirectory() as temporary:
        if options.smoke:
            options.settings, options.folder = SMOKE | options.settings, Path(temporary)
            options.seeds = options.seeds[:1]
            results = options.results or Path(temporary) / "smoke.jsonl"
        if options.what == "pretrain" or (options.what == "run" and options.smoke):
            tasks = [TIERS[options.tier][name] for name in options.tasks]
            for name in sorted({task.pretrained for task in tasks if task.pretrained}):
                try:
                    print(pretrain(name, options.folder, options.settings, options.device), file=sys.stderr)
                except OSError as error:
                    print(f"{name} is left out: {error}", file=sys.stderr)
        if options.what == "run":
            run_all(
                options,
                zoo.load(options.predictor),
                results,
                lambda job, known, load: compare(job, options.methods, known, load),
            )
        lines = read_lines(results)
        if options.what in ("run", "table"):
            print(tables(lines))
        if options.what == "plots":
            print(*plots(lines, options.pictures), sep="\n")


if __name__ == "__main__":
    main()
