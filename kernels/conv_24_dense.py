"""conv2d_24 by torch: unpack the weight, then the dense convolution and the activation.

Writes and reads the dense weight on every call, which many pixels pay for. It runs where a measured
table says that it wins (dispatch.py), and allocates [O, C, kh, kw] for the time of the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.kernels.conv_layout import Padding, check_image, convolution
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.pack_conv import unpack_conv
from slimgemm.kernels.reference import activate, check_epilogue_ref
from slimgemm.kernels.reference_conv import formatted, pad_input


@torch.no_grad()
def conv2d_24_dense(
    x: Tensor, w: Packed24, weight_shape: Sequence[int], bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1, act: str = "none",
) -> Tensor:  # fmt: skip
    """act(conv2d(x, dense(w), bias)), rounded to the dtype of x before the activation.

    Args:
        x: [B, C * groups, H, W], fp16, bf16 or fp32, on a GPU.
        w: packed weight (`pack_conv`) of the same dtype and device.
        weight_shape: (O, C, kh, kw) of the dense weight.
        bias: [O], fp16, bf16 or fp32.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
    Returns:
        [B, O, OH, OW], dtype of `x`; channels_last if `x` is, else contiguous.
    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Twin: reference_conv.conv2d_24_ref.
    """
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_image("x", x, conv.channels * groups, w.values)
    check_epilogue_ref(conv.out, x, bias, None, act)
    conv.output_size(*x.shape[2:])
    if torch.is_autocast_enabled(x.device.type):  # it would cast the convolution to another dtype
        with torch.autocast(x.device.type, enabled=False):
            return conv2d_24_dense(x, w, weight_shape, bias, stride, padding, dilation, groups, act)
    padded, options = pad_input(x, conv)
    inside = None if bias is None else bias.to(x.dtype)
    return formatted(
        activate(F.conv2d(padded, unpack_conv(w, weight_shape), inside, **options), act), x
    )
