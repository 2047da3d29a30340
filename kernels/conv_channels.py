"""conv2d_channels: Y[:, out] = act(conv2d(X[:, in], W) + bias); X, Y [B, width, height, width].

Implicit GEMM: rows are output pixels, columns the kept out channels of one group, and the inner
axis runs over the taps of the kernel and the kept in channels of the group. One program owns a
[BLOCK_M, BLOCK_N] tile of one group and one part of the inner axis; channels are gathered from X
and scattered to Y by index, taps outside X read as zero. Parts are added in a fixed order.

The gradient with respect to X is the same kernel with the roles exchanged. Row p of an output reads
row (p * MUL + ADD + tap * TAP) / DIV of its source, where the division is whole:

    forward   MUL = stride  ADD = -padding  TAP = dilation   DIV = 1
    dX        MUL = 1       ADD = padding   TAP = -dilation  DIV = stride

With a stride, dX walks also the taps that no output read. channels_last operands are the fast case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.channel_layout import ChannelLayout
from slimgemm.kernels.configs import Tile, split_count
from slimgemm.kernels.conv_layout import memory_format
from slimgemm.kernels.device import check_operand, conv_precision, dot, multiprocessors
from slimgemm.kernels.formats import ChannelIndex
from slimgemm.kernels.gemm_channels import (
    add_channel_parts,
    channels_tile,
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

# As GEMM_CHANNELS_TILES; larger tiles of gathered taps spill.
CONV_CHANNELS_TILES = (Tile(16, 64, 64, 4, 4), Tile(64, 64, 32, 4, 4), Tile(128, 64, 32, 8, 4))


@triton.jit
def _conv_channels_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, in_ptr, out_ptr,
    M, N, K, groups, height, width, out_pixels, out_width, in_start, out_start,
    stride_xb, stride_xc, stride_xh, stride_xw,
    stride_wg, stride_wn, stride_wk, stride_wr, stride_ws,
    stride_yb, stride_yp, stride_yc, steps_per_part,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    MUL_H: tl.constexpr, MUL_W: tl.constexpr, ADD_H: tl.constexpr, ADD_W: tl.constexpr,
    TAP_H: tl.constexpr, TAP_W: tl.constexpr, DIV_H: tl.constexpr, DIV_W: tl.constexpr,
    IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr, PER_TAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    group = (pid // tiles_m // tiles_n).to(tl.int64)
    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    pixel = (offs_m % out_pixels).to(tl.int32)
    top = (pixel // out_width * MUL_H + ADD_H)[:, None]
    left = (pixel % out_width * MUL_W + ADD_W)[:, None]
    x_images = x_ptr + (offs_m // out_pixels)[:, None] * stride_xb
    w_columns = w_ptr + group * stride_wg + offs_n.to(tl.int64)[None, :] * stride_wn

    steps_k = tl.cdiv(K, BLOCK_K)
    steps = TAPS * steps_k if PER_TAP else tl.cdiv(K * TAPS, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = part * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, steps)):
        if PER_TAP:
            # One tap for the whole tile: its row and column are scalars.
            tap = step // steps_k
            offs_k = step % steps_k * BLOCK_K + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            h = top + tap // KERNEL_W * TAP_H
            w = left + tap % KERNEL_W * TAP_W
        else:
            inner = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = inner // K
            offs_k = inner % K
            mask_k = tap < TAPS
            h = top + (tap // KERNEL_W * TAP_H)[None, :]
            w = left + (tap % KERNEL_W * TAP_W)[None, :]
        inside = (h >= 0) & (w >= 0)
        if DIV_H > 1:
            inside &= h % DIV_H == 0
            h = h // DIV_H
        if DIV_W > 1:
            inside &= w % DIV_W == 0
            w = w // DIV_W
        inside &= (h < height) & (w < width)
        position = group * K + offs_k
        channel = kept_channels(in_ptr, position, mask_k, in_start, IN_RUN).to(tl.int64)
        where_x = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        x = tl.load(
            x_images + where_x + channel[None, :] * stride_xc,
            mask=inside & mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        where_w = tap // KERNEL_W * stride_wr + tap % KERNEL_W * stride_ws
        where_w = offs_k.to(tl.int64) * stride_wk + where_w
        weight = tl.load(
            w_columns + where_w[:, None], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        acc = dot(x, weight, acc, PRECISION)

    offs_n = group * N + offs_n
    if PARTIAL:
        where = part.to(tl.int64) * M * (groups * N) + offs_m[:, None] * (groups * N)
        tl.store(y_ptr + where + offs_n[None, :], acc, mask=mask_m[:, None] & mask_n[None, :])
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
    w_strides: tuple[int, int, int, int, int], mapping: dict[str, int], groups: int,
    bias: Tensor | None, act: str, tile: Tile | None, split: int | None,
) -> Tensor:  # fmt: skip
    """Write every kept channel of `y` from `x`; dropped channels of `y` hold zero already.

    Args:
        w_strides: of `w`, for: group, column of y, column of x, tap row, tap column.
        mapping: MUL, ADD, TAP and DIV of both axes, see the module docstring.
    """
    kernel_h, kernel_w = w.shape[2:]
    n, k = outs.kept // groups, ins.kept // groups
    pixels = y.shape[2] * y.shape[3]
    m = y.shape[0] * pixels
    if y.numel() == 0 or n == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    precision = conv_precision(x.dtype)
    tile = tile or channels_tile(CONV_CHANNELS_TILES, m, x, precision)
    taps = kernel_h * kernel_w
    whole = per_tap(k, taps, tile.k)
    steps = taps * triton.cdiv(k, tile.k) if whole else triton.cdiv(k * taps, tile.k)
    programs = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n) * groups
    split = split or split_count(programs, steps, multiprocessors(x.device))
    partial = split > 1
    out = y if not partial else x.new_empty(split, m, outs.kept, dtype=torch.float32)
    _conv_channels_kernel[(programs, split)](
        x, w, bias, out, ins.index, outs.index,
        m, n, k, groups, x.shape[2], x.shape[3], pixels, y.shape[3], ins.start, outs.start,
        *x.stride(), *w_strides, y.stride(0), y.stride(3), y.stride(1), triton.cdiv(steps, split),
        KERNEL_H=kernel_h, KERNEL_W=kernel_w, **mapping,
        IN_RUN=ins.run, OUT_RUN=outs.run, ACT=act, HAS_BIAS=bias is not None,
        PARTIAL=partial, PER_TAP=whole, PRECISION=precision,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial:
        rows = (pixels, y.stride(0), y.stride(3), y.stride(1))
        add_channel_parts(out, y, rows, outs, bias, act)
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
        tile, split: tile and number of parts of the inner axis; chosen here unless given.
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
    mapping = _mapping(geometry, forward=True)
    n = outs.kept // groups
    strides = (n * w.stride(0), w.stride(0), w.stride(1), w.stride(2), w.stride(3))
    return _launch(x, w, ins, outs, y, strides, mapping, groups, bias, act, tile, split)


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
    mapping = _mapping(geometry, forward=False)
    n = outs.kept // groups
    strides = (n * w.stride(0), w.stride(1), w.stride(0), w.stride(2), w.stride(3))
    return _launch(dy, w, outs, ins, dx, strides, mapping, groups, None, "none", tile, split)


def _mapping(geometry: ConvGeometry, forward: bool) -> dict[str, int]:
    """MUL, ADD, TAP and DIV of both axes."""
    (high, wide), (top, _, left, _), (dil_h, dil_w), _ = geometry
    if forward:
        mul, add, tap, div = (high, wide), (-top, -left), (dil_h, dil_w), (1, 1)
    else:
        mul, add, tap, div = (1, 1), (top, left), (-dil_h, -dil_w), (high, wide)
    pairs = {"MUL": mul, "ADD": add, "TAP": tap, "DIV": div}
    return {
        f"{name}_{axis}": pair[i] for name, pair in pairs.items() for i, axis in enumerate("HW")
    }
