"""Tiles of mma_packed. Predictions: each is built ahead of time, none was timed on a GPU."""

from __future__ import annotations

import dataclasses

from triton.experimental.gluon import language as gl

from slimgemm.kernels.gluon.mma_tiles import MmaTile


@dataclasses.dataclass(frozen=True)
class PackedTile(MmaTile):
    """An MmaTile whose `ahead` counts in pairs of steps: even."""

    @property
    def x_copy(self) -> gl.BlockedLayout:
        """int32 [warps_k * tokens, 16 steps]: 8 bytes (one group) a lane, lanes along K."""
        units = min(32, 8 * self.steps)
        return gl.BlockedLayout([1, 2], [32 // units, units], [self.warps, 1], [1, 0])

    @property
    def meta_fragment(self) -> gl.BlockedLayout:
        """As `fragment`, with eight registers a lane: the metadata of 256 columns of a row."""
        return gl.BlockedLayout(
            [self.mt, self.nt, 1, 1, 1, 8],
            [1, 1, 1, 1, 1, 32],
            [1, 1, self.warps_n, self.warps_m, self.warps_k, 1],
            [5, 4, 3, 2, 1, 0],
        )


# Tokens up to which a row is taken -> tile; the last row serves every larger count. Predictions: no
# GPU has timed them. Two row tiles share each B fragment from 64 tokens up, where reads of X from
# shared memory would outlast those of W from memory; nt = 8 with mt = 2 spills.
MMA_PACKED_TILES = {
    8: PackedTile(mt=1, nt=1, warps_n=2, warps_m=1, warps_k=4, steps=8, stages=3, ahead=8),
    16: PackedTile(mt=1, nt=2, warps_n=2, warps_m=1, warps_k=4, steps=4, stages=3, ahead=6),
    32: PackedTile(mt=1, nt=4, warps_n=4, warps_m=1, warps_k=2, steps=4, stages=3, ahead=6),
    64: PackedTile(mt=2, nt=4, warps_n=2, warps_m=2, warps_k=2, steps=4, stages=3, ahead=4),
    128: PackedTile(mt=2, nt=4, warps_n=4, warps_m=2, warps_k=1, steps=4, stages=3, ahead=2),
}


def mma_packed_tile(m: int, aligned: bool = True) -> PackedTile:
    """The tile for `m` tokens of an x whose rows are 16-byte aligned, or are not."""
    if not aligned:
        # Such an x passes through registers: 32 tokens and short stages are what fits beside A.
        return dataclasses.replace(mma_packed_tile(min(m, 32)), steps=2, ahead=2)
    return next((t for most, t in MMA_PACKED_TILES.items() if m <= most), MMA_PACKED_TILES[128])
