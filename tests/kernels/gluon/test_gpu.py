"""The launchers on a GPU, against the twins: what the executor cannot show, the hardware."""

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.conv_layout import convolution
from slimgemm.kernels.gluon import (
    mma_conv,
    mma_packed,
    mma_sp,
    orders,
    pack,
    pack_dense,
    unpack,
    wgmma_conv,
    wgmma_packed,
    wgmma_sp,
)
from slimgemm.kernels.gluon.wgmma_tiles import WGMMA_SP_TILES
from slimgemm.kernels.reference import ACTIVATIONS, pack_24_ref, spmm_24_ref
from slimgemm.kernels.reference_conv import pack_conv_ref

pytestmark = pytest.mark.gpu
SHAPES = [
    (1, 16, 8),
    (1, 4096, 4096),
    (8, 130, 1000),
    (33, 300, 333),
    (64, 512, 2048),
    (300, 272, 776),
]
# More tiles than multiprocessors, with three stages each: barriers carry their phase over tiles.
MANY_TILES = (2000, 2600, 352)
DTYPES = [torch.bfloat16, torch.float16]
REPEATS = 20  # launches that must give the same bits: a race moves them


def needs(*capability, exact=False):
    found = torch.cuda.get_device_capability()
    if found < capability or (exact and found != capability):
        pytest.skip(f"needs compute capability {capability}, has {found}")


def problem(m, n, k, dtype):
    packed = pack_24_ref(random_24(n, k, dtype, seed=n).cuda())
    return packed, randn(m, k, dtype=dtype, seed=m + 1, device="cuda")


def steady(call):
    """What `call` returns, the same bits every time."""
    got = call()
    for _ in range(REPEATS):
        assert torch.equal(got, call())
    return got


def compare(got, x, packed, **epilogue):
    wide = {key: t.double() if torch.is_tensor(t) else t for key, t in epilogue.items()}
    same = {key: t.to(x.dtype) if torch.is_tensor(t) else t for key, t in epilogue.items()}
    exact = spmm_24_ref(x.double(), packed._replace(values=packed.values.double()), **wide)
    assert_no_worse_than_dense(got, spmm_24_ref(x, packed, **same), exact, "gluon")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mma_sp(shape, dtype):
    needs(8, 0)
    packed, x = problem(*shape, dtype)
    weight = orders.to_mma_sp(packed)
    compare(steady(lambda: mma_sp.spmm_24_mma_sp(x, weight)), x, packed)
    compare(steady(lambda: mma_sp.spmm_24_mma_sp(x, weight, splits=3)), x, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] % 8 == 0] + [MANY_TILES], ids=str)
@pytest.mark.parametrize("tokens", WGMMA_SP_TILES, ids=str)
def test_wgmma_sp(tokens, shape, dtype):
    needs(9, 0, exact=True)
    packed, x = problem(*shape, dtype)
    weight, tile = orders.to_wgmma_sp(packed), WGMMA_SP_TILES[tokens]
    compare(steady(lambda: wgmma_sp.spmm_24_wgmma_sp(x, weight, tile=tile)), x, packed)


PACKED_SHAPES = [(1, 16, 32), (1, 4096, 4096), (8, 130, 992), (33, 300, 352), (300, 272, 3584)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PACKED_SHAPES, ids=str)
@pytest.mark.parametrize("most", mma_packed.MMA_PACKED_TILES, ids=str)
def test_mma_packed(most, shape, dtype):
    needs(8, 0)
    packed, x = problem(*shape, dtype)
    assert mma_packed.takes(x, packed)
    tile = mma_packed.MMA_PACKED_TILES[most]
    one = steady(lambda: mma_packed.spmm_24_mma_packed(x, packed, tile=tile, splits=1))
    compare(one, x, packed)
    three = steady(lambda: mma_packed.spmm_24_mma_packed(x, packed, tile=tile, splits=3))
    compare(three, x, packed)
    odd = torch.nn.functional.pad(x, (0, 1))[:, :-1]  # an odd pitch takes the 2-byte path
    compare(steady(lambda: mma_packed.spmm_24_mma_packed(odd, packed)), odd, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*PACKED_SHAPES, MANY_TILES], ids=str)
