"""mma_packed: Y = act((X @ W.T) * scale + bias) on mma.sp, from the canonical Packed24 as it is.

    D [N, M] = W [N, K] X [M, K]^T        W is the sparse A operand, tokens are the columns of D

No hardware order is made or kept: a product sums over K in any order, so the columns of W may meet
the instruction permuted, as long as those of X are. Within 64 columns (16 groups of 4), lane t of a
quad reads 16 bytes of its row, groups 4 t ... 4 t + 3, where the instruction order has groups
t, t + 4, t + 8, t + 12: a 4 x 4 transposition of groups. X undergoes it on its way into shared
memory (cp.async of 8 bytes, one group each), the metadata in registers:

    word of lane t = nibble t of each of the four 16-bit quarters of the row's 8 bytes of metadata

because selector s of step s reads the lanes 2 s and 2 s + 1, and lane 2 s + q holds the groups that
step s has in register pair q. Everything else is as in mma_sp.py: ring of X, warps along K, splits
whose fp32 parts `add_parts` adds in ascending order. Same input, same bytes.

Reads 1.125 bytes per dense 16-bit weight, in whole sectors: 64 bytes of a row per quad and load.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slimgemm.kernels.configs import split_count
from slimgemm.kernels.formats import Packed24, check_shapes
from slimgemm.kernels.gluon.compat import barrier, cp_async, cp_async_commit, cp_async_wait
from slimgemm.kernels.gluon.epilogue import finish
from slimgemm.kernels.gluon.launch import (
    Launch,
    check_epilogue,
    check_x,
    folds,
    is_aligned,
    multiprocessors,
    rows_of,
)
from slimgemm.kernels.gluon.mma_tiles import MmaTile
from slimgemm.kernels.gluon.place import place_of

PTX_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
COLUMNS = 32  # K must be a multiple: whole int32 of metadata, whole 16-byte units of values


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
    32: PackedTile(mt=1, nt=4, warps_n=4, warps_m=1, warps_k=2, steps=4, stages=3, ahead=4),
    64: PackedTile(mt=2, nt=4, warps_n=2, warps_m=2, warps_k=2, steps=4, stages=3, ahead=4),
    128: PackedTile(mt=2, nt=4, warps_n=4, warps_m=2, warps_k=1, steps=4, stages=3, ahead=2),
}


def mma_packed_tile(m: int, aligned: bool = True) -> PackedTile:
    """The tile for `m` tokens of an x whose rows are 16-byte aligned, or are not."""
    if not aligned:
        # Such an x passes through registers: 32 tokens and short stages are what fits beside A.
        return dataclasses.replace(mma_packed_tile(min(m, 32)), steps=2, ahead=2)
    return next((t for most, t in MMA_PACKED_TILES.items() if m <= most), MMA_PACKED_TILES[128])


@gluon.constexpr_function
def mma_packed_asm(kind, step):
    """PTX of one step: D $0-3, C $4-7 (tied to D), rows g $8-11, g + 8 $12-15, B $16-19, words."""
    q = 2 * (step % 2)
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{${8 + q},${12 + q},${9 + q},${13 + q}}}, "
        f"{{$16,$17,$18,$19}}, {{$4,$5,$6,$7}}, ${20 + step // 2}, {step % 2};"
    )


@gluon.jit
def mma_packed(acc, low, high, b, words, KIND: gl.constexpr, STEP: gl.constexpr):
    """acc + A B; `low`, `high`: four groups of rows g and g + 8, two for each of two steps."""
    ASM: gl.constexpr = mma_packed_asm(KIND, STEP)
    return gl.inline_asm_elementwise(
        ASM,
        "=f,=f,=f,=f,0,1,2,3,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [acc, low, high, b, words],
        dtype=gl.float32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def load_values(at, k0, K, PAIR: gl.constexpr, MASKED: gl.constexpr):
    """16 bytes a lane of the PAIR-th 64 columns from `at`, where dense column `k0` lies."""
    return (
        gl.load(at + PAIR * 16, mask=k0 + PAIR * 64 < K, other=0)
        if MASKED
        else gl.load(at + PAIR * 16)
    )


@gluon.jit
def load_meta(at, column, K, MASKED: gl.constexpr):
    """Metadata of 256 columns; 0x44444444 past K, since ordered metadata must never be zero.

    `column` is the same for words that K holds all or none of, so that a load stays that wide.
    """
    return gl.load(at, mask=column < K, other=0x44444444) if MASKED else gl.load(at)


@gluon.jit
def copy_groups(stage, x_at, mask_m, group0, shift, K, ALIGNED: gl.constexpr):
    """Start the copy of pairs `shift` further of X into `stage`; zeros past M and K."""
    on = mask_m & ((group0 + shift // 2) * 4 < K)
    if ALIGNED:
        cp_async(stage, x_at + shift, mask=on)
    else:
        low = gl.load(x_at + 2 * shift, mask=on, other=0)
        high = gl.load(x_at + (2 * shift + 1), mask=on, other=0)
        stage.store((low.to(gl.int32) & 0xFFFF) | (high.to(gl.int32) << 16))
    cp_async_commit()


@gluon.jit
def nibbles(meta, t, A_LAYOUT: gl.constexpr, MT: gl.constexpr, WN: gl.constexpr, WK: gl.constexpr):
    """meta [MT, WN, WK, 8 lane + word] of a row -> 16 bits of each of a lane's four words.

    Word j: nibble t of each 16-bit quarter of words 2 j and 2 j + 1, first quarter lowest.
    """
    lo, hi = gl.split(meta.reshape([MT, WN, WK, 32, 4, 2]))
    lo = gl.convert_layout(lo.reshape([MT, WN, WK, 128]), A_LAYOUT, assert_trivial=True)
    hi = gl.convert_layout(hi.reshape([MT, WN, WK, 128]), A_LAYOUT, assert_trivial=True)
    lo = (lo >> (4 * t)) & 0x000F000F
    hi = (hi >> (4 * t)) & 0x000F000F
    return ((lo | (lo >> 12)) & 0xFF) | (((hi | (hi >> 12)) & 0xFF) << 8)


@gluon.jit
def _mma_packed_kernel(
    v_ptr, m_ptr, x_ptr, y_ptr, bias_ptr, scale_ptr,
    M, N, K, stride_xm,
    TILE: gl.constexpr, KIND: gl.constexpr, ALIGNED: gl.constexpr, SPLITS: gl.constexpr,
    MASKED: gl.constexpr, META_UNIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr,
    ACT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    MT: gl.constexpr = TILE.mt
    NT: gl.constexpr = TILE.nt
    WN: gl.constexpr = TILE.warps_n
    WM: gl.constexpr = TILE.warps_m
    WK: gl.constexpr = TILE.warps_k
    STEPS: gl.constexpr = TILE.steps
    STAGES: gl.constexpr = TILE.stages
    AHEAD: gl.constexpr = TILE.ahead // 2  # loads, of 64 columns each
    SUBS: gl.constexpr = 8 // STEPS  # stages per 256-column block
    TOKENS: gl.constexpr = TILE.tokens
    ROWS: gl.constexpr = TILE.rows
    FRAGMENT: gl.constexpr = TILE.fragment
    META: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, TILE.meta_fragment))
    X_FRAGMENT: gl.constexpr = TILE.x_fragment
    X_COPY: gl.constexpr = TILE.x_copy
    X_SHARED: gl.constexpr = TILE.x_shared
    # A lacks the token axes of the fragment, B the row axes: both are broadcast at no cost.
    A_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, FRAGMENT))
    B_LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, FRAGMENT))

    pid_n, pid_m = place_of(gl.program_id(0), M, N, TOKENS, ROWS, GROUP)
    blocks = gl.cdiv(K, 256)
    per_split = gl.cdiv(gl.cdiv(blocks, WK), SPLITS)
    first = gl.program_id(1) * per_split
    last = gl.minimum(first + per_split, gl.cdiv(blocks, WK))

    # ---- where a lane reads its values (int32 pairs) and metadata (int32, 32 columns)
    mt = gl.arange(0, MT, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, A_LAYOUT))))
    wn = gl.arange(0, WN, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, A_LAYOUT))))
    wk = gl.arange(0, WK, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, A_LAYOUT))))
    e = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, A_LAYOUT))))
    t = (e // 4 % 4)[None, None, None, :]
    row = ((pid_n * (MT * WN) + wn[None, :] * MT + mt[:, None]) * 16)[:, :, None, None]
    row = row + (e // 16)[None, None, None, :]
    k0 = wk[None, None, :, None] * 256 + t * 16  # dense column of the lane's 16 bytes
    at = v_ptr + (wk * 64)[None, None, :, None] + (t * 4 + (e % 4)[None, None, None, :])
    # Rows past N compute the last one again and are not stored: no mask, no registers for zeros.
    v_low = at + gl.minimum(row, N - 1).to(gl.int64) * (K // 16 * 4)
    v_high = at + gl.minimum(row + 8, N - 1).to(gl.int64) * (K // 16 * 4)

    mmt = gl.arange(0, MT, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, META))))
    mwn = gl.arange(0, WN, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, META))))
    mwk = gl.arange(0, WK, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, META))))
    u = gl.arange(0, 256, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, META))))
    mrow = ((pid_n * (MT * WN) + mwn[None, :] * MT + mmt[:, None]) * 16)[:, :, None, None]
    mrow = mrow + (u // 32)[None, None, None, :]
    word0 = mwk[None, None, :, None] * 8 + (u % 8)[None, None, None, :]
    column0 = mwk[None, None, :, None] * 256
    column0 = column0 + (u // META_UNIT % (8 // META_UNIT) * (32 * META_UNIT))[None, None, None, :]
    pitch = K // (32 * META_UNIT) * META_UNIT
    m_low = m_ptr + word0 + gl.minimum(mrow, N - 1).to(gl.int64) * pitch
    m_high = m_ptr + word0 + gl.minimum(mrow + 8, N - 1).to(gl.int64) * pitch

    # ---- X: row of a stage = warp slice of K, then token; groups transposed 4 x 4 in 64 columns
    ring = gl.allocate_shared_memory(gl.int32, [STAGES, WK * TOKENS, 16 * STEPS], X_SHARED)
    line = gl.arange(0, WK * TOKENS, layout=gl.SliceLayout(1, X_COPY))
    pair = gl.arange(0, 16 * STEPS, layout=gl.SliceLayout(0, X_COPY))
    token = pid_m * TOKENS + line % TOKENS
    row_stride = stride_xm // 8 * 4 if ALIGNED else stride_xm
    group = pair // 32 * 16 + pair // 2 % 4 * 4 + pair // 8 % 4
    group0 = (line // TOKENS * 64)[:, None] + group[None, :]
    source = (line // TOKENS * 128)[:, None] + (group * 2 + pair % 2)[None, :]
    x_at = x_ptr + (token.to(gl.int64) * row_stride)[:, None] + source * (1 if ALIGNED else 2)

    for s in gl.static_range(STAGES - 1):
        shift = (first + s // SUBS) * (WK * 128) + s % SUBS * (16 * STEPS)
        on = (token < M)[:, None] & (first + s // SUBS < last)
        copy_groups(ring.index(s), x_at, on, group0, shift, K, ALIGNED)
    start = gl.minimum(first, gl.cdiv(blocks, WK) - 1)
    lows = ()
    highs = ()
    for pair in gl.static_range(AHEAD):
        k_it = start * (WK * 256) + k0
        low = load_values(v_low + start * (WK * 64), k_it, K, pair, MASKED)
        high = load_values(v_high + start * (WK * 64), k_it, K, pair, MASKED)
        lows = lows + (low,)  # noqa: RUF005
        highs = highs + (high,)  # noqa: RUF005
    next_low = load_meta(m_low + start * (WK * 8), start * (WK * 256) + column0, K, MASKED)
    next_high = load_meta(m_high + start * (WK * 8), start * (WK * 256) + column0, K, MASKED)
    acc = gl.zeros([MT, NT, WN, WM, WK, 128], gl.float32, layout=FRAGMENT)
    for it in range(first, last):
        words = nibbles(next_low, t, A_LAYOUT, MT, WN, WK)
        words = words | (nibbles(next_high, t, A_LAYOUT, MT, WN, WK) << 16)
        # After the last block it is loaded again, and not used.
        after = gl.minimum(it + 1, last - 1)
        # One 64-bit address per block; what is added to it below is an immediate of the load.
        low_it = v_low + it * (WK * 64)
        high_it = v_high + it * (WK * 64)
        low_after = v_low + after * (WK * 64)
        high_after = v_high + after * (WK * 64)
        k_it = it * (WK * 256) + k0
        k_after = after * (WK * 256) + k0
        column_after = after * (WK * 256) + column0
        next_low = load_meta(m_low + after * (WK * 8), column_after, K, MASKED)
        next_high = load_meta(m_high + after * (WK * 8), column_after, K, MASKED)
        for sub in gl.static_range(SUBS):
            step = (it - first) * SUBS + sub
            cp_async_wait(STAGES - 2)
            # Every warp sees this stage, and has done with the one that is filled below.
            barrier()
            ahead = it + (sub + STAGES - 1) // SUBS
            shift = ahead * (WK * 128) + (sub + STAGES - 1) % SUBS * (16 * STEPS)
            on = (token < M)[:, None] & (ahead < last)
            copy_groups(
                ring.index((step + STAGES - 1) % STAGES), x_at, on, group0, shift, K, ALIGNED
            )
            stage = ring.index(step % STAGES)
            for k in gl.static_range(STEPS):
                b = stage.slice(16 * k, 16, dim=1).load(X_FRAGMENT)
                # token (wm, nt, g), pair (r, t) -> [nt, wm, wk, 4 (4 g + t) + r]: registers only.
                b = b.reshape([WK, WM, NT, 8, 4, 4]).permute([2, 1, 0, 3, 5, 4])
                b = gl.convert_layout(b.reshape([NT, WM, WK, 128]), B_LAYOUT, assert_trivial=True)
                acc = mma_packed(
                    acc, lows[0][:, None, :, None, :, :], highs[0][:, None, :, None, :, :],
                    b[None, :, None, :, :, :], words[:, None, :, None, :, :],
                    KIND, sub * STEPS + k,
                )  # fmt: skip
                if k % 2 == 1:
                    # 64 columns are done: load those AHEAD of them, in this block or in the next.
                    if (sub * STEPS + k) // 2 + AHEAD < 4:
                        low = load_values(low_it, k_it, K, (sub * STEPS + k) // 2 + AHEAD, MASKED)
                        high = load_values(high_it, k_it, K, (sub * STEPS + k) // 2 + AHEAD, MASKED)
                    else:
                        low = load_values(
                            low_after, k_after, K, (sub * STEPS + k) // 2 + AHEAD - 4, MASKED
                        )
                        high = load_values(
                            high_after, k_after, K, (sub * STEPS + k) // 2 + AHEAD - 4, MASKED
                        )
                    lows = lows[1:] + (low,)  # noqa: RUF005
                    highs = highs[1:] + (high,)  # noqa: RUF005
    # The epilogue reuses the ring's shared memory: no copy may still be on its way into it.
    cp_async_wait(0)
    finish(
        gl.sum(acc, 4), y_ptr, bias_ptr, scale_ptr, M, N, pid_m, pid_n,
        TILE, SPLITS, HAS_BIAS, HAS_SCALE, SCALE_PER_ROW, ACT,
    )  # fmt: skip


def why_not(packed: Packed24) -> str:
    """What keeps `packed` from these kernels, or nothing."""
    if (packed.keep, packed.group) != (2, 4):
        return f"keep:group must be 2:4 for mma.sp, got {packed.keep}:{packed.group}"
    if packed.values.dtype not in PTX_TYPES:
        return f"values must be float16 or bfloat16, got {packed.values.dtype}"
    if packed.k == 0 or packed.k % COLUMNS:
        return f"k must be a positive multiple of {COLUMNS}, got {packed.k}; spmm_24 takes any"
    for name, part in (("values", packed.values), ("meta", packed.meta)):
        if not part.is_contiguous() or part.data_ptr() % 16:
            return f"{name} must be contiguous and 16-byte aligned; clone it first"
    return ""


def takes(x: Tensor, packed: Packed24) -> bool:
    """True if spmm_24_mma_packed runs on this weight and x."""
    return (
        not why_not(packed)
        and x.dtype == packed.values.dtype
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and folds(x)
    )


def prepare(
    x: Tensor,
    packed: Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: PackedTile | None = None,
    splits: int = 1,
) -> Launch:
    """What spmm_24_mma_packed launches; the result goes to `out`, or fp32 parts to `parts`."""
    m, (n, k) = math.prod(x.shape[:-1]), packed.shape
    rows = rows_of(x, k)
    aligned = is_aligned(rows)
    tile = tile or mma_packed_tile(m, aligned)
    out = x.new_empty(*x.shape[:-1], n)
    parts = x.new_empty(splits, m, n, dtype=torch.float32) if splits > 1 else None
    fused = splits == 1
    return Launch(
        grid=(triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.tokens), splits),
        args=(
            packed.values.view(torch.int32), packed.meta.view(torch.int32),
            rows.view(torch.int32 if aligned else torch.int16),
            out.view(m, n) if fused else parts, bias if fused else None, scale if fused else None,
            m, n, k, rows.stride(0),
        ),
        constants=dict(
            TILE=tile, KIND=PTX_TYPES[x.dtype], ALIGNED=aligned, SPLITS=splits,
            MASKED=k % (256 * tile.warps_k) != 0, META_UNIT=math.gcd(k // COLUMNS, 4),
            HAS_BIAS=fused and bias is not None, HAS_SCALE=fused and scale is not None,
            SCALE_PER_ROW=scale is not None and scale.numel() > 1, ACT=act if fused else "none",
            GROUP=8,
        ),
        warps=tile.warps, out=out, parts=parts,
    )  # fmt: skip


def spmm_24_mma_packed(
    x: Tensor,
    packed: Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: PackedTile | None = None,
    splits: int | None = None,
) -> Tensor:
    """act((x @ dense(w).T) * scale + bias) on mma.sp, from the canonical format.

    Args:
        x: [..., k], bf16 or fp16, stride 1 along k, leading dims fold into one; sm_80 or later.
        packed: 2:4 weight [N, k] of the same dtype and device; k a multiple of 32.
        bias: [N], fp16, bf16 or fp32.
        scale: [N], fp16, bf16 or fp32, or one element for all out features.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile, splits: tile and parts of K; chosen from MMA_PACKED_TILES unless given.
    Returns:
        [..., N], dtype of `x`, contiguous. Accumulated in fp32, the same bytes on every run.
    Raises:
        ValueError: a shape, stride, dtype, device or activation is not as above.

    Source: kernels/formats.py; PTX ISA, mma.sp. Twin: reference.spmm_24_ref.
    """
    from slimgemm.kernels.spmm_24 import add_parts

    check_shapes(packed)
    if reason := why_not(packed):
        raise ValueError(reason)
    n, k = packed.shape
    check_x(x, n, k, packed.values.dtype, packed.values.device, (8, 0))
    check_epilogue(n, x, bias, scale, act)
    m = math.prod(x.shape[:-1])
    if m == 0 or n == 0:
        return x.new_empty(*x.shape[:-1], n)
    tile = tile or mma_packed_tile(m, is_aligned(rows_of(x, k)))
    if splits is None:
        programs = triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.tokens)
        rounds = triton.cdiv(k, 256 * tile.warps_k)
        splits = split_count(programs, rounds, multiprocessors(x.device))
    launch = prepare(x, packed, bias, scale, act, tile=tile, splits=splits)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        _mma_packed_kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.warps)
        if launch.parts is not None:
            if scale is not None and scale.numel() == 1:
                scale = scale.reshape(1).expand(n).contiguous()
            add_parts(launch.parts, launch.out.view(m, n), bias, scale, act)
    return launch.out
