"""`smartfrz estimate`: what freezing the first layers of a model would save, measured on this machine.

For every number of layers the layers are really frozen and steps really taken. The numbers take
turns, so that a machine that gets slower or faster meanwhile does so for all of them.
"""

import importlib
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from smartfrz.adapters.torch import TorchAdapter, trace_layers
from smartfrz.adapters.torch.costs import CostProfiler, measure_step
from smartfrz.control.ordering import LayerCost
from smartfrz.errors import RecipeError
from smartfrz.files import replacing

TURN_SECONDS = 0.4  # short steps are repeated within a turn
MOST_STEPS = 20  # a turn
PASSES = 4  # in which layers are measured
VALUES = 12  # of the default grid, besides 0
NOISY = 0.1  # half of the interquartile range, as a share of the median
NOTE = """\
Frozen: how many layers, counted from the first in execution order; the backward pass ends before them. A layer frozen
behind one that is still trained saves the gradient of its weights only, not that of its input, and less memory.
Steps are forward, backward and plain SGD on random inputs; loading data is not part of them. This is what a step saves
once the layers are frozen; what a training saves depends on when they freeze."""


@dataclass(frozen=True)
class InputSpec:
    """One random input of the model's forward pass.

    Attributes:
        shape: With the batch size first.
        dtype: Name of a PyTorch dtype.
        high: Integers are drawn from 0 to `high - 1`.
        keyword: Name of the argument; empty for a positional one.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    high: int = 100
    keyword: str = ""

    @classmethod
    def parse(cls, text: str) -> "InputSpec":
        """Read `[NAME=]SHAPE[:DTYPE[:HIGH]]`.

        Raises:
            ValueError: If `text` is not of that form.

        Example:
            >>> InputSpec.parse("8,128:int64:1000")
            InputSpec(shape=(8, 128), dtype='int64', high=1000, keyword='')
        """
        match = re.fullmatch(r"(?:(\w+)=)?(\d+(?:,\d+)*)(?::(\w+))?(?::(\d+))?", text)
        if match is not None:
            keyword, sizes, dtype, high = match.groups()
            shape = tuple(int(size) for size in sizes.split(","))
            spec = cls(shape, dtype or cls.dtype, int(high or cls.high), keyword or "")
            if isinstance(getattr(torch, spec.dtype, None), torch.dtype) and min(*shape, spec.high) >= 1:
                return spec
        raise ValueError(
            f"{text!r} is no input; expected [NAME=]SHAPE[:DTYPE[:HIGH]], for example 32,3,224,224 or 8,128:int64:1000 "
            "or attention_mask=8,128:int64:2."
        )

    def make(self, device: torch.device) -> torch.Tensor:
        """Standard normal, or integers that are evenly distributed."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(self.shape, dtype=dtype, device=device)
        high = min(self.high, 2) if dtype == torch.bool else self.high
        return torch.randint(high, self.shape, device=device).to(dtype)


@dataclass(frozen=True)
class EstimateOptions:
    """What is measured.

    Attributes:
        source: `module:callable`; called without arguments it returns the model.
        inputs: Of the model's forward pass.
        prefixes: Numbers of layers to freeze; empty for a grid. 0 is always measured.
        device: `cpu`, `cuda`, `cuda:1`; `auto` for CUDA where there is one.
        rounds: How many turns each number of layers gets.
        seed: Of the model, the inputs and dropout.
        profile: Measure each layer too.
    """

    source: str
    inputs: tuple[InputSpec, ...]
    prefixes: tuple[int, ...] = ()
    device: str = "auto"
    rounds: int = 5
    seed: int = 0
    profile: bool = False


@dataclass(frozen=True)
class Prefix:
    """What a step costs with the first layers frozen.

    Attributes:
        num_frozen: How many layers are frozen.
        last_frozen: Name of the last of them; empty if there is none.
        step_seconds: Median over `seconds`.
        forward_flops: Of a step, by PyTorch's own counter.
        backward_flops: Of a step, by PyTorch's own counter.
        activation_bytes: Kept from the forward pass for the backward pass.
        seconds: Of every step that was timed.
    """

    num_frozen: int
    last_frozen: str
    step_seconds: float
    forward_flops: int
    backward_flops: int
    activation_bytes: int
    seconds: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Half of the interquartile range of `seconds`."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2


@dataclass(frozen=True)
class Estimate:
    """The figures.

    Attributes:
        device: Name of the device.
        threads: Of PyTorch, on the CPU.
        layers: Names of the layers that are trained, in execution order.
        already_frozen: Names of the layers that the model came with frozen. They stay so, and do not count.
        prefixes: By number of frozen layers, none first.
        costs: Seconds in a step by layer, if they were asked for.
        estimated: Layers whose cost is estimated from their FLOPs, and why.
    """

    device: str
    threads: int
    layers: list[str]
    already_frozen: list[str]
    prefixes: list[Prefix]
    costs: dict[str, LayerCost] = field(default_factory=dict)
    estimated: dict[str, str] = field(default_factory=dict)


