"""pack_24 and prune_24 against torch's packing, with a copy of the dense weight as the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slimgemm import kernels
from slimgemm.benchmarks.harness import Case, Implementation, Missing
from slimgemm.benchmarks.inputs import generator, normal, random_24
from slimgemm.benchmarks.peers import check_pruned, need_gpu, torch_pack, torch_prune
from slimgemm.benchmarks.shapes import Linear
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.reference import prune_dense_24_ref
from slimgemm.kernels.timing import Call


def _dense(packed: Any) -> Tensor:
    return kernels.unpack_24(packed) if isinstance(packed, Packed24) else packed.to_dense()


def _hardware_order(name: str) -> Callable[[Tensor], Call]:
    """Packing to the order of mma_sp or wgmma_sp, from the dense weight."""

    def prepare(w: Tensor) -> Call:
        need_gpu(w, f"the order of {name}")
        from slimgemm.kernels.gluon import pack_dense

        mma = name == "mma_sp"
        to_order = pack_dense.pack_dense_mma_sp if mma else pack_dense.pack_dense_wgmma_sp
        try:
            to_order(w)
        except ValueError as why:  # the launcher refuses this dtype
            raise Missing(str(why)) from None
        return lambda: to_order(w)

    return prepare


def _order_of_packed(name: str) -> Callable[[Tensor], Call]:
    """Packing to the order of mma_sp or wgmma_sp, from the packed weight."""

    def prepare(w: Tensor) -> Call:
        need_gpu(w, f"the order of {name}")
        from slimgemm.kernels.gluon import pack

        to_order = pack.pack_mma_sp if name == "mma_sp" else pack.pack_wgmma_sp
        packed = kernels.pack_24(w)
        try:
            to_order(packed)
        except ValueError as why:
            raise Missing(str(why)) from None
        return lambda: to_order(packed)

    return prepare


def _from_order(name: str) -> Callable[[Any], Tensor]:
    def read(weight: Any) -> Tensor:
        from slimgemm.kernels.gluon import orders

        back = orders.from_mma_sp if name == "mma_sp" else orders.from_wgmma_sp
        return kernels.unpack_24(back(weight))

    return read


def _case(
    op: str,
    linear: Linear,
    dtype: torch.dtype,
    inputs: Callable[[int], Tensor],
    exact: Callable[[Tensor], Tensor],
    implementations: Sequence[Implementation],
) -> Case:
    return Case(
        op=op,
        layer=linear.name,
        sizes={"n": linear.n, "k": linear.k},
        dtype=dtype,
        flop=0,
        inputs=inputs,
        exact=exact,
        dense=None,  # data movement: equal, bit for bit
        implementations=implementations,
        input_bytes=linear.n * linear.k * dtype.itemsize,
    )


def _moved(linear: Linear, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of packing: dense in, packed out; bytes of a copy)."""
    dense = linear.n * linear.k * dtype.itemsize
    columns = -(-linear.k // 8)
    return dense + linear.n * columns * (4 * dtype.itemsize + 1), 2 * dense


def pack(linear: Linear, dtype: torch.dtype, device: torch.device) -> Case:
    """A weight that already is 2:4 -> packed."""
    packing, copying = _moved(linear, dtype)
    reordering = 2 * packing - copying  # the packed weight in and out

    def inputs(seed: int) -> Tensor:
        return random_24(linear.n, linear.k, dtype, generator(device, seed))

    competitors = [
        Implementation("slimgemm pack_24", lambda w: lambda: kernels.pack_24(w), packing, _dense),
        *(
            Implementation(
                f"slimgemm {name} order", _hardware_order(name), packing, _from_order(name)
            )
            for name in ("mma_sp", "wgmma_sp")
        ),
        *(
            Implementation(
                f"slimgemm {name} order from packed",
                _order_of_packed(name),
                reordering,
                _from_order(name),
            )
            for name in ("mma_sp", "wgmma_sp")
        ),
        Implementation("torch dense clone", lambda w: lambda: w.clone(), copying),
        *(
            Implementation(f"torch {name}", lambda w, b=name: torch_pack(w, b), packing, _dense)  # type: ignore[misc]
            for name in ("cusparselt", "cutlass")
        ),
    ]
    return _case("pack_24", linear, dtype, inputs, lambda w: w.double(), competitors)


def prune(linear: Linear, dtype: torch.dtype, device: torch.device) -> Case:
    """A dense weight -> the two largest of every four, packed."""
    packing, copying = _moved(linear, dtype)

    def inputs(seed: int) -> Tensor:
        return normal(linear.n, linear.k, dtype=dtype, by=generator(device, seed))

    def check_clone(w: Tensor, got: Tensor) -> tuple[float, float]:
        return float(not torch.equal(w, got)), 0.0

    competitors = [
        Implementation("slimgemm prune_24", lambda w: lambda: kernels.prune_24(w), packing, _dense),
        Implementation(
            "torch dense clone", lambda w: lambda: w.clone(), copying, check=check_clone
        ),
        *(
            Implementation(
                f"torch {name}",
                lambda w, b=name: torch_prune(w, b),  # type: ignore[misc]
                packing,
                _dense,
                check_pruned,
                note=lambda: "tiles of 4 x 4, both directions",
            )
            for name in ("cusparselt", "cutlass")
        ),
    ]
    exact = lambda w: prune_dense_24_ref(w).double()  # noqa: E731
    return _case("prune_24", linear, dtype, inputs, exact, competitors)
