"""The methods that SmartFRZ is compared with, as policies: pass one in the place of a predictor.

    SmartFRZ(model, optimizer, AutoFreeze(epochs=10), total_steps=len(loader) * 10)

`smartfrz.dataset_builder.oracle.SimilarityGuided`, which needs a finished reference model, is one more.
"""

from smartfrz.baselines.auto_freeze import AutoFreeze as AutoFreeze
from smartfrz.baselines.full_training import FullTraining as FullTraining
from smartfrz.baselines.linear_freezing import LinearFreezing as LinearFreezing
from smartfrz.baselines.weight_change import WeightChange as WeightChange

__all__ = ["AutoFreeze", "FullTraining", "LinearFreezing", "WeightChange"]
