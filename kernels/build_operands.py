"""Operands of ahead-of-time builds: CPU tensors that a launcher takes for GPU ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimgemm.kernels.configs import Tile
from slimgemm.kernels.formats import ChannelIndex, Packed24, packed_shapes

ALIGNED, RAGGED = (512, 512, 512), (77, 203, 331)  # M, N, K: 16 divides all of them, or none

# Architectures on which Triton multiplies without tensor cores: correct, and slow.
NO_TENSOR_CORES = {"sm_75": "Triton 3.6 to 3.9 emit no Turing mma; tl.dot is multiply-adds"}


class Operand(Tensor):
    """A CPU tensor that a launcher takes for a GPU one. Its pointer is never read."""

    is_cuda = property(lambda self: True)


def operand(*shape: int, dtype: torch.dtype) -> Tensor:
    """An Operand of that shape; what a launcher derives from it is an Operand too."""
    return torch.zeros(*shape, dtype=dtype).as_subclass(Operand)


def packed_operand(n: int, k: int, dtype: torch.dtype, keep: int = 2, group: int = 4) -> Packed24:
    """A packed [n, k] weight of Operands."""
    values, meta = packed_shapes(n, k, keep, group)
    return Packed24(
        operand(*values, dtype=dtype), operand(*meta, dtype=torch.uint8), k, keep, group
    )


def launcher(file: str, name: str | None = None) -> Callable[..., Any]:
    """The launcher `name` (the file's own name unless given) of kernels/<file>.py."""
    return getattr(importlib.import_module(f"slimgemm.kernels.{file}"), name or file)


def tile_label(tile: Tile) -> str:
    """m x n x k, warps and stages."""
    return f"{tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages}"


def kept(kind: str, width: int) -> ChannelIndex | None:
    """Half of `width` channels, in "runs" of 16 or "ragged"; None for "all"."""
    if kind == "all":
        return None
    half = torch.arange(width // 2)
    index = half // 16 * 32 + half % 16 if kind == "runs" else half * 2
    return ChannelIndex(index, width)


def image(channels: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """channels_last [1, channels, *size]."""
    return operand(1, *size, channels, dtype=dtype).permute(0, 3, 1, 2)
