"""Convolutions of groups with few channels, depthwise ones too: multiply-adds, no dot.

A group with at most configs.FEW_CHANNELS in and out channels would fill at most half of the
narrowest tile of tensor cores, and a depthwise one a sixteenth of it. Here one program owns a
[BLOCK_M, BLOCK_N] tile of pixels and out channels that spans as many groups as fit, and walks taps
and the channels of a group: no product is made to be masked away, and channels that lie side by
side in memory are read together.

    acc[m, n] += x[pixel(m, tap), channel(group(n), r)] * weight(n, r, tap)      for each tap and r

conv2d_24 and conv2d_channels share it, and so do their dX, with the roles exchanged (conv_taps.py).
A packed weight has one byte of metadata per out channel and tap, a dense one any strides.
A weight gradient owns BLOCK_N out channels at one tap and one stored slot or in channel, and one
part of the pixels; parts are added in a fixed order. Bound by memory, or by loads from the cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.channel_layout import RAGGED, RANGE, ChannelLayout
from slimgemm.kernels.configs import FEW_TILE_CHANNELS, FEW_TILE_ELEMENTS, split_count
from slimgemm.kernels.conv_taps import class_taps, index_type, pixel_of
from slimgemm.kernels.device import byte_lanes, multiprocessors
from slimgemm.kernels.formats import BYTE_WEIGHTS, Packed24
from slimgemm.kernels.gemm_channels import kept_channels, store_channels
from slimgemm.kernels.spmm_24 import add_parts


class FewWeight(NamedTuple):
    """The weight of a convolution as `multiply_few` reads it.

    Args:
        tensor: dense [out, in / groups, kh, kw], or the values of a packed weight.
        meta: metadata of a packed weight, else None.
        strides: of a dense weight, for: group, column of y, column of x, tap row, tap column.
        keep, group: the pattern of a packed weight, else 0.
        turned: True for a dX, whose columns of y are the weight's in channels.
    """

    tensor: Tensor
    meta: Tensor | None = None
    strides: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    keep: int = 0
    group: int = 0
    turned: bool = False


@triton.jit
def _few_weight(
    w_ptr, m_ptr, offs_n, mask_n, R: tl.constexpr, tap_h, tap_w, taps,
    stride_wg, stride_wn, stride_wk, stride_wr, stride_ws,
    KERNEL_W: tl.constexpr, PER_IN: tl.constexpr, PER_OUT: tl.constexpr,
    KEEP: tl.constexpr, GROUP: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """fp32 weights that take channel R of a group to the columns `offs_n`, at one tap."""
    group, column = (offs_n // PER_OUT).to(tl.int64), offs_n % PER_OUT
    if KEEP == 0:
        where = group * stride_wg + column * stride_wn + R * stride_wk
        where += tap_h * stride_wr + tap_w * stride_ws
        weight = tl.load(w_ptr + where, mask=mask_n, other=0.0)
    else:
        row = group * PER_IN + R if TURNED else offs_n.to(tl.int64)
        lane = column if TURNED else column * 0 + R
        byte = row * taps + tap_h * KERNEL_W + tap_w
        meta = tl.load(m_ptr + byte, mask=mask_n, other=0).to(tl.int32)
        kept, rank = byte_lanes(meta, lane, KEEP, GROUP)
        weight = tl.load(w_ptr + byte * (8 * KEEP // GROUP) + rank, mask=mask_n & kept, other=0.0)
    return weight.to(tl.float32)


@triton.jit
def _conv_few_kernel(
    x_ptr, w_ptr, m_ptr, b_ptr, y_ptr, in_ptr, out_ptr,
    B, columns, tiles_m, classes_w, height, width, out_height, out_width, in_start, out_start,
    stride_xb, stride_xc, stride_xh, stride_xw,
    stride_wg, stride_wn, stride_wk, stride_wr, stride_ws,
    stride_yb, stride_yp, stride_yc,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    MUL_H: tl.constexpr, MUL_W: tl.constexpr, ADD_H: tl.constexpr, ADD_W: tl.constexpr,
    TAP_H: tl.constexpr, TAP_W: tl.constexpr, DIV_H: tl.constexpr, DIV_W: tl.constexpr,
    PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr, INVERSE_H: tl.constexpr,
    INVERSE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    PER_IN: tl.constexpr, PER_OUT: tl.constexpr, IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr,
    KEEP: tl.constexpr, GROUP: tl.constexpr, TURNED: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(columns, BLOCK_N)
    # Neighbouring programs read the channels of the same pixels.
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    pid_class = tl.program_id(0) // tiles_n // tiles_m
    class_h, class_w = pid_class // classes_w, pid_class % classes_w
    base_h, first_h, count_h = class_taps(
        class_h, KERNEL_H, ADD_H, TAP_H, DIV_H, PERIOD_H, INVERSE_H
    )
    base_w, first_w, count_w = class_taps(
        class_w, KERNEL_W, ADD_W, TAP_W, DIV_W, PERIOD_W, INVERSE_W
    )
    offs_m = (tl.program_id(0) // tiles_n % tiles_m).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, cols = tl.cdiv(out_height - class_h, DIV_H), tl.cdiv(out_width - class_w, DIV_W)
    image, i, j = pixel_of(offs_m, rows, cols)
    mask_m = image < B

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for reached in range(0, count_h * count_w):
        down, right = reached // count_w, reached % count_w
        h, w = i * MUL_H + base_h + down * STEP_H, j * MUL_W + base_w + right * STEP_W
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width) & mask_m
        where = image * stride_xb + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        for r in tl.static_range(PER_IN):
            position = offs_n // PER_OUT * PER_IN + r
            channel = kept_channels(in_ptr, position, mask_n, in_start, IN_RUN).to(tl.int64)
            x = tl.load(
                x_ptr + where[:, None] + (channel * stride_xc)[None, :],
                mask=inside[:, None] & mask_n[None, :],
                other=0.0,
            )
            weight = _few_weight(
                w_ptr, m_ptr, offs_n, mask_n, r,
                first_h + down * PERIOD_H, first_w + right * PERIOD_W, KERNEL_H * KERNEL_W,
                stride_wg, stride_wn, stride_wk, stride_wr, stride_ws,
                KERNEL_W, PER_IN, PER_OUT, KEEP, GROUP, TURNED,
            )  # fmt: skip
            acc += x.to(tl.float32) * weight[None, :]

    pixel = (class_h + i * DIV_H).to(tl.int64) * out_width + class_w + j * DIV_W
    out_pixels = tl.cast(out_height, tl.int64) * out_width
    store_channels(
        y_ptr, b_ptr, out_ptr, acc, image * out_pixels + pixel, offs_n, mask_m, mask_n, columns,
        out_pixels, stride_yb, stride_yp, stride_yc, out_start, OUT_RUN, HAS_BIAS, ACT,
    )  # fmt: skip


@triton.jit
def _slot_lanes(meta, slot, KEEP: tl.constexpr, GROUP: tl.constexpr):
    """Lane 0..7 of the stored value `slot` of each byte of `meta`."""
    lane = tl.arange(0, 8)[None, :]
    kept, rank = byte_lanes(meta[:, None], lane, KEEP, GROUP)
    return tl.max(tl.where(kept & (rank == slot), lane, -1), axis=1)


@triton.jit
def _conv_few_wgrad_kernel(
    dy_ptr, x_ptr, m_ptr, dw_ptr, out_ptr, in_ptr,
    M, columns, slots, height, width, out_height, out_width, out_start, in_start,
    stride_yb, stride_yc, stride_yh, stride_yw, stride_xb, stride_xc, stride_xh, stride_xw,
    stride_part, stride_n, stride_slot, stride_tap, steps_per_part,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PER_IN: tl.constexpr, PER_OUT: tl.constexpr, IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr,
    KEEP: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(columns, BLOCK_N)
    part = tl.program_id(1)
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    slot = tl.program_id(0) // tiles_n % slots
    tap = tl.program_id(0) // tiles_n // slots
    lane = offs_n * 0 + slot
    if KEEP > 0:
        byte = offs_n.to(tl.int64) * (KERNEL_H * KERNEL_W) + tap
        meta = tl.load(m_ptr + byte, mask=mask_n, other=0).to(tl.int32)
        lane = _slot_lanes(meta, slot, KEEP, GROUP)
    mask_x = mask_n & (lane >= 0) & (lane < PER_IN)
    position = offs_n // PER_OUT * PER_IN + lane
    channel_x = kept_channels(in_ptr, position, mask_x, in_start, IN_RUN).to(tl.int64)
    channel_y = kept_channels(out_ptr, offs_n, mask_n, out_start, OUT_RUN).to(tl.int64)
    dy_columns = dy_ptr + (channel_y * stride_yc)[None, :]
    x_columns = x_ptr + (channel_x * stride_xc)[None, :]
    tap_h, tap_w = tap // KERNEL_W * DILATION_H - TOP, tap % KERNEL_W * DILATION_W - LEFT

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = part.to(INDEX) * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, tl.cdiv(M, BLOCK_M))):
        offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        image, row, col = pixel_of(offs_m, out_height, out_width)
        rows_y = image * stride_yb + row.to(tl.int64) * stride_yh + col.to(tl.int64) * stride_yw
        dy = tl.load(
            dy_columns + rows_y[:, None], mask=mask_m[:, None] & mask_n[None, :], other=0.0
        )
        h, w = row * STRIDE_H + tap_h, col * STRIDE_W + tap_w
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width) & mask_m
        rows_x = image * stride_xb + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        x = tl.load(x_columns + rows_x[:, None], mask=inside[:, None] & mask_x[None, :], other=0.0)
        acc += dy.to(tl.float32) * x.to(tl.float32)

    # The padding of a packed weight is +0.0 by the format, also where dy holds a NaN.
    total = tl.where(mask_x, tl.sum(acc, axis=0), 0.0)
    where = part.to(tl.int64) * stride_part + offs_n.to(tl.int64) * stride_n
    where += slot * stride_slot + tap * stride_tap
    tl.store(dw_ptr + where, total.to(dw_ptr.dtype.element_ty), mask=mask_n)


def few_tile(columns: int) -> tuple[int, int]:
    """Pixels and channels of a tile: no more channels than there are."""
    block_n = min(FEW_TILE_CHANNELS, triton.next_power_of_2(columns))
    return FEW_TILE_ELEMENTS // block_n, block_n


def _scattered(run: int) -> int:
    """`run` for channels that are not addressed side by side."""
    return RANGE if run == RANGE else RAGGED


def multiply_few(
    x: Tensor, w: FewWeight, y: Tensor, ins: ChannelLayout, outs: ChannelLayout,
    kernel: tuple[int, int], constants: dict[str, int], groups: int,
    bias: Tensor | None = None, act: str = "none",
) -> None:  # fmt: skip
    """Write act(convolution of `x` with `w` + bias) to every kept channel of `y`.

    Args:
        x, y: [B, width, height, width in pixels], any strides; y with pixels side by side.
        ins, outs: kept channels of x and y, each at most configs.FEW_CHANNELS a group.
        constants: conv_taps.tap_constants.
    """
    batch, _, *size = y.shape
    div = constants["DIV_H"], constants["DIV_W"]
    classes = [min(d, s) for d, s in zip(div, size, strict=True)]
    pixels = batch * triton.cdiv(size[0], div[0]) * triton.cdiv(size[1], div[1])  # of a class
    block_m, block_n = few_tile(outs.kept)
    tiles_m = triton.cdiv(pixels, block_m)
    grid = (triton.cdiv(outs.kept, block_n) * tiles_m * classes[0] * classes[1],)
    _conv_few_kernel[grid](
        x, w.tensor, w.meta, bias, y, ins.index, outs.index,
        batch, outs.kept, tiles_m, classes[1], *x.shape[2:], *size, ins.start, outs.start,
        *x.stride(), *w.strides, y.stride(0), y.stride(3), y.stride(1),
        KERNEL_H=kernel[0], KERNEL_W=kernel[1], **constants,
        PER_IN=ins.kept // groups, PER_OUT=outs.kept // groups,
        IN_RUN=_scattered(ins.run), OUT_RUN=outs.run,
        KEEP=w.keep, GROUP=w.group, TURNED=w.turned,
        ACT=act, HAS_BIAS=bias is not None, INDEX=index_type(pixels, block_m),
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip


def few_wgrad(
    dy: Tensor, x: Tensor, dw: Tensor, ins: ChannelLayout, outs: ChannelLayout,
    kernel: tuple[int, int], stride: tuple[int, int], corner: tuple[int, int],
    dilation: tuple[int, int], groups: int,
    packed: Packed24 | None = None, split: int | None = None,
) -> Tensor:  # fmt: skip
    """Write the gradient of the weight to `dw`, and return it.

    Args:
        dy, x: [B, width, height, width in pixels], any strides.
        dw: contiguous [out, in / groups, *kernel], or the values' gradient where `packed` is given.
        corner: padding above and to the left.
        packed: the packed weight, of which only the metadata is read.
    """
    taps, n, k = math.prod(kernel), outs.kept, ins.kept // groups
    if packed is None:
        slots, strides = k, (k * taps, taps, 1)
    else:
        slots = BYTE_WEIGHTS * packed.keep // packed.group
        strides = (taps * slots, 1, slots)
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    block_m, block_n = few_tile(n)
    programs, steps = triton.cdiv(n, block_n) * slots * taps, triton.cdiv(pixels, block_m)
    split = split or split_count(programs, steps, multiprocessors(dy.device))
    parts = dw if split == 1 else dy.new_empty(split, n, dw.numel() // n, dtype=torch.float32)
    _conv_few_wgrad_kernel[(programs, split)](
        dy, x, None if packed is None else packed.meta, parts, outs.index, ins.index,
        pixels, n, slots, *x.shape[2:], *dy.shape[2:], outs.start, ins.start,
        *dy.stride(), *x.stride(), dw.numel(), *strides, triton.cdiv(steps, split),
        KERNEL_H=kernel[0], KERNEL_W=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        TOP=corner[0], LEFT=corner[1], DILATION_H=dilation[0], DILATION_W=dilation[1],
        PER_IN=k, PER_OUT=n // groups, IN_RUN=_scattered(ins.run), OUT_RUN=outs.run,
        KEEP=0 if packed is None else packed.keep, GROUP=0 if packed is None else packed.group,
        INDEX=index_type(pixels, block_m), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    if split > 1:
        add_parts(parts, dw.view(n, -1))
    return dw