def estimate(options: EstimateOptions, progress: Callable[[float], None] = lambda fraction: None) -> Estimate:
    """Measure what freezing the first layers saves.

    Raises:
        RecipeError: If the model cannot be built or run as asked, or has too few layers.
        UnsupportedModelError: If the model has no layer with weights.
    """
    device = _device(options.device)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model = load_model(options.source)
        with _explained(f"The model cannot be moved to device {device}", "Choose another with --device."):
            model = model.to(device).train()
            inputs = [(spec.keyword, spec.make(device)) for spec in options.inputs]
        positional = [value for keyword, value in inputs if not keyword]
        keywords = {keyword: value for keyword, value in inputs if keyword}
        received = ", ".join(f"{n}{'=' if n else ''}{tuple(t.shape)} {t.dtype}" for n, t in inputs)
        hint = "Change --input. Integers are drawn from 0 to HIGH - 1, HIGH is 100 by default: 8,128:int64:1000."
        with _explained(f"The model's forward pass failed on the inputs {received}", hint):
            layers = trace_layers(model, *positional, **keywords)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)  # hardly moves, so that nothing overflows
        bench = _Bench(model, optimizer, lambda: model(*positional, **keywords), device)
        adapter = TorchAdapter(model, [optimizer], layers)
        names = adapter.layers()
        if not names:
            raise RecipeError(
                f"{options.source} returns a model that is frozen as a whole. Leave some layer trainable."
            )
        wanted = _grid(options.prefixes, len(names))
        prefixes = bench.run(adapter, names, wanted, options.rounds, progress)
        costs: dict[str, LayerCost] = {}
        profiler = CostProfiler(model, layers, repeats=2, passes=PASSES)
        try:
            if options.profile:
                for _ in range(PASSES):
                    model(*positional, **keywords)
                costs = profiler.costs()
        finally:
            profiler.close()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    frozen = [layer.name for layer in layers if layer.name not in names]
    return Estimate(where, torch.get_num_threads(), names, frozen, prefixes, costs, profiler.estimated)


