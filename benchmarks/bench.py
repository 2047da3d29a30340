"""What `slimgemm bench` runs: the cases of each op over a set of shapes, measured and recorded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from slimgemm.benchmarks import (
    bench_channels,
    bench_conv,
    bench_pack_24,
    bench_scaled,
    bench_spmm_24,
    bench_step,
    machine,
)
from slimgemm.benchmarks.bench_scaled import EIGHT_BITS
from slimgemm.benchmarks.bench_spmm_24 import Product
from slimgemm.benchmarks.channel_layers import ConvLayer, GemmLayer
from slimgemm.benchmarks.harness import Case, first_line, measure
from slimgemm.benchmarks.machine import Limits
from slimgemm.benchmarks.peers import Peers
from slimgemm.benchmarks.records import Recorder
from slimgemm.benchmarks.rows import FAILED, SHORT, Row
from slimgemm.benchmarks.shapes import CHANNEL_RUN, Conv, Linear, Shapes

# What may be asked for; ops on 8 bits have their own.
DTYPES = {SHORT[dtype]: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
# So small that a call is nothing but its overhead.
OVERHEAD = Linear("overhead", 256, 256)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one run measures and where it writes.

    Args:
        seconds: no case is begun after this long; None for no end.
        skip: op -> implementation that must not run -> why.
    """

    shapes: Shapes
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    out: Path
    command: str
    peers: Peers = dataclasses.field(default_factory=Peers)
    seconds: float | None = None
    skip: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


Cases = Iterator[Case]
Maker = Callable[[Settings, torch.dtype], Cases]


def _products(make: Callable[[Product], Case], training: bool = False) -> Maker:
    def cases(s: Settings, dtype: torch.dtype) -> Cases:
        # Tokens outside: a run that is cut off has every layer at the first token counts.
        for m in s.shapes.tokens:
            for linear in s.shapes.linears:
                yield make(Product(linear.name, m, linear.n, linear.k, dtype, s.device, s.peers))
        for name, m, k, n in s.shapes.training if training else ():
            yield make(Product(name, m, n, k, dtype, s.device, s.peers))

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


def _convolutions(make: Callable[[Conv, torch.dtype, torch.device, Peers], Case]) -> Maker:
    return lambda s, dtype: (make(conv, dtype, s.device, s.peers) for conv in s.shapes.convs)


def _runs_and_ratios(s: Settings) -> Iterator[tuple[int, float]]:
    return ((run, ratio) for run in (CHANNEL_RUN, 1) for ratio in s.shapes.ratios)


def _gemm_channels(s: Settings, dtype: torch.dtype) -> Cases:
    tokens = sorted({min(s.shapes.tokens), max(s.shapes.tokens)})
    for linear in s.shapes.linears:
        for m in tokens:
            for run, ratio in _runs_and_ratios(s):
                layer = GemmLayer(linear.name, ratio, run, dtype, s.device, linear, m)
                yield bench_channels.forward(layer, s.peers)


def _gemm_gradient(make: Callable[[GemmLayer, Peers], Case]) -> Maker:
    def cases(s: Settings, dtype: torch.dtype) -> Cases:
        for name, m, k, n in s.shapes.training:
            for run, ratio in _runs_and_ratios(s):
                layer = GemmLayer(name, ratio, run, dtype, s.device, Linear(name, n, k), m)
                yield make(layer, s.peers)

    return cases


def _conv_channels(make: Callable[[ConvLayer, Peers], Case]) -> Maker:
    def cases(s: Settings, dtype: torch.dtype) -> Cases:
        for conv in s.shapes.convs:
            # A depthwise layer loses its channels with the layer before it: no gather is needed.
            if conv.groups == 1:
                for run, ratio in _runs_and_ratios(s):
                    yield make(ConvLayer(conv.name, ratio, run, dtype, s.device, conv), s.peers)

    return cases


def _overhead(s: Settings, dtype: torch.dtype) -> Cases:
    linear = OVERHEAD
    product = Product(linear.name, 1, linear.n, linear.k, dtype, s.device, s.peers)
    channels = GemmLayer(linear.name, 0.5, 1, dtype, s.device, linear, 1)
    for case in (bench_spmm_24.forward(product), bench_channels.forward(channels, s.peers)):
        yield dataclasses.replace(case, op="overhead", layer=case.op)


