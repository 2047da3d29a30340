"""What is built ahead of time: for every op, the launches of its shipped configurations.

Nothing about a kernel's signature is written here. A case calls the launcher itself on operands
that pass for GPU tensors, under a driver that compiles nothing and launches nothing; Triton's own
just-in-time path then says which kernel, constants, tile and specialisation (16-byte aligned
pointers, sizes that 16 divides, unit strides) the launch asks for. An op is added by one
function that yields (label, launch) and one row of OPS.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from slimgemm.kernels.build_conv import (
    conv2d_24,
    conv2d_24_wgrad,
    conv2d_channels,
    conv2d_channels_wgrad,
)
from slimgemm.kernels.build_gluon import (
    MMA_SP_ARCHS,
    conv2d_24_mma,
    conv2d_24_wgmma,
    pack_dense,
    scaled_spmm_24_mma_sp,
    scaled_spmm_24_wgmma_sp,
    spmm_24_mma_packed,
    spmm_24_mma_sp,
    spmm_24_wgmma_packed,
    spmm_24_wgmma_sp,
    unpack_dense,
)
from slimgemm.kernels.build_operands import (
    ALIGNED,
    NO_TENSOR_CORES,
    RAGGED,
    kept,
    launcher,
    operand,
    packed_operand,
    tile_label,
)
from slimgemm.kernels.configs import GEMM_CHANNELS_TILES, SPMM_24_TILES, Tile, spmm_tile
from slimgemm.kernels.device import matmul_precision
from slimgemm.kernels.formats import PATTERNS

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,  # products in full fp32
    "tf32": torch.float32,  # products of fp32 operands where torch.backends allows tf32
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
FLOAT_DTYPES = ("fp16", "bf16", "fp32", "tf32")
STORED_DTYPES = ("fp16", "bf16", "fp32")
SPARSE_DTYPES = ("fp16", "bf16")  # of the sparse tensor cores
SCALED_DTYPES = ("fp8", "int8")  # of the sparse tensor cores, with scales

# (architecture, dtype) -> why products of that dtype are not built for it.
UNSUPPORTED = {
    ("sm_75", "tf32"): "tf32 tensor cores begin with sm_80; use fp32",
    ("gfx950", "tf32"): "CDNA4 has no xf32 instructions; use fp32",
}

Launch = Callable[[], Any]
Cases = Callable[[torch.dtype, str], Iterator[tuple[str, Launch]]]


class Op(NamedTuple):
    """One op's builds.

    Args:
        cases: (dtype, architecture) -> (label, launch) of every shipped configuration.
        dtypes: keys of DTYPES that the op is built for.
        product: True if tensor cores do the work.
        archs: the only architectures that run it; empty for all.
        kernel: name of the one kernel of an op whose launcher asks the GPU what it is: its cases
            compile that kernel themselves and return it. Empty for all others.
    """

    cases: Cases
    dtypes: tuple[str, ...]
    product: bool
    archs: tuple[str, ...] = ()
    kernel: str = ""


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


def _scalar(dtype: torch.dtype, arch: str) -> bool:
    """True where the products of a linear layer have no tensor cores."""
    return arch in NO_TENSOR_CORES or (dtype == torch.float32 and matmul_precision(dtype) == "ieee")


def _spmm_tiles(dtype: torch.dtype, arch: str) -> list[Tile]:
    """Every tile that the launcher chooses."""
    found = (spmm_tile(t.m, dtype.itemsize, _scalar(dtype, arch)) for t in SPMM_24_TILES)
    return list(dict.fromkeys(found))


def _spmm_24(dtype: torch.dtype, arch: str):
    """Every tile with the heaviest epilogue, split over K, and on sizes that 16 does not divide."""
    spmm = launcher("spmm_24")

    def launch(tile: Tile, sizes: tuple[int, int, int], pattern=(2, 4), split=1) -> Launch:
        m, n, k = sizes
        b, s = operand(n, dtype=dtype), operand(n, dtype=dtype)
        x, w = operand(m, k, dtype=dtype), packed_operand(n, k, dtype, *pattern)
        return functools.partial(spmm, x, w, b, s, "gelu", tile=tile, split=split)

    tiles = _spmm_tiles(dtype, arch)
    for tile in tiles:
        yield tile_label(tile), launch(tile, ALIGNED)
        yield f"{tile_label(tile)} ragged", launch(tile, RAGGED)
    yield f"{tile_label(tiles[0])} split", launch(tiles[0], ALIGNED, split=4)
    yield f"{tile_label(tiles[0])} one row", launch(tiles[0], (1, *ALIGNED[1:]), split=4)
    for pattern in PATTERNS[1:]:
        label = f"{tile_label(tiles[0])} {pattern[0]}:{pattern[1]}"
        yield label, launch(tiles[0], ALIGNED, pattern)


def _spmm_24_dgrad(dtype: torch.dtype, arch: str):
    dgrad = launcher("spmm_24_dgrad")
    for tile, (m, n, k) in itertools.product(_spmm_tiles(dtype, arch), (ALIGNED, RAGGED)):
        dy, w = operand(m, n, dtype=dtype), packed_operand(n, k, dtype)
        label = tile_label(tile) + (" ragged" if n % 16 else "")
        yield label, functools.partial(dgrad, dy, w, tile=tile)


def _spmm_24_wgrad(dtype: torch.dtype, arch: str):
    wgrad = launcher("spmm_24_wgrad")
    for (m, n, k), split, label in (
        (ALIGNED, 1, "aligned"),
        (ALIGNED, 4, "split"),
        (RAGGED, 1, "ragged"),
    ):
        dy, x = operand(m, n, dtype=dtype), operand(m, k, dtype=dtype)
        yield label, functools.partial(wgrad, dy, x, packed_operand(n, k, dtype), split=split)


def _gemm_channels(dtype: torch.dtype, arch: str):
    """Every tile, each way to address channels, split over K, and the transposed weight of a dX."""
    gemm = launcher("gemm_channels")

    def launch(m: int, kind: str, split: int = 1, turned: bool = False) -> Launch:
        _, width_out, width_in = ALIGNED if m % 16 == 0 else RAGGED
        ins, outs = kept(kind, width_in), kept(kind, width_out)
        n, k = (width_out, width_in) if ins is None else (width_out // 2, width_in // 2)
        w = operand(k, n, dtype=dtype).t() if turned else operand(n, k, dtype=dtype)
        x, bias = operand(m, width_in, dtype=dtype), operand(n, dtype=dtype)
        return functools.partial(gemm, x, w, ins, outs, bias, "gelu", split=split)

    rows = [tile.m for tile in GEMM_CHANNELS_TILES]
    for m in rows:
        yield f"m {m} runs", launch(m, "runs")
        yield f"m {m - 1} ragged", launch(m - 1, "ragged")
    yield f"m {rows[-1]} all", launch(rows[-1], "all")
    yield f"m {rows[-1] - 1} odd", launch(rows[-1] - 1, "all")
    yield f"m {rows[-1]} dX", launch(rows[-1], "runs", turned=True)
    yield f"m {rows[0]} split", launch(rows[0], "runs", split=4)


def _gemm_channels_wgrad(dtype: torch.dtype, arch: str):
    wgrad = launcher("gemm_channels_wgrad")
    for kind, split in (("runs", 1), ("ragged", 1), ("runs", 4)):
        m, n, k = RAGGED if kind == "ragged" else ALIGNED
        dy, x = operand(m, n, dtype=dtype), operand(m, k, dtype=dtype)
        ins, outs = kept(kind, k), kept(kind, n)
        label = kind + (" split" if split > 1 else "")
        yield label, functools.partial(wgrad, dy, x, ins, outs, split=split)


OPS = {
    "pack_24": Op(_pack_24, STORED_DTYPES, False),
    "prune_24": Op(
        functools.partial(_pack_24, file="prune_24", name="prune_24"), STORED_DTYPES, False
    ),
    "prune_dense_24": Op(
        functools.partial(_pack_24, file="prune_24", name="prune_dense_24"), STORED_DTYPES, False
    ),
    "unpack_24": Op(_unpack_24, STORED_DTYPES, False),
    "spmm_24": Op(_spmm_24, FLOAT_DTYPES, True),
    "spmm_24_dgrad": Op(_spmm_24_dgrad, FLOAT_DTYPES, True),
    "spmm_24_wgrad": Op(_spmm_24_wgrad, FLOAT_DTYPES, True),
    "spmm_24_mma_sp": Op(spmm_24_mma_sp, SPARSE_DTYPES, True, MMA_SP_ARCHS, "_mma_sp_kernel"),
    "spmm_24_mma_packed": Op(
        spmm_24_mma_packed, SPARSE_DTYPES, True, MMA_SP_ARCHS, "_mma_packed_kernel"
    ),
    "conv2d_24_mma": Op(conv2d_24_mma, SPARSE_DTYPES, True, MMA_SP_ARCHS, "_mma_packed_kernel"),
    "scaled_spmm_24_mma_sp": Op(
        scaled_spmm_24_mma_sp, SCALED_DTYPES, True, MMA_SP_ARCHS, "_mma_sp_kernel"
    ),
    "scaled_spmm_24_wgmma_sp": Op(
        scaled_spmm_24_wgmma_sp, SCALED_DTYPES, True, ("sm_90",), "_wgmma_sp_kernel"
    ),
    "spmm_24_wgmma_sp": Op(spmm_24_wgmma_sp, SPARSE_DTYPES, True, ("sm_90",), "_wgmma_sp_kernel"),
    "conv2d_24_wgmma": Op(conv2d_24_wgmma, SPARSE_DTYPES, True, ("sm_90",), "_wgmma_sp_kernel"),
    "spmm_24_wgmma_packed": Op(
        spmm_24_wgmma_packed, SPARSE_DTYPES, True, ("sm_90",), "_wgmma_sp_kernel"
    ),
    **{
        f"{verb}_{order}": Op(
            functools.partial(cases, fragments=fragments),
            SPARSE_DTYPES + SCALED_DTYPES,
            False,
            archs,
            kernel,
        )
        for order, fragments, archs in (
            ("mma_sp", True, MMA_SP_ARCHS),
            ("wgmma_sp", False, ("sm_90",)),
        )
        for verb, cases, kernel in (
            ("pack_dense", pack_dense, "_pack_dense_kernel"),
            ("unpack", unpack_dense, "_unpack_dense_kernel"),
        )
    },
    "gemm_channels": Op(_gemm_channels, FLOAT_DTYPES, True),
    "gemm_channels_wgrad": Op(_gemm_channels_wgrad, FLOAT_DTYPES, True),
    "conv2d_24": Op(conv2d_24, FLOAT_DTYPES, True),
    "conv2d_24_dgrad": Op(functools.partial(conv2d_24, backward=True), FLOAT_DTYPES, True),
    "conv2d_24_wgrad": Op(conv2d_24_wgrad, FLOAT_DTYPES, True),
    "conv2d_channels": Op(conv2d_channels, FLOAT_DTYPES, True),
    "conv2d_channels_dgrad": Op(
        functools.partial(conv2d_channels, backward=True), FLOAT_DTYPES, True
    ),
    "conv2d_channels_wgrad": Op(conv2d_channels_wgrad, FLOAT_DTYPES, True),
}
