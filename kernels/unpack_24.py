"""unpack_24: Packed24 -> dense [N, K]. One program writes a [BLOCK_N, BLOCK_K] tile.

Bound by memory: reads 1.125 bytes and writes 2 per 16-bit weight at 2:4.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slimgemm.kernels.configs import UNPACK_24_TILE
from slimgemm.kernels.device import check_operand, expand, load_packed
from slimgemm.kernels.formats import Packed24, check_shapes


@triton.jit
def _unpack_24_kernel(
    v_ptr, m_ptr, o_ptr,
    N, K, columns,
    KEEP: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0).to(tl.int64)  # int64: N * K passes 2**31 on LLM heads
    pid_k = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    values, meta = load_packed(
        v_ptr, m_ptr, offs_n, pid_k * (BLOCK_K // 8), N, columns, BLOCK_K, KEEP, GROUP
    )
    dense = expand(values, meta, BLOCK_N, BLOCK_K, KEEP, GROUP)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(o_ptr + offs_n[:, None] * K + offs_k[None, :], dense, mask=mask)


def unpack_24(packed: Packed24) -> Tensor:
    """Expand a packed weight to dense.

    Args:
        packed: values and meta on one GPU, row-major.
    Returns:
        Dense [N, k], dtype of `packed.values`, zeros where nothing was kept.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit kernels/formats.py.

    Source: bit layout, kernels/formats.py. Twin: reference.unpack_24_ref.
    """
    check_shapes(packed)
    check_operand("values", packed.values)
    n, k = packed.shape
    out = packed.values.new_empty(n, k)
    if out.numel():
        block_n, block_k = UNPACK_24_TILE
        grid = (triton.cdiv(n, block_n), triton.cdiv(k, block_k))
        _unpack_24_kernel[grid](
            packed.values, packed.meta, out, n, k, packed.meta.shape[1],
            KEEP=packed.keep, GROUP=packed.group, BLOCK_N=block_n, BLOCK_K=block_k,
        )  # fmt: skip
    return out
