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

from slimgemm.kernels.build_gluon import (
    MMA_SP_ARCHS,
    pack_dense,
    spmm_24_mma_sp,
    spmm_24_wgmma_sp,
    unpack_dense,
)
from slimgemm.kernels.build_operands import (
    ALIGNED,
    CHANNELS,
    KERNEL,
    NO_TENSOR_CORES,
    RAGGED,
    image,
    kept,
    launcher,
    operand,
    packed_operand,
    tile_label,
    without_tensor_cores,
)
from slimgemm.kernels.configs import (
    SPMM_24_SCALAR_TILES,
    SPMM_24_TILES,
    SPMM_24_WGRAD_SCALAR_TILE,
    SPMM_24_WGRAD_TILE,
    Tile,
)
from slimgemm.kernels.formats import PATTERNS

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,  # products in full fp32
    "tf32": torch.float32,  # products of fp32 operands where torch.backends allows tf32
}
STORED_DTYPES = ("fp16", "bf16", "fp32")
SPARSE_DTYPES = ("fp16", "bf16")  # of the sparse tensor cores

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
    from slimgemm.kernels.device import matmul_precision, multiply_adds

    here = torch.device("cpu")  # what the launcher would learn of the GPU is known from `arch`
    return arch in NO_TENSOR_CORES or multiply_adds(dtype, matmul_precision(dtype), here)


def _spmm_24(dtype: torch.dtype, arch: str):
    """Every tile with the heaviest epilogue, split over K, and on sizes that 16 does not divide."""
    spmm = launcher("spmm_24")

    def launch(tile: Tile, sizes: tuple[int, int, int], pattern=(2, 4), split=1) -> Launch:
        m, n, k = sizes
        b, s = operand(n, dtype=dtype), operand(n, dtype=dtype)
        x, w = operand(m, k, dtype=dtype), packed_operand(n, k, dtype, *pattern)
        return functools.partial(spmm, x, w, b, s, "gelu", tile=tile, split=split)

    tiles = SPMM_24_SCALAR_TILES if _scalar(dtype, arch) else SPMM_24_TILES
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
    tiles = SPMM_24_SCALAR_TILES if _scalar(dtype, arch) else SPMM_24_TILES
    for tile, (m, n, k) in itertools.product(tiles, (ALIGNED, RAGGED)):
        dy, w = operand(m, n, dtype=dtype), packed_operand(n, k, dtype)
        label = tile_label(tile) + (" ragged" if n % 16 else "")
        yield label, functools.partial(dgrad, dy, w, tile=tile)


def _spmm_24_wgrad(dtype: torch.dtype, arch: str):
    wgrad = launcher("spmm_24_wgrad")
    tile = SPMM_24_WGRAD_SCALAR_TILE if _scalar(dtype, arch) else SPMM_24_WGRAD_TILE
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


