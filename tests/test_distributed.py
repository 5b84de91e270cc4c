"""Training on several processes: real ones, on this machine, with gloo. What they run: distributed_worker.py."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy_adapter import ScriptedPredictor

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("PyTorch without torch.distributed", allow_module_level=True)

import torch.distributed as dist  # noqa: E402
from distributed_worker import FREEZE_AT, SIZES, STEPS, VARIANTS  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from smartfrz.adapters.torch import SmartFRZ  # noqa: E402
from smartfrz.adapters.torch import distributed as ours  # noqa: E402
from smartfrz.errors import DistributedError, UnsupportedModelError  # noqa: E402

WORKER = Path(__file__).with_name("distributed_worker.py")
EXAMPLE = WORKER.parent.parent / "examples" / "ddp.py"
ON_TWO = [
    "naive",
    *[f"variant_{name}" for name in VARIANTS],
    *["fallback", "power_sgd", "thaw", "refresh_keeps_the_wrapper", "two_wrappers", "resume", "keys", "own_store"],
    *["fsdp", "different_data_fsdp", "placements", "baselines"],
    *["step_on_0_only", "step_on_1_only", "steps_end_on_1", "failing_predictor", "thaw_on_0_only", "wrong_states"],
    *[f"unlike_{name}" for name in ("layers", "width", "order", "options", "predictor")],
    *["prefix_cache", "read_later", "losses"],
    "train",
]
ON_FOUR = [
    *["variant_by_hand", "variant_plain", "hsdp", "tensor_parallel", "placements"],
    *["step_on_0_and_2", "unlike_layers", "thaw"],
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


class Launcher:
    """A process that forks ranks: see distributed_worker.py."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.parent = subprocess.Popen(
            [sys.executable, str(WORKER)], env=environment(), start_new_session=True, **pipes
        )

    def run(self, world, names, folder, seconds=240):
        """Exit codes of the ranks; none is left running."""
        self.parent.stdin.write(json.dumps([str(folder), world, free_port(), names]) + "\n")
        self.parent.stdin.flush()
        ready, _, _ = select.select([self.parent.stdout], [], [], seconds)
        if not ready:
            self.close()
            raise TimeoutError(f"ranks still run after {seconds} s: {logs(folder, world)}")
        return json.loads(self.parent.stdout.readline())

    def results(self, world, names, folder):
        """What each rank found, by rank."""
        codes = self.run(world, names, folder)
        assert codes == [0] * world, logs(folder, world)
        return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]

    def close(self):
        """End it, and with it what it forked."""
        if self.parent.poll() is None:
            os.killpg(self.parent.pid, signal.SIGKILL)
        self.parent.communicate()


def logs(folder, world):
    return "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(world))


@pytest.fixture(scope="module")
def launcher():
    started = Launcher()
    yield started
    started.close()


@pytest.fixture(scope="module")
def two(launcher, tmp_path_factory):
    return launcher.results(2, ON_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(launcher, tmp_path_factory):
    return launcher.results(4, ON_FOUR, tmp_path_factory.mktemp("four"))


def of(ranks, name, key=None):
    """One scenario's results on each rank."""
    results = [rank[name] for rank in ranks]
    for result in results:
        assert not isinstance(result, dict) or "traceback" not in result, result["traceback"]
    return [result[key] for result in results] if key else results


def elements(frozen_at=FREEZE_AT, steps=STEPS):
    """Gradients that are to be reduced in each step."""
    first, second = frozen_at
    parts = [SIZES["conv1"], SIZES["conv2"], SIZES["head"]]
    return [sum(parts)] * first + [sum(parts[1:])] * (second - first) + [parts[2]] * (steps - second)


def assert_trained_alike(results, frozen_at=FREEZE_AT):
    """The same weights on every rank after every step, and from the freeze on the same bits."""
    for step in range(STEPS):
        for layer, freeze in zip(("conv1", "conv2", "head"), (*frozen_at, STEPS + 1), strict=True):
            now = [result["log"][step][layer] for result in results]
            assert len({part["weights"] for part in now}) == 1, f"{layer} differs between ranks after step {step + 1}"
            if step + 1 >= freeze:
                frozen = [result["log"][freeze - 1][layer] for result in results]
                assert now == frozen, f"{layer} moved after it was frozen, in step {step + 1}"
                assert len({part["statistics"] for part in now}) == 1
    for result in results:
        assert result["frozen_at"] == {"conv1": frozen_at[0], "conv2": frozen_at[1]}
        assert result["events"] == results[0]["events"]


def test_a_naive_flip_of_requires_grad_desynchronises_the_ranks_and_then_raises(two):
    first, second = of(two, "naive")
    assert first["before"] == second["before"]
    assert first["silently"] != second["silently"]
    assert "Expected to have finished reduction" in first["raised"]
    assert "Expected to have finished reduction" in second["raised"]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("by_hand")])
