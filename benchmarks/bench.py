"""What `slimgemm bench` runs: the cases of each op over a set of shapes, measured and recorded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from slimgemm.benchmarks import bench_channels, bench_conv, bench_pack_24, bench_spmm_24, machine
from slimgemm.benchmarks.bench_spmm_24 import Product
from slimgemm.benchmarks.harness import Case, first_line, measure
from slimgemm.benchmarks.machine import Limits
from slimgemm.benchmarks.peers import Peers
from slimgemm.benchmarks.records import Recorder
from slimgemm.benchmarks.rows import FAILED, SHORT, Row
from slimgemm.benchmarks.shapes import CHANNEL_RUN, Linear, Shapes

DTYPES = {name: dtype for dtype, name in SHORT.items()}
# So small that a call is nothing but its overhead.
OVERHEAD = Linear("overhead", 256, 256)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one run measures and where it writes.

    Args:
        seconds: no case is begun after this long; None for no end.
    """

    shapes: Shapes
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    out: Path
    command: str
    peers: Peers = dataclasses.field(default_factory=Peers)
    seconds: float | None = None


Cases = Iterator[Case]
Maker = Callable[[Settings, torch.dtype], Cases]


def _products(make: Callable[[Product], Case]) -> Maker:
    def cases(s: Settings, dtype: torch.dtype) -> Cases:
        # Tokens outside: a run that is cut off has every layer at the first token counts.
        for m in s.shapes.tokens:
            for linear in s.shapes.linears:
                yield make(Product(linear.name, m, linear.n, linear.k, dtype, s.device, s.peers))

    return cases


def _training(make: Callable[[Product], Case]) -> Maker:
    def cases(s: Settings, dtype: torch.dtype) -> Cases:
        for name, m, k, n in s.shapes.training:
            yield make(Product(name, m, n, k, dtype, s.device, s.peers))
        m = max(s.shapes.tokens)
        for linear in s.shapes.linears:
            yield make(Product(linear.name, m, linear.n, linear.k, dtype, s.device, s.peers))

    return cases


def _packing(make: Callable[[Linear, torch.dtype, torch.device], Case]) -> Maker:
    return lambda s, dtype: (make(linear, dtype, s.device) for linear in s.shapes.linears)


def _convolutions(s: Settings, dtype: torch.dtype) -> Cases:
    for conv in s.shapes.convs:
        yield bench_conv.conv2d_24(conv, dtype, s.device, s.peers)


def _runs_and_ratios(s: Settings) -> Iterator[tuple[int, float]]:
    return ((run, ratio) for run in (CHANNEL_RUN, 1) for ratio in s.shapes.ratios)


def _gemm_channels(s: Settings, dtype: torch.dtype) -> Cases:
    tokens = sorted({min(s.shapes.tokens), max(s.shapes.tokens)})
    for linear in s.shapes.linears:
        for m in tokens:
            for run, ratio in _runs_and_ratios(s):
                yield bench_channels.gemm_channels(linear, m, ratio, run, dtype, s.device, s.peers)


def _conv_channels(s: Settings, dtype: torch.dtype) -> Cases:
    for conv in s.shapes.convs:
        for run, ratio in _runs_and_ratios(s):
            # A depthwise layer loses its channels with the layer before it: no gather is needed.
            if conv.groups == 1:
                yield bench_channels.conv2d_channels(conv, ratio, run, dtype, s.device, s.peers)


def _overhead(s: Settings, dtype: torch.dtype) -> Cases:
    linear = OVERHEAD
    product = Product(linear.name, 1, linear.n, linear.k, dtype, s.device, s.peers)
    for case in (
        bench_spmm_24.forward(product),
        bench_channels.gemm_channels(linear, 1, 0.5, 1, dtype, s.device, s.peers),
    ):
        yield dataclasses.replace(case, op="overhead", layer=case.op)


# The most telling first.
OPS: dict[str, Maker] = {
    "spmm_24": _products(bench_spmm_24.forward),
    "overhead": _overhead,
    "pack_24": _packing(bench_pack_24.pack),
    "prune_24": _packing(bench_pack_24.prune),
    "conv2d_24": _convolutions,
    "gemm_channels": _gemm_channels,
    "conv2d_channels": _conv_channels,
    "spmm_24_dgrad": _training(bench_spmm_24.dgrad),
    "spmm_24_wgrad": _training(bench_spmm_24.wgrad),
    "spmm_24_epilogue": _products(bench_spmm_24.epilogue),
}


def check_ops(ops: Sequence[str]) -> list[str]:
    """`ops`, or all of them where none is named; ValueError for one that is not known."""
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return list(ops) or list(OPS)


def limits_of(s: Settings) -> dict[torch.dtype, Limits]:
    """The limits of the device for each dtype."""
    return {dtype: machine.measure_limits(s.device, dtype) for dtype in s.dtypes}


def head_of(s: Settings, limits: dict[torch.dtype, Limits]) -> dict[str, str]:
    """The head of the recorded files of this run."""
    head = machine.head(s.device, s.command)
    for dtype, limit in limits.items():
        head[f"limit_copy_tb_per_s_{SHORT[dtype]}"] = f"{limit.tb_per_s:.4g}"
        head[f"limit_dense_tflops_{SHORT[dtype]}"] = f"{limit.tflops:.4g}"
    return head


def _measured(case: Case, s: Settings, limit: Limits) -> list[Row]:
    """The rows of a case; if it cannot be measured at all, rows that say why."""
    try:
        # cudnn's own search, so that the dense convolution is at its best.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
            return measure(case, s.device, limit, rounds=s.shapes.rounds)
    except (RuntimeError, MemoryError) as error:
        names = (case.op, case.layer, case.shape, SHORT[case.dtype])
        return [Row(*names, one.name, FAILED, first_line(error)) for one in case.implementations]


def run(
    op: str,
    s: Settings,
    limits: dict[torch.dtype, Limits],
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
    started: float | None = None,
) -> Recorder:
    """Measure every case of `op` and record it after each case.

    Args:
        on_rows: called with the rows of each case.
        started: when the clock of `s.seconds` began, of time.monotonic; now unless given.
    """
    started = time.monotonic() if started is None else started
    recorder = Recorder(s.out, op, s.device, head_of(s, limits))
    for dtype in s.dtypes:
        for case in OPS[op](s, dtype):
            if s.seconds is not None and time.monotonic() - started > s.seconds:
                recorder.head["ended"] = f"after {s.seconds:g} s, before {case.layer} {case.shape}"
                recorder.add([])
                return recorder
            rows = _measured(case, s, limits[dtype])
            recorder.add(rows)
            on_rows(rows)
    return recorder
