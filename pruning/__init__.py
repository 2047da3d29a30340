"""pruning: decide what to drop, drop it, and keep it dropped.

pattern (what goes together) x score (what matters) x amount (how much, where) -> Plan.
"""

from slimgemm.pruning import cost
from slimgemm.pruning.activations import Wanda, ZeroActivations
from slimgemm.pruning.allocate import ERK, LAMP, Global, PerLayer, Uniform
from slimgemm.pruning.amc import AMC
from slimgemm.pruning.cost import count_macs
from slimgemm.pruning.finetune import FineTune, finetune
from slimgemm.pruning.gradients import OptimalBrainDamage, Taylor
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.masks import PackedMask, keep_masks, load_masks, mask_of, masks_state
from slimgemm.pruning.netadapt import NetAdapt
from slimgemm.pruning.pareto import Pareto
from slimgemm.pruning.patterns import Block, Channels, Kernel, NofM, Unstructured, Vector
from slimgemm.pruning.permutation import find_permutation
from slimgemm.pruning.plan import LayerPlan, Plan, plan
from slimgemm.pruning.reconstruction import Reconstruction
from slimgemm.pruning.reorder import Reordered, permute
from slimgemm.pruning.repair import ADMM, LeastSquares
from slimgemm.pruning.schedule import (
    Gradual,
    cubic,
    iterate,
    lottery_ticket,
    recalibrate,
    rewind,
    rounds_to,
)
from slimgemm.pruning.scores import BatchNormScale, Context, GeometricMedian, Magnitude, Random
from slimgemm.pruning.search import Search
from slimgemm.pruning.sensitivity import Sensitivity, scan
from slimgemm.pruning.sparsegpt import OptimalBrainSurgeon, SparseGPT
from slimgemm.pruning.task import Infeasible
from slimgemm.pruning.training import (
    BatchNormL1,
    Distillation,
    GroupLasso,
    Lp,
    merge_lora,
    settle,
    train_through_mask,
    with_teacher,
)

__all__ = [
    "ADMM",
    "AMC",
    "ERK",
    "LAMP",
    "BatchNormL1",
    "BatchNormScale",
    "Block",
    "Channels",
    "Context",
    "Distillation",
    "FineTune",
    "GeometricMedian",
    "Global",
    "Gradual",
    "GroupLasso",
    "Infeasible",
    "Kernel",
    "LatencyTable",
    "LayerPlan",
    "LeastSquares",
    "Lp",
    "Magnitude",
    "NetAdapt",
    "NofM",
    "OptimalBrainDamage",
    "OptimalBrainSurgeon",
    "PackedMask",
    "Pareto",
    "PerLayer",
    "Plan",
    "Random",
    "Reconstruction",
    "Reordered",
    "Search",
    "Sensitivity",
    "SparseGPT",
    "Taylor",
    "Uniform",
    "Unstructured",
    "Vector",
    "Wanda",
    "ZeroActivations",
    "cost",
    "count_macs",
    "cubic",
    "find_permutation",
    "finetune",
    "iterate",
    "keep_masks",
    "load_masks",
    "lottery_ticket",
    "mask_of",
    "masks_state",
    "merge_lora",
    "permute",
    "plan",
    "recalibrate",
    "rewind",
    "rounds_to",
    "scan",
    "settle",
    "train_through_mask",
    "with_teacher",
]
