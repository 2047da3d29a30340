"""Device code that several ops share: the format's bits in registers, and the epilogue.

A tile of packed weights is decoded without leaving registers: the stored values of a byte
(1, 2 or 4 of them) are split apart, and each of the byte's 8 dense lanes selects the one that
its rank names, or zero. Reads 1.125 bytes for 2 dense ones at 2:4 in 16 bits.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Triton's name of each dtype that a kernel takes.
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def check_operand(name: str, tensor: torch.Tensor, device: torch.device | None = None) -> None:
    """Raise ValueError unless `tensor` is fp16, bf16 or fp32, on a GPU (and on `device`)."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the other operands, got {tensor.device}")
    if not tensor.is_cuda and not INTERPRETED.value:
        raise ValueError(
            f"{name} must be on a GPU, got {tensor.device}; slimgemm.kernels runs CPU tensors"
        )


@triton.jit
def byte_lanes(byte, lane, KEEP: tl.constexpr, GROUP: tl.constexpr):
    """(kept, rank) of lane 0..7 in a byte of meta: rank counts the byte's kept weights below."""
    if KEEP == 2 and GROUP == 4:
        nibble = byte >> (lane // 4 * 4)
        second = (nibble >> 2) & 3
        kept = ((nibble & 3) == lane % 4) | (second == lane % 4)
        rank = lane // 4 * 2 + (second == lane % 4).to(tl.int32)
    else:
        kept = ((byte >> lane) & 1) == 1
        below = byte & ((1 << lane) - 1)
        # Bits set in one byte: pairs, nibbles, byte.
        pairs = below - ((below >> 1) & 0x55)
        nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        rank = (nibbles + (nibbles >> 4)) & 0x0F
    return kept, rank


@triton.jit
def expand(
    values, meta, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr
):
    """Dense [ROWS, COLUMNS] of values [ROWS, COLUMNS * KEEP / GROUP], meta [ROWS, COLUMNS / 8]."""
    BYTES: tl.constexpr = COLUMNS // 8
    STORED: tl.constexpr = 8 * KEEP // GROUP
    lane = tl.arange(0, 8)[None, None, :]
    kept, rank = byte_lanes(meta.to(tl.int32)[:, :, None], lane, KEEP, GROUP)  # [ROWS, BYTES, 8]
    if STORED == 1:
        dense = tl.broadcast_to(tl.reshape(values, (ROWS, BYTES, 1)), (ROWS, BYTES, 8))
    elif STORED == 2:
        v0, v1 = tl.split(tl.reshape(values, (ROWS, BYTES, 2)))
        dense = tl.where(rank == 0, v0[:, :, None], v1[:, :, None])
    else:
        even, odd = tl.split(tl.reshape(values, (ROWS, BYTES, 2, 2)))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        low = tl.where(rank == 0, v0[:, :, None], v1[:, :, None])
        high = tl.where(rank == 2, v2[:, :, None], v3[:, :, None])
        dense = tl.where(rank < 2, low, high)
    dense = tl.where(kept, dense, 0.0).to(values.dtype)
    return tl.reshape(dense, (ROWS, COLUMNS))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32."""
    if INTERPRETED:
        # The interpreter (triton 3.6 to 3.9) multiplies the bit patterns of bf16 as integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def epilogue(acc, ACT: tl.constexpr):
    """The activation ACT of the fp32 accumulator; formulas as torch.nn.functional has them."""
    if ACT == "relu":
        # max(acc, 0) would turn NaN into 0.
        acc = tl.where(acc < 0.0, 0.0, acc)
    elif ACT == "gelu":
        acc = 0.5 * acc * (1.0 + tl.math.erf(acc * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (acc + 0.044715 * acc * acc * acc)
        # tanh(u) = 2 * sigmoid(2u) - 1
        acc = acc * tl.sigmoid(2.0 * inner)
    elif ACT == "silu":
        acc = acc * tl.sigmoid(acc)
    elif ACT == "relu2":
        acc = tl.where(acc < 0.0, 0.0, acc)
        acc = acc * acc
    return acc


@triton.jit
def load_packed(
    v_ptr, m_ptr, offs_n, first_byte, N, columns,
    BLOCK_K: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Values [rows, BLOCK_K * KEEP / GROUP] and meta [rows, BLOCK_K / 8] of rows `offs_n` (int64).

    `first_byte` is the tile's first column of meta. Rows and columns past the end read as zero
    weights with any metadata, so what they add is zero.
    """
    STORED: tl.constexpr = 8 * KEEP // GROUP
    offs_v = first_byte * STORED + tl.arange(0, BLOCK_K // 8 * STORED)
    offs_b = first_byte + tl.arange(0, BLOCK_K // 8)
    rows = (offs_n < N)[:, None]
    values = tl.load(
        v_ptr + offs_n[:, None] * (columns * STORED) + offs_v[None, :],
        mask=rows & (offs_v < columns * STORED)[None, :],
        other=0.0,
    )
    meta = tl.load(
        m_ptr + offs_n[:, None] * columns + offs_b[None, :],
        mask=rows & (offs_b < columns)[None, :],
        other=0,
    )
    return values, meta


@triton.jit
def store_kept(
    v_ptr, m_ptr, dense, offs_n, first_byte, N, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store a dense fp32 tile [ROWS, COLUMNS] at the kept positions; the inverse of `expand`."""
    BYTES: tl.constexpr = COLUMNS // 8
    STORED: tl.constexpr = 8 * KEEP // GROUP
    offs_b = first_byte + tl.arange(0, BYTES)
    mask = (offs_n < N)[:, None] & (offs_b < columns)[None, :]
    where = offs_n[:, None] * columns + offs_b[None, :]
    meta = tl.load(m_ptr + where, mask=mask, other=0).to(tl.int32)
    lane = tl.arange(0, 8)[None, None, :]
    kept, rank = byte_lanes(meta[:, :, None], lane, KEEP, GROUP)
    lanes = tl.reshape(dense, (ROWS, BYTES, 8))
    for s in tl.static_range(STORED):
        value = tl.sum(tl.where(kept & (rank == s), lanes, 0.0), axis=2)
        tl.store(v_ptr + where * STORED + s, value.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_offsets(offs_m, inner, stride_outer, stride_inner):
    """int64 offset of each row of an operand whose rows number two axes, [outer, inner]."""
    rows = offs_m.to(tl.int64)
    return rows // inner * stride_outer + rows % inner * stride_inner


def matmul_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot for a linear layer: tf32 if torch.backends allows it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def conv_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot for a convolution: tf32 if torch.backends allows it."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def multiply_adds(dtype: torch.dtype, precision: str) -> bool:
    """True where tl.dot has no tensor cores: fp32 in full precision, and Turing (Triton <= 3.9).

    Launchers run on the device of their tensors, so Triton's current target is asked.
    """
    if dtype == torch.float32 and precision == "ieee":
        return True
    if INTERPRETED.value:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch < 80


class Rows(NamedTuple):
    """An operand [..., columns] seen as rows numbered over two axes; `row_offsets` reads it."""

    tensor: torch.Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count
    inner: int
    stride_outer: int
    stride_inner: int
    stride_column: int


def as_rows(x: torch.Tensor) -> Rows:
    """`x` [..., columns] as Rows; a copy only if its leading axes need three or more strides."""
    if x.is_contiguous() and x.numel():  # one stride: the common case, and quick
        columns = x.shape[-1]
        count = x.numel() // columns
        return Rows(x, count, count, 0, columns if count > 1 else 0, 1)
    axes = [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True)][:-1]
    if not x.numel():
        return Rows(x, math.prod(x.shape[:-1]), 1, 0, 0, x.stride(-1))
    merged: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return as_rows(x.contiguous())
    count = x.numel() // x.shape[-1]
    outer, inner = ([(1, 0)] * (2 - len(merged))) + merged
    return Rows(x, count, max(inner[0], 1), outer[1], inner[1], x.stride(-1))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 in the interpreter, where nothing runs side by side."""
    return (
        1
        if device.type != "cuda"
        else torch.cuda.get_device_properties(device).multi_processor_count
    )
