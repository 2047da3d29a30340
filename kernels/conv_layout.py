"""Convolutions with a packed weight: geometry, the layout of the weight, and what is refused.

A weight [O, C, kh, kw] is packed as the matrix [O, kh * kw * Cp]: at each tap (y, x) its input
channels, padded with zeros to Cp, the next multiple of 8. A group is so always `group` input
channels at one tap, the order in which NHWC implicit GEMM walks them:

    column (y * kw + x) * Cp + c   holds   W[o, c, y, x]

The matrix is packed as any other (kernels/formats.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.kernels.formats import BYTE_WEIGHTS, Packed24, check_pattern, check_shapes

Padding = int | str | Sequence[int]


class Convolution(NamedTuple):
    """A 2-d convolution, less its tensors.

    Args:
        out: out channels; channels: input channels of one group.
        kernel, stride, dilation: (height, width).
        padding: (top, bottom, left, right), zeros.
    """

    out: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the dense weight."""
        return self.out, self.channels, *self.kernel

    @property
    def padded_channels(self) -> int:
        """Columns of one tap in the packed matrix."""
        return padded_channels(self.channels)

    @property
    def corner(self) -> tuple[int, int]:
        """Padding above and to the left."""
        return self.padding[0], self.padding[2]

    @property
    def k(self) -> int:
        """Columns of the packed matrix."""
        return self.kernel[0] * self.kernel[1] * self.padded_channels

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (height, width) of the output for an input of `height` x `width` pixels."""
        top, bottom, left, right = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        if height + top + bottom < reach[0] or width + left + right < reach[1]:
            raise ValueError(
                f"x of {height} x {width} pixels must not be smaller than the kernel, which spans "
                f"{reach[0]} x {reach[1]}; add padding (top, bottom, left, right is {self.padding})"
            )
        out_h = (height + top + bottom - reach[0]) // self.stride[0] + 1
        return out_h, (width + left + right - reach[1]) // self.stride[1] + 1


def padded_channels(channels: int) -> int:
    """`channels` rounded up to whole bytes of metadata."""
    return -(-channels // BYTE_WEIGHTS) * BYTE_WEIGHTS


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """`value`, or the same twice, as (height, width); each at least `least`."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or any(v < least for v in both):
        raise ValueError(f"{name} must be one or two integers of at least {least}, got {value!r}")
    return both


def four_paddings(
    padding: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """`padding` as (top, bottom, left, right); "same" puts an odd pixel last, as torch."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
        if padding == "valid":
            return 0, 0, 0, 0
        if tuple(stride) != (1, 1):
            raise ValueError(f"padding 'same' must have stride 1, got {tuple(stride)}")
        tall, wide = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return tall // 2, tall - tall // 2, wide // 2, wide - wide // 2
    if not isinstance(padding, int) and len(padding) == 4:
        if any(p < 0 for p in padding):
            raise ValueError(f"padding must be integers of at least 0, got {padding!r}")
        top, bottom, left, right = padding
        return top, bottom, left, right
    tall, wide = pair("padding", padding, 0)
    return tall, tall, wide, wide


def convolution(
    weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Convolution:
    """A checked Convolution from the arguments of torch.nn.functional.conv2d.

    Args:
        weight_shape: (O, C per group, kh, kw).
        padding: an integer, (height, width), (top, bottom, left, right), "same" or "valid".
    Raises:
        ValueError: an argument is not as above, or `groups` does not divide O.
    """
    if len(weight_shape) != 4 or any(size < 1 for size in weight_shape):
        raise ValueError(
            f"weight_shape must be (out, channels per group, height, width), got {weight_shape}"
        )
    out, channels, *kernel = weight_shape
    if groups < 1 or out % groups:
        raise ValueError(f"groups must divide the {out} out channels, got {groups}")
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    padding = four_paddings(padding, kernel, stride, dilation)
    return Convolution(out, channels, (kernel[0], kernel[1]), stride, padding, dilation, groups)


def check_image(name: str, x: Tensor, channels: int, weight: Tensor) -> None:
    """Raise ValueError unless `x` is [B, channels, H, W] with the dtype and device of `weight`."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{name} must be [B, {channels}, H, W] for this weight, got {list(x.shape)}"
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"{name} must be {weight.dtype} on {weight.device} as the weight, "
            f"got {x.dtype} on {x.device}"
        )


