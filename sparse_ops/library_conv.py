"""The convolution operators that torch sees: slimgemm::conv2d_24 and its two gradients.

A packed weight crosses the operator boundary as its parts, values and meta; its k follows from
weight_shape. Padding is always (top, bottom, left, right). The three products close over each
other as those of a linear layer do (library.py), so backward of any order works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimgemm.kernels.conv_layout import (
    check_image,
    check_output_gradient,
    convolution,
    memory_format,
)
from slimgemm.kernels.dispatch import implementation
from slimgemm.kernels.formats import Packed24
from slimgemm.sparse_ops.library import act_backward, define

GEOMETRY = (
    "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
    "int keep, int group"
)


def _packed(values: Tensor, meta: Tensor, weight_shape: Sequence[int], pattern: Any) -> Packed24:
    return Packed24(values, meta, convolution(weight_shape).k, *pattern)


def images(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """New images [B, channels, *size] in the memory format of `like`."""
    shape = (like.shape[0], channels, *size)
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like)
    )


# ---- conv2d_24: act(conv2d(x, dense(w), bias))
def _conv(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None,
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, keep: int, group: int, act: str,
) -> Tensor:  # fmt: skip
    w = _packed(values, meta, weight_shape, (keep, group))
    return implementation("conv2d_24", x.device)(
        x, w, weight_shape, bias, stride, padding, dilation, groups, act
    )


def _conv_fake(x, values, meta, bias, weight_shape, stride, padding, dilation, groups, *_):
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_image("x", x, conv.channels * groups, values)
    return images(x, conv.out, conv.output_size(x.shape[2], x.shape[3]))


def _conv_save(ctx, inputs, output):
    x, values, meta, bias, *ctx.geometry, ctx.act = inputs
    ctx.save_for_backward(x, values, meta, bias)


def _conv_backward(ctx, dy):
    """dz = act'(z) dy; dx and dvalues as dgrad and wgrad of dz; db sums dz over the pixels.

    With an activation, z is computed again instead of being kept from the forward.
    """
    x, values, meta, bias = ctx.saved_tensors
    need_x, need_values, _, need_bias = ctx.needs_input_grad[:4]
    dz = dy
    if ctx.act != "none":
        z = conv2d_24(x, values, meta, bias, *ctx.geometry, "none")
        dz = act_backward(dy, z, ctx.act)
    dx = conv2d_24_dgrad(dz, values, meta, x.shape, *ctx.geometry) if need_x else None
    dv = conv2d_24_wgrad(dz, x, values, meta, *ctx.geometry) if need_values else None
    db = dz.sum((0, 2, 3)).to(bias.dtype) if need_bias else None
    return dx, dv, None, db, *(None,) * 8  # meta: positions, no gradient


conv2d_24 = define(
    f"conv2d_24(Tensor x, Tensor values, Tensor meta, Tensor? bias, {GEOMETRY}, str act) -> Tensor",
    _conv,
    _conv_fake,
    _conv_save,
    _conv_backward,
)


# ---- conv2d_24_dgrad: the gradient with respect to x
def _dgrad(
    dy: Tensor, values: Tensor, meta: Tensor, input_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, keep: int, group: int,
) -> Tensor:  # fmt: skip
    w = _packed(values, meta, weight_shape, (keep, group))
    return implementation("conv2d_24_dgrad", dy.device)(
        dy, w, weight_shape, input_shape, stride, padding, dilation, groups
    )


def _dgrad_fake(dy, values, meta, input_shape, weight_shape, stride, padding, dilation, groups, *_):
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_output_gradient(dy, input_shape, conv)
    return images(dy, conv.channels * groups, input_shape[2:])


def _dgrad_save(ctx, inputs, output):
    dy, values, meta, _, *ctx.geometry = inputs
    ctx.save_for_backward(dy, values, meta)


def _dgrad_backward(ctx, g):
    """dx is linear in dy and in the weight: d(dy) = conv2d(g, w), dvalues as wgrad of dy and g."""
    dy, values, meta = ctx.saved_tensors
    need_dy, need_values = ctx.needs_input_grad[:2]
    ddy = conv2d_24(g, values, meta, None, *ctx.geometry, "none") if need_dy else None
    dv = conv2d_24_wgrad(dy, g, values, meta, *ctx.geometry) if need_values else None
    return ddy, dv, *(None,) * 9


conv2d_24_dgrad = define(
    "conv2d_24_dgrad(Tensor dy, Tensor values, Tensor meta, SymInt[] input_shape, "
    f"{GEOMETRY}) -> Tensor",
    _dgrad,
    _dgrad_fake,
    _dgrad_save,
    _dgrad_backward,
)


# ---- conv2d_24_wgrad: the gradient with respect to the stored values
def _wgrad(
    dy: Tensor, x: Tensor, values: Tensor, meta: Tensor,
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, keep: int, group: int,
) -> Tensor:  # fmt: skip
    w = _packed(values, meta, weight_shape, (keep, group))
    return implementation("conv2d_24_wgrad", dy.device)(
        dy, x, w, weight_shape, stride, padding, dilation, groups
    )


def _wgrad_fake(dy, x, values, meta, weight_shape, stride, padding, dilation, groups, *_):
    conv = convolution(weight_shape, stride, padding, dilation, groups)
    check_image("x", x, conv.channels * groups, values)
    check_output_gradient(dy, x.shape, conv)
    return torch.empty_like(values)


def _wgrad_save(ctx, inputs, output):
    dy, x, _, meta, *ctx.geometry = inputs
    ctx.save_for_backward(dy, x, meta)


def _wgrad_backward(ctx, g):
    """With G the weight that packs g: d(dy) = conv2d(x, G), dx as dgrad of dy and G."""
    dy, x, meta = ctx.saved_tensors
    need_dy, need_x = ctx.needs_input_grad[:2]
    g = g.contiguous()
    ddy = conv2d_24(x, g, meta, None, *ctx.geometry, "none") if need_dy else None
    dx = conv2d_24_dgrad(dy, g, meta, x.shape, *ctx.geometry) if need_x else None
    return ddy, dx, *(None,) * 9  # values: only their shape was used


conv2d_24_wgrad = define(
    f"conv2d_24_wgrad(Tensor dy, Tensor x, Tensor values, Tensor meta, {GEOMETRY}) -> Tensor",
    _wgrad,
    _wgrad_fake,
    _wgrad_save,
    _wgrad_backward,
)
