"""reconstruction: which input channels a layer can do without, judged by its own outputs.

With the Gram matrix G of a layer's inputs, dropping a set T of channels changes the outputs by
1_T^T A 1_T; A[c, d] sums G * (W^T W) over the taps of channels c and d. Both ways read A only:

    greedy   drop, one after the other, the channel that adds least to the error
    lasso    min over b of  b^T A b / 2 - (A 1)^T b + lambda |b|_1,  lambda falling: channels whose
             factor b stays zero longest go first

`repair=LeastSquares()` then fits the weights of the channels that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from slimgemm.pruning.activations import read
from slimgemm.pruning.calibrate import Gram
from slimgemm.pruning.patterns import like_weight, rows_of
from slimgemm.pruning.scores import Context, Needs, Score

LAMBDAS = 60  # steps of the lasso path, from the first channel that enters down to 1e-4 of it
STEPS = 100  # proximal gradient steps for each of them, each starting from the last


def interaction(weight: Tensor, gram: Tensor, taps: int) -> Tensor:
    """A: float64 [channels, channels], by which error a pair of dropped channels adds.

    Args:
        weight: float64 [rows, taps * channels].
        gram: float64 [taps * channels, taps * channels].
        taps: taps per channel.
    """
    full = gram * (weight.T @ weight)
    return full.view(taps, -1, taps, full.shape[0] // taps).sum(dim=(0, 2))


def greedy_order(a: Tensor) -> Tensor:
    """int64 [channels]: channels in the order in which they are dropped."""
    left = torch.ones(a.shape[0], dtype=torch.bool, device=a.device)
    added = a.diagonal().clone()
    order = []
    for _ in range(a.shape[0]):
        cost = torch.where(left, added, float("inf"))
        # of equal costs the higher index goes first, so that the lower one stays
        c = a.shape[0] - 1 - int(cost.flip(0).argmin())
        left[c] = False
        order.append(c)
        added += 2 * a[c]
    return torch.tensor(order, device=a.device)


def lasso_entry(a: Tensor) -> Tensor:
    """float64 [channels]: the largest lambda of the path at which a channel has a factor."""
    goal = a.sum(1)
    start = float(goal.abs().max())
    entry = torch.zeros_like(goal)
    if start == 0:
        return entry
    step = 1 / float(torch.linalg.matrix_norm(a, 2))
    b = torch.zeros_like(goal)
    for value in torch.logspace(0, -4, LAMBDAS, dtype=torch.float64) * start:
        for _ in range(STEPS):
            moved = b - step * (a @ b - goal)
            b = moved.sign() * (moved.abs() - step * float(value)).clamp_min(0)
        entry = torch.where((b != 0) & (entry == 0), float(value), entry)
    return entry


@dataclass(frozen=True)
class Reconstruction(Score):
    """How much a layer's outputs need each of its input channels; for Channels, where it is read.

    Args:
        method: "greedy" (ThiNet) or "lasso" (channel pruning by regression).

    Source: Luo et al. 2017, arXiv 1707.06342, section 3.2 (greedy); He et al. 2017,
    arXiv 1707.06168, equation 1 (lasso).
    """

    method: Literal["greedy", "lasso"] = "greedy"
    needs: ClassVar[Needs] = "inputs"
    axis: ClassVar[Literal["out", "in"]] = "in"

    def __post_init__(self) -> None:
        if self.method not in ("greedy", "lasso"):
            raise ValueError(f"method must be 'greedy' or 'lasso', got {self.method!r}")

    def statistic(self, module: nn.Module) -> Any:
        """The Gram matrix."""
        return Gram(module)

    def per_channel(self, a: Tensor) -> Tensor:
        """float64 [channels] in [0, 1]; the least needed is lowest."""
        if self.method == "lasso":
            entry = lasso_entry(a)
            return entry / entry.max().clamp_min(1e-300)
        order = greedy_order(a)
        rank = torch.empty(order.numel(), dtype=torch.float64, device=a.device)
        rank[order] = torch.arange(1, order.numel() + 1, dtype=rank.dtype, device=a.device)
        return rank / order.numel()

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """float64; a column's scores sum to its channel's value, over all taps."""
        grams = read(context).to(weight.device)
        view = rows_of(weight).double()
        parts = []
        for part, gram in zip(view.chunk(grams.shape[0]), grams, strict=True):
            value = self.per_channel(interaction(part.flatten(1), gram, part.shape[1]))
            parts.append((value / (part.shape[0] * part.shape[1])).expand(part.shape))
        return like_weight(torch.cat(parts), weight.shape)