def test_frozen_layers_drop_out_of_what_is_reduced_and_the_rest_trains_as_with_gradients_averaged_by_hand(two, variant):
    results = of(two, f"variant_{variant}")
    assert_trained_alike(results)
    by_hand = {"accumulated": "by_hand_accumulated", "own_buffers": "by_hand_own_buffers"}.get(variant, "by_hand")
    for result, reference in zip(results, of(two, f"variant_{by_hand}"), strict=True):
        assert result["log"] == reference["log"]
        assert result["events"] == reference["events"]
        if VARIANTS[variant].get("hook", True):
            assert result["elements"] == elements()
    final = results[0]["log"][-1]["head"]["weights"]
    assert len({entry["head"]["weights"] for entry in results[0]["log"]}) == STEPS, final


def test_ranks_that_read_weights_later_forced_on_cpus_freeze_alike_one_step_later(two):
    later = [step + 1 for step in FREEZE_AT]
    assert_trained_alike(of(two, "read_later", "ddp"), later)
    for result in of(two, "read_later"):
        assert result["due"] == "stage"
        whole, resumed = result["ddp"], result["resumed"]
        assert whole["log"] == result["by hand"]["log"]
        assert whole["elements"] == elements(later)
        # What is not frozen yet has each rank's own statistics until the next forward pass.
        assert resumed["log"][1:] == whole["log"][FREEZE_AT[1] + 1 :]
        assert resumed["events"] == whole["events"]


def test_each_rank_caches_what_it_sees(two):
    for result in of(two, "prefix_cache"):
        assert result["cached"]["losses"] == pytest.approx(result["plain"]["losses"], abs=1e-5)
        assert result["cached"]["weights"] == pytest.approx(result["plain"]["weights"], abs=1e-5)
        # conv1 is frozen from the 7th batch on, conv2 from the 13th; the last four are of the other rank
        assert result["use"] == {"cut": "head", "hits": 16 + 8 + 8, "misses": 8 + 8 + 8}


def test_four_ranks(four):
    results = of(four, "variant_plain")
    assert_trained_alike(results)
    for result, reference in zip(results, of(four, "variant_by_hand"), strict=True):
        assert result["elements"] == elements()
        # sums of four numbers depend on their order, which depends on the buckets
        torch.testing.assert_close(torch.tensor(result["weights"]), torch.tensor(reference["weights"]))


def test_the_wrapper_stays_the_same_object_with_its_hook(two):
    assert of(two, "refresh_keeps_the_wrapper") == [{"same": True, "refreshes": 2, "hooks": 1}] * 2


@pytest.mark.parametrize("variant", ["plain", "static_graph"])
def test_a_pytorch_whose_private_methods_changed(two, variant):
    for result, reference in zip(of(two, "fallback", variant), of(two, f"variant_{variant}"), strict=True):
        assert result["log"] == reference["log"]
        assert result["elements"] == elements()


def test_a_pytorch_that_allows_no_rebuilding_at_all(two):
    for message in of(two, "fallback", "error"):
        assert message.startswith("DistributedError: PyTorch ")
        assert "_build_params_for_reducer" in message
        assert "dry_run=True" in message


def test_a_hook_that_remembers_something_for_each_bucket(two):
    assert_trained_alike(of(two, "power_sgd"))


