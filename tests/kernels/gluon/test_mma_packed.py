"""mma_packed on the NumPy executor: tiles, shape classes, epilogues, splits against the twin."""

import inspect
import re

import gluon_numpy
import pytest
import torch
from gluon_numpy import Fault
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.gluon import mma_packed
from slimgemm.kernels.gluon import mma_packed_kernel as device
from slimgemm.kernels.gluon.mma_packed import MMA_PACKED_TILES, PackedTile, mma_packed_tile
from slimgemm.kernels.gluon.mma_tiles import fits
from slimgemm.kernels.reference import ACTIVATIONS, pack_24_ref, spmm_24_ref

DTYPES = [torch.bfloat16, torch.float16]
SMALL = {
    "one_warp": PackedTile(1, 1, 1, 1, 1, 8, 2, 2),
    "k_warps": PackedTile(1, 1, 1, 1, 4, 8, 3, 8),
    "wide": PackedTile(2, 2, 2, 1, 1, 4, 2, 4),
    "token_warps": PackedTile(1, 2, 1, 2, 2, 2, 4, 6),
}


def run(x, packed, tile, splits=1, replace=None, **epilogue):
    launch = mma_packed.prepare(x, packed, tile=tile, splits=splits, **epilogue)
    gluon_numpy.run(
        device._mma_packed_kernel,
        launch.grid,
        *launch.args,
        replace=replace,
        **launch.constants,
    )
    if launch.parts is None:
        return launch.out
    total = launch.parts[0]
    for part in launch.parts[1:]:
        total = total + part
    return total.to(x.dtype).view_as(launch.out)


def check(m, n, k, tile, dtype=torch.bfloat16, splits=1, x=None, replace=None, **epilogue):
    packed = pack_24_ref(random_24(n, k, dtype, seed=n + k))
    x = randn(m, k, dtype=dtype, seed=m) if x is None else x
    got = run(x, packed, tile, splits, replace, **epilogue)
    exact = packed._replace(values=packed.values.double())
    if "scale" in epilogue:
        epilogue["scale"] = epilogue["scale"].expand(n)
    wide = {key: t.double() if torch.is_tensor(t) else t for key, t in epilogue.items()}
    same = {key: t.to(dtype) if torch.is_tensor(t) else t for key, t in wide.items()}
    assert_no_worse_than_dense(
        got, spmm_24_ref(x, packed, **same), spmm_24_ref(x.double(), exact, **wide), "mma_packed"
    )


@pytest.mark.parametrize("tile", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 16, 256), (8, 40, 1024), (19, 17, 800), (3, 5, 32), (2, 33, 96), (5, 16, 352), (1, 1, 64)],
    ids=str,
)
def test_shapes_against_twin(m, n, k, dtype, tile):
    check(m, n, k, tile, dtype)


@pytest.mark.parametrize("most", MMA_PACKED_TILES, ids=str)
def test_every_shipped_tile_exact_and_ragged(most):
    tile = MMA_PACKED_TILES[most]
    check(most, tile.rows, 256 * tile.warps_k, tile)
    check(most - 3, tile.rows + 24, 256 * tile.warps_k + 288, tile)


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("name", ["one_warp", "k_warps"])
def test_split_k(splits, name):
    check(3, 33, 2112, SMALL[name], splits=splits)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("scale", ["none", "scalar", "rows"])
def test_epilogues(act, scale):
    epilogue = {"act": act, "bias": randn(20, seed=5)}
    if scale != "none":
        epilogue["scale"] = randn(1 if scale == "scalar" else 20, seed=6) * 0.1
    check(5, 20, 256, SMALL["wide"], torch.float16, **epilogue)


def test_strided_and_offset_inputs():
    base = randn(9, 512, dtype=torch.bfloat16, seed=1)
    check(9, 32, 256, SMALL["wide"], x=base[:, 256:])  # aligned rows with a pitch
    check(9, 32, 256, SMALL["wide"], x=base[:, 8:264])  # 16-byte offset
    check(9, 32, 256, SMALL["wide"], x=base[:, 3:259])  # odd offset: the 2-byte path
    check(9, 32, 96, SMALL["k_warps"], x=base[:, 5:101])  # and a K that ends within a block


def test_nan_in_one_token_stays_there_and_in_the_weight_stays_in_its_row():
    packed = pack_24_ref(random_24(16, 96, torch.bfloat16))
    x = randn(4, 96, dtype=torch.bfloat16)
    x[2] = float("nan")
    packed.values[5, 47] = float("inf")  # beside it lie values of row 6
    got = run(x, packed, SMALL["k_warps"])
    assert got[2].isnan().all() and got[[0, 1, 3]][:, [*range(5), *range(6, 16)]].isfinite().all()
    assert not got[[0, 1, 3], 5].isfinite().any()


