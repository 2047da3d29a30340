"""Torch twins of gemm_channels and conv2d_channels, and the checks that twins and kernels share.

`<op>_ref` takes the arguments of `<op>` and runs on any device; it is what a CPU runs. Dropped
channels of an input are never read, so what they hold (NaN too) does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.kernels.channel_layout import RANGE, ChannelLayout, channel_layout, check_layout
from slimgemm.kernels.conv_layout import four_paddings, memory_format, pair
from slimgemm.kernels.formats import ChannelIndex
from slimgemm.kernels.reference import ACTIVATIONS, activate

Channels = ChannelIndex | ChannelLayout | None


class ConvGeometry(NamedTuple):
    """Options of a convolution. padding: rows above, rows below, columns left, columns right."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


def conv_geometry(kernel, stride=1, padding=0, dilation=1, groups: int = 1) -> ConvGeometry:
    """Checked options of a convolution with a `kernel` (height, width).

    Args:
        stride, padding, dilation, groups: as torch.nn.functional.conv2d takes them; padding also as
            the four numbers of ConvGeometry.
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    return ConvGeometry(stride, four_paddings(padding, kernel, stride, dilation), dilation, groups)


def output_size(height: int, width: int, kernel, geometry: ConvGeometry) -> tuple[int, int]:
    """(height, width) of the output; ValueError where the kernel is larger than the image."""
    (stride_h, stride_w), (top, bottom, left, right), (dil_h, dil_w), _ = geometry
    room_h = height + top + bottom - dil_h * (kernel[0] - 1) - 1
    room_w = width + left + right - dil_w * (kernel[1] - 1) - 1
    if room_h < 0 or room_w < 0:
        raise ValueError(
            f"kernel {tuple(kernel)} with dilation {(dil_h, dil_w)} is larger than the padded "
            f"input, {height + top + bottom} x {width + left + right}"
        )
    return room_h // stride_h + 1, room_w // stride_w + 1


def _check_same(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"{first} must be {b.dtype} on {b.device} as {second}, got {a.dtype} on {a.device}"
        )


def check_bias_act(x: Tensor, n: int, bias: Tensor | None, act: str) -> None:
    """Raise ValueError unless bias is [n] beside `x` and `act` is one of ACTIVATIONS."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if bias is not None:
        _check_same("bias", bias, "x", x)
        if tuple(bias.shape) != (n,):
            raise ValueError(
                f"bias must be [{n}], one per kept out channel, got {list(bias.shape)}"
            )


def check_gemm(
    x: Tensor, w: Tensor, in_index: Channels, out_index: Channels
) -> tuple[ChannelLayout, ChannelLayout]:
    """Layouts of in and out; ValueError unless `x` [..., in] can meet `w` [kept out, kept in]."""
    if w.ndim != 2 or not w.dtype.is_floating_point:
        raise ValueError(
            f"w must be a floating matrix [kept_out, kept_in], got {w.dtype} {list(w.shape)}"
        )
    ins = channel_layout(in_index, w.shape[1], "in_index")
    outs = channel_layout(out_index, w.shape[0], "out_index")
    _check_same("x", x, "w", w)
    check_layout("in_index", ins, w.shape[1], x.device)
    check_layout("out_index", outs, w.shape[0], x.device)
    if x.ndim < 1 or x.shape[-1] != ins.width:
        raise ValueError(f"x must be [..., {ins.width}] for these in channels, got {list(x.shape)}")
    return ins, outs


def check_gemm_wgrad(
    dy: Tensor, x: Tensor, in_index: Channels, out_index: Channels
) -> tuple[ChannelLayout, ChannelLayout]:
    """Layouts of in and out; ValueError unless dy [..., out] and x [..., in] fit them."""
    _check_same("dy", dy, "x", x)
    if dy.ndim < 1 or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy and x must have the same leading shape, got {list(dy.shape)} and {list(x.shape)}"
        )
    ins = channel_layout(in_index, x.shape[-1], "in_index")
    outs = channel_layout(out_index, dy.shape[-1], "out_index")
    for name, layout, tensor, of in (("in_index", ins, x, "x"), ("out_index", outs, dy, "dy")):
        check_layout(name, layout, layout.kept, x.device)
        if layout.width != tensor.shape[-1]:
            raise ValueError(
                f"{of} must be [..., {layout.width}] for {name}, got {list(tensor.shape)}"
            )
    return ins, outs