@pytest.mark.parametrize("variant", ["plain", "static_graph"])
@pytest.mark.parametrize("world", ["two", "four"])
def test_thawed_layers_are_reduced_again(request, world, variant):
    ranks = request.getfixturevalue(world)
    results = of(ranks, "thaw", variant)
    for result in results:
        assert result["thawed"] == ["conv1"]
        assert result["elements"][:13] == elements(steps=13)
        assert result["elements"][13:] == [SIZES["conv1"] + SIZES["head"]] * 4
        weights = [[entry[layer]["weights"] for layer in entry] for entry in result["log"]]
        assert weights == [[entry[layer]["weights"] for layer in entry] for entry in results[0]["log"]]
        thawed = [entry["conv1"]["weights"] for entry in result["log"][12:]]
        assert len(set(thawed)) == 5
    if world == "two":
        assert [r["log"] for r in results] == [r["log"] for r in of(ranks, "thaw", "by_hand")]


def test_parts_of_the_model_in_wrappers_of_their_own(two):
    first, second = of(two, "two_wrappers")
    assert first == second
    assert first["layers"] == ["front.module", "back.module.0", "back.module.2"]
    assert first["actions"] == ["freeze", "thaw"]
    front = [entry["front"] for entry in first["log"]]
    assert len(set(front[1:6])) == 1
    assert len(set(front)) == 5
    assert len({entry["all"] for entry in first["log"]}) == 9


def test_a_state_of_rank_0_resumes_all_ranks_in_every_order_of_wrapping_and_loading(two):
    for results in of(two, "resume"):
        whole = results.pop("whole")
        assert len(results) >= 4
        for name, result in results.items():
            stop = int(name.partition(":")[0])
            # What is not frozen yet has each rank's own statistics until the next forward pass.
            assert result["log"][1:] == whole["log"][stop + 1 :], name
            assert result["elements"] == elements()[stop:], name
            assert result["events"] == whole["events"], name


def test_the_store_does_not_grow(two):
    for early, late in of(two, "keys"):
        assert early == late


def test_a_backend_without_a_store(two):
    assert [r["log"] for r in of(two, "own_store")] == [r["log"] for r in of(two, "variant_plain")]


@pytest.mark.parametrize("name", ["sharded", "evaluated, kept whole", "resumed from sharded", "resumed from unsharded"])
def test_fully_sharded_training_decides_and_trains_as_unsharded_training(two, name):
    for results in of(two, "fsdp"):
        reference = results["unsharded"]
        assert len(set(reference["frozen_at"].values())) == 3
        assert results[name] == reference
        assert results[name]["moved"] == []


def test_policies_that_reach_into_the_optimizers_steps(two):
    first, second = of(two, "baselines")
    assert first == second
    for policy in ("linear-freezing", "autofreeze", "grades"):
        assert first[f"{policy} ddp"] == first[f"{policy} alone"]
        assert len(first[f"{policy} ddp on data of each rank"]["frozen_at"]) > 0
    assert first["linear-freezing fsdp"] == first["linear-freezing alone"]
    assert "AutoFreeze adds up gradients, and this model is in fully_shard" in first["autofreeze fsdp"]
    assert "GradES compares gradients, and this model is in fully_shard" in first["grades fsdp"]


def test_fully_sharded_on_four_ranks_and_replicated_in_pairs(four):
    for results in of(four, "hsdp"):
        assert results["sharded"] == results["hsdp"] == results["unsharded"]


def test_fully_sharded_over_tensor_parallel(four):
    for results in of(four, "tensor_parallel"):
        assert "_StridedShard" in results["placements"]
        parallel, reference = results["parallel"], results["unsharded"]
        assert parallel["frozen_at"] == reference["frozen_at"]
        assert len(set(reference["frozen_at"].values())) == 2
        assert parallel["moved"] == []
        assert parallel["flops"] == reference["flops"]


def test_rank_0_asks_a_mock_predictor_with_its_own_losses_also_after_resuming(two):
    zero, one = of(two, "losses")
    assert zero["losses"] != one["losses"]
    assert zero["whole"]["frozen"] == one["whole"]["frozen"] == zero["resumed"]["frozen"] == ["conv1", "conv2"]
    expected = np.reshape(zero["losses"][:12], (6, 2)).mean(1)
    for asked in zero["asked"]:
        np.testing.assert_allclose(asked, [expected] * 2, rtol=1e-5)
    assert one["asked"] == [None, None]
    assert zero["whole"]["weights"] == one["whole"]["weights"] == one["resumed"]["weights"]


