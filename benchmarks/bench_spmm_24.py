"""spmm_24, its gradients and its fused epilogue, against torch dense and semi-structured."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm import kernels
from slimgemm.benchmarks.by_name import Dispatched, Operands, named
from slimgemm.benchmarks.harness import Case, Implementation, Missing
from slimgemm.benchmarks.inputs import generator, normal, random_24
from slimgemm.benchmarks.peers import Compiled, Cusparselt, Peers, cutlass_linear, need_gpu
from slimgemm.kernels.reference import allowed_error, gather_24_ref, output_error
from slimgemm.kernels.timing import Call

ACT = "gelu"


class Given(NamedTuple):
    """One input set: x [m, k], dy [m, n] (no rows where unused), dense 2:4 w [n, k], two [n]."""

    x: Tensor
    dy: Tensor
    w: Tensor
    bias: Tensor
    scale: Tensor


class Product(NamedTuple):
    """One product of a linear layer [n, k] with m rows, and where it runs."""

    layer: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    peers: Peers

    @property
    def rows_bytes(self) -> int:
        """Bytes of x and y."""
        return self.m * (self.n + self.k) * self.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        """Least bytes of a dense product."""
        return self.rows_bytes + self.n * self.k * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Least bytes of a product with a packed weight: half its values, a byte for eight."""
        columns = -(-self.k // 8)
        return self.rows_bytes + self.n * columns * (4 * self.dtype.itemsize + 1)

    def inputs(self, gradient: bool) -> Callable[[int], Given]:
        """Seed -> an input set."""

        def make(seed: int) -> Given:
            by = generator(self.device, seed)
            x = normal(self.m, self.k, dtype=self.dtype, by=by)
            dy = normal(self.m if gradient else 0, self.n, dtype=self.dtype, by=by)
            w = random_24(self.n, self.k, self.dtype, by)
            bias, scale = (normal(self.n, dtype=self.dtype, by=by) for _ in range(2))
            return Given(x, dy, w, bias, scale)

        return make

    def case(
        self,
        op: str,
        exact: Callable[[Given], Tensor],
        dense: Callable[[Given], Tensor],
        implementations: Sequence[Implementation],
    ) -> Case:
        """The case of this product."""
        return Case(
            op=op,
            layer=self.layer,
            sizes={"m": self.m, "n": self.n, "k": self.k},
            dtype=self.dtype,
            flop=2 * self.m * self.n * self.k,
            inputs=self.inputs(gradient="grad" in op),
            exact=exact,
            dense=dense,
            implementations=implementations,
            input_bytes=self.packed_bytes - self.m * self.n * self.dtype.itemsize,
        )


def operands(g: Given) -> Operands:
    """The packed weight of an input set with its x."""
    return Operands(g.x, kernels.pack_24(g.w), g.x.shape[0])


# Kernel whose weight lies in the order of the hardware -> its file and launcher, and the function
# of orders.py that makes that order. They multiply what dispatch never keeps: a second copy.
ORDERED = {
    "mma_sp": ("mma_sp", "spmm_24_mma_sp", "to_mma_sp"),
    "wgmma_sp": ("wgmma_sp", "spmm_24_wgmma_sp", "to_wgmma_sp"),
}


def ordered(name: str, g: Given) -> Call:
    """A sparse tensor core kernel on a weight in the order of the hardware.

    Raises:
        Missing: no GPU, or the launcher refuses this GPU, dtype or shape.
    """
    need_gpu(g.w, name)
    file, function, order = ORDERED[name]
    run = getattr(importlib.import_module(f"slimgemm.kernels.gluon.{file}"), function)
    orders = importlib.import_module("slimgemm.kernels.gluon.orders")
    try:
        weight = getattr(orders, order)(kernels.pack_24(g.w))
        run(g.x, weight)
    except ValueError as why:
        raise Missing(str(why)) from None
    return lambda: run(g.x, weight)


def forward(p: Product) -> Case:
    """x @ w.T."""
    lt, fast = Cusparselt(), Compiled(F.linear, p.peers)
    ours = Dispatched(lambda *a: kernels.spmm_24(*a), operands)
    sparse, dense = p.packed_bytes, p.dense_bytes
    competitors = (
        Implementation("slimgemm spmm_24", ours, sparse, note=ours.note),
        *named(operands, sparse),
        *(
            Implementation(f"slimgemm {name} ordered", functools.partial(ordered, name), sparse)
            for name in ORDERED
        ),
        Implementation("torch dense", lambda g: lambda: F.linear(g.x, g.w), dense),
        Implementation("torch dense compiled", lambda g: fast(g.x, g.w), dense),
        Implementation(
            "torch cusparselt", lambda g: lt(g.x, g.w), sparse, lambda y: y[: p.m], note=lt.note
        ),
        Implementation("torch cutlass", lambda g: cutlass_linear(g.x, g.w), sparse),
    )
    exact = lambda g: g.x.double() @ g.w.double().t()  # noqa: E731
    return p.case("spmm_24", exact, lambda g: F.linear(g.x, g.w), competitors)


def untransposable(g: Given) -> Call:
    """Torch's semi-structured weight in a backward pass: Missing, always."""
    raise Missing("torch packs both directions only of masks of 4 x 4 tiles, not of row-wise 2:4")


def dgrad(p: Product) -> Case:
    """dy @ w."""
    fast = Compiled(torch.matmul, p.peers)

    def ours(g: Given) -> Call:
        packed = kernels.pack_24(g.w)
        return lambda: kernels.spmm_24_dgrad(g.dy, packed)

    competitors = (
        Implementation("slimgemm spmm_24_dgrad", ours, p.packed_bytes),
        Implementation("torch dense", lambda g: lambda: g.dy @ g.w, p.dense_bytes),
        Implementation("torch dense compiled", lambda g: fast(g.dy, g.w), p.dense_bytes),
        Implementation("torch cusparselt", untransposable, p.packed_bytes),
    )
    exact = lambda g: g.dy.double() @ g.w.double()  # noqa: E731
    return p.case("spmm_24_dgrad", exact, lambda g: g.dy @ g.w, competitors)


def full_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The dense dW [n, k]."""
    return dy.t() @ x


def check_full_gradient(g: Given, got: Tensor) -> tuple[float, float]:
    """The tolerance rule for the dense dW, which has more entries than the kept ones."""
    exact = full_gradient(g.dy.double(), g.x.double())
    return output_error(got, exact), allowed_error(full_gradient(g.dy, g.x), exact)


def wgrad(p: Product) -> Case:
    """dy.T @ x at the kept positions; a dense product computes all of them."""
    fast = Compiled(full_gradient, p.peers)

    def ours(g: Given) -> Call:
        packed = kernels.pack_24(g.w)
        return lambda: kernels.spmm_24_wgrad(g.dy, g.x, packed)

    def kept(g: Given, dw: Tensor) -> Tensor:
        return gather_24_ref(dw, kernels.pack_24(g.w))

    competitors = (
        Implementation("slimgemm spmm_24_wgrad", ours, p.packed_bytes),
        Implementation(
            "torch dense",
            lambda g: lambda: full_gradient(g.dy, g.x),
            p.dense_bytes,
            check=check_full_gradient,
        ),
        Implementation(
            "torch dense compiled",
            lambda g: fast(g.dy, g.x),
            p.dense_bytes,
            check=check_full_gradient,
        ),
    )
    return p.case(
        "spmm_24_wgrad",
        lambda g: kept(g, full_gradient(g.dy.double(), g.x.double())),
        lambda g: kept(g, full_gradient(g.dy, g.x)),
        competitors,
    )


def _behind(z: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(z * scale + bias)


def dense_epilogue(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """gelu((x @ w.T) * scale + bias) as torch ops."""
    return _behind(F.linear(x, w), scale, bias)


def epilogue(p: Product) -> Case:
    """gelu((x @ w.T) * scale + bias): inside the kernel, and as torch ops behind it."""
    fast = Compiled(dense_epilogue, p.peers)

    def fused(g: Given) -> Call:
        packed = kernels.pack_24(g.w)
        return lambda: kernels.spmm_24(g.x, packed, g.bias, g.scale, ACT)

    def unfused(g: Given) -> Call:
        packed = kernels.pack_24(g.w)
        return lambda: _behind(kernels.spmm_24(g.x, packed), g.scale, g.bias)

    def operands(g: Given) -> tuple[Tensor, ...]:
        return g.x, g.w, g.scale, g.bias

    # At least one more write and read of y than the fused form.
    again = 2 * p.m * p.n * p.dtype.itemsize
    competitors = (
        Implementation("slimgemm fused", fused, p.packed_bytes),
        Implementation("slimgemm unfused", unfused, p.packed_bytes + again),
        Implementation(
            "torch dense", lambda g: lambda: dense_epilogue(*operands(g)), p.dense_bytes + again
        ),
        Implementation("torch dense compiled", lambda g: fast(*operands(g)), p.dense_bytes),
    )
    return p.case(
        "spmm_24_epilogue",
        lambda g: dense_epilogue(*(t.double() for t in operands(g))),
        lambda g: dense_epilogue(*operands(g)),
        competitors,
    )
