"""permutation: an order of input channels in which 2:4 loses less.

    find_permutation(weight) -> order          weight[:, order] keeps more magnitude at 2:4

pruning.reorder gives the layers that make the channels the same order.

The search anneals swaps of columns between groups of four and ends with best splits of pairs of
groups (pruning.column_groups). What an order can gain at all falls with the number of rows, since
one order serves every row: on independent normal weights no order of a 1024 x 1024 matrix is
expected to go further than 22 % of the way to dropping half of each row freely (first-moment
bound over all orders, benchmarks.pruning_permutation). Where channels differ in size the search
goes much further.
Source: Pool & Yu 2021, "Channel permutations for N:M sparsity", NeurIPS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimgemm.pruning.column_groups import GROUP, ColumnGroups
from slimgemm.pruning.layers import check_finite
from slimgemm.pruning.patterns import NofM, rows_of

SETTLE = 300  # most rounds of best splits after annealing


def kept_magnitude(weight: Tensor) -> float:
    """Magnitude that 2:4 keeps of a weight [N, K] or [O, I, kh, kw], in its present order."""
    size = weight.detach().double().abs()
    return float((size * NofM(2, 4).mask(size)).sum())


def find_permutation(weight: Tensor, *, rounds: int = 1000, seed: int = 0) -> Tensor:
    """An order of input channels that raises the magnitude kept at 2:4.

    Args:
        weight: [N, K], or [O, I, kh, kw] with groups along I at each tap.
        rounds: of annealing, each with a swap between every group and another one; a round takes
            time like N * K. At most as many rounds of best splits follow, and at most 300.
        seed: of pairs and swaps.

    Returns:
        int64 [K] (or [I]): `weight[:, order]` keeps at least what `weight` does. Where 4 does not
        divide K the last K % 4 columns stay in place.

    Raises:
        ValueError: the weight is no matrix or 2-D convolution, or holds NaN or infinity.
    """
    if weight.ndim not in (2, 4):
        raise ValueError(f"weight must be [N, K] or [O, I, kh, kw], got {list(weight.shape)}")
    check_finite("weight", weight.detach())
    size = rows_of(weight.detach()).flatten(0, 1).abs().float().T.contiguous()  # [K, rows]
    whole = size.shape[0] // GROUP
    order = torch.arange(size.shape[0])
    if whole < 2:
        return order
    search = ColumnGroups(size, order[: whole * GROUP].view(whole, GROUP).clone(), seed)
    default = search.kept()
    search.anneal(rounds)
    search.settle(min(rounds, SETTLE))
    if search.kept() > default:
        order[: whole * GROUP] = search.groups.flatten()
    return order
