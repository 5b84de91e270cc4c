"""The methods that SmartFRZ is compared with, as policies: pass one in the place of a predictor.

    SmartFRZ(model, optimizer, AutoFreeze(epochs=10), total_steps=len(loader) * 10)

`smartfrz.dataset_builder.oracle.SimilarityGuided`, which needs a finished reference model, is one more. `EarlyStop` is no
policy: it says how long to train fully instead.
"""

from smartfrz.baselines.auto_freeze import AutoFreeze as AutoFreeze
from smartfrz.baselines.early_stop import EarlyStop as EarlyStop
from smartfrz.baselines.full_training import FullTraining as FullTraining
from smartfrz.baselines.linear_freezing import LinearFreezing as LinearFreezing
from smartfrz.baselines.weight_change import WeightChange as WeightChange

__all__ = ["AutoFreeze", "EarlyStop", "FullTraining", "LinearFreezing", "WeightChange"]
