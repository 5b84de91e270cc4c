"""Which layer is worth freezing next: the bar that each layer's confidence has to reach. Pure."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

FreezeOrder = Literal["free", "prefix", "cost_aware"]
ORDERS: tuple[str, ...] = get_args(FreezeOrder)
# How far saving twice as much as a layer's fair share lowers the bar, in logits, and how far at most.
# A threshold of 0.70 becomes 0.54 for a layer that closes a prefix of four, 0.79 for an interior one.
LOGITS_PER_DOUBLING = 0.35
MOST_LOGITS = 1.0


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs in one training step, in seconds (or in another unit, the same for all layers).

    Attributes:
        forward: Cost of the forward pass.
        input_gradient: Cost of the gradient with respect to the layer's input. Needed as long as any
            layer before it is trained.
        weight_gradient: Cost of the gradient with respect to the layer's weights. Needed as long as the
            layer itself is trained.
    """

    forward: float
    input_gradient: float
    weight_gradient: float


def backward_cost(
    layers: Sequence[str], stopped: Collection[str], costs: Mapping[str, LayerCost]
) -> tuple[float, float, float]:
    """Return what a backward pass costs while some layers are frozen, and what that saves.

    The pass ends at the first layer that is trained: nothing before it needs a gradient, and its own
    input does not either. Behind it a frozen layer still passes gradients on.

    Args:
        layers: All layers in execution order.
        stopped: The frozen layers.
        costs: What each layer costs.

    Returns:
        The cost that remains; what is saved in the frozen prefix, where no gradient is computed (with
        the input gradient of the first trained layer, which the prefix spares); and what is saved
        behind the prefix, in the interior: weight gradients.
    """
    stopped = set(stopped)
    remaining = prefix = interior = 0.0
    closed = True
    for index, layer in enumerate(layers):
        weight = costs[layer].weight_gradient
        inside = costs[layer].input_gradient if index else 0.0  # the data needs no gradient
        if closed:
            prefix += inside
        else:
            remaining += inside
        if layer not in stopped:
            closed = False
            remaining += weight
        elif closed:
            prefix += weight
        else:
            interior += weight
    return remaining, prefix, interior


def savings(
    layers: Sequence[str], stopped: Collection[str], costs: Mapping[str, LayerCost], cached: bool = False
) -> dict[str, float]:
    """Return what each trained layer would save of a backward pass if it were frozen next.

    With `cached` the forward pass counts as well: the outputs of a frozen prefix are kept, so it does not run at all.
    """
    stopped = set(stopped)
    live = [index for index, layer in enumerate(layers) if layer not in stopped]
    saved = {layers[index]: costs[layers[index]].weight_gradient for index in live}
    if live:
        next_live = live[1] if len(live) > 1 else len(layers) - 1
        saved[layers[live[0]]] += sum(costs[layer].input_gradient for layer in layers[live[0] + 1 : next_live + 1])
        if cached:
            end = live[1] if len(live) > 1 else len(layers)
            saved[layers[live[0]]] += sum(costs[layer].forward for layer in layers[live[0] : end])
    return saved


@dataclass(frozen=True)
class Ordering:
    """In which order layers may freeze, and at which confidence.

    Attributes:
        layers: All layers in execution order, including layers that the user froze.
        threshold: Confidence from which a layer is frozen, in (0, 1].
        order: `free`: wherever the confidence reaches the threshold, as in the paper. `prefix`: as
            `free`, but front to back only. `cost_aware`: the bar depends on the time that freezing
            the layer would save now, compared with a layer's fair share of a backward pass. An interior
            layer saves only its weight gradient and needs more confidence; a live layer that blocks a
            long frozen prefix saves the input gradients of all of it, and needs less.
        costs: What each layer costs. Without costs `cost_aware` is `free`.
        cached: Whether the outputs of a frozen prefix are kept, so that closing it saves its forward pass, too.
    """

    layers: Sequence[str]
    threshold: float
    order: FreezeOrder = "free"
    costs: Mapping[str, LayerCost] = field(default_factory=dict)
    cached: bool = False

    def bars(self, stopped: Collection[str]) -> dict[str, float]:
        """Return the confidence that each layer has to reach while the `stopped` layers are frozen."""
        bars = dict.fromkeys(self.layers, self.threshold)
        if self.order != "cost_aware" or not self.costs or self.threshold >= 1.0:
            return bars
        fair = backward_cost(self.layers, (), self.costs)[0] / len(self.layers)
        if fair <= 0.0:
            return bars
        logit = math.log(self.threshold / (1.0 - self.threshold))
        for layer, saved in savings(self.layers, stopped, self.costs, self.cached).items():
            lower = LOGITS_PER_DOUBLING * math.log2(max(saved / fair, 1e-6))
            bars[layer] = 1.0 / (1.0 + math.exp(min(max(lower, -MOST_LOGITS), MOST_LOGITS) - logit))
        return bars

    def may_freeze(self, layer: str, stopped: Collection[str]) -> bool:
        """Return whether the order lets this layer freeze, if the `stopped` layers are or will be frozen."""
        if self.order != "prefix":
            return True
        return all(before in stopped for before in self.layers[: self.layers.index(layer)])
