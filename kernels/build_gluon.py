"""Builds of the Gluon kernels: each case compiles its kernel itself and returns it.

Their launchers ask the GPU what it is and how many multiprocessors it has, so the cases begin at
`prepare`, which says all about a launch but those.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from slimgemm.kernels.build_operands import ALIGNED, operand
from slimgemm.kernels.conv_layout import convolution
from slimgemm.kernels.gluon.mma_packed_tiles import MMA_PACKED_TILES, mma_packed_tile
from slimgemm.kernels.gluon.mma_tiles import ARCHITECTURES as MMA_SP_ARCHS
from slimgemm.kernels.gluon.mma_tiles import MMA_SP_TILES, MMA_SP_WIDENED_TILES, mma_sp_tile
from slimgemm.kernels.gluon.orders import to_mma_sp, to_wgmma_sp
from slimgemm.kernels.gluon.wgmma_tiles import WGMMA_SP_TILES
from slimgemm.kernels.quantize_24 import quantize_24
from slimgemm.kernels.reference import prune_24_ref

__all__ = [
    "MMA_SP_ARCHS",
    "conv2d_24_mma",
    "conv2d_24_wgmma",
    "pack_dense",
    "scaled_spmm_24_mma_sp",
    "scaled_spmm_24_wgmma_sp",
    "spmm_24_mma_packed",
    "spmm_24_mma_sp",
    "spmm_24_wgmma_packed",
    "spmm_24_wgmma_sp",
    "unpack_dense",
]

Cases = Iterator[tuple[str, Callable[[], Any]]]


def spmm_24_mma_sp(dtype: torch.dtype, arch: str) -> Cases:
    """Every tile of the sparse tensor core kernel with a full epilogue, split, and any strides."""
    file = importlib.import_module("slimgemm.kernels.gluon.mma_sp")
    _, n, k = ALIGNED

    def warm(m: int, k: int, splits: int) -> Any:
        bias, x = operand(n, dtype=dtype), operand(m, k, dtype=dtype)
        weight = to_mma_sp(prune_24_ref(torch.zeros(n, k, dtype=dtype)))
        go = file.prepare(x, weight, bias, bias, "gelu", splits=splits)  # its own choice of tile
        warmup = file._mma_sp_kernel.warmup
        return warmup(*go.args, grid=go.grid, num_warps=go.warps, **go.constants)

    for m in MMA_SP_TILES:
        yield f"m {m}", functools.partial(warm, m, k, 1)
        if mma_sp_tile(m, aligned=False).tokens >= m:
            yield f"m {m} ragged", functools.partial(warm, m, k - 3, 1)
        yield f"m {m} split", functools.partial(warm, m, k, 4)


def spmm_24_mma_packed(dtype: torch.dtype, arch: str) -> Cases:
    """Every tile from the canonical format with a full epilogue: K of whole blocks, K with a mask,
    split, and rows of x at any address."""
    file = importlib.import_module("slimgemm.kernels.gluon.mma_packed")
    n = ALIGNED[1]

    def warm(most: int, k: int, splits: int, aligned: bool) -> Any:
        bias, x = operand(n, dtype=dtype), operand(most, k + (not aligned), dtype=dtype)[:, :k]
        weight = prune_24_ref(torch.zeros(n, k, dtype=dtype))
        go = file.prepare(x, weight, bias, bias, "gelu", splits=splits)  # its own choice of tile
        warmup = file._mma_packed_kernel.warmup
        return warmup(*go.args, grid=go.grid, num_warps=go.warps, **go.constants)

    for most in MMA_PACKED_TILES:
        # Blocks of 256 columns for each warp along K; 32 less is a block with a mask.
        whole = 256 * mma_packed_tile(most).warps_k
        yield f"m {most}", functools.partial(warm, most, whole, 1, True)
        yield f"m {most} masked", functools.partial(warm, most, whole - 32, 1, True)
        yield f"m {most} split", functools.partial(warm, most, 2 * whole, 4, True)
        if mma_packed_tile(most, aligned=False).tokens >= most:
            yield f"m {most} odd", functools.partial(warm, most, whole, 1, False)


def conv2d_24_mma(dtype: torch.dtype, arch: str) -> Cases:
    """Every tile of the convolution on mma.sp with a full epilogue: 3 x 3, 1 x 1, and split."""
    file = importlib.import_module("slimgemm.kernels.gluon.mma_conv")
    out = ALIGNED[1]

    def warm(most: int, kernel: int, channels: int, splits: int) -> Any:
        conv = convolution((out, channels, kernel, kernel), padding=kernel // 2)
        weight = prune_24_ref(torch.zeros(out, conv.k, dtype=dtype))
        x = operand(1, 1, most, channels, dtype=dtype).permute(0, 3, 1, 2)
        go = file.prepare(x, weight, conv, operand(out, dtype=dtype), "gelu", splits=splits)
        warmup = file._mma_packed_kernel.warmup
        return warmup(*go.args, grid=go.grid, num_warps=go.warps, **go.constants)

    for most in {file.mma_conv_tile(m): m for m in MMA_PACKED_TILES}.values():
        yield f"m {most}", functools.partial(warm, most, 3, 64, 1)
        yield f"m {most} 1x1", functools.partial(warm, most, 1, 1024, 1)
        yield f"m {most} split", functools.partial(warm, most, 3, 128, 4)


def conv2d_24_wgmma(dtype: torch.dtype, arch: str) -> Cases:
    """The convolution on wgmma.sp: 3 x 3, 1 x 1, and with a full epilogue."""
    file = importlib.import_module("slimgemm.kernels.gluon.wgmma_conv")
    core = importlib.import_module("slimgemm.kernels.gluon.wgmma_sp")
    out = ALIGNED[1]

    def warm(kernel: int, act: str) -> Any:
        conv = convolution((out, 64, kernel, kernel), padding=kernel // 2)
        weight = prune_24_ref(torch.zeros(out, conv.k, dtype=dtype))
        x = operand(2, 14, 14, 64, dtype=dtype).permute(0, 3, 1, 2)
        bias = None if act == "none" else operand(out, dtype=dtype)
        go = file.prepare(x, weight, conv, bias, act)
        args = [core._descriptor(a) if isinstance(a, core.TmaView) else a for a in go.args]
        warmup = core._wgmma_sp_kernel.warmup
        return warmup(*args, grid=go.grid, num_warps=go.warps, **go.constants)

    yield "3x3", functools.partial(warm, 3, "none")
    yield "1x1", functools.partial(warm, 1, "none")
    yield "3x3 gelu", functools.partial(warm, 3, "gelu")


def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An operand of any dtype, by way of fp16: not every maker of tensors knows 8-bit floats."""
    return operand(*shape, dtype=torch.float16).to(dtype)


