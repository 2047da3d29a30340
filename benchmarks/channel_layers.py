"""Layers with dropped channels as the benchmarks see them: sizes, inputs, and torch's products.

Rates count the products of the layer before channels were dropped, as for every other op.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.benchmarks.bench_conv import conv_gradient, flop_of, image_bytes, sizes_of
from slimgemm.benchmarks.harness import Missing
from slimgemm.benchmarks.inputs import generator, image, kept_count, normal, random_index
from slimgemm.benchmarks.shapes import Conv, Linear
from slimgemm.kernels.formats import ChannelIndex


class Given(NamedTuple):
    """One input set: x and dy over all channels, w over the kept ones, dense: w, 0 elsewhere."""

    x: Tensor
    w: Tensor
    ins: ChannelIndex
    outs: ChannelIndex
    dense: Tensor
    dy: Tensor


@dataclass(frozen=True)
class ChannelLayer(ABC):
    """A layer of which about `ratio` of both channels is kept, in runs of `run`."""

    name: str
    ratio: float
    run: int
    dtype: torch.dtype
    device: torch.device

    op = ""
    dim = -1  # the axis of channels

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """In and out channels of the dense layer."""

    @property
    def kept(self) -> tuple[int, int]:
        """Kept in and out channels."""
        ins, outs = (kept_count(width, self.ratio, self.run) for width in self.widths)
        return ins, outs

    @property
    @abstractmethod
    def channel_bytes(self) -> tuple[int, int]:
        """Bytes of one in channel of x and of one out channel of y."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Height and width of the weight, nothing of a linear layer's."""
        return ()

    def moved(self, reads_in: int, reads_out: int, pairs: tuple[int, int]) -> int:
        """Bytes of so many in and out channels, and of the weights of `pairs` of them."""
        ins, outs = self.channel_bytes
        weights = math.prod((*pairs, *self.taps)) * self.dtype.itemsize
        return reads_in * ins + reads_out * outs + weights

    @property
    def copied(self) -> int:
        """Bytes that selecting and putting back the kept channels moves beside the product."""
        return self.moved(2 * self.kept[0], 2 * self.kept[1], (0, 0))

    @property
    def dense_bytes(self) -> int:
        """Least bytes of the dense layer or of a gradient of it."""
        return self.moved(*self.widths, self.widths)

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """The numbers of the shape."""

    @property
    @abstractmethod
    def flop(self) -> int:
        """Of the dense layer."""

    @abstractmethod
    def operands(self, by: torch.Generator, gradient: bool) -> tuple[Tensor, Tensor]:
        """Random (x, dy); dy empty unless `gradient`."""

    def inputs(self, seed: int, gradient: bool = False) -> Given:
        """One input set."""
        by = generator(self.device, seed)
        ins, outs = (random_index(width, self.ratio, self.run, by) for width in self.widths)
        x, dy = self.operands(by, gradient)
        w = normal(outs.kept, ins.kept, *self.taps, dtype=self.dtype, by=by)
        dense = w.new_zeros(outs.width, ins.width, *self.taps)
        dense[outs.index[:, None], ins.index[None, :]] = w
        if self.taps:
            w, dense = (t.contiguous(memory_format=torch.channels_last) for t in (w, dense))
        return Given(x, w, ins, outs, dense, dy)

    @abstractmethod
    def product(self, x: Tensor, w: Tensor) -> Tensor:
        """The dense layer with the weight w."""

    @abstractmethod
    def dgrad(self, dy: Tensor, w: Tensor, x: Tensor) -> Tensor:
        """Its gradient with respect to x, of which only the shape is used."""

    @abstractmethod
    def wgrad(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Its gradient with respect to w, of which only the shape is used."""


@dataclass(frozen=True)
class GemmLayer(ChannelLayer):
    """A linear layer with m rows of x."""

    linear: Linear
    m: int

    op = "gemm_channels"

    @property
    def widths(self) -> tuple[int, int]:
        return self.linear.k, self.linear.n

    @property
    def channel_bytes(self) -> tuple[int, int]:
        return self.m * self.dtype.itemsize, self.m * self.dtype.itemsize

    @property
    def sizes(self) -> dict[str, Any]:
        (k, n), kept = self.widths, self.kept
        return {"m": self.m, "n": n, "k": k, "kept_n": kept[1], "kept_k": kept[0], "run": self.run}

    @property
    def flop(self) -> int:
        return 2 * self.m * self.linear.n * self.linear.k

    def operands(self, by: torch.Generator, gradient: bool) -> tuple[Tensor, Tensor]:
        x = normal(self.m, self.linear.k, dtype=self.dtype, by=by)
        return x, normal(self.m if gradient else 0, self.linear.n, dtype=self.dtype, by=by)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    def dgrad(self, dy: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return dy @ w

    def wgrad(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return dy.t() @ x


@dataclass(frozen=True)
class ConvLayer(ChannelLayer):
    """A convolution.

    Raises:
        Missing: it has groups.
    """

    conv: Conv

    op = "conv2d_channels"
    dim = 1

    def __post_init__(self) -> None:
        if self.conv.groups != 1:
            raise Missing(
                f"{self.conv.name} has {self.conv.groups} groups: channels are benchmarked without"
            )

    @property
    def options(self) -> dict[str, Any]:
        """As torch.nn.functional.conv2d takes them."""
        return {"stride": self.conv.stride, "padding": self.conv.padding}

    @property
    def widths(self) -> tuple[int, int]:
        return self.conv.channels_in, self.conv.channels_out

    @property
    def channel_bytes(self) -> tuple[int, int]:
        return image_bytes(self.conv, self.dtype, 1, 0), image_bytes(self.conv, self.dtype, 0, 1)

    @property
    def taps(self) -> tuple[int, ...]:
        return self.conv.kernel, self.conv.kernel

    @property
    def sizes(self) -> dict[str, Any]:
        kept = self.kept
        return {**sizes_of(self.conv), "kept_out": kept[1], "kept_in": kept[0], "run": self.run}

    @property
    def flop(self) -> int:
        return flop_of(self.conv)

    def operands(self, by: torch.Generator, gradient: bool) -> tuple[Tensor, Tensor]:
        conv = self.conv
        x = image(conv.images, conv.channels_in, conv.image, self.dtype, by)
        images = conv.images if gradient else 0
        return x, image(images, conv.channels_out, conv.out_image, self.dtype, by)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, **self.options)

    def dgrad(self, dy: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return conv_gradient("dX", dy, x, w, self.options)

    def wgrad(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return conv_gradient("dW", dy, x, w, self.options)