@pytest.mark.parametrize("tokens", WGMMA_SP_TILES, ids=str)
def test_wgmma_packed_gives_the_bits_of_wgmma_sp(tokens, shape, dtype):
    needs(9, 0, exact=True)
    packed, x = problem(*shape, dtype)
    assert wgmma_packed.takes(x, packed)
    tile = WGMMA_SP_TILES[tokens]
    got = steady(lambda: wgmma_packed.spmm_24_wgmma_packed(x, packed, tile=tile))
    compare(got, x, packed)
    assert torch.equal(got, wgmma_sp.spmm_24_wgmma_sp(x, orders.to_wgmma_sp(packed), tile=tile))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_epilogues(act):
    needs(8, 0)
    packed, x = problem(40, 200, 256, torch.float16)
    extra = dict(bias=randn(200, seed=3, device="cuda"), scale=randn(200, seed=4, device="cuda"))
    narrow = orders.to_mma_sp(packed)
    compare(mma_sp.spmm_24_mma_sp(x, narrow, act=act, **extra), x, packed, act=act, **extra)
    got = mma_packed.spmm_24_mma_packed(x, packed, act=act, **extra)
    compare(got, x, packed, act=act, **extra)
    needs(9, 0, exact=True)
    wide = orders.to_wgmma_sp(packed)
    # The tile of 256 tokens ends in parts.
    for tokens in (64, 256) if act == "gelu" else (64,):
        tile = WGMMA_SP_TILES[tokens]
        got = wgmma_sp.spmm_24_wgmma_sp(x, wide, act=act, tile=tile, **extra)
        compare(got, x, packed, act=act, **extra)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_kernels_write_the_bits_of_the_twins(shape):
    needs(8, 0)
    packed, _ = problem(*shape, torch.float16)
    for got, want in (
        (pack.pack_mma_sp(packed), orders.to_mma_sp(packed)),
        (pack.pack_wgmma_sp(packed), orders.to_wgmma_sp(packed)),
    ):
        assert torch.equal(got.values, want.values) and torch.equal(got.meta, want.meta)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_from_dense_and_back(shape):
    needs(8, 0)
    dense = random_24(*shape[1:], torch.bfloat16, seed=shape[0]).cuda()
    packed = pack_24_ref(dense)
    narrow, wide = pack_dense.pack_dense_mma_sp(dense), pack_dense.pack_dense_wgmma_sp(dense)
    for got, want in ((narrow, orders.to_mma_sp(packed)), (wide, orders.to_wgmma_sp(packed))):
        assert torch.equal(got.values, want.values) and torch.equal(got.meta, want.meta)
    assert torch.equal(unpack.unpack_mma_sp(narrow), dense)
    assert torch.equal(unpack.unpack_wgmma_sp(wide), dense)
    dense[-1, :3] = 1
    with pytest.raises(ValueError, match=f"row {shape[1] - 1}, columns 0-3 hold [34] nonzeros"):
        pack_dense.pack_dense_mma_sp(dense)


CONVS = {  # (batch, channels, out, height, width, kernel), options
    "3x3": ((2, 64, 130, 14, 15, 3), dict(padding=1)),
    "strided": ((3, 128, 64, 28, 28, 3), dict(padding=1, stride=2)),
    "dilated": ((1, 64, 64, 16, 16, 3), dict(padding=2, dilation=2)),
    "1x1": ((2, 256, 64, 7, 7, 1), dict(stride=2)),
    "many pixels": ((8, 64, 64, 56, 56, 3), dict(padding=1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_mma_conv(name, dtype):
    needs(8, 0)
    (batch, channels, out, height, width, size), options = CONVS[name]
    w = random_24(out * size * size, channels, dtype).view(out, size, size, channels)
    w = w.permute(0, 3, 1, 2).contiguous().cuda()
    x = randn(batch, channels, height, width, dtype=dtype, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    packed = pack_conv_ref(w)
    assert mma_conv.takes(x, packed, convolution(w.shape, **options))
    dense = torch.nn.functional.conv2d(x, w, **options)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), **options)
    for splits in (None, 3):
        got = steady(
            lambda s=splits: mma_conv.conv2d_24_mma(x, packed, w.shape, splits=s, **options)
        )
        assert_no_worse_than_dense(got, dense, exact, "mma_conv")
    if torch.cuda.get_device_capability() == (9, 0) and "stride" not in options:
        got = steady(lambda: wgmma_conv.conv2d_24_wgmma(x, packed, w.shape, **options))
        assert_no_worse_than_dense(got, dense, exact, "wgmma_conv")
