"""What can be said without a GPU: figures of the ahead-of-time builds, and predictions.

Nothing in these files was timed. A prediction is the floor that a GPU's data sheet sets: the larger
of bytes over bandwidth and products over peak rate. A kernel can reach no less time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slimgemm.benchmarks import machine, records
from slimgemm.benchmarks.bench import Settings
from slimgemm.benchmarks.shapes import LINEARS, TOKENS
from slimgemm.kernels.formats import values_per_byte

BUILD_ARCHS = ("sm_80", "sm_90")
BUILD_OPS = (
    "spmm_24", "spmm_24_mma_packed", "spmm_24_wgmma_packed", "spmm_24_mma_sp", "spmm_24_wgmma_sp",
    "scaled_spmm_24_mma_sp", "scaled_spmm_24_wgmma_sp",
)  # fmt: skip
BUILD_DTYPES_8 = ("fp8", "int8")
COLUMNS = 128  # dense columns over which the bytes of a tile are counted
NOTE = "prediction from data sheets; nothing in this file was measured"


class Gpu(NamedTuple):
    """What a data sheet says: TB/s, dense and sparse TFLOP/s in 16 bit."""

    tb_per_s: float
    dense_tflops: float
    sparse_tflops: float


# NVIDIA's data sheets; SXM parts.
GPUS = {
    "h200": Gpu(4.8, 989.4, 1978.9),
    "h100_sxm": Gpu(3.35, 989.4, 1978.9),
    "a100_sxm4_80gb": Gpu(2.039, 311.9, 623.8),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Floors of one linear layer in 16 bit; microseconds. Not measured.

    portable_us is that of a kernel that reads packed weights and multiplies on the dense tensor
    cores, sparse_us that of one on the sparse ones. bound: what sets sparse_us.
    """

    layer: str
    m: int
    n: int
    k: int
    dense_us: float
    portable_us: float
    sparse_us: float
    bound: str
    dense_over_sparse: float


