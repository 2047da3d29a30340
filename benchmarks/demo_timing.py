"""Latency of the demo's models and kernels: checked, interleaved, with its spread.

A timer takes a call and returns the microseconds of one run of it; everything else is the same on
every device. On a GPU a run starts with a cold L2 and is timed by CUDA events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm import kernels
from slimgemm.kernels.reference import allowed_error, output_error

Call = Callable[[], object]
Timer = Callable[[Call], float]

WARMUP = 3
KERNEL_BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
FLUSH_BYTES = 256 * 2**20  # more than the L2 of any GPU so far (H200 60 MB, B200 126 MB)


@dataclass(frozen=True)
class Latency:
    """Microseconds of one call: the 20th, 50th and 80th percentile of `calls` runs."""

    us_p20: float
    us_p50: float
    us_p80: float
    calls: int


@dataclass(frozen=True)
class KernelRow:
    """One wide layer at one batch size, dense (torch's own product) and packed (spmm_24).

    Args:
        n, k: out and in features; batch: rows of x.
        error, allowed: of the packed output, relative to the largest exact one (float64).
    """

    layer: str
    n: int
    k: int
    batch: int
    dtype: str
    dense: Latency
    packed: Latency
    error: float
    allowed: float

    @property
    def speedup(self) -> float:
        """Dense over packed, medians; below 1 the packed kernel is the slower one."""
        return self.dense.us_p50 / self.packed.us_p50


def cpu_timer(call: Call) -> float:
    """Wall clock of one call on the CPU."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def cuda_timer(device: torch.device) -> Timer:
    """CUDA events around one call, after the L2 was overwritten."""
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def timer(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The flush also keeps the GPU busy while the call is launched, so that the events see the
        # kernel and not the host; it runs long enough for one operator, not for a whole model.
        scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return timer


def timer_for(device: torch.device) -> Timer:
    """The timer of a device."""
    return cuda_timer(device) if device.type == "cuda" else cpu_timer


def interleaved(
    calls: Mapping[str, Call], timer: Timer, rounds: int, tick: Call = lambda: None
) -> dict[str, Latency]:
    """Time all calls in turn, `rounds` times after a warm-up, so that drift hits all alike.

    Args:
        tick: called after each timed round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP + rounds):
        for name, call in calls.items():
            us = timer(call)
            if turn >= WARMUP:
                times[name].append(us)
        if turn >= WARMUP:
            tick()
    return {name: summary(us) for name, us in times.items()}


def summary(us: Sequence[float]) -> Latency:
    """Percentiles of single times."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(us, dtype=torch.float64).quantile(points).tolist()
    return Latency(low, middle, high, len(us))


def time_models(
    models: Mapping[str, torch.nn.Module],
    images: Tensor,
    timer: Timer,
    rounds: int,
    tick: Call = lambda: None,
) -> dict[str, Latency]:
    """Latency of one forward of `images` through each model, in evaluation mode."""

    def forward(model: torch.nn.Module) -> Call:
        model.eval()
        return lambda: model(images)

    with torch.inference_mode():
        return interleaved({name: forward(m) for name, m in models.items()}, timer, rounds, tick)


def time_kernels(
    weights: Mapping[str, Tensor],
    timer: Timer,
    *,
    dtype: torch.dtype = torch.float16,
    batches: Sequence[int] = KERNEL_BATCHES,
    rounds: int = 50,
) -> Iterator[KernelRow]:
    """Check, then time, dense and packed products of 2:4 weights; one row per layer and batch.

    Args:
        weights: layer name -> dense [N, K] that is 2:4, on the device to be timed.
        dtype: of both products; weights are rounded to it before they are packed.

    Raises:
        AssertionError: a packed product is wrong; it is not timed.
    """
    for name, weight in weights.items():
        w = weight.detach().to(dtype)
        packed = kernels.pack_24(w)
        n, k = w.shape
        for batch in batches:
            generator = torch.Generator().manual_seed(batch)
            x = torch.randn(batch, k, generator=generator).to(w.device, dtype)
            error, allowed = check(x, w, packed, f"{name}, batch {batch}")
            calls: dict[str, Call] = {
                "dense": lambda x=x, w=w: F.linear(x, w),  # type: ignore[misc]
                "packed": lambda x=x, p=packed: kernels.spmm_24(x, p),  # type: ignore[misc]
            }
            with torch.inference_mode():
                found = interleaved(calls, timer, rounds)
            short = str(dtype).removeprefix("torch.")
            yield KernelRow(
                name, n, k, batch, short, found["dense"], found["packed"], error, allowed
            )


def check(x: Tensor, w: Tensor, packed: kernels.Packed24, name: str) -> tuple[float, float]:
    """(error, allowed error) of the packed product.

    Raises:
        AssertionError: the error is larger than allowed, or NaN.
    """
    exact = x.double() @ w.double().t()
    error = output_error(kernels.spmm_24(x, packed), exact)
    allowed = allowed_error(F.linear(x, w), exact)
    if not error <= allowed:  # also catches NaN
        raise AssertionError(f"{name}: error {error:.2e} > {allowed:.2e}; not timed")
    return error, allowed
