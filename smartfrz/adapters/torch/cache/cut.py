"""Where a frozen prefix ends, and running a model with or without what lies before that cut.

A module is not run by giving its instance another `_call_impl` for the length of one forward pass.
What it would have returned is a `Missing` tensor: shape, dtype and device, no values. The code
between modules works with these as with any tensor. At the cut kept tensors take their place; from
there on a `Missing` tensor that is used at all raises: a model that reads something from inside of
its prefix is found out, and never computes with a wrong value.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from smartfrz.adapters.torch.costs import _aside, _Bare
from smartfrz.errors import UsageError

# Reading one byte takes as long as so many operations: which of two cuts is the better one.
FLOPS_PER_BYTE = {"cpu": 50.0, "cuda": 2000.0}
TRIALS = 12
SAMPLES = (
    4  # of a batch, with which cuts are checked: what they say of these holds for the others, at an eighth of the cost
)
_PLAIN_VALUES = (type(None), bool, int, float, str, torch.dtype, torch.device)
_aten = torch.ops.aten
# Their results do not depend on the values of their argument
_VALUELESS = {
    op.default
    for op in (_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full)
}


class Refusal(UsageError):
    """Why a model cannot be cut somewhere."""


class _Reached(BaseException):
    """Ends a forward pass at the cut. Not an `Exception`: those the model may catch."""


class Missing(torch.Tensor):
    """What a module that was not run would have returned: no values.

    Args:
        meta: Its shape, strides and dtype, on the meta device.
        device: Where it would be.
        walk: The pass that it is part of.
    """

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device, walk: "Walk") -> "Missing":  # noqa: D102
        return torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device
        )

    def __init__(self, meta: torch.Tensor, device: torch.device, walk: "Walk"):
        self.meta = meta
        self.walk = walk

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Missing(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        first = next(tensor for tensor in tensors if isinstance(tensor, Missing))
        walk = first.walk
        if walk.filled:
            walk.refuse(f"behind the cut {func} reads a tensor of shape {tuple(first.shape)} from before it")
        real = [tensor for tensor in tensors if not isinstance(tensor, Missing)]
        if any(tensor.requires_grad for tensor in real):
            walk.refuse(f"before the cut {func} uses a parameter that is trained")
        written = [value for value, written in zip(args, func._schema.arguments, strict=False) if _is_written(written)]
        if any(value is tensor for value in (*written, kwargs.get("out")) for tensor in real):
            walk.refuse(f"before the cut {func} writes what a skipped module returned into another tensor")
        if func in _VALUELESS:
            blank = torch.zeros((), dtype=first.dtype, device=first.device).expand(first.shape)
            return func(blank, *args[1:], **kwargs)
        device = kwargs.get("device") or first.device
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        made: dict[int, torch.Tensor] = {id(t): t.meta if isinstance(t, Missing) else _meta_of(t) for t in tensors}
        args, kwargs = tree_map(lambda value: made.get(id(value), value), (args, kwargs))
        try:
            output = func(*args, **kwargs)
        # .item(), nonzero and whatever else depends on values
        except (RuntimeError, NotImplementedError) as error:
            walk.refuse(f"between the modules before the cut {func} needs values ({error})")
        given = {id(t.meta): t for t in tensors if isinstance(t, Missing)}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            # An operation in place returns what it was given.
            return given.get(id(value)) if id(value) in given else Missing(value, torch.device(device), walk)

        return tree_map(wrapped, output)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _meta_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@dataclass(frozen=True)
class _Leaf:
    """A tensor that a skipped module returned, or another value."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    channels_last: bool = False
    value: Any = None

    @classmethod
    def of(cls, value: Any, walk: "Walk") -> "_Leaf":
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, _PLAIN_VALUES):
                walk.refuse(f"a module before the cut returns a {type(value).__name__}")
            return cls(value=value)
        return cls(tuple(value.shape), value.dtype, value.device, is_channels_last(value))


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a tensor of pictures has its channels innermost in memory, and not by chance."""
    innermost = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return innermost and not tensor.is_contiguous()


@dataclass(frozen=True)
class _Output:
    """What one skipped module returns, at any batch size.

    Attributes:
        spec: How its values are nested.
        leaves: Each of them, as seen with one batch.
        factors: For each tensor, and each of its dimensions, its size for each sample; or 0 where
            it does not depend on the batch size.
    """

    spec: TreeSpec
    leaves: tuple[_Leaf, ...]
    factors: tuple[tuple[int, ...], ...]

    def missing(self, batch: int, walk: "Walk") -> Any:
        values: list[Any] = []
        for leaf, factors in zip(self.leaves, self.factors, strict=True):
            if leaf.dtype is None or leaf.device is None:
                values.append(leaf.value)
                continue
            shape = [f * batch if f else size for f, size in zip(factors, leaf.shape, strict=True)]
            layout = torch.channels_last if leaf.channels_last else torch.contiguous_format
            meta = torch.empty(shape, dtype=leaf.dtype, device="meta", memory_format=layout)
            values.append(Missing(meta, leaf.device, walk))
        return tree_unflatten(values, self.spec)


@dataclass(eq=False)
class Cut:
    """A place between two modules of a model.

    Attributes:
        name: The module whose inputs are kept.
        module: Itself.
        skipped: The calls before it, in order: names, and modules. Calls inside of these are not
            listed.
        flops: Of the layers among them, one forward pass of one sample.
        around: The modules in which the cut module lies; their own frozen parameters may be used before it.
        outputs: What each of these calls returns.
        runs: Those of these calls that run all the same: they have no parameters and do not look at
            what the others compute. Position encodings are read by later layers, too.
        spec: How the cut module's arguments are nested.
        kept: Which leaves of these arguments are kept for each sample.
        leaves: These, as seen with one batch.
        constants: Leaves from the prefix that are the same for every batch.
    """

    name: str
    module: nn.Module
    skipped: list[tuple[str, nn.Module]]
    flops: float = 0.0
    around: list[nn.Module] = field(default_factory=list)
    outputs: list[_Output] = field(default_factory=list)
    runs: set[int] = field(default_factory=set)
    spec: TreeSpec | None = None
    kept: list[int] = field(default_factory=list)
    leaves: list[_Leaf] = field(default_factory=list)
    constants: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.skipped_modules = dict.fromkeys(module for _, module in self.skipped)
        self.inner = {module: list(module.modules()) for module in self.skipped_modules}
        modules = [inner for found in self.inner.values() for inner in found]
        own = [p for module in modules for p in module.parameters(recurse=False)]
        own += [p for module in self.around for p in module.parameters(recurse=False) if not p.requires_grad]
        self.parameters = list({id(p): p for p in own}.values())
        self.norms = [module for module in modules if isinstance(module, _NormBase)]
        self.tensors = self.buffers()

    def copied_constants(self) -> dict[int, torch.Tensor]:
        """For one pass: the cut module may write into what it is given."""
        return {index: value.clone() for index, value in self.constants.items()}

    def buffers(self) -> list[torch.Tensor]:
        """Of the skipped modules, as they are now."""
        return [b for found in self.inner.values() for m in found for b in m._buffers.values() if b is not None]


class Walk:
    """One forward pass from a cut, to a cut, or both.

    Args:
        batch: Number of samples.
        start: Modules before this cut are not run; `given` takes the place of what they returned.
        given: Leaves of the arguments of `start`, by their number.
        stop: Modules before this cut run in eval mode.
        halt: End the pass at `stop`.
        learn: Find out which modules before `start` need not be skipped.
    """

    def __init__(
        self,
        batch: int,
        *,
        start: Cut | None = None,
        given: Mapping[int, torch.Tensor] | None = None,
        stop: Cut | None = None,
        halt: bool = True,
        learn: bool = False,
    ):
        self.batch = batch
        self.start, self.given = start, dict(given or {})
        self.stop, self.halt, self.learn = stop, halt, learn
        self.filled = self.reached = False
        self.replaced: list[int] = []  # which leaves came from the prefix
        self.captured: dict[int, torch.Tensor] = {}
        self.spec: TreeSpec | None = None
        self.returned: list[tuple[TreeSpec, tuple[_Leaf, ...]]] = []
        self.refusal: Refusal | None = None
        self._position = 0
        self._inside = False

    def refuse(self, reason: str) -> None:
        """End the pass with this reason.

        Raises:
            Refusal: Always.
        """
        self.refusal = Refusal(reason)
        raise self.refusal

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the forward pass returns; None if it ended at `stop`.

        Raises:
            Refusal: If the model cannot be run in this way.
        """
        modules: set[nn.Module] = set()
        for cut in (self.start, self.stop):
            if cut is not None:
                modules |= {*cut.skipped_modules, cut.module}
        output = None
        with _intercepted({module: partial(self._call, module) for module in modules}):
            try:
                output = forward(*args, **kwargs)
            except _Reached:
                pass
            except Exception:
                if self.refusal is None:
                    raise
        if self.refusal is not None:
            raise self.refusal
        if (self.start and not self.filled) or (self.stop and not self.reached):
            self.refuse("the cut was not reached")
        return output

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.start is not None and not self.filled:
            if module is self.start.module:
                args, kwargs = self._fill(self.start, args, kwargs)
            elif module in self.start.skipped_modules:
                return self._skip(self.start, module, args, kwargs)
        if self.stop is not None and not self.reached and not self._inside:
            if module is self.stop.module:
                self._capture(args, kwargs)
            elif module in self.stop.skipped_modules:
                return self._run_frozen(self.stop, module, args, kwargs)
        return type(module)._call_impl(module, *args, **kwargs)

    def _skip(self, cut: Cut, module: nn.Module, args: Any, kwargs: Any) -> Any:
        position, self._position = self._position, self._position + 1
        if position >= len(cut.skipped) or cut.skipped[position][1] is not module:
            self.refuse("the modules before the cut do not always run in the same order")
        if position in cut.runs:
            return type(module)._call_impl(module, *args, **kwargs)
        if self.learn and next(module.parameters(), None) is None:
            try:
                output = type(module)._call_impl(module, *args, **kwargs)
                if not any(isinstance(tensor, Missing) for tensor in tensors_in(output)):
                    cut.runs.add(position)
                    return output
            except Refusal:
                self.refusal = None
        return cut.outputs[position].missing(self.batch, self)

    def _fill(self, cut: Cut, args: Any, kwargs: Any) -> Any:
        if self._position != len(cut.skipped):
            self.refuse("the modules before the cut do not always run in the same order")
        leaves, spec = tree_flatten((args, kwargs))
        if cut.spec is not None and spec != cut.spec:
            self.refuse(f"the arguments of {cut.name!r} changed")
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Missing):
                continue
            kept = self.given.get(index)
            if kept is None or kept.shape != leaf.shape or kept.dtype != leaf.dtype:
                self.refuse(f"argument {index} of {cut.name!r} changed")
            leaves[index] = kept
            self.replaced.append(index)
        self.filled = True
        return tree_unflatten(leaves, spec)

    def _capture(self, args: Any, kwargs: Any) -> None:
        self.reached = True
        leaves, self.spec = tree_flatten((args, kwargs))
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            if leaf.requires_grad:
                self.refuse("a gradient flows through the cut: something before it is trained, or an input is")
            # A copy: the cut module may write into it, and it may be part of a larger tensor.
            self.captured[index] = leaf.detach().clone()
        if self.halt:
            raise _Reached

    def _run_frozen(self, cut: Cut, module: nn.Module, args: Any, kwargs: Any) -> Any:
        trained = [inner for inner in cut.inner[module] if inner.training]
        self._inside = True
        for inner in trained:
            inner.__dict__["training"] = False
        try:
            output = type(module)._call_impl(module, *args, **kwargs)
        finally:
            self._inside = False
            for inner in trained:
                inner.__dict__["training"] = True
        leaves, spec = tree_flatten(output)
        self.returned.append((spec, tuple(_Leaf.of(leaf, self) for leaf in leaves)))
        return output


