"""`slimgemm bench`: measure, record, and compare with what was recorded."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from slimgemm.benchmarks.bench import Settings
    from slimgemm.benchmarks.records import Record, Recorder

COLUMNS = 120  # of tables, where stdout is no terminal
MODELS, BUILDS, PREDICTION = "models", "builds", "prediction"


def fail(message: str, code: int = 2) -> NoReturn:
    """Say what is wrong on stderr and leave with this exit code."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def bench(
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="spmm_24, pack_24, conv2d_24, ..., models; may be repeated. Default: all of them. "
            "Also builds and prediction, which time nothing and are only run by name."
        ),
    ] = None,
    shapes: Annotated[
        str, typer.Option(help="all, main, check, small or tiny. Default: main on a GPU, or small.")
    ] = "",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="fp16, bf16 or fp32; may be repeated. Default: bf16 on a GPU, or fp32."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the recorded files.")] = Path("out/bench"),
    compare: Annotated[
        Path | None,
        typer.Option(
            help="A recorded file, or a folder of them: rows of ours that are slower are an error. "
            "Slower is a median of 1.1 times the recorded one or more and a p20 above the recorded "
            "p80, both beyond what torch's own rows took more in the same run (then the machine is "
            "slower), in two measurements."
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option(help="Also torch.compile, max-autotune: minutes more.")
    ] = True,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Begin no case after this long; ops share it.")
    ] = None,
) -> None:
    """Check, then time, every op beside torch's best on this device, and record it.

    What fails its check is not timed. On a GPU each sparse tensor core kernel is first tried in a
    process of its own, and left out if that one hangs or dies. Exit code 1 if one of our rows was
    refused or failed, or is slower than recorded beyond noise; 2 for bad input.
    """
    import torch
    from rich.console import Console

    from slimgemm.benchmarks import bench as job
    from slimgemm.benchmarks.peers import Peers
    from slimgemm.benchmarks.shapes import shapes as shape_set

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    if gpu:
        device = torch.device("cuda", torch.cuda.current_device())
    name = shapes or ("main" if gpu else "small")
    console = Console()
    if not console.is_terminal:
        console = Console(width=COLUMNS)
    try:
        extra = {MODELS, BUILDS, PREDICTION}
        kernel_ops = [o for o in op or () if o not in extra]
        ops = job.check_ops(kernel_ops) if kernel_ops or not op else []
        ops += [MODELS] if not op else [o for o in op if o in extra]
        settings = job.Settings(
            shape_set(name), dtypes_of(dtype, gpu), device, out, command_of(sys.argv),
            Peers(compiled), seconds,
        )  # fmt: skip
        ops = list(dict.fromkeys(ops))
        old = recorded(compare, device, ops) if compare else {}
        make_folder(out)
    except ValueError as error:
        fail(str(error))
    bad = run_all(ops, name, settings, old, console)
    if bad:
        fail(f"{len(bad)} rows are not as they must be:\n" + "\n".join(bad), 1)


