"""What is built ahead of time: for every op, the launches of its shipped configurations.

Nothing about a kernel's signature is written here. A case calls the launcher itself on operands
that pass for GPU tensors, under a driver that compiles nothing and launches nothing; Triton's own
just-in-time path then says which kernel, constants, tile and specialisation (16-byte aligned
pointers, sizes that 16 divides, unit strides) the launch asks for. An op is added by one
function that yields (label, launch) and one row of OPS.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgemm.kernels.configs import SPMM_24_TILES, SPMM_24_WGRAD_TILE, Tile
from slimgemm.kernels.formats import PATTERNS, Packed24, packed_shapes

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,  # products in full fp32
    "tf32": torch.float32,  # products of fp32 operands where torch.backends allows tf32
}
STORED_DTYPES = ("fp16", "bf16", "fp32")

# (architecture, dtype) -> why products of that dtype are not built for it.
UNSUPPORTED = {
    ("sm_75", "tf32"): "tf32 tensor cores begin with sm_80; use fp32",
    ("gfx950", "tf32"): "CDNA4 has no xf32 instructions; use fp32",
}

# Architectures on which Triton multiplies without tensor cores: correct, and slow.
NO_TENSOR_CORES = {"sm_75": "Triton 3.6 to 3.9 emit no Turing mma; tl.dot is multiply-adds"}

ALIGNED, RAGGED = (512, 512, 512), (77, 203, 331)  # M, N, K: 16 divides all of them, or none

Launch = Callable[[], Any]
Cases = Callable[[torch.dtype, str], Iterator[tuple[str, Launch]]]


class Op(NamedTuple):
    """One op's builds.

    Args:
        cases: (dtype, architecture) -> (label, launch) of every shipped configuration.
        dtypes: keys of DTYPES that the op is built for.
        product: True if tensor cores do the work.
        archs: the only architectures that run it; empty for all.
    """

    cases: Cases
    dtypes: tuple[str, ...]
    product: bool
    archs: tuple[str, ...] = ()


class Operand(Tensor):
    """A CPU tensor that a launcher takes for a GPU one. Its pointer is never read."""

    is_cuda = property(lambda self: True)


def operand(*shape: int, dtype: torch.dtype) -> Tensor:
    """An Operand of that shape; what a launcher derives from it is an Operand too."""
    return torch.zeros(*shape, dtype=dtype).as_subclass(Operand)


def packed_operand(n: int, k: int, dtype: torch.dtype, keep: int = 2, group: int = 4) -> Packed24:
    """A packed [n, k] weight of Operands."""
    values, meta = packed_shapes(n, k, keep, group)
    return Packed24(
        operand(*values, dtype=dtype), operand(*meta, dtype=torch.uint8), k, keep, group
    )


def launcher(file: str, name: str | None = None) -> Callable[..., Any]:
    """The launcher `name` (the file's own name unless given) of kernels/<file>.py."""
    return getattr(importlib.import_module(f"slimgemm.kernels.{file}"), name or file)


def tile_label(tile: Tile) -> str:
    """m x n x k, warps and stages."""
    return f"{tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages}"


def _pack_24(dtype: torch.dtype, arch: str, file: str = "pack_24", name: str = "pack_24"):
    _, n, k = ALIGNED
    for keep, group in PATTERNS:
        w = operand(n, k, dtype=dtype)
        yield f"{keep}:{group}", functools.partial(launcher(file, name), w, keep, group)
    ragged = operand(*RAGGED[1:], dtype=dtype)
    yield "2:4 ragged", functools.partial(launcher(file, name), ragged)


def _unpack_24(dtype: torch.dtype, arch: str):
    unpack = launcher("unpack_24")
    for keep, group in PATTERNS:
        packed = packed_operand(*ALIGNED[1:], dtype, keep, group)
        yield f"{keep}:{group}", functools.partial(unpack, packed)
    yield "2:4 ragged", functools.partial(unpack, packed_operand(*RAGGED[1:], dtype))


def _spmm_24(dtype: torch.dtype, arch: str):
    """Every tile with the heaviest epilogue, split over K, and on sizes that 16 does not divide."""
    spmm = launcher("spmm_24")

    def launch(tile: Tile, sizes: tuple[int, int, int], pattern=(2, 4), split=1) -> Launch:
        m, n, k = sizes
        b, s = operand(n, dtype=dtype), operand(n, dtype=dtype)
        x, w = operand(m, k, dtype=dtype), packed_operand(n, k, dtype, *pattern)
        return functools.partial(spmm, x, w, b, s, "gelu", tile=tile, split=split)

    for tile in SPMM_24_TILES:
        yield tile_label(tile), launch(tile, ALIGNED)
        yield f"{tile_label(tile)} ragged", launch(tile, RAGGED)
    yield f"{tile_label(SPMM_24_TILES[0])} split", launch(SPMM_24_TILES[0], ALIGNED, split=4)
    for pattern in PATTERNS[1:]:
        yield (
            f"{tile_label(SPMM_24_TILES[0])} {pattern[0]}:{pattern[1]}",
            launch(SPMM_24_TILES[0], ALIGNED, pattern),
        )


def _spmm_24_dgrad(dtype: torch.dtype, arch: str):
    dgrad = launcher("spmm_24_dgrad")
    for tile, (m, n, k) in itertools.product(SPMM_24_TILES, (ALIGNED, RAGGED)):
        dy, w = operand(m, n, dtype=dtype), packed_operand(n, k, dtype)
        label = tile_label(tile) + (" ragged" if n % 16 else "")
        yield label, functools.partial(dgrad, dy, w, tile=tile)


def _spmm_24_wgrad(dtype: torch.dtype, arch: str):
    wgrad, tile = launcher("spmm_24_wgrad"), SPMM_24_WGRAD_TILE
    for (m, n, k), split, suffix in (
        (ALIGNED, 1, ""),
        (ALIGNED, 4, " split"),
        (RAGGED, 1, " ragged"),
    ):
        dy, x = operand(m, n, dtype=dtype), operand(m, k, dtype=dtype)
        launch = functools.partial(
            wgrad, dy, x, packed_operand(n, k, dtype), tile=tile, split=split
        )
        yield tile_label(tile) + suffix, launch


OPS = {
    "pack_24": Op(_pack_24, STORED_DTYPES, False),
    "prune_24": Op(
        functools.partial(_pack_24, file="prune_24", name="prune_24"), STORED_DTYPES, False
    ),
    "prune_dense_24": Op(
        functools.partial(_pack_24, file="prune_24", name="prune_dense_24"), STORED_DTYPES, False
    ),
    "unpack_24": Op(_unpack_24, STORED_DTYPES, False),
    "spmm_24": Op(_spmm_24, tuple(DTYPES), True),
    "spmm_24_dgrad": Op(_spmm_24_dgrad, tuple(DTYPES), True),
    "spmm_24_wgrad": Op(_spmm_24_wgrad, tuple(DTYPES), True),
}