def test_fully_sharded_the_optimizer_and_the_state(two):
    for results in of(two, "fsdp"):
        assert results["optimizer_state"] == results["trained"] == ["blocks.1.bias", "blocks.1.weight"]
        assert "DTensor" not in results["types"]
        assert "Tensor" in results["types"]
        assert list(results["num_weights"].values()) == [5 * 7, 7 * 1, 1 * 11, 11 * 6, 6 * 3]


def test_fully_sharded_layers_are_thawed(two):
    for results in of(two, "fsdp"):
        assert sorted(results["thawed"]) == ["blocks.0", "blocks.2", "blocks.3", "blocks.4"]
        assert results["moved_after_thaw"] == [f"blocks.{i}.weight" for i in range(5)]


def test_costs_are_measured_on_shards_without_a_hang(two):
    for results in of(two, "fsdp"):
        assert results["cost_aware"] > 0


def test_ddp_and_fully_shard_agree_on_batches_of_each_rank(two):
    first, second = of(two, "different_data_fsdp")
    assert first == second
    assert first["ddp"]["frozen_at"] == first["fsdp"]["frozen_at"]
    assert len(set(first["ddp"]["frozen_at"].values())) == 3
    torch.testing.assert_close(torch.tensor(first["ddp"]["weights"]), torch.tensor(first["fsdp"]["weights"]))


@pytest.mark.parametrize("world", ["two", "four"])
def test_sampled_weights_of_shards_are_those_of_the_whole(request, world):
    ranks = request.getfixturevalue(world)
    for results in of(ranks, "placements"):
        assert len(results) == (4 if world == "two" else 8)
        for name, result in results.items():
            assert result["equal"], name
            assert result["sharded"], name
            dims = {"Replicate": 0, "two dims": 2, "one dim twice": 2}.get(name, 1)
            assert result["messages"] == dims, name  # for all layers together


# Errors


@pytest.mark.parametrize(
    ("world", "scenario", "came", "message"),
    [
        ("two", "step_on_0_only", [0], r"^Rank 1 did not come to the first step within 0.7 s, but rank 0 did"),
        ("two", "step_on_1_only", [1], r"^Rank 0 did not come to the first step within 0.7 s, but rank 1 did"),
        ("two", "steps_end_on_1", [0], r"^Rank 1 did not come to step 6 within 0.7 s, but rank 0 did"),
        ("four", "step_on_0_and_2", [0, 2], r"^Ranks 1, 3 did not come to the first step within 0.7 s, but rank 0 did"),
        ("two", "unlike_layers", [0, 1], r"rank 1 has 4 layers, rank 0 has 3: they differ in \['extra'\]"),
        ("four", "unlike_layers", [0, 1, 2, 3], r"rank 1 has 4 layers.* 2 more ranks differ from rank 0\."),
        (
            "two",
            "unlike_width",
            [0, 1],
            r"rank 1 has 3 layers, rank 0 has 3: 'conv2' is 324 on rank 1 and 216 on rank 0",
        ),
        ("two", "unlike_order", [0, 1], r"rank 1 has 4 layers, rank 0 has 4: they differ in their order"),
        ("two", "unlike_options", [0, 1], r"at the first step: `threshold` is 0.7 on rank 1 and 0.8 on rank 0\."),
        ("two", "unlike_predictor", [0, 1], r"`predictor` is 'abababababab\.\.\. on rank 1 and '5c5c5c5c5c5c\.\.\. on"),
        (
            "two",
            "thaw_on_0_only",
            [0, 1],
            r"^Rank 1 is at step 8, rank 0 at thawing after step 7; expected both at the same",
        ),
    ],
)
def test_ranks_that_do_not_do_the_same(request, world, scenario, came, message):
    ranks = request.getfixturevalue(world)
    for rank, result in enumerate(of(ranks, scenario)):
        if rank not in came:
            assert result is None
            continue
        assert result["type"] == "DistributedError"
        assert re.search(message, result["message"]), result["message"]
        assert result["seconds"] < 20


def test_a_predictor_that_fails_on_rank_0_releases_the_others(two):
    first, second = of(two, "failing_predictor")
    assert (first["type"], first["message"]) == ("MemoryError", "no room for the predictor")
    assert second["type"] == "DistributedError"
    assert "failed with MemoryError: no room for the predictor" in second["message"]


