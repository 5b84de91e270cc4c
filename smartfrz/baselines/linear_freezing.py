"""Linear Freezing, or FreezeOut: the learning rate of each layer falls to zero at a moment of its own."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from smartfrz.control.policy import Policy

Spacing = Literal["linear", "cubic"]


class LinearFreezing(Policy):
    """Anneals each layer's learning rate to zero, front to back, and then freezes the layer.

    Needs the length of the run. The factor multiplies the learning rate of the layer's parameter group: if that is
    constant, the rates follow Eq. 6. A scheduler of yours multiplies in.

    Args:
        t_0: When the first layer freezes, as a fraction of the run, in (0, 1].
        spacing: How the other layers' moments are spread between `t_0` and the end. `linear`, or `cubic`: the
            cubes of the linear moments, so that the first layer freezes at the cube of `t_0`.
        scale_lr: Start each layer at `1 / t_i` times its learning rate, so that the sum of its rates over the run
            is the same for every layer.
        anneal: Whether to change learning rates. If not, layers freeze at the same moments all the same.

    Raises:
        ValueError: If `t_0` is outside of (0, 1], the spacing is unknown, or `scale_lr` comes
            without `anneal`.

    Source:
        Brock et al. 2017 (arXiv 1706.04983) and their code; paper, Eq. 6 and Appendix B, whose best
        setting is the default here. Departures: a layer freezes at the first freezing stage from its
        moment on (30 stages a run; `record_every=1` freezes at once), and stands still until then,
        since its learning rate is zero; batch norm statistics are corrected when a layer freezes, as
        for every policy; biases and norms belong to the layer before them.
    """

    name = "linear-freezing"
    freeze_order = "prefix"

    def __init__(self, t_0: float = 0.5, *, spacing: Spacing = "linear", scale_lr: bool = False, anneal: bool = True):
        if not 0.0 < t_0 <= 1.0:
            raise ValueError(
                f"`t_0` is {t_0!r}; expected a fraction of the run in (0, 1], such as 0.5: from then on layers freeze."
            )
        if spacing not in get_args(Spacing):
            raise ValueError(f"`spacing` is {spacing!r}; expected one of {', '.join(get_args(Spacing))}.")
        if scale_lr and not anneal:
            raise ValueError(
                "LinearFreezing received scale_lr=True and anneal=False; expected at most one of them, since scale_lr "
                "changes learning rates and anneal=False does not. Leave one of them out."
            )
        self.t_0 = float(t_0)
        self.spacing = spacing
        self.scale_lr = scale_lr
        self.anneal = self.scales_learning_rates = anneal

    def settings(self) -> dict[str, Any]:
        """Return all arguments."""
        return {"t_0": self.t_0, "spacing": self.spacing, "scale_lr": self.scale_lr, "anneal": self.anneal}

    def record_every(self, total_steps: int | None) -> int | None:
        """Return a 30th of the run.

        Raises:
            ValueError: If the run's length is not known.
        """
        if total_steps is None:
            raise ValueError(
                "LinearFreezing freezes layers at fractions of the run, and received no `total_steps`; expected the "
                "optimizer steps of the whole run. Pass total_steps=len(loader) * epochs."
            )
        return super().record_every(total_steps)

    def begin(self, adapter: Any, layers: Sequence[str], *, total_steps: int | None, seed: int) -> None:
        """Set the moment of each layer that may be frozen."""
        self._total_steps = total_steps or 1  # `record_every` refuses an unknown length
        self.layers_changed(layers)

    def layers_changed(self, layers: Sequence[str]) -> None:
        """Spread the moments over these layers."""
        self._moments = dict(zip(layers, moments(len(layers), self.t_0, self.spacing), strict=True))

    def confidence(self, layers: list[str], *, step: int) -> dict[str, float]:
        """Return 1 from a layer's moment on, 0 before."""
        progress = step / self._total_steps
        return {layer: float(progress >= self._moments[layer]) for layer in layers}

    def lr_scales(self, active: list[str], *, step: int) -> dict[str, float]:
        """Return Eq. 6, divided by the layer's learning rate."""
        if not self.anneal:
            return {}
        progress = step / self._total_steps
        return {layer: annealed(progress, self._moments[layer], scale_lr=self.scale_lr) for layer in active}


def moments(num_layers: int, t_0: float, spacing: Spacing = "linear") -> list[float]:
    """Return when each layer freezes, as fractions of the run: the first at `t_0` (or its cube), the last at the end.

    Example:
        >>> moments(3, 0.5)
        [0.5, 0.75, 1.0]
        >>> moments(3, 0.5, "cubic")
        [0.125, 0.421875, 1.0]
    """
    linear = [t_0 + (1.0 - t_0) * index / max(1, num_layers - 1) for index in range(num_layers)]
    return linear if spacing == "linear" else [t**3 for t in linear]


def annealed(progress: float, moment: float, *, scale_lr: bool = False) -> float:
    """Return Eq. 6, divided by the initial learning rate: a half cosine from 1 to 0 at the layer's moment, then 0.

    Args:
        progress: Share of the run that is done, in [0, 1].
        moment: When the layer freezes, in (0, 1].
        scale_lr: Start at `1 / moment` instead of 1.

    Example:
        >>> round(annealed(0.25, 0.5), 6)
        0.5
    """
    if progress >= moment:
        return 0.0  # exactly: a rounding error would move the layer
    factor = 0.5 * (1.0 + math.cos(math.pi * progress / moment))
    return factor / moment if scale_lr else factor
