"""How calls are timed: interleaved rounds, L2 cold, eager or as a captured CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
# Bytes read before a timed call, per byte of L2: evicts it all, and keeps the GPU busy while the
# host queues the call, so that events see of the host's time only what outlasts that.
FLUSH_PER_L2 = 8


class Times(NamedTuple):
    """Microseconds per call: 20th, 50th and 80th percentile over the rounds."""

    p20: float
    p50: float
    p80: float


def percentiles(samples: Sequence[float]) -> Times:
    """The percentiles of at least one sample."""
    if len(samples) == 1:
        return Times(samples[0], samples[0], samples[0])
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(cuts[1], cuts[4], cuts[7])


def capture(calls: Sequence[Call], device: torch.device) -> torch.cuda.CUDAGraph:
    """One CUDA graph of `calls`, in order, each run three times before on a side stream.

    Raises:
        RuntimeError: a call does what cannot be captured (waits for the GPU, copies from the host).
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    return graph


def flush_buffer(device: torch.device) -> torch.Tensor:
    """A buffer for `empty_l2`, fp32."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(max(l2, 1 << 20) * FLUSH_PER_L2 // 4, device=device)


def empty_l2(buffer: torch.Tensor) -> None:
    """Leave nothing in the L2 but clean lines of `buffer`.

    Read, not written: lines that were written would go to memory while the next call is timed, as
    many bytes as the L2 holds, which is a tax on whoever reads few.
    """
    buffer.sum()


def _gpu_us(run: Call, buffer: torch.Tensor | None, warm: bool) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if buffer is not None:
        empty_l2(buffer)
    if warm:
        run()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _cpu_us(run: Call, clock: Callable[[], int], warm: bool) -> float:
    if warm:
        run()
    start = clock()
    run()
    return (clock() - start) / 1e3


def cpu_clock() -> Callable[[], int]:
    """Nanoseconds of CPU time where torch has one thread, which other processes on the machine do
    not lengthen by taking turns; of the wall where it has several.
    """
    return time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns


def _in_turn(calls: Sequence[Call]) -> Call:
    """The next of `calls` at each call, round and round."""
    turn = [0]

    def run() -> None:
        calls[turn[0] % len(calls)]()
        turn[0] += 1

    return run


def time_us(
    calls: Mapping[str, Call | Sequence[Call]],
    device: torch.device | str,
    *,
    graph: bool = False,
    flush: bool = True,
    warm: bool = False,
    rounds: int = 30,
    warmup: int = 3,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Times]:
    """Microseconds of each of `calls`, measured in turn in every round.

    Interleaving lets every competitor meet the same clocks and temperature.

    Args:
        calls: name -> a call, or several of the same work on different inputs: eager calls rotate
            through them, a graph holds all of them and its time is divided by their number.
        graph: replay a CUDA graph of the calls, without the host's share; needs a GPU.
        flush: on a GPU, empty the L2 cache before each measurement.
        warm: run each call untimed right before it is timed, after the flush: its data are then in
            the caches, as far as they fit, where a layer in a model finds its input too.
        rounds, warmup: measured rounds, and rounds before them that are thrown away.
        clock: nanoseconds, for calls on a CPU.
    Raises:
        ValueError: no calls, no rounds, or `graph` without a GPU.
        RuntimeError: a call cannot be captured in a graph; torch says why.
    """
    device = torch.device(device)
    if not calls or rounds < 1:
        raise ValueError(f"needs calls and at least one round, got {len(calls)} and {rounds}")
    if graph and device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a CUDA device, got {device}")
    lists = {name: [c] if callable(c) else list(c) for name, c in calls.items()}
    if device.type != "cuda":
        in_turn = {name: (_in_turn(several), 1) for name, several in lists.items()}
        return _measure(in_turn, lambda run: _cpu_us(run, clock, warm), rounds, warmup)
    with torch.cuda.device(device):
        buffer = flush_buffer(device) if flush else None
        runs: dict[str, tuple[Call, int]] = {}
        for name, several in lists.items():
            if graph:
                runs[name] = (capture(several, device).replay, len(several))
            else:
                runs[name] = (_in_turn(several), 1)
        return _measure(runs, lambda run: _gpu_us(run, buffer, warm), rounds, warmup)


def _measure(
    runs: Mapping[str, tuple[Call, int]],
    clock: Callable[[Call], float],
    rounds: int,
    warmup: int,
) -> dict[str, Times]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name, (run, per_run) in runs.items():
            us = clock(run) / per_run
            if turn >= warmup:
                samples[name].append(us)
    return {name: percentiles(us) for name, us in samples.items()}
