"""What each process of tests/test_distributed.py runs: scenarios by name, results as JSON.

echo '["FOLDER", PROCESSES, PORT, ["SCENARIO", ...]]' | python distributed_worker.py
"""

import contextlib
import copy
import datetime
import functools
import hashlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy_adapter import ChangePredictor, MockLossPredictor, ScriptedPredictor, make_info
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smartfrz.adapters.torch import PrefixCache, SmartFRZ
from smartfrz.adapters.torch import distributed as ours
from smartfrz.adapters.torch.layers import LayerReader, trace_layers
from smartfrz.baselines import AutoFreeze, GradES, LinearFreezing
from smartfrz.errors import SmartFRZError

STEPS = 16
FREEZE_AT = [6, 12]  # conv1, then conv2
SCRIPT = [{"conv1": 0.9, "conv2": 0.1, "head": 0.1}, {"conv2": 0.9, "head": 0.1}]
OPTIONS = {"record_every": 2, "decide_every": 3, "patience": 1, "norm_batches": 4, "rank_timeout": 60.0}
SIZES = {"conv1": 4 * 2 * 9 + 2 * 4, "conv2": 6 * 4 * 9 + 6 + 2 * 6, "head": 6 * 3 + 3}
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


class Net(nn.Module):
    """Two convolutions with batch norm and a linear layer."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(2, 4, 3, bias=False)
            self.norm1 = nn.BatchNorm2d(4, momentum=0.05)
            self.conv2 = nn.Conv2d(4, 6, 3)
            self.norm2 = nn.BatchNorm2d(6, momentum=0.05)
            self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


class Mlp(nn.Module):
    """Sizes that no number of ranks divides; layer 1 has fewer rows than there are ranks."""

    def __init__(self, widths=(5, 7, 1, 11, 6, 3), seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x):
        for block in self.blocks[:-1]:
            x = block(x).tanh()
        return self.blocks[-1](x)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=0.01)


def batch(step, rank, shape=(4, 2, 7, 7)):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(*shape, generator=generator), torch.randint(3, (shape[0],), generator=generator)


def digest(tensors):
    """Short for the bits of some tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


def parts(model):
    """A digest of each layer of `Net`: its weights, and its batch norm's statistics."""
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    own = {"conv1": ("conv1", "norm1"), "conv2": ("conv2", "norm2"), "head": ("head",)}
    return {
        layer: {
            "weights": digest(v for k, v in state.items() if k.split(".")[0] in names and "running" not in k),
            "statistics": digest(v for k, v in state.items() if k.split(".")[0] in names and "running" in k),
        }
        for layer, names in own.items()
    }


class Counter:
    """A communication hook that counts the elements of each step."""

    def __init__(self):
        self.steps = []

    def count(self, state, bucket):
        self.steps[-1] += bucket.buffer().numel()
        # as DistributedDataParallel does itself, bit for bit
        buffer = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])


