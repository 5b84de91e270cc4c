"""What becomes of frozen layers that no longer stand still. Pure: nothing here changes a model."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Disturbance = Literal[
    "trainable",  # somebody made it trainable again; it has not moved
    "trained",  # somebody made it trainable again, and it has moved
    "moved",  # its weights moved, although nobody made it trainable
    "statistics",  # its buffers moved, such as the statistics of a norm
]


@dataclass
class Verdict:
    """What to do about the disturbed layers.

    Attributes:
        set_back: Layers to be frozen again.
        held: Those of them that are made trainable again and again, and are found to be so for the first time.
        believed: Layers to be thawed, since the user made them trainable again, once.
        moved: Layers to be thawed for good, with what moved.
    """

    set_back: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    believed: list[str] = field(default_factory=list)
    moved: dict[str, Disturbance] = field(default_factory=dict)


class FrozenWatch:
    """Decides what a disturbance of a frozen layer means.

    - A layer that is made trainable again is frozen again. If it is trainable again by the next look, or once more
      after it was thawed, then the training loop switches it on and off, as GAN loops do with whole models: it is held
      from then on. If not, somebody meant it: the layer is thawed.
    - A layer that was made trainable again and has been trained is thawed, too; if it happens a second time, for good.
    - A layer that moved although nobody made it trainable cannot be frozen in this training loop: it is thawed for good.

    Attributes:
        barred: Layers that are not frozen any more.
    """

    def __init__(self) -> None:
        self.barred: set[str] = set()
        self._pending: set[str] = set()  # set back at the last look
        self._believed: set[str] = set()
        self._held: set[str] = set()

    def judge(self, disturbed: Mapping[str, Disturbance], frozen: Collection[str]) -> Verdict:
        """Decide, at one look at the frozen layers.

        Args:
            disturbed: What the adapter found.
            frozen: The frozen layers.
        """
        verdict = Verdict()
        quiet = [layer for layer in frozen if layer in self._pending and layer not in disturbed]
        for layer, what in disturbed.items():
            comes_back = layer in self._pending or layer in self._believed
            if what == "trainable":
                verdict.set_back.append(layer)
                if layer in self._held:
                    continue
                if comes_back:
                    self._held.add(layer)
                    verdict.held.append(layer)
                else:
                    self._pending.add(layer)
            elif what == "trained" and not comes_back and layer not in self._held:
                verdict.believed.append(layer)
            else:
                verdict.moved[layer] = what
        verdict.believed += quiet
        self._believed.update(verdict.believed)
        self.barred.update(verdict.moved)
        self._pending.difference_update(verdict.held, verdict.believed, verdict.moved)
        return verdict

    def thawed(self, layers: Iterable[str]) -> None:
        """Note that these layers are trained again."""
        self._pending.difference_update(layers)

    def state(self) -> dict[str, Any]:
        """Return what a saved state keeps: plain data."""
        return {
            "barred": sorted(self.barred),
            "pending": sorted(self._pending),
            "believed": sorted(self._believed),
            "held": sorted(self._held),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.barred, self._pending, self._believed, self._held = (
            set(state[name]) for name in ("barred", "pending", "believed", "held")
        )
