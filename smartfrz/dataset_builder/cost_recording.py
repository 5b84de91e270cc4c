"""Measures what freezing costs while a training is recorded; finished branches are kept in a file."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from smartfrz.dataset_builder.branches import NORM_BATCHES, Branches
from smartfrz.dataset_builder.costs import FreezeCosts
from smartfrz.dataset_builder.models import Network
from smartfrz.dataset_builder.recipes import Recipe
from smartfrz.errors import RecipeError
from smartfrz.files import replacing

logger = logging.getLogger("smartfrz")

MOMENTS = (0.1, 0.25, 0.45, 0.65)
DEPTHS = 4


class CostRecorder:
    """Branches a training at a few moments, with a few depths of frozen layers.

    Args:
        recipe: What is trained.
        network: The network. Its training calls `after_step`.
        kept: The file in which finished branches are kept. Those of an earlier call count if the weights at that moment
            were the same, bit for bit.
        progress: Called with the fraction done of training and branches, in [0, 1], and what is being done.
    """

    def __init__(self, recipe: Recipe, network: Network, kept: Path, progress: Callable[[float, str], None]):
        self._recipe, self._network, self._path, self._progress = recipe, network, kept, progress
        self._kept = self._read()
        self._branches: Branches | None = None
        self._steps: list[int] = []
        self._depths: list[int] = []
        self._found: dict[tuple[int, int], tuple[float, float]] = {}
        self._work = self._done = self._total = 0

    def after_step(self, step: int, total: int) -> None:
        """Branch if it is time. `step` counts from 1 to `total`.

        Raises:
            RecipeError: If the model cannot be copied, or the training is too short.
        """
        if self._branches is None:
            self._branches = self._begin(total)
        self._done += 1
        self._progress(self._done / self._work, "recording")
        if step in self._steps:
            self._branch(self._branches, step)
        # Moments may follow each other so closely that the notes for one are taken at the moment before.
        following = next((moment for moment in (*self._steps, total) if moment > step), step)
        if step == max(following - NORM_BATCHES, max((s for s in self._steps if s < following), default=1)):
            self._branches.note_norms()
        if step == total:
            self._found[total, 0] = self._branches.finish(self._branches.num_layers)

    def _begin(self, total: int) -> Branches:
        branches = self._network.branches()
        layers = branches.num_layers
        self._total = total
        self._steps = sorted({max(1, round(moment * total)) for moment in MOMENTS} - {total})
        if not self._steps:
            raise RecipeError(
                f"Recipe {self._recipe.name!r} trains for {total} step; expected at least 2 to measure what freezing "
                "costs. Train longer, or record without --costs."
            )
        spread = {round(layers * part / (DEPTHS + 1)) for part in range(1, DEPTHS + 1)}
        self._depths = [*sorted(spread - {0, layers}), layers]
        self._work = total + sum((total - step) * (len(self._depths) - 1) for step in self._steps)
        return branches

    def _branch(self, branches: Branches, step: int) -> None:
        weights = branches.weights_sha256()
        for index, depth in enumerate(self._depths):
            length = self._total - step if depth < branches.num_layers else 0
            before, key = self._done, (step, depth)
            number = self._steps.index(step) * len(self._depths) + index + 1
            text = f"branch {number} of {len(self._steps) * len(self._depths)}"

            def on_step(fraction: float, before: int = before, text: str = text) -> None:
                self._progress((before + fraction * self._total - step) / self._work, text)

            if self._kept.get(key, ("",))[0] != weights:
                self._kept[key] = (weights, *branches.finish(depth, on_step))
                self._write()
            self._found[key] = self._kept[key][1:]
            self._done += length

    def costs(self) -> FreezeCosts:
        """Return what was measured. Call it after the last step.

        Raises:
            RecipeError: If the loss of the trained network is not finite on the test data.
        """
        if self._branches is None or (self._total, 0) not in self._found:
            raise RuntimeError("The training has not ended.")
        loss, accuracy = self._found[self._total, 0]
        if not math.isfinite(loss):
            raise RecipeError(
                f"Recipe {self._recipe.name!r}: the loss on the test data is {loss} after the training. Lower "
                "training.learning_rate, or record without --costs."
            )
        ends = np.array([[self._found[step, depth] for depth in self._depths] for step in self._steps])
        return FreezeCosts(
            np.array(self._steps),
            np.array(self._depths),
            ends[..., 0],
            ends[..., 1],
            loss,
            accuracy,
            self._total,
            self._branches.num_examples,
            self._branches.saved(),
        )

    def _read(self) -> dict[tuple[int, int], tuple[str, float, float]]:
        if not self._path.exists():
            return {}
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            if saved["recipe_sha256"] != self._recipe.sha256:
                return {}
            return {
                (int(one["step"]), int(one["depth"])): (
                    str(one["weights_sha256"]),
                    math.nan if one["loss"] is None else float(one["loss"]),
                    math.nan if one["accuracy"] is None else float(one["accuracy"]),
                )
                for one in saved["branches"]
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("Branching %s from the start: %s cannot be read (%s)", self._recipe.name, self._path, error)
            return {}

    def _write(self) -> None:
        branches = [
            {
                "step": step,
                "depth": depth,
                "weights_sha256": weights,
                "loss": None if math.isnan(loss) else loss,
                "accuracy": None if math.isnan(accuracy) else accuracy,
            }
            for (step, depth), (weights, loss, accuracy) in self._kept.items()
        ]
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps({"recipe_sha256": self._recipe.sha256, "branches": branches}), "utf-8")
