"""Tiles of wgmma_sp: what a program owns and how its shared memory is cut.

The rows are predictions (NOTES.md): built ahead of time for sm_90a, none timed on a GPU.
"""

from __future__ import annotations

import dataclasses

from triton.experimental.gluon import language as gl

UNIT_BYTES = 16384  # one unit of the arena: 128 rows of 128 bytes


@dataclasses.dataclass(frozen=True)
class WgmmaTile:
    """128 out features x `tokens` (64, 128 or 256), `stages` of 128 dense columns in flight."""

    tokens: int
    stages: int

    @property
    def units(self) -> int:
        """16 KiB units per stage: one of W, tokens / 64 of X."""
        return 1 + self.tokens // 64

    @property
    def box(self) -> int:
        """Rows of one TMA box of X."""
        return min(self.tokens, 128)

    @property
    def arena_bytes(self) -> int:
        return self.stages * self.units * UNIT_BYTES

    @property
    def accumulator(self) -> gl.NVMMADistributedLayout:
        """[64, tokens] of one warpgroup, in the register order of wgmma."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.tokens, 16])

    @property
    def out(self) -> gl.BlockedLayout:
        """[tokens, 64] of Y: 8 values (16 bytes) a lane, 8 lanes along the out features."""
        return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


# Tokens up to which a row is taken -> tile; the last row serves every larger count. Predictions
# (NOTES.md): stages fill 227 KiB, less what the epilogue's transposition takes.
WGMMA_SP_TILES = {64: WgmmaTile(64, 6), 128: WgmmaTile(128, 4), 256: WgmmaTile(256, 2)}


def wgmma_sp_tile(m: int) -> WgmmaTile:
    """The tile for `m` tokens."""
    return next((t for most, t in WGMMA_SP_TILES.items() if m <= most), WGMMA_SP_TILES[256])
