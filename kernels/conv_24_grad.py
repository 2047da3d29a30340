"""Gradients of conv2d_24: dX from the packed W, and dvalues at the kept positions.

dX[b, h, w, c] sums dY[b, oh, ow, o] * W[o, y, x, c] over the out channels o and the taps for which
h + top - y * dilation is a multiple of the stride, oh. Pixels with the same h mod stride and w mod
stride share these taps, so a program owns a [BLOCK_M, BLOCK_K] tile of pixels of one such class and
channels, and walks only the taps that reach it; no product is made to be masked away.

dvalues is the weight gradient dY.T @ im2col(X), thinned to its kept positions before it leaves
registers: one program owns a [BLOCK_N, BLOCK_K] tile of it and one part of the pixels. No dense W
and no dense dW is in memory, and parts are added in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.channel_layout import every_channel
from slimgemm.kernels.configs import (
    Tile,
    conv_tile,
    conv_wgrad_tile,
    few_channels,
    split_count,
)
from slimgemm.kernels.conv_24 import (
    add_images,
    check_conv_operand,
    load_patches,
    new_images,
)
from slimgemm.kernels.conv_few import FewWeight, few_wgrad, multiply_few
from slimgemm.kernels.conv_layout import Padding, check_output_gradient, convolution
from slimgemm.kernels.conv_taps import (
    index_type,
    period_and_inverse,
    pixel_of,
    reaching_taps,
    tap_constants,
)
from slimgemm.kernels.device import (
    conv_precision,
    dot,
    expand,
    load_packed,
    multiply_adds,
    multiprocessors,
    store_kept,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.spmm_24 import add_parts


@triton.jit
def _conv2d_24_dgrad_kernel(
    dy_ptr, v_ptr, m_ptr, dx_ptr,
    B, N, C, columns, CP, H, W, out_h, out_w, groups, tiles_m, classes_w, kernel_h, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    period_h, period_w, inverse_h, inverse_w,
    stride_yb, stride_yc, stride_yh, stride_yw, stride_xb, stride_xp, stride_xc, stride_part,
    KEEP: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(C, BLOCK_K)
    part = tl.program_id(1)
    pid = tl.program_id(0) // tiles_m
    pid_c = pid % tiles_c
    conv_group = (pid // tiles_c % groups).to(tl.int64)
    pid_class = pid // tiles_c // groups
    class_h, class_w = pid_class // classes_w, pid_class % classes_w
    first_n = conv_group * N
    last_n = first_n + N

    # (i, j) in the class is (class_h + i * stride_h, class_w + j * stride_w) in the image.
    offs_m = (tl.program_id(0) % tiles_m).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, cols = tl.cdiv(H - class_h, stride_h), tl.cdiv(W - class_w, stride_w)
    image, i, j = pixel_of(offs_m, rows, cols)
    mask_m = image < B
    first_h, count_h = reaching_taps(
        class_h + pad_h, kernel_h, stride_h, dilation_h, period_h, inverse_h
    )
    first_w, count_w = reaching_taps(
        class_w + pad_w, kernel_w, stride_w, dilation_w, period_w, inverse_w
    )

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    steps_n = tl.cdiv(N, BLOCK_N)
    steps = count_h * count_w * steps_n
    per_part = tl.cdiv(steps, tl.num_programs(1))
    for step in range(part * per_part, tl.minimum(part * per_part + per_part, steps)):
        reached = step // steps_n
        tap_h = first_h + reached // count_w * period_h
        tap_w = first_w + reached % count_w * period_w
        # Both divisions are exact.
        oh = i + (class_h + pad_h - tap_h * dilation_h) // stride_h
        ow = j + (class_w + pad_w - tap_w * dilation_w) // stride_w
        inside = (oh >= 0) & (oh < out_h) & (ow >= 0) & (ow < out_w) & mask_m
        offs_n = first_n + step % steps_n * BLOCK_N + tl.arange(0, BLOCK_N)
        where = image * stride_yb + oh.to(tl.int64) * stride_yh + ow.to(tl.int64) * stride_yw
        dy = tl.load(
            dy_ptr + where[:, None] + (offs_n * stride_yc)[None, :],
            mask=inside[:, None] & (offs_n < last_n)[None, :],
            other=0.0,
        )
        # Past the tap's last channel this reads the next tap, for columns that are not stored.
        byte = (tap_h * kernel_w + tap_w) * (CP // 8) + pid_c * (BLOCK_K // 8)
        values, meta = load_packed(
            v_ptr, m_ptr, offs_n, byte, last_n, columns, BLOCK_K, KEEP, GROUP
        )
        w = expand(values, meta, BLOCK_N, BLOCK_K, KEEP, GROUP)
        acc = dot(dy, w, acc, PRECISION)

    pixel = (class_h + i * stride_h).to(tl.int64) * W + class_w + j * stride_w
    offs_c = pid_c * BLOCK_K + tl.arange(0, BLOCK_K)
    where_c = (conv_group * C + offs_c) * stride_xc
    dx_ptr += part.to(tl.int64) * stride_part
    tl.store(
        dx_ptr + (image * stride_xb + pixel * stride_xp)[:, None] + where_c[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_c < C)[None, :],
    )


@triton.jit
def _conv2d_24_wgrad_kernel(
    dy_ptr, x_ptr, m_ptr, dv_ptr,
    M, N, K, columns, H, W, C, CP, out_h, out_w, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    stride_yb, stride_yc, stride_yh, stride_yw, stride_xb, stride_xc, stride_xh, stride_xw,
    stride_part, steps_per_part,
    KEEP: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE_TAPS: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    part = tl.program_id(1)
    pid_n = tl.program_id(0) // tiles_k
    pid_k = tl.program_id(0) % tiles_k
    conv_group = (pid_n // tiles_n).to(tl.int64)
    first_n = conv_group * N
    last_n = first_n + N
    offs_n = first_n + pid_n % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += conv_group * C * stride_xc

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    first = part.to(INDEX) * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, tl.cdiv(M, BLOCK_M))):
        offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        image, row, column = pixel_of(offs_m, out_h, out_w)
        where = image * stride_yb + row.to(tl.int64) * stride_yh + column.to(tl.int64) * stride_yw
        dy_t = tl.load(
            dy_ptr + (offs_n * stride_yc)[:, None] + where[None, :],
            mask=(offs_n < last_n)[:, None] & mask_m[None, :],
            other=0.0,
        )
        x = load_patches(
            x_ptr, image, row * stride_h - pad_h, column * stride_w - pad_w, mask_m, pid_k,
            H, W, C, CP, K, kernel_w, dilation_h, dilation_w,
            stride_xb, stride_xc, stride_xh, stride_xw, BLOCK_K, WHOLE_TAPS,
        )  # fmt: skip
        acc = dot(dy_t, x, acc, PRECISION)

    # The padding of C is +0.0 by the format, also where dy holds a NaN.
    channel = (pid_k * BLOCK_K + tl.arange(0, BLOCK_K)) % CP
    acc = tl.where((channel < C)[None, :], acc, 0.0)
    dv_ptr += part.to(tl.int64) * stride_part
    store_kept(
        dv_ptr, m_ptr, acc, offs_n, pid_k * (BLOCK_K // 8), last_n, columns,
        BLOCK_N, BLOCK_K, KEEP, GROUP,
    )  # fmt: skip


def conv2d_24_dgrad(
    dy: Tensor, w: Packed24, weight_shape: Sequence[int], input_shape: Sequence[int],
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *, tile: Tile | None = None, split: int | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of conv2d_24 with respect to x.

    Args:
        dy: [B, O, OH, OW], fp16, bf16 or fp32, any strides, on a GPU.
        w: packed weight of the same dtype and device.
        weight_shape, stride, padding, dilation, groups: as conv2d_24.
        input_shape: (B, C * groups, H, W) of x.
        tile, split: tile (n counts channels, k out channels) and number of parts of the sum.
    Returns:
        [B, C * groups, H, W], dtype of `dy`; channels_last if `dy` is, else contiguous.
    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Source: layout, kernels/conv_layout.py. Twin: reference_conv.conv2d_24_dgrad_ref.
    """
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_conv_operand("dy", dy, conv.out, w, conv)
    check_output_gradient(dy, input_shape, conv)
    batch, _, height, width = input_shape
    classes = [min(s, size) for s, size in zip(conv.stride, (height, width), strict=True)]
    pixels = batch * triton.cdiv(height, conv.stride[0]) * triton.cdiv(width, conv.stride[1])
    n = conv.out // groups
    few = tile is None and split in (None, 1) and few_channels(n, conv.channels)
    precision = conv_precision(dy.dtype)
    tile = tile or conv_tile(pixels, conv.channels, dy.itemsize, multiply_adds(dy.dtype, precision))
    tiles_m = triton.cdiv(pixels, tile.m)
    programs = tiles_m * triton.cdiv(conv.channels, tile.n) * groups * classes[0] * classes[1]
    reach = [
        (*period_and_inverse(s, d), k)
        for s, d, k in zip(conv.stride, conv.dilation, conv.kernel, strict=True)
    ]
    steps = math.prod(triton.cdiv(k, period) for period, _, k in reach) * triton.cdiv(n, tile.k)
    split = 1 if few else split or split_count(programs, steps, multiprocessors(dy.device))
    dx, target, strides = new_images(dy, conv.channels * groups, (height, width), split)
    if dx.numel() == 0:
        return dx
    if few:
        weight = FewWeight(w.values, w.meta, keep=w.keep, group=w.group, turned=True)
        constants = tap_constants(conv.stride, conv.corner, conv.dilation, forward=False)
        channels = every_channel(conv.out), every_channel(dx.shape[1])
        multiply_few(dy, weight, dx, *channels, conv.kernel, constants, groups)
        return dx
    _conv2d_24_dgrad_kernel[(programs, split)](
        dy, w.values, w.meta, target,
        batch, n, conv.channels, w.meta.shape[1], conv.padded_channels,
        height, width, *dy.shape[2:], groups, tiles_m, classes[1], *conv.kernel,
        *conv.stride, conv.padding[0], conv.padding[2], *conv.dilation,
        reach[0][0], reach[1][0], reach[0][1], reach[1][1],
        *dy.stride(), *strides,
        KEEP=w.keep, GROUP=w.group, PRECISION=precision,
        INDEX=index_type(pixels, tile.m),
        # The forward's sum runs over the tile's k; this one runs over N.
        BLOCK_M=tile.m, BLOCK_N=tile.k, BLOCK_K=tile.n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dx if split == 1 else add_images(target, dx)


def conv2d_24_wgrad(
    dy: Tensor, x: Tensor, w: Packed24, weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *, tile: Tile | None = None, split: int | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of conv2d_24 with respect to the stored values.

    Args:
        dy: [B, O, OH, OW], fp16, bf16 or fp32, any strides, on a GPU.
        x: [B, C * groups, H, W] of the dtype and device of `dy`, any strides.
        w: packed weight of the same dtype and device; only its metadata is read.
        weight_shape, stride, padding, dilation, groups: as conv2d_24.
        tile, split: tile and number of parts of the pixels; chosen here unless given.
    Returns:
        [O, stored], dtype of `dy`; 0 in the padding of the channels.
    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Source: layout, kernels/conv_layout.py. Twin: reference_conv.conv2d_24_wgrad_ref.
    """
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_conv_operand("dy", dy, conv.out, w, conv)
    check_conv_operand("x", x, conv.channels * groups, w, conv)
    check_output_gradient(dy, x.shape, conv)
    if tile is None and few_channels(conv.out // groups, conv.channels):
        channels = every_channel(x.shape[1]), every_channel(conv.out)
        dvalues = torch.empty_like(w.values)
        return few_wgrad(
            dy, x, dvalues, *channels,
            conv.kernel, conv.stride, conv.corner, conv.dilation, groups, w, split,
        )  # fmt: skip
    size = dy.shape[2:]
    pixels, n = dy.shape[0] * size[0] * size[1], conv.out // groups
    precision = conv_precision(dy.dtype)
    tile = tile or conv_wgrad_tile(n, multiply_adds(dy.dtype, precision))
    programs = triton.cdiv(n, tile.n) * triton.cdiv(conv.k, tile.k) * groups
    steps = triton.cdiv(pixels, tile.m)
    split = split or split_count(programs, steps, multiprocessors(dy.device))
    dvalues = torch.empty_like(w.values)
    out = dvalues if split == 1 else dy.new_empty(split, *dvalues.shape, dtype=torch.float32)
    _conv2d_24_wgrad_kernel[(programs, split)](
        dy, x, w.meta, out,
        pixels, n, conv.k, w.meta.shape[1], x.shape[2], x.shape[3],
        conv.channels, conv.padded_channels, *size, conv.kernel[1],
        *conv.stride, conv.padding[0], conv.padding[2], *conv.dilation,
        *dy.stride(), *x.stride(), dvalues.numel(), triton.cdiv(steps, split),
        KEEP=w.keep, GROUP=w.group, PRECISION=precision,
        WHOLE_TAPS=conv.padded_channels % tile.k == 0, INDEX=index_type(pixels, tile.m),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dvalues if split == 1 else add_parts(out, dvalues)
