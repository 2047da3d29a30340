"""pack_dense_mma_sp, pack_dense_wgmma_sp: dense 2:4 [N, K] -> the hardware orders, in one pass.

A program reads 8 KiB of the dense weight (16 rows x 512 bytes for mma.sp, 32 rows x 256 bytes for
wgmma.sp), compresses each group of 4 in registers, and writes 4 KiB of values and the metadata
words, all 16 bytes a lane. Groups with more than two non-zeros are counted in the same pass, and
the first is remembered, as in pack_24. unpack.py has the exact inverses.

Bound by memory: reads 2 and writes 1.125 bytes per 16-bit weight, 1 and 0.625 per 8-bit one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slimgemm.kernels.gluon.orders import (
    DTYPES,
    MMA_BLOCK_BYTES,
    MMA_ROWS,
    WGMMA_BLOCK_BYTES,
    WGMMA_ROWS,
    MmaSp,
    WgmmaSp,
    block_columns,
    wgmma_columns,
)
from slimgemm.kernels.reference import raise_not_packable

WARPS = 4
NONE_BAD = 2**62
# Bits of a value that are not its sign: zero without them is zero. int8 has no -0.
MAGNITUDES = {
    torch.float16: 0x7FFF,
    torch.bfloat16: 0x7FFF,
    torch.float8_e4m3fn: 0x7F,
    torch.int8: 0xFF,
}


@gluon.constexpr_function
def unit_layout(units):
    """int32 [rows, units]: 16 bytes a lane, lanes along K."""
    lanes = min(32, units // 4)
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def pair_layout(pairs):
    """int32 [rows, pairs]: the halves of unit_layout(2 pairs), in the same lanes."""
    lanes = min(32, pairs // 2)
    return gl.BlockedLayout([1, 2], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def compress(w0, w1, w2, w3, MAGNITUDE: gl.constexpr):
    """(kept bits low, kept bits high, nibble, 1 if more than two are non-zero) of each group."""
    n0, n1 = (w0 & MAGNITUDE) != 0, (w1 & MAGNITUDE) != 0
    n2, n3 = (w2 & MAGNITUDE) != 0, (w3 & MAGNITUDE) != 0
    # The spare position of a group with fewer than two non-zeros is the lowest free one.
    first_1, first_2 = n1 & (n2 | n3), n2 & n3
    zero = w0 & 0
    low = gl.where(n0, w0, gl.where(first_1, w1, gl.where(first_2, w2, zero)))
    high = gl.where(n3, w3, gl.where(n2, w2, gl.where(n1, w1, zero)))
    first = gl.where(n0, zero, gl.where(first_1, zero + 1, gl.where(first_2, zero + 2, zero)))
    second = gl.where(n3, zero + 3, gl.where(n2, zero + 2, zero + 1))
    count = n0.to(gl.int32) + n1.to(gl.int32) + n2.to(gl.int32) + n3.to(gl.int32)
    return low, high, first | (second << 2), (count > 2).to(gl.int32)


@gluon.jit
def compress_bytes(unit, MAGNITUDE: gl.constexpr):
    """`compress` of the four bytes of each int32."""
    w0, w1 = unit & 0xFF, (unit >> 8) & 0xFF
    return compress(w0, w1, (unit >> 16) & 0xFF, (unit >> 24) & 0xFF, MAGNITUDE)


@gluon.jit
def load_dense(
    w_ptr, row, unit, N, K, stride_wn, stride_wk, SIZE: gl.constexpr, ALIGNED: gl.constexpr
):
    """int32 [rows, units] of a dense weight, four bytes each; zeros past N and K.

    ALIGNED: w_ptr is int32 and stride_wn counts 16 bytes; else w_ptr and strides are of values.
    """
    line = w_ptr + (row.to(gl.int64) * stride_wn * (4 if ALIGNED else 1))[:, None]
    inside = (row < N)[:, None]
    if ALIGNED:
        # One test per 16 bytes, so that the load stays 16 bytes wide.
        mask = inside & (unit // 4 < K // (16 // SIZE))[None, :]
        units = gl.load(line + unit[None, :], mask=mask, other=0)
    else:
        first = unit.to(gl.int64) * (4 // SIZE)
        value = gl.load(line + (first * stride_wk)[None, :], inside & (first < K)[None, :], other=0)
        units = value.to(gl.int32) & (65535 if SIZE == 2 else 255)
        for i in gl.static_range(1, 4 // SIZE):
            mask = inside & (first + i < K)[None, :]
            value = gl.load(line + ((first + i) * stride_wk)[None, :], mask=mask, other=0)
            units |= (value.to(gl.int32) & (65535 if SIZE == 2 else 255)) << (8 * SIZE * i)
    return units


@gluon.jit
def store_values(
    pairs, values_ptr, row0, block, N, QUADS,
    ROWS: gl.constexpr, PAIRS: gl.constexpr, FRAGMENTS: gl.constexpr,
):  # fmt: skip
    """Store compressed int32 [ROWS, PAIRS] in register order, or as rows of QUADS 16-byte units."""
    if FRAGMENTS:
        # row (r % 2, g), pair (step, r // 2, t) -> [step, lane (g, t), r]
        flat = pairs.reshape([2, 8, 8, 2, 4]).permute([2, 1, 4, 3, 0]).reshape([1024])
        FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        e = gl.arange(0, 1024, layout=FLAT)
        at = values_ptr + gl.program_id(0).to(gl.int64) * 1024 + e
        gl.store(at, gl.convert_layout(flat, FLAT))
    else:
        LINES: gl.constexpr = unit_layout(PAIRS)
        row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LINES))
        pair = block * PAIRS + gl.arange(0, PAIRS, layout=gl.SliceLayout(0, LINES))
        at = values_ptr + (row.to(gl.int64) * QUADS * 4)[:, None] + pair[None, :]
        mask = (row < N)[:, None] & (pair // 4 < QUADS)[None, :]
        gl.store(at, gl.convert_layout(pairs, LINES), mask=mask)


@gluon.jit
def store_words(
    nibbles, words_ptr, row, pair, SIZE: gl.constexpr, ROWS: gl.constexpr, PAIRS: gl.constexpr
):
    """Store the metadata words of a program; nibbles [ROWS, PAIRS], those of one compressed int32.

    `row`, `pair`: indices inside the program.
    """
    WORDS: gl.constexpr = 128 if SIZE == 2 else 256
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    if SIZE == 2:
        shift = (pair % 4 * 4)[None, :] + (row // 8 % 2 * 16)[:, None]
        # tile, row half, g, word, selector, t % 2, nibble -> tile, lane (g, selector, t % 2), word
        parts = (nibbles << shift).reshape([ROWS // 16, 2, 8, PAIRS // 16, 2, 2, 4])
        words = gl.sum(gl.sum(parts, 6), 1).permute([0, 1, 3, 4, 2])
    else:
        shift = (pair % 4 * 8)[None, :]
        # tile, row half, g, half of the steps, step, column half, byte
        # -> tile, half of the steps, lane (g, column half, row half), step
        parts = (nibbles << shift).reshape([ROWS // 16, 2, 8, PAIRS // 32, 4, 2, 4])
        words = gl.sum(parts, 6).permute([0, 3, 2, 5, 1, 4])
    e = gl.arange(0, WORDS, layout=FLAT)
    at = words_ptr + gl.program_id(0).to(gl.int64) * WORDS + e
    gl.store(at, gl.convert_layout(words.reshape([WORDS]), FLAT))


@gluon.jit
def _pack_dense_kernel(
    w_ptr, values_ptr, words_ptr, bad_ptr,
    N, K, BLOCKS, QUADS, stride_wn, stride_wk,
    SIZE: gl.constexpr, MAGNITUDE: gl.constexpr, ALIGNED: gl.constexpr, FRAGMENTS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = 16 if FRAGMENTS else 32
    PAIRS: gl.constexpr = 64 if FRAGMENTS else 32
    PARTS: gl.constexpr = 1 if FRAGMENTS else 4  # programs per tile of rows
    UNITS: gl.constexpr = unit_layout(2 * PAIRS)
    LAYOUT: gl.constexpr = pair_layout(PAIRS)
    GROUPS: gl.constexpr = 2 // SIZE  # groups per compressed int32
    block = gl.program_id(0) // PARTS % BLOCKS
    row0 = (gl.program_id(0) // PARTS // BLOCKS * PARTS + gl.program_id(0) % PARTS) * ROWS

    dense_row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, UNITS))
    unit = block * (2 * PAIRS) + gl.arange(0, 2 * PAIRS, layout=gl.SliceLayout(0, UNITS))
    units = load_dense(w_ptr, dense_row, unit, N, K, stride_wn, stride_wk, SIZE, ALIGNED)
    even, odd = gl.split(units.reshape([ROWS, PAIRS, 2]))
    even = gl.convert_layout(even, LAYOUT, assert_trivial=True)
    odd = gl.convert_layout(odd, LAYOUT, assert_trivial=True)

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(0, LAYOUT))
    place = (row * (PAIRS * GROUPS))[:, None] + (pair * GROUPS)[None, :]
    if SIZE == 2:
        low, high, nibbles, bad = compress(
            even & 0xFFFF, (even >> 16) & 0xFFFF, odd & 0xFFFF, (odd >> 16) & 0xFFFF, MAGNITUDE
        )
        packed = low | (high << 16)
    else:
        low, high, nibble_0, bad_0 = compress_bytes(even, MAGNITUDE)
        low_1, high_1, nibble_1, bad_1 = compress_bytes(odd, MAGNITUDE)
        packed = low | (high << 8) | (low_1 << 16) | (high_1 << 24)
        nibbles, bad = nibble_0 | (nibble_1 << 4), bad_0 + bad_1
        place = gl.where(bad_0 > 0, place, place + 1)
    store_values(packed, values_ptr, row0, block, N, QUADS, ROWS, PAIRS, FRAGMENTS)
    store_words(nibbles, words_ptr, row, pair, SIZE, ROWS, PAIRS)

    count = gl.sum(gl.sum(bad, 1), 0)
    if count > 0:
        # Groups are numbered along the rows of the whole weight.
        first = gl.min(gl.min(gl.where(bad > 0, place, 1 << 30), 1), 0)
        at = (row0 + first // (PAIRS * GROUPS)).to(gl.int64) * gl.cdiv(K, 4)
        at += block * (PAIRS * GROUPS) + first % (PAIRS * GROUPS)
        gl.atomic_add(bad_ptr, count.to(gl.int64))
        gl.atomic_min(bad_ptr + 1, at)


class PackLaunch(NamedTuple):
    """One launch of _pack_dense_kernel and what it writes; `bad` is int64 [count, first place]."""

    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]
    warps: int
    values: Tensor
    meta: Tensor
    bad: Tensor


def raw(w: Tensor, aligned: bool) -> Tensor:
    """`w` as int32 units if aligned, else as integers of the size of its values."""
    return w.view(torch.int32 if aligned else {2: torch.int16, 1: torch.uint8}[w.element_size()])


def prepare_pack(w: Tensor, fragments: bool) -> PackLaunch:
    """The launch that packs a dense `w` [N, K] for mma.sp (`fragments`) or for wgmma.sp."""
    n, k = w.shape
    size = w.element_size()
    per = 16 // size  # values in 16 bytes
    rows = MMA_ROWS if fragments else WGMMA_ROWS
    block_bytes = MMA_BLOCK_BYTES if fragments else WGMMA_BLOCK_BYTES
    tiles, blocks = triton.cdiv(n, rows), triton.cdiv(k, block_columns(block_bytes, w.dtype))
    if fragments:
        values = w.new_empty(tiles, blocks, 8, 32, 4, dtype=torch.int32)
        lanes = (32, 4) if size == 2 else (2, 32, 4)
    else:
        values = w.new_empty(n, wgmma_columns(k, w.dtype))
        lanes = (2, 128, 4 // size)
    meta = w.new_empty(tiles, blocks, *lanes, dtype=torch.int32)
    bad = torch.tensor([0, NONE_BAD], device=w.device)
    aligned = (
        w.stride(1) == 1 and k % per == 0 and w.stride(0) % per == 0 and w.data_ptr() % 16 == 0
    )
    return PackLaunch(
        grid=(tiles * blocks * (1 if fragments else 4),),
        args=(
            raw(w, aligned), values.view(torch.int32), meta, bad,
            n, k, blocks, 0 if fragments else values.shape[1] // per,
            w.stride(0) // per if aligned else w.stride(0), w.stride(1),
        ),
        constants=dict(
            SIZE=size, MAGNITUDE=MAGNITUDES[w.dtype], ALIGNED=aligned, FRAGMENTS=fragments
        ),
        warps=WARPS, values=values, meta=meta, bad=bad,
    )  # fmt: skip


def check_dense_24(w: Tensor) -> None:
    """Raise ValueError unless `w` is a matrix of one of orders.DTYPES on a GPU."""
    if w.ndim != 2 or w.dtype not in DTYPES:
        raise ValueError(
            "weight must be a matrix [N, K] of float16, bfloat16, float8_e4m3fn or int8, "
            f"got {w.dtype} {list(w.shape)}"
        )
    if not w.is_cuda:
        raise ValueError(
            f"weight must be on a GPU, got {w.device}; pack_24 and orders.py take CPU tensors"
        )


def raise_if_bad(w: Tensor, bad: Tensor) -> None:
    """Raise the error of pack_24 where the kernel counted bad groups. Waits for the device."""
    count, first = bad.tolist()
    if count:
        groups = triton.cdiv(w.shape[1], 4)
        row, g = divmod(first, groups)
        group = w[row, 4 * g : 4 * g + 4]
        nonzeros = int((group.float() != 0).sum())
        raise_not_packable(2, 4, groups, count, first, nonzeros, w.shape[1])


def _pack(w: Tensor, fragments: bool) -> PackLaunch:
    check_dense_24(w)
    launch = prepare_pack(w, fragments)
    if w.numel():
        with torch.cuda.device(w.device):  # Triton launches on the current device
            _pack_dense_kernel[launch.grid](*launch.args, **launch.constants, num_warps=WARPS)
        raise_if_bad(w, launch.bad)
    return launch


def pack_dense_mma_sp(w: Tensor) -> MmaSp:
    """Dense [N, K] that already is 2:4 -> the register order of mma.sp. Waits for the device.

    Args:
        w: [N, K], float16, bfloat16, float8_e4m3fn or int8, any strides, on a GPU.
    Returns:
        The bits of orders.to_mma_sp(pack_24(w)); unpack_mma_sp gives `w` back exactly.
    Raises:
        ValueError: a group of 4 along K holds more than two non-zeros (row, columns and count are
            named), or dtype, rank or device are not as above.

    Source: orders.py. Twin: orders.to_mma_sp of reference.pack_24_ref.
    """
    launch = _pack(w, fragments=True)
    n, k = w.shape
    return MmaSp(launch.values, launch.meta, n, k, w.dtype)


def pack_dense_wgmma_sp(w: Tensor) -> WgmmaSp:
    """Dense [N, K] that already is 2:4 -> what wgmma.sp reads. Waits for the device.

    Arguments and errors as pack_dense_mma_sp; the bits of orders.to_wgmma_sp(pack_24(w)).
    """
    launch = _pack(w, fragments=False)
    n, k = w.shape
    return WgmmaSp(launch.values, launch.meta, n, k)
