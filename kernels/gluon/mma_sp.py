"""mma_sp: Y [M, N] = act((X @ W.T) * scale + bias) on the sparse tensor cores, sm_80 and later.

    D [N, M] = W [N, K] X [M, K]^T        W is the sparse A operand, tokens are the columns of D

A program owns [tile.rows, tile.tokens] of D. Weights and metadata lie in register order
(orders.py): each lane reads 16 bytes, straight into the operand of `mma.sp`, tile.ahead steps
early. A step is 64 dense bytes of K: m16n8k32 on 16-bit types, m16n8k64 on 8-bit ones. X goes
through a ring of swizzled shared-memory stages (cp.async, ldmatrix). With warps_k > 1 the warps of
a program share the 512-byte blocks of K among them; with SPLITS > 1 programs do, and write fp32
parts that `add_parts` adds in ascending order: same input, same bytes.

8-bit values are those of scaled_spmm.py: int8 with int32 sums, e4m3 with fp32 ones, and one scale
per token beside the one per out feature.

Few tokens: bound by 1.125 bytes per dense 16-bit weight, 0.625 per 8-bit one. Many tokens: bound by
the rate of mma.sp.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slimgemm.kernels.configs import split_count
from slimgemm.kernels.gluon.compat import barrier, cp_async, cp_async_commit, cp_async_wait
from slimgemm.kernels.gluon.epilogue import finish, scale_tokens
from slimgemm.kernels.gluon.launch import (
    Launch,
    check_dtype,
    check_epilogue,
    check_x,
    is_aligned,
    multiprocessors,
    rows_of,
)
from slimgemm.kernels.gluon.mma_tiles import MmaTile, mma_sp_tile
from slimgemm.kernels.gluon.orders import MMA_BLOCK_BYTES, MMA_ROWS, MmaSp, block_columns
from slimgemm.kernels.gluon.place import place_of

PTX_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
PTX_TYPES_8 = {torch.float8_e4m3fn: "e4m3", torch.int8: "s8"}


@gluon.constexpr_function
def values_per_int32(kind):
    return 4 if kind in ("e4m3", "s8") else 2


@gluon.constexpr_function
def mma_sp_asm(kind, step):
    """PTX of one step: D $0-3, C $4-7 (tied to D), A $8-11, B $12-15, metadata words $16-19."""
    sums = "s32" if kind == "s8" else "f32"
    if kind in ("e4m3", "s8"):
        columns, word, selector = 64, step % 4, 0
    else:
        columns, word, selector = 32, step // 2, step % 2
    types = f"{sums}.{kind}.{kind}.{sums}"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k{columns}.row.col.{types} "
        "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, {$4,$5,$6,$7}, "
        f"${16 + word}, {selector};"
    )


@gluon.constexpr_function
def mma_sp_constraints(kind):
    sums = "=r" if kind == "s8" else "=f"
    return ",".join([sums] * 4 + ["0", "1", "2", "3"] + ["r"] * 12)


@gluon.jit
def mma_sp(acc, a, b, words, KIND: gl.constexpr, STEP: gl.constexpr):
    """acc + A B of every instruction tile; STEP (0..7) picks metadata word and selector."""
    ASM: gl.constexpr = mma_sp_asm(KIND, STEP)
    CONSTRAINTS: gl.constexpr = mma_sp_constraints(KIND)
    return gl.inline_asm_elementwise(
        ASM, CONSTRAINTS, [acc, a, b, words], dtype=acc.dtype, is_pure=False, pack=4
    )


@gluon.jit
def load_words(at, on, MASKED: gl.constexpr, OTHER: gl.constexpr):
    """16 bytes a lane of weights or metadata; OTHER where `on` is false, if it can be."""
    return gl.load(at, mask=on, other=OTHER) if MASKED else gl.load(at)


@gluon.jit
def load_metadata(at, on, MASKED: gl.constexpr, HALVES: gl.constexpr):
    """The words of a block: a tuple of one 16-byte load on 16-bit types, of two on 8-bit ones."""
    words = ()
    for half in gl.static_range(HALVES):
        # 0x44444444 keeps positions 0 and 1 everywhere: ordered metadata must never be zero.
        words = words + (load_words(at + half * 128, on, MASKED, 0x44444444),)  # noqa: RUF005
    return words


@gluon.jit
def copy_x(stage, x_at, mask_m, pair0, shift, K, PER: gl.constexpr, ALIGNED: gl.constexpr):
    """Start the copy of int32 `pair0 + shift` of X into `stage`; zeros past M and K.

    PER: values per int32, 2 or 4.
    """
    pair = pair0 + shift
    if ALIGNED:
        # One test per 16-byte unit, so that the copy stays 16 bytes wide.
        cp_async(stage, x_at + shift, mask=mask_m & (pair // 4 < K // (4 * PER)))
    else:
        first = gl.load(x_at + PER * shift, mask=mask_m & (PER * pair < K), other=0)
        units = first.to(gl.int32) & (65535 if PER == 2 else 255)
        for i in gl.static_range(1, PER):
            on = mask_m & (PER * pair + i < K)
            value = gl.load(x_at + (PER * shift + i), mask=on, other=0).to(gl.int32)
            units |= (value & (65535 if PER == 2 else 255)) << (32 // PER * i)
        stage.store(units)
    cp_async_commit()


@gluon.jit
def _mma_sp_kernel(
    w_ptr, words_ptr, x_ptr, y_ptr, bias_ptr, scale_ptr, token_scale_ptr,
    M, N, K, stride_xm,
    TILE: gl.constexpr, KIND: gl.constexpr, ALIGNED: gl.constexpr, SPLITS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr,
    HAS_TOKEN_SCALE: gl.constexpr, ACT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    PER: gl.constexpr = values_per_int32(KIND)
    HALVES: gl.constexpr = PER // 2
    SUMS: gl.constexpr = gl.int32 if KIND == "s8" else gl.float32
    MT: gl.constexpr = TILE.mt
    NT: gl.constexpr = TILE.nt
    WN: gl.constexpr = TILE.warps_n
    WM: gl.constexpr = TILE.warps_m
    WK: gl.constexpr = TILE.warps_k
    STEPS: gl.constexpr = TILE.steps
    STAGES: gl.constexpr = TILE.stages
    AHEAD: gl.constexpr = TILE.ahead
    SUBS: gl.constexpr = 8 // STEPS  # stages per block of K
    TOKENS: gl.constexpr = TILE.tokens
    ROWS: gl.constexpr = TILE.rows
    FRAGMENT: gl.constexpr = TILE.fragment
    X_FRAGMENT: gl.constexpr = TILE.x_fragment
    X_COPY: gl.constexpr = TILE.x_copy
    X_SHARED: gl.constexpr = TILE.x_shared
    # A lacks the token axes of the fragment, B the row axes: both are broadcast at no cost.
    A_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, FRAGMENT))
    B_LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, FRAGMENT))

    pid_n, pid_m = place_of(gl.program_id(0), M, N, TOKENS, ROWS, GROUP)
    blocks = gl.cdiv(K, 128 * PER)
    per_split = gl.cdiv(gl.cdiv(blocks, WK), SPLITS)
    first = gl.program_id(1) * per_split
    last = gl.minimum(first + per_split, gl.cdiv(blocks, WK))

    mt = gl.arange(0, MT, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, A_LAYOUT))))
    wn = gl.arange(0, WN, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, A_LAYOUT))))
    wk = gl.arange(0, WK, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, A_LAYOUT))))
    e = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, A_LAYOUT))))
    tile = (pid_n * (MT * WN) + wn[None, :, None, None] * MT) + mt[:, None, None, None]
    block0 = wk[None, None, :, None]
    # Rows past the last tile compute it again and are not stored: no mask, no registers for zeros.
    place = gl.minimum(tile, gl.cdiv(N, 16) - 1).to(gl.int64) * blocks + block0
    w = w_ptr + place * 1024 + e[None, None, None, :]
    words_at = words_ptr + place * (128 * HALVES) + e[None, None, None, :]

    # Row of a stage: warp slice of K, then token. Column: an int32 of neighbouring values of X.
    ring = gl.allocate_shared_memory(gl.int32, [STAGES, WK * TOKENS, 16 * STEPS], X_SHARED)
    row = gl.arange(0, WK * TOKENS, layout=gl.SliceLayout(1, X_COPY))
    column = gl.arange(0, 16 * STEPS, layout=gl.SliceLayout(0, X_COPY))
    token = pid_m * TOKENS + row % TOKENS
    row_stride = stride_xm // (4 * PER) * 4 if ALIGNED else stride_xm
    pair0 = (row // TOKENS * 128)[:, None] + column[None, :]
    x_at = x_ptr + (token.to(gl.int64) * row_stride)[:, None] + pair0 * (1 if ALIGNED else PER)

    for s in gl.static_range(STAGES - 1):
        shift = (first + s // SUBS) * (WK * 128) + s % SUBS * (16 * STEPS)
        on = (token < M)[:, None] & (first + s // SUBS < last)
        copy_x(ring.index(s), x_at, on, pair0, shift, K, PER, ALIGNED)
    # `a` holds the fragments of the next AHEAD steps: enough loads in flight to hide memory.
    start = gl.minimum(first, gl.cdiv(blocks, WK) - 1)
    on = start * WK + block0 < blocks
    a = ()
    for s in gl.static_range(AHEAD):
        at = w + (start * (WK * 1024) + s * 128)
        a = a + (load_words(at, on, WK > 1, 0),)  # noqa: RUF005
    words = load_metadata(words_at + start * (WK * 128 * HALVES), on, WK > 1, HALVES)
    acc = gl.zeros([MT, NT, WN, WM, WK, 128], SUMS, layout=FRAGMENT)
    for it in range(first, last):
        # After the last block it is loaded again, and not used.
        after = gl.minimum(it + 1, last - 1)
        next_on = after * WK + block0 < blocks
        # One 64-bit address per block; what is added to it below is an immediate of the load.
        w_it = w + it * (WK * 1024)
        w_after = w + after * (WK * 1024)
        for sub in gl.static_range(SUBS):
            if sub == SUBS - 1:
                at = words_at + after * (WK * 128 * HALVES)
                next_words = load_metadata(at, next_on, WK > 1, HALVES)
            step = (it - first) * SUBS + sub
            cp_async_wait(STAGES - 2)
            # Every warp sees this stage, and has done with the one that is filled below.
            barrier()
            ahead = it + (sub + STAGES - 1) // SUBS
            shift = ahead * (WK * 128) + (sub + STAGES - 1) % SUBS * (16 * STEPS)
            on_x = (token < M)[:, None] & (ahead < last)
            fill = ring.index((step + STAGES - 1) % STAGES)
            copy_x(fill, x_at, on_x, pair0, shift, K, PER, ALIGNED)
            stage = ring.index(step % STAGES)
            for k in gl.static_range(STEPS):
                # Step AHEAD of this one, in this block or in the next.
                if sub * STEPS + k + AHEAD < 8:
                    at = w_it + (sub * STEPS + k + AHEAD) * 128
                    fresh = load_words(at, on, WK > 1, 0)
                else:
                    at = w_after + (sub * STEPS + k + AHEAD - 8) * 128
                    fresh = load_words(at, next_on, WK > 1, 0)
                b = stage.slice(16 * k, 16, dim=1).load(X_FRAGMENT)
                # token (wm, nt, g), pair (r, t) -> [nt, wm, wk, 4 (4 g + t) + r]: registers only.
                b = b.reshape([WK, WM, NT, 8, 4, 4]).permute([2, 1, 0, 3, 5, 4])
                b = gl.convert_layout(b.reshape([NT, WM, WK, 128]), B_LAYOUT, assert_trivial=True)
                acc = mma_sp(
                    acc, a[0][:, None, :, None, :, :], b[None, :, None, :, :, :],
                    words[(sub * STEPS + k) // 4 * (HALVES - 1)][:, None, :, None, :, :],
                    KIND, sub * STEPS + k,
                )  # fmt: skip
                a = a[1:] + (fresh,)  # noqa: RUF005
        words = next_words
        on = next_on
    # The epilogue reuses the ring's shared memory: no copy may still be on its way into it.
    cp_async_wait(0)
    acc = gl.sum(acc, 4)
    if HAS_TOKEN_SCALE:
        acc = scale_tokens(acc.to(gl.float32), token_scale_ptr, M, pid_m, TILE)
    finish(
        acc, y_ptr, bias_ptr, scale_ptr, M, N, pid_m, pid_n,
        TILE, SPLITS, HAS_BIAS, HAS_SCALE, SCALE_PER_ROW, ACT,
    )  # fmt: skip


def prepare(
    x: Tensor,
    w_hw: MmaSp,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: MmaTile | None = None,
    splits: int = 1,
    token_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Launch:
    """What spmm_24_mma_sp launches; the result goes to `out`, or fp32 parts to `parts`.

    With a `token_scale` (fp32 [M]) parts hold both scales: what is left is their sum, bias and act.
    """
    m, n, k = math.prod(x.shape[:-1]), w_hw.n, w_hw.k
    rows = rows_of(x, k)
    aligned = is_aligned(rows)
    tile = tile or mma_sp_tile(m, aligned)
    out = x.new_empty(*x.shape[:-1], n, dtype=out_dtype or x.dtype)
    parts = x.new_empty(splits, m, n, dtype=torch.float32) if splits > 1 else None
    fused = splits == 1
    scale = scale if fused or token_scale is not None else None
    units = torch.int32 if aligned else {2: torch.int16, 1: torch.uint8}[x.element_size()]
    return Launch(
        grid=(triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.tokens), splits),
        args=(
            w_hw.values, w_hw.meta, rows.view(units),
            out.view(m, n) if fused else parts, bias if fused else None, scale, token_scale,
            m, n, k, rows.stride(0),
        ),
        constants=dict(
            TILE=tile, KIND=(PTX_TYPES | PTX_TYPES_8)[x.dtype], ALIGNED=aligned, SPLITS=splits,
            HAS_BIAS=fused and bias is not None, HAS_SCALE=scale is not None,
            SCALE_PER_ROW=scale is not None and scale.numel() > 1,
            HAS_TOKEN_SCALE=token_scale is not None, ACT=act if fused else "none", GROUP=8,
        ),
        warps=tile.warps, out=out, parts=parts,
    )  # fmt: skip


def choose_splits(x: Tensor, w_hw: MmaSp, tile: MmaTile) -> int:
    """Parts of K, so that every multiprocessor has work."""
    m = math.prod(x.shape[:-1])
    programs = triton.cdiv(w_hw.n, tile.rows) * triton.cdiv(m, tile.tokens)
    rounds = triton.cdiv(w_hw.k, block_columns(MMA_BLOCK_BYTES, w_hw.dtype) * tile.warps_k)
    return split_count(programs, rounds, multiprocessors(x.device))


def spmm_24_mma_sp(
    x: Tensor,
    w_hw: MmaSp,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: MmaTile | None = None,
    splits: int | None = None,
) -> Tensor:
    """act((x @ dense(w).T) * scale + bias) on mma.sp.

    Args:
        x: [..., k], bf16 or fp16, stride 1 along k, leading dims fold into one; sm_80 or later.
        w_hw: the weight [N, k] of the same dtype and device in register order (orders.to_mma_sp).
        bias: [N], fp16, bf16 or fp32.
        scale: [N], fp16, bf16 or fp32, or one element for all out features.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile, splits: tile and parts of K; chosen from mma_tiles unless given.
    Returns:
        [..., N], dtype of `x`, contiguous. Accumulated in fp32, the same bytes on every run.
    Raises:
        ValueError: a shape, stride, dtype, device or activation is not as above.

    Source: orders.py; PTX ISA, mma.sp. Twin: reference.spmm_24_ref on the Packed24.
    """
    from slimgemm.kernels.spmm_24 import add_parts

    check_dtype(w_hw.dtype, PTX_TYPES, "scaled_spmm_24_mma_sp multiplies 8-bit weights")
    check_x(x, w_hw.n, w_hw.k, w_hw.dtype, w_hw.values.device, (8, 0))
    check_epilogue(w_hw.n, x, bias, scale, act)
    m = math.prod(x.shape[:-1])
    if m == 0 or w_hw.n == 0:
        return x.new_empty(*x.shape[:-1], w_hw.n)
    tile = tile or mma_sp_tile(m, is_aligned(rows_of(x, w_hw.k)))
    splits = splits or choose_splits(x, w_hw, tile)
    launch = prepare(x, w_hw, bias, scale, act, tile=tile, splits=splits)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        _mma_sp_kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.warps)
        if launch.parts is not None:
            if scale is not None and scale.numel() == 1:
                scale = scale.reshape(1).expand(w_hw.n).contiguous()
            add_parts(launch.parts, launch.out.view(m, w_hw.n), bias, scale, act)
    return launch.out


assert MMA_ROWS == 16 and MMA_BLOCK_BYTES == 512  # the numbers written out in the kernel
