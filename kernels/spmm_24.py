"""spmm_24: Y = act((X @ W.T) * scale + bias) with a packed W, X [M, K], W [N, K], Y [M, N].

One program owns a [BLOCK_M, BLOCK_N] tile of Y and one part of K; packed tiles of W are decoded
in registers and meet X in a dot, accumulated in fp32. With more than one part, the parts go
to an fp32 buffer that a second kernel adds in a fixed order, so results repeat bit for bit.

Small M is bound by the bytes of W (1.125 per dense 16-bit weight's 2), large M by the dense
tensor cores: this is the portable kernel, which uses no sparse instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.configs import Tile, split_count, spmm_tile
from slimgemm.kernels.device import (
    as_rows,
    check_operand,
    dot,
    epilogue,
    expand,
    load_packed,
    matmul_precision,
    multiply_adds,
    multiprocessors,
    row_offsets,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.reference import ACTIVATIONS, check_product


@triton.jit
def _spmm_24_kernel(
    x_ptr, v_ptr, m_ptr, b_ptr, s_ptr, y_ptr,
    M, N, K, columns, inner,
    stride_xo, stride_xi, stride_xk, steps_per_part,
    KEEP: tl.constexpr, GROUP: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    # Neighbouring programs share a tile of W, the larger operand.
    offs_m = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = (offs_m < M)[:, None]
    x_rows = x_ptr + row_offsets(offs_m, inner, stride_xo, stride_xi)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = part * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, tl.cdiv(K, BLOCK_K))):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        where_x = x_rows + offs_k.to(tl.int64)[None, :] * stride_xk
        x = tl.load(where_x, mask=mask_m & (offs_k < K)[None, :], other=0.0)
        values, meta = load_packed(
            v_ptr, m_ptr, offs_n, step * (BLOCK_K // 8), N, columns, BLOCK_K, KEEP, GROUP
        )
        w = expand(values, meta, BLOCK_N, BLOCK_K, KEEP, GROUP)
        acc = dot(x, tl.trans(w), acc, PRECISION)

    mask = mask_m & (offs_n < N)[None, :]
    where_y = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    if PARTIAL:
        tl.store(y_ptr + part.to(tl.int64) * M * N + where_y, acc, mask=mask)
    else:
        acc = finish(acc, b_ptr, s_ptr, offs_n, N, HAS_BIAS, HAS_SCALE, ACT)
        tl.store(y_ptr + where_y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish(
    acc, b_ptr, s_ptr, offs_n, N,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """act(acc * scale + bias) of an fp32 tile whose columns are the out features `offs_n`."""
    if HAS_SCALE:
        acc *= tl.load(s_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return epilogue(acc, ACT)


@triton.jit
def _add_parts_kernel(
    p_ptr, b_ptr, s_ptr, y_ptr, M, N, parts,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [M, N] from fp32 parts [parts, M, N], added in ascending order."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    rows = offs_m  # int64, as M may be specialised to 1 and then has no .to()
    for _ in range(parts):
        acc += tl.load(p_ptr + rows[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
        rows += M
    acc = finish(acc, b_ptr, s_ptr, offs_n, N, HAS_BIAS, HAS_SCALE, ACT)
    where = offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + where, acc.to(y_ptr.dtype.element_ty), mask=mask)


def add_parts(
    parts: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """`out` [M, N] = act(sum over parts [P, M, N] * scale + bias), in a fixed order."""
    count, m, n = parts.shape
    block_m, block_n = 4, 128
    grid = (-(-m // block_m), -(-n // block_n))
    _add_parts_kernel[grid](
        parts, bias, scale, out, m, n, count,
        ACT=act, HAS_BIAS=bias is not None, HAS_SCALE=scale is not None,
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return out


def check_epilogue(n: int, x: Tensor, bias: Tensor | None, scale: Tensor | None, act: str) -> None:
    """Raise ValueError unless bias and scale are contiguous [n] beside `x`, and `act` is known."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    for name, t in (("bias", bias), ("scale", scale)):
        if t is None:
            continue
        check_operand(name, t, x.device)
        if t.shape != (n,) or not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous [{n}], got {list(t.shape)} {t.stride()}")


def check_pair(name: str, x: Tensor, columns: int, packed: Packed24) -> None:
    """Raise ValueError unless `x` [..., columns] can meet `packed` in one product."""
    check_operand(name, x)
    check_product(name, x, columns, packed)


def spmm_24(
    x: Tensor,
    w: Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: Tile | None = None,
    split: int | None = None,
) -> Tensor:
    """act((x @ dense(w).T) * scale + bias).

    Args:
        x: [..., k], fp16, bf16 or fp32, any strides, any number of rows, on a GPU.
        w: packed weight [N, k] of the same dtype and device.
        bias, scale: [N], fp16, bf16 or fp32.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile, split: tile and number of parts of K; chosen from kernels/configs.py unless given.
    Returns:
        [..., N], dtype of `x`, contiguous; fp32 sums, tf32 only where torch.backends allows.
    Raises:
        ValueError: a shape, dtype, device or activation is not as above.

    Source: bit layout, kernels/formats.py. Twin: reference.spmm_24_ref.
    """
    n, k = w.shape
    check_pair("x", x, k, w)
    check_epilogue(n, x, bias, scale, act)
    y = x.new_empty(*x.shape[:-1], n)
    rows = as_rows(x)
    if y.numel() == 0:
        return y
    precision = matmul_precision(x.dtype)
    tile = tile or spmm_tile(rows.count, x.itemsize, multiply_adds(x.dtype, precision))
    # Not triton.cdiv, which costs the host microseconds a call.
    programs, steps = -(-rows.count // tile.m) * -(-n // tile.n), -(-k // tile.k)
    split = split or split_count(programs, steps, multiprocessors(x.device))
    partial = split > 1
    out = y if not partial else x.new_empty(split, rows.count, n, dtype=torch.float32)
    _spmm_24_kernel[(programs, split)](
        rows.tensor, w.values, w.meta, bias, scale, out,
        rows.count, n, k, w.meta.shape[1], rows.inner,
        rows.stride_outer, rows.stride_inner, rows.stride_column, -(-steps // split),
        KEEP=w.keep, GROUP=w.group, ACT=act,
        HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, PARTIAL=partial,
        PRECISION=precision,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial:
        add_parts(out, y.view(rows.count, n), bias, scale, act)
    return y