def check_conv_channels(
    in_channels: int | None, kernel, in_index: Channels, out_index: Channels,
    kept: tuple[int, int], groups: int, device: torch.device,
) -> tuple[ChannelLayout, ChannelLayout]:  # fmt: skip
    """Layouts of in and out; ValueError unless they keep `kept` (in, out) channels in all."""
    if kept[1] % groups:
        raise ValueError(f"w must have out channels that {groups} groups divide, got {kept[1]}")
    if min(kernel) < 1:
        raise ValueError(f"w must have a kernel of at least 1 x 1, got {tuple(kernel)}")
    ins = channel_layout(in_index, kept[0], "in_index", groups)
    outs = channel_layout(out_index, kept[1], "out_index", groups)
    check_layout("in_index", ins, kept[0], device, groups)
    check_layout("out_index", outs, kept[1], device, groups)
    if in_channels is not None and in_channels != ins.width:
        raise ValueError(f"x must have {ins.width} channels for in_index, got {in_channels}")
    return ins, outs


def check_conv(
    x: Tensor, w: Tensor, in_index: Channels, out_index: Channels, geometry: ConvGeometry
) -> tuple[ChannelLayout, ChannelLayout]:
    """Layouts of the in and out channels; ValueError unless `x` [B, in, H, W] can meet `w`."""
    check_conv_weight(w)
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    _check_same("x", x, "w", w)
    kept = w.shape[1] * geometry.groups, w.shape[0]
    return check_conv_channels(
        x.shape[1], w.shape[2:], in_index, out_index, kept, geometry.groups, x.device
    )


def check_conv_weight(w: Tensor) -> None:
    """Raise ValueError unless `w` is a floating [kept_out, kept_in / groups, height, width]."""
    if w.ndim != 4 or not w.dtype.is_floating_point:
        raise ValueError(
            f"w must be floating [kept_out, kept_in / groups, height, width], "
            f"got {w.dtype} {list(w.shape)}"
        )


def check_conv_dgrad(
    dy: Tensor, w: Tensor, in_index: Channels, out_index: Channels,
    size: tuple[int, int], geometry: ConvGeometry,
) -> tuple[ChannelLayout, ChannelLayout]:  # fmt: skip
    """Layouts of the in and out channels; ValueError unless dy is what an input of `size` gives."""
    check_conv_weight(w)
    _check_same("dy", dy, "w", w)
    kept = w.shape[1] * geometry.groups, w.shape[0]
    ins, outs = check_conv_channels(
        None, w.shape[2:], in_index, out_index, kept, geometry.groups, w.device
    )
    want = (outs.width, *output_size(*size, w.shape[2:], geometry))
    if dy.ndim != 4 or tuple(dy.shape[1:]) != want:
        raise ValueError(f"dy must be [B, {want[0]}, {want[1]}, {want[2]}], got {list(dy.shape)}")
    return ins, outs


def check_conv_wgrad(
    dy: Tensor, x: Tensor, kernel, in_index: Channels, out_index: Channels, geometry: ConvGeometry
) -> tuple[ChannelLayout, ChannelLayout]:
    """Layouts of the in and out channels; ValueError unless dy is what `x` gives."""
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    _check_same("dy", dy, "x", x)
    groups = geometry.groups
    ins = channel_layout(in_index, x.shape[1], "in_index", groups)
    outs = channel_layout(out_index, dy.shape[1] if dy.ndim == 4 else 0, "out_index", groups)
    if ins.kept % groups:
        raise ValueError(f"in_index must keep a number that {groups} groups divide, got {ins.kept}")
    check_conv_channels(x.shape[1], kernel, ins, outs, (ins.kept, outs.kept), groups, x.device)
    want = (x.shape[0], outs.width, *output_size(x.shape[2], x.shape[3], kernel, geometry))
    if tuple(dy.shape) != want:
        raise ValueError(f"dy must be {list(want)} for this x, got {list(dy.shape)}")
    return ins, outs


def take(x: Tensor, layout: ChannelLayout, dim: int) -> Tensor:
    """The kept channels of axis `dim`; a view where they are a range."""
    if layout.index is None or layout.run == RANGE:
        return x.narrow(dim, layout.start, layout.kept)
    return x.index_select(dim, layout.index)


def put(
    y: Tensor, layout: ChannelLayout, dim: int, form: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """`y` [.., kept, ..] widened along `dim`, zeros in the dropped channels."""
    shape = list(y.shape)
    shape[dim] = layout.width
    wide = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=form)
    if layout.kept == layout.width:
        # is_contiguous() ignores the strides of axes of size 1, which a caller can see.
        return y if y.stride() == wide.stride() else wide.copy_(y)
    wide.zero_()
    if layout.index is None or layout.run == RANGE:
        wide.narrow(dim, layout.start, layout.kept).copy_(y)
        return wide
    return wide.index_copy_(dim, layout.index, y)


