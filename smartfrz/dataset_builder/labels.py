"""From CKA curves to labels that say whether it was right to freeze a layer at a timestamp."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

UNKNOWN = -1
Source = Literal["cka", "costs", "both"]


@dataclass(frozen=True)
class LabelRule:
    """When it is right to freeze a layer: when its CKA has stabilised, when it costs little, or both.

    Attributes:
        kind: `forward`: from this timestamp to the end of the run CKA stays within `tolerance` of its
            present value. `backward`: it stayed so over the last `records` timestamps, which is all
            that could be known at that moment.
        tolerance: Largest absolute difference of CKA.
        records: Timestamps that the backward rule looks at.
        source: What is labelled by. `cka`: CKA alone, as in the paper. `costs`: whether freezing everything up to this
            layer costs at most `cost_limit`, as it was measured (`smartfrz-build record --costs`). `both`: the mean of
            both targets; CKA alone for recordings without costs.
        cost_limit: Accuracy that freezing may cost, in percentage points.

    Source:
        Paper, section 3.4: "if the CKA value of a layer stabilizes during the training process, we
        consider this layer is converged". Neither rule nor tolerance is given there; these are ours, and so are costs.
    """

    kind: Literal["forward", "backward"] = "forward"
    tolerance: float = 0.02
    records: int = 10
    source: Source = "cka"
    cost_limit: float = 0.5

    def __post_init__(self) -> None:
        if self.source not in get_args(Source) or not 0 <= self.cost_limit < 100:
            raise ValueError(
                f"LabelRule received source={self.source!r}, cost_limit={self.cost_limit}; expected one of "
                f"{', '.join(get_args(Source))}, and points from 0 to less than 100."
            )
        if self.kind not in ("forward", "backward") or not 0 < self.tolerance < 1 or self.records < 2:
            raise ValueError(
                f"LabelRule received kind={self.kind!r}, tolerance={self.tolerance}, records={self.records}; expected "
                "'forward' or 'backward', a tolerance in (0, 1), and at least 2 records."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, stored with the predictor; what costs do not matter to is left out."""
        found = asdict(self)
        return {key: found[key] for key in ("kind", "tolerance", "records")} if self.source == "cka" else found


def label_layers(cka: NDArray[np.float64], rule: LabelRule) -> NDArray[np.int8]:
    """Label every layer at every timestamp.

    Args:
        cka: Similarity to the reference, float64 `[num_layers, timestamps]`, NaN where undefined.
        rule: When CKA counts as stabilised.

    Returns:
        int8 of the same shape: 1 if freezing was right, 0 if not, -1 where the rule meets NaN or,
        for the backward rule, where too little has been seen.

    Example:
        >>> label_layers(np.array([[0.2, 0.6, 0.9, 0.91]]), LabelRule(tolerance=0.05))
        array([[0, 0, 1, 1]], dtype=int8)
    """
    change = _change(cka, rule)
    # Equal up to rounding counts as within: 0.91 - 0.86 is a little more than 0.05.
    within = change <= rule.tolerance + 1e-12
    return np.where(np.isnan(change), UNKNOWN, within).astype(np.int8)


def soft_targets(cka: NDArray[np.float64], rule: LabelRule, softness: float = 0.5) -> NDArray[np.float32]:
    """How clearly each label holds: what the predictor is trained on.

    A layer whose CKA will still change by 0.021 is not as wrong to freeze as one that will change
    by 0.3. A predictor trained on this margin does better on hard labels, too.

    Args:
        cka: As for `label_layers`.
        rule: When CKA counts as stabilised.
        softness: 0.5 in the label means a change as large as the tolerance; the smaller, the
            steeper. 0 gives the hard labels.

    Returns:
        `1 / (1 + (change / tolerance)^(1 / softness))`, float32 of the shape of `cka`, in [0, 1];
        NaN where the label is unknown.
    """
    change = _change(cka, rule)
    if softness <= 0:
        return np.where(np.isnan(change), np.nan, change <= rule.tolerance + 1e-12).astype(np.float32)
    return (1.0 / (1.0 + (change / rule.tolerance) ** (1.0 / softness))).astype(np.float32)


def _change(cka: NDArray[np.float64], rule: LabelRule) -> NDArray[np.float64]:
    """Largest change of CKA over the span that the rule looks at; NaN where unknown."""
    change = np.full(cka.shape, np.nan)
    for timestamp in range(cka.shape[1]):
        if rule.kind == "forward":
            span = cka[:, timestamp:]
        elif timestamp + 1 < rule.records:
            continue
        else:
            span = cka[:, timestamp + 1 - rule.records : timestamp + 1]
        change[:, timestamp] = np.abs(span - cka[:, timestamp, None]).max(axis=1)  # NaN if any is
    return change
