"""Makes the processes that train one model agree on what to freeze, and tells PyTorch what froze."""

import gc
import itertools
import json
import logging
import os
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smartfrz.errors import DistributedError, UnsupportedModelError

logger = logging.getLogger("smartfrz")
RANK_TIMEOUT = 300.0
# After the first process has given up on another one, it needs some time to inform the rest.
GRACE = 10.0
_numbers = itertools.count()
_c10d: Any = dist  # its type stubs are incomplete


class StoreRanks:
    """`Ranks` that meet through a key-value store.

    Collectives would not do: they would pair with whatever collective a missing process runs instead, or hang, and could
    not say which process is missing.

    Args:
        store: A store that all processes reach and that nothing else writes to.
        rank: Rank of this process.
        world_size: Number of processes.
        timeout: Seconds to wait for another process.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float):
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._count = 0
        self._read_by_all: list[str] = []  # deleted once all have come to the next meeting

    def meet(self, moment: str, facts: Mapping[str, Any]) -> None:
        """Wait until every process is at this moment with the same facts (plain data).

        Raises:
            DistributedError: If a process does not come, or comes with different facts.
        """
        self._count += 1
        mine = {"moment": moment, "facts": json.loads(_json(facts))}
        complaint = self._lead(mine) if self._rank == 0 else self._follow(mine)
        if complaint:
            raise DistributedError(complaint)

    def share(self, make: Callable[[], Any]) -> Any:
        """Call `make` on the first process, and return its answer, which is plain data, on every process."""
        self._count += 1
        key = f"{self._count}/word"
        if self._rank == 0:
            try:
                answer = _json(make())
            except Exception as error:
                self._post(key, {"failed": f"{type(error).__name__}: {error}"})
                self._linger(range(1, self._world_size))
                raise
            self._post(key, {"answer": json.loads(answer)})
            self._read_by_all.append(key)
            return json.loads(answer)
        if self._missing([key], self._timeout):
            raise DistributedError(self._no_show([0], "its decision"))
        word = self._read(key)
        if "answer" not in word:
            self._acknowledge()
            raise DistributedError(
                f"Rank 0 was to decide what to freeze, and failed with {word.get('failed', 'no answer')}; expected a "
                "decision. Look at the error of rank 0."
            )
        return word["answer"]

    def _lead(self, mine: dict[str, Any]) -> str:
        """Meet as the first process: post where it is, read what the others post, and post the verdict."""
        number = self._count
        self._post(f"{number}/word", mine)
        others = {f"{number}/{rank}": rank for rank in range(1, self._world_size)}
        missing = self._missing(list(others), self._timeout)
        heard = {rank: self._read(key) for key, rank in others.items() if key not in missing}
        complaints = [word for word in heard.values() if word]
        if len(complaints) > 2:
            complaints[1:] = [f"{len(complaints) - 1} more ranks differ from rank 0."]
        if complaints:
            complaints.append("Give every rank the same model, predictor and options, and call the same on each.")
        if missing:
            complaints.append(self._no_show([others[key] for key in missing], mine["moment"]))
        complaint = " ".join(complaints)
        self._post(f"{number}/verdict", complaint)
        if complaint:
            self._linger(heard)
        else:
            for key in (*self._read_by_all, *others):
                self._store.delete_key(key)
            self._read_by_all = [f"{number}/word", f"{number}/verdict"]
        return complaint

    def _follow(self, mine: dict[str, Any]) -> str:
        number = self._count
        if self._missing([f"{number}/word"], self._timeout):
            return self._no_show([0], mine["moment"])
        theirs = self._read(f"{number}/word")
        self._post(f"{number}/{self._rank}", _differences(self._rank, mine, theirs))
        if self._missing([f"{number}/verdict"], self._timeout + GRACE):
            return (
                f"Rank 0 came to {mine['moment']}, and then gave no answer within {self._timeout + GRACE:g} s; it has "
                "probably ended. Look at the output of rank 0."
            )
        verdict: str = self._read(f"{number}/verdict")
        if verdict:
            self._acknowledge()
        return verdict

    def _acknowledge(self) -> None:
        self._post(f"{self._count}/read by {self._rank}", True)

    def _linger(self, ranks: Iterable[int]) -> None:
        """Wait until the other ranks have read what went wrong, since the store may end with this process."""
        self._missing([f"{self._count}/read by {rank}" for rank in ranks], GRACE)

    def _no_show(self, ranks: list[int], what: str) -> str:
        subject = f"Rank {ranks[0]}" if len(ranks) == 1 else "Ranks " + ", ".join(map(str, ranks))
        return (
            f"{subject} did not come to {what} within {self._timeout:g} s, but rank {self._rank} did; expected every "
            "rank. Call freezer.step(), thaw() and load_state_dict() equally often on all ranks, look whether one has "
            "failed, and pass a longer rank_timeout if it only takes longer."
        )

    def _missing(self, keys: list[str], seconds: float) -> list[str]:
        """Return the keys that are still missing at the deadline."""
        deadline = time.monotonic() + seconds
        pause = 0.0002
        # store.wait() cannot be interrupted, and prints warnings at its timeout.
        with self._reaching():
            while keys := [key for key in keys if not self._store.check([key])]:
                if time.monotonic() > deadline:
                    break
                time.sleep(pause)
                pause = min(1.2 * pause, 0.05)
        return keys

    def _post(self, key: str, word: Any) -> None:
        with self._reaching():
            self._store.set(key, _json(word))

    def _read(self, key: str) -> Any:
        with self._reaching():
            return json.loads(self._store.get(key))

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise DistributedError(
                f"Rank {self._rank} lost the store through which the processes agree; expected it to last as long as "
                "the process group. The process that keeps it, rank 0 or torchrun, has probably ended: look at its "
                "output."
            ) from error


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda scalar: scalar.item())  # NumPy's scalars


def _differences(rank: int, mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Describe what a rank does differently from the first one; empty if nothing."""
    if mine["moment"] != theirs.get("moment"):
        where = theirs.get("moment", "a decision")
        return f"Rank {rank} is at {mine['moment']}, rank 0 at {where}; expected both at the same."
    words = []
    for name in dict.fromkeys([*theirs["facts"], *mine["facts"]]):
        here, there = mine["facts"].get(name), theirs["facts"].get(name)
        if here == there and (not isinstance(here, dict) or list(here) == list(there)):
            continue
        if isinstance(here, (list, dict)) and isinstance(there, (list, dict)):
            odd = [key for key in dict.fromkeys([*here, *there]) if (key in here) != (key in there)]
            counts = f"rank {rank} has {len(here)} {name}, rank 0 has {len(there)}"
            if odd:
                words.append(f"{counts}: they differ in {odd[:4]}")
            elif isinstance(here, dict) and isinstance(there, dict) and here != there:
                key = next(key for key in here if here[key] != there[key])
                words.append(f"{counts}: {key!r} is {here[key]} on rank {rank} and {there[key]} on rank 0")
            else:
                words.append(f"{counts}: they differ in their order")
        else:
            words.append(f"`{name}` is {_short(here)} on rank {rank} and {_short(there)} on rank 0")
    return f"The ranks differ at {mine['moment']}: " + "; ".join(words) + "." if words else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else text[:13] + "..."


