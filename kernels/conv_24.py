"""conv2d_24: Y = act(conv2d(X, W) + bias) with a packed W, as an implicit GEMM over NHWC pixels.

    Y[b, oh, ow, o] = sum over taps (y, x) and channels c of
                      X[b, oh * stride_h - top + y * dilation_h, ..., c] * W[o, y, x, c]

Rows are the B * OH * OW output pixels, columns the out channels of one group, and the sum walks
the columns of the packed matrix (kernels/conv_layout.py), whose pixels of X are addressed in the
kernel: no im2col matrix is in memory, and X may have any strides. One program owns a
[BLOCK_M, BLOCK_N] tile of Y and one part of the sum; with more than one part, the parts go to an
fp32 buffer that a second kernel adds in a fixed order, so results repeat bit for bit.

Bound by the dense tensor cores, or for few pixels by the bytes of W; uses no sparse instruction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.channel_layout import every_channel
from slimgemm.kernels.configs import Tile, conv_tile, few_channels, split_count
from slimgemm.kernels.conv_few import FewWeight, multiply_few
from slimgemm.kernels.conv_layout import (
    Convolution,
    Padding,
    check_image,
    check_weight,
    convolution,
    memory_format,
)
from slimgemm.kernels.conv_taps import index_type, pixel_of, tap_constants
from slimgemm.kernels.device import (
    check_operand,
    conv_precision,
    dot,
    expand,
    load_packed,
    multiply_adds,
    multiprocessors,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.spmm_24 import check_epilogue, finish


@triton.jit
def load_patches(
    x_ptr, image, top, left, mask_m, step,
    H, W, C, CP, K, kernel_w, dilation_h, dilation_w,
    stride_xb, stride_xc, stride_xh, stride_xw,
    BLOCK_K: tl.constexpr, WHOLE_TAPS: tl.constexpr,
):  # fmt: skip
    """Columns `step * BLOCK_K` on of im2col(x), [rows, BLOCK_K]; (top, left) is a patch's corner.

    With WHOLE_TAPS a tile lies within one tap (CP is a multiple of BLOCK_K), so which pixels are
    inside the image is asked once per row.
    """
    SPAN: tl.constexpr = 1 if WHOLE_TAPS else BLOCK_K
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    tap = (step * BLOCK_K + tl.arange(0, SPAN)) // CP
    offs_c = offs_k - tap * CP
    down, right = tap // kernel_w * dilation_h, tap % kernel_w * dilation_w
    h, w = top[:, None] + down[None, :], left[:, None] + right[None, :]  # [rows, SPAN]
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & mask_m[:, None]
    rows = image * stride_xb + top.to(tl.int64) * stride_xh + left.to(tl.int64) * stride_xw
    shift = down.to(tl.int64) * stride_xh + right.to(tl.int64) * stride_xw
    columns = shift + offs_c.to(tl.int64) * stride_xc
    mask = inside & ((offs_c < C) & (offs_k < K))[None, :]
    return tl.load(x_ptr + rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _conv2d_24_kernel(
    x_ptr, v_ptr, m_ptr, b_ptr, y_ptr,
    M, N, K, columns, H, W, C, CP, out_h, out_w, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_yb, stride_yp, stride_yc,
    stride_part, steps_per_part,
    KEEP: tl.constexpr, GROUP: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE_TAPS: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(1)
    pid_n = tl.program_id(0) // tiles_m
    # Out channels and input channels of the program's group of the convolution.
    conv_group = (pid_n // tiles_n).to(tl.int64)
    first_n = conv_group * N
    last_n = first_n + N
    offs_n = first_n + pid_n % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += conv_group * C * stride_xc

    offs_m = (tl.program_id(0) % tiles_m).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    image, row, column = pixel_of(offs_m, out_h, out_w)
    top, left = row * stride_h - pad_h, column * stride_w - pad_w

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = part * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, tl.cdiv(K, BLOCK_K))):
        x = load_patches(
            x_ptr, image, top, left, mask_m, step,
            H, W, C, CP, K, kernel_w, dilation_h, dilation_w,
            stride_xb, stride_xc, stride_xh, stride_xw, BLOCK_K, WHOLE_TAPS,
        )  # fmt: skip
        values, meta = load_packed(
            v_ptr, m_ptr, offs_n, step * (BLOCK_K // 8), last_n, columns, BLOCK_K, KEEP, GROUP
        )
        w = expand(values, meta, BLOCK_N, BLOCK_K, KEEP, GROUP)
        acc = dot(x, tl.trans(w), acc, PRECISION)

    if not PARTIAL:
        acc = finish(acc, b_ptr, b_ptr, offs_n, last_n, HAS_BIAS, False, ACT)
    pixel = row.to(tl.int64) * out_w + column
    where = (image * stride_yb + pixel * stride_yp)[:, None] + (offs_n * stride_yc)[None, :]
    mask = mask_m[:, None] & (offs_n < last_n)[None, :]
    y_ptr += part.to(tl.int64) * stride_part
    tl.store(y_ptr + where, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_images_kernel(
    p_ptr, b_ptr, y_ptr,
    M, N, parts, pixels, stride_yb, stride_yp, stride_yc,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y, pixels [M] of images with N channels, from fp32 parts [parts, M, N] in ascending order."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    where_p = offs_m * N
    for _ in range(parts):
        acc += tl.load(p_ptr + where_p[:, None] + offs_n[None, :], mask=mask, other=0.0)
        where_p += tl.full((BLOCK_M,), M, tl.int64) * N
    acc = finish(acc, b_ptr, b_ptr, offs_n, N, HAS_BIAS, False, ACT)
    rows = offs_m // pixels * stride_yb + offs_m % pixels * stride_yp
    where_y = rows[:, None] + (offs_n * stride_yc)[None, :]
    tl.store(y_ptr + where_y, acc.to(y_ptr.dtype.element_ty), mask=mask)


def new_images(
    like: Tensor, channels: int, size: Sequence[int], parts: int
) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
    """Images [B, channels, *size] in the format of `like`, and where a kernel writes them.

    Returns:
        The images; the target, which is them, or for more than one part fp32 [parts, pixels,
        channels] for `add_images`; the target's strides by image, pixel, channel and part.
    """
    shape = (like.shape[0], channels, *size)
    images = torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like)
    )
    if parts == 1:
        return images, images, (images.stride(0), images.stride(3), images.stride(1), 0)
    pixels = size[0] * size[1]
    target = like.new_empty(parts, like.shape[0] * pixels, channels, dtype=torch.float32)
    return images, target, (pixels * channels, channels, 1, target.stride(0))


def add_images(
    parts: Tensor, images: Tensor, bias: Tensor | None = None, act: str = "none"
) -> Tensor:
    """`images` = act(sum over parts [P, pixels, channels] + bias), in a fixed order."""
    count, m, n = parts.shape
    block_m, block_n = 16, 64
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    _add_images_kernel[grid](
        parts, bias, images, m, n, count, images.shape[2] * images.shape[3],
        images.stride(0), images.stride(3), images.stride(1),
        ACT=act, HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return images


def check_conv_operand(name: str, x: Tensor, channels: int, w: Packed24, conv: Convolution) -> None:
    """Raise ValueError unless images `x` with `channels` channels can meet `w` in one kernel."""
    check_weight(w, conv)
    check_operand(name, x)
    check_image(name, x, channels, w.values)


def conv2d_24(
    x: Tensor, w: Packed24, weight_shape: Sequence[int], bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1, act: str = "none",
    *, tile: Tile | None = None, split: int | None = None,
) -> Tensor:  # fmt: skip
    """act(conv2d(x, dense(w), bias)), the arguments of torch.nn.functional.conv2d.

    Args:
        x: [B, C * groups, H, W], fp16, bf16 or fp32, any strides, on a GPU; best channels_last.
        w: packed weight (`pack_conv`) of the same dtype and device.
        weight_shape: (O, C, kh, kw) of the dense weight, C channels per group.
        bias: [O], fp16, bf16 or fp32.
        padding: an integer, (height, width), (top, bottom, left, right), "same" or "valid".
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile, split: tile and number of parts of the sum; chosen here unless given. Groups of few
            channels have neither (conv_few.py), unless one is given.
    Returns:
        [B, O, OH, OW], dtype of `x`; channels_last if `x` is, else contiguous. Accumulated in fp32;
        tf32 only where torch.backends allows it.
    Raises:
        ValueError: a shape, dtype, device or option is not as above, or the kernel is too large.

    Source: layout, kernels/conv_layout.py. Twin: reference_conv.conv2d_24_ref.
    """
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_conv_operand("x", x, conv.channels * groups, w, conv)
    check_epilogue(conv.out, x, bias, None, act)
    size = conv.output_size(*x.shape[2:])
    pixels, n = x.shape[0] * size[0] * size[1], conv.out // groups
    few = tile is None and split in (None, 1) and few_channels(n, conv.channels)
    precision = conv_precision(x.dtype)
    tile = tile or conv_tile(pixels, n, x.itemsize, multiply_adds(x.dtype, precision))
    programs = triton.cdiv(pixels, tile.m) * triton.cdiv(n, tile.n) * groups
    steps = triton.cdiv(conv.k, tile.k)
    split = 1 if few else split or split_count(programs, steps, multiprocessors(x.device))
    y, target, strides = new_images(x, conv.out, size, split)
    if y.numel() == 0:
        return y
    if few:
        weight = FewWeight(w.values, w.meta, keep=w.keep, group=w.group)
        constants = tap_constants(conv.stride, conv.corner, conv.dilation, forward=True)
        channels = every_channel(x.shape[1]), every_channel(conv.out)
        multiply_few(x, weight, y, *channels, conv.kernel, constants, groups, bias, act)
        return y
    _conv2d_24_kernel[(programs, split)](
        x, w.values, w.meta, bias, target,
        pixels, n, conv.k, w.meta.shape[1], x.shape[2], x.shape[3],
        conv.channels, conv.padded_channels, *size, conv.kernel[1],
        *conv.stride, conv.padding[0], conv.padding[2], *conv.dilation,
        *x.stride(), *strides, triton.cdiv(steps, split),
        KEEP=w.keep, GROUP=w.group, ACT=act, HAS_BIAS=bias is not None, PARTIAL=split > 1,
        PRECISION=precision,
        WHOLE_TAPS=conv.padded_channels % tile.k == 0, INDEX=index_type(pixels, tile.m),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y if split == 1 else add_images(target, y, bias, act)
