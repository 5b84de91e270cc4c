"""`smartfrz-build --engine ray` on a real cluster of two machines' worth of processes, one of which is killed."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from builder_fixtures import environment_without, invoke, write_digit_recipes, write_recipe
from safetensors import safe_open

from smartfrz.dataset_builder.cli import main as build
from smartfrz.dataset_builder.places import Place, make_absolute, on_this_machine
from smartfrz.dataset_builder.ray_engine import recipe_folder
from smartfrz.dataset_builder.recipes import load_recipe
from smartfrz.dataset_builder.recording import record
from smartfrz.dataset_builder.storage import reference_file
from smartfrz.errors import DownloadError
from smartfrz.predictor.runtime import Predictor

COMMAND = [sys.executable, "-c", "from smartfrz.dataset_builder.cli import main; main()"]
PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
PATIENCE = 900  # seconds: what takes long on a busy machine is no failure
# The death of a node is noticed after seconds, not after half a minute; a slow start of its helpers is none.
SYSTEM = {
    "health_check_period_ms": 1000,
    "health_check_initial_delay_ms": 1000,
    "health_check_failure_threshold": 5,
    "health_check_timeout_ms": 20_000,
    "agent_register_timeout_ms": 120_000,
    "worker_niceness": 0,
}
# A line for each time that a recording begins: of what, and on which node.
COUNTING = """
def counted(name):
    import ray

    if ray.is_initialized():
        with open(Path(__file__).with_name("started.txt"), "a") as file:
            print(name, ray.get_runtime_context().get_node_id(), file=file)
    return digits()
"""
USAGE = {
    "local, address": (["--address", "127.0.0.1:1"], "--address is for --engine ray"),
    "local, gpus": (["--gpus", "1"], "--gpus is for --engine ray"),
    "local, elsewhere": (["-o", "s3://bucket/runs"], "to which only --engine ray records"),
    "ray, workers": (["--engine", "ray", "--workers", "2"], "--workers is for --engine local"),
    "ray, device": (
        ["--engine", "ray", "--device", "cpu"],
        "--device is for --engine local. On Ray, --gpus reserves GPUs",
    ),
}


def node(num_cpus=1, **more):
    """What a node is started with: little memory, and ports, for which it would wait 15 seconds at most."""
    with contextlib.ExitStack() as sockets:
        free = [sockets.enter_context(socket.create_server(("", 0))).getsockname()[1] for _ in PORTS]
    ports = dict(zip(PORTS, free, strict=True))
    return {"num_cpus": num_cpus, "object_store_memory": 80 * 2**20, "include_dashboard": False, **ports, **more}


def write_recipes(folder):
    """Two long recordings, one that starts from the first one's reference, and one that fails."""
    runs = [(name, "perceptron", "digits", "{}", seed) for seed, name in enumerate(("one", "two", "after", "wild"))]
    paths = write_digit_recipes(folder, runs, epochs=40)
    module = folder / "digit_parts.py"
    module.write_text("from pathlib import Path\n" + module.read_text() + COUNTING)
    for path in paths:
        text = path.read_text().replace(
            'source = "digit_parts:digits"', f'source = "digit_parts:counted"\narguments = {{ name = "{path.stem}" }}'
        )
        if path.stem == "after":
            text = text.replace("[data]", 'init = "one"\n[data]').replace("epochs = 40", "epochs = 2")
        if path.stem == "wild":
            text = text.replace("learning_rate = 0.03", "learning_rate = 1e30")
        path.write_text(text)
    return paths


@pytest.fixture
def cluster(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "60")
    from ray.cluster_utils import Cluster

    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=node(0, _system_config=SYSTEM)))
    try:
        yield cluster
    finally:
        cluster.shutdown()


def patiently(start):
    """A node gives up if one of its helpers is not there after fifteen seconds, which a busy machine may need."""
    for _ in range(2):
        with contextlib.suppress(Exception):
            return start()
    return start()


