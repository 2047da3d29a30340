"""gemm_channels: Y[:, out] = act(X[:, in] @ W.T + bias); X, Y [M, width], W [N, K].

N out channels of Y and K in channels of X are kept. One program owns a [BLOCK_M, BLOCK_N] tile of
the kept part of Y and one part of K: it gathers its columns of X and scatters its columns of Y by
channel, so no indexed copy of an activation is ever in memory. With more than one part, the parts
go to an fp32 buffer that a second kernel adds in a fixed order. Dropped channels of Y are zeroed
before, which writes the bytes of Y once more where out channels were dropped.

The gradient with respect to X is the same product with the roles exchanged: dY gathered by the
out channels, the transposed view of W, dX scattered by the in channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.channel_layout import RAGGED, ChannelLayout
from slimgemm.kernels.configs import Tile, gemm_channels_tile, split_count
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
from slimgemm.kernels.reference_channels import check_bias_act, check_gemm
from slimgemm.kernels.spmm_24 import finish


@triton.jit
def kept_channels(index_ptr, offs, mask, start, RUN: tl.constexpr):
    """Dense channel of each kept position in `offs`; any channel where `mask` is false."""
    if RUN == 0:
        channel = start + offs
    elif RUN == 1:
        channel = tl.load(index_ptr + offs, mask=mask, other=0)
    else:
        base = tl.load(index_ptr + offs // RUN * RUN, mask=mask, other=0)
        # A run is aligned and lies in one tile: the loads of x may be as wide as RUN channels.
        channel = tl.max_contiguous(tl.multiple_of(base + offs % RUN, RUN), RUN)
    return channel


@triton.jit
def store_channels(
    y_ptr, b_ptr, out_ptr, acc, offs_m, offs_n, mask_m, mask_n, N,
    inner, stride_yo, stride_yi, stride_yc, out_start,
    OUT_RUN: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Store act(acc + bias) at the dense channels of the kept positions `offs_n`."""
    acc = finish(acc, b_ptr, b_ptr, offs_n, N, HAS_BIAS, False, ACT)
    channel = kept_channels(out_ptr, offs_n, mask_n, out_start, OUT_RUN).to(tl.int64)
    rows = row_offsets(offs_m, inner, stride_yo, stride_yi)
    tl.store(
        y_ptr + rows[:, None] + channel[None, :] * stride_yc,
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@triton.jit
def _gemm_channels_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, in_ptr, out_ptr,
    M, N, K, width, inner, in_start, out_start,
    stride_xo, stride_xi, stride_xk, stride_wn, stride_wk, steps_per_part,
    IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    # Neighbouring programs share a tile of W.
    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x_rows = x_ptr + row_offsets(offs_m, inner, stride_xo, stride_xi)[:, None]
    w_rows = w_ptr + offs_n[None, :] * stride_wn

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = part * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, tl.cdiv(K, BLOCK_K))):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        channel = kept_channels(in_ptr, offs_k, mask_k, in_start, IN_RUN).to(tl.int64)
        x = tl.load(
            x_rows + channel[None, :] * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        w = tl.load(
            w_rows + offs_k.to(tl.int64)[:, None] * stride_wk,
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = dot(x, w, acc, PRECISION)

    if PARTIAL:
        where = part.to(tl.int64) * M * N + offs_m[:, None] * N + offs_n[None, :]
        tl.store(y_ptr + where, acc, mask=mask_m[:, None] & mask_n[None, :])
    else:
        store_channels(
            y_ptr, b_ptr, out_ptr, acc, offs_m, offs_n, mask_m, mask_n, N,
            M, 0, width, 1, out_start, OUT_RUN, HAS_BIAS, ACT,
        )  # fmt: skip


@triton.jit
def _add_channel_parts_kernel(
    p_ptr, b_ptr, y_ptr, out_ptr, M, N, parts,
    inner, stride_yo, stride_yi, stride_yc, out_start,
    OUT_RUN: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [:, out] = act(sum of the fp32 parts [parts, M, N] in ascending order + bias)."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    where = offs_m[:, None] * N + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(parts):
        acc += tl.load(p_ptr + where, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        p_ptr += tl.cast(M, tl.int64) * N
    store_channels(
        y_ptr, b_ptr, out_ptr, acc, offs_m, offs_n, mask_m, mask_n, N,
        inner, stride_yo, stride_yi, stride_yc, out_start, OUT_RUN, HAS_BIAS, ACT,
    )  # fmt: skip


def add_channel_parts(
    parts: Tensor, y: Tensor, rows: tuple[int, int, int, int], outs: ChannelLayout,
    bias: Tensor | None, act: str,
) -> None:  # fmt: skip
    """Write act(sum over parts [P, M, N] + bias) to the kept channels of `y`.

    Args:
        rows: inner, stride_outer, stride_inner and channel stride of `y`; see device.row_offsets.
    """
    count, m, n = parts.shape
    block_m, block_n = 4, 128
    _add_channel_parts_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        parts, bias, y, outs.index, m, n, count, *rows, outs.start,
        OUT_RUN=outs.run, HAS_BIAS=bias is not None, ACT=act, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip


def gemm_channels(
    x: Tensor,
    w: Tensor,
    in_index: ChannelIndex | ChannelLayout | None = None,
    out_index: ChannelIndex | ChannelLayout | None = None,
    bias: Tensor | None = None,
    act: str = "none",
    *,
    tile: Tile | None = None,
    split: int | None = None,
) -> Tensor:
    """y[..., out] = act(x[..., in] @ w.T + bias), zeros in the other channels.

    Args:
        x: [..., in width], fp16, bf16 or fp32, any strides, any number of rows, on a GPU.
        w: [kept_out, kept_in], dtype and device of `x`, any strides (a transposed view is a dX).
        in_index, out_index: kept channels, None for all; the index on the device of `x`.
        bias: [kept_out], dtype and device of `x`.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile, split: tile and number of parts of K; from configs.gemm_channels_tile unless given.
    Returns:
        [..., out width], dtype of `x`, contiguous. Accumulated in fp32; tf32 only where
        torch.backends allows it.
    Raises:
        ValueError: a shape, dtype, device, index or activation is not as above.

    Source: channel_layout.py. Twin: reference_channels.gemm_channels_ref.
    """
    ins, outs = check_gemm(x, w, in_index, out_index)
    check_operand("x", x)
    check_bias_act(x, w.shape[0], bias, act)
    n, k = w.shape
    new = x.new_empty if outs.kept == outs.width else x.new_zeros
    y = new(*x.shape[:-1], outs.width)
    rows = as_rows(x)
    if y.numel() == 0 or n == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    precision = matmul_precision(x.dtype)
    ragged = RAGGED in (ins.run, outs.run) or n % 16 > 0 or k % 16 > 0
    scalar = multiply_adds(x.dtype, precision)
    tile = tile or gemm_channels_tile(rows.count, x.itemsize, scalar, ragged)
    programs = triton.cdiv(rows.count, tile.m) * triton.cdiv(n, tile.n)
    steps = triton.cdiv(k, tile.k)
    split = split or split_count(programs, steps, multiprocessors(x.device))
    partial = split > 1
    out = y if not partial else x.new_empty(split, rows.count, n, dtype=torch.float32)
    _gemm_channels_kernel[(programs, split)](
        rows.tensor, w, bias, out, ins.index, outs.index,
        rows.count, n, k, outs.width, rows.inner, ins.start, outs.start,
        rows.stride_outer, rows.stride_inner, rows.stride_column, w.stride(0), w.stride(1),
        triton.cdiv(steps, split),
        IN_RUN=ins.run, OUT_RUN=outs.run, ACT=act, HAS_BIAS=bias is not None, PARTIAL=partial,
        PRECISION=precision,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial:
        add_channel_parts(out, y, (rows.count, 0, outs.width, 1), outs, bias, act)
    return y
