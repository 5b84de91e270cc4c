"""The methods that SmartFRZ is compared with, as policies: pass one in place of a predictor.

    SmartFRZ(model, optimizer, AutoFreeze(epochs=10), total_steps=len(loader) * 10)

`smartfrz.baselines.similarity_guided.SimilarityGuided`, which needs a finished reference model, is another.
`EarlyStop` is not a policy: it tells how many steps full training gets instead.
"""

from smartfrz.baselines.auto_freeze import AutoFreeze as AutoFreeze
from smartfrz.baselines.early_stop import EarlyStop as EarlyStop
from smartfrz.baselines.full_training import FullTraining as FullTraining
from smartfrz.baselines.grades import GradES as GradES
from smartfrz.baselines.linear_freezing import LinearFreezing as LinearFreezing
from smartfrz.baselines.weight_change import WeightChange as WeightChange

__all__ = ["AutoFreeze", "EarlyStop", "FullTraining", "GradES", "LinearFreezing", "WeightChange"]