def call(folder, *arguments):
    """The command, from a folder of its own."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def wait_until(moment, process, log, seconds=PATIENCE):
    for _ in range(seconds * 50):
        if moment():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    pytest.fail(f"it did not happen: {log.read_text()}")


def node_of_the_command(cluster):
    """Its actor runs on the node that the command is connected to: several of them have this machine's address."""
    nodes = {n.all_processes["raylet"][0].process.pid: n for n in (cluster.head_node, *cluster.worker_nodes)}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::_Board"):
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in nodes:
                    return nodes[parent]
    return None


def read_tensors(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*")}


@pytest.mark.slow
def test_a_node_killed_while_it_records_loses_nothing_and_nothing_is_done_twice(tmp_path, cluster):
    recipes = write_recipes(tmp_path / "recipes")
    for _ in range(2):
        patiently(lambda: cluster.add_node(**node()))
    runs, driver = tmp_path / "runs", tmp_path / "driver"
    output, started = f"local://{runs}", tmp_path / "recipes" / "started.txt"
    common = ("--engine", "ray", "--address", cluster.address, "--threads", "1")

    # The folder of the command, and the recipes as seen from there, say nothing to the tasks.
    relative = [os.path.relpath(path, driver) for path in recipes]
    process = call(driver, "record", *relative, "-o", output, *common)
    victim = {}

    def one_is_in_the_middle():
        """Its reference model is finished and there, it itself is not; and the command runs on another machine."""
        for name in ("one", "two"):
            if reference_file(runs, name).exists() and not (runs / f"{name}.parquet").exists():
                where = dict(line.split() for line in started.read_text().splitlines())
                (node,) = (n for n in cluster.worker_nodes if n.node_id == where[name])
                if node is not node_of_the_command(cluster):
                    victim.update(name=name, node=node)
        return victim

    try:
        wait_until(one_is_in_the_middle, process, driver / "log.txt")
        before = times(runs)
        cluster.remove_node(victim["node"], allow_graceful=False)  # SIGKILL
        assert process.wait(timeout=PATIENCE) == 1  # of one that cannot be recorded
    finally:
        process.kill()
        process.wait()
    log = (driver / "log.txt").read_text()
    assert "Not recorded:\nwild: The loss is" in log
    finished = sorted(path.stem for path in runs.glob("[!.]*.parquet"))
    assert finished == ["after", "one", "two"]
    assert [log.count(f"{output}/{name}.parquet") for name in finished] == [1, 1, 1]
    assert (
        before.items() <= times(runs).items()
    )  # nothing that was there is written again, the reference of `two` included
    # Only what was killed has begun twice; what fails for reasons of its own is not tried again.
    begun = Counter(line.split()[0] for line in started.read_text().splitlines())
    assert begun == {"one": 1, "two": 1, "after": 1, "wild": 1} | {victim["name"]: 2}

    # The same files as on one machine. (safetensors writes the facts of a file in any order.)
    for path in recipes[:3]:
        local = record(load_recipe(path), tmp_path / "local")
        assert local.read_bytes() == (runs / local.name).read_bytes(), local.name
        tensors, facts = read_tensors(reference_file(tmp_path / "local", path.stem))
        others, other_facts = read_tensors(reference_file(runs, path.stem))
        assert facts == other_facts
        assert tensors.keys() == others.keys()
        assert all((tensors[name] == others[name]).all() for name in tensors), path.stem

    # All in one go, with what is there already: from the one node that is left.
    kept = times(runs)
    small = ("--window", 8, "--tailored-size", 32, "--records", 16, "--epochs", 2, "--tolerance", 0.003)
    process = call(driver, "run", *relative[:2], "-o", tmp_path / "mine.onnx", "--runs", output, *small, *common)
    assert process.wait(timeout=PATIENCE) == 0, (driver / "log.txt").read_text()
    assert times(runs) == kept
    assert Predictor(tmp_path / "mine.onnx").info.window == 8


@pytest.mark.parametrize("case", USAGE)
def test_options_that_do_not_belong_together(case, tmp_path):
    arguments, message = USAGE[case]
    path = write_recipe(tmp_path)
    result = invoke(build, "record", path, "-o", tmp_path / "runs", *arguments)
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True)
    assert not (tmp_path / "runs").exists()


