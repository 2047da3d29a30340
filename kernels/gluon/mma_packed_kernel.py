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

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slimgemm.kernels.gluon.compat import barrier, cp_async, cp_async_commit, cp_async_wait
from slimgemm.kernels.gluon.epilogue import finish
from slimgemm.kernels.gluon.place import place_of


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
def copy_pixels(
    stage, x_ptr, piece, image, top, left, mask_m, column, IMAGE: gl.constexpr,
):  # fmt: skip
    """As copy_groups, of NHWC images: `column` [lines] is the first of the stage, all of one tap.

    `image`, `top`, `left`: where in x the window of each line begins; zeros outside the image.
    """
    tap = column // IMAGE.channels
    row = top + tap // IMAGE.kernel_width * IMAGE.dilation_y
    pixel = left + tap % IMAGE.kernel_width * IMAGE.dilation_x
    on = mask_m & (tap < IMAGE.taps)
    on = on & (row >= 0) & (row < IMAGE.height) & (pixel >= 0) & (pixel < IMAGE.width)
    where = image.to(gl.int64) * (IMAGE.height * IMAGE.width) + (row * IMAGE.width + pixel)
    where = where * (IMAGE.channels // 2) + column % IMAGE.channels // 2
    # Whole stages of whole taps: what the division hides from the compiler.
    where = gl.multiple_of(where, 32)
    cp_async(stage, x_ptr + where[:, None] + piece[None, :], mask=on[:, None])
    cp_async_commit()


@gluon.jit
def copy_stage(
    stage, x_ptr, x_at, group0, piece, line, image, top, left, on, shift, K,
    ALIGNED: gl.constexpr, TOKENS: gl.constexpr, IMAGE: gl.constexpr,
):  # fmt: skip
    """Start the copy of the stage whose first pair of columns is `shift`, where `on` [lines]."""
    if IMAGE is None:
        copy_groups(stage, x_at, on[:, None], group0, shift, K, ALIGNED)
    else:
        copy_pixels(
            stage, x_ptr, piece, image, top, left, on, shift * 2 + line // TOKENS * 256, IMAGE
        )


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
    MASKED: gl.constexpr, META_UNIT: gl.constexpr, IMAGE: gl.constexpr,
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
    piece = group * 2 + pair % 2
    source = (line // TOKENS * 128)[:, None] + piece[None, :]
    x_at = x_ptr + (token.to(gl.int64) * row_stride)[:, None] + source * (1 if ALIGNED else 2)
    image = token
    top = token
    left = token
    if IMAGE is not None:
        image = token // (IMAGE.out_height * IMAGE.out_width)
        place = token % (IMAGE.out_height * IMAGE.out_width)
        top = place // IMAGE.out_width * IMAGE.stride_y - IMAGE.top
        left = place % IMAGE.out_width * IMAGE.stride_x - IMAGE.left

    for s in gl.static_range(STAGES - 1):
        shift = (first + s // SUBS) * (WK * 128) + s % SUBS * (16 * STEPS)
        on = (token < M) & (first + s // SUBS < last)
        copy_stage(
            ring.index(s), x_ptr, x_at, group0, piece, line, image, top, left, on, shift, K,
            ALIGNED, TOKENS, IMAGE,
        )  # fmt: skip
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
            on = (token < M) & (ahead < last)
            copy_stage(
                ring.index((step + STAGES - 1) % STAGES), x_ptr, x_at, group0, piece, line,
                image, top, left, on, shift, K, ALIGNED, TOKENS, IMAGE,
            )  # fmt: skip
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
