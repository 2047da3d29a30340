"""Launcher of mma_packed: a linear layer on mma.sp from the canonical format."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgemm.kernels.configs import split_count
from slimgemm.kernels.formats import Packed24, check_shapes
from slimgemm.kernels.gluon.launch import (
    Launch,
    check_epilogue,
    check_x,
    folds,
    is_aligned,
    multiprocessors,
    rows_of,
)
from slimgemm.kernels.gluon.mma_packed_kernel import _mma_packed_kernel
from slimgemm.kernels.gluon.mma_packed_tiles import MMA_PACKED_TILES, PackedTile, mma_packed_tile
from slimgemm.kernels.gluon.plans import Plans, layouts, on_device_of

__all__ = [
    "MMA_PACKED_TILES",
    "PackedTile",
    "mma_packed_tile",
    "prepare",
    "spmm_24_mma_packed",
    "takes",
]

PTX_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
COLUMNS = 32  # K must be a multiple: whole int32 of metadata, whole 16-byte units of values


def why_not(packed: Packed24) -> str:
    """What keeps `packed` from these kernels, or nothing."""
    if (packed.keep, packed.group) != (2, 4):
        return f"keep:group must be 2:4 for mma.sp, got {packed.keep}:{packed.group}"
    if packed.values.dtype not in PTX_TYPES:
        return f"values must be float16 or bfloat16, got {packed.values.dtype}"
    if packed.k == 0 or packed.k % COLUMNS:
        return f"k must be a positive multiple of {COLUMNS}, got {packed.k}; spmm_24 takes any"
    for name, part in (("values", packed.values), ("meta", packed.meta)):
        if not part.is_contiguous() or part.data_ptr() % 16:
            return f"{name} must be contiguous and 16-byte aligned; clone it first"
    return ""


def takes(x: Tensor, packed: Packed24) -> bool:
    """True if spmm_24_mma_packed runs on this weight and x."""
    return (
        not why_not(packed)
        and x.dtype == packed.values.dtype
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and folds(x)
    )


class Plan(NamedTuple):
    """What every launch of operands that lie alike has in common; sizes as the kernel takes them.

    Args:
        shape: of the result; parts: of the fp32 sums to be added, or None.
        unit: dtype in which X is read; whole: True if X may be viewed so as it is.
    """

    grid: tuple[int, int]
    sizes: tuple[int, int, int, int]
    constants: dict[str, Any]
    warps: int
    shape: tuple[int, ...]
    parts: tuple[int, int, int] | None
    unit: torch.dtype
    whole: bool


def plan_of(
    x: Tensor,
    packed: Packed24,
    bias: Tensor | None,
    scale: Tensor | None,
    act: str,
    tile: PackedTile | None,
    splits: int,
) -> Plan:
    """The Plan of checked operands."""
    m, (n, k) = math.prod(x.shape[:-1]), packed.shape
    rows = rows_of(x, k)
    aligned = is_aligned(rows)
    tile = tile or mma_packed_tile(m, aligned)
    fused = splits == 1
    return Plan(
        grid=(-(-n // tile.rows) * -(-m // tile.tokens), splits),
        sizes=(m, n, k, rows.stride(0)),
        constants=dict(
            TILE=tile, KIND=PTX_TYPES[x.dtype], ALIGNED=aligned, SPLITS=splits,
            MASKED=k % (256 * tile.warps_k) != 0, META_UNIT=math.gcd(k // COLUMNS, 4), IMAGE=None,
            HAS_BIAS=fused and bias is not None, HAS_SCALE=fused and scale is not None,
            SCALE_PER_ROW=scale is not None and scale.numel() > 1, ACT=act if fused else "none",
            GROUP=8,
        ),
        warps=tile.warps,
        shape=(*x.shape[:-1], n),
        parts=None if fused else (splits, m, n),
        unit=torch.int32 if aligned else torch.int16,
        # An axis of one element may have any stride; torch wants even ones to join pairs.
        whole=x.is_contiguous() and all(stride % 2 == 0 for stride in x.stride()[:-1]),
    )  # fmt: skip


def fill(
    plan: Plan, x: Tensor, packed: Packed24, bias: Tensor | None, scale: Tensor | None
) -> Launch:
    """The launch of `plan` on these operands, with a new result."""
    values, meta, k, _, _ = packed
    out, parts = x.new_empty(plan.shape), None
    target, sides = out, (bias, scale)
    if plan.parts is not None:
        target = parts = x.new_empty(plan.parts, dtype=torch.float32)
        sides = None, None
    rows = x if plan.whole else rows_of(x, k)
    args = (
        values.view(torch.int32), meta.view(torch.int32), rows.view(plan.unit), target, *sides,
        *plan.sizes,
    )  # fmt: skip
    return Launch(plan.grid, args, plan.constants, plan.warps, out, parts)


def prepare(
    x: Tensor,
    packed: Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: PackedTile | None = None,
    splits: int = 1,
) -> Launch:
    """What spmm_24_mma_packed launches; the result goes to `out`, or fp32 parts to `parts`."""
    return fill(plan_of(x, packed, bias, scale, act, tile, splits), x, packed, bias, scale)


def checked_plan(
    x: Tensor,
    packed: Packed24,
    bias: Tensor | None,
    scale: Tensor | None,
    act: str,
    tile: PackedTile | None,
    splits: int | None,
) -> Plan:
    """The Plan of operands that spmm_24_mma_packed takes; ValueError for others."""
    check_shapes(packed)
    if reason := why_not(packed):
        raise ValueError(reason)
    n, k = packed.shape
    check_x(x, n, k, packed.values.dtype, packed.values.device, (8, 0))
    check_epilogue(n, x, bias, scale, act)
    m = math.prod(x.shape[:-1])
    tile = tile or mma_packed_tile(m, is_aligned(rows_of(x, k)))
    if splits is None:
        programs = -(-n // tile.rows) * -(-m // tile.tokens)
        rounds = -(-k // (256 * tile.warps_k))
        splits = split_count(programs, rounds, multiprocessors(x.device))
    return plan_of(x, packed, bias, scale, act, tile, splits)


PLANS: Plans[Plan] = Plans()


def spmm_24_mma_packed(
    x: Tensor,
    packed: Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
    *,
    tile: PackedTile | None = None,
    splits: int | None = None,
) -> Tensor:
    """act((x @ dense(w).T) * scale + bias) on mma.sp, from the canonical format.

    Args:
        x: [..., k], bf16 or fp16, stride 1 along k, leading dims fold into one; sm_80 or later.
        packed: 2:4 weight [N, k] of the same dtype and device; k a multiple of 32.
        bias: [N], fp16, bf16 or fp32.
        scale: [N], fp16, bf16 or fp32, or one element for all out features.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
        tile, splits: tile and parts of K; chosen from MMA_PACKED_TILES unless given.
    Returns:
        [..., N], dtype of `x`, contiguous. Accumulated in fp32, the same bytes on every run.
    Raises:
        ValueError: a shape, stride, dtype, device or activation is not as above.

    Source: kernels/formats.py; PTX ISA, mma.sp. Twin: reference.spmm_24_ref.
    """
    key = layouts(x, packed, bias, scale), act, tile, splits
    plan = PLANS.kept.get(key) or PLANS.add(
        key, checked_plan(x, packed, bias, scale, act, tile, splits)
    )
    if 0 in plan.shape:
        return x.new_empty(plan.shape)
    launch = fill(plan, x, packed, bias, scale)
    on_device_of(x, lambda: run(launch, bias, scale, act))
    return launch.out


def run(launch: Launch, bias: Tensor | None, scale: Tensor | None, act: str) -> None:
    """Launch on the current device."""
    _mma_packed_kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.warps)
    if launch.parts is not None:
        from slimgemm.kernels.spmm_24 import add_parts

        m, n = launch.parts.shape[1:]
        if scale is not None and scale.numel() == 1:
            scale = scale.reshape(1).expand(n).contiguous()
        add_parts(launch.parts, launch.out.view(m, n), bias, scale, act)
