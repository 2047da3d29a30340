"""conv2d_channels: Y[:, out] = act(conv2d(X[:, in], W) + bias); X, Y [B, width, height, width].

Implicit GEMM: rows are output pixels, columns the kept out channels of one group, and the inner
axis runs over the taps of the kernel and the kept in channels of the group. One program owns a
[BLOCK_M, BLOCK_N] tile of one group and one part of the inner axis; channels are gathered from X
and scattered to Y by index, taps outside X read as zero. Parts are added in a fixed order.

The gradient with respect to X is the same kernel with the roles exchanged: a program then owns
pixels of one class, and walks the taps that reach it (conv_taps.py). channels_last operands are the
fast case. Groups of few channels take the multiply-adds of conv_few.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.channel_layout import ChannelLayout
from slimgemm.kernels.configs import (
    CONV_CHANNELS_TILES,
    Tile,
    channels_tile,
    few_channels,
    split_count,
)
from slimgemm.kernels.conv_few import FewWeight, multiply_few
from slimgemm.kernels.conv_layout import memory_format
from slimgemm.kernels.conv_taps import class_taps, index_type, pixel_of, tap_constants
from slimgemm.kernels.device import (
    check_operand,
    conv_precision,
    dot,
    multiply_adds,
    multiprocessors,
)
from slimgemm.kernels.formats import ChannelIndex
from slimgemm.kernels.gemm_channels import (
    add_channel_parts,
    kept_channels,
    store_channels,
)
from slimgemm.kernels.reference_channels import (
    ConvGeometry,
    check_bias_act,
    check_conv,
    check_conv_dgrad,
    conv_geometry,
    output_size,
)


@triton.jit
def _conv_channels_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, in_ptr, out_ptr,
    B, N, K, groups, tiles_m, classes_w, height, width, out_height, out_width, in_start, out_start,
    stride_xb, stride_xc, stride_xh, stride_xw,
    stride_wg, stride_wn, stride_wk, stride_wr, stride_ws,
    stride_yb, stride_yp, stride_yc,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    MUL_H: tl.constexpr, MUL_W: tl.constexpr, ADD_H: tl.constexpr, ADD_W: tl.constexpr,
    TAP_H: tl.constexpr, TAP_W: tl.constexpr, DIV_H: tl.constexpr, DIV_W: tl.constexpr,
    PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr, INVERSE_H: tl.constexpr,
    INVERSE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr, PER_TAP: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(1)
    pid = tl.program_id(0) // tiles_m
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    group = (pid // tiles_n % groups).to(tl.int64)
    class_h, class_w = pid // tiles_n // groups // classes_w, pid // tiles_n // groups % classes_w
    base_h, first_h, count_h = class_taps(
        class_h, KERNEL_H, ADD_H, TAP_H, DIV_H, PERIOD_H, INVERSE_H
    )
    base_w, first_w, count_w = class_taps(
        class_w, KERNEL_W, ADD_W, TAP_W, DIV_W, PERIOD_W, INVERSE_W
    )

    # (i, j) in the class is (class_h + i * DIV_H, class_w + j * DIV_W) in the image.
    offs_m = (tl.program_id(0) % tiles_m).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, cols = tl.cdiv(out_height - class_h, DIV_H), tl.cdiv(out_width - class_w, DIV_W)
    image, i, j = pixel_of(offs_m, rows, cols)
    mask_m = image < B
    top, left = (i * MUL_H + base_h)[:, None], (j * MUL_W + base_w)[:, None]
    x_images = x_ptr + image[:, None] * stride_xb
    w_columns = w_ptr + group * stride_wg + offs_n.to(tl.int64)[None, :] * stride_wn

    steps_k = tl.cdiv(K, BLOCK_K)
    taps = count_h * count_w
    steps = taps * steps_k if PER_TAP else tl.cdiv(K * taps, BLOCK_K)
    per_part = tl.cdiv(steps, tl.num_programs(1))
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(part * per_part, tl.minimum(part * per_part + per_part, steps)):
        if PER_TAP:
            # One tap for the whole tile: its row and column are scalars.
            reached = step // steps_k
            offs_k = step % steps_k * BLOCK_K + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            h = top + reached // count_w * STEP_H
            w = left + reached % count_w * STEP_W
        else:
            inner = step * BLOCK_K + tl.arange(0, BLOCK_K)
            reached = inner // K
            offs_k = inner % K
            mask_k = reached < taps
            h = top + (reached // count_w * STEP_H)[None, :]
            w = left + (reached % count_w * STEP_W)[None, :]
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        position = group * K + offs_k
        channel = kept_channels(in_ptr, position, mask_k, in_start, IN_RUN).to(tl.int64)
        where_x = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        x = tl.load(
            x_images + where_x + channel[None, :] * stride_xc,
            mask=inside & mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        tap_h = first_h + reached // count_w * PERIOD_H
        tap_w = first_w + reached % count_w * PERIOD_W
        where_w = tap_h * stride_wr + tap_w * stride_ws
        where_w = offs_k.to(tl.int64) * stride_wk + where_w
        weight = tl.load(
            w_columns + where_w[:, None], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        acc = dot(x, weight, acc, PRECISION)

    offs_n = group * N + offs_n
    pixel = (class_h + i * DIV_H).to(tl.int64) * out_width + class_w + j * DIV_W
    out_pixels = tl.cast(out_height, tl.int64) * out_width
    offs_m = image * out_pixels + pixel
    if PARTIAL:
        where = (part * B * out_pixels + offs_m)[:, None] * (groups * N) + offs_n[None, :]
        tl.store(y_ptr + where, acc, mask=mask_m[:, None] & mask_n[None, :])
    else:
        store_channels(
            y_ptr, b_ptr, out_ptr, acc, offs_m, offs_n, mask_m, mask_n, groups * N,
            out_pixels, stride_yb, stride_yp, stride_yc, out_start, OUT_RUN, HAS_BIAS, ACT,
        )  # fmt: skip


def per_tap(k: int, taps: int, block_k: int) -> bool:
    """True where cutting the inner axis at each tap wastes at most a quarter of the steps."""
    return taps == 1 or 4 * triton.cdiv(k, block_k) * block_k <= 5 * k


def _launch(
    x: Tensor, w: Tensor, ins: ChannelLayout, outs: ChannelLayout, y: Tensor,
    w_strides: tuple[int, int, int, int, int], constants: dict[str, int], groups: int,
    bias: Tensor | None, act: str, tile: Tile | None, split: int | None,
) -> Tensor:  # fmt: skip
    """Write every kept channel of `y` from `x`; dropped channels of `y` hold zero already.

    Args:
        w_strides: of `w`, for: group, column of y, column of x, tap row, tap column.
        constants: conv_taps.tap_constants.
    """
    kernel = w.shape[2:]
    n, k = outs.kept // groups, ins.kept // groups
    batch, _, *size = y.shape
    if y.numel() == 0 or n == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    if tile is None and split in (None, 1) and few_channels(n, k):
        weight = FewWeight(w, strides=w_strides)
        multiply_few(x, weight, y, ins, outs, (kernel[0], kernel[1]), constants, groups, bias, act)
        return y
    strides = (y.stride(0), y.stride(3), y.stride(1))
    div = constants["DIV_H"], constants["DIV_W"]
    classes = [min(d, s) for d, s in zip(div, size, strict=True)]
    pixels = batch * triton.cdiv(size[0], div[0]) * triton.cdiv(size[1], div[1])  # of a class
    precision = conv_precision(x.dtype)
    scalar = multiply_adds(x.dtype, precision)
    tile = tile or channels_tile(CONV_CHANNELS_TILES, pixels, x.itemsize, scalar)
    taps = math.prod(
        triton.cdiv(t, constants[f"PERIOD_{axis}"]) for axis, t in zip("HW", kernel, strict=True)
    )
    whole = per_tap(k, taps, tile.k)
    steps = taps * triton.cdiv(k, tile.k) if whole else triton.cdiv(k * taps, tile.k)
    tiles_m = triton.cdiv(pixels, tile.m)
    programs = tiles_m * triton.cdiv(n, tile.n) * groups * classes[0] * classes[1]
    split = split or split_count(programs, steps, multiprocessors(x.device))
    partial = split > 1
    m = batch * size[0] * size[1]
    out = y if not partial else x.new_empty(split, m, outs.kept, dtype=torch.float32)
    _conv_channels_kernel[(programs, split)](
        x, w, bias, out, ins.index, outs.index,
        batch, n, k, groups, tiles_m, classes[1], *x.shape[2:], *size, ins.start, outs.start,
        *x.stride(), *w_strides, *strides,
        KERNEL_H=kernel[0], KERNEL_W=kernel[1], **constants,
        IN_RUN=ins.run, OUT_RUN=outs.run, ACT=act, HAS_BIAS=bias is not None,
        PARTIAL=partial, PER_TAP=whole, PRECISION=precision, INDEX=index_type(pixels, tile.m),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial:
        add_channel_parts(out, y, (size[0] * size[1], *strides), outs, bias, act)
    return y


def new_image(like: Tensor, channels: ChannelLayout, size: tuple[int, int]) -> Tensor:
    """[B, width, *size] in the memory format of `like`, zero where the kernel does not write."""
    shape = (like.shape[0], channels.width, *size)
    y = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))
    return y if channels.kept == channels.width else y.zero_()


def conv2d_channels(
    x: Tensor,
    w: Tensor,
    in_index: ChannelIndex | ChannelLayout | None = None,
    out_index: ChannelIndex | ChannelLayout | None = None,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    act: str = "none",
    *,
    tile: Tile | None = None,
    split: int | None = None,
) -> Tensor:
    """y[:, out] = act(conv2d(x[:, in], w, bias)), zeros in the other channels.

    Args:
        x: [B, in width, H, W], fp16, bf16 or fp32, any strides, on a GPU.
        w: [kept_out, kept_in / groups, height, width], dtype and device of `x`, any strides.
        in_index, out_index: kept channels, None for all; each group keeps the same number.
        bias: [kept_out], dtype and device of `x`.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d has them; padding also as
            (above, below, left, right).
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile, split: tile and number of parts of the inner axis; chosen here unless given. Groups
            of few channels have neither (conv_few.py), unless one is given.
    Returns:
        [B, out width, ...], dtype of `x`; channels_last where the channels of `x` lie side by side.
    Raises:
        ValueError: a shape, dtype, device, index, option or activation is not as above.

    Source: channel_layout.py. Twin: reference_channels.conv2d_channels_ref.
    """
    geometry = conv_geometry(w.shape[2:], stride, padding, dilation, groups)
    ins, outs = check_conv(x, w, in_index, out_index, geometry)
    check_operand("x", x)
    check_bias_act(x, w.shape[0], bias, act)
    size = output_size(x.shape[2], x.shape[3], w.shape[2:], geometry)
    y = new_image(x, outs, size)
    constants = _constants(geometry, forward=True)
    n = outs.kept // groups
    strides = (n * w.stride(0), w.stride(0), w.stride(1), w.stride(2), w.stride(3))
    return _launch(x, w, ins, outs, y, strides, constants, groups, bias, act, tile, split)


def conv2d_channels_dgrad(
    dy: Tensor,
    w: Tensor,
    size: tuple[int, int],
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
    """Gradient of conv2d_channels with respect to x.

    Args:
        dy: [B, out width, ...], fp16, bf16 or fp32, any strides, on a GPU.
        size: height and width of x; the other arguments as conv2d_channels has them.
    Returns:
        [B, in width, *size], dtype of `dy`, zeros in the dropped channels.
    Raises:
        ValueError: a shape, dtype, device, index or option is not as above.

    Source: channel_layout.py. Twin: reference_channels.conv2d_channels_dgrad_ref.
    """
    geometry = conv_geometry(w.shape[2:], stride, padding, dilation, groups)
    ins, outs = check_conv_dgrad(dy, w, in_index, out_index, size, geometry)
    check_operand("dy", dy)
    dx = new_image(dy, ins, size)
    constants = _constants(geometry, forward=False)
    n = outs.kept // groups
    strides = (n * w.stride(0), w.stride(1), w.stride(0), w.stride(2), w.stride(3))
    return _launch(dy, w, outs, ins, dx, strides, constants, groups, None, "none", tile, split)


def _constants(geometry: ConvGeometry, forward: bool) -> dict[str, int]:
    stride, (top, _, left, _), dilation, _ = geometry
    return tap_constants(stride, (top, left), dilation, forward)
