"""pack_24: dense [N, K] -> Packed24, checked in the same pass.

One program packs a [BLOCK_N, 8 * BLOCK_BYTES] tile.

Bound by memory: reads 2 and writes 1.125 bytes per 16-bit weight at 2:4. The kernel keeps the
`keep` largest |w| of each group, ties to the lower index; a group that already is keep:group
loses nothing by that, and every other group is counted. prune_24 is the same kernel with the
count left unread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.configs import PACK_24_TILE
from slimgemm.kernels.device import check_operand
from slimgemm.kernels.formats import Packed24, check_pattern, packed_shapes
from slimgemm.kernels.reference import check_dense, raise_not_packable

NONE_BAD = 2**62


@triton.jit
def _pack_24_kernel(
    w_ptr, v_ptr, m_ptr, d_ptr, bad_ptr,
    N, K, columns,
    stride_wn, stride_wk,
    KEEP: tl.constexpr, GROUP: tl.constexpr,
    WRITE_PACKED: tl.constexpr, WRITE_DENSE: tl.constexpr, COUNT_BAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = BLOCK_BYTES * 8 // GROUP
    pid_n = tl.program_id(0).to(tl.int64)  # int64: N * K passes 2**31 on LLM heads
    pid_k = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_g = pid_k * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, GROUP)
    offs_k = offs_g[:, None] * GROUP + lane[None, :]  # [GROUPS, GROUP]
    mask = (offs_n < N)[:, None, None] & (offs_k < K)[None, :, :]
    where_w = offs_n[:, None, None] * stride_wn + offs_k.to(tl.int64)[None, :, :] * stride_wk
    # fp32 holds every 16-bit value exactly.
    w = tl.load(w_ptr + where_w, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, GROUPS, GROUP]

    # |w| as an integer orders as the number does, with NaN above infinity.
    key = tl.minimum(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    mine, other = key[:, :, :, None], key[:, :, None, :]
    lower = (lane[None, :] < lane[:, None])[None, None, :, :]
    beaten = (other > mine) | ((other == mine) & lower)
    kept = tl.sum(beaten.to(tl.int32), axis=3) < KEEP
    slot = tl.cumsum(kept.to(tl.int32), axis=2) - 1

    mask_g = (offs_n < N)[:, None] & (offs_g < columns * (8 // GROUP))[None, :]
    if WRITE_PACKED:
        first = (offs_n[:, None] * columns * (8 // GROUP) + offs_g[None, :]) * KEEP
        for s in tl.static_range(KEEP):
            value = tl.sum(tl.where(kept & (slot == s), w, 0.0), axis=2)
            tl.store(v_ptr + first + s, value.to(v_ptr.dtype.element_ty), mask=mask_g)
        lanes = lane[None, None, :]
        if KEEP == 2 and GROUP == 4:
            # 2 bits of position for each of the two slots.
            bits = tl.sum(tl.where(kept, lanes << (2 * slot), 0), axis=2)
        else:
            bits = tl.sum(tl.where(kept, 1 << lanes, 0), axis=2)
        shift = tl.arange(0, 8 // GROUP)[None, None, :] * GROUP
        byte = tl.sum(tl.reshape(bits, (BLOCK_N, BLOCK_BYTES, 8 // GROUP)) << shift, axis=2)
        offs_b = pid_k * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
        mask_b = (offs_n < N)[:, None] & (offs_b < columns)[None, :]
        tl.store(
            m_ptr + offs_n[:, None] * columns + offs_b[None, :], byte.to(tl.uint8), mask=mask_b
        )
    if WRITE_DENSE:
        where_d = offs_n[:, None, None] * K + offs_k[None, :, :]
        tl.store(
            d_ptr + where_d,
            tl.where(kept & (w != 0.0), w, 0.0).to(d_ptr.dtype.element_ty),
            mask=mask,
        )
    if COUNT_BAD:
        lost = tl.max(((w != 0.0) & (kept == 0)).to(tl.int32), axis=2)  # [BLOCK_N, GROUPS]
        count = tl.sum(tl.sum(lost, axis=1), axis=0)
        place = offs_n[:, None] * (columns * (8 // GROUP)) + offs_g[None, :]
        first_bad = tl.min(tl.min(tl.where(lost > 0, place, 1 << 62), axis=1), axis=0)
        tl.atomic_add(bad_ptr, count.to(tl.int64), mask=count > 0)
        tl.atomic_min(bad_ptr + 1, first_bad, mask=count > 0)


def launch_pack(
    w: Tensor, keep: int, group: int, *, dense: bool, count: bool
) -> tuple[Packed24 | Tensor, Tensor]:
    """Prune `w` to keep:group; packed, or dense. Also int64 [2]: bad groups, first bad group.

    The second result is only written when `count`; nothing here waits for the device.
    """
    check_dense(w)
    check_pattern(keep, group)
    check_operand("weight", w)
    n, k = w.shape
    shape_v, shape_m = packed_shapes(n, k, keep, group)
    empty = w.new_empty(0)
    values = empty if dense else w.new_empty(shape_v)
    meta = w.new_empty(0 if dense else shape_m, dtype=torch.uint8)
    out = w.new_empty(n, k) if dense else empty
    bad = torch.tensor([0, NONE_BAD], device=w.device) if count else empty
    block_n, block_bytes = PACK_24_TILE
    if n and k:
        grid = (triton.cdiv(n, block_n), triton.cdiv(shape_m[1], block_bytes))
        _pack_24_kernel[grid](
            w, values, meta, out, bad, n, k, shape_m[1], w.stride(0), w.stride(1),
            KEEP=keep, GROUP=group, WRITE_PACKED=not dense, WRITE_DENSE=dense, COUNT_BAD=count,
            BLOCK_N=block_n, BLOCK_BYTES=block_bytes,
        )  # fmt: skip
    return (out if dense else Packed24(values, meta, k, keep, group)), bad


def pack_24(w: Tensor, keep: int = 2, group: int = 4) -> Packed24:
    """Pack a weight that already is keep:group along its last axis. Waits for the device.

    Args:
        w: [N, K], fp16, bf16 or fp32, any strides, on a GPU. K need not be a multiple of `group`.
    Returns:
        The weight in the format of kernels/formats.py; `unpack_24` gives `w` back exactly.
    Raises:
        ValueError: a group holds more than `keep` non-zeros (row, columns and count are named), or
            dtype, rank or device are not as above.

    Source: bit layout, kernels/formats.py. Twin: reference.pack_24_ref.
    """
    packed, bad = launch_pack(w, keep, group, dense=False, count=True)
    assert isinstance(packed, Packed24)
    if w.numel():
        count, first = bad.tolist()
        if count:
            groups = packed.meta.shape[1] * 8 // group
            row, g = divmod(first, groups)
            nonzeros = int((w[row, g * group : (g + 1) * group] != 0).sum())
            raise_not_packable(keep, group, groups, count, first, nonzeros, w.shape[1])
    return packed
