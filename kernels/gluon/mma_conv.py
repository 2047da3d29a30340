"""mma_conv: a 2:4 convolution on mma.sp, as the implicit GEMM of NHWC images; no im2col is stored.

    Y [pixels, O] = act(windows of X [pixels, kh * kw * C] @ W.T + bias)

mma_packed with another way to fetch X: a shared-memory stage is 64 channels of one tap (C is a
multiple of 64), so its rows are 128 contiguous bytes of an image each, at addresses computed once a
stage from the window's corner; a row outside the image is zeros. The geometry is compiled in, which
makes the divisions by C and kw multiplications.

Bytes: each pixel of X is fetched kh * kw times, from L2 but for the first; W once per 64 or fewer
tokens-wide column of tiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimgemm.kernels.configs import split_count
from slimgemm.kernels.conv_layout import (
    Convolution,
    Padding,
    check_image,
    check_weight,
    convolution,
    is_nhwc,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.gluon.launch import Launch, check_epilogue, multiprocessors
from slimgemm.kernels.gluon.mma_packed import COLUMNS, PTX_TYPES, why_not
from slimgemm.kernels.gluon.mma_packed_kernel import _mma_packed_kernel
from slimgemm.kernels.gluon.mma_packed_tiles import PackedTile, mma_packed_tile

STAGE_CHANNELS = 64  # channels of a stage: two steps


@dataclasses.dataclass(frozen=True)
class Image:
    """Geometry of one convolution over images of one size, in pixels; channels count values."""

    height: int
    width: int
    channels: int
    taps: int
    kernel_width: int
    out_height: int
    out_width: int
    stride_y: int
    stride_x: int
    top: int
    left: int
    dilation_y: int
    dilation_x: int


def image_of(conv: Convolution, height: int, width: int) -> Image:
    """The geometry of `conv` over images of `height` x `width` pixels."""
    taps = conv.kernel[0] * conv.kernel[1]
    size = conv.output_size(height, width)
    return Image(
        height, width, conv.channels, taps, conv.kernel[1], *size, *conv.stride, *conv.corner,
        *conv.dilation,
    )  # fmt: skip


def mma_conv_tile(pixels: int) -> PackedTile:
    """The tile for `pixels` output pixels: that of as many tokens, in stages of one tap."""
    # 64 tokens in one slice of K: where each of 8 lines begins takes registers that W needs.
    tokens = 128 if pixels > 32 else pixels
    return dataclasses.replace(mma_packed_tile(tokens), steps=2, stages=3)


def why_not_conv(x: Tensor, packed: Packed24, conv: Convolution) -> str:
    """What keeps a convolution from this kernel, or nothing."""
    if conv.groups != 1:
        return f"groups must be 1, got {conv.groups}; conv2d_24 takes any"
    if conv.channels % STAGE_CHANNELS:
        return (
            f"input channels must be a multiple of {STAGE_CHANNELS}, got {conv.channels}; "
            "conv2d_24 takes any"
        )
    if not is_nhwc(x) or x.data_ptr() % 16:
        return (
            f"x must be channels_last and 16-byte aligned, got strides {x.stride()}; "
            "call x.contiguous(memory_format=torch.channels_last) first"
        )
    return why_not(packed)


def takes(x: Tensor, packed: Packed24, conv: Convolution) -> bool:
    """True if conv2d_24_mma runs on this weight and x."""
    return (
        x.is_cuda
        and x.dtype == packed.values.dtype
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and not why_not_conv(x, packed, conv)
    )


def prepare(
    x: Tensor,
    packed: Packed24,
    conv: Convolution,
    bias: Tensor | None = None,
    act: str = "none",
    *,
    tile: PackedTile | None = None,
    splits: int = 1,
) -> Launch:
    """What conv2d_24_mma launches; the result goes to `out`, or fp32 parts to `parts`."""
    image = image_of(conv, *x.shape[2:])
    m, (n, k) = x.shape[0] * image.out_height * image.out_width, packed.shape
    tile = tile or mma_conv_tile(m)
    out = torch.empty(
        (x.shape[0], n, image.out_height, image.out_width),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    parts = x.new_empty(splits, m, n, dtype=torch.float32) if splits > 1 else None
    fused = splits == 1
    return Launch(
        grid=(-(-n // tile.rows) * -(-m // tile.tokens), splits),
        args=(
            packed.values.view(torch.int32), packed.meta.view(torch.int32),
            x.permute(0, 2, 3, 1).view(-1, conv.channels).view(torch.int32),
            pixels_of(out) if fused else parts, bias if fused else None, None,
            m, n, k, conv.channels,
        ),
        constants=dict(
            TILE=tile, KIND=PTX_TYPES[x.dtype], ALIGNED=True, SPLITS=splits,
            # Masked whether K needs it or not: without, ptxas moves loads until registers run out.
            MASKED=True, META_UNIT=math.gcd(k // COLUMNS, 2),
            IMAGE=image, HAS_BIAS=fused and bias is not None, HAS_SCALE=False,
            SCALE_PER_ROW=False, ACT=act if fused else "none", GROUP=8,
        ),
        warps=tile.warps, out=out, parts=parts,
    )  # fmt: skip


def pixels_of(images: Tensor) -> Tensor:
    """[B, C, H, W] channels_last as [pixels, C], sharing memory."""
    return images.permute(0, 2, 3, 1).view(-1, images.shape[1])


def conv2d_24_mma(
    x: Tensor, w: Packed24, weight_shape: Sequence[int], bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1, act: str = "none",
    *, tile: PackedTile | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """act(conv2d(x, dense(w), bias)) on mma.sp, the arguments of torch.nn.functional.conv2d.

    Args:
        x: [B, C, H, W] channels_last, bf16 or fp16, C a multiple of 64; sm_80 or later.
        w: packed weight (`pack_conv`), 2:4, of the same dtype and device.
        weight_shape: (O, C, kh, kw) of the dense weight.
        bias: [O], fp16, bf16 or fp32.
        groups: 1.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile, splits: tile (steps 2) and parts of the sum; chosen here unless given.
    Returns:
        [B, O, OH, OW] channels_last, dtype of `x`. Accumulated in fp32, same bytes on every run.
    Raises:
        ValueError: a shape, layout, dtype, device or option is not as above.

    Source: layout, kernels/conv_layout.py; PTX ISA, mma.sp. Twin: reference_conv.conv2d_24_ref.
    """
    from slimgemm.kernels.spmm_24 import add_parts

    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_weight(w, conv)
    check_image("x", x, conv.channels * groups, w.values)
    if reason := why_not_conv(x, w, conv):
        raise ValueError(reason)
    check_epilogue(conv.out, x, bias, None, act)
    if not x.is_cuda:
        raise ValueError(f"x must be on a GPU, got {x.device}; slimgemm.kernels runs CPU tensors")
    found = torch.cuda.get_device_capability(x.device)
    if found < (8, 0):
        raise ValueError(f"GPU must be of compute capability (8, 0) or later, got {found}")
    size = conv.output_size(*x.shape[2:])
    m = x.shape[0] * size[0] * size[1]
    if m == 0 or conv.out == 0:
        return torch.empty(
            (x.shape[0], conv.out, *size), dtype=x.dtype, device=x.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
    tile = tile or mma_conv_tile(m)
    if splits is None:
        programs = -(-conv.out // tile.rows) * -(-m // tile.tokens)
        rounds = -(-conv.k // (256 * tile.warps_k))
        splits = split_count(programs, rounds, multiprocessors(x.device))
    launch = prepare(x, w, conv, bias, act, tile=tile, splits=splits)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        _mma_packed_kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.warps)
        if launch.parts is not None:
            add_parts(launch.parts, pixels_of(launch.out), bias, None, act)
    return launch.out
