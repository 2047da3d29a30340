"""scaled_spmm_24 on mma.sp: int8 and e4m3 on the NumPy executor, against the twin; faults."""

import gluon_numpy
import gluon_ptx
import numpy as np
import pytest
import torch
from gluon_cases import SMALL
from gluon_numpy import Fault, mutated
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.gluon import mma_sp, orders, scaled_spmm
from slimgemm.kernels.gluon.epilogue import scale_tokens
from slimgemm.kernels.gluon.mma_tiles import (
    MMA_SP_TILES,
    MMA_SP_WIDENED_TILES,
    fits,
    mma_sp_tile,
)
from slimgemm.kernels.quantize_24 import LARGEST, OUT_DTYPES, quantize_24, quantize_rows
from slimgemm.kernels.quantize_24 import scaled_spmm_24_ref as twin
from slimgemm.kernels.reference import ACTIVATIONS, activate, unpack_24_ref

DTYPES = list(LARGEST)
KERNEL = mma_sp._mma_sp_kernel


def problem(m, n, k, dtype):
    weight, scale_w = quantize_24(random_24(n, k, seed=n + k), dtype)
    x, scale_x = quantize_rows(randn(m, k, seed=m), dtype)
    # Scales that differ from row to row by more than the rows do.
    return x, weight, scale_x * (1 + torch.arange(m)), scale_w * (1 + torch.arange(n) % 5)


def run(x, weight, scale_x, scale_w, bias=None, act="none", out_dtype=torch.float32, **how):
    """What scaled_spmm_24_mma_sp computes, with the parts added in order."""
    replace, kernel = how.pop("replace", None), how.pop("kernel", KERNEL)
    launch = mma_sp.prepare(
        x, orders.to_mma_sp(weight), bias, scale_w, act,
        token_scale=scale_x, out_dtype=out_dtype, **how,
    )  # fmt: skip
    gluon_numpy.run(kernel, launch.grid, *launch.args, replace=replace, **launch.constants)
    if launch.parts is None:
        return launch.out
    total = launch.parts[0]
    for part in launch.parts[1:]:
        total = total + part
    total = total if bias is None else total + bias.float()
    return activate(total, act).to(out_dtype)


def exact(x, weight, scale_x, scale_w, bias=None, act="none"):
    dense = unpack_24_ref(weight._replace(values=weight.values.double()))
    z = (x.double() @ dense.t()) * scale_x.double()[..., None] * scale_w.double()
    return activate(z if bias is None else z + bias.double(), act)


def check(m, n, k, dtype, out_dtype=torch.float32, x=None, **how):
    made, *operands = problem(m, n, k, dtype)
    operands = (made if x is None else x, *operands)
    epilogue = {name: how[name] for name in ("bias", "act") if name in how}
    got = run(*operands, out_dtype=out_dtype, **how)
    want = twin(*operands, **epilogue, out_dtype=out_dtype)
    if dtype == torch.int8 and not epilogue and how.get("splits", 1) == 1:
        assert torch.equal(got, want)  # integers, and then the same two products in fp32
    assert_no_worse_than_dense(got, want, exact(*operands, **epilogue), "scaled_spmm_24_mma_sp")


@pytest.mark.parametrize("most", MMA_SP_TILES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shipped_tile_exact_and_ragged(most, dtype):
    tile = MMA_SP_TILES[most]
    check(most, tile.rows, 512 * tile.warps_k, dtype, tile=tile)
    check(most - 3, tile.rows + 24, 512 * tile.warps_k + 528, dtype, tile=tile)


@pytest.mark.parametrize("most", MMA_SP_WIDENED_TILES, ids=str)
def test_tiles_of_widened_floats(most):
    tile = MMA_SP_WIDENED_TILES[most]
    assert tile.tokens == most and tile.nt == 1 and fits(tile, "sm_90")
    check(most - 1, tile.rows + 24, 512 * tile.warps_k + 528, torch.float8_e4m3fn, tile=tile)
    assert mma_sp_tile(most, widened=True) is tile
    assert mma_sp_tile(5000, widened=True).tokens == 32
    assert mma_sp_tile(most, False, widened=True).nt == 1


@pytest.mark.parametrize("tile", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 16, 512), (8, 40, 1024), (19, 17, 784), (3, 5, 8), (2, 33, 100), (5, 16, 333), (1, 1, 1)],
    ids=str,
)
def test_shapes_against_twin(m, n, k, dtype, tile):
    check(m, n, k, dtype, tile=tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [2, 5])
