"""What a measurement ran on: the head of every recorded file, its limits and its joules.

What cannot be read is recorded as "missing: why", never left out.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slimgemm.kernels.timing import cpu_clock, time_us

ROOT = Path(__file__).resolve().parents[1]
# nvidia-smi query -> key in the head; those of STATE are read before and after.
FIXED = {
    "driver_version": "driver",
    "power.limit": "power_limit_w",
    "clocks.max.sm": "clock_sm_max_mhz",
}
STATE = {
    "clocks.sm": "clock_sm_mhz",
    "clocks.mem": "clock_memory_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}
# Of the copy and the product that measure the limits of a GPU; a CPU gets 1/16 and 1/8 of them,
# and 1/64 of the rows in 8 bits, which it has no instructions for.
COPY_BYTES = 2**30
PRODUCT = 8192  # rows and columns
# Products queued while clocks are read, and their rows and columns: an idle GPU clocks down. At the
# rate of an H200's data sheet they take 0.06 s.
BUSY_CALLS, BUSY_SIDE = 400, 4096
SAMPLE_MS = 50  # between readings of the power

Run = Callable[[Sequence[str]], str]


def run_text(command: Sequence[str]) -> str:
    """What `command` prints.

    Raises:
        OSError: it is not there; subprocess.SubprocessError: it failed or took over 20 s.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """First part of a recorded file's name: h200, a100_sxm4_80gb, geforce_rtx_4090, cpu."""
    if device.type != "cuda":
        return device.type
    name = device_name(device).removeprefix("NVIDIA ").lower()
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def capability(device: torch.device) -> str:
    """Compute capability of a GPU, as 9.0."""
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def _missing(error: Exception | str) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return f"missing: {text[0]}"


def nvidia_smi(
    device: torch.device, queries: Mapping[str, str], run: Run = run_text
) -> dict[str, str]:
    """What nvidia-smi says of `device`: key -> number as it is printed, or why there is none."""
    if device.type != "cuda":
        return dict.fromkeys(queries.values(), "missing: no GPU")
    which = str(torch.cuda.get_device_properties(device).uuid)
    which = which if which.startswith("GPU-") else f"GPU-{which}"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(queries)}"]
    try:
        line = run([*command, "--format=csv,noheader,nounits"])
    except (OSError, subprocess.SubprocessError) as error:
        return dict.fromkeys(queries.values(), _missing(error))
    found = [part.strip() for part in line.split(",")]
    if len(found) != len(queries):
        return dict.fromkeys(queries.values(), _missing(f"nvidia-smi said {line!r}"))
    return dict(zip(queries.values(), found, strict=True))


def commit(run: Run = run_text) -> str:
    """The commit of this tree, "-dirty" behind it where files differ; SLIMGEMM_COMMIT before it."""
    given = os.environ.get("SLIMGEMM_COMMIT")
    if given:
        return given
    try:
        git = ["git", "-C", str(ROOT)]
        changed = run([*git, "status", "--porcelain", "--untracked-files=no"])
        return run([*git, "rev-parse", "HEAD"]) + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError) as error:
        return _missing(error)


def version(package: str) -> str:
    """The installed version of `package`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing: not installed"


def clock_name(device: torch.device) -> str:
    """Which clock times are of."""
    if device.type == "cuda":
        return "CUDA events"
    return "CPU time of one thread" if cpu_clock() is time.thread_time_ns else "wall"


def head(device: torch.device, command: str, run: Run = run_text) -> dict[str, str]:
    """Machine, software and command, as the lines that begin a recorded file."""
    gpu = device.type == "cuda"
    cudnn = torch.backends.cudnn.version() if gpu else None
    found = {
        "device": device_name(device),
        "compute_capability": capability(device) if gpu else "none",
        **nvidia_smi(device, FIXED, run),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "threads": str(torch.get_num_threads()),
        "clock": clock_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(cudnn) if cudnn else "none",
        "cusparselt": str((torch.backends.cusparselt.version() if gpu else None) or "none"),
        "commit": commit(run),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
    }
    return {**found, **state(device, "before", run)}


def keep_busy(device: torch.device) -> None:
    """Queue products for `device`, without waiting for them."""
    a = torch.randn(BUSY_SIDE, BUSY_SIDE, device=device).to(torch.bfloat16)
    for _ in range(BUSY_CALLS):
        a @ a


def state(device: torch.device, when: str, run: Run = run_text) -> dict[str, str]:
    """Clocks, power and temperature at work, the host's load; behind each key `when`."""
    keys = {query: f"{key}_{when}" for query, key in STATE.items()}
    load = (
        f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "missing: not on this system"
    )
    if device.type == "cuda":
        keep_busy(device)
    return {**nvidia_smi(device, keys, run), f"load_average_{when}": load}


