"""transposable: masks that are 2:4 along rows and along columns, so W and W transposed both pack.

A 4x4 block with two kept weights in every row and every column has one of 90 masks. All are tried,
so the kept score of each block is the largest there is. Source: Hubara et al. 2021,
arXiv 2102.08124, section 3 (the problem; solved there approximately).
"""

from __future__ import annotations

import functools
from itertools import combinations, product

import torch
from torch import Tensor

SIDE, KEPT = 4, 2  # a block of SIDE x SIDE keeps KEPT in each row and column
BATCH = 1 << 16  # blocks scored at once: 90 float32 numbers each, 24 MB


@functools.cache
def block_masks() -> Tensor:
    """bool [90, 4, 4]: every mask with two kept in each row and column, in lexical order.

    Row by row, a mask that keeps lower columns comes first.
    """
    rows = [[i in kept for i in range(SIDE)] for kept in combinations(range(SIDE), KEPT)]
    found = [
        choice
        for choice in product(rows, repeat=SIDE)
        if all(sum(column) == KEPT for column in zip(*choice, strict=True))
    ]
    return torch.tensor(found)


def transposable_mask(scores: Tensor) -> Tensor:
    """The mask of the highest kept score that is 2:4 along both axes.

    Args:
        scores: [..., N, K], float; N and K are padded to multiples of 4 with zeros.

    Returns:
        bool like `scores`: two kept in each full group of 4 along K and along N; at the edges at
        most two. Of equal masks the first of `block_masks` is taken.
    """
    n, k = scores.shape[-2:]
    padded = torch.nn.functional.pad(scores, (0, -k % SIDE, 0, -n % SIDE))
    blocks = padded.unflatten(-1, (-1, SIDE)).unflatten(-3, (-1, SIDE)).transpose(-3, -2)
    flat = blocks.reshape(-1, SIDE * SIDE)
    # -inf marks weights that should go first; as a number, because -inf * 0 is NaN.
    finite = flat.masked_fill(torch.isinf(flat), 0.0).abs().max() if flat.numel() else 0.0
    flat = flat.double().nan_to_num(neginf=-SIDE * SIDE * float(finite) - 1)
    masks = block_masks().to(scores.device)
    values = masks.flatten(1).double().T
    best = torch.cat([(part @ values).argmax(1) for part in flat.split(BATCH)])
    chosen = masks[best].view(blocks.shape).transpose(-3, -2)
    return chosen.flatten(-4, -3).flatten(-2)[..., :n, :k].contiguous()
