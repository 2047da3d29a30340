"""scaled_spmm_24 in int8 and e4m3 against torch's dense products of 8 bits, cuSPARSELt, and bf16.

Operands are quantized before anything is timed; scales are one per token and one per out feature.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.benchmarks.bench_spmm_24 import ORDERED, Product
from slimgemm.benchmarks.harness import Case, Implementation, Missing
from slimgemm.benchmarks.inputs import generator, normal, random_24
from slimgemm.benchmarks.peers import (
    Compiled,
    Search,
    need_cusparselt,
    need_gpu,
    padded_rows,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.quantize_24 import quantize_24, quantize_rows
from slimgemm.kernels.reference import allowed_error, output_error
from slimgemm.kernels.timing import Call

EIGHT_BITS = (torch.float8_e4m3fn, torch.int8)
OUT = torch.bfloat16
INT_ROWS = 32  # torch._int_mm refuses 16 rows and fewer
SPARSE_ROWS = 16  # cuSPARSELt multiplies whole multiples


class Given(NamedTuple):
    """One input set: x [m, k] and w [n, k] 2:4 of 8 bits, their scales fp32 [m] and [n], packed."""

    x: Tensor
    w: Tensor
    scale_x: Tensor
    scale_w: Tensor
    packed: Packed24


def given(p: Product, seed: int) -> Given:
    """Random normal values, quantized row by row."""
    by = generator(p.device, seed)
    x, scale_x = quantize_rows(normal(p.m, p.k, dtype=torch.float32, by=by), p.dtype)
    dense = random_24(p.n, p.k, torch.float32, by)
    packed, scale_w = quantize_24(dense, p.dtype)
    return Given(x, quantize_rows(dense, p.dtype)[0], scale_x, scale_w, packed)


def ordered(name: str, g: Given) -> Call:
    """A scaled sparse tensor core kernel on a weight in the order of the hardware.

    Raises:
        Missing: no GPU, or the launcher refuses this GPU, dtype or shape.
    """
    need_gpu(g.x, name)
    scaled = importlib.import_module("slimgemm.kernels.gluon.scaled_spmm")
    orders = importlib.import_module("slimgemm.kernels.gluon.orders")
    run = getattr(scaled, f"scaled_spmm_24_{name}")
    try:
        weight = getattr(orders, ORDERED[name][2])(g.packed)
        run(g.x, weight, g.scale_x, g.scale_w, out_dtype=OUT)
    except ValueError as why:
        raise Missing(str(why)) from None
    return lambda: run(g.x, weight, g.scale_x, g.scale_w, out_dtype=OUT)


def dense_int8(x: Tensor, w: Tensor, scale_x: Tensor, scale_w: Tensor) -> Tensor:
    """(x @ w.T) * scale_x * scale_w, with int32 sums, as torch ops."""
    return (torch._int_mm(x, w.t()) * scale_x[:, None] * scale_w).to(OUT)


def dense_fp8(x: Tensor, w: Tensor, scale_x: Tensor, scale_w: Tensor, fast: bool = True) -> Tensor:
    """The same with torch._scaled_mm; `fast` sums stay in the tensor core's accumulator."""
    scales = scale_x[:, None], scale_w[None]
    return torch._scaled_mm(x, w.t(), *scales, out_dtype=OUT, use_fast_accum=fast)


def cusparselt(search: Search, g: Given) -> Call:
    """cuSPARSELt without the scales, which are multiplied outside of what is timed."""
    need_cusparselt(g.x)
    search.more = -g.x.shape[0] % SPARSE_ROWS
    x, packed = padded_rows(g.x, SPARSE_ROWS), torch._cslt_compress(g.w)

    def call(alg_id: int) -> Call:
        return lambda: torch._cslt_sparse_mm(
            packed, x.t(), out_dtype=OUT, transpose_result=True, alg_id=alg_id
        )

    return call(search.algorithm(call, x.device))


def bytes_of(p: Product) -> tuple[int, int, int]:
    """Least bytes: of a packed 8-bit weight, of a dense one, of dense operands in bf16."""
    scales, y = 4 * (p.m + p.n), p.m * p.n * OUT.itemsize
    packed = p.m * p.k + y + scales + p.n * -(-p.k // 8) * 5
    operands = (p.m + p.n) * p.k
    return packed, operands + y + scales, 2 * operands + y


def forward(p: Product) -> Case:
    """(x @ w.T) * scale_x * scale_w in bf16, from 8-bit operands; p.dtype is theirs."""
    search, (packed, full, wide_bytes) = Search(), bytes_of(p)
    integer = p.dtype == torch.int8
    product = dense_int8 if integer else dense_fp8
    fast = Compiled(product, p.peers)

    def operands(g: Given) -> tuple[Tensor, ...]:
        x, scale_x = g.x, g.scale_x
        if integer and p.m < INT_ROWS:
            x, scale_x = padded_rows(x, INT_ROWS), F.pad(scale_x, (0, INT_ROWS - p.m))
        return x, g.w, scale_x, g.scale_w

    def prepared(g: Given, run: Callable[..., Tensor] = product) -> Call:
        arguments = operands(g)
        return lambda: run(*arguments)

    def wide(g: Given) -> Call:
        x, w = g.x.to(OUT), g.w.to(OUT)
        return lambda: F.linear(x, w)

    def exact(g: Given) -> Tensor:
        sums = g.x.double() @ g.w.double().t()
        return sums * g.scale_x.double()[:, None] * g.scale_w.double()

    def yardstick(g: Given) -> Tensor:
        try:
            return product(*operands(g))[: p.m]
        except RuntimeError:  # torch's products of 8 bits refuse some shapes and GPUs
            return exact(g).to(OUT)

    def unscaled(g: Given, out: Tensor) -> tuple[float, float]:
        """The tolerance rule for products without their scales."""
        right = exact(g)
        got = out[: p.m].double() * g.scale_x[:, None] * g.scale_w
        return output_error(got, right), allowed_error(yardstick(g), right)

    rows = [
        *(
            Implementation(f"slimgemm {name} ordered", functools.partial(ordered, name), packed)
            for name in ORDERED
        ),
        Implementation("torch dense", prepared, full, lambda y: y[: p.m]),
        Implementation(
            "torch dense compiled", lambda g: fast(*operands(g)), full, lambda y: y[: p.m]
        ),
        Implementation("torch dense bf16, no scales", wide, wide_bytes, check=unscaled),
        Implementation(
            "torch cusparselt, no scales", functools.partial(cusparselt, search), packed,
            check=unscaled, note=search.note,
        ),
    ]  # fmt: skip
    if not integer:
        slow = functools.partial(dense_fp8, fast=False)
        rows.append(
            Implementation("torch dense, fp32 sums", functools.partial(prepared, run=slow), full)
        )
    return Case(
        op="scaled_spmm_24",
        layer=p.layer,
        sizes={"m": p.m, "n": p.n, "k": p.k},
        dtype=p.dtype,
        flop=2 * p.m * p.n * p.k,
        inputs=functools.partial(given, p),
        exact=exact,
        dense=yardstick,
        implementations=rows,
        input_bytes=packed - p.m * p.n * OUT.itemsize,
    )
