"""What `slimgemm tune` tries for one shape: each implementation's own choice and legal neighbours.

A neighbour differs from the implementation's own tile in one number, or is the tile of the next
token count. What shared memory cannot hold is left out here; a tile that the compiler or the GPU
refuses all the same is recorded as failed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from slimgemm.kernels.configs import SMEM_BYTES, Tile, split_count, spmm_tile
from slimgemm.kernels.implementations import Fields
from slimgemm.kernels.tune_table import Choice

# For a GPU without a row of its own: what every one since sm_80 has.
LEAST_SMEM_BYTES = 99 << 10
MOST_WARPS = 16
MOST_SPLITS = 16


class Gpu(NamedTuple):
    """What tiles depend on: sm_80, ..., its multiprocessors, and whether it has tensor cores."""

    architecture: str
    multiprocessors: int
    tensor_cores: bool = True

    @property
    def smem_bytes(self) -> int:
        return SMEM_BYTES.get(self.architecture, LEAST_SMEM_BYTES)


def gpu_of(device: torch.device) -> Gpu:
    """The Gpu of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    name = f"sm_{found.major}{found.minor}"
    return Gpu(name, found.multi_processor_count, found.major >= 8)


def fields_of(tile: Any) -> Fields:
    """A tile as it is written into a table."""
    named = tile._asdict() if hasattr(tile, "_asdict") else dataclasses.asdict(tile)
    return tuple(named.items())


def neighbours(base: Any, changes: Mapping[str, tuple[float, ...]]) -> list[Any]:
    """`base` with one field multiplied by each of its factors in turn."""
    changed = getattr(base, "_replace", None) or (lambda **c: dataclasses.replace(base, **c))
    return [
        changed(**{name: int(getattr(base, name) * factor)})
        for name, factors in changes.items()
        for factor in factors
    ]


def portable_fits(t: Tile, itemsize: int, smem_bytes: int) -> bool:
    """True if x tiles of `stages` steps and the decoded weight tile fit in shared memory.

    They are what `tl.dot` reads from there; the accumulator may pass through it at the end.
    """
    whole = min(t.n, t.k) >= 16 and 1 <= t.warps <= 8 and t.stages >= 1
    ring = (t.stages * t.m + t.n) * t.k * itemsize
    return whole and ring <= smem_bytes and t.m * t.n * 4 <= smem_bytes


def portable_choices(m: int, n: int, k: int, dtype: torch.dtype, gpu: Gpu) -> list[Choice]:
    """Of the portable kernel."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    scalar = not gpu.tensor_cores or (dtype == torch.float32 and not tf32)
    base = spmm_tile(m, dtype.itemsize, scalar)
    tiles = [base]
    tiles += neighbours(base, {"n": (0.5, 2), "k": (0.5, 2), "warps": (0.5, 2)})
    tiles += [base._replace(stages=base.stages + more) for more in (-1, 1, 2)]
    fits = [t for t in tiles if portable_fits(t, dtype.itemsize, gpu.smem_bytes)]
    programs, steps = -(-m // base.m) * -(-n // base.n), -(-k // base.k)
    return with_splits("portable", fits, programs, steps, gpu)


def mma_choices(m: int, n: int, k: int, dtype: torch.dtype, gpu: Gpu) -> list[Choice]:
    """Of mma.sp; every dtype that it takes has two bytes."""
    from slimgemm.kernels.gluon.mma_packed import MMA_PACKED_TILES, mma_packed_tile
    from slimgemm.kernels.gluon.mma_tiles import fits

    base, rows = mma_packed_tile(m), list(MMA_PACKED_TILES.values())
    at = rows.index(base)
    tiles = [base, *rows[max(at - 1, 0) : at], *rows[at + 1 : at + 2]]
    both = (0.5, 2)
    tiles += neighbours(base, {"steps": both, "warps_n": both, "warps_k": both})
    tiles += [dataclasses.replace(base, ahead=base.ahead + more) for more in (-2, 2)]
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
    programs, rounds = -(-n // base.rows) * -(-m // base.tokens), -(-k // (256 * base.warps_k))
    return with_splits("mma_sp", legal, programs, rounds, gpu)


def wgmma_choices(m: int, n: int, k: int, dtype: torch.dtype, gpu: Gpu) -> list[Choice]:
    """Of wgmma.sp; its stages fill shared memory, so only fewer of them are tried."""
    from slimgemm.kernels.gluon.wgmma_tiles import WGMMA_SP_TILES, wgmma_sp_tile

    base = wgmma_sp_tile(m)
    tiles = [base, *(t for t in WGMMA_SP_TILES.values() if t != base)]
    tiles += [dataclasses.replace(t, stages=t.stages - 1) for t in tiles if t.stages > 2]
    return [Choice("wgmma_sp", fields_of(tile)) for tile in tiles]


def with_splits(name: str, tiles: list[Any], programs: int, steps: int, gpu: Gpu) -> list[Choice]:
    """Each tile with the splits its launcher takes, and the first with half and twice of them.

    Args:
        programs, steps: of the first tile, without splits.
    """
    found = [Choice(name, fields_of(tile)) for tile in dict.fromkeys(tiles)]
    own = split_count(programs, steps, gpu.multiprocessors)
    others = [s for s in (own // 2, own * 2) if 1 <= s <= min(MOST_SPLITS, steps)]
    return found + [found[0]._replace(splits=s) for s in others if found]


CHOICES: Mapping[str, Callable[[int, int, int, torch.dtype, Gpu], list[Choice]]] = {
    "portable": portable_choices,
    "mma_sp": mma_choices,
    "wgmma_sp": wgmma_choices,
    "dense": lambda m, n, k, dtype, gpu: [Choice("dense")],
}
