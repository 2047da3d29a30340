"""conv2d_24 and its gradients against torch's, channels_last, with cudnn's own search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm import kernels
from slimgemm.benchmarks.by_name import Dispatched, Operands, named
from slimgemm.benchmarks.harness import Case, Implementation, Missing
from slimgemm.benchmarks.inputs import generator, image, normal, random_24_conv
from slimgemm.benchmarks.peers import Compiled, Peers
from slimgemm.benchmarks.shapes import Conv
from slimgemm.kernels.conv_layout import conv_matrix, convolution
from slimgemm.kernels.dispatch import implementation
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.reference import allowed_error, gather_24_ref, output_error
from slimgemm.kernels.timing import Call


class Given(NamedTuple):
    """One input set: x [images, in, side, side], w [out, in / groups, kernel, kernel] 2:4, dy."""

    x: Tensor
    w: Tensor
    bias: Tensor
    dy: Tensor


def flop_of(conv: Conv) -> int:
    """Multiplications and additions of the dense convolution."""
    pixels = conv.images * conv.out_image**2
    taps = conv.kernel**2 * (conv.channels_in // conv.groups)
    return 2 * pixels * conv.channels_out * taps


def sizes_of(conv: Conv) -> dict[str, int | float | str]:
    """The numbers of a convolution's shape."""
    return {
        "images": conv.images,
        "in": conv.channels_in,
        "out": conv.channels_out,
        "image": conv.image,
        "kernel": conv.kernel,
        "stride": conv.stride,
        "groups": conv.groups,
    }


def image_bytes(conv: Conv, dtype: torch.dtype, ins: int, outs: int) -> int:
    """Bytes of `ins` channels of the input and `outs` of the output."""
    pixels = ins * conv.image**2 + outs * conv.out_image**2
    return conv.images * pixels * dtype.itemsize


def conv_gradient(of: str, dy: Tensor, x: Tensor, w: Tensor, options: dict[str, Any]) -> Tensor:
    """dX or dW (`of`) of conv2d(x, w) for dy, as torch computes that one alone."""
    stride, padding, groups = options["stride"], options["padding"], options.get("groups", 1)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups,
        [of == "dX", of == "dW", False],
    )  # fmt: skip
    return dx if of == "dX" else dw