@contextmanager
def _intercepted(calls: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While it lasts, calls of these modules go elsewhere, and none of their hooks fires."""
    for module, call in calls.items():
        module.__dict__["_call_impl"] = call
    try:
        yield
    finally:
        for module in calls:
            module.__dict__.pop("_call_impl", None)


def pick(tree: Any, batch: int, rows: Sequence[int]) -> Any:
    """The arguments of a model for some samples of a batch only."""

    def picked(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == batch:
            return value[torch.tensor(rows, device=value.device)]
        return value

    return tree_map(picked, tree)


def is_close(one: Any, other: Any, extra: float = 0.0) -> bool:
    """Whether two tensors are equal but for rounding.

    Args:
        one: Tensor.
        other: Tensor.
        extra: Error that is allowed in addition, as a share of the largest value.
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

    The model is left as it was, bit for bit, random numbers included.

    Args:
        model: The model, in training mode.
        forward: Its forward pass.
        batch: Number of samples, 2 or more.
        args: Positional arguments of the forward pass.
        kwargs: Keyword arguments.
        flops: By layer, of one forward pass of this batch.
        compression: Kept bytes as a share of computed ones.
        prefix: The model's name, where it is part of another one.
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
        self.batch = min(batch, SAMPLES)
        self._inputs = pick((args, kwargs), batch, range(self.batch)) if self.batch < batch else (args, kwargs)
        self._flops = {layer: number / batch for layer, number in flops.items()}
        self._compression = compression
        self._names = {module: name for name, module in model.named_modules(prefix=prefix)}
        devices = {t.device for t in (*model.parameters(), *model.buffers())}
        self.cuda = [device for device in devices if device.type == "cuda"]
        self._flops_per_byte = FLOPS_PER_BYTE["cuda" if self.cuda else "cpu"]
        self.reasons: list[str] = []

    def aside(self, run: Callable[[], Any], seed: int = 0) -> Any:
        """What `run` returns; buffers, attributes and random numbers are as before afterwards."""
        with _aside(self._model, self.cuda):
            _seed(seed)
            buffers = {f"module.{name}": b.clone() for name, b in self._model.named_buffers()}
            return functional_call(_Bare(self._model), buffers, (lambda _: run(),))

    def find(self, previous: Cut | None = None) -> Cut | None:
        """The best cut that passes every check, or None; `reasons` then says why.

        Args:
            previous: A cut that was found before, all of which is still frozen.
        """
        self.reasons = []
        try:
            root = self._trace()
        # Whatever the model raises with these few samples: it is trained without a cache.
        except Exception as error:
            self.reasons.append(f"with {self.batch} samples of a batch: {type(error).__name__}: {error}")
            return previous
        candidates = self._candidates(root)
        if not candidates and not self.reasons:
            return None
        for cut in candidates[:TRIALS]:
            if previous is not None and cut.module is previous.module:
                return previous
            try:
                return self._checked(cut)
            except Refusal as refusal:
                self.reasons.append(f"at {cut.name!r}: {refusal}")
            # Whatever the model raises when it is run in this way: it is trained without a cache.
            except Exception as error:
                self.reasons.append(f"at {cut.name!r}: {type(error).__name__}: {error}")
        return previous

    def _trace(self) -> _Traced:
        """Every call of a module in one forward pass."""
        root = _Traced("", self._model, 0)
        stack, count = [root], 0
        at_root: Any = None

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            leaves = tree_leaves((args, kwargs))
            tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
            size = sum(t.nbytes for t in tensors) / self.batch
            behind = torch._C._autograd._top_saved_tensors_default_hooks(True) != at_root
            traced = _Traced(self._names[module], module, count, size, behind)
            stack[-1].children.append(traced)
            stack.append(traced)
            try:
                return type(module)._call_impl(module, *args, **kwargs)
            finally:
                stack.pop()

        def run() -> None:
            nonlocal at_root
            at_root = torch._C._autograd._top_saved_tensors_default_hooks(True)
            args, kwargs = self._inputs
            calls = {module: partial(call, module) for module in self._names if module is not self._model}
            with _intercepted(calls):
                self._forward(*args, **kwargs)

        self.aside(run)
        return root

    def _candidates(self, root: _Traced) -> list[Cut]:
        """Cuts, the best first: much computed before them, and little to keep."""
        calls: list[_Traced] = []
        _all_calls(root, calls)
        times = [call.module for call in calls]
        live = _live_modules(self._model)
        found: list[tuple[float, int, int, Cut]] = []
        before: list[_Traced] = []
        around: list[nn.Module] = []
        node: _Traced | None = root
        while node is not None:
            following = None
            around.append(node.module)
            for child in node.children:
                skipped = [(call.name, call.module) for call in before]
                flops = sum(n for layer, n in self._flops.items() if any(_is_in(layer, name) for name, _ in skipped))
                if flops and times.count(child.module) == 1:
                    value = flops - child.row_bytes * self._compression * self._flops_per_byte
                    if child.checkpointed:
                        self.reasons.append(f"at {child.name!r}: it runs under gradient checkpointing")
                    else:
                        found.append(
                            (
                                value,
                                len(skipped),
                                -child.order,
                                Cut(child.name, child.module, skipped, flops, list(around)),
                            )
                        )
                if child.module in live:
                    following = child
                    break
                before.append(child)
            node = following
        found.sort(key=lambda one: one[:3], reverse=True)
        return [cut for *_, cut in found]

    def _checked(self, cut: Cut) -> Cut:
        """The cut, with what is needed to use it.

        Three passes: the model as it is; some of the samples in another order, as far as the cut,
        with other random numbers; and the model without its prefix. Were the second one left out,
        a value that a skipped module leaves in an attribute would still be that of this very batch.

        Raises:
            Refusal: If the model does not compute the same without its prefix.
        """
        args, kwargs = self._inputs
        whole = Walk(self.batch, stop=cut, halt=False)

        def first() -> Any:
            output = whole.run(self._forward, args, kwargs)
            # `aside` has put copies in the place of the buffers
            if not all(map(torch.equal, cut.buffers(), cut.tensors)):
                raise Refusal("buffers of a module before it change in a forward pass in eval mode")
            return output

        reference = self.aside(first)
        # Never one row alone, which many models take for something else
        rows = list(range(self.batch - 1, self.batch // 2 - 1, -1))
        rows = rows if self.batch > 3 else [*range(self.batch - 1, -1, -1), 0]
        part = Walk(len(rows), stop=cut)
        given = {index: tensor.clone() for index, tensor in whole.captured.items()}
        without = Walk(self.batch, start=cut, given=given, learn=True)
        some_args, some_kwargs = pick((args, kwargs), self.batch, rows)

        def second_and_third() -> Any:
            part.run(self._forward, some_args, some_kwargs)
            cut.outputs = _outputs(whole, part)
            cut.spec = whole.spec
            _seed(0)
            return without.run(self._forward, args, kwargs)

        output = self.aside(second_and_third, seed=1)
        for index in without.replaced:
            self._keep(cut, index, whole.captured[index], part.captured[index], rows)
        if not cut.kept:
            raise Refusal("no tensor crosses it")
        expected, found = tensors_in(reference), tensors_in(output)
        if any(isinstance(tensor, Missing) for tensor in found):
            raise Refusal("the model returns what a module before the cut computed")
        if len(expected) != len(found) or not all(map(is_close, found, expected)):
            raise Refusal("the model's output is another one without the modules before it")
        return cut

    def _keep(self, cut: Cut, index: int, whole: torch.Tensor, part: torch.Tensor, rows: list[int]) -> None:
        """Note one leaf that crosses the cut, if each of its rows is a function of one sample."""
        leaf = _Leaf.of(whole, Walk(0))
        per_sample = whole.dim() > 0 and len(whole) == self.batch and len(part) == len(rows)
        if per_sample and whole.shape[1:] == part.shape[1:]:
            if not is_close(whole[torch.tensor(rows, device=whole.device)], part):
                raise Refusal(
                    "what is computed before it for a sample depends on chance or on the other samples of the batch"
                )
            cut.kept.append(index)
            cut.leaves.append(leaf)
        elif whole.shape == part.shape and is_close(whole, part):
            cut.constants[index] = whole
        else:
            raise Refusal(f"a tensor of shape {tuple(whole.shape)} crosses it that is not one row a sample")

    def check_way(self, start: Cut, stop: Cut) -> None:
        """Whether kept tensors of one cut can be advanced to a later one.

        Raises:
            Refusal: If they cannot.
        """
        args, kwargs = self._inputs
        from_start, from_input = Walk(self.batch, stop=start), Walk(self.batch, stop=stop)
        self.aside(lambda: from_start.run(self._forward, args, kwargs))
        self.aside(lambda: from_input.run(self._forward, args, kwargs))
        given = {index: from_start.captured[index] for index in start.kept} | start.copied_constants()
        between = Walk(self.batch, start=start, given=given, stop=stop)
        self.aside(lambda: between.run(self._forward, args, kwargs), seed=1)
        if not all(is_close(between.captured[index], from_input.captured[index]) for index in stop.kept):
            raise Refusal(f"what was kept at {start.name!r} does not lead to {stop.name!r}")


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _all_calls(node: _Traced, found: list[_Traced]) -> None:
    for child in node.children:
        found.append(child)
        _all_calls(child, found)


def _is_in(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(module + ".")


def _live_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that are trained, or learn statistics, themselves or inside."""
    live = set()
    for module in model.modules():
        for inner in module.modules():
            learns = isinstance(inner, _NormBase) and inner.training and inner.running_mean is not None
            if learns or any(p.requires_grad for p in inner.parameters(recurse=False)):
                live.add(module)
                break
    return live


def _outputs(one: Walk, other: Walk) -> list[_Output]:
    """What the skipped modules return, from two batches of different size."""
    if len(one.returned) != len(other.returned):
        raise Refusal("the modules before the cut do not always run in the same order")
    made = []
    for (spec, leaves), (other_spec, other_leaves) in zip(one.returned, other.returned, strict=True):
        if spec != other_spec:
            raise Refusal("a module before the cut does not always return the same kind of value")
        factors = []
        for leaf, twin in zip(leaves, other_leaves, strict=True):
            alike = (leaf.dtype, leaf.device, leaf.value, len(leaf.shape))
            if alike != (twin.dtype, twin.device, twin.value, len(twin.shape)):
                raise Refusal("a module before the cut returns values that depend on the batch")
            factors.append(
                tuple(_factor(a, one.batch, b, other.batch) for a, b in zip(leaf.shape, twin.shape, strict=True))
            )
        made.append(_Output(spec, leaves, tuple(factors)))
    return made


def _factor(size: int, batch: int, other_size: int, other_batch: int) -> int:
    """A dimension's size for each sample; 0 if it is the same for every batch."""
    if size == other_size:
        return 0
    if size % batch or size // batch * other_batch != other_size:
        raise Refusal(f"a size before the cut is {size} for {batch} samples and {other_size} for {other_batch}")
    return size // batch


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Every tensor of a model's output, those in attributes of its objects included."""
    leaves = tree_leaves(output)
    values = [value for leaf in leaves for value in (leaf, *tree_leaves(getattr(leaf, "__dict__", None)))]
    return [value for value in values if isinstance(value, torch.Tensor)]
