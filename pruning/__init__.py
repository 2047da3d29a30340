"""pruning: decide what to drop, drop it, and keep it dropped.

pattern (what goes together) x score (what matters) x amount (how much, where) -> Plan.
"""

from slimgemm.pruning import cost
from slimgemm.pruning.activations import Wanda, ZeroActivations
from slimgemm.pruning.allocate import ERK, LAMP, Global, PerLayer, Uniform
from slimgemm.pruning.cost import count_macs
from slimgemm.pruning.finetune import finetune
from slimgemm.pruning.gradients import OptimalBrainDamage, Taylor
from slimgemm.pruning.masks import PackedMask, keep_masks, load_masks, mask_of, masks_state
from slimgemm.pruning.patterns import Block, Channels, Kernel, NofM, Unstructured, Vector
from slimgemm.pruning.permutation import find_permutation, permute
from slimgemm.pruning.plan import LayerPlan, Plan, plan
from slimgemm.pruning.repair import ADMM, LeastSquares
from slimgemm.pruning.scores import BatchNormScale, Context, GeometricMedian, Magnitude, Random
from slimgemm.pruning.sparsegpt import OptimalBrainSurgeon, SparseGPT

__all__ = [
    "ADMM",
    "ERK",
    "LAMP",
    "BatchNormScale",
    "Block",
    "Channels",
    "Context",
    "GeometricMedian",
    "Global",
    "Kernel",
    "LayerPlan",
    "LeastSquares",
    "Magnitude",
    "NofM",
    "OptimalBrainDamage",
    "OptimalBrainSurgeon",
    "PackedMask",
    "PerLayer",
    "Plan",
    "Random",
    "SparseGPT",
    "Taylor",
    "Uniform",
    "Unstructured",
    "Vector",
    "Wanda",
    "ZeroActivations",
    "cost",
    "count_macs",
    "find_permutation",
    "finetune",
    "keep_masks",
    "load_masks",
    "mask_of",
    "masks_state",
    "permute",
    "plan",
]