def make_folder(out: Path) -> None:
    """Make the folder of the recorded files; ValueError where it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} must be a folder: {error.strerror}") from error


def command_of(arguments: list[str], program: str = "slimgemm") -> str:
    """The command line that measures this again: no folder of the program, nor of the output."""
    words = [word for word in arguments[1:] if not word.startswith("--out=")]
    while "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    threads = os.environ.get("OMP_NUM_THREADS")  # of them depends which clock is read
    return f"OMP_NUM_THREADS={threads} " * bool(threads) + program + " " + shlex.join(words)


def dtypes_of(names: Iterable[str] | None, gpu: bool) -> tuple[Any, ...]:
    """The dtypes of these names; ValueError for one that is not known."""
    from slimgemm.benchmarks.bench import DTYPES

    wanted = list(names or (["bf16"] if gpu else ["fp32"]))
    for one in wanted:
        if one not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {one!r}")
    return tuple(DTYPES[one] for one in wanted)


def recorded(path: Path, device: Any, ops: list[str]) -> dict[str, Any]:
    """op -> the Record to compare with.

    Raises:
        ValueError: there is no recorded file for any of `ops`, or one is not readable.
    """
    from slimgemm.benchmarks import machine, records
    from slimgemm.benchmarks.bench_model import ModelRow
    from slimgemm.benchmarks.harness import Row

    names = {op: f"{machine.slug(device)}_{op}.csv" for op in ops if op not in (BUILDS, PREDICTION)}
    if path.is_dir():
        files = {op: path / name for op, name in names.items() if (path / name).is_file()}
    else:
        files = {op: path for op, name in names.items() if path.name == name and path.is_file()}
    if not files:
        raise ValueError(f"{path} must be or hold one of {', '.join(names.values())}")
    return {op: records.read(f, ModelRow if op == MODELS else Row) for op, f in files.items()}


def run_all(
    ops: list[str], shapes: str, settings: Settings, old: dict[str, Any], console: Console
) -> list[str]:
    """Run each op, print its table, compare; what is wrong, one line each."""
    from slimgemm.benchmarks import bench as job
    from slimgemm.benchmarks import bench_paper, probe
    from slimgemm.benchmarks.bench_tables import complaints, show
    from slimgemm.benchmarks.compare import twice_slower
    from slimgemm.benchmarks.progress import Steps

    bad: list[str] = []
    started = time.monotonic()
    timed = [o for o in ops if o not in (BUILDS, PREDICTION)]
    if settings.device.type == "cuda":
        left_out = probe.skips([o for o in timed if o != MODELS], shapes, settings)
        settings = dataclasses.replace(settings, skip=left_out)
    limits = job.limits_of(settings) if timed else {}
    with Steps(console, loops=len(ops)) as steps:
        for number, op in enumerate(ops, 1):
            if op in (BUILDS, PREDICTION):
                path, text = bench_paper.run(op, settings)
                steps.say(f"{text}\nWrote {path}.")
                continue
            # The time is shared: what an op leaves of its part, the next ones have.
            until = None if settings.seconds is None else settings.seconds * number / len(ops)
            share = dataclasses.replace(settings, seconds=until)
            recorder = _run_one(op, shapes, share, limits, steps, started)
            show(recorder.rows, console)
            steps.say(f"Wrote {recorder.path}.")
            bad += complaints(recorder.rows)
            if op in old:
                again = functools.partial(_again, op, shapes, settings, limits, steps, started)
                try:
                    bad += twice_slower(old[op], _record(recorder), again, steps.say)
                except ValueError as error:
                    bad.append(f"{op}: {error}")
    return bad


def _record(recorder: Recorder) -> Record:
    from slimgemm.benchmarks import records

    return records.Record(recorder.head, recorder.rows)


def _again(op: str, shapes: str, settings: Settings, *rest: Any) -> Record:
    """The op measured once more; what was recorded stays."""
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = dataclasses.replace(settings, out=Path(folder))
        return _record(_run_one(op, shapes, elsewhere, *rest))


def _run_one(
    op: str, shapes: str, settings: Settings, limits: Any, steps: Any, started: float
) -> Recorder:
    from slimgemm.benchmarks import bench as job
    from slimgemm.benchmarks.bench_model import ModelRow, run_models
    from slimgemm.benchmarks.records import Recorder
    from slimgemm.benchmarks.workloads import SCALES, workloads

    s = settings
    if op != MODELS:
        total = sum(1 for _ in job.cases_of(op, s))
        with steps.loop(op, total) as loop:
            return job.run(op, s, limits, lambda rows: loop.step(rows[0].shape), started)
    scale = SCALES.get(shapes, SCALES["full"])
    total = sum(1 for dtype in s.dtypes for _ in workloads(scale, dtype, s.device))
    recorder = Recorder(s.out, MODELS, s.device, job.head_of(s, limits), ModelRow)
    with steps.loop(op, total) as loop:
        return run_models(
            scale, s.dtypes, s.device, recorder, s.peers,
            seconds=s.seconds, on_rows=lambda rows: loop.step(rows[0].workload),
            rounds=s.shapes.rounds, started=started,
        )  # fmt: skip
