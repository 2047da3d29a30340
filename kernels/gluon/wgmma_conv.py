"""wgmma_conv: a 2:4 convolution of stride 1 on wgmma.sp, as the implicit GEMM of NHWC images.

The kernel of wgmma_sp with another producer and another place of each token (wgmma_image.py): X
comes tap by tap in 4-d TMA boxes, nothing is computed per element, no im2col is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimgemm.kernels.conv_layout import (
    Convolution,
    Padding,
    check_image,
    check_weight,
    convolution,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.gluon.launch import Launch, check_epilogue, multiprocessors, tma_view
from slimgemm.kernels.gluon.mma_conv import pixels_of, why_not_conv
from slimgemm.kernels.gluon.orders import WGMMA_ROWS
from slimgemm.kernels.gluon.wgmma_image import BOX_PIXELS, boxes_of
from slimgemm.kernels.gluon.wgmma_sp import PTX_TYPES, run
from slimgemm.kernels.gluon.wgmma_tiles import WGMMA_SP_TILES


def why_not(x: Tensor, packed: Packed24, conv: Convolution) -> str:
    """What keeps a convolution from this kernel, or nothing."""
    if conv.stride != (1, 1):
        return f"stride must be 1, got {conv.stride}; mma_conv takes any"
    return why_not_conv(x, packed, conv)


def takes(x: Tensor, packed: Packed24, conv: Convolution) -> bool:
    """True if conv2d_24_wgmma runs on this weight and x."""
    return (
        x.is_cuda
        and x.dtype == packed.values.dtype
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and not why_not(x, packed, conv)
    )


def prepare(
    x: Tensor,
    packed: Packed24,
    conv: Convolution,
    bias: Tensor | None = None,
    act: str = "none",
    *,
    programs: int = 132,
) -> Launch:
    """What conv2d_24_wgmma launches, with at most `programs` programs."""
    boxes = boxes_of(conv, x.shape[0], *x.shape[2:])
    n, k = packed.shape
    out = torch.empty(
        (x.shape[0], n, boxes.out_height, boxes.out_width),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    return Launch(
        grid=(min(-(-n // WGMMA_ROWS) * boxes.count, programs),),
        args=(
            tma_view(packed.values, (128, 64)), packed.meta.view(torch.int16),
            tma_view(x.permute(0, 2, 3, 1), boxes.shape), pixels_of(out), bias, None, None,
            boxes.count * BOX_PIXELS, n, k,
        ),
        constants=dict(
            TILE=WGMMA_SP_TILES[BOX_PIXELS], ORDERED=False, KIND=PTX_TYPES[x.dtype],
            HAS_BIAS=bias is not None, HAS_SCALE=False, SCALE_PER_ROW=False,
            HAS_TOKEN_SCALE=False, ACT=act, GROUP=8, BOXES=boxes,
        ),
        warps=4, out=out, parts=None,
    )  # fmt: skip


def conv2d_24_wgmma(
    x: Tensor, w: Packed24, weight_shape: Sequence[int], bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1, act: str = "none",
) -> Tensor:  # fmt: skip
    """act(conv2d(x, dense(w), bias)) on wgmma.sp, Hopper only; arguments as torch's conv2d.

    Args:
        x: [B, C, H, W] channels_last, bf16 or fp16, C a multiple of 64.
        w: packed weight (`pack_conv`), 2:4, of the same dtype and device.
        weight_shape: (O, C, kh, kw) of the dense weight.
        bias: [O], fp16, bf16 or fp32.
        stride, groups: 1.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
    Returns:
        [B, O, OH, OW] channels_last, dtype of `x`. Accumulated in fp32, same bytes on every run.
        Each batch and image size has a build of its own.
    Raises:
        ValueError: a shape, layout, dtype, device or option is not as above.

    Source: layout, kernels/conv_layout.py; PTX ISA, wgmma.mma_async.sp and cp.async.bulk.tensor.
    Twin: reference_conv.conv2d_24_ref.
    """
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_weight(w, conv)
    check_image("x", x, conv.channels * groups, w.values)
    if reason := why_not(x, w, conv):
        raise ValueError(reason)
    check_epilogue(conv.out, x, bias, None, act)
    if not x.is_cuda:
        raise ValueError(f"x must be on a GPU, got {x.device}; slimgemm.kernels runs CPU tensors")
    found = torch.cuda.get_device_capability(x.device)
    if found != (9, 0):
        raise ValueError(f"GPU must be of compute capability (9, 0), got {found}")
    size = conv.output_size(*x.shape[2:])
    if x.shape[0] * size[0] * size[1] * conv.out == 0:
        return torch.empty(
            (x.shape[0], conv.out, *size), dtype=x.dtype, device=x.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
    return run(prepare(x, w, conv, bias, act, programs=multiprocessors(x.device)))