class _Bench:
    """Takes and times training steps of one model."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forward: Callable[[], Any],
        device: torch.device,
    ):
        self._model, self._optimizer, self._forward, self._device = model, optimizer, forward, device

    def run(
        self,
        adapter: TorchAdapter,
        names: list[str],
        wanted: list[int],
        rounds: int,
        progress: Callable[[float], None],
    ) -> list[Prefix]:
        """Measure each number of frozen layers in `wanted`, in turns."""
        seconds: dict[int, list[float]] = {number: [] for number in wanted}
        work = {}
        turns = len(wanted) * (rounds + 1)
        hint = "Some layers change nothing in the output, or need other inputs. Choose numbers with --prefix."
        for number in wanted:  # counted first: it also warms up
            with (
                _frozen(adapter, names[:number]),
                _explained(f"A training step failed with the first {number} of {len(names)} layers frozen", hint),
            ):
                work[number] = measure_step(self._model, self._loss)
                self._optimizer.zero_grad()
                took = min(self._step() for _ in range(2))
            progress(len(work) / turns)
            if not number:
                steps = max(1, min(MOST_STEPS, round(TURN_SECONDS / took)))
        shuffle = random.Random(0).sample  # each number follows another one in each round
        for turn in range(rounds):
            for index, number in enumerate(shuffle(wanted, len(wanted))):
                with _frozen(adapter, names[:number]):
                    seconds[number] += [self._step() for _ in range(steps)]
                progress(((turn + 1) * len(wanted) + index + 1) / turns)
        return [
            Prefix(
                number,
                names[number - 1] if number else "",
                statistics.median(seconds[number]),
                work[number].forward_flops,
                work[number].backward_flops,
                work[number].activation_bytes,
                tuple(seconds[number]),
            )
            for number in wanted
        ]

    def _step(self) -> float:
        self._synchronize()
        start = time.perf_counter()
        torch.autograd.backward(self._loss())
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._synchronize()
        return time.perf_counter() - start

    def _loss(self) -> torch.Tensor:
        """The sum over all outputs of their mean."""
        outputs = [t for t in tree_leaves(self._forward()) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not outputs:
            raise ValueError("no output depends on a weight that is trained")
        return torch.stack([(t.abs() if t.is_complex() else t).float().mean() for t in outputs]).sum()

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


@contextmanager
def _frozen(adapter: TorchAdapter, names: list[str]) -> Iterator[None]:
    adapter.freeze(names)
    try:
        yield
    finally:
        adapter.unfreeze(names)


@contextmanager
def _explained(what: str, hint: str) -> Iterator[None]:
    """Turn whatever the user's model raises into an error that says what was tried."""
    try:
        yield
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise RecipeError(f"{what}: {type(error).__name__}: {text}\n{hint}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _explained(f"--device is {name!r}, which PyTorch does not know", "Use cpu, cuda, or cuda:1."):
        return torch.device(name)


def _grid(prefixes: Sequence[int], num_layers: int) -> list[int]:
    """Numbers of layers to freeze, 0 first.

    Raises:
        RecipeError: If a number is negative, or leaves no layer to train.
    """
    most = num_layers - 1
    wrong = [number for number in prefixes if not 0 <= number <= most]
    if wrong:
        raise RecipeError(
            f"--prefix has {wrong}, but the model has {num_layers} layers that are trained, and the last one stays "
            f"trained. Use numbers from 0 to {most}."
        )
    parts = min(VALUES, most)
    even = [round(most * part / parts) for part in range(1, parts + 1)]
    return sorted({0, *(prefixes or even)})


def load_model(source: str) -> nn.Module:
    """Call what `module:callable` names; modules in the current directory are found first.

    Raises:
        RecipeError: If it cannot be found, fails, or returns something else than a `torch.nn.Module`.
    """
    module_name, _, attribute = source.partition(":")
    if not module_name or not attribute:
        raise RecipeError(
            f"{source!r} does not name a model; expected module:callable, for example torchvision.models:resnet50, or "
            "mymodels:build with mymodels.py in the current directory."
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise RecipeError(
                f"Module {module_name!r} cannot be imported ({error}). Run the command in the folder of "
                f"{module_name.partition('.')[0]}.py, or install the package that has it."
            ) from error
        found = getattr(module, attribute, None)
        if not callable(found):
            raise RecipeError(
                f"Module {module_name!r} has no callable named {attribute!r}. Name a function or class of that module "
                "that returns the model."
            )
        with _explained(f"{source} failed", "It has to build the model when it is called without arguments."):
            model = found()
    finally:
        sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise RecipeError(f"{source} returns {type(model).__name__}; expected a torch.nn.Module. Return the model.")
    return model


def table(result: Estimate) -> list[tuple[str, ...]]:
    """What freezing saves, a header row first; `+-` is half of the interquartile range of the steps."""
    full = result.prefixes[0]
    rows: list[tuple[str, ...]] = [
        ("frozen", "up to layer", "step GFLOPs", "saved", "step ms", "+-", "saved", "activations MiB", "saved")
    ]
    for prefix in result.prefixes:
        flops, all_flops = (p.forward_flops + p.backward_flops for p in (prefix, full))
        rows.append(
            (
                f"{prefix.num_frozen} of {len(result.layers)}",
                prefix.last_frozen if prefix.num_frozen else "-",
                f"{flops / 1e9:.4g}",
                _saved(flops, all_flops),
                f"{1000 * prefix.step_seconds:.4g}",
                _short(1000 * prefix.spread),
                _saved(prefix.step_seconds, full.step_seconds),
                f"{prefix.activation_bytes / 2**20:.4g}",
                _saved(prefix.activation_bytes, full.activation_bytes),
            )
        )
    return rows


def busy(result: Estimate) -> str:
    """A warning if the times scatter so much that they say little; else nothing."""
    scatter = statistics.median(prefix.spread / prefix.step_seconds for prefix in result.prefixes)
    if scatter <= NOISY:
        return ""
    return (
        f"The times scatter by {scatter:.0%}: something else keeps the machine busy. FLOPs and activations are exact all "
        "the same;\nfor the times, try again with more --rounds."
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _saved(part: float, whole: float) -> str:
    return f"{1 - part / whole:.1%}" if whole else "-"


def layer_table(result: Estimate) -> list[tuple[str, ...]]:
    """The cost of each layer, a header row first."""
    rows: list[tuple[str, ...]] = [("layer", "forward ms", "input gradient ms", "weight gradient ms", "")]
    for name, cost in result.costs.items():
        values = (cost.forward, cost.input_gradient, cost.weight_gradient)
        remark = "estimated from FLOPs" if name in result.estimated else ""
        rows.append((name or "(the model)", *(f"{1000 * value:.4g}" for value in values), remark))
    parts = ("forward", "input_gradient", "weight_gradient")
    sums = (sum(getattr(cost, part) for cost in result.costs.values()) for part in parts)
    return [*rows, ("all layers", *(f"{1000 * value:.4g}" for value in sums), "")]


def text(rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text: names to the left, numbers to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    names = [column[0] in ("up to layer", "layer", "") for column in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_name else cell.rjust(width)
            for cell, width, is_name in zip(row, widths, names, strict=True)
        ).rstrip()
        for row in rows
    )


def to_dict(result: Estimate, options: EstimateOptions) -> dict[str, Any]:
    """Return the figures, and what was asked for, ready for JSON."""
    return {"options": asdict(options), "torch": torch.__version__, **asdict(result)}


def save(result: Estimate, options: EstimateOptions, path: Path) -> None:
    """Write the figures as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(to_dict(result, options), indent=1))