K = 608  # ends within a block of 256 and within 64 columns
PARTS = [
    ("K mask of X", device.copy_groups, " & ((group0 + shift // 2) * 4 < K)", "", "x_ptr"),
    (
        "K mask of W",
        device.load_values,
        "mask=k0 + PAIR * 64 < K",
        "mask=k0 < K + 9999",
        "v_ptr",
    ),
    (
        "K mask of metadata",
        device.load_meta,
        "mask=column < K",
        "mask=column < K + 999",
        "m_ptr",
    ),
    ("padding is zero", device.load_meta, "other=0x44444444", "other=0", "must be ascending"),
    ("row past W", device._mma_packed_kernel, "gl.minimum(row, N - 1)", "row", "v_ptr"),
    ("row past meta", device._mma_packed_kernel, "gl.minimum(mrow, N - 1)", "mrow", "m_ptr"),
    (
        "block past W",
        device._mma_packed_kernel,
        "gl.minimum(it + 1, last - 1)",
        "it + 1",
        "_ptr",
    ),
    ("wait", device._mma_packed_kernel, "cp_async_wait(STAGES - 2)", "", "waited for"),
    ("barrier", device._mma_packed_kernel, "            barrier()\n", "", "barrier"),
    (
        "stage overwritten before it is read",
        device._mma_packed_kernel,
        "ring.index((step + STAGES - 1) % STAGES)",
        "ring.index((step + STAGES - 2) % STAGES)",
        "in flight|before it was read",
    ),
]
WRONG = [
    ("X not transposed", "pair // 2 % 4 * 4 + pair // 8 % 4", "pair // 2 % 16"),
    (
        "metadata not transposed",
        "(lo >> (4 * t)) & 0x000F000F",
        "(lo >> (4 * (t ^ 1))) & 0x000F000F",
    ),
    ("quarters swapped", "(((hi | (hi >> 12)) & 0xFF) << 8)", "((hi | (hi >> 12)) & 0xFF)"),
    ("rows of W swapped", "gl.minimum(row + 8, N - 1)", "gl.minimum(row + 7, N - 1)"),
    ("pairs of a step swapped", "{8 + q}", "{9 + q}"),
    ("selector inverted", "{step % 2};", "{1 - step % 2};"),
]
FUNCTIONS = [
    device._mma_packed_kernel,
    device.copy_groups,
    device.load_values,
    device.load_meta,
    device.nibbles,
    device.mma_packed_asm,
]


def run_mutated(function, old, new, tile, k=K):
    """The largest error of the kernel with one change in the source of `function`."""
    packed = pack_24_ref(random_24(48, k, torch.float16))
    x = randn(11, 2 * k, dtype=torch.float16, seed=1)[:, k:]  # foreign values between the rows
    changed = gluon_numpy.mutated(function, old, new)
    if function is device._mma_packed_kernel:
        launch = mma_packed.prepare(x, packed, tile=SMALL[tile])
        gluon_numpy.run(changed, launch.grid, *launch.args, **launch.constants)
        got = launch.out
    else:
        got = run(x, packed, SMALL[tile], replace={function.fn.__name__: changed})
    exact = spmm_24_ref(x.double(), packed._replace(values=packed.values.double()))
    return float((got.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    ("function", "old", "new", "message"), [f[1:] for f in PARTS], ids=[f[0] for f in PARTS]
)
def test_planted_fault_is_raised(function, old, new, message):
    raised = []
    for tile in ("k_warps", "token_warps", "wide"):
        try:
            # A masked load never leaves its tensor: K of whole blocks has no masks.
            run_mutated(function, old, new, tile, 1024 if "last - 1" in old else K)
        except Fault as fault:
            raised.append(str(fault))
    assert raised and any(re.search(message, text) for text in raised), raised


@pytest.mark.parametrize(("old", "new"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_planted_wrong_map_gives_a_wrong_result(old, new):
    (function,) = [f for f in FUNCTIONS if old in inspect.getsource(f.fn)]
    try:
        assert max(run_mutated(function, old, new, t) for t in ("k_warps", "token_warps")) > 0.05
    except Fault as fault:
        assert "must be ascending" in str(fault)  # metadata that no packed weight can hold


def test_tiles_are_legal():
    assert list(MMA_PACKED_TILES) == sorted(MMA_PACKED_TILES)
    for most, tile in MMA_PACKED_TILES.items():
        assert tile.ahead % 2 == 0
        assert tile.tokens >= most or most == max(MMA_PACKED_TILES)
        assert all(fits(tile, arch) for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"))
        assert mma_packed_tile(most) is tile
        assert mma_packed_tile(most, aligned=False).tokens >= min(most, 32)


def test_launcher_refuses_before_anything_runs():
    call = mma_packed.spmm_24_mma_packed
    packed = pack_24_ref(random_24(16, 64, torch.bfloat16))
    x = randn(4, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x must be \[..., 64\] for a \[16, 64\] weight"):
        call(x[:, :32], packed)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        call(x, packed)
    with pytest.raises(ValueError, match="k must be a positive multiple of 32, got 40"):
        call(x[:, :40], pack_24_ref(random_24(16, 40, torch.bfloat16)))
    with pytest.raises(ValueError, match=r"values must be float16 or bfloat16, got torch.float32"):
        call(x.float(), pack_24_ref(random_24(16, 64, torch.float32)))
    with pytest.raises(ValueError, match=r"keep:group must be 2:4 for mma.sp, got 1:4"):
        call(x, pack_24_ref(torch.zeros(16, 64, dtype=torch.bfloat16), 1, 4))
    shifted = torch.zeros(16 * 32 + 1, dtype=torch.bfloat16)[1:].view(16, 32)
    with pytest.raises(ValueError, match="values must be contiguous and 16-byte aligned"):
        call(x, packed._replace(values=shifted))
    assert not mma_packed.takes(x, packed)  # not on a GPU