def scaled_spmm_24_mma_sp(dtype: torch.dtype, arch: str) -> Cases:
    """Every tile on 8-bit values with a full epilogue, split, and any strides."""
    file = importlib.import_module("slimgemm.kernels.gluon.mma_sp")
    _, n, k = ALIGNED
    if dtype == torch.float8_e4m3fn and arch in ("sm_80", "sm_86"):
        return  # 8-bit floats begin with sm_89
    widened = dtype == torch.float8_e4m3fn and arch == "sm_90"

    def warm(m: int, k: int, splits: int) -> Any:
        scale = operand(n, dtype=torch.float32)
        packed, _ = quantize_24(torch.zeros(n, k), dtype)
        x = zeros(m, k, dtype=dtype)
        tile = mma_sp_tile(m, k % 16 == 0, widened)
        go = file.prepare(
            x, to_mma_sp(packed), scale, scale, "gelu", tile=tile, splits=splits,
            token_scale=operand(m, dtype=torch.float32), out_dtype=torch.bfloat16,
        )  # fmt: skip
        warmup = file._mma_sp_kernel.warmup
        return warmup(*go.args, grid=go.grid, num_warps=go.warps, **go.constants)

    for m in MMA_SP_WIDENED_TILES if widened else MMA_SP_TILES:
        yield f"m {m}", functools.partial(warm, m, k, 1)
        if mma_sp_tile(m, False, widened).tokens >= m:
            yield f"m {m} ragged", functools.partial(warm, m, k - 3, 1)
        yield f"m {m} split", functools.partial(warm, m, k, 4)


