"""conv2d_24 against torch's convolution, channels_last, with cudnn's own search."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm import kernels
from slimgemm.benchmarks.harness import Case, Implementation, Missing
from slimgemm.benchmarks.inputs import generator, image, normal, random_24_conv
from slimgemm.benchmarks.peers import Compiled, Peers
from slimgemm.benchmarks.shapes import Conv
from slimgemm.kernels.timing import Call


class Given(NamedTuple):
    """One input set: x [images, in, side, side] and w [out, in / groups, kernel, kernel] 2:4."""

    x: Tensor
    w: Tensor
    bias: Tensor


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


def conv2d_24(conv: Conv, dtype: torch.dtype, device: torch.device, peers: Peers) -> Case:
    """conv2d(x, w) + bias with a packed w."""
    per_group = conv.channels_in // conv.groups
    shape = (conv.channels_out, per_group, conv.kernel, conv.kernel)
    options: dict[str, Any] = {
        "stride": conv.stride, "padding": conv.padding, "groups": conv.groups,
    }  # fmt: skip

    def inputs(seed: int) -> Given:
        by = generator(device, seed)
        x = image(conv.images, conv.channels_in, conv.image, dtype, by)
        w = random_24_conv(conv.channels_out, per_group, conv.kernel, dtype, by)
        return Given(x, w, normal(conv.channels_out, dtype=dtype, by=by))

    def ours(g: Given) -> Call:
        if per_group < 4:
            raise Missing(f"{per_group} channels a group: there is no group of four to halve")
        packed = kernels.pack_conv(g.w)
        return lambda: kernels.conv2d_24(g.x, packed, shape, g.bias, **options)

    def dense(g: Given) -> Tensor:
        return F.conv2d(g.x, g.w, g.bias, **options)

    def contiguous(g: Given) -> Call:
        x, w = g.x.contiguous(), g.w.contiguous()
        return lambda: F.conv2d(x, w, g.bias, **options)

    fast = Compiled(lambda x, w, bias: F.conv2d(x, w, bias, **options), peers)
    images = image_bytes(conv, dtype, conv.channels_in, conv.channels_out)
    taps = conv.channels_out * conv.kernel**2
    packed_bytes = images + taps * -(-per_group // 8) * (4 * dtype.itemsize + 1)
    dense_bytes = images + taps * per_group * dtype.itemsize
    return Case(
        op="conv2d_24",
        layer=conv.name,
        sizes=sizes_of(conv),
        dtype=dtype,
        flop=flop_of(conv),
        inputs=inputs,
        exact=lambda g: F.conv2d(g.x.double(), g.w.double(), g.bias.double(), **options),
        dense=dense,
        implementations=(
            Implementation("slimgemm conv2d_24", ours, packed_bytes),
            Implementation("torch dense channels_last", lambda g: lambda: dense(g), dense_bytes),
            Implementation("torch dense contiguous", contiguous, dense_bytes),
            Implementation("torch dense compiled", lambda g: fast(g.x, g.w, g.bias), dense_bytes),
        ),
        input_bytes=image_bytes(conv, dtype, conv.channels_in, 0),
    )
