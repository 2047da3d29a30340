"""scaled_spmm_24: Y = act((X @ W.T) * scale_x * scale_w + bias) with 8-bit X and 2:4 W.

The kernels are those of mma_sp.py and wgmma_sp.py, on int8 (int32 sums) or e4m3 (fp32 sums) with
twice the columns per instruction. quantize_24.py makes the operands.

How exact e4m3 sums are is the hardware's matter: the PTX ISA promises no precision of the fp32
accumulator of 8-bit floats. On Hopper it was found to keep about 14 bits, and sums of 4096 products
to be wrong by up to 2 % (DeepSeek-V3 technical report, section 3.3.2). These kernels leave the
whole sum there: no partial sum is moved to fp32 registers. int8 sums are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimgemm.kernels.gluon import mma_sp, wgmma_sp
from slimgemm.kernels.gluon.launch import (
    check_dtype,
    check_epilogue,
    check_scales,
    check_x,
    is_aligned,
    multiprocessors,
    rows_of,
)
from slimgemm.kernels.gluon.mma_tiles import MmaTile, mma_sp_tile
from slimgemm.kernels.gluon.orders import MmaSp, WgmmaSp
from slimgemm.kernels.gluon.wgmma_tiles import WgmmaTile
from slimgemm.kernels.quantize_24 import OUT_DTYPES

# Below this K no int32 sum can overflow: K / 2 products of at most 128 * 128.
INT8_COLUMNS = 2**18
CURE = "spmm_24 and its kernels multiply 16-bit weights"


def _check(
    x: Tensor, n: int, k: int, dtype: torch.dtype, scale_x: Tensor, scale_w: Tensor,
    bias: Tensor | None, act: str, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise ValueError for all that both instructions refuse, but for the GPU's capability."""
    check_dtype(dtype, mma_sp.PTX_TYPES_8, CURE)
    if dtype == torch.int8 and k >= INT8_COLUMNS:
        raise ValueError(f"k must be below {INT8_COLUMNS} for int32 sums of int8 products, got {k}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
    check_scales(x, n, scale_x, scale_w)
    check_epilogue(n, x, bias, None, act)


def scaled_spmm_24_mma_sp(
    x: Tensor,
    w_hw: MmaSp,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    tile: MmaTile | None = None,
    splits: int | None = None,
) -> Tensor:
    """act((x @ dense(w).T) * scale_x * scale_w + bias) on mma.sp m16n8k64.

    On sm_90 e4m3 has no mma.sp of its own: the assembler widens the operands to fp16, which costs
    more instructions than the product, and leaves tiles of at most 32 tokens; wgmma.sp has it.

    Args:
        x: [..., k], int8 (sm_80 or later) or float8_e4m3fn (sm_89 or later), stride 1 along k,
            leading dims fold into one.
        w_hw: the weight [N, k] of the same dtype and device in register order (orders.to_mma_sp).
        scale_x: [...], fp32, contiguous: one scale per token.
        scale_w: [N], fp32, contiguous: one scale per out feature.
        bias: [N], fp16, bf16 or fp32.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        out_dtype: bfloat16, float16 or float32.
        tile, splits: tile and parts of K; chosen from mma_tiles unless given.
    Returns:
        [..., N], `out_dtype`, contiguous; the same bytes on every run. int8 sums are exact, e4m3
        ones as exact as the module docstring says.
    Raises:
        ValueError: a shape, stride, dtype, device or activation is not as above, the GPU is too
            old, or k is so large that int32 sums could overflow.

    Source: orders.py; PTX ISA, mma.sp. Twin: quantize_24.scaled_spmm_24_ref on the Packed24.
    """
    from slimgemm.kernels.spmm_24 import add_parts

    n, k, device = w_hw.n, w_hw.k, w_hw.values.device
    _check(x, n, k, w_hw.dtype, scale_x, scale_w, bias, act, out_dtype)
    check_x(x, n, k, w_hw.dtype, device, (8, 0) if w_hw.dtype == torch.int8 else (8, 9))
    m = math.prod(x.shape[:-1])
    if m == 0 or n == 0:
        return x.new_empty(*x.shape[:-1], n, dtype=out_dtype)
    if tile is None:
        widened = w_hw.dtype != torch.int8 and torch.cuda.get_device_capability(device)[0] == 9
        tile = mma_sp_tile(m, is_aligned(rows_of(x, k)), widened)
    launch = mma_sp.prepare(
        x, w_hw, bias, scale_w, act, tile=tile,
        splits=splits or mma_sp.choose_splits(x, w_hw, tile), token_scale=scale_x,
        out_dtype=out_dtype,
    )  # fmt: skip
    with torch.cuda.device(device):  # Triton launches on the current device
        mma_sp._mma_sp_kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.warps)
        if launch.parts is not None:
            add_parts(launch.parts, launch.out.view(m, n), bias, None, act)
    return launch.out


def scaled_spmm_24_wgmma_sp(
    x: Tensor,
    w_hw: WgmmaSp,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    tile: WgmmaTile | None = None,
) -> Tensor:
    """act((x @ dense(w).T) * scale_x * scale_w + bias) on wgmma.sp m64nNk64, Hopper only.

    Args:
        x: [..., k], int8 or float8_e4m3fn, stride 1 along k, rows of whole 16-byte units, leading
            dims fold into one.
        w_hw: the weight [N, k] of the same dtype and device (orders.to_wgmma_sp).
        scale_x: [...], fp32, contiguous: one scale per token.
        scale_w: [N], fp32, contiguous: one scale per out feature.
        bias: [N], fp16, bf16 or fp32.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        out_dtype: bfloat16, float16 or float32.
        tile: chosen from WGMMA_SP_TILES unless given.
    Returns:
        [..., N], `out_dtype`, contiguous; the same bytes on every run. int8 sums are exact, e4m3
        ones as exact as the module docstring says.
    Raises:
        ValueError: a shape, stride, dtype, device or activation is not as above, k is so large that
            int32 sums could overflow, or the build of this Triton does not place the arena at the
            address that the PTX names.

    Source: orders.py; PTX ISA, wgmma.mma_async.sp. Twin: quantize_24.scaled_spmm_24_ref.
    """
    n, k, dtype, device = w_hw.n, w_hw.k, w_hw.values.dtype, w_hw.values.device
    _check(x, n, k, dtype, scale_x, scale_w, bias, act, out_dtype)
    check_x(x, n, k, dtype, device, (9, 0), exact=True)
    if math.prod(x.shape[:-1]) == 0 or n == 0:
        return x.new_empty(*x.shape[:-1], n, dtype=out_dtype)
    if not is_aligned(rows_of(x, k)):
        raise ValueError(
            "x must have 16-byte aligned rows of whole 16-byte units for TMA, got "
            f"k = {k}, strides {x.stride()}; scaled_spmm_24_mma_sp takes any"
        )
    launch = wgmma_sp.prepare(
        x, w_hw, bias, scale_w, act, tile=tile, programs=multiprocessors(x.device),
        token_scale=scale_x, out_dtype=out_dtype,
    )  # fmt: skip
    return wgmma_sp.run(launch)
