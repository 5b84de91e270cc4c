"""What freezing saves in gradient communication: `python -m benchmarks.distributed`.

Two processes with gloo on this machine train a small vision transformer with DistributedDataParallel.
After some steps the first half of its layers is frozen, then all but the last one, then all are
thawed. Prints, for each phase, the gradient elements that are reduced in one step, the median time of
a step, and what the change before it took: refreshing the wrapper, and all of freezing; and what the
agreement of the processes costs at each record of the weights.
"""

import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from smartfrz.adapters.torch import TorchAdapter, trace_layers
from smartfrz.adapters.torch import distributed as ours

RANKS, STEPS, WIDTH, BLOCKS = 2, 12, 192, 8


def network() -> nn.Module:
    blocks = [nn.TransformerEncoderLayer(WIDTH, 3, 4 * WIDTH, 0.0, batch_first=True) for _ in range(BLOCKS)]
    return nn.Sequential(nn.Linear(48, WIDTH), *blocks, nn.Linear(WIDTH, 10))


class Counter:
    """Counts what a communication hook is given."""

    def __init__(self) -> None:
        self.elements = 0

    def hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Reduce as DistributedDataParallel does, and count."""
        self.elements += bucket.buffer().numel()
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def rank_main(rank: int, port: int, output: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model = network()
    layers = trace_layers(model, torch.zeros(1, 16, 48))
    wrapper, counter = DistributedDataParallel(model), Counter()
    wrapper.register_comm_hook(None, counter.hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ranks = ours.TrainingProcesses(model, 60.0)
    adapter = TorchAdapter(model, [optimizer], layers, processes=ranks)

    refreshes: list[float] = []
    refresh = ours.refresh

    def timed(ddp: DistributedDataParallel) -> None:
        start = time.perf_counter()
        refresh(ddp)
        refreshes.append(time.perf_counter() - start)

    ours.refresh = timed
    names = adapter.layers()
    half = names[: len(names) // 2]
    phases = {
        "nothing frozen": lambda: None,
        f"first {len(half)} of {len(names)} layers frozen": lambda: adapter.freeze(half),
        "all but the last frozen": lambda: adapter.freeze(names[len(half) : -1]),
        "thawed": lambda: adapter.unfreeze(names[:-1]),
    }
    rows = []
    for name, change in phases.items():
        refreshes.clear()
        start = time.perf_counter()
        change()
        took = time.perf_counter() - start
        seconds = []
        for _ in range(STEPS):
            counter.elements = 0
            inputs, targets = torch.randn(4, 16, 48), torch.randint(10, (4,))
            start = time.perf_counter()
            nn.functional.cross_entropy(wrapper(inputs).mean(1), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
        row = [name, counter.elements, 1e3 * statistics.median(seconds), 1e3 * sum(refreshes), 1e3 * took]
        rows.append(row)
    meetings = []
    for number in range(100):
        start = time.perf_counter()
        ranks.meet(f"step {number}", {"active": names})
        ranks.share(lambda: {"streaks": dict.fromkeys(names, 0)})
        meetings.append(1e3 * (time.perf_counter() - start))
    if rank == 0:
        Path(output).write_text(json.dumps([rows, statistics.median(meetings)]))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        processes.spawn(rank_main, (port, str(output)), RANKS)
        rows, meeting = json.loads(output.read_text())
    print("| | elements reduced a step | ms a step | ms refreshing DDP | ms freezing, refresh included |")
    print("|---|---|---|---|---|")
    for name, elements, step, refresh, took in rows:
        print(f"| {name} | {elements:,} | {step:.1f} | {refresh:.1f} | {took:.1f} |")
    print(f"\nAgreeing at one record and one decision: {meeting:.1f} ms (median of 100, {RANKS} ranks).")


if __name__ == "__main__":
    main()
