"""Forward and backward of a linear layer, through autograd: dense against packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgemm import kernels
from slimgemm.benchmarks.bench_spmm_24 import Given, Product, full_gradient, untransposable
from slimgemm.benchmarks.harness import Case, Implementation
from slimgemm.benchmarks.peers import Compiled
from slimgemm.kernels.reference import allowed_error, gather_24_ref, output_error
from slimgemm.kernels.timing import Call
from slimgemm.sparse_ops import SparseLinear24

Gradients = tuple[Tensor, ...]  # of x and of the weight
PRODUCTS = 3  # y, dX and dW


def gradients(layer: Callable[[Tensor], Tensor], weight: Tensor, g: Given) -> Call:
    """A call that gives the gradients of x and of `weight`, a parameter of `layer`."""
    x = g.x.clone().requires_grad_()

    def call() -> Gradients:
        with torch.enable_grad():
            return torch.autograd.grad(layer(x), (x, weight), g.dy)

    return call


def linear(g: Given) -> nn.Linear:
    """A dense layer with the weight of an input set."""
    n, k = g.w.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(g.w.clone())
    return layer


def check(
    g: Given, dx: Tensor, dw: Tensor, kept: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """The tolerance rule for both gradients: that of the one that comes closest to its bound."""
    found = []
    for got, exact, dense in (
        (dx, g.dy.double() @ g.w.double(), g.dy @ g.w),
        (
            dw,
            kept(full_gradient(g.dy.double(), g.x.double())),
            kept(full_gradient(g.dy, g.x)),
        ),
    ):
        found.append((output_error(got, exact), allowed_error(dense, exact)))
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))


def check_dense(g: Given, got: Gradients) -> tuple[float, float]:
    """Of a dense layer, which has the gradient of every weight."""
    dx, dw = got
    return check(g, dx, dw, lambda gradient: gradient)


def check_packed(g: Given, got: Gradients) -> tuple[float, float]:
    """Of a packed layer, which has those of the stored values."""
    dx, dw = got
    return check(g, dx, dw, lambda gradient: gather_24_ref(gradient, kernels.pack_24(g.w)))


def step(p: Product) -> Case:
    """y = x @ w.T, then dX and dW for a given dy."""

    def ours(g: Given) -> Call:
        layer = SparseLinear24.from_dense(linear(g))
        return gradients(layer, layer.values, g)

    def dense(g: Given) -> Call:
        layer = linear(g)
        return gradients(layer, layer.weight, g)

    fast = Compiled(F.linear, p.peers)

    def dense_compiled(g: Given) -> Call:
        weight = g.w.clone().requires_grad_()
        fast(g.x, weight)  # compiles, or says that it must not
        return gradients(lambda x: fast(x, weight)(), weight, g)

    competitors = (
        Implementation(
            "slimgemm spmm_24_step", ours, PRODUCTS * p.packed_bytes, check=check_packed
        ),
        Implementation("torch dense", dense, PRODUCTS * p.dense_bytes, check=check_dense),
        Implementation(
            "torch dense compiled", dense_compiled, PRODUCTS * p.dense_bytes, check=check_dense
        ),
        Implementation("torch cusparselt", untransposable, PRODUCTS * p.packed_bytes),
    )
    exact = lambda g: g.dy.double() @ g.w.double()  # noqa: E731
    case = p.case("spmm_24_step", exact, lambda g: g.dy @ g.w, competitors)
    flop = PRODUCTS * case.flop
    return dataclasses.replace(case, inputs=p.inputs(gradient=True), flop=flop)
