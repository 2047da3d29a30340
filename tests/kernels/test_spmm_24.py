"""spmm_24, spmm_24_dgrad and spmm_24_wgrad: twin, algebra and refusals."""

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels import reference
from slimgemm.kernels.configs import Tile
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.pack_24 import pack_24
from slimgemm.kernels.spmm_24 import spmm_24
from slimgemm.kernels.spmm_24_dgrad import spmm_24_dgrad
from slimgemm.kernels.spmm_24_wgrad import spmm_24_wgrad

TILE = Tile(16, 32, 32)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# name: M, N, K, split
SHAPES = {
    "exact": (32, 64, 64, 1),
    "ragged_m": (19, 32, 32, 1),
    "ragged_n": (16, 37, 32, 1),
    "ragged_k": (16, 32, 51, 1),
    "one_row": (1, 40, 72, 1),
    "no_rows": (0, 32, 32, 1),
    "no_k": (4, 32, 0, 1),
    "split": (16, 33, 130, 3),
    "many": (70, 100, 90, 2),
}


def operands(m, n, k, dtype, device, keep=2, group=4):
    w = random_24(n, k, dtype, keep, group, seed=1, device=device)
    x = randn(m, k, dtype=dtype, seed=2, device=device)
    dy = randn(m, n, dtype=dtype, seed=3, device=device)
    bias = randn(n, dtype=dtype, seed=4, device=device)
    return w, x, dy, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_all_three_products_match_float64(shape, dtype, device):
    m, n, k, split = shape
    w, x, dy, bias = operands(m, n, k, dtype, device)
    packed = pack_24(w)
    y = spmm_24(x, packed, bias, tile=TILE, split=split)
    dx = spmm_24_dgrad(dy, packed, tile=TILE)
    dv = spmm_24_wgrad(dy, x, packed, tile=TILE, split=split)
    xd, wd, dyd, bd = (t.double() for t in (x, w, dy, bias))
    assert_no_worse_than_dense(y, x @ w.t() + bias, xd @ wd.t() + bd, "y")
    assert_no_worse_than_dense(dx, dy @ w, dyd @ wd, "dx")
    dense, exact = dy.t() @ x, dyd.t() @ xd
    exact_packed = Packed24(packed.values.double(), *packed[1:])
    assert_no_worse_than_dense(
        dv,
        reference.gather_24_ref(dense, packed),
        reference.gather_24_ref(exact, exact_packed),
        "dvalues",
    )
