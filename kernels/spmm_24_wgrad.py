"""spmm_24_wgrad: dvalues = (dY.T @ X) at the kept positions.

dY [M, N], X [M, K], dvalues [N, stored].

One program owns a [BLOCK_N, BLOCK_K] tile of dW in registers and one part of M; the tile is
thinned to its kept positions before it leaves, so N * K / 2 values are written at 2:4 and no
dense dW is in memory. Parts of M are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.configs import (
    SPMM_24_WGRAD_SCALAR_TILE,
    SPMM_24_WGRAD_TILE,
    Tile,
    split_count,
)
from slimgemm.kernels.device import (
    as_rows,
    dot,
    matmul_precision,
    multiply_adds,
    multiprocessors,
    row_offsets,
    store_kept,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.reference import check_same_rows
from slimgemm.kernels.spmm_24 import add_parts, check_pair


@triton.jit
def _spmm_24_wgrad_kernel(
    dy_ptr, x_ptr, m_ptr, dv_ptr,
    M, N, K, columns, inner_y, inner_x,
    stride_yo, stride_yi, stride_yn, stride_xo, stride_xi, stride_xk, steps_per_part,
    KEEP: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    STORED: tl.constexpr = 8 * KEEP // GROUP
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    offs_n = (pid % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid_k = pid // tiles_n
    offs_k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    first = part * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, tl.cdiv(M, BLOCK_M))):
        offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        rows_y = row_offsets(offs_m, inner_y, stride_yo, stride_yi)[None, :]
        rows_x = row_offsets(offs_m, inner_x, stride_xo, stride_xi)[:, None]
        dy_t = tl.load(
            dy_ptr + rows_y + offs_n[:, None] * stride_yn,
            mask=(offs_n < N)[:, None] & (offs_m < M)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + rows_x + offs_k[None, :] * stride_xk,
            mask=(offs_m < M)[:, None] & (offs_k < K)[None, :],
            other=0.0,
        )
        acc = dot(dy_t, x, acc, PRECISION)

    # A NaN or Inf in dy times the zero read past K is NaN, and the padding of values holds +0.0.
    acc = tl.where((offs_k < K)[None, :], acc, 0.0)
    dv_ptr += part.to(tl.int64) * N * (columns * STORED)
    store_kept(
        dv_ptr, m_ptr, acc, offs_n, pid_k * (BLOCK_K // 8), N, columns,
        BLOCK_N, BLOCK_K, KEEP, GROUP,
    )  # fmt: skip


def spmm_24_wgrad(
    dy: Tensor, x: Tensor, w: Packed24, *, tile: Tile | None = None, split: int | None = None
) -> Tensor:
    """Gradient of spmm_24 with respect to the stored values.

    Args:
        dy: [..., N], fp16, bf16 or fp32, any strides, on a GPU.
        x: [..., k] with the leading shape, dtype and device of `dy`.
        w: packed weight [N, k] of the same dtype and device; only its metadata is read.
        tile, split: tile and number of parts of the rows; from kernels/configs.py unless given.
    Returns:
        [N, stored], dtype of `dy`: dy.T @ x at the kept positions, 0 in the padding of k.
    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: bit layout, kernels/formats.py. Twin: reference.spmm_24_wgrad_ref.
    """
    n, k = w.shape
    check_pair("dy", dy, n, w)
    check_pair("x", x, k, w)
    check_same_rows(dy, x)
    rows_y, rows_x = as_rows(dy), as_rows(x)
    dvalues = torch.empty_like(w.values)
    if dvalues.numel() == 0:
        return dvalues
    precision = matmul_precision(dy.dtype)
    scalar = multiply_adds(dy.dtype, precision)
    tile = tile or (SPMM_24_WGRAD_SCALAR_TILE if scalar else SPMM_24_WGRAD_TILE)
    programs = triton.cdiv(n, tile.n) * triton.cdiv(k, tile.k)
    steps = triton.cdiv(rows_y.count, tile.m)
    split = split or split_count(programs, steps, multiprocessors(dy.device))
    out = dvalues if split == 1 else dy.new_empty(split, *dvalues.shape, dtype=torch.float32)
    _spmm_24_wgrad_kernel[(programs, split)](
        rows_y.tensor, rows_x.tensor, w.meta, out,
        rows_y.count, n, k, w.meta.shape[1], rows_y.inner, rows_x.inner,
        rows_y.stride_outer, rows_y.stride_inner, rows_y.stride_column,
        rows_x.stride_outer, rows_x.stride_inner, rows_x.stride_column,
        triton.cdiv(steps, split),
        KEEP=w.keep, GROUP=w.group, PRECISION=precision,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dvalues if split == 1 else add_parts(out, dvalues)