def test_split_k(splits, dtype):
    check(3, 33, 4100, dtype, tile=SMALL["k_warps"], splits=splits, bias=randn(33), act="relu")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_epilogues(act, out_dtype):
    bias = randn(20, seed=5)
    for dtype in DTYPES:
        check(5, 20, 512, dtype, out_dtype, tile=SMALL["wide"], act=act, bias=bias)


def test_strided_and_offset_inputs():
    base = quantize_rows(randn(9, 1024, seed=1), torch.int8)[0]
    tile = SMALL["wide"]
    check(9, 32, 512, torch.int8, x=base[:, 512:], tile=tile)  # aligned rows with a pitch
    check(9, 32, 496, torch.int8, x=base[:, 16:512], tile=tile)  # 16-byte offset
    check(9, 32, 512, torch.int8, x=base[:, 3:515], tile=tile)  # odd offset: the 1-byte path
    check(9, 32, 504, torch.int8, x=base[:, 8:512], tile=tile)  # 8 bytes are no 16
    check(4, 32, 512, torch.int8, x=base[::2][:4, 512:], tile=tile)


def test_extreme_integers():
    """-128 in every place: the largest sum there is."""
    weight, _ = quantize_24(random_24(16, 512), torch.int8)
    weight = weight._replace(values=torch.full_like(weight.values, -128))
    x, one = torch.full((2, 512), -128, dtype=torch.int8), torch.ones(16)
    got = run(x, weight, one[:2], one, tile=SMALL["one_warp"])
    assert (got == 128 * 128 * 256).all()


def test_e4m3_nan_in_one_token_stays_there():
    x, *rest = problem(4, 16, 528, torch.float8_e4m3fn)
    x[2, 7] = float("nan")
    got = run(x, *rest, tile=SMALL["k_warps"])
    assert got[2].isnan().any() and not got[[0, 1, 3]].isnan().any()


FAULTS = [
    ("K mask", mma_sp.copy_x, " & (pair // 4 < K // (4 * PER))", "", "out of bounds: x_ptr"),
    ("token mask", scale_tokens, "token < M", "token < M + 8", "out of bounds: token_scale_ptr"),
    (
        "metadata of padding is zero", mma_sp.load_metadata, "on, MASKED, 0x44444444",
        "on & False, MASKED, 0", "ordered metadata must be ascending",
    ),
    ("selector", mma_sp.mma_sp_asm, "step % 4, 0", "step % 4, 1", "selector .* must be 0"),
    ("sums", mma_sp.mma_sp_asm, '"s32" if kind == "s8"', '"f32" if kind == "s8"', "no instruction"),
    ("columns", mma_sp.mma_sp_asm, "64, step % 4", "32, step % 4", "no instruction k32 of s8"),
]  # fmt: skip
WRONG = [
    ("registers of A swapped", mma_sp.mma_sp_asm, "{$8,$9,$10,$11}", "{$8,$10,$9,$11}"),
    ("registers of B swapped", mma_sp.mma_sp_asm, "{$12,$13,$14,$15}", "{$13,$12,$14,$15}"),
    ("metadata word of another step", mma_sp.mma_sp_asm, "64, step % 4", "64, (step ^ 1) % 4"),
    ("metadata of the other half", KERNEL, "k) // 4 * (HALVES - 1)", "k) // 4 * (HALVES - 1) - 1"),
    ("halves of the words", mma_sp.load_metadata, "at + half * 128", "at + (128 - half * 128)"),
    (
        "scales of other tokens",
        scale_tokens,
        "e // 4 % 4 * 2 + e % 2",
        "e // 4 % 4 * 2 + 1 - e % 2",
    ),
    ("bytes of an int32", mma_sp.copy_x, "PER * shift + i)", "PER * shift + i % 3)"),
]


