"""unpack_mma_sp, unpack_wgmma_sp: the hardware orders -> dense [N, K], exactly.

A program writes what one of pack_dense.py reads: 8 KiB of the dense weight, 16 bytes a lane. It
gathers the compressed values and metadata words that belong there, 4 bytes at a time, from a few
KiB.

Bound by memory: reads 1.125 and writes 2 bytes per 16-bit weight, 0.625 and 1 per 8-bit one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slimgemm.kernels.gluon.orders import MmaSp, WgmmaSp
from slimgemm.kernels.gluon.pack_dense import WARPS, PackLaunch, pair_layout, raw, unit_layout


@gluon.jit
def expand(low, high, nibble):
    """The four weights (bits) of each group: the inverse of `compress`."""
    first, second = nibble & 3, (nibble >> 2) & 3
    zero = low & 0
    w0 = gl.where(first == 0, low, zero)
    w1 = gl.where(first == 1, low, gl.where(second == 1, high, zero))
    w2 = gl.where(first == 2, low, gl.where(second == 2, high, zero))
    w3 = gl.where(second == 3, high, zero)
    return w0, w1, w2, w3


@gluon.jit
def load_packed(
    values_ptr, words_ptr, row0, block, N, QUADS,
    SIZE: gl.constexpr, ROWS: gl.constexpr, PAIRS: gl.constexpr, FRAGMENTS: gl.constexpr,
):  # fmt: skip
    """(compressed int32, its nibbles), both [ROWS, PAIRS]; zero values past the weight."""
    LAYOUT: gl.constexpr = pair_layout(PAIRS)
    WORDS: gl.constexpr = PAIRS // 16 if SIZE == 2 else 4  # of a lane, one after the other
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    half, g = row // 8 % 2, row % 8
    pid = gl.program_id(0).to(gl.int64)
    if FRAGMENTS:
        lane = g * 4 + pair % 4
        at = pair // 8 * 128 + lane * 4 + pair // 4 % 2 * 2 + half
        values = gl.load(values_ptr + pid * 1024 + at)
    else:
        column = block * PAIRS + pair
        at = (row0 + row).to(gl.int64) * QUADS * 4 + column
        mask = (row0 + row < N) & (column < QUADS * 4)
        values = gl.load(values_ptr + at, mask=mask, other=0)
    if SIZE == 2:
        lane = g * 4 + pair // 4 % 4
        at = (row // 16 * 32 + lane) * WORDS + pair // 16
        nibbles = gl.load(words_ptr + pid * 128 + at) >> (16 * half + pair % 4 * 4)
    else:
        lane = g * 4 + pair // 4 % 2 * 2 + half
        at = ((row // 16 + pair // 32) * 32 + lane) * WORDS + pair // 8 % 4
        nibbles = gl.load(words_ptr + pid * 256 + at) >> (pair % 4 * 8)
    return values, nibbles


@gluon.jit
def _unpack_dense_kernel(
    values_ptr, words_ptr, w_ptr, N, K, BLOCKS, QUADS,
    SIZE: gl.constexpr, ALIGNED: gl.constexpr, FRAGMENTS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = 16 if FRAGMENTS else 32
    PAIRS: gl.constexpr = 64 if FRAGMENTS else 32
    PARTS: gl.constexpr = 1 if FRAGMENTS else 4
    UNITS: gl.constexpr = unit_layout(2 * PAIRS)
    PER: gl.constexpr = 4 // SIZE
    block = gl.program_id(0) // PARTS % BLOCKS
    row0 = (gl.program_id(0) // PARTS // BLOCKS * PARTS + gl.program_id(0) % PARTS) * ROWS
    values, nibbles = load_packed(
        values_ptr, words_ptr, row0, block, N, QUADS, SIZE, ROWS, PAIRS, FRAGMENTS
    )
    if SIZE == 2:
        w0, w1, w2, w3 = expand(values & 0xFFFF, (values >> 16) & 0xFFFF, nibbles)
        even, odd = w0 | (w1 << 16), w2 | (w3 << 16)
    else:
        w0, w1, w2, w3 = expand(values & 0xFF, (values >> 8) & 0xFF, nibbles)
        even = w0 | (w1 << 8) | (w2 << 16) | (w3 << 24)
        w0, w1, w2, w3 = expand((values >> 16) & 0xFF, (values >> 24) & 0xFF, nibbles >> 4)
        odd = w0 | (w1 << 8) | (w2 << 16) | (w3 << 24)
    units = gl.convert_layout(gl.join(even, odd).reshape([ROWS, 2 * PAIRS]), UNITS)
    row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, UNITS))
    unit = block * (2 * PAIRS) + gl.arange(0, 2 * PAIRS, layout=gl.SliceLayout(0, UNITS))
    inside = (row < N)[:, None]
    if ALIGNED:
        at = w_ptr + (row.to(gl.int64) * (K // (4 * PER)) * 4)[:, None] + unit[None, :]
        gl.store(at, units, mask=inside & (unit // 4 < K // (4 * PER))[None, :])
    else:
        for i in gl.static_range(PER):
            column = unit * PER + i
            at = w_ptr + (row.to(gl.int64) * K)[:, None] + column[None, :]
            value = (units >> (8 * SIZE * i)).to(w_ptr.dtype.element_ty)
            gl.store(at, value, mask=inside & (column < K)[None, :])


def prepare_unpack(weight: MmaSp | WgmmaSp) -> PackLaunch:
    """The launch that writes the dense weight to `values`."""
    fragments = isinstance(weight, MmaSp)
    dtype = weight.dtype if isinstance(weight, MmaSp) else weight.values.dtype
    n, k, per = weight.n, weight.k, 16 // dtype.itemsize
    tiles, blocks = weight.meta.shape[:2]
    dense = weight.values.new_empty(n, k, dtype=dtype)
    aligned = k % per == 0
    return PackLaunch(
        grid=(tiles * blocks * (1 if fragments else 4),),
        args=(
            weight.values.view(torch.int32), weight.meta, raw(dense, aligned),
            n, k, blocks, 0 if fragments else weight.values.shape[1] // per,
        ),
        constants=dict(SIZE=dtype.itemsize, ALIGNED=aligned, FRAGMENTS=fragments),
        warps=WARPS, values=dense, meta=weight.meta, bad=weight.meta.new_empty(0),
    )  # fmt: skip


def _unpack(weight: MmaSp | WgmmaSp) -> Tensor:
    if not weight.values.is_cuda:
        raise ValueError(
            f"weight must be on a GPU, got {weight.values.device}; "
            "orders.py and unpack_24 take CPU tensors"
        )
    launch = prepare_unpack(weight)
    if launch.values.numel():
        with torch.cuda.device(weight.values.device):
            _unpack_dense_kernel[launch.grid](*launch.args, **launch.constants, num_warps=WARPS)
    return launch.values


def unpack_mma_sp(weight: MmaSp) -> Tensor:
    """Dense [n, k] of a weight in the order of mma.sp on a GPU, exactly; -0.0 comes back as +0.0.

    Raises:
        ValueError: not on a GPU.

    Twin: reference.unpack_24_ref of orders.from_mma_sp.
    """
    return _unpack(weight)


def unpack_wgmma_sp(weight: WgmmaSp) -> Tensor:
    """Dense [n, k] of a weight in the order of wgmma.sp on a GPU, exactly; see unpack_mma_sp."""
    return _unpack(weight)
