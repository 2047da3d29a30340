"""Tiles. Which rows are legal is said once, in `fits`.

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

# Rows of x -> tile; the first row whose `m` holds all rows is taken, else the last.
SPMM_24_TILES = (Tile(16, 64, 64), Tile(32, 64, 64), Tile(64, 64, 64), Tile(128, 64, 32, 8))
SPMM_24_WGRAD_TILE = Tile(32, 64, 64)
# Without tensor cores a thread holds whole rows of both operands, and the tiles above spill (up to
# 6904 bytes a thread on sm_80 in fp32).
SPMM_24_SCALAR_TILES = (Tile(16, 64, 32, 8), Tile(32, 32, 16))
SPMM_24_WGRAD_SCALAR_TILE = Tile(16, 64, 32, 8)


def fits(tile: Tile, itemsize: int, smem_bytes: int) -> bool:
    """True if a ring of `stages` x tiles, and the decoded weight tile, fit in shared memory.

    Values and metadata go through registers; x [m, k] and dense w [n, k] are what `tl.dot` reads
    from shared memory, and the accumulator may pass through it once at the end.
    """
    ring = tile.stages * tile.m * tile.k * itemsize
    return ring + tile.n * tile.k * itemsize <= smem_bytes and tile.m * tile.n * 4 <= smem_bytes


def spmm_tile(m: int, scalar: bool) -> Tile:
    """The tile for `m` rows of x; `scalar` where there are no tensor cores for them."""
    tiles = SPMM_24_SCALAR_TILES if scalar else SPMM_24_TILES
    return next((t for t in tiles if m <= t.m), tiles[-1])


def split_count(programs: int, steps: int, multiprocessors: int, limit: int = 16) -> int:
    """Parts to cut a product of `steps` steps into, so that every multiprocessor has work.

    Each part keeps at least 4 steps, and the count is a power of two up to `limit`.
    """
    split = 1
    while split < limit and programs * split * 2 <= 2 * multiprocessors and steps >= 8 * split:
        split *= 2
    return split
