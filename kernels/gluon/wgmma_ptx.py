"""The PTX of wgmma_sp: one asm block per stage, its operands, and the shared-memory descriptor."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slimgemm.kernels.gluon.mma_sp import values_per_int32


@gluon.constexpr_function
def wgmma_sp_asm(kind, tokens):
    """The four steps on one stage: D $0..., C tied, descriptors of A and B, metadata.

    A step is 32 bytes further in a row of A, 64 bytes in a row of X; the second half of X lies
    tokens * 128 bytes behind the first. Descriptors count 16-byte units.
    """
    count = tokens // 2  # accumulator registers per thread
    acc = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    lines = ["{", ".reg .b64 da, db;", "wgmma.fence.sync.aligned;"]
    sums, columns = ("s32" if kind == "s8" else "f32"), 16 * values_per_int32(kind)
    # D is added to; signs of A and B (floats); both K-major (16-bit types).
    tail = {"s8": "1", "e4m3": "1, 1, 1"}.get(kind, "1, 1, 1, 0, 0")
    for step in range(4):
        b_step = step % 2 * 4 + step // 2 * (tokens * 128 // 16)
        word, selector = (step // 2, step % 2) if columns == 32 else (step, 0)
        lines += [
            f"add.s64 da, ${2 * count}, {2 * step};",
            f"add.s64 db, ${3 * count}, {b_step};",
            f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k{columns}.{sums}.{kind}.{kind} "
            f"{acc}, da, db, ${4 * count + word}, {selector}, {tail};",
        ]
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def wgmma_sp_constraints(kind, tokens):
    """Operands per thread: tokens / 2 accumulators in and out, and as many of each other input."""
    count = tokens // 2
    ties = [str(i) for i in range(count)]
    return ",".join(
        ["=r" if kind == "s8" else "=f"] * count + ties + ["l"] * (2 * count) + ["r"] * count
    )


@gluon.jit
def descriptor(address):
    """K-major matrix at `address` (bytes), rows of 128 swizzled bytes, 1024 bytes per 8 rows."""
    return ((address >> 4) & 0x3FFF).to(gl.int64) | (1 << 16) | (64 << 32) | (1 << 62)
