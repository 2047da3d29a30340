"""gemm_channels and conv2d_channels: gather and scatter inside the kernel, against index_select.

Rates count the products of the layer before channels were dropped, as for every other op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm import kernels
from slimgemm.benchmarks.bench_conv import flop_of, image_bytes, sizes_of
from slimgemm.benchmarks.harness import Case, Implementation, Missing
from slimgemm.benchmarks.inputs import generator, image, kept_count, normal, random_index
from slimgemm.benchmarks.peers import Compiled, Peers
from slimgemm.benchmarks.shapes import Conv, Linear
from slimgemm.kernels.formats import ChannelIndex
from slimgemm.kernels.reference import output_error
from slimgemm.kernels.timing import Call

Op = Callable[[Tensor, Tensor], Tensor]


class Given(NamedTuple):
    """One input set: x over all channels, w over the kept ones, dense: w over all, 0 elsewhere."""

    x: Tensor
    w: Tensor
    ins: ChannelIndex
    outs: ChannelIndex
    dense: Tensor


def make(x: Tensor, indices: tuple[ChannelIndex, ChannelIndex], kernel: tuple[int, ...],
         by: torch.Generator) -> Given:  # fmt: skip
    """Random weights for the kept channels of `x`."""
    ins, outs = indices
    w = normal(outs.kept, ins.kept, *kernel, dtype=x.dtype, by=by)
    dense = w.new_zeros(outs.width, ins.width, *kernel)
    dense[outs.index[:, None], ins.index[None, :]] = w
    if kernel:
        w, dense = (t.contiguous(memory_format=torch.channels_last) for t in (w, dense))
    return Given(x, w, ins, outs, dense)


def selected(op: Op, dim: int) -> Callable[..., Tensor]:
    """`op` on the selected channels of x, its result put among zeros: what torch has for it."""

    def run(x: Tensor, w: Tensor, ins: Tensor, outs: Tensor, width: int) -> Tensor:
        y = op(x.index_select(dim, ins), w)
        shape = [*y.shape]
        shape[dim] = width
        return y.new_zeros(shape).index_copy_(dim, outs, y)

    return run


class Variant(NamedTuple):
    """What differs between the linear layer and the convolution."""

    op: str
    ours: Callable[[Given], Call]
    dense: Op
    dim: int


def _case(
    variant: Variant, layer: str, sizes: dict[str, Any], dtype: torch.dtype, flop: int,
    inputs: Callable[[int], Given], moved: tuple[int, int, int], peers: Peers,
) -> Case:  # fmt: skip
    """`moved`: least bytes of the kernel, of selecting beside it, and of the dense layer."""
    dense, by_index = variant.dense, selected(variant.dense, variant.dim)
    fast_dense, fast_index = Compiled(dense, peers), Compiled(by_index, peers)

    def operands(g: Given) -> tuple[Any, ...]:
        return g.x, g.w, g.ins.index, g.outs.index, g.outs.width

    def exact(g: Given) -> Tensor:
        return dense(g.x.double(), g.dense.double())

    def yardstick(g: Given) -> Tensor:
        """Of torch's two ways, zeros multiplied or left out, the one that errs more."""
        ways = by_index(*operands(g)), dense(g.x, g.dense)
        right = exact(g)
        return max(ways, key=lambda way: output_error(way, right))

    competitors = (
        Implementation(f"slimgemm {variant.op}", variant.ours, moved[0]),
        Implementation("torch index_select", lambda g: lambda: by_index(*operands(g)), moved[1]),
        Implementation("torch index_select compiled", lambda g: fast_index(*operands(g)), moved[0]),
        Implementation("torch dense", lambda g: lambda: dense(g.x, g.dense), moved[2]),
        Implementation("torch dense compiled", lambda g: fast_dense(g.x, g.dense), moved[2]),
    )
    return Case(
        op=variant.op,
        layer=layer,
        sizes=sizes,
        dtype=dtype,
        flop=flop,
        inputs=inputs,
        exact=exact,
        dense=yardstick,
        implementations=competitors,
        input_bytes=moved[0] // 2,
    )


def gemm_channels(
    linear: Linear, m: int, ratio: float, run: int,
    dtype: torch.dtype, device: torch.device, peers: Peers,
) -> Case:  # fmt: skip
    """A linear layer of which about `ratio` of both channels is kept, in runs of `run`."""
    n, k = linear.n, linear.k

    def inputs(seed: int) -> Given:
        by = generator(device, seed)
        indices = random_index(k, ratio, run, by), random_index(n, ratio, run, by)
        return make(normal(m, k, dtype=dtype, by=by), indices, (), by)

    def ours(g: Given) -> Call:
        return lambda: kernels.gemm_channels(g.x, g.w, g.ins, g.outs)

    kept = kept_count(k, ratio, run), kept_count(n, ratio, run)
    rows = m * dtype.itemsize
    least = rows * (kept[0] + n) + kept[0] * kept[1] * dtype.itemsize
    beside = least + rows * (2 * kept[0] + 2 * kept[1])
    sizes = {"m": m, "n": n, "k": k, "kept_n": kept[1], "kept_k": kept[0], "run": run}
    moved = (least, beside, rows * (n + k) + n * k * dtype.itemsize)
    variant = Variant("gemm_channels", ours, F.linear, -1)
    return _case(variant, linear.name, sizes, dtype, 2 * m * n * k, inputs, moved, peers)


def conv2d_channels(
    conv: Conv, ratio: float, run: int, dtype: torch.dtype, device: torch.device, peers: Peers
) -> Case:
    """A convolution of which about `ratio` of both channels is kept, in runs of `run`."""
    options: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding}
    groups = conv.groups

    def dense(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, **options)

    def inputs(seed: int) -> Given:
        by = generator(device, seed)
        indices = (
            random_index(conv.channels_in, ratio, run, by),
            random_index(conv.channels_out, ratio, run, by),
        )
        x = image(conv.images, conv.channels_in, conv.image, dtype, by)
        return make(x, indices, (conv.kernel, conv.kernel), by)

    def ours(g: Given) -> Call:
        return lambda: kernels.conv2d_channels(g.x, g.w, g.ins, g.outs, **options)

    if groups != 1:
        raise Missing(f"{conv.name} has {groups} groups: channels are benchmarked without groups")
    kept = tuple(kept_count(c, ratio, run) for c in (conv.channels_in, conv.channels_out))
    weights = conv.kernel**2 * dtype.itemsize
    least = image_bytes(conv, dtype, kept[0], conv.channels_out) + kept[0] * kept[1] * weights
    beside = least + image_bytes(conv, dtype, 2 * kept[0], 2 * kept[1])
    full = image_bytes(conv, dtype, conv.channels_in, conv.channels_out)
    full += conv.channels_in * conv.channels_out * weights
    sizes = {**sizes_of(conv), "kept_out": kept[1], "kept_in": kept[0], "run": run}
    moved = (least, beside, full)
    variant = Variant("conv2d_channels", ours, dense, 1)
    return _case(variant, conv.name, sizes, dtype, flop_of(conv), inputs, moved, peers)
