"""pruning: decide what to drop, drop it, and keep it dropped.

pattern (what goes together) x score (what matters) x amount (how much, where) -> Plan.
"""

from slimgemm.pruning import cost
from slimgemm.pruning.allocate import PerLayer, Uniform
from slimgemm.pruning.cost import count_macs
from slimgemm.pruning.finetune import finetune
from slimgemm.pruning.masks import PackedMask, keep_masks, load_masks, mask_of, masks_state
from slimgemm.pruning.patterns import Block, Channels, Kernel, NofM, Unstructured, Vector
from slimgemm.pruning.plan import LayerPlan, Plan, plan
from slimgemm.pruning.scores import BatchNormScale, Context, GeometricMedian, Magnitude, Random

__all__ = [
    "BatchNormScale",
    "Block",
    "Channels",
    "Context",
    "GeometricMedian",
    "Kernel",
    "LayerPlan",
    "Magnitude",
    "NofM",
    "PackedMask",
    "PerLayer",
    "Plan",
    "Random",
    "Uniform",
    "Unstructured",
    "Vector",
    "cost",
    "count_macs",
    "finetune",
    "keep_masks",
    "load_masks",
    "mask_of",
    "masks_state",
    "plan",
]
