"""gemm_channels_wgrad: dW = dY[:, out].T @ X[:, in]; dY [M, out width], X [M, in width], dW [N, K].

One program owns a [BLOCK_N, BLOCK_K] tile of dW and one part of M, and gathers the columns of both
operands by channel. Parts of M are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.channel_layout import ChannelLayout
from slimgemm.kernels.configs import Tile, gemm_channels_wgrad_tile, split_count
from slimgemm.kernels.device import (
    as_rows,
    check_operand,
    dot,
    matmul_precision,
    multiply_adds,
    multiprocessors,
    row_offsets,
)
from slimgemm.kernels.formats import ChannelIndex
from slimgemm.kernels.gemm_channels import kept_channels
from slimgemm.kernels.reference_channels import check_gemm_wgrad
from slimgemm.kernels.spmm_24 import add_parts


@triton.jit
def _gemm_channels_wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr, out_ptr, in_ptr,
    M, N, K, inner_y, inner_x, out_start, in_start,
    stride_yo, stride_yi, stride_yn, stride_xo, stride_xi, stride_xk, steps_per_part,
    OUT_RUN: tl.constexpr, IN_RUN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    offs_n = (pid % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (pid // tiles_n).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    channel_n = kept_channels(out_ptr, offs_n, mask_n, out_start, OUT_RUN).to(tl.int64)
    channel_k = kept_channels(in_ptr, offs_k, mask_k, in_start, IN_RUN).to(tl.int64)
    dy_columns = dy_ptr + channel_n[:, None] * stride_yn
    x_columns = x_ptr + channel_k[None, :] * stride_xk

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    first = part * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, tl.cdiv(M, BLOCK_M))):
        offs_m = tl.cast(step, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows_y = row_offsets(offs_m, inner_y, stride_yo, stride_yi)[None, :]
        rows_x = row_offsets(offs_m, inner_x, stride_xo, stride_xi)[:, None]
        dy_t = tl.load(dy_columns + rows_y, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
        x = tl.load(x_columns + rows_x, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc = dot(dy_t, x, acc, PRECISION)

    where = part.to(tl.int64) * N * K + offs_n[:, None] * K + offs_k[None, :]
    tl.store(
        dw_ptr + where, acc.to(dw_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :]
    )


def gemm_channels_wgrad(
    dy: Tensor,
    x: Tensor,
    in_index: ChannelIndex | ChannelLayout | None = None,
    out_index: ChannelIndex | ChannelLayout | None = None,
    *,
    tile: Tile | None = None,
    split: int | None = None,
) -> Tensor:
    """Gradient of gemm_channels with respect to w: dy[..., out].T @ x[..., in].

    Args:
        dy: [..., out width], fp16, bf16 or fp32, any strides, on a GPU.
        x: [..., in width] with the leading shape, dtype and device of `dy`.
        in_index, out_index: kept channels, None for all; the index on the device of `x`.
        tile, split: tile and number of parts of the rows; chosen here unless given.
    Returns:
        [kept_out, kept_in], dtype of `dy`, contiguous.
    Raises:
        ValueError: a shape, dtype, device or index is not as above.

    Source: channel_layout.py. Twin: reference_channels.gemm_channels_wgrad_ref.
    """
    ins, outs = check_gemm_wgrad(dy, x, in_index, out_index)
    check_operand("dy", dy)
    n, k = outs.kept, ins.kept
    dw = dy.new_empty(n, k)
    if dw.numel() == 0:
        return dw
    rows_y, rows_x = as_rows(dy), as_rows(x)
    precision = matmul_precision(dy.dtype)
    scalar = multiply_adds(dy.dtype, precision)
    tile = tile or gemm_channels_wgrad_tile(dy.itemsize, scalar)
    programs = triton.cdiv(n, tile.n) * triton.cdiv(k, tile.k)
    steps = triton.cdiv(rows_y.count, tile.m)
    split = split or split_count(programs, steps, multiprocessors(dy.device))
    out = dw if split == 1 else dy.new_empty(split, n, k, dtype=torch.float32)
    _gemm_channels_wgrad_kernel[(programs, split)](
        rows_y.tensor, rows_x.tensor, out, outs.index, ins.index,
        rows_y.count, n, k, rows_y.inner, rows_x.inner, outs.start, ins.start,
        rows_y.stride_outer, rows_y.stride_inner, rows_y.stride_column,
        rows_x.stride_outer, rows_x.stride_inner, rows_x.stride_column,
        triton.cdiv(steps, split),
        OUT_RUN=outs.run, IN_RUN=ins.run, PRECISION=precision,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dw if split == 1 else add_parts(out, dw)