class TrainingProcesses(StoreRanks):
    """The processes of the default process group, which train copies or shards of one model.

    Args:
        model: The model of this process, not wrapped.
        timeout: Seconds to wait for another process.
        wrappers: The known modules that wrap the model.

    Raises:
        DistributedError: If the model is wrapped in a way in which layers cannot be frozen.
    """

    def __init__(self, model: nn.Module, timeout: float, wrappers: Iterable[nn.Module | None] = ()):
        store = _c10d.PrefixStore(f"smartfrz/{next(_numbers)}", _default_store())
        super().__init__(store, dist.get_rank(), dist.get_world_size(), timeout)
        self._model = model
        self._known = weakref.WeakSet(w for w in wrappers if isinstance(w, DistributedDataParallel))
        self._idle: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        for wrapper in self._wrappers():
            if wrapper.mixed_precision is not None:
                raise DistributedError(
                    "SmartFRZ cannot freeze layers under DistributedDataParallel(mixed_precision=...); expected a "
                    "wrapper without it. Use torch.autocast."
                )

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in place."""
        # If only some processes entered this collective, it would pair with a different one of the others.
        self.meet("averaging batch norm statistics", {"sizes": [tensor.numel() for tensor in tensors]})
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            here = [tensor for tensor in tensors if tensor.device == device]
            # double: the mean of equal numbers is that number, to the last bit
            joined = torch.cat([tensor.detach().double().flatten() for tensor in here])
            dist.all_reduce(joined)
            joined /= self._world_size
            for tensor, mean in zip(here, joined.split([t.numel() for t in here]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def parameters_changed(self) -> None:
        """Prepare for other parameters having gradients. Every process calls it between the same two steps."""
        reshard(self._model)
        for wrapper in self._wrappers():
            has_gradients = any(parameter.requires_grad for parameter in wrapper.module.parameters())
            if not has_gradients:  # PyTorch makes no reducer without parameters
                self._idle.add(wrapper)
                wrapper.require_backward_grad_sync = False
                continue
            if wrapper in self._idle:
                self._idle.discard(wrapper)
                wrapper.require_backward_grad_sync = True
            refresh(wrapper)

    def _wrappers(self) -> list[DistributedDataParallel]:
        """Return every DistributedDataParallel that has parameters of the model.

        The user may have passed the inner model, and the state of a resumed run freezes layers before the first forward
        pass, which would show the wrapper. So the garbage collector is asked.
        """
        own = {id(parameter) for parameter in self._model.parameters()}
        known = [w for w in self._known if own & _parameter_ids(w)]
        if any(own <= _parameter_ids(w) for w in known):
            return known  # searching all objects takes a tenth of a second or more
        classes = [DistributedDataParallel]
        for each in classes:  # grows in the loop
            classes += each.__subclasses__()
        # objects refer to their class
        found = [w for w in gc.get_referrers(*classes) if type(w) in classes and "module" in w._modules]
        self._known.update(w for w in found if own & _parameter_ids(w))
        return list(self._known)


def _parameter_ids(wrapper: DistributedDataParallel) -> set[int]:
    return {id(parameter) for parameter in wrapper.module.parameters()}


def processes_of(
    model: nn.Module, timeout: float, wrappers: Iterable[nn.Module | None] = ()
) -> TrainingProcesses | None:
    """Return the processes that train this model together; None without a process group.

    A group of one process counts, too: DistributedDataParallel waits for gradients of frozen layers there as well.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return TrainingProcesses(model, timeout, wrappers)


