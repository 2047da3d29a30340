"""scaled_spmm_24 on wgmma.sp: int8 and e4m3 on the NumPy executor, against the twin; faults."""

import gluon_numpy
import pytest
import torch
from gluon_numpy import Fault, mutated
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.gluon import orders, scaled_spmm, wgmma_sp
from slimgemm.kernels.gluon.wgmma_tiles import WGMMA_SP_TILES, WgmmaTile
from slimgemm.kernels.quantize_24 import LARGEST, OUT_DTYPES, quantize_24, quantize_rows
from slimgemm.kernels.quantize_24 import scaled_spmm_24_ref as twin
from slimgemm.kernels.reference import ACTIVATIONS, activate, unpack_24_ref

DTYPES = list(LARGEST)
KERNEL = wgmma_sp._wgmma_sp_kernel
SMALL = WgmmaTile(64, 3)


def problem(m, n, k, dtype):
    weight, scale_w = quantize_24(random_24(n, k, seed=n + k), dtype)
    x, scale_x = quantize_rows(randn(m, k, seed=m), dtype)
    # Scales that differ from row to row by more than the rows do.
    return x, weight, scale_x * (1 + torch.arange(m) % 7), scale_w * (1 + torch.arange(n) % 5)


def run(x, weight, scale_x, scale_w, bias=None, act="none", out_dtype=torch.float32, **how):
    replace, kernel = how.pop("replace", None), how.pop("kernel", KERNEL)
    launch = wgmma_sp.prepare(
        x, orders.to_wgmma_sp(weight), bias, scale_w, act,
        token_scale=scale_x, out_dtype=out_dtype, **how,
    )  # fmt: skip
    gluon_numpy.run(kernel, launch.grid, *launch.args, replace=replace, **launch.constants)
    return launch.out


def exact(x, weight, scale_x, scale_w, bias=None, act="none"):
    dense = unpack_24_ref(weight._replace(values=weight.values.double()))
    z = (x.double() @ dense.t()) * scale_x.double()[..., None] * scale_w.double()
    return activate(z if bias is None else z + bias.double(), act)


def check(m, n, k, dtype, out_dtype=torch.float32, tile=SMALL, programs=2, **epilogue):
    operands = problem(m, n, k, dtype)
    got = run(*operands, out_dtype=out_dtype, tile=tile, programs=programs, **epilogue)
    want = twin(*operands, **epilogue, out_dtype=out_dtype)
    if dtype == torch.int8 and not epilogue:
        assert torch.equal(got, want)  # integers, and then the same two products in fp32
    assert_no_worse_than_dense(got, want, exact(*operands, **epilogue), "scaled_spmm_24_wgmma_sp")