def predict(layer: str, m: int, n: int, k: int, gpu: Gpu) -> Prediction:
    """The floors of x [m, k] @ w [n, k].T in 16 bit."""
    flop, rows = 2 * m * n * k, 2 * m * (n + k)
    packed = rows + n * -(-k // 8) * 9
    dense_bytes_us, packed_bytes_us = (b / gpu.tb_per_s / 1e6 for b in (rows + 2 * n * k, packed))
    dense_flop_us, sparse_flop_us = (
        flop / rate / 1e6 for rate in (gpu.dense_tflops, gpu.sparse_tflops)
    )
    dense = max(dense_bytes_us, dense_flop_us)
    sparse = max(packed_bytes_us, sparse_flop_us)
    bound = "bytes" if packed_bytes_us >= sparse_flop_us else "products"
    portable = max(packed_bytes_us, dense_flop_us)
    return Prediction(layer, m, n, k, dense, portable, sparse, bound, dense / sparse)


def predictions(gpu: Gpu) -> list[Prediction]:
    """The floors of every layer at every number of tokens."""
    return [predict(s.name, m, s.n, s.k, gpu) for s in LINEARS for m in TOKENS]


@dataclasses.dataclass(frozen=True)
class BuildRow:
    """One kernel as it was built ahead of time; nothing was run.

    tile_rows x tile_tokens is the output that a program owns; weight_bytes and x_bytes are what
    it reads for 128 dense columns of K. Instruction counts are of places in the code.
    """

    op: str
    kernel: str
    case: str
    dtype: str
    arch: str
    status: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    tensor_core: str
    tile_rows: int | None = None
    tile_tokens: int | None = None
    weight_bytes: int | None = None
    x_bytes: int | None = None
    flop_per_byte: float | None = None


def tile_of(op: str, case: str, dtype: str = "bf16", arch: str = "sm_90") -> tuple[int, int] | None:
    """(out features, rows of x) that a program of this build owns, if its label says."""
    if op == "spmm_24":
        found = re.match(r"(\d+)x(\d+)x\d+", case)
        return (int(found[2]), int(found[1])) if found else None
    found = re.match(r"m (\d+)", case)
    if not found:
        return None
    if op == "spmm_24_mma_packed":
        from slimgemm.kernels.gluon.mma_packed_tiles import mma_packed_tile

        return _area(mma_packed_tile(int(found[1]), aligned="odd" not in case))
    if "mma_sp" in op and "wgmma" not in op:
        from slimgemm.kernels.gluon.mma_tiles import mma_sp_tile

        widened = dtype == "fp8" and arch == "sm_90"
        return _area(mma_sp_tile(int(found[1]), "ragged" not in case, widened))
    return 128, int(found[1])  # WgmmaTile: 128 out features


def _area(tile: Any) -> tuple[int, int]:
    return tile.rows, tile.tokens


def build_row(report) -> BuildRow:
    """The row of one build report."""
    names = (report.op, report.kernel.strip("_"), report.case, report.dtype, report.arch)
    cores = ", ".join(f"{count} x {name}" for name, count in sorted(report.tensor_core.items()))
    status = "sound" if report.sound else "not sound"
    status = report.error or report.unsupported or status
    row = BuildRow(*names, status, report.registers, report.spill_bytes, report.smem_bytes, cores)
    return with_bytes(row) if cores else row


def with_bytes(row: BuildRow) -> BuildRow:
    """`row` with what its tile reads, where its label says the tile."""
    tile = tile_of(row.op, row.case, row.dtype, row.arch)
    if tile is None:
        return row
    itemsize = 4 if row.dtype in ("fp32", "tf32") else 1 if row.dtype in BUILD_DTYPES_8 else 2
    pattern = re.search(r"(\d):(\d)", row.case)
    keep, group = (int(pattern[1]), int(pattern[2])) if pattern else (2, 4)
    rows, tokens = tile
    # One byte of metadata for eight weights, beside the kept ones of them.
    weight = rows * COLUMNS // 8 * (values_per_byte(keep, group) * itemsize + 1)
    x = tokens * COLUMNS * itemsize
    return dataclasses.replace(
        row,
        tile_rows=rows,
        tile_tokens=tokens,
        weight_bytes=weight,
        x_bytes=x,
        flop_per_byte=2 * rows * tokens * COLUMNS / (weight + x),
    )


def run(op: str, s: Settings) -> tuple[Path, str]:
    """Write the file of `op` ("builds" or "prediction"): (its path, what to say)."""
    head = machine.head(s.device, s.command)
    if op == "prediction":
        paths = [_predict(name, s, head) for name in GPUS]
        return paths[0].parent, f"{len(paths)} prediction files ({NOTE})"
    rows = [build_row(report) for report in _reports(s)]
    path = s.out / "builds_spmm_24.csv"
    note = {"note": "ahead-of-time builds; nothing in this file was run"}
    records.write_text(path, records.as_csv({**head, **note}, rows, BuildRow))
    unsound = sum(row.status != "sound" for row in rows)
    return path, f"{len(rows)} kernels built, {unsound} not sound"


def _predict(name: str, s: Settings, head: dict[str, str]) -> Path:
    path, gpu = s.out / f"prediction_{name}.csv", GPUS[name]
    sheet = {f"data_sheet_{key}": str(value) for key, value in gpu._asdict().items()}
    text = records.as_csv({**head, "note": NOTE, **sheet}, predictions(gpu), Prediction)
    records.write_text(path, text)
    return path


def _reports(s: Settings) -> Iterator:
    from slimgemm.benchmarks.rows import SHORT
    from slimgemm.kernels.build import builds
    from slimgemm.kernels.build import run as build

    dtypes = [*(SHORT[dtype] for dtype in s.dtypes), *BUILD_DTYPES_8]
    wanted = [b for b in builds(BUILD_OPS, BUILD_ARCHS, dtypes) if "ragged" not in b.case]
    yield from build(wanted, jobs=1)