class Layer(NamedTuple):
    """One convolution with a packed weight, and where it runs."""

    conv: Conv
    dtype: torch.dtype
    device: torch.device
    peers: Peers

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the dense weight."""
        conv = self.conv
        return conv.channels_out, conv.channels_in // conv.groups, conv.kernel, conv.kernel

    @property
    def options(self) -> dict[str, Any]:
        """As torch.nn.functional.conv2d takes them."""
        conv = self.conv
        return {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}

    @property
    def bytes(self) -> tuple[int, int]:
        """(least bytes with a packed weight, with a dense one)."""
        conv, (out, per_group, *_) = self.conv, self.shape
        images = image_bytes(conv, self.dtype, conv.channels_in, conv.channels_out)
        taps = out * conv.kernel**2
        packed = images + taps * -(-per_group // 8) * (4 * self.dtype.itemsize + 1)
        return packed, images + taps * per_group * self.dtype.itemsize

    def inputs(self, seed: int) -> Given:
        """One input set."""
        conv, by = self.conv, generator(self.device, seed)
        x = image(conv.images, conv.channels_in, conv.image, self.dtype, by)
        w = random_24_conv(conv.channels_out, self.shape[1], conv.kernel, self.dtype, by)
        bias = normal(conv.channels_out, dtype=self.dtype, by=by)
        dy = image(conv.images, conv.channels_out, conv.out_image, self.dtype, by)
        return Given(x, w, bias, dy)

    def packed(self, g: Given) -> Packed24:
        """The packed weight; Missing where there is nothing to pack."""
        if self.shape[1] < 4:
            raise Missing(f"{self.shape[1]} channels a group: there is no group of four to halve")
        return kernels.pack_conv(g.w)

    def case(
        self,
        op: str,
        exact: Callable[[Given], Tensor],
        dense: Callable[[Given], Tensor],
        implementations: Sequence[Implementation],
    ) -> Case:
        """The case of this layer."""
        conv = self.conv
        reads = (conv.channels_in, 0) if op == "conv2d_24" else (0, conv.channels_out)
        return Case(
            op=op,
            layer=conv.name,
            sizes=sizes_of(conv),
            dtype=self.dtype,
            flop=flop_of(conv),
            inputs=self.inputs,
            exact=exact,
            dense=dense,
            implementations=implementations,
            input_bytes=image_bytes(conv, self.dtype, *reads),
        )


def conv2d_24(conv: Conv, dtype: torch.dtype, device: torch.device, peers: Peers) -> Case:
    """conv2d(x, w) + bias with a packed w."""
    layer = Layer(conv, dtype, device, peers)
    options, (packed_bytes, dense_bytes) = layer.options, layer.bytes
    geometry = (conv.stride, conv.padding, 1, conv.groups)

    def operands(g: Given) -> Operands:
        of = (convolution(layer.shape, *geometry),)
        pixels = conv.images * conv.out_image**2
        return Operands(g.x, layer.packed(g), pixels, of, (layer.shape, g.bias, *geometry))

    def dense(g: Given) -> Tensor:
        return F.conv2d(g.x, g.w, g.bias, **options)

    def contiguous(g: Given) -> Call:
        x, w = g.x.contiguous(), g.w.contiguous()
        return lambda: F.conv2d(x, w, g.bias, **options)

    ours = Dispatched(lambda *a: kernels.conv2d_24(*a), operands)
    fast = Compiled(lambda x, w, bias: F.conv2d(x, w, bias, **options), peers)
    return layer.case(
        "conv2d_24",
        lambda g: F.conv2d(g.x.double(), g.w.double(), g.bias.double(), **options),
        dense,
        (
            Implementation("slimgemm conv2d_24", ours, packed_bytes, note=ours.note),
            *named(operands, packed_bytes, convolution=True),
            Implementation("torch dense channels_last", lambda g: lambda: dense(g), dense_bytes),
            Implementation("torch dense contiguous", contiguous, dense_bytes),
            Implementation("torch dense compiled", lambda g: fast(g.x, g.w, g.bias), dense_bytes),
        ),
    )


def conv2d_24_dgrad(conv: Conv, dtype: torch.dtype, device: torch.device, peers: Peers) -> Case:
    """The gradient of conv2d(x, w) with respect to x."""
    layer = Layer(conv, dtype, device, peers)
    options, (packed_bytes, dense_bytes) = layer.options, layer.bytes

    def ours(g: Given) -> Call:
        packed, run = layer.packed(g), implementation("conv2d_24_dgrad", device)
        return lambda: run(g.dy, packed, layer.shape, g.x.shape, **options)

    def dx(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return conv_gradient("dX", dy, x, w, options)

    def dense(g: Given) -> Tensor:
        return dx(g.dy, g.x, g.w)

    fast = Compiled(dx, peers)

    return layer.case(
        "conv2d_24_dgrad",
        lambda g: dx(g.dy.double(), g.x.double(), g.w.double()),
        dense,
        (
            Implementation("slimgemm conv2d_24_dgrad", ours, packed_bytes),
            Implementation("torch dense channels_last", lambda g: lambda: dense(g), dense_bytes),
            Implementation("torch dense compiled", lambda g: fast(g.dy, g.x, g.w), dense_bytes),
        ),
    )


def conv2d_24_wgrad(conv: Conv, dtype: torch.dtype, device: torch.device, peers: Peers) -> Case:
    """The gradient with respect to the stored values of w; torch computes all of dW."""
    layer = Layer(conv, dtype, device, peers)
    options, (packed_bytes, dense_bytes) = layer.options, layer.bytes

    def ours(g: Given) -> Call:
        packed, run = layer.packed(g), implementation("conv2d_24_wgrad", device)
        return lambda: run(g.dy, g.x, packed, layer.shape, **options)

    def dw(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return conv_gradient("dW", dy, x, w, options)

    def full(g: Given, wide: bool = False) -> Tensor:
        return dw(*(t.double() if wide else t for t in (g.dy, g.x, g.w)))

    fast = Compiled(dw, peers)

    def kept(g: Given, gradient: Tensor) -> Tensor:
        return gather_24_ref(conv_matrix(gradient), kernels.pack_conv(g.w))

    def check_full(g: Given, got: Tensor) -> tuple[float, float]:
        exact = full(g, wide=True)
        return output_error(got, exact), allowed_error(full(g), exact)

    return layer.case(
        "conv2d_24_wgrad",
        lambda g: kept(g, full(g, wide=True)),
        lambda g: kept(g, full(g)),
        (
            Implementation("slimgemm conv2d_24_wgrad", ours, packed_bytes),
            Implementation(
                "torch dense channels_last", lambda g: lambda: full(g), dense_bytes,
                check=check_full,
            ),
            Implementation(
                "torch dense compiled", lambda g: fast(g.dy, g.x, g.w), dense_bytes,
                check=check_full,
            ),
        ),
    )  # fmt: skip