def test_states_of_another_run(two):
    for rank in of(two, "wrong_states"):
        assert rank["another model"]["type"] == rank["another predictor"]["type"] == "StateError"
        assert "parameters that Sequential does not have" in rank["another model"]["message"]
        assert "Resume with the same predictor file" in rank["another predictor"]["message"]
        assert rank["two checkpoints"]["type"] == "DistributedError"
        assert "at loading a state: `num_steps` is 7 on rank 1 and 8 on rank 0" in rank["two checkpoints"]["message"]


# Killed and resumed


def test_killed_twice_and_resumed_trains_as_if_nothing_had_happened(launcher, two, tmp_path):
    codes = launcher.run(2, ["kill_all@6"], tmp_path)
    assert codes == [-signal.SIGKILL] * 2
    codes = launcher.run(2, ["kill_1@10"], tmp_path)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL)  # it noticed by itself
    resumed = launcher.results(2, ["train"], tmp_path)
    for result, whole in zip(of(resumed, "train"), of(two, "train"), strict=True):
        assert result["start"] == 8
        assert whole["start"] == 0
        assert result["log"][1:] == whole["log"][9:]
        assert result["events"] == whole["events"]
        assert result["weights"] == whole["weights"]


def test_the_example_under_torchrun(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("sklearn")
    checkpoint = tmp_path / "run.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(EXAMPLE), "--epochs", "2", "--checkpoint", str(checkpoint)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test accuracy") == 1
    assert "in 92 steps" in done.stdout
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["epoch"] == 2
    assert saved["freezer"]["controller"]["num_steps"] == 92


# In this process: ranks are threads, or there is only one


def meetings(world, timeout, act):
    """What `act(ranks)` returned or raised on each rank."""
    store = dist.HashStore()
    results = [None] * world

    def on_rank(rank):
        try:
            results[rank] = act(ours.StoreRanks(store, rank, world, timeout), rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=on_rank, args=[rank]) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_meeting_and_sharing():
    def act(ranks, rank):
        ranks.meet("here", {"a": [1, 2]})
        return ranks.share(lambda: {"rank": rank, "x": 0.1})

    assert meetings(5, 30.0, act) == [{"rank": 0, "x": 0.1}] * 5


def test_who_comes_late_is_told_what_the_others_were_told():
    def act(ranks, rank):
        if rank == 2:
            time.sleep(1.0)
        ranks.meet("here", {})

    messages = {str(error) for error in meetings(3, 0.3, act)}
    assert len(messages) == 1
    assert messages.pop().startswith("Rank 2 did not come to here within 0.3 s")


def test_a_lost_store():
    class Lost:
        def check(self, keys):
            raise dist.DistNetworkError("Connection reset by peer")

        def set(self, key, value):
            pass

    with pytest.raises(DistributedError, match="Rank 1 lost the store through which the processes agree"):
        ours.StoreRanks(Lost(), 1, 2, 5.0).meet("here", {})


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_process_needs_the_refresh_too(group_of_one):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    script = [{"0": 0.9, "1": 0.1, "2": 0.1}]
    freezer = SmartFRZ(model, optimizer, ScriptedPredictor(script), record_every=1, decide_every=2, patience=1)
    for _ in range(6):
        ddp(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    assert freezer.frozen_layers == ["0"]


def test_wrappers_that_hide_the_layers_are_refused(group_of_one):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)),
        sharding_strategy=ShardingStrategy.NO_SHARD,
        device_id=torch.device("cpu"),
    )
    with pytest.raises(UnsupportedModelError, match=r"Use torch\.distributed\.fsdp\.fully_shard"):
        SmartFRZ(model, torch.optim.SGD(model.parameters(), lr=0.1), ScriptedPredictor(), record_every=1)


def test_mixed_precision_of_the_wrapper_is_refused(group_of_one):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    ddp = DistributedDataParallel(model)
    ddp.mixed_precision = object()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = SmartFRZ(ddp, optimizer, ScriptedPredictor(), record_every=1)
    model(torch.randn(5, 3)).sum().backward()
    with pytest.raises(DistributedError, match=r"Use torch.autocast\."):
        freezer.step()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_time_out_that_is_none(timeout):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`rank_timeout` is .*; expected a positive number of seconds"):
        SmartFRZ(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            ScriptedPredictor(),
            record_every=1,
            rank_timeout=timeout,
        )