def gemm_channels_ref(
    x: Tensor, w: Tensor, in_index: Channels = None, out_index: Channels = None,
    bias: Tensor | None = None, act: str = "none",
) -> Tensor:  # fmt: skip
    """Twin of gemm_channels: y[..., out] = act(x[..., in] @ w.T + bias), zeros elsewhere."""
    ins, outs = check_gemm(x, w, in_index, out_index)
    check_bias_act(x, w.shape[0], bias, act)
    return put(activate(F.linear(take(x, ins, -1), w, bias), act), outs, -1)


def gemm_channels_wgrad_ref(
    dy: Tensor, x: Tensor, in_index: Channels = None, out_index: Channels = None
) -> Tensor:
    """Twin of gemm_channels_wgrad: dy[..., out].T @ x[..., in], [kept_out, kept_in]."""
    ins, outs = check_gemm_wgrad(dy, x, in_index, out_index)
    dy, x = (
        torch.atleast_2d(take(t, kept, -1)).flatten(0, -2) for t, kept in ((dy, outs), (x, ins))
    )
    return (dy.t() @ x).contiguous()


def _symmetric(x: Tensor, padding: tuple[int, int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """`x` and the padding that torch's convolution can add to it: unequal sides are padded here."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def conv2d_channels_ref(
    x: Tensor, w: Tensor, in_index: Channels = None, out_index: Channels = None,
    bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups: int = 1, act: str = "none",
) -> Tensor:  # fmt: skip
    """Twin of conv2d_channels: y[:, out] = act(conv2d(x[:, in], w, bias)), zeros elsewhere."""
    geometry = conv_geometry(w.shape[2:], stride, padding, dilation, groups)
    ins, outs = check_conv(x, w, in_index, out_index, geometry)
    check_bias_act(x, w.shape[0], bias, act)
    high, wide = output_size(x.shape[2], x.shape[3], w.shape[2:], geometry)
    kept = w.shape[0]
    if x.shape[0] * kept * high * wide == 0 or ins.kept == 0:
        # torch refuses some empty convolutions; the sum over no channels is the bias.
        y = x.new_zeros(x.shape[0], kept, high, wide)
        y = y if bias is None else y + bias[:, None, None]
    else:
        source, symmetric = _symmetric(take(x, ins, 1), geometry.padding)
        y = F.conv2d(source, w, bias, geometry.stride, symmetric, geometry.dilation, groups)
    return put(activate(y, act), outs, 1, memory_format(x))


def _grad_conv(dy, x, w, geometry: ConvGeometry, padding, which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    stride, _, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, (0, 0), groups, mask
    )[which]


def conv2d_channels_dgrad_ref(
    dy: Tensor, w: Tensor, size: tuple[int, int], in_index: Channels = None,
    out_index: Channels = None, stride=1, padding=0, dilation=1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Twin of conv2d_channels_dgrad: the gradient of an input [B, in, *size]."""
    geometry = conv_geometry(w.shape[2:], stride, padding, dilation, groups)
    ins, outs = check_conv_dgrad(dy, w, in_index, out_index, size, geometry)
    top, _, left, _ = geometry.padding
    form = memory_format(dy)
    blank = dy.new_zeros(1).expand(dy.shape[0], ins.kept, *size)
    if blank.numel() == 0 or w.numel() == 0 or dy.shape[0] * outs.kept == 0:
        return put(torch.zeros_like(blank), ins, 1, form)
    padded, symmetric = _symmetric(blank, geometry.padding)
    dx = _grad_conv(take(dy, outs, 1), padded, w, geometry, symmetric, 0)
    if padded is not blank:
        dx = dx[:, :, top : top + size[0], left : left + size[1]]
    return put(dx, ins, 1, form)


def conv2d_channels_wgrad_ref(
    dy: Tensor, x: Tensor, kernel: tuple[int, int], in_index: Channels = None,
    out_index: Channels = None, stride=1, padding=0, dilation=1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Twin of conv2d_channels_wgrad: the gradient of w [kept_out, kept_in / groups, *kernel]."""
    geometry = conv_geometry(kernel, stride, padding, dilation, groups)
    ins, outs = check_conv_wgrad(dy, x, kernel, in_index, out_index, geometry)
    blank = x.new_zeros(outs.kept, ins.kept // groups, *kernel)
    if blank.numel() == 0 or dy.numel() == 0:
        return blank
    padded, symmetric = _symmetric(take(x, ins, 1), geometry.padding)
    return _grad_conv(take(dy, outs, 1), padded, blank, geometry, symmetric, 1).contiguous()
