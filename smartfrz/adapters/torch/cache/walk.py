"""Run a model with or without the modules before a cut.

A module is skipped by giving its instance another `_call_impl` for the duration of one forward pass.
In place of its output comes a `Missing` tensor: a shape, a dtype and a device, but no values. The
code between modules works with these as with any tensor. At the cut, kept tensors take their place.
Behind the cut, any use of a `Missing` tensor raises: a model that reads something from inside its
prefix is found out, and never computes with a wrong value.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from smartfrz.adapters.torch.cache.missing import Missing, Refusal

_PLAIN_VALUES = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _Reached(BaseException):
    """Ends a forward pass at the cut. Not an `Exception`, which the model might catch."""


@dataclass(frozen=True)
class Leaf:
    """One value that crosses a cut or that a skipped module returns; a tensor unless `dtype` is None."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    channels_last: bool = False
    value: Any = None

    @classmethod
    def of(cls, value: Any, walk: "Walk") -> "Leaf":
        """Describe a value; end the pass if it is neither a tensor nor plain."""
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, _PLAIN_VALUES):
                walk.refuse(f"a module before the cut returns a {type(value).__name__}")
            return cls(value=value)
        return cls.of_tensor(value)

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> "Leaf":
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, is_channels_last(tensor))


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a batch of pictures has its channels innermost in memory, and not in the usual order as well."""
    innermost = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return innermost and not tensor.is_contiguous()


def layout_of(leaf: Leaf) -> torch.memory_format:
    """Return the memory format of a leaf."""
    return torch.channels_last if leaf.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Output:
    """What one skipped module returns, at any batch size.

    Attributes:
        spec: How its values are nested.
        leaves: The values, as seen with one batch.
        factors: For each value, and each dimension of it: its size for each sample, or 0 where it
            does not depend on the batch size.
    """

    spec: TreeSpec
    leaves: tuple[Leaf, ...]
    factors: tuple[tuple[int, ...], ...]

    def missing(self, batch: int, walk: "Walk") -> Any:
        """Return this output for a batch of some size, without values."""
        values: list[Any] = []
        for leaf, factors in zip(self.leaves, self.factors, strict=True):
            if leaf.dtype is None or leaf.device is None:
                values.append(leaf.value)
                continue
            shape = [f * batch if f else size for f, size in zip(factors, leaf.shape, strict=True)]
            meta = torch.empty(shape, dtype=leaf.dtype, device="meta", memory_format=layout_of(leaf))
            values.append(Missing(meta, leaf.device, walk))
        return tree_unflatten(values, self.spec)


@dataclass(eq=False)
class Cut:
    """A place between two modules of a model.

    Attributes:
        name: Name of the module whose inputs are kept.
        module: That module.
        skipped: The calls before it, in order: names and modules. Calls inside these are not listed.
        flops: FLOPs of the skipped layers, for one forward pass of one sample.
        around: The modules that contain the cut module. Frozen parameters of their own may be used
            before it.
        outputs: What each skipped call returns.
        runs: Positions of skipped calls that run all the same: these modules have no parameters and
            do not look at what the others compute. Later layers read position encodings, too.
        spec: How the cut module's arguments are nested.
        kept: Indices of the leaves of these arguments that are kept for each sample.
        leaves: These leaves, as seen with one batch.
        constants: Leaves from the prefix that are the same for every batch, by index.
        parameters: Parameters on which the kept tensors depend.
        norms: Normalization layers among the skipped modules.
    """

    name: str
    module: nn.Module
    skipped: list[tuple[str, nn.Module]]
    flops: float = 0.0
    around: list[nn.Module] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    runs: set[int] = field(default_factory=set)
    spec: TreeSpec | None = None
    kept: list[int] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
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
        """Return copies for one pass: the cut module may write into its arguments."""
        return {index: value.clone() for index, value in self.constants.items()}

    def buffers(self) -> list[torch.Tensor]:
        """Return the skipped modules' buffers, as they are now."""
        return [b for found in self.inner.values() for m in found for b in m._buffers.values() if b is not None]


class Walk:
    """One forward pass that begins at a cut or ends there.

    Args:
        batch: Number of samples.
        start: Skip the modules before this cut; `given` takes the place of their outputs.
        given: Leaves of the arguments of the module at `start`, by index.
        stop: Run the modules before this cut in eval mode, and record what crosses it.
        halt: End the pass at `stop`.
        learn: Find out which modules before `start` need not be skipped.

    Attributes:
        filled: Whether the pass has reached `start`.
        reached: Whether the pass has reached `stop`.
        replaced: Indices of the leaves that came from the prefix.
        captured: The tensors that crossed `stop`, by index.
        spec: How these were nested.
        returned: What each module before `stop` returned.
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
        self.replaced: list[int] = []
        self.captured: dict[int, torch.Tensor] = {}
        self.spec: TreeSpec | None = None
        self.returned: list[tuple[TreeSpec, tuple[Leaf, ...]]] = []
        self.refusal: Refusal | None = None
        self._position = 0
        self._inside = False

    def refuse(self, reason: str) -> NoReturn:
        """End the pass for this reason.

        Raises:
            Refusal: Always.
        """
        self.refusal = Refusal(reason)
        raise self.refusal

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the forward pass's output, or None if it ended at `stop`.

        Raises:
            Refusal: If the model cannot be run in this way.
        """
        modules: set[nn.Module] = set()
        for cut in (self.start, self.stop):
            if cut is not None:
                modules |= {*cut.skipped_modules, cut.module}
        output = None
        with intercept({module: partial(self._call, module) for module in modules}):
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
            # A copy, since the cut module may write into it, and it may be part of a larger tensor.
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
        self.returned.append((spec, tuple(Leaf.of(leaf, self) for leaf in leaves)))
        return output


@contextmanager
def intercept(calls: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Redirect calls of these modules inside the block; none of their hooks fires.

    Args:
        calls: What is called in place of each module.
    """
    for module, call in calls.items():
        module.__dict__["_call_impl"] = call
    try:
        yield
    finally:
        for module in calls:
            module.__dict__.pop("_call_impl", None)


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Return every tensor of a model's output, attributes of objects in it included."""
    leaves = tree_leaves(output)
    values = [value for leaf in leaves for value in (leaf, *tree_leaves(getattr(leaf, "__dict__", None)))]
    return [value for value in values if isinstance(value, torch.Tensor)]
