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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgemm.kernels.configs import split_count
from slimgemm.kernels.conv_layout import (
    Convolution,
    Padding,
    check_image,
    check_weight,
    convolution,
    frozen,
    is_nhwc,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.gluon.launch import Launch, check_epilogue, multiprocessors
from slimgemm.kernels.gluon.mma_packed import COLUMNS, PTX_TYPES, why_not
from slimgemm.kernels.gluon.mma_packed_kernel import _mma_packed_kernel
from slimgemm.kernels.gluon.mma_packed_tiles import PackedTile, mma_packed_tile
from slimgemm.kernels.gluon.plans import Plans, layouts, on_device_of

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


class Plan(NamedTuple):
    """What every launch of operands that lie alike has in common; sizes as the kernel takes them.

    Args:
        shape: of the result; parts: of the fp32 sums to be added, or None.
    """

    grid: tuple[int, int]
    sizes: tuple[int, int, int, int]
    constants: dict[str, Any]
    warps: int
    shape: tuple[int, int, int, int]
    parts: tuple[int, int, int] | None


def plan_of(
    x: Tensor,
    packed: Packed24,
    conv: Convolution,
    bias: Tensor | None,
    act: str,
    tile: PackedTile | None,
    splits: int,
) -> Plan:
    """The Plan of checked operands."""
    image = image_of(conv, *x.shape[2:])
    m, (n, k) = x.shape[0] * image.out_height * image.out_width, packed.shape
    tile = tile or mma_conv_tile(m)
    fused = splits == 1
    return Plan(
        grid=(-(-n // tile.rows) * -(-m // tile.tokens), splits),
        sizes=(m, n, k, conv.channels),
        constants=dict(
            TILE=tile, KIND=PTX_TYPES[x.dtype], ALIGNED=True, SPLITS=splits,
            # Masked whether K needs it or not: without, ptxas moves loads until registers run out.
            MASKED=True, META_UNIT=math.gcd(k // COLUMNS, 2),
            IMAGE=image, HAS_BIAS=fused and bias is not None, HAS_SCALE=False,
            SCALE_PER_ROW=False, ACT=act if fused else "none", GROUP=8,
        ),
        warps=tile.warps,
        shape=(x.shape[0], n, image.out_height, image.out_width),
        parts=None if fused else (splits, m, n),
    )  # fmt: skip


def fill(plan: Plan, x: Tensor, packed: Packed24, bias: Tensor | None) -> Launch:
    """The launch of `plan` on these operands, with a new result."""
    out, parts = new_nhwc(x, plan.shape), None
    if plan.parts is not None:
        parts, bias = x.new_empty(plan.parts, dtype=torch.float32), None
    args = (
        packed.values.view(torch.int32), packed.meta.view(torch.int32),
        pixels_of(x).view(torch.int32), pixels_of(out) if parts is None else parts, bias, None,
        *plan.sizes,
    )  # fmt: skip
    return Launch(plan.grid, args, plan.constants, plan.warps, out, parts)


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
    return fill(plan_of(x, packed, conv, bias, act, tile, splits), x, packed, bias)


def checked_plan(
    x: Tensor,
    packed: Packed24,
    conv: Convolution,
    bias: Tensor | None,
    act: str,
    tile: PackedTile | None,
    splits: int | None,
) -> Plan:
    """The Plan of operands that conv2d_24_mma takes; ValueError for others."""
    check_weight(packed, conv)
    check_image("x", x, conv.channels * conv.groups, packed.values)
    if reason := why_not_conv(x, packed, conv):
        raise ValueError(reason)
    check_epilogue(conv.out, x, bias, None, act)
    if not x.is_cuda:
        raise ValueError(f"x must be on a GPU, got {x.device}; slimgemm.kernels runs CPU tensors")
    found = torch.cuda.get_device_capability(x.device)
    if found < (8, 0):
        raise ValueError(f"GPU must be of compute capability (8, 0) or later, got {found}")
    size = conv.output_size(*x.shape[2:])
    m = x.shape[0] * size[0] * size[1]
    tile = tile or mma_conv_tile(m)
    if splits is None:
        programs = -(-conv.out // tile.rows) * -(-m // tile.tokens)
        rounds = -(-conv.k // (256 * tile.warps_k))
        splits = split_count(programs, rounds, multiprocessors(x.device))
    return plan_of(x, packed, conv, bias, act, tile, splits)


PLANS: Plans[Plan] = Plans()


def new_nhwc(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A new channels_last tensor of `shape` beside `x`."""
    batch, channels, height, width = shape
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


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
    key = (
        layouts(x, w, bias, None), *map(frozen, (weight_shape, stride, padding, dilation)),
        groups, act, tile, splits,
    )  # fmt: skip
    plan = PLANS.kept.get(key)
    if plan is None:
        conv = convolution(weight_shape, stride, padding, dilation, groups)
        plan = PLANS.add(key, checked_plan(x, w, conv, bias, act, tile, splits))
    if 0 in plan.shape:
        return new_nhwc(x, plan.shape)
    launch = fill(plan, x, w, bias)
    on_device_of(x, lambda: run(launch, bias, act))
    return launch.out


def run(launch: Launch, bias: Tensor | None, act: str) -> None:
    """Launch on the current device."""
    _mma_packed_kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.warps)
    if launch.parts is not None:
        from slimgemm.kernels.spmm_24 import add_parts

        add_parts(launch.parts, pixels_of(launch.out), bias, None, act)