class Run:
    """Training of `Net`, each rank on its own batches."""

    def __init__(self, rank, wrap="ddp", accumulate=1, hook=True, script=SCRIPT, seed=0, freezer=True, **options):
        self.rank, self.accumulate, self.wrap = rank, accumulate, wrap
        self.model = Net(seed)
        self.optimizer = sgd(self.model)
        self.forward = self.model
        self.counter = Counter()
        self.log = []
        keys = ("static_graph", "gradient_as_bucket_view", "find_unused_parameters", "forward_sync_buffers")
        self.ddp_options = {key: options.pop(key) for key in keys if key in options}
        self.hook = hook
        self.compile = options.pop("compile", None)
        self.script = script
        self.predictor = options.pop("predictor", ScriptedPredictor)
        self.losses = []
        self.options = OPTIONS | options
        if freezer:
            if wrap == "ddp":
                self.wrap_in_ddp()
            self.make_freezer()

    def wrap_in_ddp(self):
        self.forward = DistributedDataParallel(self.model, **self.ddp_options)
        if self.hook:
            self.forward.register_comm_hook(None, self.counter.count)
        if self.compile:
            self.forward = torch.compile(self.forward, backend=self.compile)

    def make_freezer(self, model=None, script=None):
        self.asked = self.predictor(list(self.script if script is None else script))
        self.freezer = SmartFRZ(model or self.forward, self.optimizer, self.asked, **self.options)

    def step(self, number):
        self.model.train()
        self.counter.steps.append(0)
        for micro in range(self.accumulate):
            last = micro == self.accumulate - 1
            synchronised = last or self.wrap != "ddp"
            if self.wrap == "by hand" and micro == 0:  # a pass without synchronisation has the next one go without, too
                for buffer in self.model.buffers() if self.ddp_options.get("forward_sync_buffers", True) else ():
                    dist.broadcast(buffer, 0)
            with contextlib.nullcontext() if synchronised else self.forward.no_sync():
                inputs, targets = batch(self.accumulate * number + micro, self.rank)
                loss = nn.functional.cross_entropy(self.forward(inputs), targets) / self.accumulate
                loss.backward()
        self.losses.append(loss.item())
        if self.wrap == "by hand":
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad /= dist.get_world_size()
                    dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decisions = self.freezer.step(loss)
        self.log.append(parts(self.model))
        return decisions

    def train(self, start=0, end=STEPS):
        for number in range(start, end):
            self.step(number)
        return self

    def result(self):
        return {
            "log": self.log,
            "elements": self.counter.steps,
            "frozen": self.freezer.frozen_layers,
            "frozen_at": self.freezer.report().frozen,
            "events": repr(self.freezer.events),
            "weights": torch.cat([p.detach().flatten() for p in self.model.parameters()]).tolist(),
        }


VARIANTS = {
    "by_hand": {"wrap": "by hand"},
    "by_hand_accumulated": {"wrap": "by hand", "accumulate": 3},
    "by_hand_own_buffers": {"wrap": "by hand", "forward_sync_buffers": False},
    "plain": {},
    "no_hook": {"hook": False},
    "accumulated": {"accumulate": 3},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "find_unused": {"find_unused_parameters": True},
    "own_buffers": {"forward_sync_buffers": False},
    # total_steps: or freezing stages would be grouped, which is another schedule
    "compiled": {"compile": "eager", "hook": False, "total_steps": STEPS},
}
for name, options in VARIANTS.items():
    SCENARIOS[f"variant_{name}"] = lambda rank, world, options=options: Run(rank, **options).train().result()


@scenario
def read_later(rank, world):
    """Forced here: weights are read as on a GPU. The run that is resumed was saved between a record and its decision."""
    LayerReader._always_later = True
    try:
        by_hand, whole = Run(rank, wrap="by hand").train(), Run(rank).train()
        first = Run(rank).train(0, FREEZE_AT[1])
        saved = [None]
        if rank == 0:
            saved = [copy.deepcopy([x.state_dict() for x in (first.model, first.optimizer, first.freezer)])]
        dist.broadcast_object_list(saved)
        second = Run(rank, seed=1, script=SCRIPT[1:])
        for part, state in zip((second.model, second.optimizer, second.freezer), saved[0], strict=True):
            part.load_state_dict(state)
        second.train(FREEZE_AT[1])
        due = saved[0][2]["controller"].get("due")
        return {"by hand": by_hand.result(), "ddp": whole.result(), "resumed": second.result(), "due": due}
    finally:
        LayerReader._always_later = False


@scenario
def losses(rank, world):
    """Each rank has its own losses; rank 0, which asks a mock predictor, saves the state that both resume from."""
    whole = Run(rank, predictor=MockLossPredictor).train()
    first = Run(rank, predictor=MockLossPredictor).train(0, 9)
    saved = [[x.state_dict() for x in (first.model, first.optimizer, first.freezer)] if rank == 0 else None]
    dist.broadcast_object_list(saved)
    second = Run(rank, seed=1, script=SCRIPT[1:], predictor=MockLossPredictor)
    for part, state in zip((second.model, second.optimizer, second.freezer), saved[0], strict=True):
        part.load_state_dict(state)
    second.train(9)
    asked = [run.asked.losses[-1].tolist() if run.asked.losses else None for run in (whole, second)]
    return {"whole": whole.result(), "resumed": second.result(), "asked": asked, "losses": whole.losses}


