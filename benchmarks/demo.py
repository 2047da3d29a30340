"""The main job on real digits: train, prune, fine-tune, pack, verify, save, load, compare, time.

`run` does it for every seed and returns one Result; tables, JSON and picture are made from that.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from slimgemm.benchmarks import demo_reload, demo_seed, demo_timing, demo_train, digits
from slimgemm.benchmarks.demo_seed import Job, SeedRun
from slimgemm.benchmarks.demo_timing import KernelRow, Latency
from slimgemm.benchmarks.progress import Steps

MAX_DROP = 1.0  # points of accuracy that fine-tuning may leave lost
SMALL = 5_000  # training images up to which a data set gets EPOCHS_SMALL epochs
EPOCHS_SMALL, EPOCHS_LARGE = 8, 2
LATENCY_ROUNDS = {1: 100, 256: 20}  # images per forward -> timed rounds
# The same file read by two processes gives the same weights; this leaves room for a matrix library
# that sums in another order there. Relative to the largest logit.
RELOAD_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Args:
        out: folder of everything that is written.
        data: folder of IDX files, or None for scikit-learn's digits.
        seeds: how many, counted from 0.
        epochs: of the dense training; 2:4 fine-tuning takes half, rounded up. None: by size.
        threads: of the CPU.
        device: where the models are trained and timed.
    """

    out: Path
    data: Path | None = None
    seeds: int = 3
    epochs: int | None = None
    threads: int = 1
    device: torch.device = field(default_factory=lambda: default_device())


@dataclass(frozen=True)
class Check:
    """Something that must hold, and what was found."""

    name: str
    ok: bool
    found: str


@dataclass
class Result:
    """Everything that was measured.

    Args:
        latency: images per forward -> model ("dense", "packed", "channels") -> Latency, of seed 0.
        kernels: rows of the wide layers; empty without a GPU.
        seconds: of the whole run, loading of the data included.
    """

    settings: Settings
    job: Job
    runs: list[SeedRun]
    latency: dict[int, dict[str, Latency]]
    kernels: list[KernelRow]
    checks: list[Check]
    seconds: float

    @property
    def ok(self) -> bool:
        """All checks hold."""
        return all(check.ok for check in self.checks)


class OutError(ValueError):
    """The output folder cannot be used; the message names the place and the cure."""


