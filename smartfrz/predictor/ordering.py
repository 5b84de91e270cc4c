"""Which layer is worth freezing next: the bar that each layer's confidence has to reach. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs in one training step, in seconds (or any other unit, the same for all layers).

    Attributes:
        forward: Of the forward pass.
        input_gradient: Of the gradient with respect to the layer's input. Needed as long as any
            layer before it is trained.
        weight_gradient: Of the gradient with respect to the layer's weights. Needed as long as the
            layer itself is trained.
    """

    forward: float
    input_gradient: float
    weight_gradient: float
