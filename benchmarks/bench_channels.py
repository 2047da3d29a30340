"""gemm_channels, conv2d_channels and their gradients, gather and scatter inside the kernel.

Against index_select beside torch's product, and against the dense layer with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from slimgemm import kernels
from slimgemm.benchmarks.channel_layers import ChannelLayer, ConvLayer, Given
from slimgemm.benchmarks.harness import Case, Implementation
from slimgemm.benchmarks.peers import Compiled, Peers
from slimgemm.kernels.dispatch import implementation
from slimgemm.kernels.reference import allowed_error, output_error
from slimgemm.kernels.timing import Call

Ways = tuple[Callable[[Given], Tensor], Callable[[Given], Tensor]]


def put(y: Tensor, dim: int, index: Tensor, width: int) -> Tensor:
    """`y` among zeros: its channels at `index` of `width`."""
    shape = [*y.shape]
    shape[dim] = width
    return y.new_zeros(shape).index_copy_(dim, index, y)


def _case(
    layer: ChannelLayer, op: str, ours: Callable[[Given], Call], least: int, ways: Ways,
    implementations: list[Implementation],
) -> Case:  # fmt: skip
    """The case of `op`.

    Args:
        least: bytes that the kernel moves at least.
        ways: input set -> the exact result, from the dense one in float64; torch's result of which
            the error is the yardstick.
    """
    gradient = "grad" in op
    return Case(
        op=op,
        layer=layer.name,
        sizes=layer.sizes,
        dtype=layer.dtype,
        flop=layer.flop,
        inputs=lambda seed: layer.inputs(seed, gradient),
        exact=ways[0],
        dense=ways[1],
        implementations=[Implementation(f"slimgemm {op}", ours, least), *implementations],
        input_bytes=least // 2,
    )


def _worst(exact: Callable[[Given], Tensor], *ways: Callable[[Given], Tensor]) -> Any:
    """Of torch's ways (zeros multiplied, or left out) the one that errs more."""

    def yardstick(g: Given) -> Tensor:
        right = exact(g)
        return max((way(g) for way in ways), key=lambda result: output_error(result, right))

    return yardstick


def forward(layer: ChannelLayer, peers: Peers) -> Case:
    """y[out] = x[in] @ w.T, or the convolution of the kept channels, zeros elsewhere."""
    dim = layer.dim

    def by_index(x: Tensor, w: Tensor, ins: Tensor, outs: Tensor, width: int) -> Tensor:
        return put(layer.product(x.index_select(dim, ins), w), dim, outs, width)

    def operands(g: Given) -> tuple[Any, ...]:
        return g.x, g.w, g.ins.index, g.outs.index, g.outs.width

    def ours(g: Given) -> Call:
        if isinstance(layer, ConvLayer):
            options = layer.options
            return lambda: kernels.conv2d_channels(g.x, g.w, g.ins, g.outs, None, **options)
        return lambda: kernels.gemm_channels(g.x, g.w, g.ins, g.outs)

    def exact(g: Given) -> Tensor:
        return layer.product(g.x.double(), g.dense.double())

    def dense(g: Given) -> Tensor:
        return layer.product(g.x, g.dense)

    fast_dense, fast_index = Compiled(layer.product, peers), Compiled(by_index, peers)
    least = layer.moved(layer.kept[0], layer.widths[1], layer.kept)
    others = [
        Implementation(
            "torch index_select", lambda g: lambda: by_index(*operands(g)), least + layer.copied
        ),
        Implementation("torch index_select compiled", lambda g: fast_index(*operands(g)), least),
        Implementation("torch dense", lambda g: lambda: dense(g), layer.dense_bytes),
        Implementation(
            "torch dense compiled", lambda g: fast_dense(g.x, g.dense), layer.dense_bytes
        ),
    ]
    yardstick = _worst(exact, lambda g: by_index(*operands(g)), dense)
    return _case(layer, layer.op, ours, least, (exact, yardstick), others)