def default_device() -> torch.device:
    """The current GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_out(settings: Settings) -> Path:
    """Make the output folder; returns the folder of the saved models.

    Raises:
        OutError: a path that the demo writes is taken by something that the demo did not write.
    """
    out, models = settings.out, settings.out / "models"
    for folder in (out, models):
        if folder.exists() and not folder.is_dir():
            raise OutError(f"{folder}: is a file; give another folder with --out")
    for seed in range(settings.seeds):
        for kind in ("24", "channels"):
            folder = demo_seed.folder_of(models, seed, kind)
            if folder.exists() and not (folder / "prune.json").is_file():
                raise OutError(
                    f"{folder}: exists and is not a saved model; move it, or give another --out"
                )
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutError(
            f"{models}: cannot be made ({error}); give another folder with --out"
        ) from error
    return models


def run(settings: Settings, console: Console) -> Result:
    """The whole demo, without tables and files other than the saved models.

    Raises:
        DataError, OutError: before anything is trained.
        ReloadError, AssertionError: the fresh process failed, or a kernel is wrong.
    """
    started = time.monotonic()
    models = prepare_out(settings)
    data = digits.load(settings.data)
    epochs = settings.epochs or (EPOCHS_SMALL if len(data.train_y) <= SMALL else EPOCHS_LARGE)
    job = Job(data, settings.device, epochs, -(-epochs // 2), models)
    console.print(
        f"{data.name}: {len(data.train_y)} training and {len(data.test_y)} test images, "
        f"{data.image[0]} x {data.image[1]} pixels; "
        f"{settings.seeds} seed{'s' * (settings.seeds > 1)}; on {job.device}",
        highlight=False,
    )
    gpu = settings.device.type == "cuda"
    loops = settings.seeds * demo_seed.LOOPS + 1 + len(LATENCY_ROUNDS) + gpu
    with demo_train.deterministic(settings.threads), Steps(console, loops) as steps:
        runs = [demo_seed.run_seed(job, seed, steps) for seed in range(settings.seeds)]
        _reload(job, runs, steps)
        latency = _time_models(job, runs[0], steps)
        rows = _time_kernels(runs[0], job.device, steps) if gpu else []
    checks = judge(runs)
    return Result(settings, job, runs, latency, rows, checks, time.monotonic() - started)


def _reload(job: Job, runs: Sequence[SeedRun], steps: Steps) -> None:
    """Load every saved model in one fresh process and compare its outputs."""
    places = [(run, kind) for run in runs for kind in ("24", "channels")]
    folders = [run.folders[kind] for run, kind in places]
    with steps.loop("load in a fresh process", len(folders)) as loop:
        outputs = demo_reload.reload(folders, job.data, job.device, loop.step)
        for (run, kind), got, folder in zip(places, outputs, folders, strict=True):
            found = demo_train.score(got, job.data.test_y)
            size = demo_seed.folder_bytes(folder)
            stage = demo_seed.Stage(found.accuracy, found.loss, size)
            demo_seed.compare(stage, got, run.outputs[kind])
            run.stages["reloaded" if kind == "24" else "cut_reloaded"] = stage
        loop.result = f"{len(folders)} models"


def _time_models(job: Job, run: SeedRun, steps: Steps) -> dict[int, dict[str, Latency]]:
    models = {name: run.models[name] for name in ("dense", "packed", "channels")}
    timer = demo_timing.timer_for(job.device)
    latency = {}
    for batch, rounds in LATENCY_ROUNDS.items():
        # A small test set is repeated up to the batch.
        repeats = -(-batch // len(job.data.test_x))
        images = job.data.test_x.repeat(repeats, 1, 1, 1)[:batch].to(job.device)
        with steps.loop(f"time models, {batch} image{'s' * (batch > 1)}", rounds) as loop:
            latency[batch] = demo_timing.time_models(models, images, timer, rounds, loop.step)
            loop.result = f"{rounds} rounds of {len(models)} models"
    return latency


def _time_kernels(run: SeedRun, device: torch.device, steps: Steps) -> list[KernelRow]:
    weights = {}
    for name in demo_train.WIDE:
        weight = run.models["tuned"].get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        weights[name] = weight
    rows = []
    timer = demo_timing.timer_for(device)
    with steps.loop("time kernels", len(weights) * len(demo_timing.KERNEL_BATCHES)) as loop:
        for row in demo_timing.time_kernels(weights, timer):
            rows.append(row)
            loop.step(f"{row.layer}, batch {row.batch}: {row.speedup:.2f} x")
        loop.result = f"{len(rows)} rows, each checked before it was timed"
    return rows


def judge(runs: Sequence[SeedRun]) -> list[Check]:
    """What must hold for the demo to succeed."""
    checks = []
    for key, what in (("tuned", "2:4"), ("cut_tuned", "channels")):
        drops = [run.stages["dense"].accuracy - run.stages[key].accuracy for run in runs]
        drop = statistics.mean(drops)
        checks.append(
            Check(
                f"{what} fine-tuned within {MAX_DROP:g} point{'s' * (MAX_DROP != 1)} of dense",
                drop <= MAX_DROP + 1e-9,  # the mean of rounded percentages may miss by a bit
                f"mean change {-drop:+.2f} points over {len(runs)} seed{'s' * (len(runs) > 1)}",
            )
        )
    bad = [run for run in runs if not run.verified]
    found = bad[0].verify_text if bad else f"{len(runs)} of {len(runs)} models"
    checks.append(Check("packed model verified against the dense one", not bad, found))
    for key, kind, what in (("reloaded", "24", "2:4"), ("cut_reloaded", "channels", "channels")):
        checks.append(_reload_check(runs, key, kind, what))
    return checks


def _reload_check(runs: Sequence[SeedRun], key: str, kind: str, what: str) -> Check:
    name = f"{what} model gives the same outputs in a fresh process"
    stages = [run.stages[key] for run in runs]
    if all(stage.bit_equal for stage in stages):
        return Check(name, True, "bit for bit")
    largest = [stage.difference for stage in stages]
    worst = max(math.inf if d is None or d != d else d for d in largest)
    scale = min(float(run.outputs[kind].abs().max()) for run in runs)
    found = f"largest difference {worst:.2e} of logits up to {scale:.1f}"
    return Check(name, worst <= RELOAD_TOLERANCE * scale, found)
