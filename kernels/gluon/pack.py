"""pack_mma_sp, pack_wgmma_sp: Packed24 -> the hardware orders of orders.py, on the GPU, bit by bit.

A program writes 4096 bytes of one output in order, 16 bytes a lane, and gathers what belongs there:
b32 registers are four bytes of neighbouring values; metadata words are two bytes of each of two
rows (16-bit values) or four bytes of one (8-bit values). pack_dense.py begins at the dense weight.

Bound by memory: reads and writes 1.125 bytes per dense 16-bit weight, 0.625 per 8-bit one.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.gluon.launch import Launch
from slimgemm.kernels.gluon.orders import (
    MMA_BLOCK_BYTES,
    MMA_ROWS,
    WGMMA_BLOCK_BYTES,
    WGMMA_ROWS,
    MmaSp,
    WgmmaSp,
    block_columns,
    check_packable,
    wgmma_columns,
    wider,
)

ELEMENTS = 1024  # int32 of output per program
WARPS = 4


@gluon.jit
def _pack_values_kernel(v_ptr, out_ptr, N, PAIRS, BLOCKS, ELEMENTS: gl.constexpr):
    """v int32 [N, PAIRS], 4 bytes of values -> a block of out int32 [tiles, BLOCKS, 8, 32, 4]."""
    # 16 bytes a lane, lanes one after the other: whole sectors are written.
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    e = gl.arange(0, ELEMENTS, layout=LAYOUT)
    tile = gl.program_id(0) // BLOCKS
    block = gl.program_id(0) % BLOCKS
    lane = e // 4 % 32
    row = tile * 16 + lane // 4 + e % 2 * 8
    pair = block * 64 + e // 128 * 8 + e % 4 // 2 * 4 + lane % 4
    inside = (row < N) & (pair < PAIRS)
    value = gl.load(v_ptr + row.to(gl.int64) * PAIRS + pair, mask=inside, other=0)
    gl.store(out_ptr + gl.program_id(0).to(gl.int64) * ELEMENTS + e, value)


@gluon.jit
def _byte(m_ptr, row, column, N, COLUMNS):
    """One byte of metadata as int32; 0x44, two empty groups, outside the weight."""
    inside = (row < N) & (column < COLUMNS)
    byte = gl.load(m_ptr + row.to(gl.int64) * COLUMNS + column, mask=inside, other=0x44)
    return byte.to(gl.int32) & 0xFF


@gluon.jit
def _pack_words_kernel(
    m_ptr, out_ptr, N, COLUMNS, BLOCKS, TOTAL,
    SIZE: gl.constexpr, WORDS: gl.constexpr, WARPS_PER_TILE: gl.constexpr,
    ELEMENTS: gl.constexpr,
):  # fmt: skip
    """m uint8 [N, COLUMNS] -> out int32 [tiles, BLOCKS, WARPS_PER_TILE, 32, WORDS].

    SIZE: bytes of a value.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    e = gl.program_id(0) * ELEMENTS + gl.arange(0, ELEMENTS, layout=LAYOUT)
    word = e % WORDS
    lane = e // WORDS % 32
    warp = e // (32 * WORDS) % WARPS_PER_TILE
    block = e // (32 * WORDS * WARPS_PER_TILE) % BLOCKS
    tile = e // (32 * WORDS * WARPS_PER_TILE) // BLOCKS
    row = (tile * WARPS_PER_TILE + warp) * 16 + lane // 4
    if SIZE == 2:
        # Lane 4 g + t, word j: step 2 j + t // 2, bytes 2 (t % 2) and the next, rows g and g + 8.
        column = block * (8 * WORDS) + (2 * word + lane % 4 // 2) * 4 + lane % 2 * 2
        value = _byte(m_ptr, row, column, N, COLUMNS)
        value = value | (_byte(m_ptr, row, column + 1, N, COLUMNS) << 8)
        value = value | (_byte(m_ptr, row + 8, column, N, COLUMNS) << 16)
        value = value | (_byte(m_ptr, row + 8, column + 1, N, COLUMNS) << 24)
    else:
        # Lane 4 g + t, word j: step j, bytes 4 (t // 2) and the next three, row g + 8 (t % 2).
        row = row + lane % 2 * 8
        column = block * (8 * WORDS) + word * 8 + lane % 4 // 2 * 4
        value = _byte(m_ptr, row, column, N, COLUMNS)
        for i in gl.static_range(1, 4):
            value = value | (_byte(m_ptr, row, column + i, N, COLUMNS) << (8 * i))
    gl.store(out_ptr + e, value, mask=e < TOTAL)


def prepare_values(packed: Packed24) -> Launch:
    """The launch that writes MmaSp.values of `packed` to `out`."""
    n, k = packed.shape
    block_k = block_columns(MMA_BLOCK_BYTES, packed.values.dtype)
    tiles, blocks = triton.cdiv(n, MMA_ROWS), triton.cdiv(k, block_k)
    out = packed.values.new_empty(tiles, blocks, 8, 32, 4, dtype=torch.int32)
    pairs = packed.values.view(torch.int32)
    args = (pairs, out, n, pairs.shape[1], blocks)
    return Launch((tiles * blocks,), args, {"ELEMENTS": ELEMENTS}, WARPS, out, None)


def prepare_words(packed: Packed24, rows: int, block_bytes: int) -> Launch:
    """The launch that writes the words of tiles of `rows` and blocks of `block_bytes` to `out`."""
    n, k = packed.shape
    size = packed.values.element_size()
    tiles, blocks = triton.cdiv(n, rows), triton.cdiv(k, block_bytes // size)
    warps, words = rows // 16, block_bytes // size // 64
    # More than four words of a lane lie in halves of a block, each like a block of its own.
    halves, words = triton.cdiv(words, 4), min(words, 4)
    shape = (tiles, blocks, halves) if halves > 1 else (tiles, blocks)
    out = packed.meta.new_empty(*shape, warps, 32, words, dtype=torch.int32)
    args = (packed.meta, out, n, packed.meta.shape[1], blocks * halves, out.numel())
    constants = {"SIZE": size, "WORDS": words, "WARPS_PER_TILE": warps, "ELEMENTS": ELEMENTS}
    return Launch((triton.cdiv(out.numel(), ELEMENTS),), args, constants, WARPS, out, None)


def _check(packed: Packed24) -> None:
    check_packable(packed)
    if not packed.values.is_cuda:
        raise ValueError(
            f"values must be on a GPU, got {packed.values.device}; orders.py packs CPU tensors"
        )


def _run(kernel, launch: Launch) -> Tensor:
    if launch.out.numel():
        with torch.cuda.device(launch.out.device):  # Triton launches on the current device
            kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.warps)
    return launch.out


def pack_mma_sp(packed: Packed24) -> MmaSp:
    """Packed24 on a GPU -> the register order of mma.sp.

    Raises:
        ValueError: not 2:4, not of orders.DTYPES, not on a GPU, or shapes that do not fit.

    Source: orders.py. Twin: orders.to_mma_sp, the same bits.
    """
    _check(packed)
    values = _run(_pack_values_kernel, prepare_values(packed))
    words = _run(_pack_words_kernel, prepare_words(packed, MMA_ROWS, MMA_BLOCK_BYTES))
    return MmaSp(values, words.squeeze(-3), *packed.shape, packed.values.dtype)


def pack_wgmma_sp(packed: Packed24) -> WgmmaSp:
    """Packed24 on a GPU -> what wgmma.sp reads. Twin: orders.to_wgmma_sp, the same bits.

    Raises:
        ValueError: not 2:4, not of orders.DTYPES, not on a GPU, or shapes that do not fit.
    """
    _check(packed)
    words = _run(_pack_words_kernel, prepare_words(packed, WGMMA_ROWS, WGMMA_BLOCK_BYTES))
    missing = wgmma_columns(packed.k, packed.values.dtype) - packed.values.shape[1]
    meta = words.view(*words.shape[:2], 2, 128, words.shape[-1])
    return WgmmaSp(wider(packed.values, missing), meta, *packed.shape)
