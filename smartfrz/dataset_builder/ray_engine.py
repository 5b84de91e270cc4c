"""Recordings as tasks on a Ray cluster, with files in any place that fsspec can write.

A task trains in a temporary folder of its machine. It sends the reference model when that is finished, and the recording
at the end. So it can be killed at any moment: Ray starts it again on another machine, which continues from the reference
model. Recordings arrive complete or not at all, and are the same files that `LocalEngine` makes.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from smartfrz.dataset_builder.engines import Message, Result
from smartfrz.dataset_builder.places import Place, make_absolute
from smartfrz.dataset_builder.recipes import Recipe
from smartfrz.dataset_builder.storage import branches_file, reference_file
from smartfrz.errors import MissingDependencyError

logger = logging.getLogger("smartfrz")
_PAUSE = 0.5  # seconds between two messages of one task


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """Which cluster, and what a task needs.

    Attributes:
        address: Address of the cluster, for example `host:6379`; None for the one in RAY_ADDRESS, or else for a cluster
            that is started on this machine.
        cpus: CPUs that Ray reserves for a task.
        gpus: GPUs that Ray reserves for a task. A task that has a GPU, or a part of one, trains on it.
        retries: How often a task is repeated after its machine or process died or it could not read or write.
        threads: PyTorch threads of a task; None for as many as `cpus`.
        costs: Whether to measure what freezing costs.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 3
    threads: int | None = None
    costs: bool = False


class RayEngine:
    """An `Engine` on Ray. Every machine of the cluster needs this package and access to the recipes' data.

    Modules in the folder of a recipe are sent along.

    Args:
        output: Folder of the recordings: an address for fsspec, or a path on a disk that all machines share.
        options: Which cluster, and what a task needs.

    Raises:
        MissingDependencyError: If Ray, or the package for `output`, is not installed.
        ConnectionError: If no cluster answers at that address.
    """

    def __init__(self, output: str, options: RayOptions):
        self._ray = _ray()
        self._output, self._options = make_absolute(output), options
        Place(self._output)  # fails here rather than in every task
        started_here = options.address is None and not os.environ.get("RAY_ADDRESS")
        self._ray.init(
            options.address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **({"include_dashboard": False} if started_here else {}),
        )
        self._board = self._pinned_board()
        self._task = self._ray.remote(_record_there).options(
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            max_retries=options.retries,
            retry_exceptions=[OSError],
        )
        self._running: dict[Any, str] = {}
        self._warn_of_small_machines()

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def _pinned_board(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On the machine of the command, since others may die. If the actor dies nevertheless, it is restarted elsewhere.
        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=True)
        return self._ray.remote(_Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()

    def _warn_of_small_machines(self) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        need = {"CPU": self._options.cpus, "GPU": self._options.gpus}
        if not any(all(node.get(kind, 0) >= wanted for kind, wanted in need.items()) for node in nodes):
            logger.warning(
                "No machine of the cluster has %g CPUs and %g GPUs. Recordings wait until one joins; if none will, lower "
                "--cpus or --gpus.",
                self._options.cpus,
                self._options.gpus,
            )

    def start(self, recipe: Recipe) -> None:
        """Submit the recipe, with the modules in its folder, as a task."""
        modules = {path.name: path.read_bytes() for path in sorted(recipe.folder.glob("*.py"))}
        threads = self._options.threads or max(1, int(self._options.cpus))
        device = "auto" if self._options.gpus else "cpu"  # Ray does not hide GPUs that were not reserved
        reference = self._task.remote(recipe, modules, self._output, threads, device, self._options.costs, self._board)
        self._running[reference] = recipe.name

    def finished(self, timeout: float) -> list[Result]:
        """Return recordings whose tasks have ended."""
        if not self._running:
            return []
        from ray.exceptions import RayError, RayTaskError

        results = []
        for reference in self._ray.wait(list(self._running), timeout=timeout)[0]:
            name = self._running.pop(reference)
            try:
                results.append(Result(name, self._ray.get(reference)))
            except RayTaskError as error:  # what the task raised; its own text is a traceback
                results.append(Result(name, "", error.cause or error))
            except RayError as error:
                results.append(Result(name, "", error))
        return results

    def messages(self) -> Iterator[Message]:
        """Return what tasks have reported; nothing while the actor does not answer, since progress is not essential."""
        from ray.exceptions import RayError

        try:
            news = self._ray.get(self._board.take.remote(), timeout=5.0)
        except RayError as error:
            logger.debug("No messages: %s", error)
            return
        for name, (fraction, text) in news.items():
            yield Message(name, fraction, text)


class _Board:
    """An actor that collects the progress of all tasks."""

    def __init__(self) -> None:
        self._news: dict[str, tuple[float, str]] = {}

    def put(self, name: str, fraction: float, text: str) -> None:
        self._news[name] = (fraction, text)

    def take(self) -> dict[str, tuple[float, str]]:
        news, self._news = self._news, {}
        return news


def _record_there(
    recipe: Recipe, modules: dict[str, bytes], output: str, threads: int, device: Any, costs: bool, board: Any
) -> str:
    """Record one recipe on whichever machine this task runs; return the place of the recording."""
    import torch

    from smartfrz.dataset_builder.recording import is_recorded, record

    torch.set_num_threads(threads)
    place = Place(output)
    with TemporaryDirectory(prefix="smartfrz-") as name:
        runs = Path(name) / "runs"
        runs.mkdir()
        recipe = dataclasses.replace(recipe, folder=recipe_folder(recipe.folder, modules, Path(name) / "recipe"))
        reference, branches = reference_file(runs, recipe.name), branches_file(runs, recipe.name)
        wanted = [f"{recipe.name}.parquet", reference.name, *([branches.name] if costs else [])]
        if recipe.model.init and not recipe.model.init.endswith(".safetensors"):
            wanted.append(reference_file(runs, recipe.model.init).name)
        for file in wanted:
            place.fetch(file, runs)
        if is_recorded(recipe, runs, costs=costs):
            return place.address_of(f"{recipe.name}.parquet")
        sent = {file: _modified(file) for file in (reference, branches)}
        reported = [0.0]

        def progress(fraction: float, text: str) -> None:
            for file in sent if text != "reference" else ():
                if sent[file] != _modified(file):
                    sent[file] = _modified(file)
                    place.send(file)
            if time.monotonic() - reported[0] > _PAUSE:
                reported[0] = time.monotonic()
                board.put.remote(recipe.name, fraction, text)

        path = record(recipe, runs, progress, device, costs=costs)
        place.send(path)
        place.remove(branches.name)
        return place.address_of(path.name)


def _modified(file: Path) -> int:
    """Return when a file was modified, 0 if it does not exist."""
    return file.stat().st_mtime_ns if file.exists() else 0


def recipe_folder(folder: Path, modules: dict[str, bytes], copy: Path) -> Path:
    """Return the recipe's folder if it has the same modules on this machine; else a copy made from `modules`."""
    try:
        if all((folder / name).read_bytes() == content for name, content in modules.items()) and folder.is_dir():
            return folder
    except OSError:
        pass
    copy.mkdir()
    for name, content in modules.items():
        (copy / name).write_bytes(content)
    return copy


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what later versions do; else it warns
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            '--engine ray needs Ray, which is not installed. Type: pip install "smartfrz[build,ray,cpu]"'
        ) from error
    return ray
