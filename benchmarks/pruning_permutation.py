"""pruning_permutation: how far an order of input channels brings 2:4, and how far any order could.

    efficacy = (kept in this order - kept in the default order) / (free - kept in the default order)

`free` is the magnitude that stays when each row drops half of its weights wherever they are: the
"50% rows" of the permutation tests in NVIDIA/apex (contrib/sparsity), whose efficacy this is.

The bound. One order serves all R rows, so what it gains in one it mostly loses in another. Of
independent weights take the magnitude kept of one group in one row, less its best sum of functions
of single weights (which no order changes): d, of mean 0. For G = K / 4 groups and N = K! / (4!**G
G!) ways to form them, Jensen's inequality gives for every b > 0

    E max over orders of the gain <= (ln N + G R ln E exp(b d)) / b

and the least of these over b, divided by G R (free - default per group and row), bounds the mean
efficacy of any search.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from slimgemm import pruning
from slimgemm.pruning.permutation import kept_magnitude

SAMPLES = 1 << 21  # groups drawn for the bound; it moves by less than 0.005 from draw to draw
BINS = 512  # quantiles between which the function of a single weight is constant
SHAPES = ((128, 64), (256, 256), (1024, 1024))
Row = dict[str, Any]


def free_magnitude(weight: Tensor) -> float:
    """Magnitude that stays of [N, K] when each row drops its K / 2 smallest."""
    size = weight.detach().double().abs()
    return float(size.topk(size.shape[1] // 2, dim=1).values.sum())


def efficacy(weight: Tensor, order: Tensor) -> float:
    """Share of the way from the default order of [N, K] to rows that drop half freely."""
    default, found = kept_magnitude(weight), kept_magnitude(weight[:, order])
    return (found - default) / (free_magnitude(weight) - default)


def group_sample(draw: Callable[..., Tensor]) -> tuple[Tensor, float]:
    """(d of the module docstring [SAMPLES], free less default per group and row).

    Args:
        draw: shape -> magnitudes of independent weights.
    """
    size = draw(SAMPLES, 4).double()
    kept = size.topk(2, dim=1).values.sum(1)
    flat = size.flatten()
    ranked = flat.sort().values
    edges = ranked[torch.linspace(0, flat.numel() - 1, BINS + 1).long()[1:-1]]
    place = torch.bucketize(flat, edges)
    centred = (kept - kept.mean()).repeat_interleave(4)
    alone = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, centred)
    alone /= place.bincount(minlength=BINS)
    rest = kept - alone[place].view(-1, 4).sum(1)
    free = 2 * ranked[flat.numel() // 2 :].mean()
    return rest - rest.mean(), float(free - kept.mean())


def most_efficacy(sample: tuple[Tensor, float], rows: int, columns: int) -> float:
    """The bound on the mean efficacy of any search, for independent weights [rows, columns]."""
    rest, gap = sample
    groups = columns // 4
    ways = math.lgamma(columns + 1) - groups * math.log(24) - math.lgamma(groups + 1)
    share = ways / (groups * rows)
    powers = [0.02 * 1.1**i for i in range(60)]
    least = min((share + float((b * rest).exp().mean().log())) / b for b in powers)
    return least / gap


def matrices(seed: int) -> Iterator[tuple[str, Tensor, Callable[..., Tensor] | None]]:
    """(name, weight, how to draw magnitudes like its own or None)."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        yield "normal", torch.randn(shape, generator=generator), _half_normal(seed)
    for rows, columns in SHAPES[1:]:
        sizes = torch.randn(columns, generator=generator).exp()
        yield (
            "channels of log-normal size",
            (torch.randn(rows, columns, generator=generator) * sizes),
            None,
        )


def _half_normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).abs()


def permutation(args: argparse.Namespace, real: dict[str, Tensor]) -> tuple[Row, list[Row]]:
    """Efficacy on random weights and on `real` ones; the bound where weights are independent."""
    sources = [*matrices(args.seed), *((name, weight, None) for name, weight in real.items())]
    rows = []
    for name, weight, draw in sources:
        start = time.process_time()
        order = pruning.find_permutation(weight, rounds=args.rounds, seed=args.seed)
        seconds = time.process_time() - start
        bound = (
            "-"
            if draw is None
            else (f"{100 * most_efficacy(group_sample(draw), *weight.shape):.1f}")
        )
        rows.append(
            {
                "weight": name,
                "shape": " x ".join(map(str, weight.shape)),
                "efficacy_percent": round(100 * efficacy(weight, order), 1),
                "bound_percent": bound,
                "cpu_s": round(seconds, 1),
            }
        )
    return {"rounds": args.rounds, "seed": args.seed}, rows
