"""What `slimgemm tune` tries for one convolution, as tune_tiles.py does for a linear layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from slimgemm.kernels.configs import SMEM_BYTES, conv_tile, few_channels
from slimgemm.kernels.tune_jobs import ConvJob
from slimgemm.kernels.tune_table import Choice
from slimgemm.kernels.tune_tiles import (
    MOST_WARPS,
    Gpu,
    neighbours,
    portable_fits,
    with_splits,
)


def portable_choices(job: ConvJob, gpu: Gpu) -> list[Choice]:
    """Of the portable kernel; groups of few channels have no tiles."""
    conv, itemsize = job.conv, job.dtype.itemsize
    n = conv.out // conv.groups
    if few_channels(n, conv.channels):
        return [Choice("portable")]
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    scalar = not gpu.tensor_cores or (job.dtype == torch.float32 and not tf32)
    base = conv_tile(job.m, n, itemsize, scalar)
    tiles = [base]
    tiles += neighbours(base, {"m": (0.5, 2), "n": (0.5, 2), "k": (0.5, 2), "warps": (0.5, 2)})
    tiles += [base._replace(stages=base.stages + more) for more in (-1, 1)]
    fits = [t for t in tiles if t.m >= 16 and portable_fits(t, itemsize, gpu.smem_bytes)]
    programs = -(-job.m // base.m) * -(-n // base.n) * conv.groups
    return with_splits("portable", fits, programs, -(-conv.k // base.k), gpu)


def mma_choices(job: ConvJob, gpu: Gpu) -> list[Choice]:
    """Of mma.sp: a stage of X is 64 channels of a tap, so its steps stay as they are."""
    from slimgemm.kernels.gluon.mma_conv import mma_conv_tile
    from slimgemm.kernels.gluon.mma_packed_tiles import MMA_PACKED_TILES
    from slimgemm.kernels.gluon.mma_tiles import fits

    base = mma_conv_tile(job.m)
    rows = list(dict.fromkeys(mma_conv_tile(most) for most in MMA_PACKED_TILES))
    at = rows.index(base)
    tiles = [base, *rows[max(at - 1, 0) : at], *rows[at + 1 : at + 2]]
    both = (0.5, 2)
    tiles += neighbours(base, {"ahead": both, "warps_n": both, "warps_k": both})
    tiles += [dataclasses.replace(base, stages=base.stages + more) for more in (-1, 1)]
    known = gpu.architecture if gpu.architecture in SMEM_BYTES else "sm_86"
    legal = [
        t
        for t in tiles
        if min(t.warps_n, t.warps_k) >= 1
        and t.warps <= MOST_WARPS
        and t.ahead % 2 == 0
        and t.ahead > 0
        and fits(t, known)
    ]
    programs = -(-job.n // base.rows) * -(-job.m // base.tokens)
    return with_splits("mma_sp", legal, programs, -(-job.k // (256 * base.warps_k)), gpu)


CHOICES: Mapping[str, Callable[[ConvJob, Gpu], list[Choice]]] = {
    "portable": portable_choices,
    "mma_sp": mma_choices,
    "wgmma_sp": lambda job, gpu: [Choice("wgmma_sp")],
    "linear": lambda job, gpu: [Choice("linear")],
    "dense": lambda job, gpu: [Choice("dense")],
}