def run_changed(function, old, new, tile, k=1552):
    operands = problem(11, 48, k, torch.int8)
    changed = mutated(function, old, new)
    if function is KERNEL:
        got = run(*operands, tile=SMALL[tile], kernel=changed)
    else:
        got = run(*operands, tile=SMALL[tile], replace={function.fn.__name__: changed})
    want = exact(*operands)
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(
    ("function", "old", "new", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_planted_fault_is_raised(function, old, new, message):
    with pytest.raises(Fault, match=message):
        run_changed(function, old, new, "k_warps")


@pytest.mark.parametrize(
    ("function", "old", "new"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_planted_wrong_map_gives_a_wrong_result(function, old, new):
    ragged = function is mma_sp.copy_x  # an odd K takes the 1-byte path
    assert run_changed(function, old, new, "token_warps", 1551 if ragged else 1552) > 0.02


def test_swapped_metadata_nibble_gives_a_wrong_result():
    x, weight, scale_x, scale_w = problem(8, 16, 512, torch.int8)
    low, high = weight.meta & 15, weight.meta >> 4
    row, byte = (low != high).nonzero()[0].tolist()
    swapped = weight.meta.clone()
    swapped[row, byte] = low[row, byte] << 4 | high[row, byte]
    got = run(x, weight._replace(meta=swapped), scale_x, scale_w, tile=SMALL["one_warp"])
    assert not torch.equal(got, twin(x, weight, scale_x, scale_w, out_dtype=torch.float32))


def test_int32_overflow_is_a_fault():
    c = [np.full(32, 2**31 - 100, np.int32)] * 4
    ones = [np.full(32, 0x01010101, np.int64)] * 4
    words = np.full(32, 0x44444444, np.int64)
    with pytest.raises(Fault, match="an int32 sum of products overflows"):
        gluon_ptx.mma_sp("s8", [w * 127 for w in ones], ones, c, words, 0)


def test_emulated_m16n8k64_against_a_hand_computed_product():
    """Row 9 of A: values 2 and -3 in columns 33 and 35; column 4 of B: 10 and 100 in those rows."""
    a = [np.zeros(32, np.int64) for _ in range(4)]
    # Compressed columns 16 and 17: register 3 (row g + 8, second half) of lane g = 1, t = 0.
    a[3][4] = 2 | 0xFD << 8
    b = [np.zeros(32, np.int64) for _ in range(4)]
    b[2][4 * 4 + 0] = 10 << 8 | 100 << 24  # register 2: rows 32 ... 35 of column g = 4
    words = np.full(32, 0x44444444, np.int64)
    words[4 * 1 + 3] = 0x4444444D  # t = 3: row g + 8, columns 32 ... 63; first nibble 0b1101
    d = gluon_ptx.mma_sp("s8", a, b, [np.ones(32, np.int32)] * 4, words, 0)
    want = np.ones((4, 32))
    want[2, 4 * 1 + 2] = 1 + 2 * 10 - 3 * 100  # row 9, column 4 = 2 t + 0: register 2 of lane 6
    assert np.array_equal(np.stack(d), want)


def test_emulated_e4m3_is_torchs():
    every = torch.arange(256, dtype=torch.uint8)
    got = gluon_ptx.decoded(every.numpy(), "e4m3")
    want = every.view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(got, want, equal_nan=True)


class Gpu(torch.Tensor):
    """A CPU tensor that the checks before a launch take for one of a GPU."""

    is_cuda = property(lambda self: True)


def test_launcher_refuses_before_anything_runs(monkeypatch):
    x, weight, scale_x, scale_w = problem(4, 16, 64, torch.int8)
    w_hw = orders.to_mma_sp(weight)
    call = scaled_spmm.scaled_spmm_24_mma_sp
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\] for a \[16, 64\] weight"):
        call(x[:, :32], w_hw, scale_x, scale_w)
    with pytest.raises(ValueError, match=r"x must be torch.int8 on cpu as the weight, got"):
        call(x.float(), w_hw, scale_x, scale_w)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        call(x, w_hw, scale_x, scale_w)
    with pytest.raises(ValueError, match=r"scale_x must be contiguous \[4\], got \[3\]"):
        call(x, w_hw, scale_x[:3], scale_w)
    with pytest.raises(ValueError, match=r"scale_w must be contiguous \[16\], got \[1\]"):
        call(x, w_hw, scale_x, scale_w[:1])
    with pytest.raises(ValueError, match=r"scale_w must be float32 on cpu, got torch\.float64"):
        call(x, w_hw, scale_x, scale_w.double())
    with pytest.raises(ValueError, match="out_dtype must be bfloat16, float16 or float32, got"):
        call(x, w_hw, scale_x, scale_w, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="k must be below 262144 for int32 sums of int8 products"):
        call(x, w_hw._replace(k=2**18), scale_x, scale_w)
    half = orders.to_mma_sp(weight._replace(values=weight.values.half()))
    with pytest.raises(ValueError, match=r"hold float8_e4m3fn or int8, got torch.float16; spmm_24"):
        call(x.half(), half, scale_x, scale_w)
    with pytest.raises(ValueError, match=r"bfloat16 or float16, got .*; scaled_spmm_24_mma"):
        mma_sp.spmm_24_mma_sp(x, w_hw)
    x8, float_weight, *scales = problem(4, 16, 64, torch.float8_e4m3fn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"compute capability \(8, 9\) or later, got \(8, 6\)"):
        call(x8.as_subclass(Gpu), orders.to_mma_sp(float_weight), *scales)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability \(8, 0\) or later, got \(7, 5\)"):
        call(x.as_subclass(Gpu), w_hw, scale_x, scale_w)
