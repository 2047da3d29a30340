"""Tiles of mma_sp: what a program owns, its register and shared-memory layouts, which are legal.

The rows are predictions (NOTES.md): built ahead of time for each architecture, none timed on a GPU.
"""

from __future__ import annotations

import dataclasses

from triton.experimental.gluon import language as gl

from slimgemm.kernels.configs import SMEM_BYTES
from slimgemm.kernels.gluon.orders import MMA_BLOCK_BYTES, STEP_BYTES

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")


def _bases(first: int, count: int, axis: int) -> list[list[int]]:
    """Linear-layout bases first, 2 first, ... along one of two axes; `count` is a power of two."""
    steps = range(count.bit_length() - 1)
    return [[first << i, 0] if axis == 0 else [0, first << i] for i in steps]


@dataclasses.dataclass(frozen=True)
class MmaTile:
    """One program computes [rows, tokens] of D = W X^T with warps_n x warps_m x warps_k warps.

    Args:
        mt, nt: 16-row and 8-token instruction tiles per warp.
        warps_n, warps_m: warps along the rows of W and along the tokens.
        warps_k: warps that share an output tile and each take every warps_k-th 512-byte block of K.
        steps: 64-byte steps of K per shared-memory stage (2, 4 or 8).
        stages: stages of X in flight, at least 2.
        ahead: steps by which A is loaded before use (1 to 8), 4 mt registers a lane each.
    """

    mt: int
    nt: int
    warps_n: int
    warps_m: int
    warps_k: int
    steps: int
    stages: int
    ahead: int

    @property
    def rows(self) -> int:
        """Out features of a program."""
        return 16 * self.mt * self.warps_n

    @property
    def tokens(self) -> int:
        """Rows of x of a program."""
        return 8 * self.nt * self.warps_m

    @property
    def warps(self) -> int:
        return self.warps_n * self.warps_m * self.warps_k

    @property
    def smem_bytes(self) -> int:
        """The ring of X stages, which outlives everything else in shared memory."""
        return self.stages * self.warps_k * self.tokens * self.steps * STEP_BYTES

    @property
    def fragment(self) -> gl.BlockedLayout:
        """[mt, nt, warps_n, warps_m, warps_k, 4 lane + register]: what the instruction reads.

        The last axis gives each lane four neighbouring registers, fastest of all: the order in
        which inline PTX takes them.
        """
        return gl.BlockedLayout(
            [self.mt, self.nt, 1, 1, 1, 4],
            [1, 1, 1, 1, 1, 32],
            [1, 1, self.warps_n, self.warps_m, self.warps_k, 1],
            [5, 4, 3, 2, 1, 0],
        )

    @property
    def x_fragment(self) -> gl.DistributedLinearLayout:
        """int32 [warps_k * tokens, 16] of one step, as ldmatrix delivers it: B of every warp.

        Lane 4 g + t, register r: token g, pair t + 4 r. Warps in the order of `fragment`.
        """
        warps = (
            _bases(self.tokens, self.warps_k, 0)
            + _bases(8 * self.nt, self.warps_m, 0)
            + [[0, 0]] * (self.warps_n.bit_length() - 1)
        )
        return gl.DistributedLinearLayout(
            reg_bases=_bases(4, 4, 1) + _bases(8, self.nt, 0),
            lane_bases=_bases(1, 4, 1) + _bases(1, 8, 0),
            warp_bases=warps,
            block_bases=[],
            shape=[self.warps_k * self.tokens, 16],
        )

    @property
    def x_copy(self) -> gl.BlockedLayout:
        """int32 [warps_k * tokens, 16 steps]: 16 bytes a lane, lanes along K for whole sectors."""
        units = min(32, 4 * self.steps)
        return gl.BlockedLayout([1, 4], [32 // units, units], [self.warps, 1], [1, 0])

    @property
    def x_shared(self) -> gl.SwizzledSharedLayout:
        """16-byte units permuted by the row: eight rows of ldmatrix fall into different banks."""
        return gl.SwizzledSharedLayout(4, 1, 8, [1, 0])

    @property
    def out(self) -> gl.BlockedLayout:
        """[tokens, rows] of Y: 8 values (16 bytes of bf16) a lane, lanes along the out features."""
        lanes = min(32, self.rows // 8)
        return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [self.warps, 1], [1, 0])


# Tokens up to which a row is taken -> tile; the last row serves every larger count.
# Few tokens: bound by the bytes of W, so many warps with many 16-byte loads in flight, and warps
# along K so that a program can be narrow. Many tokens: bound by the tensor cores and by reads of B
# from shared memory; mt = 4 would halve those, and spills (NOTES.md).
MMA_SP_TILES = {
    8: MmaTile(mt=1, nt=1, warps_n=2, warps_m=1, warps_k=4, steps=8, stages=3, ahead=8),
    16: MmaTile(mt=1, nt=2, warps_n=2, warps_m=1, warps_k=4, steps=4, stages=3, ahead=8),
    32: MmaTile(mt=1, nt=4, warps_n=4, warps_m=1, warps_k=2, steps=4, stages=3, ahead=8),
    64: MmaTile(mt=2, nt=8, warps_n=4, warps_m=1, warps_k=2, steps=4, stages=3, ahead=4),
    128: MmaTile(mt=2, nt=8, warps_n=4, warps_m=2, warps_k=1, steps=2, stages=4, ahead=2),
}


# e4m3 on sm_90, whose mma.sp has no 8-bit floats: ptxas widens both operands to fp16 and exchanges
# metadata between lanes for each HMMA.SP. More than one token tile per warp spills.
MMA_SP_WIDENED_TILES = {
    8: MMA_SP_TILES[8],
    16: MmaTile(mt=1, nt=1, warps_n=2, warps_m=2, warps_k=2, steps=4, stages=3, ahead=8),
    32: MmaTile(mt=1, nt=1, warps_n=2, warps_m=4, warps_k=1, steps=2, stages=4, ahead=8),
}


def mma_sp_tile(m: int, aligned: bool = True, widened: bool = False) -> MmaTile:
    """The tile for `m` tokens of an x that is 16-byte aligned, or is not.

    `widened`: the GPU multiplies these 8-bit floats as fp16.
    """
    if not aligned:
        # Such an x passes through registers: 32 tokens and short stages are what fits beside A.
        return dataclasses.replace(mma_sp_tile(min(m, 32), True, widened), steps=2, ahead=1)
    tiles = MMA_SP_WIDENED_TILES if widened else MMA_SP_TILES
    return next((t for most, t in tiles.items() if m <= most), tiles[max(tiles)])


def fits(tile: MmaTile, architecture: str) -> bool:
    """True if `tile` is whole (a stage divides a block of K) and its ring fits."""
    return (
        tile.stages >= 2
        and 1 <= tile.ahead <= 8
        and tile.steps in (2, 4, MMA_BLOCK_BYTES // STEP_BYTES)
        and tile.smem_bytes <= SMEM_BYTES[architecture]
    )
