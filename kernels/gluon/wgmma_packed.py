"""wgmma_packed: wgmma_sp from the canonical Packed24 as it is; no hardware order is made or kept.

The values of wgmma.sp are canonical already. Of the metadata, a thread reads its words from the
canonical bytes: four 2-byte loads per 128 columns, beside 16 wgmma.sp cycles per token tile of 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgemm.kernels.formats import Packed24, check_shapes
from slimgemm.kernels.gluon.launch import (
    Launch,
    check_epilogue,
    check_x,
    folds,
    is_aligned,
    multiprocessors,
    rows_of,
    tma_view,
)
from slimgemm.kernels.gluon.mma_packed import why_not as why_not_mma
from slimgemm.kernels.gluon.plans import Plans, layouts
from slimgemm.kernels.gluon.wgmma_sp import prepare, run
from slimgemm.kernels.gluon.wgmma_tiles import WgmmaTile


def takes(x: Tensor, packed: Packed24) -> bool:
    """True if spmm_24_wgmma_packed runs on this weight and x."""
    return (
        not why_not_mma(packed)
        and x.dtype == packed.values.dtype
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and folds(x)
        and is_aligned(rows_of(x, packed.k))
    )


class Plan(NamedTuple):
    """What every launch of operands that lie alike has in common.

    Args:
        shape: of the result; the rest of a Plan of no elements is empty.
        boxes: of W and X; sizes: as the kernel takes them.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    constants: dict[str, Any]
    boxes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]


PLANS: Plans[Plan] = Plans()


def checked_plan(
    x: Tensor,
    packed: Packed24,
    bias: Tensor | None,
    scale: Tensor | None,
    act: str,
    tile: WgmmaTile | None,
) -> Plan:
    """The Plan of operands that spmm_24_wgmma_packed takes; ValueError for others."""
    check_shapes(packed)
    if reason := why_not_mma(packed):
        raise ValueError(reason)
    n, k = packed.shape
    check_x(x, n, k, packed.values.dtype, packed.values.device, (9, 0), exact=True)
    check_epilogue(n, x, bias, scale, act)
    shape = (*x.shape[:-1], n)
    if 0 in shape:
        return Plan(shape, (), {}, (), ())
    if not is_aligned(rows_of(x, k)):
        raise ValueError(
            "x must have 16-byte aligned rows for TMA, got strides "
            f"{x.stride()}; mma_packed takes any"
        )
    launch = prepare(x, packed, bias, scale, act, tile=tile, programs=multiprocessors(x.device))
    w, _, rows, *_, m, n, k = launch.args
    return Plan(shape, launch.grid, launch.constants, (w.box, rows.box), (m, n, k))


def fill(
    plan: Plan, x: Tensor, packed: Packed24, bias: Tensor | None, scale: Tensor | None
) -> Launch:
    """The launch of `plan` on these operands, with a new result: what `prepare` gives."""
    out, (values, meta, k, _, _) = x.new_empty(plan.shape), packed
    args = (
        tma_view(values, plan.boxes[0]), meta.view(torch.int16),
        tma_view(rows_of(x, k), plan.boxes[1]), out, bias, scale, None, *plan.sizes,
    )  # fmt: skip
    return Launch(plan.grid, args, plan.constants, 4, out, None)


def spmm_24_wgmma_packed(
    x: Tensor,
    packed: Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: WgmmaTile | None = None,
) -> Tensor:
    """act((x @ dense(w).T) * scale + bias) on wgmma.sp, Hopper only, from the canonical format.

    Args:
        x: [..., k], bf16 or fp16, stride 1 along k, rows of whole 16-byte units, leading dims fold.
        packed: 2:4 weight [N, k] of the same dtype and device; k a multiple of 32.
        bias: [N], fp16, bf16 or fp32.
        scale: [N], fp16, bf16 or fp32, or one element for all out features.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile: chosen from WGMMA_SP_TILES unless given.
    Returns:
        [..., N], dtype of `x`, contiguous. Accumulated in fp32, the same bytes on every run.
    Raises:
        ValueError: a shape, stride, dtype, device or activation is not as above, or the build of
            this Triton does not place the arena at the address that the PTX names.

    Source: orders.py; PTX ISA, wgmma.mma_async.sp. Twin: reference.spmm_24_ref.
    """
    key = layouts(x, packed, bias, scale), act, tile
    plan = PLANS.kept.get(key) or PLANS.add(key, checked_plan(x, packed, bias, scale, act, tile))
    if 0 in plan.shape:
        return x.new_empty(plan.shape)
    return run(fill(plan, x, packed, bias, scale))