@scenario
def prefix_cache(rank, world):
    """With and without: each rank has eight samples, until the ranks exchange them."""
    results = {}
    for name, cache in (("plain", None), ("cached", PrefixCache("1MB", profile=False))):
        run = Run(rank, hook=False, cache=cache)
        losses = []
        for number in range(20):
            owner = rank if number < 16 else (rank + 1) % world
            half = number % 2
            inputs, targets = batch(half, owner)
            ids = [8 * owner + 4 * half + row for row in range(4)]
            run.model.train()
            with run.freezer.batch(ids):
                loss = nn.functional.cross_entropy(run.forward(inputs), targets)
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.freezer.step()
            losses.append(loss.item())
        results[name] = run.result() | {"losses": losses}
        if cache is not None:
            use = run.freezer.report().cache
            results["use"] = {"cut": use.cut, "hits": use.hits, "misses": use.misses}
    return results


@scenario
def naive(rank, world):
    """What happens without this library: flip `requires_grad`, and train on."""
    model = Net()
    ddp, optimizer = DistributedDataParallel(model), sgd(model)

    def step(number):
        inputs, targets = batch(number, rank)
        nn.functional.cross_entropy(ddp(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        return digest(model.parameters())

    before = [step(number) for number in range(3)]
    for module in (model.conv1, model.norm1):
        module.requires_grad_(False)
    silently = step(3)
    try:
        step(4)
    except RuntimeError as error:
        return {"before": before, "silently": silently, "raised": str(error)}


@scenario
def fallback(rank, world):
    """A PyTorch whose private methods have other names."""
    rebuild = ours._rebuild_reducer

    def renamed(wrapper):
        raise AttributeError("'DistributedDataParallel' object has no attribute '_build_params_for_reducer'")

    ours._rebuild_reducer = renamed
    try:
        results = {name: Run(rank, **VARIANTS[name]).train().result() for name in ("plain", "static_graph")}
        unpickle = DistributedDataParallel.__setstate__
        DistributedDataParallel.__setstate__ = renamed_too
        try:
            Run(rank).train()
        except SmartFRZError as error:
            results["error"] = f"{type(error).__name__}: {error}"
        finally:
            DistributedDataParallel.__setstate__ = unpickle
        return results
    finally:
        ours._rebuild_reducer = rebuild


def renamed_too(self, state):
    raise AttributeError("no attribute '_ddp_init_helper'")


@scenario
def power_sgd(rank, world):
    """A hook that remembers something for each bucket."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    run = Run(rank, hook=False)
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=3, min_compression_rate=1
    )
    run.forward.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return run.train().result()


@scenario
def thaw(rank, world):
    results = {}
    for name in ("by_hand", "plain", "static_graph"):
        run = Run(rank, **VARIANTS[name]).train(0, 13)
        decisions = run.freezer.thaw(["conv1"])
        results[name] = run.train(13, 17).result() | {"thawed": [d.layer for d in decisions]}
    return results


@scenario
def refresh_keeps_the_wrapper(rank, world):
    run = Run(rank)
    wrapper, parameters = run.forward, [id(p) for p in run.forward.parameters()]
    milliseconds = []
    refresh = ours.refresh

    def timed(ddp):
        start = time.perf_counter()
        refresh(ddp)
        milliseconds.append(1e3 * (time.perf_counter() - start))

    ours.refresh = timed
    try:
        run.train()
    finally:
        ours.refresh = refresh
    same = wrapper is run.forward and parameters == [id(p) for p in run.forward.parameters()]
    return {"same": same, "refreshes": len(milliseconds), "hooks": len(wrapper._comm_hooks)}


@scenario
def two_wrappers(rank, world):
    """Parts of the model are wrapped, each for itself; one of them freezes as a whole, and thaws."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.front = DistributedDataParallel(nn.Linear(4, 5))
            self.back = DistributedDataParallel(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))

        def forward(self, x):
            return self.back(self.front(x))

    model = Parts()
    optimizer = sgd(model)
    names = ["front.module", "back.module.0", "back.module.2"]
    script = [dict(zip(names, (0.9, 0.1, 0.1), strict=True))]
    freezer = SmartFRZ(model, optimizer, ScriptedPredictor(script), **OPTIONS | {"record_every": 1, "decide_every": 2})
    log = []
    for number in range(9):
        inputs, targets = batch(number, rank, (4, 4))
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
        if number == 5:
            freezer.thaw()
        log.append({"all": digest(model.parameters()), "front": digest(model.front.parameters())})
    return {"log": log, "layers": freezer.layers, "actions": [e.action for e in freezer.events if e.action != "keep"]}


ORDERS = ("load, wrap", "wrap, load", "wrap, load inner", "loaded twice")


@scenario
def resume(rank, world):
    """Saved by rank 0 after step 8, loaded by all, in each order of wrapping and loading."""
    results = {"whole": Run(rank).train().result()}
    for stop, orders in {5: ORDERS[2:3], 8: ORDERS}.items():
        first = Run(rank).train(0, stop)
        saved = [
            {"model": r.model.state_dict(), "optimizer": r.optimizer.state_dict(), "freezer": r.freezer.state_dict()}
            for r in [first]
        ]
        dist.broadcast_object_list(saved)
        for order in orders:
            run = Run(rank, freezer=False, seed=9)
            if order != "load, wrap":
                run.wrap_in_ddp()
            state = copy.deepcopy(saved[0])
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            run.make_freezer(run.model if "inner" in order else None, script=SCRIPT[stop // 6 :])
            run.freezer.load_state_dict(state["freezer"])
            if order == "loaded twice":
                run.freezer.load_state_dict(state["freezer"])
            if order == "load, wrap":
                run.wrap_in_ddp()
            results[f"{stop}: {order}"] = run.train(stop).result()
    return results


@scenario
def keys(rank, world):
    """How many keys our stores hold after a few and after many meetings, and no thread or socket more."""
    numbers = []
    ranks = ours.StoreRanks(dist.PrefixStore("count", ours._default_store()), rank, world, 30.0)
    for number in range(50):
        ranks.meet(f"step {number}", {"n": number})
        assert ranks.share(lambda number=number: {"n": np.int64(number), "nan": float("nan")})["n"] == number
        if number in (5, 49):
            dist.barrier()
            numbers.append(ranks._store.num_keys())
            dist.barrier()
    return numbers


@scenario
def own_store(rank, world):
    """As with a backend that has no store."""
    default = ours._default_store
    ours._default_store = ours._own_store
    try:
        return Run(rank).train().result()
    finally:
        ours._default_store = default


# Decisions that depend on every weight of the history.


def change_predictor():
    return ChangePredictor(make_info(tailored_size=40), scale=12.0)


MLP_STEPS = 28
FSDP_OPTIONS = {"record_every": 2, "decide_every": 2, "patience": 1, "threshold": 0.75, "rank_timeout": 60.0}


def train_mlp(forward, model, optimizer, freezer, start, end, rank=0, evaluate=False):
    for number in range(start, end):
        inputs, targets = batch(number % 4, rank, (8, 5))
        optimizer.param_groups[0]["lr"] = 0.2 * 0.92**number
        nn.functional.cross_entropy(forward(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if evaluate:
            with torch.no_grad():
                forward(inputs)  # leaves the root unsharded
        freezer.step()
        yield number


def whole(parameter):
    full = getattr(parameter, "full_tensor", None)
    return (full() if full else parameter).detach()


def shard(model, mesh=None, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks[:-1]:  # the last one is left to the root, which stays whole after a forward pass
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def shown(model):
    """Names and parameters, the root's shards too."""
    if hasattr(model, "reshard"):
        model.reshard()
    return list(model.named_parameters())


def mlp_run(model, steps=MLP_STEPS, **options):
    optimizer = sgd(model)
    evaluate = options.pop("evaluate", False)
    freezer = SmartFRZ(model, optimizer, change_predictor(), **FSDP_OPTIONS | options)
    frozen = {}
    for _ in train_mlp(model, model, optimizer, freezer, 0, steps, evaluate=evaluate):
        if len(freezer.frozen_layers) * 2 > len(frozen):  # a weight and a bias
            frozen = {n: whole(p).clone() for n, p in shown(model) if not p.requires_grad} | frozen
    moved = [n for n, p in shown(model) if n in frozen and not torch.equal(frozen[n], whole(p))]
    return freezer, optimizer, moved


def summary(freezer, model, moved=()):
    return {
        "frozen_at": freezer.report().frozen,
        "events": repr(freezer.events),
        "moved": list(moved),
        "flops": freezer.report().backward_flops,
        "weights": digest(whole(p) for p in model.parameters()),
    }


@scenario
def baselines(rank, world):
    """Policies that reach into the optimizer's steps; unsharded, all ranks train on the same data."""
    results = {}
    options = {"total_steps": MLP_STEPS, "rank_timeout": 60.0}
    for policy in (LinearFreezing(0.2, scale_lr=True), AutoFreeze(steps_per_epoch=8), GradES(3.0, alpha=0.2)):
        for name in ("alone", "ddp", "fsdp", "ddp on data of each rank"):
            model = shard(Mlp()) if name == "fsdp" else Mlp()
            forward = DistributedDataParallel(model) if "ddp" in name else model
            optimizer = sgd(model)
            freezer = SmartFRZ(forward, optimizer, policy, **options)
            try:
                for _ in train_mlp(forward, model, optimizer, freezer, 0, MLP_STEPS, rank * ("data" in name)):
                    pass
                model.reshard() if name == "fsdp" else None
                results[f"{policy.name} {name}"] = summary(freezer, model)
            except SmartFRZError as error:
                results[f"{policy.name} {name}"] = str(error)
    return results


@scenario
def fsdp(rank, world):
    """All ranks train on the same data, so that averaging changes nothing, to the last bit."""
    results = {}
    model = Mlp()
    freezer, _, moved = mlp_run(model)
    results["unsharded"] = summary(freezer, model, moved)
    variants = {"evaluated, kept whole": {"reshard_after_forward": False}, "sharded": {}}
    for name, options in variants.items():
        model = shard(Mlp(), **options)
        freezer, optimizer, moved = mlp_run(model, evaluate=bool(options))
        model.reshard()
        results[name] = summary(freezer, model, moved)
    names = dict(model.named_parameters())
    results["optimizer_state"] = sorted(n for n, p in names.items() if p in optimizer.state)
    results["trained"] = sorted(n for n, p in names.items() if p.requires_grad)
    results["types"] = sorted({type(v).__name__ for v in leaves(freezer.state_dict())})
    results["num_weights"] = {layer: freezer.adapter.num_weights(layer) for layer in freezer.layers}

    thawed = freezer.thaw()
    before = {n: whole(p).clone() for n, p in model.named_parameters()}
    for _ in train_mlp(model, model, optimizer, freezer, MLP_STEPS, MLP_STEPS + 2):
        pass
    model.reshard()
    results["thawed"] = [decision.layer for decision in thawed]
    results["moved_after_thaw"] = [
        n for n, p in model.named_parameters() if not torch.equal(before[n], whole(p)) and n.endswith("weight")
    ]

    # resumed: sharded to sharded, and unsharded to sharded
    for name, first in {"sharded": shard(Mlp()), "unsharded": Mlp()}.items():
        freezer, optimizer, _ = mlp_run(first, steps=14)
        state = freezer.state_dict()
        second = shard(Mlp(seed=9))
        for target, source in zip(second.parameters(), first.parameters(), strict=True):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(whole(source), target.device_mesh, target.placements)
            target.data.copy_(value)
        other = sgd(second)
        for target, source in zip(second.parameters(), first.parameters(), strict=True):
            kept = optimizer.state.get(source)
            if kept:
                value = distribute_tensor(whole(kept["momentum_buffer"]), target.device_mesh, target.placements)
                other.state[target]["momentum_buffer"] = value
        resumed = SmartFRZ(second, other, change_predictor(), **FSDP_OPTIONS)
        resumed.load_state_dict(state)
        for _ in train_mlp(second, second, other, resumed, 14, MLP_STEPS):
            pass
        second.reshard()
        results[f"resumed from {name}"] = summary(resumed, second)

    # measuring costs must not make ranks run different collectives
    freezer, _, _ = mlp_run(shard(Mlp()), steps=8, freeze_order="cost_aware")
    results["cost_aware"] = len(freezer.events)
    return results


def leaves(value):
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in leaves(v)]
    return [value]


@scenario
def different_data_fsdp(rank, world):
    """As in real use: each rank its own batches; the ranks must still agree, and DDP must agree with FSDP."""
    results = {}
    for name in ("ddp", "fsdp"):
        model = Mlp()
        forward = shard(model) if name == "fsdp" else DistributedDataParallel(model)
        optimizer = sgd(model)
        freezer = SmartFRZ(forward, optimizer, change_predictor(), **FSDP_OPTIONS)
        for _ in train_mlp(forward, model, optimizer, freezer, 0, MLP_STEPS, rank=rank):
            pass
        if name == "fsdp":
            model.reshard()
        weights = torch.cat([whole(p).flatten() for p in model.parameters()])
        results[name] = {
            "frozen_at": freezer.report().frozen,
            "weights": weights.tolist(),
            "events": repr(freezer.events),
        }
    return results


@scenario
def placements(rank, world):
    """Sampled weights of every way of dividing a tensor, beside those of the whole tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    calls = []
    all_reduce = dist.all_reduce
    meshes = {1: init_device_mesh("cpu", (world,))}
    kinds = {"Shard(0)": (Shard(0),), "Shard(1)": (Shard(1),), "Shard(-1)": (Shard(-1),), "Replicate": (Replicate(),)}
    if world == 4:
        meshes[2] = init_device_mesh("cpu", (2, 2))
        kinds |= {
            "HSDP": (Replicate(), Shard(0)),
            "HSDP reversed": (Shard(1), Replicate()),
            "two dims": (Shard(0), Shard(1)),
            "one dim twice": (Shard(0), Shard(0)),
        }
    results = {}
    for name, kind in kinds.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(3, 5, 3), nn.Linear(2, 1), nn.Linear(8, 8))
        plain = copy.deepcopy(model)
        mesh = meshes[len(kind)]
        for module in model:
            source = module.weight.detach().to(torch.bfloat16 if module is model[0] else torch.float32)
            sharded = distribute_tensor(source, mesh, kind)
            module.weight = nn.Parameter(sharded)
        plain[0].weight.data = plain[0].weight.data.bfloat16().float()
        for a, b in zip(model, plain, strict=True):
            assert torch.equal(whole(a.weight).float(), b.weight)
        layers = trace_layers_of(plain)
        readers = LayerReader(model, layers), LayerReader(plain, layers)
        rng = np.random.default_rng(0)
        positions = {
            layer: np.sort(rng.integers(readers[1].num_weights(layer), size=30)) for layer in readers[1].layers()
        }

        def counted(*args, **kwargs):
            calls.append(1)
            return all_reduce(*args, **kwargs)

        calls.clear()
        dist.all_reduce = counted
        try:
            read, expected = (reader.tailored(positions) for reader in readers)
        finally:
            dist.all_reduce = all_reduce
        equal = all(np.array_equal(read[k], expected[k]) and read[k].dtype == np.float32 for k in expected)
        one = np.array_equal(readers[0].weights("1", positions["1"]), expected["1"])
        counts = all(readers[0].num_weights(k) == readers[1].num_weights(k) for k in expected)
        results[name] = {
            "equal": equal and one and counts,
            "messages": len(calls),
            "sharded": all(isinstance(m.weight, DTensor) for m in model),
        }
    return results


def trace_layers_of(model):
    """The layers of modules that do not fit together: each is run for itself."""
    layers = []
    for name, shape in zip("0123", [(1, 5), (1, 3, 4, 4), (1, 2), (1, 8)], strict=True):
        (layer,) = trace_layers(nn.Sequential(model[int(name)]), torch.zeros(*shape))
        renamed = layer.to_dict() | {"name": name, "output": name}
        for key in ("parameters", "weights"):
            renamed[key] = tuple(f"{name}.{n.partition('.')[2]}" for n in renamed[key])
        layers.append(type(layer).from_dict(renamed))
    return layers


@scenario
def hsdp(rank, world):
    from torch.distributed.device_mesh import init_device_mesh

    results = {}
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    for name in ("unsharded", "sharded", "hsdp"):
        model = Mlp() if name == "unsharded" else shard(Mlp(), mesh if name == "hsdp" else None)
        freezer, _, moved = mlp_run(model)
        if name != "unsharded":
            model.reshard()
        results[name] = summary(freezer, model, moved)
    return results


@scenario
def tensor_parallel(rank, world):
    """Below fully_shard: rows that lie in strides."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    results = {}
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    widths = (5, 8, 8, 8, 4)
    for name in ("unsharded", "parallel"):
        model = Mlp(widths)
        if name == "parallel":
            plan = {f"blocks.{i}": ColwiseParallel(output_layouts=Replicate()) for i in range(4)}
            model = shard(parallelize_module(model, mesh["tensor"], plan), mesh["data"])
        freezer, _, moved = mlp_run(model)
        if name == "parallel":
            model.reshard()
            results["placements"] = str(model.blocks[0].weight.placements)
        results[name] = summary(freezer, model, moved)
    return results


# Errors. None of these scenarios has a collective under way when it raises.


def plain_run(rank, model=None, script=(), **options):
    """Each rank trains for itself: nothing but SmartFRZ connects them."""
    model = model or Net()
    optimizer = sgd(model)
    predictor = options.pop("predictor", None) or ScriptedPredictor(list(script))
    freezer = SmartFRZ(model, optimizer, predictor, **OPTIONS | {"rank_timeout": 0.7} | options)

    def step(number):
        inputs, targets = batch(number, rank)
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        return freezer.step()

    return freezer, step


def raised(function, *args):
    start = time.monotonic()
    try:
        function(*args)
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error), "seconds": time.monotonic() - start}
    return None


def stepping_on(rank, ranks, before=0):
    """All ranks make some steps, then only some do."""
    _, step = plain_run(rank)
    for number in range(before):
        step(number)
    dist.barrier()
    if not before and rank not in ranks:
        next(ours._numbers)  # or this process would be one instance behind in the tests after this one
    result = raised(lambda: [step(number) for number in range(before, before + 4)]) if rank in ranks else None
    dist.barrier()
    return result


SCENARIOS["step_on_0_only"] = functools.partial(lambda rank, world: stepping_on(rank, {0}))
SCENARIOS["step_on_1_only"] = functools.partial(lambda rank, world: stepping_on(rank, {1}))
SCENARIOS["step_on_0_and_2"] = functools.partial(lambda rank, world: stepping_on(rank, {0, 2}))
SCENARIOS["steps_end_on_1"] = functools.partial(lambda rank, world: stepping_on(rank, {0}, before=5))


def unlike(rank, make):
    """`make` gives each rank a freezer and its step."""
    dist.barrier()
    result = raised(lambda: [step(number) for _, step in [make(rank)] for number in range(4)])
    dist.barrier()
    return result


class Deeper(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(3, 3)

    def forward(self, x):
        return self.extra(super().forward(x))


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.conv2, self.norm2, self.head = nn.Conv2d(4, 9, 3), nn.BatchNorm2d(9), nn.Linear(9, 3)


class Swapped(Net):
    """The same layers in another order."""

    def __init__(self):
        super().__init__()
        self.side = nn.Linear(3, 3)

    def forward(self, x):
        return super().forward(x) + self.side(x.mean((2, 3)).repeat(1, 2)[:, :3])


class SwappedBack(Swapped):
    def forward(self, x):
        side = self.side(x.mean((2, 3)).repeat(1, 2)[:, :3])
        return Net.forward(self, x) + side


UNLIKE = {
    "layers": lambda rank: plain_run(rank, Deeper() if rank else Net()),
    "width": lambda rank: plain_run(rank, Wider() if rank else Net()),
    "order": lambda rank: plain_run(rank, Swapped() if rank else SwappedBack()),
    "options": lambda rank: plain_run(rank, threshold=0.7 if rank else 0.8),
    "predictor": lambda rank: plain_run(rank, predictor=ScriptedPredictor(sha256="ab" * 32) if rank else None),
}
for name, make in UNLIKE.items():
    SCENARIOS[f"unlike_{name}"] = lambda rank, world, make=make: unlike(rank, make)


class Failing(ScriptedPredictor):
    def predict(self, history, lengths):
        raise MemoryError("no room for the predictor")


@scenario
def failing_predictor(rank, world):
    _, step = plain_run(rank, predictor=Failing())
    return raised(lambda: [step(number) for number in range(8)])


@scenario
def thaw_on_0_only(rank, world):
    freezer, step = plain_run(rank, script=SCRIPT)
    for number in range(7):
        step(number)
    dist.barrier()
    result = raised(freezer.thaw) if rank == 0 else raised(step, 7)  # step 8 is a record
    dist.barrier()
    return result


@scenario
def wrong_states(rank, world):
    freezer, step = plain_run(rank)
    for number in range(7):
        step(number)
    state = freezer.state_dict()
    early = copy.deepcopy(state)
    step(7)
    late = freezer.state_dict()
    other, _ = plain_run(rank, Deeper())
    renamed, _ = plain_run(rank, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    predictor, _ = plain_run(rank, predictor=ScriptedPredictor(sha256="ab" * 32))
    third, _ = plain_run(rank)
    result = {
        "another model": raised(renamed.load_state_dict, state),
        "another predictor": raised(predictor.load_state_dict, state),
    }
    del other
    dist.barrier()
    result["two checkpoints"] = raised(third.load_state_dict, early if rank else late)
    dist.barrier()
    return result


# Killed and resumed.


def train_with_checkpoints(rank, folder, die_at=None, die=()):
    """Continues from the last checkpoint, if there is one."""
    run = Run(rank, freezer=False, hook=False)
    run.wrap_in_ddp()
    path = folder / "checkpoint.pt"
    start, script = 0, SCRIPT
    if path.exists():
        saved = torch.load(path, weights_only=True)
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
        script = SCRIPT[start // 6 :]
    run.make_freezer(run.model, script=script)
    if start:
        run.freezer.load_state_dict(saved["freezer"])
    for number in range(start, STEPS):
        if number == die_at and rank in die:
            os.kill(os.getpid(), signal.SIGKILL)
        run.step(number)
        if number % 3 == 1 and rank == 0:
            parts_of = {"model": run.model, "optimizer": run.optimizer, "freezer": run.freezer}
            saved = {name: part.state_dict() for name, part in parts_of.items()}
            torch.save(saved | {"step": number + 1}, folder / "partial")
            os.replace(folder / "partial", path)
    return run.result() | {"start": start}


def run_scenarios(folder, rank, world, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results = {"seconds": {}}
    for name in names:
        begin = time.perf_counter()
        kill, _, at = name.partition("@")
        try:
            if kill in ("train", "kill_1", "kill_all"):
                die = {"train": (), "kill_1": (1,), "kill_all": range(world)}[kill]
                results[name] = train_with_checkpoints(rank, folder, int(at) if at else None, die)
            else:
                results[name] = SCENARIOS[name](rank, world)
        except Exception:
            results[name] = {"traceback": traceback.format_exc()}
        results["seconds"][name] = round(time.perf_counter() - begin, 2)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
    dist.barrier()  # rank 0 keeps the store
    dist.destroy_process_group()


def run_rank(folder, rank, world, port, names):
    """In a process of its own; does not return."""
    code = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        run_scenarios(folder, rank, world, names)
        code = 0
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main():
    """For each request the exit codes of its processes.

    They are forked: each would need seconds to import everything for itself.
    """
    for line in sys.stdin:
        folder, world, port, names = json.loads(line)
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                run_rank(Path(folder), rank, world, port, names)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
