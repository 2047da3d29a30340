"""Builds of the convolutions: every tile, aligned and ragged, narrow and few groups, strided dX."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from slimgemm.kernels.build_operands import image, kept, launcher, operand, packed_operand
from slimgemm.kernels.configs import (
    CONV_24_NARROW_TILES,
    CONV_24_TILES,
    CONV_CHANNELS_TILES,
    Tile,
)
from slimgemm.kernels.formats import ChannelIndex

KERNEL = (3, 3)  # with padding 1, which keeps the pixels but for the stride
Cases = Iterator[tuple[str, Callable[[], Any]]]


class ConvCase(NamedTuple):
    """A convolution to build; `size` in output pixels, channels of one group, kept ones.

    Args:
        kind: how build_operands.kept addresses the channels of a channel-pruned one.
        split: parts of the sum; None leaves it to the launcher.
    """

    label: str
    size: tuple[int, int]
    channels: int = 64
    out: int = 64
    groups: int = 1
    stride: int = 1
    split: int | None = 1
    kind: str = "runs"

    @property
    def input_size(self) -> tuple[int, int]:
        """Pixels of x."""
        return self.size[0] * self.stride, self.size[1] * self.stride

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launchers."""
        return {"stride": self.stride, "padding": 1, "groups": self.groups}


FEW = (
    ConvCase("depthwise", (8, 32), 1, 1, 128, split=None, kind="all"),
    ConvCase("groups of 4, stride 2", (8, 32), 4, 4, 32, 2, split=None, kind="ragged"),
    ConvCase("groups of 3 ragged", (7, 9), 3, 2, 7, split=None, kind="ragged"),
)
WGRADS = (
    ConvCase("aligned", (8, 32)),
    ConvCase("ragged", (7, 9), 75, 83, kind="ragged"),
    ConvCase("narrow", (8, 32), 16, 16),
    ConvCase("split", (8, 32), split=4),
    *FEW,
    ConvCase("depthwise split", (8, 32), 1, 1, 128, split=4, kind="all"),
)


def _products(tiles: tuple[Tile, ...], narrow: tuple[Tile, ...] = ()) -> Iterator[ConvCase]:
    """What the forward and dX are built for."""
    for tile in tiles:
        yield ConvCase(f"m {tile.m}", (4, tile.m // 4))
        yield ConvCase(f"m {tile.m - 1} ragged", (1, tile.m - 1), 75, 83, kind="ragged")
    for tile in narrow:
        yield ConvCase(f"m {tile.m} narrow", (4, tile.m // 4), 16, 16)
    yield ConvCase(f"m {tiles[-1].m - 1} odd", (1, tiles[-1].m - 1), 75, 83, kind="all")
    yield ConvCase(f"m {tiles[0].m} split", (4, tiles[0].m // 4), split=4)
    yield ConvCase(f"m {tiles[-1].m} stride 2", (4, tiles[-1].m // 4), stride=2)
    yield from FEW


def conv2d_24(dtype: torch.dtype, arch: str, backward: bool = False) -> Cases:
    """Every tile of conv2d_24, or of its dX."""
    conv = launcher("conv_24", "conv2d_24")
    dgrad = launcher("conv_24_grad", "conv2d_24_dgrad")
    for case in _products(CONV_24_TILES, CONV_24_NARROW_TILES):
        shape, w = _packed(case, dtype)
        options: dict[str, Any] = case.options | {"split": case.split}
        if backward:
            dy = image(shape[0], case.size, dtype)
            size = (1, case.channels * case.groups, *case.input_size)
            yield case.label, functools.partial(dgrad, dy, w, shape, size, **options)
        else:
            x = image(case.channels * case.groups, case.input_size, dtype)
            bias = operand(shape[0], dtype=dtype)
            launch = functools.partial(conv, x, w, shape, bias, act="gelu", **options)
            yield case.label, launch


def conv2d_24_wgrad(dtype: torch.dtype, arch: str) -> Cases:
    """Every tile of conv2d_24_wgrad."""
    wgrad = launcher("conv_24_grad", "conv2d_24_wgrad")
    for case in WGRADS:
        shape, w = _packed(case, dtype)
        dy = image(shape[0], case.size, dtype)
        x = image(case.channels * case.groups, case.input_size, dtype)
        options: dict[str, Any] = case.options | {"split": case.split}
        yield case.label, functools.partial(wgrad, dy, x, w, shape, **options)


def _packed(case: ConvCase, dtype: torch.dtype) -> tuple[tuple[int, ...], Any]:
    """(shape of the dense weight, packed weight)."""
    out, bytes_a_tap = case.out * case.groups, -(-case.channels // 8)
    w = packed_operand(out, KERNEL[0] * KERNEL[1] * bytes_a_tap * 8, dtype)
    return (out, case.channels, *KERNEL), w


def _kept(case: ConvCase) -> tuple[tuple[int, int], tuple[ChannelIndex | None, ...]]:
    """((in, out) widths, (in, out) indices): half of the channels are kept, unless all are."""
    half = 1 if case.kind == "all" else 2
    widths = half * case.channels * case.groups, half * case.out * case.groups
    return widths, tuple(kept(case.kind, width) for width in widths)


def conv2d_channels(dtype: torch.dtype, arch: str, backward: bool = False) -> Cases:
    """Every tile of conv2d_channels, or of its dX."""
    conv = launcher("conv_channels", "conv2d_channels")
    dgrad = launcher("conv_channels", "conv2d_channels_dgrad")
    for case in _products(CONV_CHANNELS_TILES):
        widths, indices = _kept(case)
        out = case.out * case.groups
        w = operand(out, case.channels, *KERNEL, dtype=dtype)
        options: dict[str, Any] = case.options | {"split": case.split}
        if backward:
            dy = image(widths[1], case.size, dtype)
            size = case.input_size
            yield case.label, functools.partial(dgrad, dy, w, size, *indices, **options)
        else:
            x, bias = image(widths[0], case.input_size, dtype), operand(out, dtype=dtype)
            launch = functools.partial(conv, x, w, *indices, bias, act="gelu", **options)
            yield case.label, launch


def conv2d_channels_wgrad(dtype: torch.dtype, arch: str) -> Cases:
    """Every tile of conv2d_channels_wgrad."""
    wgrad = launcher("conv_channels_wgrad", "conv2d_channels_wgrad")
    for case in itertools.filterfalse(lambda case: case.label == "narrow", WGRADS):
        widths, indices = _kept(case)
        dy, x = image(widths[1], case.size, dtype), image(widths[0], case.input_size, dtype)
        options: dict[str, Any] = case.options | {"split": case.split}
        yield case.label, functools.partial(wgrad, dy, x, KERNEL, *indices, **options)
