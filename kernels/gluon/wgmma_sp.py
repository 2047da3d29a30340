"""wgmma_sp: Y [M, N] = act((X @ W.T) * scale + bias) on the sparse tensor cores of Hopper, sm_90a.

    D [N, M] = W [N, K] X [M, K]^T        W is the sparse A operand, tokens are the columns of D

Persistent: as many programs as multiprocessors, each walks output tiles of 128 rows x tile.tokens.
One producer warp fills a ring of shared-memory stages by TMA (a stage is 256 dense bytes of K, four
steps of m64nNk32 on 16-bit types or of m64nNk64 on 8-bit ones: a unit of compressed W, two halves
of X); two consumer warpgroups own 64 rows each and run
`wgmma.mma_async.sp`. Metadata goes from memory to registers, one block early. TMA reads zeros past
N, M and K; the store is masked. TMA moves 8-bit values (scaled_spmm.py) in pairs, as int16.

Bound by the rate of wgmma.sp and, with A in shared memory, by shared-memory reads: 18 KiB per
m64n256k32 of 128 cycles is 144 bytes per cycle where 128 are to be had (NOTES.md).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.gluon.compat import (
    ADDRESS_IS_GIVEN,
    arena_address,
    arena_at_zero,
    tma_load,
)
from slimgemm.kernels.gluon.epilogue import activate
from slimgemm.kernels.gluon.launch import (
    Launch,
    TmaView,
    check_dtype,
    check_epilogue,
    check_x,
    is_aligned,
    multiprocessors,
    rows_of,
    tma_view,
)
from slimgemm.kernels.gluon.mma_sp import PTX_TYPES_8, values_per_int32
from slimgemm.kernels.gluon.orders import WGMMA_BLOCK_BYTES, WGMMA_ROWS, WgmmaSp
from slimgemm.kernels.gluon.place import place_of
from slimgemm.kernels.gluon.plans import on_device_of
from slimgemm.kernels.gluon.wgmma_image import load_pixels, pixel_of
from slimgemm.kernels.gluon.wgmma_ptx import descriptor, wgmma_sp_asm, wgmma_sp_constraints
from slimgemm.kernels.gluon.wgmma_tiles import WgmmaTile, wgmma_sp_tile

PTX_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
ARENA_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int16: gl.int16}


@gluon.jit
def producer(
    w_desc, x_desc, arena, full, empty, M, N, K,
    TILE: gl.constexpr, PER: gl.constexpr, GROUP: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Fill stage after stage, over all tiles of this program."""
    TOKENS: gl.constexpr = TILE.tokens
    UNITS: gl.constexpr = TILE.units
    STAGES: gl.constexpr = TILE.stages
    BOX: gl.constexpr = TILE.box
    blocks = gl.cdiv(K, 64 * PER)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(N, 128) * gl.cdiv(M, TOKENS), gl.num_programs(0)):
        pid_n, pid_m = place_of(tile, M, N, TOKENS, 128, GROUP)
        for block in range(0, blocks):
            slot = step % STAGES
            # The first round finds every slot empty: that wait is for the phase before the first.
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), UNITS * 16384)
            unit = slot * UNITS
            tma_load(w_desc, [pid_n * 128, block * 64], full.index(slot), arena.index(unit))
            if BOXES is None:
                # Boxes of X: all tokens of one half of the block's columns, then of the other.
                for box in gl.static_range(2 * TOKENS // BOX):
                    view = arena.index(unit + 1 + box * BOX // 128)
                    if BOX < 128:
                        view = view.slice(box * BOX % 128, BOX, dim=0)
                    row = pid_m * TOKENS + box * BOX % TOKENS
                    at_k = block * 128 + box * BOX // TOKENS * 64
                    tma_load(x_desc, [row, at_k], full.index(slot), view)
            else:
                load_pixels(x_desc, arena, unit + 1, full.index(slot), pid_m, block, K, BOXES)
            step += 1


@gluon.jit
def store_tokens(
    acc, y_ptr, first_m, first_n, M, N,
    TOKENS: gl.constexpr, OUT: gl.constexpr, ACT: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Activation of acc [64, TOKENS], and its transpose to rows first_m ... of Y."""
    y = activate(acc, ACT).to(y_ptr.dtype.element_ty).permute([1, 0])
    # Through shared memory, so that a lane stores 16 bytes of one token.
    y = gl.convert_layout(y, OUT)
    token = first_m + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, OUT))
    feature = first_n + gl.arange(0, 64, layout=gl.SliceLayout(0, OUT))
    line = token
    on = token < M
    if BOXES is not None:
        line, on = pixel_of(token, BOXES)
    at = y_ptr + (line.to(gl.int64) * N)[:, None] + feature[None, :]
    gl.store(at, y, mask=on[:, None] & (feature < N)[None, :])


@gluon.jit
def store_half(
    acc, y_ptr, first_m, first_n, M, N,
    TOKENS: gl.constexpr, OUT: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """store_tokens in two parts; the branches keep the second from being begun before its turn."""
    low, high = gl.split(acc.reshape([64, 2, TOKENS // 2]).permute([0, 2, 1]))
    if first_m < M:
        store_tokens(low, y_ptr, first_m, first_n, M, N, TOKENS // 2, OUT, ACT, None)
    if first_m + TOKENS // 2 < M:
        store_tokens(high, y_ptr, first_m + TOKENS // 2, first_n, M, N, TOKENS // 2, OUT, ACT, None)


@gluon.jit
def load_words(
    ptr, pid_n, block, row, column, N, K,
    WG: gl.constexpr, ORDERED: gl.constexpr, PER: gl.constexpr,
):  # fmt: skip
    """Metadata of one block of K, where registers 0 and 1 of a thread are what counts.

    They are row 16 w + g, columns 2 t and 2 t + 1 of thread 32 w + 4 g + t, and carry its words 0
    and 1. ORDERED: WgmmaSp.meta. Else the canonical bytes, as int16 [N, K / 16]: word j holds unit
    4 j + t of the block's eight, of rows g and g + 8.

    8-bit types (PER, values per int32, is 4) have four words, in registers 0 to 3: rows 16 w + g
    and then 16 w + g + 8.
    """
    if ORDERED and PER == 4:
        # Word j of a thread is element 4 thread + j.
        word = (row // 16 * 128 + row % 8 * 16 + row // 8 % 2 * 2)[:, None]
        word = word + (column % 8 // 2 * 4 + column % 2)[None, :]
        # Words 0 and 1, and 2 and 3, are neighbours at an even place: 8-byte loads.
        word = gl.max_contiguous(gl.multiple_of(word, [1, 2]), [1, 2])
        tile = pid_n.to(gl.int64) * gl.cdiv(K, 256) + block
        words = gl.load(ptr + tile * 1024 + WG * 512 + word)
    elif ORDERED:
        # Word j of a thread is element 2 thread + j.
        word = (row // 16 * 64 + row % 8 * 8)[:, None] + (column % 8)[None, :]
        tile = pid_n.to(gl.int64) * gl.cdiv(K, 128) + block
        words = gl.load(ptr + tile * 512 + WG * 256 + word)
    else:
        # Past N and K stand copies of the last row and unit: ascending, and TMA has zeros there.
        unit = gl.minimum(block * 8 + (column % 2 * 4 + column % 8 // 2), K // 16 - 1)[None, :]
        low = gl.minimum(pid_n * 128 + WG * 64 + row // 16 * 16 + row % 8, N - 1)
        high = gl.minimum(pid_n * 128 + WG * 64 + row // 16 * 16 + row % 8 + 8, N - 1)
        low = gl.load(ptr + (low.to(gl.int64) * (K // 16))[:, None] + unit).to(gl.int32)
        high = gl.load(ptr + (high.to(gl.int64) * (K // 16))[:, None] + unit).to(gl.int32)
        words = (low & 0xFFFF) | (high << 16)
    return words


@gluon.jit
def consumer(
    arena, words_ptr, y_ptr, bias_ptr, scale_ptr, token_scale_ptr, full, empty, M, N, K,
    WG: gl.constexpr, TILE: gl.constexpr, ORDERED: gl.constexpr, KIND: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr,
    HAS_TOKEN_SCALE: gl.constexpr, ACT: gl.constexpr, GROUP: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Rows 64 WG ... 64 WG + 63 of every tile of this program."""
    TOKENS: gl.constexpr = TILE.tokens
    UNITS: gl.constexpr = TILE.units
    STAGES: gl.constexpr = TILE.stages
    ACCUMULATOR: gl.constexpr = TILE.accumulator
    OUT: gl.constexpr = TILE.out
    ASM: gl.constexpr = wgmma_sp_asm(KIND, TOKENS)
    CONSTRAINTS: gl.constexpr = wgmma_sp_constraints(KIND, TOKENS)
    PER: gl.constexpr = values_per_int32(KIND)
    SUMS: gl.constexpr = gl.int32 if KIND == "s8" else gl.float32
    base = arena_address(arena)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, ACCUMULATOR))
    column = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, ACCUMULATOR))
    blocks = gl.cdiv(K, 64 * PER)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(N, 128) * gl.cdiv(M, TOKENS), gl.num_programs(0)):
        pid_n, pid_m = place_of(tile, M, N, TOKENS, 128, GROUP)
        words = load_words(words_ptr, pid_n, 0, row, column, N, K, WG, ORDERED, PER)
        acc = gl.zeros([64, TOKENS], SUMS, layout=ACCUMULATOR)
        for block in range(0, blocks):
            slot = step % STAGES
            after = gl.minimum(block + 1, blocks - 1)
            next_words = load_words(words_ptr, pid_n, after, row, column, N, K, WG, ORDERED, PER)
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            stage = base + slot * (UNITS * 16384)
            acc = gl.inline_asm_elementwise(
                ASM, CONSTRAINTS,
                [acc, descriptor(stage + WG * 8192), descriptor(stage + 16384), words],
                dtype=acc.dtype, is_pure=False, pack=TOKENS // 2,
            )  # fmt: skip
            mbarrier.arrive(empty.index(slot), count=1)
            words = next_words
            step += 1
        offs_n = pid_n * 128 + WG * 64 + row
        if HAS_TOKEN_SCALE:
            token = pid_m * TOKENS + column
            token_scale = gl.load(token_scale_ptr + token, mask=token < M, other=0.0)
            acc = acc.to(gl.float32) * token_scale[None, :]
        if HAS_SCALE:
            if SCALE_PER_ROW:
                scale = gl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
                acc = acc * scale[:, None]
            else:
                acc = acc * gl.load(scale_ptr).to(gl.float32)
        if HAS_BIAS:
            bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
            acc = acc + bias[:, None]
        first_n = pid_n * 128 + WG * 64
        if TOKENS > 128:
            # A quarter at a time: all at once, the erf of 128 values spills.
            halves = acc.reshape([64, 2, TOKENS // 2]).permute([0, 2, 1])
            low, high = gl.split(halves)
            store_half(low, y_ptr, pid_m * TOKENS, first_n, M, N, TOKENS // 2, OUT, ACT)
            second = pid_m * TOKENS + TOKENS // 2
            store_half(high, y_ptr, second, first_n, M, N, TOKENS // 2, OUT, ACT)
        else:
            store_tokens(acc, y_ptr, pid_m * TOKENS, first_n, M, N, TOKENS, OUT, ACT, BOXES)


@gluon.jit
def _wgmma_sp_kernel(
    w_desc, words_ptr, x_desc, y_ptr, bias_ptr, scale_ptr, token_scale_ptr, M, N, K,
    TILE: gl.constexpr, ORDERED: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, HAS_TOKEN_SCALE: gl.constexpr,
    ACT: gl.constexpr, GROUP: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    PER: gl.constexpr = values_per_int32(KIND)
    FLOATS: gl.constexpr = gl.bfloat16 if KIND == "bf16" else gl.float16
    DTYPE: gl.constexpr = gl.int16 if PER == 4 else FLOATS
    UNITS: gl.constexpr = TILE.units
    STAGES: gl.constexpr = TILE.stages
    # The largest allocation by far, so that it lies at offset 0 (compat.arena_at_zero).
    arena = gl.allocate_shared_memory(DTYPE, [STAGES * UNITS, 128, 64], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)  # the producer's expect; then bytes
        mbarrier.init(empty.index(slot), count=2)  # one arrival of each consumer
    # TMA signals them from the asynchronous proxy, which must see them initialised.
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (arena, words_ptr, y_ptr, bias_ptr, scale_ptr, token_scale_ptr, full, empty,
                        M, N, K, 0, TILE, ORDERED, KIND, HAS_BIAS, HAS_SCALE, SCALE_PER_ROW,
                        HAS_TOKEN_SCALE, ACT, GROUP, BOXES)),
            (consumer, (arena, words_ptr, y_ptr, bias_ptr, scale_ptr, token_scale_ptr, full, empty,
                        M, N, K, 1, TILE, ORDERED, KIND, HAS_BIAS, HAS_SCALE, SCALE_PER_ROW,
                        HAS_TOKEN_SCALE, ACT, GROUP, BOXES)),
            (producer, (w_desc, x_desc, arena, full, empty, M, N, K, TILE, PER, GROUP, BOXES)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def prepare(
    x: Tensor,
    w_hw: WgmmaSp | Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: WgmmaTile | None = None,
    programs: int = 132,
    token_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Launch:
    """What spmm_24_wgmma_sp launches, with at most `programs` programs; or, of a Packed24, what
    spmm_24_wgmma_packed does."""
    ordered = isinstance(w_hw, WgmmaSp)
    n, k = (w_hw.n, w_hw.k) if isinstance(w_hw, WgmmaSp) else w_hw.shape
    m = math.prod(x.shape[:-1])
    words = w_hw.meta if ordered else w_hw.meta.view(torch.int16)
    tile = tile or wgmma_sp_tile(m)
    out = x.new_empty(*x.shape[:-1], n, dtype=out_dtype or x.dtype)
    values, rows = w_hw.values, rows_of(x, k)
    if x.element_size() == 1:
        values, rows = values.view(torch.int16), rows.view(torch.int16)
    tiles = -(-n // WGMMA_ROWS) * -(-m // tile.tokens)  # triton.cdiv takes microseconds
    return Launch(
        grid=(min(tiles, programs),),
        args=(
            tma_view(values, (128, 64)), words, tma_view(rows, (tile.box, 64)),
            out.view(m, n), bias, scale, token_scale, m, n, k,
        ),
        constants=dict(
            TILE=tile, ORDERED=ordered, KIND=(PTX_TYPES | PTX_TYPES_8)[x.dtype],
            HAS_BIAS=bias is not None, HAS_SCALE=scale is not None,
            SCALE_PER_ROW=scale is not None and scale.numel() > 1,
            HAS_TOKEN_SCALE=token_scale is not None, ACT=act, GROUP=8, BOXES=None,
        ),
        warps=4, out=out, parts=None,
    )  # fmt: skip


@functools.cache
def _box_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), ARENA_TYPES[dtype])


def _descriptor(view: TmaView) -> TensorDescriptor:
    layout = _box_layout(view.box, view.tensor.dtype)
    return TensorDescriptor.from_tensor(view.tensor, list(view.box), layout)


_PROVED: set[tuple] = set()  # constants of the builds whose arena is known to lie at offset 0


def _prove_arena(launch: Launch, args: list) -> None:
    """Raise ValueError unless the build for `launch` places the arena where its PTX says."""
    key = tuple(launch.constants.values())
    if key in _PROVED:
        return
    built = _wgmma_sp_kernel.warmup(*args, **launch.constants, grid=launch.grid, num_warps=4)
    if not arena_at_zero(built.asm["ptx"], launch.constants["TILE"].arena_bytes):
        raise ValueError(
            "arena must be at offset 0 of shared memory, got another place in this build"
        )
    _PROVED.add(key)


def spmm_24_wgmma_sp(
    x: Tensor,
    w_hw: WgmmaSp,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: WgmmaTile | None = None,
) -> Tensor:
    """act((x @ dense(w).T) * scale + bias) on wgmma.sp, Hopper only.

    Args:
        x: [..., k], bf16 or fp16, stride 1 along k, rows of whole 16-byte units, leading dims fold.
        w_hw: the weight [N, k] of the same dtype and device (orders.to_wgmma_sp).
        bias: [N], fp16, bf16 or fp32.
        scale: [N], fp16, bf16 or fp32, or one element for all out features.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile: chosen from WGMMA_SP_TILES unless given.
    Returns:
        [..., N], dtype of `x`, contiguous. Accumulated in fp32, the same bytes on every run.
    Raises:
        ValueError: a shape, stride, dtype, device or activation is not as above, or the build of
            this Triton does not place the arena at the address that the PTX names.

    Source: orders.py; PTX ISA, wgmma.mma_async.sp. Twin: reference.spmm_24_ref on the Packed24.
    """
    check_dtype(w_hw.values.dtype, PTX_TYPES, "scaled_spmm_24_wgmma_sp multiplies 8-bit weights")
    check_x(x, w_hw.n, w_hw.k, w_hw.values.dtype, w_hw.values.device, (9, 0), exact=True)
    check_epilogue(w_hw.n, x, bias, scale, act)
    m = math.prod(x.shape[:-1])
    if m == 0 or w_hw.n == 0:
        return x.new_empty(*x.shape[:-1], w_hw.n)
    if not is_aligned(rows_of(x, w_hw.k)):
        raise ValueError(
            "x must have 16-byte aligned rows of whole 16-byte units for TMA, got "
            f"k = {w_hw.k}, strides {x.stride()}; mma_sp takes any"
        )
    return run(prepare(x, w_hw, bias, scale, act, tile=tile, programs=multiprocessors(x.device)))


def run(launch: Launch) -> Tensor:
    """Launch on the device of the output, and return it."""
    args = [_descriptor(a) if isinstance(a, TmaView) else a for a in launch.args]

    def here() -> None:
        if not ADDRESS_IS_GIVEN:
            _prove_arena(launch, args)
        _wgmma_sp_kernel[launch.grid](*args, **launch.constants, num_warps=launch.warps)

    on_device_of(launch.out, here)
    return launch.out


assert (WGMMA_ROWS, WGMMA_BLOCK_BYTES) == (128, 256)  # the numbers written out in the kernel