class Limits(NamedTuple):
    """What this device reached when asked: the floors that rows are compared with."""

    tb_per_s: float  # bytes read and written by a large copy
    tflops: float  # of a large dense product


def product_of(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    """left @ right.T by torch's dense product for their dtype."""
    if left.dtype == torch.int8:
        return lambda: torch._int_mm(left, right.t())
    if left.dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=left.device)
        return lambda: torch._scaled_mm(
            left, right.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return lambda: left @ right.t()


def measure_limits(
    device: torch.device, dtype: torch.dtype, copy_bytes: int = 0, side: int = 0
) -> Limits:
    """The limits of `device`: a large copy, and a large square product in `dtype`.

    Args:
        copy_bytes, side: bytes copied, rows of the product; by the kind of device unless given.
    """
    gpu = device.type == "cuda"
    size = copy_bytes or (COPY_BYTES if gpu else COPY_BYTES // 16)
    side = side or (PRODUCT if gpu else PRODUCT // (64 if dtype.itemsize == 1 else 8))
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": product_of(left, right)}
    us = time_us(calls, device, graph=gpu, rounds=10, clock=cpu_clock())
    return Limits(2 * size / us["copy"].p50 / 1e6, 2 * side**3 / us["product"].p50 / 1e6)


class Energy(NamedTuple):
    """Joules of a stretch of work and how they were read, or why they were not."""

    joules: float | None
    source: str


def _nvml_millijoules(device: torch.device) -> int:
    """The GPU's energy counter."""
    import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def mean_watts(text: str) -> float:
    """Mean of the power readings that nvidia-smi printed, one a line.

    Raises:
        ValueError: there is no reading.
    """
    found = [float(line) for line in text.split() if re.fullmatch(r"\d+(\.\d+)?", line)]
    if not found:
        raise ValueError("nvidia-smi gave no power readings")
    return sum(found) / len(found)


def joules_of(work: Callable[[], Any], device: torch.device) -> Energy:
    """Joules that `device` takes for `work`, which waits for its own end; a second or more of it.

    From NVML's energy counter where pynvml is installed, else mean power of nvidia-smi x time.
    """
    if device.type != "cuda":
        work()
        return Energy(None, "missing: no GPU")
    try:
        before = _nvml_millijoules(device)
    except ImportError:
        return _sampled_joules(work, device)
    except Exception as error:  # NVML raises classes of its own: no counter, no permission
        work()
        return Energy(None, _missing(error))
    work()
    return Energy((_nvml_millijoules(device) - before) / 1e3, "nvml")


def _sampled_joules(work: Callable[[], Any], device: torch.device) -> Energy:
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    which = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    command = ["nvidia-smi", f"--id={which}", "--query-gpu=power.draw", f"-lms={SAMPLE_MS}"]
    try:
        sampler = subprocess.Popen(
            [*command, "--format=csv,noheader,nounits"], stdout=subprocess.PIPE, text=True
        )
    except OSError as error:
        work()
        return Energy(None, _missing(error))
    try:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    finally:
        sampler.terminate()
        text = sampler.communicate()[0]
    try:
        return Energy(mean_watts(text) * seconds, "nvidia-smi")
    except ValueError as error:
        return Energy(None, _missing(error))
