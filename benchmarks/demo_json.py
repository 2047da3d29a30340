"""The demo's JSON: every number of a demo.Result, with versions, hardware and seeds."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from slimgemm.benchmarks.demo import Result
from slimgemm.benchmarks.demo_seed import CHANNEL_SHARE, RATE, RATE_CHANNELS, STAGES

PACKAGES = ("slimgemm", "torch", "triton", "numpy", "safetensors", "scikit-learn", "matplotlib")


def hardware(result: Result) -> dict[str, Any]:
    """CPU, threads, GPU and system, in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    device = result.settings.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": cpu,
        "threads": result.settings.threads,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def as_json(result: Result) -> dict[str, Any]:
    """All numbers of a run, as JSON types; sizes in bytes, times in microseconds or seconds."""
    job, settings = result.job, result.settings
    stages = []
    for key, name in STAGES.items():
        of_key = [run.stages[key] for run in result.runs]
        accuracies = [stage.accuracy for stage in of_key]
        stages.append(
            {
                "key": key,
                "name": name,
                "accuracy_mean": statistics.mean(accuracies),
                "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "runs": [{"seed": r.seed, **asdict(r.stages[key])} for r in result.runs],
            }
        )
    return {
        "ok": result.ok,
        "checks": [asdict(check) for check in result.checks],
        "data": {
            "name": job.data.name,
            "train": len(job.data.train_y),
            "test": len(job.data.test_y),
            "image": list(job.data.image),
            "classes": job.data.classes,
        },
        "settings": {
            "seeds": [run.seed for run in result.runs],
            "epochs": job.epochs,
            "fine_tune_epochs": job.fine_tune,
            "learning_rate": RATE,
            "learning_rate_channels": RATE_CHANNELS,
            "channel_share": CHANNEL_SHARE,
            "device": str(settings.device),
        },
        "layers": [asdict(row) for row in result.runs[0].layers],
        "stages": stages,
        "curves": [
            {"seed": run.seed, **{k: [asdict(s) for s in c] for k, c in run.curves.items()}}
            for run in result.runs
        ],
        "latency_us": {
            str(batch): {name: asdict(t) for name, t in found.items()}
            for batch, found in result.latency.items()
        },
        "kernels": [{**asdict(row), "speedup": row.speedup} for row in result.kernels],
        "models": [
            str(folder.relative_to(settings.out))
            for r in result.runs
            for folder in r.folders.values()
        ],
        "hardware": hardware(result),
        "versions": versions(),
        "seconds": result.seconds,
    }


def write_json(result: Result, path: Path) -> None:
    """Write `as_json`; a reader never sees half a file."""
    text = json.dumps(as_json(result), indent=1, ensure_ascii=False)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)
