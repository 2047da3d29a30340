"""The channel operators that torch sees: slimgemm::gemm_channels, slimgemm::conv2d_channels.

A ChannelLayout crosses the operator boundary as its index (absent where the channels are a range)
and four integers: width, kept, start, run. So a call never looks at an index, and never waits for
a GPU: who makes the layout (kernels/channel_layout.py) has checked it. The gradients of a product
are made of the same products with the roles exchanged, so backward of any order works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from slimgemm.kernels.channel_layout import ChannelLayout
from slimgemm.kernels.dispatch import implementation
from slimgemm.kernels.reference_channels import (
    check_bias_act,
    check_conv,
    check_conv_dgrad,
    check_conv_wgrad,
    check_gemm,
    check_gemm_wgrad,
    conv_geometry,
    output_size,
    take,
)
from slimgemm.sparse_ops.library import act_backward, define
from slimgemm.sparse_ops.library_conv import images

CHANNELS = "Tensor? in_index, int[] in_layout, Tensor? out_index, int[] out_layout"
GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


def _run(op: str, first: Tensor, *arguments: Any) -> Tensor:
    """Run `op` where `first` is: Triton on a GPU, the twin elsewhere."""
    return implementation(op, first.device)(first, *arguments)


def parts(layout: ChannelLayout) -> tuple[Tensor | None, list[int]]:
    """A layout as two arguments of an operator."""
    return layout.index, list(layout[1:])


def _layouts(channels: Sequence[Any]) -> tuple[ChannelLayout, ChannelLayout]:
    """(in, out) from the four arguments of an operator."""
    in_index, in_layout, out_index, out_layout = channels
    return ChannelLayout(in_index, *in_layout), ChannelLayout(out_index, *out_layout)


def _exchanged(channels: Sequence[Any]) -> list[Any]:
    """The four arguments with the roles of in and out exchanged."""
    return [*channels[2:], *channels[:2]]


# ---- gemm_channels: y[..., out] = act(x[..., in] @ w.T + bias)
def _gemm(
    x: Tensor, w: Tensor, bias: Tensor | None,
    in_index: Tensor | None, in_layout: Sequence[int],
    out_index: Tensor | None, out_layout: Sequence[int], act: str,
) -> Tensor:  # fmt: skip
    layouts = _layouts((in_index, in_layout, out_index, out_layout))
    return _run("gemm_channels", x, w, *layouts, bias, act)


def _gemm_fake(x, w, bias, in_index, in_layout, out_index, out_layout, act):
    _, outs = check_gemm(x, w, *_layouts((in_index, in_layout, out_index, out_layout)))
    check_bias_act(x, w.shape[0], bias, act)
    return x.new_empty(*x.shape[:-1], outs.width)


def _gemm_save(ctx, inputs, output):
    x, w, bias, in_index, ctx.in_layout, out_index, ctx.out_layout, ctx.act = inputs
    ctx.save_for_backward(x, w, bias, in_index, out_index)


def _gemm_backward(ctx, dy):
    """dz = act'(z) dy; dx[in] = dz[out] W, dW = dz[out].T x[in], db = sum of dz[out].

    With an activation, z is computed again instead of being kept from the forward.
    """
    x, w, bias, in_index, out_index = ctx.saved_tensors
    channels = [in_index, ctx.in_layout, out_index, ctx.out_layout]
    need_x, need_w, need_bias = ctx.needs_input_grad[:3]
    dz = dy
    if ctx.act != "none":
        dz = act_backward(dy, gemm_channels(x, w, bias, *channels, "none"), ctx.act)
    dx = dw = db = None
    if need_x:  # [M, N] @ [N, K]
        dx = gemm_channels(dz, w.t(), None, *_exchanged(channels), "none")
    if need_w:  # [N, M] @ [M, K]
        dw = gemm_channels_wgrad(dz, x, *channels)
    if need_bias:
        db = take(dz.reshape(-1, dz.shape[-1]).sum(0), _layouts(channels)[1], 0)
    return dx, dw, db, None, None, None, None, None  # indices have no gradient


gemm_channels = define(
    f"gemm_channels(Tensor x, Tensor w, Tensor? bias, {CHANNELS}, str act) -> Tensor",
    _gemm,
    _gemm_fake,
    _gemm_save,
    _gemm_backward,
)


# ---- gemm_channels_wgrad: dy[..., out].T @ x[..., in]
def _gemm_wgrad(
    dy: Tensor, x: Tensor, in_index: Tensor | None, in_layout: Sequence[int],
    out_index: Tensor | None, out_layout: Sequence[int],
) -> Tensor:  # fmt: skip
    layouts = _layouts((in_index, in_layout, out_index, out_layout))
    return _run("gemm_channels_wgrad", dy, x, *layouts)


def _gemm_wgrad_fake(dy, x, *channels):
    ins, outs = check_gemm_wgrad(dy, x, *_layouts(channels))
    return dy.new_empty(outs.kept, ins.kept)


def _gemm_wgrad_save(ctx, inputs, output):
    dy, x, in_index, ctx.in_layout, out_index, ctx.out_layout = inputs
    ctx.save_for_backward(dy, x, in_index, out_index)


def _gemm_wgrad_backward(ctx, g):
    """Of dW = dy[out].T x[in]: d(dy)[out] = x[in] g.T, dx[in] = dy[out] g."""
    dy, x, in_index, out_index = ctx.saved_tensors
    channels = [in_index, ctx.in_layout, out_index, ctx.out_layout]
    need_dy, need_x = ctx.needs_input_grad[:2]
    ddy = gemm_channels(x, g, None, *channels, "none") if need_dy else None
    dx = gemm_channels(dy, g.t(), None, *_exchanged(channels), "none") if need_x else None
    return ddy, dx, None, None, None, None


gemm_channels_wgrad = define(
    f"gemm_channels_wgrad(Tensor dy, Tensor x, {CHANNELS}) -> Tensor",
    _gemm_wgrad,
    _gemm_wgrad_fake,
    _gemm_wgrad_save,
    _gemm_wgrad_backward,
)


# ---- conv2d_channels: y[:, out] = act(conv2d(x[:, in], w, bias))
def _conv(
    x: Tensor, w: Tensor, bias: Tensor | None,
    in_index: Tensor | None, in_layout: Sequence[int],
    out_index: Tensor | None, out_layout: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, act: str,
) -> Tensor:  # fmt: skip
    layouts = _layouts((in_index, in_layout, out_index, out_layout))
    return _run("conv2d_channels", x, w, *layouts, bias, stride, padding, dilation, groups, act)


def _conv_fake(
    x, w, bias, in_index, in_layout, out_index, out_layout, stride, padding, dilation, groups, act
):
    geometry = conv_geometry(w.shape[2:], stride, padding, dilation, groups)
    layouts = _layouts((in_index, in_layout, out_index, out_layout))
    _, outs = check_conv(x, w, *layouts, geometry)
    check_bias_act(x, w.shape[0], bias, act)
    return images(x, outs.width, output_size(x.shape[2], x.shape[3], w.shape[2:], geometry))


def _conv_save(ctx, inputs, output):
    x, w, bias, in_index, ctx.in_layout, out_index, ctx.out_layout, *ctx.geometry, ctx.act = inputs
    ctx.save_for_backward(x, w, bias, in_index, out_index)


def _conv_backward(ctx, dy):
    """dz = act'(z) dy; dx and dW as dgrad and wgrad of dz; db sums dz over the pixels.

    With an activation, z is computed again instead of being kept from the forward.
    """
    x, w, bias, in_index, out_index = ctx.saved_tensors
    channels = [in_index, ctx.in_layout, out_index, ctx.out_layout]
    need_x, need_w, need_bias = ctx.needs_input_grad[:3]
    dz = dy
    if ctx.act != "none":
        z = conv2d_channels(x, w, bias, *channels, *ctx.geometry, "none")
        dz = act_backward(dy, z, ctx.act)
    dx = dw = db = None
    if need_x:
        dx = conv2d_channels_dgrad(dz, w, x.shape[2:], *channels, *ctx.geometry)
    if need_w:
        dw = conv2d_channels_wgrad(dz, x, w.shape[2:], *channels, *ctx.geometry)
    if need_bias:
        db = take(dz.sum((0, 2, 3)), _layouts(channels)[1], 0)
    return dx, dw, db, *(None,) * 9  # indices and options have no gradient


conv2d_channels = define(
    f"conv2d_channels(Tensor x, Tensor w, Tensor? bias, {CHANNELS}, {GEOMETRY}, str act) -> Tensor",
    _conv,
    _conv_fake,
    _conv_save,
    _conv_backward,
)


# ---- conv2d_channels_dgrad and _wgrad: the gradients with respect to x and to w
# Both take dy, the other operand, the size (height, width) of what they return, channels, geometry.
OPERANDS = f"SymInt[] size, {CHANNELS}, {GEOMETRY}"


def _dgrad(dy: Tensor, w: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
    return _run("conv2d_channels_dgrad", dy, w, size, *_layouts(rest[:4]), *rest[4:])


def _dgrad_fake(dy, w, size, *rest):
    geometry = conv_geometry(w.shape[2:], *rest[4:])
    ins, _ = check_conv_dgrad(dy, w, *_layouts(rest[:4]), size, geometry)
    return images(dy, ins.width, size)


def _wgrad(dy: Tensor, x: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
    return _run("conv2d_channels_wgrad", dy, x, size, *_layouts(rest[:4]), *rest[4:])


def _wgrad_fake(dy, x, size, *rest):
    geometry = conv_geometry(size, *rest[4:])
    ins, outs = check_conv_wgrad(dy, x, size, *_layouts(rest[:4]), geometry)
    return dy.new_empty(outs.kept, ins.kept // geometry.groups, *size)


def _gradient_save(ctx, inputs, output):
    dy, other, _, in_index, ctx.in_layout, out_index, ctx.out_layout, *ctx.geometry = inputs
    ctx.save_for_backward(dy, other, in_index, out_index)


def _dgrad_backward(ctx, g):
    """dx is linear in dy and in w: d(dy) = conv2d(g, w), dW as wgrad of dy and g."""
    dy, w, in_index, out_index = ctx.saved_tensors
    channels = [in_index, ctx.in_layout, out_index, ctx.out_layout]
    need_dy, need_w = ctx.needs_input_grad[:2]
    ddy = dw = None
    if need_dy:
        ddy = conv2d_channels(g, w, None, *channels, *ctx.geometry, "none")
    if need_w:
        dw = conv2d_channels_wgrad(dy, g, w.shape[2:], *channels, *ctx.geometry)
    return ddy, dw, *(None,) * 9


def _wgrad_backward(ctx, g):
    """dW is linear in dy and in x: d(dy) = conv2d(x, g), dx as dgrad of dy and g."""
    dy, x, in_index, out_index = ctx.saved_tensors
    channels = [in_index, ctx.in_layout, out_index, ctx.out_layout]
    need_dy, need_x = ctx.needs_input_grad[:2]
    ddy = dx = None
    if need_dy:
        ddy = conv2d_channels(x, g, None, *channels, *ctx.geometry, "none")
    if need_x:
        dx = conv2d_channels_dgrad(dy, g, x.shape[2:], *channels, *ctx.geometry)
    return ddy, dx, *(None,) * 9


conv2d_channels_dgrad = define(
    f"conv2d_channels_dgrad(Tensor dy, Tensor w, {OPERANDS}) -> Tensor",
    _dgrad,
    _dgrad_fake,
    _gradient_save,
    _dgrad_backward,
)
conv2d_channels_wgrad = define(
    f"conv2d_channels_wgrad(Tensor dy, Tensor x, {OPERANDS}) -> Tensor",
    _wgrad,
    _wgrad_fake,
    _gradient_save,
    _wgrad_backward,
)