def refresh(wrapper: DistributedDataParallel) -> None:
    """Make the wrapper reduce exactly the gradients of the parameters that now require one.

    Otherwise DistributedDataParallel waits for gradients that never come: the ranks are not synchronised in the next
    backward pass, and the forward pass after it raises. Every rank has to call this between the same two steps. The
    wrapper stays the same object, with its hooks.

    Raises:
        DistributedError: If this version of PyTorch does not allow it.
    """
    hooks = list(getattr(wrapper, "_comm_hooks", ()))
    try:
        _rebuild_reducer(wrapper)
    except (AttributeError, TypeError) as error:  # PyTorch's private methods have changed
        logger.warning(
            "Rebuilding DistributedDataParallel as if it were unpickled, since its methods changed: %s", error
        )
        _unpickle(wrapper, error)
    wrapper._has_rebuilt_buckets = False
    wrapper._comm_hooks = []
    for hook, state in hooks:
        _forget_buckets(state)
        wrapper.register_comm_hook(state, hook)


def _rebuild_reducer(wrapper: Any) -> None:
    """Rebuild the reducer as the constructor and the unpickling of DistributedDataParallel do."""
    wrapper._remove_autograd_hooks()
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()


def _unpickle(wrapper: Any, reason: Exception) -> None:
    """Rebuild the wrapper in place, by nothing but the pickle protocol."""
    try:
        state = wrapper.__getstate__()
        wrapper.__setstate__(state)
        if wrapper.static_graph:
            wrapper._static_graph_delay_allreduce_enqueued = False
    except Exception as error:
        raise DistributedError(
            f"PyTorch {torch.__version__} does not let DistributedDataParallel be rebuilt in place ({reason}; {error}); "
            "expected a version that does, such as 2.13. Train without SmartFRZ, or with dry_run=True."
        ) from error


def _forget_buckets(state: Any) -> None:
    """Clear the matrices that PowerSGD keeps for each bucket: the buckets change now, and again after the first step."""
    kept = [getattr(state, name, None) for name in ("error_dict", "p_memory_dict", "q_memory_dict")]
    if all(isinstance(buckets, dict) for buckets in kept) and hasattr(state, "start_powerSGD_iter"):
        for buckets in kept:
            buckets.clear()  # type: ignore[union-attr]
        state.iter = min(state.iter, state.start_powerSGD_iter - 2)


def reshard(model: nn.Module) -> None:
    """Make fully sharded modules show their shards.

    After a forward pass without a backward pass, such as an evaluation, some show whole parameters, which are not the
    ones that the optimizer trains.

    Raises:
        UnsupportedModelError: If the model is wrapped in FullyShardedDataParallel, which hides the layers.
    """
    # If the package was never imported, no module is of its classes.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise UnsupportedModelError(
                "The model is wrapped in FullyShardedDataParallel, which joins the weights of many layers to one; "
                "expected layers that can be told apart. Use torch.distributed.fsdp.fully_shard."
            )
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _default_store() -> Any:
    """Return the store of the process group, through a new connection."""
    try:
        from torch.distributed.distributed_c10d import _get_default_store

        store: Any = _get_default_store()
        return store.clone()
    except (ImportError, AttributeError, KeyError, ValueError):  # a private function; and MPI has no store
        return _own_store()


_OWN_STORES: list[Any] = []  # of rank 0, kept until the process ends: other ranks may still read its last word


def _own_store() -> Any:
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    store = None
    if dist.get_rank() == 0:
        store = _c10d.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        _OWN_STORES.append(store)
    where = [(host, store.port if store else 0)]
    dist.broadcast_object_list(where)
    return store or _c10d.TCPStore(*where[0], is_master=False)
