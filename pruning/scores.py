"""Scores: how much each weight matters. Higher is kept.

A score returns one number per weight and never knows a pattern; the pattern sums the numbers of
the weights that it drops together. So p=2 sums squares: a row's score is its squared L2 norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Needs = Literal["weight", "norm", "inputs", "gradients"]


@dataclass(frozen=True)
class Context:
    """What a score may read of a layer besides its weight.

    Args:
        name: dotted name of the layer.
        seed: seed of this layer, different for each layer of a plan.
        statistics: what calibration gathered for the layer (see the score's `needs`), or None.
        norm: [N] scale of the batch normalisation that follows the layer, or None.
    """

    name: str
    seed: int = 0
    statistics: Tensor | None = None
    norm: Tensor | None = None


class Score:
    """What every score answers.

    `needs` says what must be gathered before: "weight" (nothing), "norm" (the scale of the batch
    normalisation behind the layer), "inputs" (sums over calibration inputs) or "gradients".
    `axis` says which channels the score speaks of when whole channels are dropped: the rows of
    the layer that makes them ("out") or the columns of the layers that read them ("in").
    """

    needs: ClassVar[Needs] = "weight"
    axis: ClassVar[Literal["out", "in"]] = "out"

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """Scores, float32 or float64, shape of `weight`."""
        raise NotImplementedError

    def statistic(self, module: nn.Module) -> Any:
        """What to sum over the inputs of a layer, for scores that need "inputs"."""
        raise NotImplementedError


def as_float(weight: Tensor) -> Tensor:
    """float64 stays, every other dtype becomes float32: |w|**p of a half would overflow."""
    return weight if weight.dtype == torch.float64 else weight.float()


@dataclass(frozen=True)
class Magnitude(Score):
    """|w|**p: large weights stay.

    Args:
        p: exponent, > 0. Between single weights every p gives one order; it matters where
            weights are dropped together or compared across layers.

    Source: Han et al. 2015, arXiv 1506.02626, section 3.
    """

    p: float = 1

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise ValueError(f"p must be positive, got {self.p}")

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """|w|**p, shape of `weight`."""
        size = as_float(weight).abs()
        return size if self.p == 1 else size.pow(self.p)


@dataclass(frozen=True)
class Random(Score):
    """Uniform numbers in [0, 1) from the seed of the layer: the baseline that a score must beat."""

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """Random scores, the same on every device for one seed."""
        generator = torch.Generator().manual_seed(context.seed)
        return torch.rand(weight.shape, generator=generator).to(weight.device)


@dataclass(frozen=True)
class GeometricMedian(Score):
    """Distance of a filter to all others of its layer: filters that others can replace go first.

    Every weight of filter i gets sum_j ||w_i - w_j|| / (weights of the filter).

    Source: He et al. 2019, arXiv 1811.00250, equation 5.
    """

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """One number per row, spread over the row: its sum over the row is the distance."""
        rows = as_float(weight).flatten(1)
        distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
        return spread(distance, weight)


@dataclass(frozen=True)
class BatchNormScale(Score):
    """|gamma| of the batch normalisation behind the layer (network slimming).

    Source: Liu et al. 2017, arXiv 1708.06519, section 3.
    """

    needs: ClassVar[Needs] = "norm"

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """|gamma| of each row, spread over the row."""
        if context.norm is None:
            raise ValueError(
                f"{context.name}: no batch normalisation with a scale follows this layer, so "
                "BatchNormScale has nothing to read; ignore the layer or use another score"
            )
        return spread(as_float(context.norm).abs(), weight)


@dataclass(frozen=True)
class Function(Score):
    """A user's own score.

    Args:
        function: (weight, context) -> scores of the weight's shape, higher is kept.
    """

    function: Callable[[Tensor, Context], Tensor] = field(repr=False)

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """The user's scores, checked for shape."""
        scores = self.function(weight, context)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{context.name}: a score must return a tensor of shape "
                f"{list(weight.shape)}, got {got}"
            )
        if bool(scores.isnan().any()):
            place = scores.isnan().nonzero()[0].tolist()
            raise ValueError(f"{context.name}: a score must hold no NaN, got one at {place}")
        return as_float(scores)


def spread(per_row: Tensor, weight: Tensor) -> Tensor:
    """[N] as scores of the weight's shape whose sum over row i is per_row[i]."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    return (per_row / weight[0].numel()).reshape(shape).expand(weight.shape)