def dgrad(layer: ChannelLayer, peers: Peers) -> Case:
    """dx[in] = dy[out] @ w, zeros elsewhere; of a convolution its transpose."""
    dim = layer.dim

    def by_index(dy: Tensor, w: Tensor, x: Tensor, ins: Tensor, outs: Tensor, width: int) -> Tensor:
        # Of x only the shape is used.
        dx = layer.dgrad(dy.index_select(dim, outs), w, x.narrow(dim, 0, ins.numel()))
        return put(dx, dim, ins, width)

    def operands(g: Given) -> tuple[Any, ...]:
        return g.dy, g.w, g.x, g.ins.index, g.outs.index, g.ins.width

    def ours(g: Given) -> Call:
        if isinstance(layer, ConvLayer):
            run, options = implementation("conv2d_channels_dgrad", layer.device), layer.options
            return lambda: run(g.dy, g.w, tuple(g.x.shape[2:]), g.ins, g.outs, **options)
        return lambda: kernels.gemm_channels(g.dy, g.w.t(), g.outs, g.ins)

    def exact(g: Given) -> Tensor:
        return layer.dgrad(g.dy.double(), g.dense.double(), g.x.double())

    def dense(g: Given) -> Tensor:
        return layer.dgrad(g.dy, g.dense, g.x)

    fast_dense, fast_index = Compiled(layer.dgrad, peers), Compiled(by_index, peers)
    least = layer.moved(layer.widths[0], layer.kept[1], layer.kept)
    others = [
        Implementation(
            "torch index_select", lambda g: lambda: by_index(*operands(g)), least + layer.copied
        ),
        Implementation("torch index_select compiled", lambda g: fast_index(*operands(g)), least),
        Implementation("torch dense", lambda g: lambda: dense(g), layer.dense_bytes),
        Implementation(
            "torch dense compiled", lambda g: fast_dense(g.dy, g.dense, g.x), layer.dense_bytes
        ),
    ]
    yardstick = _worst(exact, lambda g: by_index(*operands(g)), dense)
    return _case(layer, f"{layer.op}_dgrad", ours, least, (exact, yardstick), others)


def wgrad(layer: ChannelLayer, peers: Peers) -> Case:
    """dy[out].T @ x[in]; the dense layer computes the gradient of every weight."""
    dim = layer.dim

    def by_index(dy: Tensor, x: Tensor, w: Tensor, ins: Tensor, outs: Tensor) -> Tensor:
        return layer.wgrad(dy.index_select(dim, outs), x.index_select(dim, ins), w)

    def operands(g: Given) -> tuple[Tensor, ...]:
        return g.dy, g.x, g.w, g.ins.index, g.outs.index

    def ours(g: Given) -> Call:
        run = implementation(f"{layer.op}_wgrad", layer.device)
        if isinstance(layer, ConvLayer):
            kernel, options = tuple(g.w.shape[2:]), layer.options
            return lambda: run(g.dy, g.x, kernel, g.ins, g.outs, **options)
        return lambda: run(g.dy, g.x, g.ins, g.outs)

    def full(g: Given) -> Tensor:
        return layer.wgrad(g.dy.double(), g.x.double(), g.dense.double())

    def exact(g: Given) -> Tensor:
        return full(g)[g.outs.index[:, None], g.ins.index[None, :]]

    def check_full(g: Given, got: Tensor) -> tuple[float, float]:
        right = full(g)
        return output_error(got, right), allowed_error(layer.wgrad(g.dy, g.x, g.dense), right)

    fast_dense, fast_index = Compiled(layer.wgrad, peers), Compiled(by_index, peers)
    least = layer.moved(*layer.kept, layer.kept)
    others = [
        Implementation(
            "torch index_select", lambda g: lambda: by_index(*operands(g)), least + layer.copied
        ),
        Implementation("torch index_select compiled", lambda g: fast_index(*operands(g)), least),
        Implementation(
            "torch dense", lambda g: lambda: layer.wgrad(g.dy, g.x, g.dense), layer.dense_bytes,
            check=check_full,
        ),
        Implementation(
            "torch dense compiled", lambda g: fast_dense(g.dy, g.x, g.dense), layer.dense_bytes,
            check=check_full,
        ),
    ]  # fmt: skip
    ways = exact, lambda g: by_index(*operands(g))
    return _case(layer, f"{layer.op}_wgrad", ours, least, ways, others)