def test_mock_ray_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = invoke(build, "record", write_recipe(tmp_path), "-o", tmp_path / "runs", "--engine", "ray")
    assert result.exit_code == 1
    assert 'Type: pip install "smartfrz[build,ray,cpu]"' in " ".join(result.stderr.split())


def test_a_package_that_the_tasks_lack_is_named(tmp_path):
    pytest.importorskip("ray")
    environment = environment_without("torch", tmp_path / "without") | {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [*COMMAND, "record", str(write_recipe(tmp_path)), "-o", str(tmp_path / "runs"), "--engine", "ray"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert result.returncode == 1
    assert "Not recorded:\ntiny: No module named 'torch'\n" in result.stderr
    assert 'Type on each machine of the cluster: pip install "smartfrz[build,ray,cpu]"' in result.stderr
    assert "Traceback" not in result.stderr


PLACES = {
    "path": "{folder}/far/runs",
    "file": "file://{folder}/far/runs",
    "local": "local://{folder}/far/runs",
    "memory": "memory://far/{name}/runs",
}


@pytest.mark.parametrize("kind", PLACES)
def test_places_keep_whole_files(kind, tmp_path):
    output = PLACES[kind].format(folder=tmp_path, name=tmp_path.name)
    place = Place(output)
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "one.parquet"
    assert not place.fetch(file.name, tmp_path / "back")
    assert not list((tmp_path / "back").glob("*"))
    for content in (b"first", b"second, over the first"):
        file.write_bytes(content)
        place.send(file)
        assert place.fetch(file.name, tmp_path / "back")
        assert (tmp_path / "back" / file.name).read_bytes() == content
    with on_this_machine([place.address_of(file.name)]) as (path,):
        assert path.read_bytes() == content
    place.remove("two.parquet")  # there is none
    if kind != "memory":
        assert [path.name for path in (tmp_path / "far" / "runs").iterdir()] == [file.name]
    place.remove(file.name)
    assert not place.fetch(file.name, tmp_path / "gone")


def test_mock_a_place_that_breaks_off_keeps_what_was_there(tmp_path, monkeypatch):
    place = Place(f"memory://{tmp_path.name}/runs")
    file = tmp_path / "one.parquet"
    file.write_bytes(b"first")
    place.send(file)
    file.write_bytes(b"second")

    def broken(*arguments):
        raise RuntimeError("connection lost")

    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "mv", broken)
    with pytest.raises(OSError, match=r"one\.parquet cannot be read or written \(RuntimeError: connection lost\)"):
        place.send(file)
    runs = f"/{tmp_path.name}/runs"
    assert MemoryFileSystem().ls(runs, detail=False) == [f"{runs}/{file.name}"]
    assert MemoryFileSystem().cat_file(f"{runs}/{file.name}") == b"first"


def test_places_of_unknown_file_systems():
    with pytest.raises(DownloadError, match="Protocol not known: nowhere"):
        Place("nowhere://bucket/runs")
    with (
        pytest.raises(FileNotFoundError, match="is gone; record it again"),
        on_this_machine(["memory://gone/x.parquet"]),
    ):
        pass


def test_a_relative_path_is_one_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_absolute("runs") == str(tmp_path / "runs")
    assert make_absolute("s3://bucket/runs") == "s3://bucket/runs"


def test_modules_that_were_sent_along_are_used_where_the_folder_is_another(tmp_path):
    here, copy = tmp_path / "here", tmp_path / "copy"
    here.mkdir()
    (here / "parts.py").write_text("a = 1\n")
    assert recipe_folder(here, {"parts.py": b"a = 1\n"}, copy) == here
    assert recipe_folder(here, {"parts.py": b"a = 2\n"}, copy) == copy
    assert (copy / "parts.py").read_text() == "a = 2\n"
    assert recipe_folder(tmp_path / "nowhere", {}, tmp_path / "other") == tmp_path / "other"
