"""Tiles of the portable kernels; `slimgemm kernels` builds every one for every architecture.

Every row here was chosen so that it fits shared memory and registers of each architecture;
none has been tuned on a GPU yet. `slimgemm tune` and the recorded files in benchmarks/results
are what a measured row needs.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A tile of a matrix product: [m, k] x [k, n] per step, `k` counted in dense columns."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3


# Bytes of shared memory that one program may use, by architecture.
SMEM_BYTES = {
    "sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10,
    "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10,
    "gfx942": 64 << 10, "gfx950": 160 << 10,
}  # fmt: skip

PACK_24_TILE = (8, 32)  # rows, bytes of meta: 2048 weights a program
UNPACK_24_TILE = (8, 256)  # rows, dense columns

# Rows of x or dy -> tile, see `tile_for`. What a launcher owns and what it walks differs by op; its
# docstring says which.
SPMM_24_TILES = (
    Tile(16, 64, 64, 4, 4),
    Tile(32, 64, 64),
    Tile(64, 64, 64, 8),
    Tile(128, 64, 32, 8),
)
CONV_24_TILES = (Tile(16, 32, 64), Tile(64, 64, 32), Tile(128, 64, 32, 8))
# For at most 16 columns, where a wider tile would multiply columns that do not exist.
CONV_24_NARROW_TILES = (Tile(16, 16, 64), Tile(128, 16, 32))
GEMM_CHANNELS_TILES = (
    Tile(16, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(128, 128, 32, 8, 4),  # with 3 stages the compiler for gfx950 fails
)
# Where 16 does not divide the channels, or they are no runs, each element has its own address:
# the steps above spill (312 to 1840 bytes on sm_80).
GEMM_CHANNELS_RAGGED_TILES = (
    Tile(16, 64, 64, 4, 4),
    Tile(32, 64, 64, 8),
    Tile(64, 64, 64, 8),
    Tile(128, 64, 32, 8),
)
# An address for each element of a gathered tap: a tile of 128 x 64 spills (352 bytes in tf32).
CONV_CHANNELS_TILES = (Tile(16, 64, 64, 4, 4), Tile(64, 64, 32, 8))

# Weight gradients walk m, and own n x k.
SPMM_24_WGRAD_TILE = Tile(32, 64, 64, 8)
CONV_24_WGRAD_TILE = Tile(32, 64, 64, 8)
CONV_24_NARROW_WGRAD_TILE = Tile(64, 16, 64)
# In tf32 32 ragged rows spill on sm_80 (24 bytes).
GEMM_CHANNELS_WGRAD_TILE, GEMM_CHANNELS_WGRAD_TF32_TILE = Tile(32, 64, 64, 8), Tile(16, 64, 64, 8)
CONV_CHANNELS_WGRAD_TILE = Tile(32, 64, 64, 8)

# Without tensor cores a thread holds whole rows of both operands, unrolled over k: the tiles above
# spill (up to 6904 bytes a thread on sm_80 in fp32).
SPMM_24_SCALAR_TILES = (Tile(16, 64, 32, 8), Tile(32, 32, 16))
CONV_24_SCALAR_TILES = (Tile(32, 32, 16),)
CONV_24_NARROW_SCALAR_TILES = (Tile(64, 16, 16),)
CHANNELS_SCALAR_TILES = (Tile(16, 64, 16, 8), Tile(32, 64, 16, 8), Tile(64, 64, 16, 8))
SPMM_24_WGRAD_SCALAR_TILE = Tile(16, 64, 32, 8)
CHANNELS_WGRAD_SCALAR_TILE = Tile(16, 64, 64, 8)

# Groups of a convolution with at most this many in and out channels are multiplied one by one:
# the narrowest tile of tensor cores is 16 wide, and would be at most half full.
FEW_CHANNELS = 8
FEW_TILE_ELEMENTS, FEW_TILE_CHANNELS = 1024, 64  # of an output tile; its most channels


def few_channels(*channels: int) -> bool:
    """True where groups of `channels` in and out channels are multiplied one by one."""
    return max(channels) <= FEW_CHANNELS


def tile_for(tiles: tuple[Tile, ...], rows: int, itemsize: int = 2) -> Tile:
    """The first of `tiles` whose `m` holds all `rows`, else the last; for tensor cores.

    Operands of 4 bytes get half of a `k` above 32: a thread's part of a deeper step does not fit
    its registers (up to 552 bytes spilled in tf32).
    """
    tile = next((t for t in tiles if rows <= t.m), tiles[-1])
    return tile if itemsize < 4 else tile._replace(k=max(tile.k // 2, 32))


def spmm_tile(rows: int, itemsize: int, scalar: bool) -> Tile:
    """The tile for `rows` rows of x; `scalar` where there are no tensor cores for them."""
    if scalar:
        return tile_for(SPMM_24_SCALAR_TILES, rows)
    return tile_for(SPMM_24_TILES, rows, itemsize)


def conv_tile(pixels: int, columns: int, itemsize: int, scalar: bool) -> Tile:
    """The tile of conv2d_24 for `pixels` rows and `columns` out channels of a group."""
    narrow = columns <= 16
    if scalar:
        return tile_for(CONV_24_NARROW_SCALAR_TILES if narrow else CONV_24_SCALAR_TILES, pixels)
    return tile_for(CONV_24_NARROW_TILES if narrow else CONV_24_TILES, pixels, itemsize)


def conv_wgrad_tile(columns: int, scalar: bool) -> Tile:
    """The tile of conv2d_24_wgrad for `columns` out channels of a group."""
    narrow = columns <= 16
    if scalar:
        return (CONV_24_NARROW_SCALAR_TILES if narrow else CONV_24_SCALAR_TILES)[0]
    return CONV_24_NARROW_WGRAD_TILE if narrow else CONV_24_WGRAD_TILE


def channels_tile(tiles: tuple[Tile, ...], rows: int, itemsize: int, scalar: bool) -> Tile:
    """The tile of conv2d_channels, one of `tiles` where there are tensor cores.

    With operands of 4 bytes, a tile of 128 columns spills, and 4 stages exceed the LDS of gfx942.
    """
    if scalar:
        return tile_for(CHANNELS_SCALAR_TILES, rows)
    tile = tile_for(tiles, rows, itemsize)
    return tile._replace(n=64, stages=3) if itemsize == 4 and tile.n > 64 else tile


def gemm_channels_tile(rows: int, itemsize: int, scalar: bool, ragged: bool = False) -> Tile:
    """The tile of gemm_channels; `ragged` where 16 does not divide the channels, or they are no
    runs."""
    tiles = GEMM_CHANNELS_RAGGED_TILES if ragged else GEMM_CHANNELS_TILES
    return channels_tile(tiles, rows, itemsize, scalar)


def gemm_channels_wgrad_tile(itemsize: int, scalar: bool) -> Tile:
    """The tile of gemm_channels_wgrad."""
    if scalar:
        return CHANNELS_WGRAD_SCALAR_TILE
    return GEMM_CHANNELS_WGRAD_TF32_TILE if itemsize == 4 else GEMM_CHANNELS_WGRAD_TILE


def split_count(programs: int, steps: int, multiprocessors: int, limit: int = 16) -> int:
    """Parts to cut a product of `steps` steps into, so that every multiprocessor has work.

    Each part keeps at least 4 steps, and the count is a power of two up to `limit`.
    """
    split = 1
    while split < limit and programs * split * 2 <= 2 * multiprocessors and steps >= 8 * split:
        split *= 2
    return split
