"""spmm_24_dgrad: dX = dY @ W from the packed W; dY [M, N], W [N, K], dX [M, K].

One program owns a [BLOCK_M, BLOCK_K] tile of dX and walks N; the same packed tensors as the
forward are decoded in registers, so no dense and no transposed W is ever in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.configs import Tile, spmm_tile
from slimgemm.kernels.device import (
    as_rows,
    dot,
    expand,
    load_packed,
    matmul_precision,
    multiply_adds,
    row_offsets,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.spmm_24 import check_pair


@triton.jit
def _spmm_24_dgrad_kernel(
    dy_ptr, v_ptr, m_ptr, dx_ptr,
    M, N, K, columns, inner,
    stride_yo, stride_yi, stride_yn,
    KEEP: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    offs_m = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_k = pid // tiles_m
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[:, None]
    dy_rows = dy_ptr + row_offsets(offs_m, inner, stride_yo, stride_yi)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for step in range(0, tl.cdiv(N, BLOCK_N)):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        dy = tl.load(
            dy_rows + offs_n[None, :] * stride_yn, mask=mask_m & (offs_n < N)[None, :], other=0.0
        )
        values, meta = load_packed(
            v_ptr, m_ptr, offs_n, pid_k * (BLOCK_K // 8), N, columns, BLOCK_K, KEEP, GROUP
        )
        w = expand(values, meta, BLOCK_N, BLOCK_K, KEEP, GROUP)
        acc = dot(dy, w, acc, PRECISION)

    where_dx = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(
        dx_ptr + where_dx, acc.to(dx_ptr.dtype.element_ty), mask=mask_m & (offs_k < K)[None, :]
    )


def spmm_24_dgrad(dy: Tensor, w: Packed24, *, tile: Tile | None = None) -> Tensor:
    """Gradient of spmm_24 with respect to x: dy @ dense(w).

    Args:
        dy: [..., N], fp16, bf16 or fp32, any strides, on a GPU.
        w: packed weight [N, k] of the same dtype and device.
        tile: from kernels/configs.py unless given.
    Returns:
        [..., k], dtype of `dy`, contiguous; accumulated in fp32.
    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: bit layout, kernels/formats.py. Twin: reference.spmm_24_dgrad_ref.
    """
    n, k = w.shape
    check_pair("dy", dy, n, w)
    dx = dy.new_empty(*dy.shape[:-1], k)
    rows = as_rows(dy)
    if dx.numel() == 0:
        return dx
    precision = matmul_precision(dy.dtype)
    tile = tile or spmm_tile(rows.count, dy.itemsize, multiply_adds(dy.dtype, precision))
    grid = (triton.cdiv(rows.count, tile.m) * triton.cdiv(k, tile.n),)
    _spmm_24_dgrad_kernel[grid](
        rows.tensor, w.values, w.meta, dx,
        rows.count, n, k, w.meta.shape[1], rows.inner,
        rows.stride_outer, rows.stride_inner, rows.stride_column,
        KEEP=w.keep, GROUP=w.group, PRECISION=precision,
        # The forward's sum runs over the tile's k; this one runs over N.
        BLOCK_M=tile.m, BLOCK_N=tile.k, BLOCK_K=tile.n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dx
