"""Small tiles of mma_sp and its run on NumPy, for the tests of tests/kernels/gluon."""

import gluon_numpy

from slimgemm.kernels.gluon import mma_sp
from slimgemm.kernels.gluon.mma_tiles import MmaTile

# Small tiles that between them use every field: both token and row warps, warps along K, all stage
# sizes, short and long look-ahead.
SMALL = {
    "one_warp": MmaTile(1, 1, 1, 1, 1, 8, 2, 1),
    "k_warps": MmaTile(1, 1, 1, 1, 4, 8, 3, 8),
    "wide": MmaTile(2, 2, 2, 1, 1, 4, 2, 3),
    "token_warps": MmaTile(1, 2, 1, 2, 2, 2, 4, 2),
}


def run_mma_sp(x, weight, tile, splits=1, replace=None, **epilogue):
    """What spmm_24_mma_sp computes, with the kernel on NumPy and the parts added in order."""
    launch = mma_sp.prepare(x, weight, tile=tile, splits=splits, **epilogue)
    gluon_numpy.run(
        mma_sp._mma_sp_kernel, launch.grid, *launch.args, replace=replace, **launch.constants
    )
    if launch.parts is None:
        return launch.out
    total = launch.parts[0]
    for part in launch.parts[1:]:
        total = total + part
    return total.to(x.dtype).view_as(launch.out)