def _gemm_channels(dtype: torch.dtype, arch: str):
    """Every tile, each way to address channels, split over K, and the transposed weight of a dX."""
    file = importlib.import_module("slimgemm.kernels.gemm_channels")
    _, width_out, width_in = ALIGNED

    def launch(m: int, kind: str, split: int = 1, turned: bool = False) -> Launch:
        ins, outs = kept(kind, width_in), kept(kind, width_out)
        n, k = (width_out, width_in) if ins is None else (width_out // 2, width_in // 2)
        w = operand(k, n, dtype=dtype).t() if turned else operand(n, k, dtype=dtype)
        x, bias = operand(m, width_in, dtype=dtype), operand(n, dtype=dtype)
        slow = operand(0, dtype=torch.float32), "ieee"
        tile = without_tensor_cores(
            arch, lambda: file.channels_tile(file.GEMM_CHANNELS_TILES, m, *slow)
        )
        return functools.partial(
            file.gemm_channels, x, w, ins, outs, bias, "gelu", tile=tile, split=split
        )

    rows = [tile.m for tile in file.GEMM_CHANNELS_TILES]
    for m in rows:
        yield f"m {m} runs", launch(m, "runs")
    for kind in ("all", "ragged"):
        yield f"m {rows[-1]} {kind}", launch(rows[-1], kind)
    yield f"m {rows[-1]} dX", launch(rows[-1], "runs", turned=True)
    yield f"m {rows[0]} split", launch(rows[0], "runs", split=4)


def _gemm_channels_wgrad(dtype: torch.dtype, arch: str):
    file = importlib.import_module("slimgemm.kernels.gemm_channels_wgrad")
    m, n, k = ALIGNED
    tile = without_tensor_cores(arch, lambda: file.GEMM_CHANNELS_WGRAD_TILES[True])
    for kind, split in (("runs", 1), ("ragged", 1), ("runs", 4)):
        dy, x = operand(m, n, dtype=dtype), operand(m, k, dtype=dtype)
        launch = functools.partial(
            file.gemm_channels_wgrad, dy, x, kept(kind, k), kept(kind, n), tile=tile, split=split
        )
        yield kind + (" split" if split > 1 else ""), launch


def _conv2d_channels(dtype: torch.dtype, arch: str, backward: bool = False):
    file = importlib.import_module("slimgemm.kernels.conv_channels")
    for m, kind, split in (
        *((tile.m, "runs", 1) for tile in file.CONV_CHANNELS_TILES),
        (file.CONV_CHANNELS_TILES[-1].m, "ragged", 1),
        (file.CONV_CHANNELS_TILES[0].m, "runs", 4),
    ):
        x, half = image(m, dtype), kept(kind, CHANNELS)
        w = operand(CHANNELS // 2, CHANNELS // 2, *KERNEL, dtype=dtype)
        slow = operand(0, dtype=torch.float32), "ieee"
        tile = without_tensor_cores(
            arch, functools.partial(file.channels_tile, file.CONV_CHANNELS_TILES, m, *slow)
        )
        options: dict[str, Any] = {"padding": 1, "tile": tile, "split": split}
        label = f"m {m} {kind}" + (" split" if split > 1 else "")
        if backward:
            size = tuple(x.shape[2:])
            dgrad = file.conv2d_channels_dgrad
            yield label, functools.partial(dgrad, x, w, size, half, half, **options)
        else:
            bias = operand(CHANNELS // 2, dtype=dtype)
            conv = file.conv2d_channels
            launch = functools.partial(conv, x, w, half, half, bias, act="gelu", **options)
            yield label, launch


def _conv2d_channels_wgrad(dtype: torch.dtype, arch: str):
    file = importlib.import_module("slimgemm.kernels.conv_channels_wgrad")
    tile = without_tensor_cores(arch, lambda: file.CONV_CHANNELS_WGRAD_TILES[True])
    for kind, split in (("runs", 1), ("ragged", 1), ("runs", 4)):
        dy, x, half = image(256, dtype), image(256, dtype), kept(kind, CHANNELS)
        launch = functools.partial(
            file.conv2d_channels_wgrad, dy, x, KERNEL, half, half,
            padding=1, tile=tile, split=split,
        )  # fmt: skip
        yield kind + (" split" if split > 1 else ""), launch


def _conv_24_tile(arch: str, choose: Callable[[bool], Tile]) -> Tile | None:
    """What the launcher of conv_24 chooses on `arch`, where its choice depends on the GPU."""
    scalar = arch in NO_TENSOR_CORES
    return choose(scalar) if scalar or not arch.startswith("sm_") else None


def _conv2d_24(dtype: torch.dtype, arch: str, backward: bool = False):
    """Every tile, narrow groups, and split over the sum."""
    file = importlib.import_module("slimgemm.kernels.conv_24")
    wide, narrow = file.CONV_24_TILES, file.CONV_24_NARROW_TILES
    for m, out, split in (
        *((tile.m, CHANNELS, 1) for tile in wide),
        *((tile.m, 16, 1) for tile in narrow),
        (wide[0].m, CHANNELS, 4),
    ):
        shape = (out, CHANNELS, *KERNEL)
        w = packed_operand(out, CHANNELS * KERNEL[0] * KERNEL[1], dtype)
        tile = _conv_24_tile(arch, functools.partial(file.conv_tile, m, out))
        options: dict[str, Any] = {"padding": 1, "tile": tile, "split": split}
        label = f"m {m} out {out}" + (" split" if split > 1 else "")
        if backward:
            dgrad = importlib.import_module("slimgemm.kernels.conv_24_grad").conv2d_24_dgrad
            dy, size = image(m, dtype, out), (1, CHANNELS, 4, m // 4)
            yield label, functools.partial(dgrad, dy, w, shape, size, **options)
        else:
            x, bias = image(m, dtype), operand(out, dtype=dtype)
            conv = file.conv2d_24
            yield label, functools.partial(conv, x, w, shape, bias, act="gelu", **options)


def _conv2d_24_wgrad(dtype: torch.dtype, arch: str):
    file = importlib.import_module("slimgemm.kernels.conv_24_grad")
    for out, split in ((CHANNELS, 1), (16, 1), (CHANNELS, 4)):
        dy, x = image(256, dtype, out), image(256, dtype)
        w = packed_operand(out, CHANNELS * KERNEL[0] * KERNEL[1], dtype)
        tile = _conv_24_tile(arch, functools.partial(file.conv_wgrad_tile, out))
        launch = functools.partial(
            file.conv2d_24_wgrad, dy, x, w, (out, CHANNELS, *KERNEL),
            padding=1, tile=tile, split=split,
        )  # fmt: skip
        yield f"out {out}" + (" split" if split > 1 else ""), launch


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
    "spmm_24_mma_sp": Op(spmm_24_mma_sp, SPARSE_DTYPES, True, MMA_SP_ARCHS, "_mma_sp_kernel"),
    "spmm_24_wgmma_sp": Op(spmm_24_wgmma_sp, SPARSE_DTYPES, True, ("sm_90",), "_wgmma_sp_kernel"),
    **{
        f"{verb}_{order}": Op(
            functools.partial(cases, fragments=fragments), SPARSE_DTYPES, False, archs, kernel
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
    "conv2d_24": Op(_conv2d_24, tuple(DTYPES), True),
    "conv2d_24_dgrad": Op(functools.partial(_conv2d_24, backward=True), tuple(DTYPES), True),
    "conv2d_24_wgrad": Op(_conv2d_24_wgrad, tuple(DTYPES), True),
    "gemm_channels": Op(_gemm_channels, tuple(DTYPES), True),
    "gemm_channels_wgrad": Op(_gemm_channels_wgrad, tuple(DTYPES), True),
    "conv2d_channels": Op(_conv2d_channels, tuple(DTYPES), True),
    "conv2d_channels_dgrad": Op(
        functools.partial(_conv2d_channels, backward=True), tuple(DTYPES), True
    ),
    "conv2d_channels_wgrad": Op(_conv2d_channels_wgrad, tuple(DTYPES), True),
}