def check_weight(w: Packed24, conv: Convolution) -> None:
    """Raise ValueError unless `w` packs a weight of `conv`. Reads no element."""
    check_shapes(w)
    if w.shape != (conv.out, conv.k):
        raise ValueError(
            f"packed weight must be {[conv.out, conv.k]} for a {list(conv.weight_shape)} weight, "
            f"got {list(w.shape)}; pack it with pack_conv"
        )


def check_output_gradient(dy: Tensor, input_shape: Sequence[int], conv: Convolution) -> None:
    """Raise ValueError unless `dy` has the shape of the output for an input of `input_shape`."""
    if len(input_shape) != 4 or input_shape[1] != conv.channels * conv.groups:
        raise ValueError(
            f"input shape must be (batch, {conv.channels * conv.groups}, height, width), "
            f"got {list(input_shape)}"
        )
    batch, _, height, width = input_shape
    want = (batch, conv.out, *conv.output_size(height, width))
    if tuple(dy.shape) != want:
        raise ValueError(
            f"dy must be {list(want)} for an input {list(input_shape)}, got {list(dy.shape)}"
        )


def memory_format(x: Tensor) -> torch.memory_format:
    """What a convolution of `x` returns: channels_last if its strides say so, else contiguous.

    Source: is_channels_last_strides_2d_s4 of PyTorch's c10/core/MemoryFormat.h.
    """
    if x.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for axis in (1, 3, 2, 0):
        stride = x.stride(axis)
        # Torch calls [N, 1, 1, 1], which both formats fit, and what is empty contiguous.
        ambiguous = x.shape[axis] == 0 or (axis == 0 and least == x.stride(1))
        if stride < least or ambiguous:
            return torch.contiguous_format
        least = stride * x.shape[axis] if x.shape[axis] > 1 else stride
    return torch.channels_last


def frozen(option: Any) -> Any:
    """An argument of `convolution` that can be looked up: operators give lists."""
    return tuple(option) if isinstance(option, list) else option


def is_nhwc(x: Tensor) -> bool:
    """True if `x` [B, C, H, W] is channels_last with no gaps between its elements."""
    return x.permute(0, 2, 3, 1).is_contiguous() and memory_format(x) is torch.channels_last


def conv_matrix(w: Tensor) -> Tensor:
    """A dense weight [O, C, kh, kw] as the matrix [O, kh * kw * Cp] that is packed."""
    if w.ndim != 4 or not w.dtype.is_floating_point:
        raise ValueError(
            f"weight must be floating [out, channels, height, width], got {w.dtype} {list(w.shape)}"
        )
    channels = w.shape[1]
    taps = w.detach().permute(0, 2, 3, 1)
    return F.pad(taps, (0, padded_channels(channels) - channels)).reshape(w.shape[0], -1)


def packable_matrix(w: Tensor, keep: int, group: int) -> Tensor:
    """conv_matrix of a weight that is keep:group along its input channels.

    Raises:
        ValueError: `w` is no floating 4-d tensor, or some group holds more than `keep` non-zeros.
    """
    check_pattern(keep, group)
    matrix = conv_matrix(w)
    _, channels, tall, wide = w.shape
    blocks = padded_channels(channels) // group
    nonzeros = (matrix != 0).view(-1, group).sum(-1)
    bad = nonzeros > keep
    if bool(bad.any()):
        first = int(bad.int().argmax())
        place, block = divmod(first, blocks)
        tap, last = place % (tall * wide), min(block * group + group, channels) - 1
        raise ValueError(
            f"weight is not {keep}:{group}: out channel {place // (tall * wide)}, "
            f"tap ({tap // wide}, {tap % wide}), input channels {block * group}-{last} hold "
            f"{int(nonzeros[first])} nonzeros ({int(bad.sum())} such groups in all); "
            "prune it first (slimgemm.pruning.plan)"
        )
    return matrix


def conv_weight(matrix: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The dense weight [O, C, kh, kw] of a matrix [O, kh * kw * Cp]; inverse of conv_matrix."""
    out, channels, tall, wide = weight_shape
    taps = matrix.reshape(out, tall, wide, padded_channels(channels))
    return taps[..., :channels].permute(0, 3, 1, 2).contiguous()
