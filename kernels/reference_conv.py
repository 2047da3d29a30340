"""Plain torch twins of the convolutions with a packed weight, for any device; see reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from slimgemm.kernels.conv_layout import (
    Convolution,
    Padding,
    check_image,
    check_output_gradient,
    check_weight,
    conv_matrix,
    conv_weight,
    convolution,
    memory_format,
    packable_matrix,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.reference import activate, gather_24_ref, pack_24_ref, unpack_24_ref


def pack_conv_ref(w: Tensor, keep: int = 2, group: int = 4) -> Packed24:
    """Twin of pack_conv: dense [O, C, kh, kw] that already is keep:group along C -> Packed24."""
    return pack_24_ref(packable_matrix(w, keep, group), keep, group)


def unpack_conv_ref(packed: Packed24, weight_shape: Sequence[int]) -> Tensor:
    """Twin of unpack_conv: Packed24 -> dense [O, C, kh, kw]."""
    check_weight(packed, convolution(weight_shape))
    return conv_weight(unpack_24_ref(packed), weight_shape)


def pad_input(x: Tensor, conv: Convolution) -> tuple[Tensor, dict[str, Any]]:
    """`x`, padded where torch's own padding cannot, and the rest of conv2d's arguments."""
    top, bottom, left, right = conv.padding
    options = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    if top == bottom and left == right:
        return x, {"padding": (top, left), **options}
    return F.pad(x, (left, right, top, bottom)), {"padding": 0, **options}


def formatted(y: Tensor, like: Tensor) -> Tensor:
    """`y` with the strides of a new tensor in the memory format that `like` asks for."""
    layout = memory_format(like)
    # `contiguous` would leave the strides of an axis of one element, or of no element, as they are.
    if y.stride() == torch.empty_like(y, device="meta", memory_format=layout).stride():
        return y
    return torch.empty_like(y, memory_format=layout).copy_(y)


def conv2d_24_ref(
    x: Tensor, w: Packed24, weight_shape: Sequence[int], bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1, act: str = "none",
) -> Tensor:  # fmt: skip
    """Twin of conv2d_24: act(conv2d(x, dense(w), bias))."""
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_image("x", x, conv.channels * groups, w.values)
    conv.output_size(*x.shape[2:])
    padded, options = pad_input(x, conv)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(padded, unpack_conv_ref(w, weight_shape), bias, **options)
    return formatted(activate(y, act), x)


def conv2d_24_dgrad_ref(
    dy: Tensor, w: Packed24, weight_shape: Sequence[int], input_shape: Sequence[int],
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """Twin of conv2d_24_dgrad: the gradient of conv2d_24 with respect to x."""
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_image("dy", dy, conv.out, w.values)
    check_output_gradient(dy, input_shape, conv)
    # Only the shape of the input is read: one element stands for all.
    padded, options = pad_input(dy.new_empty(1).expand(*input_shape), conv)
    dense = unpack_conv_ref(w, weight_shape)
    dx = grad.conv2d_input(padded.shape, dense, dy, **options)
    if padded.shape[2:] != tuple(input_shape[2:]):
        top, _, left, _ = conv.padding
        dx = dx[:, :, top : top + input_shape[2], left : left + input_shape[3]]
    return formatted(dx, dy)


def conv2d_24_wgrad_ref(
    dy: Tensor, x: Tensor, w: Packed24, weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """Twin of conv2d_24_wgrad: the gradient with respect to the stored values, [O, stored]."""
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_weight(w, conv)
    check_image("dy", dy, conv.out, w.values)
    check_image("x", x, conv.channels * groups, w.values)
    check_output_gradient(dy, x.shape, conv)
    padded, options = pad_input(x, conv)
    dw = grad.conv2d_weight(padded, conv.weight_shape, dy, **options)
    return gather_24_ref(conv_matrix(dw), w)
