"""The 8-bit launchers on a GPU against float64, and their operands packed there."""

import pytest
import torch
from helpers import randn, random_24

from slimgemm.kernels.gluon import orders, pack, pack_dense, unpack
from slimgemm.kernels.gluon.scaled_spmm import scaled_spmm_24_mma_sp, scaled_spmm_24_wgmma_sp
from slimgemm.kernels.quantize_24 import LARGEST, quantize_24, quantize_rows
from slimgemm.kernels.reference import output_error, unpack_24_ref

pytestmark = pytest.mark.gpu
SHAPES = [(1, 16, 16), (8, 130, 1000), (33, 300, 333), (64, 512, 2048), (300, 272, 784)]
# More tiles than multiprocessors, with three stages each: barriers carry their phase over tiles.
MANY_TILES = (2000, 2600, 720)
DTYPES = list(LARGEST)
REPEATS = 20  # launches that must give the same bits: a race moves them


def needs(capability, exact=False):
    found = torch.cuda.get_device_capability()
    if found < capability or (exact and found != capability):
        pytest.skip(f"needs compute capability {capability}, has {found}")


def problem(m, n, k, dtype):
    weight, scale_w = quantize_24(random_24(n, k, seed=n).cuda(), dtype)
    x, scale_x = quantize_rows(randn(m, k, seed=m, device="cuda"), dtype)
    return x, weight, scale_x, scale_w


def compare(launcher, ordered, x, weight, *scales):
    """int8: a few roundings of fp32. e4m3: sums of about 14 bits, cut once per 64 columns."""
    got = launcher(x, ordered, *scales, out_dtype=torch.float32)
    for _ in range(REPEATS):
        assert torch.equal(got, launcher(x, ordered, *scales, out_dtype=torch.float32))
    dense = unpack_24_ref(weight._replace(values=weight.values.double()))
    exact = (x.double() @ dense.t()) * scales[0].double()[:, None] * scales[1].double()
    if x.dtype == torch.int8:
        assert output_error(got, exact) <= 2.0**-21
        return
    steps = -(-weight.k // 64)
    # Partial sums are at most a few times the largest result; 2**-13 of it is lost in a step.
    assert output_error(got, exact) <= 2 * steps * 2.0**-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mma_sp(shape, dtype):
    needs((8, 0) if dtype == torch.int8 else (8, 9))
    x, weight, *scales = problem(*shape, dtype)
    compare(scaled_spmm_24_mma_sp, pack.pack_mma_sp(weight), x, weight, *scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] % 16 == 0] + [MANY_TILES], ids=str)
def test_wgmma_sp(shape, dtype):
    needs((9, 0), exact=True)
    x, weight, *scales = problem(*shape, dtype)
    compare(scaled_spmm_24_wgmma_sp, pack.pack_wgmma_sp(weight), x, weight, *scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing(shape, dtype):
    needs((8, 0))
    _, weight, *_ = problem(*shape, dtype)
    dense = unpack_24_ref(weight._replace(values=weight.values.half())).to(dtype)
    for got, want in (
        (pack.pack_mma_sp(weight), orders.to_mma_sp(weight)),
        (pack.pack_wgmma_sp(weight), orders.to_wgmma_sp(weight)),
        (pack_dense.pack_dense_mma_sp(dense), orders.to_mma_sp(weight)),
        (pack_dense.pack_dense_wgmma_sp(dense), orders.to_wgmma_sp(weight)),
    ):
        assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
        assert torch.equal(got.meta, want.meta)
    for back in (
        unpack.unpack_mma_sp(orders.to_mma_sp(weight)),
        unpack.unpack_wgmma_sp(orders.to_wgmma_sp(weight)),
    ):
        assert torch.equal(back.view(torch.uint8), dense.view(torch.uint8))