# The most telling first.
OPS: dict[str, Maker] = {
    "spmm_24": _products(bench_spmm_24.forward, training=True),
    "overhead": _overhead,
    "pack_24": _packing(bench_pack_24.pack),
    "prune_24": _packing(bench_pack_24.prune),
    "scaled_spmm_24": _products(bench_scaled.forward),
    "conv2d_24": _convolutions(bench_conv.conv2d_24),
    "gemm_channels": _gemm_channels,
    "conv2d_channels": _conv_channels(bench_channels.forward),
    "spmm_24_dgrad": _training(bench_spmm_24.dgrad),
    "spmm_24_wgrad": _training(bench_spmm_24.wgrad),
    "spmm_24_step": _training(bench_step.step),
    "conv2d_24_dgrad": _convolutions(bench_conv.conv2d_24_dgrad),
    "conv2d_24_wgrad": _convolutions(bench_conv.conv2d_24_wgrad),
    "gemm_channels_dgrad": _gemm_gradient(bench_channels.dgrad),
    "gemm_channels_wgrad": _gemm_gradient(bench_channels.wgrad),
    "conv2d_channels_dgrad": _conv_channels(bench_channels.dgrad),
    "conv2d_channels_wgrad": _conv_channels(bench_channels.wgrad),
    "spmm_24_epilogue": _products(bench_spmm_24.epilogue),
}


def dtypes_of(op: str, s: Settings) -> tuple[torch.dtype, ...]:
    """The dtypes of the operands of `op`: those of the settings, or the two of 8 bits."""
    return EIGHT_BITS if op == "scaled_spmm_24" else s.dtypes


def cases_of(op: str, s: Settings) -> Cases:
    """Every case of `op`."""
    return (case for dtype in dtypes_of(op, s) for case in OPS[op](s, dtype))


def check_ops(ops: Sequence[str]) -> list[str]:
    """`ops`, or all of them where none is named; ValueError for one that is not known."""
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return list(ops) or list(OPS)


def limits_of(s: Settings) -> dict[torch.dtype, Limits]:
    """The limits of the device for each dtype of the settings."""
    return {dtype: machine.measure_limits(s.device, dtype) for dtype in s.dtypes}


def head_of(s: Settings, limits: Mapping[torch.dtype, Limits]) -> dict[str, str]:
    """The head of the recorded files of this run."""
    head = machine.head(s.device, s.command)
    for dtype, limit in limits.items():
        head[f"limit_copy_tb_per_s_{SHORT[dtype]}"] = f"{limit.tb_per_s:.4g}"
        head[f"limit_dense_tflops_{SHORT[dtype]}"] = f"{limit.tflops:.4g}"
    return head


def _measured(op: str, case: Case, s: Settings, limit: Limits) -> list[Row]:
    """The rows of a case; if it cannot be measured at all, rows that say why."""
    try:
        # cudnn's own search, so that the dense convolution is at its best.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
            skip = s.skip.get(op, {})
            return measure(case, s.device, limit, rounds=s.shapes.rounds, skip=skip)
    except Exception as error:  # whatever a compiler or a driver raises: the other cases count
        names = (case.op, case.layer, case.shape, SHORT[case.dtype])
        return [Row(*names, one.name, FAILED, first_line(error)) for one in case.implementations]


def no_answer(device: torch.device) -> str:
    """Why `device` computes nothing any more, "" while it does: an illegal access ends it."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return first_line(error)
    return ""


def run(
    op: str,
    s: Settings,
    limits: Mapping[torch.dtype, Limits],
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
    started: float | None = None,
) -> Recorder:
    """Measure every case of `op` and record it after each case.

    Args:
        on_rows: called with the rows of each case.
        started: when the clock of `s.seconds` began, of time.monotonic; now unless given.
    """
    started = time.monotonic() if started is None else started
    dtypes = dtypes_of(op, s)
    own = {
        dtype: limits[dtype] if dtype in limits else machine.measure_limits(s.device, dtype)
        for dtype in dtypes
    }
    recorder = Recorder(s.out, op, s.device, head_of(s, own))
    for case in cases_of(op, s):
        if s.seconds is not None and time.monotonic() - started > s.seconds:
            recorder.head["ended"] = f"after {s.seconds:g} s, before {case.layer} {case.shape}"
            recorder.add([])
            return recorder
        rows = _measured(op, case, s, own[case.dtype])
        recorder.add(rows)
        on_rows(rows)
        gone = no_answer(s.device)
        if gone:
            recorder.head["ended"] = f"after {case.layer} {case.shape}: {gone}"
            recorder.add([])
            return recorder
    return recorder
