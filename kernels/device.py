"""Device code that several ops share: the format's bits in registers, and the epilogue.

A tile of packed weights is decoded without leaving registers: the stored values of a byte
(1, 2 or 4 of them) are split apart, and each of the byte's 8 dense lanes selects the one that
its rank names, or zero. Reads 1.125 bytes for 2 dense ones at 2:4 in 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Triton's name of each dtype that a kernel takes.
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED = triton.knobs.runtime.interpret


def check_operand(name: str, tensor: torch.Tensor, device: torch.device | None = None) -> None:
    """Raise ValueError unless a kernel can take `tensor`: fp16, bf16 or fp32, on a GPU (or `device`)."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the other operands, got {tensor.device}")
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f"{name} must be on a GPU, got {tensor.device}; slimgemm.kernels runs CPU tensors"
        )


@triton.jit
def byte_lanes(byte, lane, KEEP: tl.constexpr, GROUP: tl.constexpr):
    """(kept, rank) of dense lane 0..7 in a byte of meta: rank counts the byte's kept weights below it."""
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
    """Dense [ROWS, COLUMNS] tile from values [ROWS, COLUMNS * KEEP / GROUP] and meta [ROWS, COLUMNS / 8]."""
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
