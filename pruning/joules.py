"""joules: what a forward really draws, by the energy counter of an NVIDIA GPU.

    J per forward = (counter after - counter before - idle watts * seconds) / forwards

The counter counts the whole board since the driver was loaded, so the draw of the idle GPU is
measured first and taken off, and each figure is a window of seconds, not one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from slimgemm.kernels.timing import Times, percentiles


@dataclass(frozen=True)
class Joules:
    """Measured energy of a call.

    Args:
        per_call: joules, idle draw taken off: 20th, 50th and 80th percentile over the windows.
        idle_watts: what was taken off per second.
        calls: calls in all windows together.
    """

    per_call: Times
    idle_watts: float
    calls: int

    def __str__(self) -> str:
        p20, p50, p80 = (1e3 * joules for joules in self.per_call)
        return (
            f"{p50:.4g} mJ per forward ({p20:.4g} to {p80:.4g}, p20 to p80), "
            f"{self.idle_watts:.1f} W of idle draw taken off, {self.calls} forwards"
        )


def nvml_counter(device: torch.device | str = "cuda") -> Callable[[], float]:
    """A function that reads the GPU's energy counter, in joules.

    Raises:
        ValueError: no NVIDIA GPU, nvidia-ml-py is missing, or this GPU has no such counter.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        raise ValueError(
            f"measured energy needs an NVIDIA GPU, got {device}; the predicted energy of "
            "pruning.energy runs anywhere"
        )
    try:
        import pynvml
    except ImportError as error:
        raise ValueError(
            "measured energy needs nvidia-ml-py; pip install 'slimgemm[search]'"
        ) from error
    try:
        pynvml.nvmlInit()
        # By UUID: CUDA may number devices in another order, and hide some.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise ValueError(
            f"{device} has no readable energy counter: {error}; the predicted energy of "
            "pruning.energy runs anywhere"
        ) from error
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def measure_joules(
    call: Callable[[], Any],
    device: torch.device | str = "cuda",
    *,
    windows: int = 5,
    window_s: float = 2.0,
    counter: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Joules:
    """Joules per call of a GPU.

    Args:
        call: one forward.
        device: the GPU that it runs on.
        windows, window_s: measured windows, and the least seconds of each; the counter of a GPU
            moves every 20 to 100 ms, so that shorter windows read it too coarsely.
        counter: joules drawn so far; the GPU's own by default.
        clock, sleep: seconds; of tests.

    Raises:
        ValueError: there is no counter to read (see `nvml_counter`), or no window.
    """
    if windows < 1 or window_s <= 0:
        raise ValueError(f"needs a window of some seconds, got {windows} of {window_s} s")
    read = nvml_counter(device) if counter is None else counter
    wait: Callable[[], Any] = _nothing if counter is not None else torch.cuda.synchronize
    call()
    wait()
    before, start = read(), clock()
    sleep(window_s)
    idle_watts = (read() - before) / (clock() - start)
    samples, total = [], 0
    for _ in range(windows):
        calls, before, start = 0, read(), clock()
        while clock() - start < window_s:
            call()
            wait()
            calls += 1
        seconds = clock() - start
        samples.append((read() - before - idle_watts * seconds) / calls)
        total += calls
    return Joules(percentiles(samples), idle_watts, total)


def _nothing() -> None:
    """Nothing to wait for."""
