"""Packed formats and the kernels that read them; each op runs on GPU (Triton) and CPU (torch).

The ops have the names of their files; `from slimgemm.kernels.spmm_24 import spmm_24` is the
Triton launcher itself, `slimgemm.kernels.spmm_24` picks by the device of its first operand.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence

from torch import Tensor

from slimgemm.kernels.dispatch import implementation
from slimgemm.kernels.formats import ChannelIndex, Packed24, channel_index, check

__all__ = [
    "ChannelIndex",
    "Packed24",
    "channel_index",
    "check",
    "conv2d_24",
    "conv2d_channels",
    "gemm_channels",
    "pack_24",
    "pack_conv",
    "prune_24",
    "prune_dense_24",
    "spmm_24",
    "spmm_24_dgrad",
    "spmm_24_wgrad",
    "unpack_24",
    "unpack_conv",
]


def pack_24(w: Tensor, keep: int = 2, group: int = 4) -> Packed24:
    """Pack a weight [N, K] that is keep:group along K; refuses any other. See pack_24.py."""
    return implementation("pack_24", w.device)(w, keep, group)


def unpack_24(packed: Packed24) -> Tensor:
    """Dense [N, k] of a packed weight, exactly. See unpack_24.py."""
    return implementation("unpack_24", packed.values.device)(packed)


def prune_24(w: Tensor, keep: int = 2, group: int = 4) -> Packed24:
    """Keep the `keep` largest |w| of every `group` of [N, K], packed. See prune_24.py."""
    return implementation("prune_24", w.device)(w, keep, group)


def prune_dense_24(w: Tensor, keep: int = 2, group: int = 4) -> Tensor:
    """As prune_24, but dense [N, K] with zeros. See prune_24.py."""
    return implementation("prune_dense_24", w.device)(w, keep, group)


def spmm_24(
    x: Tensor,
    w: Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """act((x @ dense(w).T) * scale + bias), x [..., k] -> [..., N]. See spmm_24.py."""
    return implementation("spmm_24", x.device)(x, w, bias, scale, act)


def spmm_24_dgrad(dy: Tensor, w: Packed24) -> Tensor:
    """dy [..., N] @ dense(w) -> [..., k]. See spmm_24_dgrad.py."""
    return implementation("spmm_24_dgrad", dy.device)(dy, w)


def spmm_24_wgrad(dy: Tensor, x: Tensor, w: Packed24) -> Tensor:
    """dy.T @ x at the kept positions of `w`: [N, stored]. See spmm_24_wgrad.py."""
    return implementation("spmm_24_wgrad", dy.device)(dy, x, w)


def pack_conv(w: Tensor, keep: int = 2, group: int = 4) -> Packed24:
    """Pack [O, C, kh, kw] that is keep:group along C at each tap. See pack_conv.py."""
    return implementation("pack_conv", w.device)(w, keep, group)


def unpack_conv(packed: Packed24, weight_shape: Sequence[int]) -> Tensor:
    """Dense [O, C, kh, kw] of a packed convolution weight, exactly. See pack_conv.py."""
    return implementation("unpack_conv", packed.values.device)(packed, weight_shape)


def conv2d_24(
    x: Tensor,
    w: Packed24,
    weight_shape: Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
) -> Tensor:
    """act(conv2d(x, w) + bias) with a weight of `pack_conv`. See conv_24.py."""
    options = (bias, stride, padding, dilation, groups, act)
    return implementation("conv2d_24", x.device)(x, w, weight_shape, *options)


def gemm_channels(
    x: Tensor,
    w: Tensor,
    in_index: ChannelIndex | None = None,
    out_index: ChannelIndex | None = None,
    bias: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """y[..., out] = act(x[..., in] @ w.T + bias), zeros elsewhere. See gemm_channels.py."""
    return implementation("gemm_channels", x.device)(x, w, in_index, out_index, bias, act)


def conv2d_channels(
    x: Tensor,
    w: Tensor,
    in_index: ChannelIndex | None = None,
    out_index: ChannelIndex | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
) -> Tensor:
    """y[:, out] = act(conv2d(x[:, in], w) + bias), zeros elsewhere. See conv_channels.py."""
    options = (in_index, out_index, bias, stride, padding, dilation, groups, act)
    return implementation("conv2d_channels", x.device)(x, w, *options)


class _Kernels(types.ModuleType):
    """Keeps an op's name for the function when the submodule of the same name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in __all__ and isinstance(value, types.ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kernels
