"""Similarity-guided freezing: an upper bound that knows the finished model, not a method for practice."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_leaves

from smartfrz.adapters.torch.layers import trace_layers
from smartfrz.control.decision import Reason
from smartfrz.control.policy import Policy
from smartfrz.dataset_builder.cka import cka_of_grams
from smartfrz.dataset_builder.labels import LabelRule, label_layers
from smartfrz.dataset_builder.similarity import layer_grams
from smartfrz.errors import UnsupportedModelError
from smartfrz.training import arguments


class SimilarityGuided(Policy):
    """Freezes a layer when the similarity of its output to that of a finished reference model has settled.

    The similarity is CKA on a fixed batch of inputs. It takes a forward pass of the model at every record, which counts
    as time spent deciding.

    Args:
        model: The model that is trained, not wrapped, on the device of the probe.
        reference: The same network, already trained to the end on the same data.
        probe: A batch of at least 4 inputs: a tensor `[batch, ...]`, or a dict of tensors, which are passed as keyword
            arguments to the forward pass. Do not take them from the test data that the run is judged by.
        rule: When CKA counts as settled. Its kind is `backward`, since the rest of the run is unknown.

    Raises:
        ValueError: If the rule looks ahead.
        UnsupportedModelError: If the reference has no layers, or, when training begins, if its layers differ from the
            model's.

    Source:
        Paper, section 3.4 and Table 1: layers freeze at the end of each epoch (`record_every=len(loader)`),
        "if the CKA value of a layer stabilizes". The paper does not define "stabilizes"; the rule here is the one of our
        labels, over the last records.
    """

    name = "similarity-guided"

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        probe: Any,
        *,
        rule: LabelRule = LabelRule("backward", tolerance=0.02, records=3),  # noqa: B008
    ):
        if rule.kind != "backward":
            raise ValueError(
                f"`rule` is of kind {rule.kind!r}, which looks ahead to the end of the run; expected 'backward'."
            )
        self.rule = rule
        self._model = model
        self._probe = probe
        training = {module: module.training for module in reference.modules()}
        args, keywords = arguments(probe)
        self._traced = {layer.name: layer for layer in trace_layers(reference.eval(), *args, **keywords)}
        for module, mode in training.items():
            module.training = mode
        self._grams = layer_grams(reference, list(self._traced.values()), probe)
        self._digests = {"probe": _digest(tree_leaves(probe)), "reference": _digest(reference.state_dict().values())}

    def settings(self) -> dict[str, Any]:
        """Return the rule, and digests of the probe and of the reference."""
        return self.rule.to_dict() | self._digests

    def begin(self, adapter: Any, layers: Sequence[str], *, total_steps: int | None, seed: int) -> None:
        """Forget all similarities.

        Raises:
            UnsupportedModelError: If the model has layers that the reference lacks.
        """
        unknown = [layer for layer in layers if layer not in self._traced]
        if unknown:
            raise UnsupportedModelError(
                f"The model has layers that the reference does not have: {unknown[:4]}; expected the same network, and "
                "neither of them wrapped. Train a reference of the same class."
            )
        self._cka: dict[str, list[float]] = {}

    def record(self, active: list[str], *, ask: bool) -> None:
        """Compare the outputs of the active layers with those of the reference."""
        grams = layer_grams(self._model, [self._traced[layer] for layer in active], self._probe)
        for layer in active:
            self._cka.setdefault(layer, []).append(cka_of_grams(self._grams[layer], grams[layer]))

    def excused(self, active: list[str]) -> dict[str, Reason]:
        """Return the layers with too few comparisons."""
        return {layer: "history_too_short" for layer in active if len(self._cka.get(layer, [])) < self.rule.records}

    def confidence(self, layers: list[str], *, step: int) -> dict[str, float]:
        """Return 1 where the similarity has settled; 0 where it has not, or is undefined."""
        return {layer: float(label_layers(np.array([self._cka[layer]]), self.rule)[0, -1] == 1) for layer in layers}

    def drop(self, layer: str) -> None:
        """Forget the similarities of a layer that was frozen."""
        self._cka.pop(layer, None)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the similarities of each layer, float64 `[records]`, oldest first."""
        return {layer: np.array(values, np.float64) for layer, values in self._cka.items()}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace the similarities."""
        self._cka = {layer: [float(value) for value in values] for layer, values in state.items()}


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
