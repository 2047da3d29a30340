"""Operands that the tests of spmm_24 and its gradients share."""

import pytest
import torch
from helpers import randn, random_24

from slimgemm.kernels import reference
from slimgemm.kernels.configs import Tile
from slimgemm.kernels.formats import PATTERNS

TILE = Tile(32, 32, 64)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NAN, INF = float("nan"), float("inf")
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")


def operands(m, n, k, dtype, device, keep=2, group=4, seed=0):
    w = random_24(n, k, dtype, keep, group, seed=seed + 1, device=device)
    x = randn(m, k, dtype=dtype, seed=seed + 2, device=device)
    dy = randn(m, n, dtype=dtype, seed=seed + 3, device=device)
    bias = randn(n, dtype=dtype, seed=seed + 4, device=device)
    return w, x, dy, bias


def kept(dense, packed):
    """Entries of `dense` where `packed` stores a value."""
    return reference.gather_24_ref(dense, packed)
