"""Find the place at which a frozen prefix is best cut off, and check that it can be."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from smartfrz.adapters.torch.cache.missing import Missing, Refusal
from smartfrz.adapters.torch.cache.walk import Cut, Leaf, Output, Walk, intercept, tensors_in
from smartfrz.adapters.torch.sandbox import run_without_hooks, sandbox
from smartfrz.adapters.torch.sharding import is_sharded

# Reading one byte takes as long as this many FLOPs, which says which of two cuts is better.
FLOPS_PER_BYTE = {"cpu": 50.0, "cuda": 2000.0}
TRIALS = 12  # Candidates that are checked.
SAMPLES = 4  # Samples of a batch that cuts are checked on: they say as much as all, at a fraction of the cost.


@dataclass(eq=False)
class _Traced:
    """One call of a module."""

    name: str
    module: nn.Module
    order: int
    row_bytes: float = 0.0
    checkpointed: bool = False
    children: list["_Traced"] = field(default_factory=list)


class CutFinder:
    """Looks for the best cut of a model, and checks it on a batch.

    The model is left as it was, bit for bit, and so are the states of random number generators.

    Args:
        model: The model, in training mode.
        forward: Its forward pass.
        batch: Number of samples, 2 or more.
        args: Positional arguments of the forward pass.
        kwargs: Keyword arguments of the forward pass.
        flops: FLOPs of each layer in one forward pass of this batch.
        compression: Kept bytes as a share of computed ones.
        prefix: The model's name, where it is part of another one.

    Attributes:
        reasons: Why candidates were refused in the last search.
        cuda: The model's CUDA devices.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        batch: int,
        args: Any,
        kwargs: Any,
        flops: Mapping[str, int],
        compression: float = 1.0,
        prefix: str = "",
    ):
        self._model = model
        self._forward = forward
        self._batch = min(batch, SAMPLES)
        self._inputs = pick((args, kwargs), batch, range(self._batch)) if self._batch < batch else (args, kwargs)
        self._flops = {layer: number / batch for layer, number in flops.items()}
        self._compression = compression
        self._names = {module: name for name, module in model.named_modules(prefix=prefix)}
        devices = {t.device for t in (*model.parameters(), *model.buffers())}
        self.cuda = [device for device in devices if device.type == "cuda"]
        self._flops_per_byte = FLOPS_PER_BYTE["cuda" if self.cuda else "cpu"]
        self.reasons: list[str] = []

    def run_aside(self, run: Callable[[], Any], seed: int = 0) -> Any:
        """Return what `run` returns; afterwards buffers, attributes and random numbers are as before.

        Args:
            run: Called with copies in place of the model's buffers.
            seed: Seed of the random number generators meanwhile.
        """
        with sandbox(self._model, self.cuda):
            _seed(seed)
            buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
            return run_without_hooks(self._model, buffers, lambda _: run())

    def find(self, previous: Cut | None = None) -> Cut | None:
        """Return the best cut that passes every check, or None; `reasons` then says why.

        Args:
            previous: A cut that was found before. All modules before it are still frozen.
        """
        self.reasons = []
        try:
            candidates = self._candidates(self._trace())
        # A model that cannot run on so few samples is trained without a cache, whatever it raises.
        except Exception as error:
            self.reasons.append(f"with {self._batch} samples of a batch: {type(error).__name__}: {error}")
            return previous
        for cut in candidates[:TRIALS]:
            if previous is not None and cut.module is previous.module:
                return previous
            try:
                return self._checked(cut)
            except Refusal as refusal:
                self.reasons.append(f"at {cut.name!r}: {refusal}")
            # Whatever else the model raises without its prefix is a reason, too.
            except Exception as error:
                self.reasons.append(f"at {cut.name!r}: {type(error).__name__}: {error}")
        return previous

    def _trace(self) -> _Traced:
        """Record every call of a module in one forward pass."""
        root = _Traced("", self._model, 0)
        stack, count = [root], 0
        at_root: Any = None

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            size = sum(t.nbytes for t in tensors) / self._batch
            traced = _Traced(self._names[module], module, count, size, _saved_tensors_hooks() != at_root)
            stack[-1].children.append(traced)
            stack.append(traced)
            try:
                return type(module)._call_impl(module, *args, **kwargs)
            finally:
                stack.pop()

        def run() -> None:
            nonlocal at_root
            at_root = _saved_tensors_hooks()
            args, kwargs = self._inputs
            with intercept({module: partial(call, module) for module in self._names if module is not self._model}):
                self._forward(*args, **kwargs)

        self.run_aside(run)
        return root

    def _candidates(self, root: _Traced) -> list[Cut]:
        """Return possible cuts, the best first: much is computed before it, and little has to be kept."""
        times = Counter(call.module for call in _calls_inside(root))
        found: list[tuple[tuple[float, int, int], Cut]] = []
        for call, before, around in _frozen_places(root, _live_modules(self._model)):
            flops = self._flops_inside(before)
            if not flops or times[call.module] > 1:
                continue
            if call.checkpointed:
                self.reasons.append(f"at {call.name!r}: it runs under gradient checkpointing")
                continue
            value = flops - call.row_bytes * self._compression * self._flops_per_byte
            skipped = [(one.name, one.module) for one in before]
            cut = Cut(call.name, call.module, skipped, flops, around)
            found.append(((value, len(skipped), -call.order), cut))
        found.sort(key=lambda pair: pair[0], reverse=True)
        return [cut for _, cut in found]

    def _flops_inside(self, calls: Sequence[_Traced]) -> float:
        return sum(n for layer, n in self._flops.items() if any(_is_in(layer, call.name) for call in calls))

    def _checked(self, cut: Cut) -> Cut:
        """Return the cut with what is needed to use it.

        Makes three passes: the model as it is; some of the samples in another order, as far as the
        cut, with other random numbers; and the model without its prefix. The second one also
        overwrites what skipped modules left in attributes: otherwise the third one could read there
        the right values for this batch, and for no other.

        Raises:
            Refusal: If the model does not compute the same without its prefix.
        """
        whole = Walk(self._batch, stop=cut, halt=False)
        reference = self.run_aside(lambda: self._run_whole(cut, whole))
        rows = self._other_rows()
        part = Walk(len(rows), stop=cut)
        given = {index: tensor.clone() for index, tensor in whole.captured.items()}
        without = Walk(self._batch, start=cut, given=given, learn=True)

        def second_and_third() -> Any:
            part.run(self._forward, *pick(self._inputs, self._batch, rows))
            cut.outputs = _outputs(whole, part)
            cut.spec = whole.spec
            _seed(0)
            return without.run(self._forward, *self._inputs)

        output = self.run_aside(second_and_third, seed=1)
        for index in without.replaced:
            self._note_crossing(cut, index, whole.captured[index], part.captured[index], rows)
        if not cut.kept:
            raise Refusal("no tensor crosses it")
        _check_outputs(reference, output)
        return cut

    def _run_whole(self, cut: Cut, walk: Walk) -> Any:
        output = walk.run(self._forward, *self._inputs)
        # `run_aside` put copies in the place of the buffers.
        if not all(map(torch.equal, cut.buffers(), cut.tensors)):
            raise Refusal("buffers of a module before it change in a forward pass in eval mode")
        return output

    def _other_rows(self) -> list[int]:
        """Return some rows in reverse order; never a single one, which many models treat as no batch."""
        if self._batch > 3:
            return list(range(self._batch - 1, self._batch // 2 - 1, -1))
        return [*range(self._batch - 1, -1, -1), 0]

    def _note_crossing(self, cut: Cut, index: int, whole: torch.Tensor, part: torch.Tensor, rows: list[int]) -> None:
        """Note one tensor that crosses the cut, if each of its rows is a function of one sample."""
        per_sample = whole.dim() > 0 and len(whole) == self._batch and len(part) == len(rows)
        if per_sample and whole.shape[1:] == part.shape[1:]:
            if not is_close(whole[torch.tensor(rows, device=whole.device)], part):
                raise Refusal(
                    "what is computed before it for a sample depends on chance or on the other samples of the batch"
                )
            cut.kept.append(index)
            cut.leaves.append(Leaf.of_tensor(whole))
        elif whole.shape == part.shape and is_close(whole, part):
            cut.constants[index] = whole
        else:
            raise Refusal(f"a tensor of shape {tuple(whole.shape)} crosses it that is not one row a sample")


def pick(inputs: tuple[Any, Any], batch: int, rows: Sequence[int]) -> tuple[Any, Any]:
    """Return a model's arguments for some samples of a batch only.

    Args:
        inputs: Positional and keyword arguments.
        batch: Number of samples. Tensors of that length belong to the samples.
        rows: Which samples.
    """

    def picked(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == batch:
            return value[torch.tensor(rows, device=value.device)]
        return value

    args, kwargs = tree_map(picked, inputs)
    return args, kwargs


def is_close(one: Any, other: Any, extra: float = 0.0) -> bool:
    """Whether two tensors are equal except for rounding.

    Args:
        one: A tensor.
        other: A tensor.
        extra: Additional error to allow, as a share of the largest value.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if not one.numel():
        return True
    # CUDA kernels depend on the batch size, and may round to TF32.
    exact = one.dtype in (torch.float32, torch.float64)
    share = (1e-4 if one.device.type == "cpu" else 5e-3) if exact else 5e-2
    one, other = one.detach().float(), other.detach().float()
    largest = torch.nan_to_num(other, 0, 0, 0).abs().max()
    return torch.allclose(one, other, rtol=0.0, atol=float(largest) * (share + extra) + 1e-12, equal_nan=True)


def find_obstacle(model: nn.Module) -> str | None:
    """Return why no cut of a model can be looked for; None if one can."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return "the model is sharded over processes, and its prefix gathers weights that the cut would leave out"
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return f"{name or 'the model'} is compiled with torch.compile, which the cache does not cut"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name or 'the model'} is a TorchScript module, which the cache does not cut"
        if isinstance(module, nn.SyncBatchNorm) and module.training and several:
            return f"{name} synchronizes batch statistics, and checking a cut would wait for the other processes"
    return None


def _check_outputs(expected: Any, found: Any) -> None:
    with_prefix, without = tensors_in(expected), tensors_in(found)
    if any(isinstance(tensor, Missing) for tensor in without):
        raise Refusal("the model returns what a module before the cut computed")
    if len(with_prefix) != len(without) or not all(map(is_close, without, with_prefix)):
        raise Refusal("the model's output is another one without the modules before it")


def _saved_tensors_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _calls_inside(node: _Traced) -> Iterator[_Traced]:
    for child in node.children:
        yield child
        yield from _calls_inside(child)


def _frozen_places(root: _Traced, live: set[nn.Module]) -> Iterator[tuple[_Traced, list[_Traced], list[nn.Module]]]:
    """Yield each call with only frozen calls before it, those calls, and the modules that contain it."""
    before: list[_Traced] = []
    around: list[nn.Module] = []
    node: _Traced | None = root
    while node is not None:
        around.append(node.module)
        following = None
        for child in node.children:
            yield child, list(before), list(around)
            if child.module in live:
                following = child
                break
            before.append(child)
        node = following


def _is_in(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(module + ".")


def _live_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules in which something is trained, or learns statistics."""
    return {module for module in model.modules() if any(map(_is_live, module.modules()))}


def _is_live(module: nn.Module) -> bool:
    learns = isinstance(module, _NormBase) and module.training and module.running_mean is not None
    return learns or any(p.requires_grad for p in module.parameters(recurse=False))


def _outputs(one: Walk, other: Walk) -> list[Output]:
    """Describe what the skipped modules return, from two batches of different sizes."""
    if len(one.returned) != len(other.returned):
        raise Refusal("the modules before the cut do not always run in the same order")
    made = []
    for (spec, leaves), (other_spec, other_leaves) in zip(one.returned, other.returned, strict=True):
        if spec != other_spec:
            raise Refusal("a module before the cut does not always return the same kind of value")
        pairs = zip(leaves, other_leaves, strict=True)
        made.append(Output(spec, leaves, tuple(_factors(a, one.batch, b, other.batch) for a, b in pairs)))
    return made


def _factors(leaf: Leaf, batch: int, other: Leaf, other_batch: int) -> tuple[int, ...]:
    """Return each dimension's size for each sample, or 0 if it is the same for every batch."""
    facts = (leaf.dtype, leaf.device, leaf.value, len(leaf.shape))
    if facts != (other.dtype, other.device, other.value, len(other.shape)):
        raise Refusal("a module before the cut returns values that depend on the batch")
    return tuple(_factor(a, batch, b, other_batch) for a, b in zip(leaf.shape, other.shape, strict=True))


def _factor(size: int, batch: int, other_size: int, other_batch: int) -> int:
    if size == other_size:
        return 0
    if size % batch or size // batch * other_batch != other_size:
        raise Refusal(f"a size before the cut is {size} for {batch} samples and {other_size} for {other_batch}")
    return size // batch