def spmm_24_wgmma_sp(dtype: torch.dtype, arch: str, packed: bool = False) -> Cases:
    """Every tile of the Hopper kernel, plain and with a full epilogue; `packed`: from the canonical
    format."""
    file = importlib.import_module("slimgemm.kernels.gluon.wgmma_sp")
    _, n, k = ALIGNED

    def warm(tokens: int, act: str) -> Any:
        x = operand(tokens, k, dtype=dtype)
        bias = None if act == "none" else operand(n, dtype=dtype)
        weight = prune_24_ref(torch.zeros(n, k, dtype=dtype))
        ordered = weight if packed else to_wgmma_sp(weight)
        go = file.prepare(x, ordered, bias, bias, act, tile=WGMMA_SP_TILES[tokens])
        args = [file._descriptor(a) if isinstance(a, file.TmaView) else a for a in go.args]
        warmup = file._wgmma_sp_kernel.warmup
        return warmup(*args, grid=go.grid, num_warps=go.warps, **go.constants)

    for tokens in WGMMA_SP_TILES:
        yield f"m {tokens}", functools.partial(warm, tokens, "none")
        yield f"m {tokens} gelu", functools.partial(warm, tokens, "gelu")


spmm_24_wgmma_packed = functools.partial(spmm_24_wgmma_sp, packed=True)


def scaled_spmm_24_wgmma_sp(dtype: torch.dtype, arch: str) -> Cases:
    """Every tile of the Hopper kernel on 8-bit values, plain and with a full epilogue."""
    file = importlib.import_module("slimgemm.kernels.gluon.wgmma_sp")
    _, n, k = ALIGNED

    def warm(tokens: int, act: str) -> Any:
        scale = operand(n, dtype=torch.float32)
        bias = None if act == "none" else scale
        packed, _ = quantize_24(torch.zeros(n, k), dtype)
        go = file.prepare(
            zeros(tokens, k, dtype=dtype), to_wgmma_sp(packed), bias, scale, act,
            tile=WGMMA_SP_TILES[tokens], token_scale=operand(tokens, dtype=torch.float32),
            out_dtype=torch.bfloat16,
        )  # fmt: skip
        args = [file._descriptor(a) if isinstance(a, file.TmaView) else a for a in go.args]
        warmup = file._wgmma_sp_kernel.warmup
        return warmup(*args, grid=go.grid, num_warps=go.warps, **go.constants)

    for tokens in WGMMA_SP_TILES:
        yield f"m {tokens}", functools.partial(warm, tokens, "none")
        yield f"m {tokens} gelu", functools.partial(warm, tokens, "gelu")


def pack_dense(dtype: torch.dtype, arch: str, fragments: bool) -> Cases:
    """From a dense weight to the order of mma.sp (`fragments`) or wgmma.sp; of any strides too."""
    file = importlib.import_module("slimgemm.kernels.gluon.pack_dense")
    _, n, k = ALIGNED

    def warm(columns: int) -> Any:
        go = file.prepare_pack(zeros(n, columns, dtype=dtype), fragments)
        warmup = file._pack_dense_kernel.warmup
        return warmup(*go.args, grid=go.grid, num_warps=go.warps, **go.constants)

    yield "16-byte rows", functools.partial(warm, k)
    yield "ragged", functools.partial(warm, k - 3)


def unpack_dense(dtype: torch.dtype, arch: str, fragments: bool) -> Cases:
    """The inverse of pack_dense."""
    file = importlib.import_module("slimgemm.kernels.gluon.unpack")
    _, n, k = ALIGNED

    def warm(columns: int) -> Any:
        packed = prune_24_ref(torch.zeros(n, columns, dtype=torch.float16))
        packed = packed._replace(values=packed.values.to(dtype))
        go = file.prepare_unpack(to_mma_sp(packed) if fragments else to_wgmma_sp(packed))
        warmup = file._unpack_dense_kernel.warmup
        return warmup(*go.args, grid=go.grid, num_warps=go.warps, **go.constants)

    yield "16-byte rows", functools.partial(warm, k)
    yield "ragged", functools.partial(warm, k - 3)
