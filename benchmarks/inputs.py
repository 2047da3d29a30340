"""Random inputs of the benchmarks: normal values, valid metadata, made on the device."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from slimgemm.kernels.formats import ChannelIndex

# The six ways to keep two of four.
PAIRS = tuple(itertools.combinations(range(4), 2))


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A seeded generator on `device`."""
    return torch.Generator(device).manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype, by: torch.Generator) -> Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=by, device=by.device).to(dtype)


def random_24(n: int, k: int, dtype: torch.dtype, by: torch.Generator) -> Tensor:
    """Dense [n, k] of normal values, two of four kept; each of the six pairs equally often."""
    groups = -(-k // 4)
    table = torch.zeros(len(PAIRS), 4, dtype=torch.bool)
    for row, pair in enumerate(PAIRS):
        table[row, list(pair)] = True
    which = torch.randint(len(PAIRS), (n * groups,), generator=by, device=by.device)
    kept = table.to(by.device).index_select(0, which).view(n, groups * 4)[:, :k]
    return normal(n, k, dtype=dtype, by=by).mul_(kept)


def random_24_conv(
    out: int, channels: int, kernel: int, dtype: torch.dtype, by: torch.Generator
) -> Tensor:
    """Dense [out, channels, kernel, kernel], 2:4 along the channels at each tap, channels_last."""
    rows = random_24(out * kernel * kernel, channels, dtype, by)
    return rows.view(out, kernel, kernel, channels).permute(0, 3, 1, 2)


def kept_count(width: int, ratio: float, run: int) -> int:
    """How many of `width` channels are about `ratio` of them, at least one, in runs of `run`."""
    run = min(run, width)
    return run * max(1, round(width // run * ratio))


def random_index(width: int, ratio: float, run: int, by: torch.Generator) -> ChannelIndex:
    """kept_count channels of `width` at random places that are multiples of `run`."""
    run = min(run, width)
    count = kept_count(width, ratio, run) // run
    chosen = torch.randperm(width // run, generator=by, device=by.device)[:count].sort().values
    index = chosen[:, None] * run + torch.arange(run, device=by.device)
    return ChannelIndex(index.view(-1), width)


def image(images: int, channels: int, side: int, dtype: torch.dtype, by: torch.Generator) -> Tensor:
    """[images, channels, side, side], channels_last."""
    x = normal(images, channels, side, side, dtype=dtype, by=by)
    return x.contiguous(memory_format=torch.channels_last)