@pytest.mark.parametrize("tokens", WGMMA_SP_TILES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shipped_tile_exact_and_ragged(tokens, dtype):
    tile = WGMMA_SP_TILES[tokens]
    check(tokens, 128, 768, dtype, tile=tile)
    check(tokens + 9, 100, 272, dtype, torch.bfloat16, tile=tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 16), (3, 129, 256), (70, 40, 1040), (130, 300, 144)], ids=str
)
def test_shapes_against_twin(m, n, k, dtype):
    check(m, n, k, dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_epilogues(act, out_dtype):
    for dtype in DTYPES:
        check(5, 20, 256, dtype, out_dtype, act=act, bias=randn(20, seed=5))


def test_persistent_programs_and_rows_with_a_pitch():
    check(150, 300, 528, torch.int8, tile=WgmmaTile(64, 2), programs=1)
    base = quantize_rows(randn(9, 1024, seed=1), torch.int8)[0]
    _, weight, scale_x, scale_w = problem(9, 32, 512, torch.int8)
    x = base[:, 512:]
    got = run(x, weight, scale_x, scale_w, tile=SMALL)
    assert torch.equal(got, twin(x, weight, scale_x, scale_w, out_dtype=torch.float32))


ASM, WORDS, CONSUMER = wgmma_sp.wgmma_sp_asm, wgmma_sp.load_words, wgmma_sp.consumer
FAULTS = {  # name: function, old, new, message
    "selector": (ASM, "else (step, 0)", "else (step, 1)", "selector of an 8-bit type must be 0"),
    "columns": (ASM, "16 * values_per_int32(kind)", "32", "no instruction k32 of s8"),
    "sums": (ASM, '"s32" if kind == "s8"', '"f32" if kind == "s8"', "no instruction k64 of s8"),
    "signs of integers": (ASM, '"s8": "1"', '"s8": "1, 1, 1"', "wgmma.sp on s8 must end in 1"),
    "token mask": (CONSUMER, "mask=token < M", "mask=token < M + 8", "token_scale_ptr"),
    "blocks of 16-bit types": (
        CONSUMER, "gl.cdiv(K, 64 * PER)", "gl.cdiv(K, 128)", "out of bounds",
    ),
}  # fmt: skip
WRONG = {  # name: function, old, new
    "metadata of another step": (ASM, "else (step, 0)", "else (step ^ 1, 0)"),
    "metadata of the other warpgroup": (WORDS, "WG * 512", "(512 - WG * 512)"),
    "words of the other rows": (WORDS, "row // 8 % 2 * 2)", "(1 - row // 8 % 2) * 2)"),
    "words swapped": (WORDS, "* 4 + column % 2)", "* 4 + 1 - column % 2)"),
    "lanes swapped": (WORDS, "(column % 8 // 2 * 4 +", "((3 - column % 8 // 2) * 4 +"),
    "step of A": (ASM, "{2 * step}", "{2 * (3 - step)}"),
    "scales of other tokens": (CONSUMER, "TOKENS + column\n", "TOKENS + (column ^ 1)\n"),
}  # fmt: skip


def run_changed(function, old, new):
    operands = problem(70, 200, 528, torch.int8)
    changed = mutated(function, old, new)
    got = run(*operands, tile=SMALL, programs=1, replace={function.fn.__name__: changed})
    want = exact(*operands)
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_raised(name):
    *change, message = FAULTS[name]
    with pytest.raises(Fault, match=message):
        run_changed(*change)


@pytest.mark.parametrize("name", WRONG)
def test_planted_wrong_map_gives_a_wrong_result(name):
    assert run_changed(*WRONG[name]) > 0.02


class Gpu(torch.Tensor):
    """A CPU tensor that the checks before a launch take for one of a GPU."""

    is_cuda = property(lambda self: True)


def test_launcher_refuses_before_anything_runs(monkeypatch):
    x, weight, scale_x, scale_w = problem(4, 16, 64, torch.int8)
    w_hw = orders.to_wgmma_sp(weight)
    call = scaled_spmm.scaled_spmm_24_wgmma_sp
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\] for a \[16, 64\] weight"):
        call(x[:, :32], w_hw, scale_x, scale_w)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        call(x, w_hw, scale_x, scale_w)
    with pytest.raises(ValueError, match=r"scale_x must be contiguous \[4\], got \[4, 1\]"):
        call(x, w_hw, scale_x[:, None], scale_w)
    with pytest.raises(ValueError, match=r"bfloat16 or float16, got .*; scaled_spmm_24_wgmma"):
        wgmma_sp.spmm_24_wgmma_sp(x, w_hw)
    half = orders.to_wgmma_sp(weight._replace(values=weight.values.half()))
    with pytest.raises(ValueError, match=r"hold float8_e4m3fn or int8, got torch\.float16"):
        call(x.half(), half, scale_x, scale_w)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.raises(ValueError, match=r"compute capability \(9, 0\), got \(10, 0\)"):
        call(x.as_subclass(Gpu), w_hw, scale_x, scale_w)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x, weight, scale_x, scale_w = problem(4, 16, 72, torch.int8)
    with pytest.raises(ValueError, match=r"16-byte aligned rows .* k = 72.*scaled_spmm_24_mma_sp"):
        call(x.as_subclass(Gpu), orders.to_wgmma_sp(weight), scale_x, scale_w)
