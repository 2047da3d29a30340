"""conv2d_channels_wgrad: dW of conv2d_channels; dY [B, out width, ...], X [B, in width, H, W].

One program owns a [BLOCK_N, BLOCK_K] tile of one group of dW, whose columns run over taps and in
channels, and one part of the output pixels. Parts are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.channel_layout import ChannelLayout
from slimgemm.kernels.configs import (
    CHANNELS_WGRAD_SCALAR_TILE,
    CONV_CHANNELS_WGRAD_TILE,
    Tile,
    few_channels,
    split_count,
)
from slimgemm.kernels.conv_few import few_wgrad
from slimgemm.kernels.device import (
    check_operand,
    conv_precision,
    dot,
    multiply_adds,
    multiprocessors,
)
from slimgemm.kernels.formats import ChannelIndex
from slimgemm.kernels.gemm_channels import kept_channels
from slimgemm.kernels.reference_channels import check_conv_wgrad, conv_geometry
from slimgemm.kernels.spmm_24 import add_parts


@triton.jit
def _conv_channels_wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr, out_ptr, in_ptr,
    M, N, K, groups, height, width, out_pixels, out_width, out_start, in_start,
    stride_yb, stride_yc, stride_yh, stride_yw, stride_xb, stride_xc, stride_xh, stride_xw,
    steps_per_part,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    OUT_RUN: tl.constexpr, IN_RUN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_k = tl.cdiv(K * TAPS, BLOCK_K)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    group = (pid // tiles_n // tiles_k).to(tl.int64)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = pid // tiles_n % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    tap = column // K
    offs_k = column % K
    mask_k = tap < TAPS
    channel_n = kept_channels(out_ptr, group * N + offs_n, mask_n, out_start, OUT_RUN).to(tl.int64)
    channel_k = kept_channels(in_ptr, group * K + offs_k, mask_k, in_start, IN_RUN).to(tl.int64)
    dy_columns = dy_ptr + channel_n[:, None] * stride_yc
    x_columns = x_ptr + channel_k[None, :] * stride_xc
    tap_h = (tap // KERNEL_W * DILATION_H - TOP)[None, :]
    tap_w = (tap % KERNEL_W * DILATION_W - LEFT)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    first = part * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, tl.cdiv(M, BLOCK_M))):
        if WIDE:
            offs_m = tl.cast(step, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        else:
            offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        image = (offs_m // out_pixels).to(tl.int64)
        pixel = (offs_m % out_pixels).to(tl.int32)
        row, col = pixel // out_width, pixel % out_width
        rows_y = image * stride_yb + row.to(tl.int64) * stride_yh + col.to(tl.int64) * stride_yw
        dy_t = tl.load(
            dy_columns + rows_y[None, :], mask=mask_n[:, None] & mask_m[None, :], other=0.0
        )
        h = (row * STRIDE_H)[:, None] + tap_h
        w = (col * STRIDE_W)[:, None] + tap_w
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        where_x = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        x = tl.load(
            x_columns + (image * stride_xb)[:, None] + where_x,
            mask=inside & mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        acc = dot(dy_t, x, acc, PRECISION)

    # dW [groups, N, K, TAPS] is row-major.
    dw_ptr += part.to(tl.int64) * groups * N * K * TAPS
    rows_w = (group * N + offs_n) * (K * TAPS)
    tl.store(
        dw_ptr + rows_w[:, None] + (offs_k.to(tl.int64) * TAPS + tap)[None, :],
        acc.to(dw_ptr.dtype.element_ty),
        mask=mask_n[:, None] & mask_k[None, :],
    )


def conv2d_channels_wgrad(
    dy: Tensor,
    x: Tensor,
    kernel: tuple[int, int],
    in_index: ChannelIndex | ChannelLayout | None = None,
    out_index: ChannelIndex | ChannelLayout | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    tile: Tile | None = None,
    split: int | None = None,
) -> Tensor:
    """Gradient of conv2d_channels with respect to w.

    Args:
        dy: [B, out width, ...], fp16, bf16 or fp32, any strides, on a GPU.
        x: [B, in width, H, W], dtype and device of `dy`, any strides.
        kernel: height and width of w; the other arguments as conv2d_channels has them.
        tile, split: tile and number of parts of the output pixels; chosen here unless given.
    Returns:
        [kept_out, kept_in / groups, *kernel], dtype of `dy`, contiguous.
    Raises:
        ValueError: a shape, dtype, device, index or option is not as above.

    Source: channel_layout.py. Twin: reference_channels.conv2d_channels_wgrad_ref.
    """
    geometry = conv_geometry(kernel, stride, padding, dilation, groups)
    ins, outs = check_conv_wgrad(dy, x, kernel, in_index, out_index, geometry)
    check_operand("dy", dy)
    n, k, taps = outs.kept // groups, ins.kept // groups, kernel[0] * kernel[1]
    dw = dy.new_empty(outs.kept, k, *kernel)
    if dw.numel() == 0:
        return dw
    (stride_h, stride_w), (top, _, left, _), (dilation_h, dilation_w), _ = geometry
    if tile is None and few_channels(n, k):
        return few_wgrad(
            dy, x, dw, ins, outs,
            kernel, geometry.stride, (top, left), geometry.dilation, groups, None, split,
        )  # fmt: skip
    pixels = dy.shape[2] * dy.shape[3]
    m = dy.shape[0] * pixels
    precision = conv_precision(dy.dtype)
    scalar = multiply_adds(dy.dtype, precision)
    tile = tile or (CHANNELS_WGRAD_SCALAR_TILE if scalar else CONV_CHANNELS_WGRAD_TILE)
    programs = groups * triton.cdiv(n, tile.n) * triton.cdiv(k * taps, tile.k)
    steps = triton.cdiv(m, tile.m)
    split = split or split_count(programs, steps, multiprocessors(dy.device))
    out = dw if split == 1 else dy.new_empty(split, outs.kept, k * taps, dtype=torch.float32)
    _conv_channels_wgrad_kernel[(programs, split)](
        dy, x, out, outs.index, ins.index,
        m, n, k, groups, x.shape[2], x.shape[3], pixels, dy.shape[3], outs.start, ins.start,
        *dy.stride(), *x.stride(), triton.cdiv(steps, split),
        KERNEL_H=kernel[0], KERNEL_W=kernel[1], STRIDE_H=stride_h, STRIDE_W=stride_w,
        TOP=top, LEFT=left, DILATION_H=dilation_h, DILATION_W=dilation_w,
        OUT_RUN=outs.run, IN_RUN=ins.run, PRECISION=precision,
        WIDE=m + tile.m >= 2**31, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split > 1:
        add_parts(out, dw.view(outs.kept, k * taps))
    return dw
