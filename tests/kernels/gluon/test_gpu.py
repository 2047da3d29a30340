"""The launchers on a GPU, against the twins: what the executor cannot show, the hardware."""

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.gluon import (
    mma_packed,
    mma_sp,
    orders,
    pack,
    pack_dense,
    unpack,
    wgmma_packed,
    wgmma_sp,
)
from slimgemm.kernels.gluon.wgmma_tiles import WGMMA_SP_TILES
from slimgemm.kernels.reference import ACTIVATIONS, pack_24_ref, spmm_24_ref

pytestmark = pytest.mark.gpu
SHAPES = [
    (1, 16, 8),
    (1, 4096, 4096),
    (8, 130, 1000),
    (33, 300, 333),
    (64, 512, 2048),
    (300, 272, 776),
]
DTYPES = [torch.bfloat16, torch.float16]


def needs(*capability, exact=False):
    found = torch.cuda.get_device_capability()
    if found < capability or (exact and found != capability):
        pytest.skip(f"needs compute capability {capability}, has {found}")


def problem(m, n, k, dtype):
    packed = pack_24_ref(random_24(n, k, dtype, seed=n).cuda())
    return packed, randn(m, k, dtype=dtype, seed=m + 1, device="cuda")


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
    compare(mma_sp.spmm_24_mma_sp(x, weight), x, packed)
    compare(mma_sp.spmm_24_mma_sp(x, weight, splits=3), x, packed)
    again = mma_sp.spmm_24_mma_sp(x, weight)
    assert torch.equal(again, mma_sp.spmm_24_mma_sp(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] % 8 == 0], ids=str)
@pytest.mark.parametrize("tokens", WGMMA_SP_TILES, ids=str)
def test_wgmma_sp(tokens, shape, dtype):
    needs(9, 0, exact=True)
    packed, x = problem(*shape, dtype)
    tile = WGMMA_SP_TILES[tokens]
    got = wgmma_sp.spmm_24_wgmma_sp(x, orders.to_wgmma_sp(packed), tile=tile)
    compare(got, x, packed)


PACKED_SHAPES = [(1, 16, 32), (1, 4096, 4096), (8, 130, 992), (33, 300, 352), (300, 272, 3584)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PACKED_SHAPES, ids=str)
@pytest.mark.parametrize("most", mma_packed.MMA_PACKED_TILES, ids=str)
def test_mma_packed(most, shape, dtype):
    needs(8, 0)
    packed, x = problem(*shape, dtype)
    assert mma_packed.takes(x, packed)
    tile = mma_packed.MMA_PACKED_TILES[most]
    for splits in (1, 3):
        got = mma_packed.spmm_24_mma_packed(x, packed, tile=tile, splits=splits)
        compare(got, x, packed)
    odd = torch.nn.functional.pad(x, (0, 1))[:, :-1]  # an odd pitch takes the 2-byte path
    compare(mma_packed.spmm_24_mma_packed(odd, packed), odd, packed)
    again = mma_packed.spmm_24_mma_packed(x, packed)
    assert torch.equal(again, mma_packed.spmm_24_mma_packed(x, packed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PACKED_SHAPES, ids=str)
@pytest.mark.parametrize("tokens", WGMMA_SP_TILES, ids=str)
def test_wgmma_packed_gives_the_bits_of_wgmma_sp(tokens, shape, dtype):
    needs(9, 0, exact=True)
    packed, x = problem(*shape, dtype)
    assert wgmma_packed.takes(x, packed)
    tile = WGMMA_SP_TILES[tokens]
    got = wgmma_packed.spmm_24_wgmma_packed(x, packed, tile=tile)
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
    compare(wgmma_sp.spmm_24_wgmma_sp(x, wide, act=act, **extra), x, packed, act=act, **extra)


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
