"""`slimgemm tune`: measure this GPU into the table that spmm_24 is dispatched from."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from slimgemm.benchmarks.progress import Loop
    from slimgemm.kernels.tune import Job
    from slimgemm.kernels.tune_table import Choice, Row

HUNG = 3  # exit code when a kernel does not come back
LAYERS = "sparse-tensor-cores"  # the default of --shapes


def tune(
    shapes: Annotated[
        str,
        typer.Option(
            help="Comma-separated: NxK (out x in features), a model (llama3-8b, vit-l, ...), one "
            f"of its layers (llama3-8b.qkv), or {LAYERS} for eight layers of large models."
        ),
    ] = LAYERS,
    dtype: Annotated[str, typer.Option(help="Comma-separated: fp16, bf16, fp32.")] = "bf16",
    tokens: Annotated[
        str,
        typer.Option(help="Comma-separated rows of x, powers of two. Default: 1 and 8 to 8192."),
    ] = "",
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Stop after these; the next run goes on.")
    ] = 10.0,
    out: Annotated[
        Path | None, typer.Option(help="The table. Default: where dispatch looks for it.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Each implementation's own tile alone: a first table sooner."),
    ] = False,
    device: Annotated[int, typer.Option(min=0, help="Number of the CUDA device.")] = 0,
) -> None:
    """Check and time every implementation of the 2:4 product on this GPU, and remember the fastest.

    A packed linear layer then runs on the fastest implementation that gave right results for its
    shape. Exit code 2 for bad input or no GPU, 3 if a kernel hangs: run it again, it goes on.
    """
    import torch
    from rich.console import Console

    try:
        work = todo(shapes, dtype, tokens)
    except ValueError as error:
        fail(str(error))
    if not torch.cuda.is_available():
        fail("slimgemm tune measures a GPU, and torch finds none here")
    if device >= torch.cuda.device_count():
        fail(f"device must be below {torch.cuda.device_count()}, got {device}")
    # So that the candidate that runs just then is not taken for one that hangs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measure(work, torch.device("cuda", device), out, minutes, quick, Console(width=100))
    except (ValueError, RuntimeError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Say what is wrong on stderr and leave with exit code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def named_shapes(text: str) -> list[tuple[int, int]]:
    """(N, K) of each of the comma-separated shapes, models and layers.

    Raises:
        ValueError: a name is not known, or a shape is not NxK.
    """
    from slimgemm.benchmarks.shapes import LINEARS, SPARSE_TENSOR_CORES

    found: list[tuple[int, int]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        n, _, k = part.partition("x")
        if n.isdecimal() and k.isdecimal():
            found.append((int(n), int(k)))
            continue
        layers = [x for x in LINEARS if part in (x.name, x.name.rpartition(".")[0])]
        layers = list(SPARSE_TENSOR_CORES) if part == LAYERS else layers
        if not layers:
            models = ", ".join(dict.fromkeys(x.name.rpartition(".")[0] for x in LINEARS))
            raise ValueError(f"shapes must be NxK, {LAYERS}, or of {models}, got {part!r}")
        found += [(layer.n, layer.k) for layer in layers]
    return found


def todo(shapes: str, dtype: str, tokens: str) -> list[Job]:
    """The rows that the options ask for.

    Raises:
        ValueError: an option names nothing, or what cannot be tuned.
    """
    from slimgemm.kernels.tune import TOKENS, jobs
    from slimgemm.kernels.tune_table import DTYPES

    by_name = {name: kind for kind, name in DTYPES.items()}
    kinds = [name.strip() for name in dtype.split(",")]
    if unknown := [name for name in kinds if name not in by_name]:
        raise ValueError(f"dtype must be one of {', '.join(by_name)}, got {unknown[0]!r}")
    counts = [part.strip() for part in tokens.split(",")] if tokens else list(map(str, TOKENS))
    if unknown := [count for count in counts if not count.isdecimal()]:
        raise ValueError(f"tokens must be whole numbers, got {unknown[0]!r}")
    return jobs(named_shapes(shapes), [by_name[name] for name in kinds], list(map(int, counts)))


def line(row: Row) -> str:
    """One row in a line: the fastest, the fastest of each other implementation, who is out."""
    best: dict[str, float] = {}
    for result in row.ranked:
        best.setdefault(result.choice.implementation, result.us_p50 or 0.0)
    times = ", ".join(f"{name} {us:.1f} us" for name, us in best.items()) or "nothing ran"
    out = [f"{sum(r.verdict == v for r in row.results)} {v}" for v in ("wrong", "failed")]
    out = [text for text in out if not text.startswith("0 ")]
    return f"{times}{' (' + ', '.join(out) + ')' if out else ''}"


def complaints(rows: Sequence[Row]) -> list[str]:
    """Each candidate that was wrong or failed somewhere, with the first reason."""
    seen: dict[tuple[str, str], str] = {}
    for row in rows:
        for result in row.results:
            if result.verdict != "ok":
                where = f"{row.n}x{row.k} {row.dtype} m={row.m}: {result.reason}"
                seen.setdefault((result.verdict, str(result.choice)), where)
    return [f"{verdict}: {choice}, {where}" for (verdict, choice), where in seen.items()]


def measure(
    work: Sequence[Job],
    device: torch.device,
    out: Path | None,
    minutes: float,
    quick: bool,
    console: Console,
) -> None:
    """Measure `work` on `device` into a table, with progress, and say what came of it.

    Raises:
        ValueError: the old table is damaged. RuntimeError: the GPU no longer answers.
    """
    from slimgemm.benchmarks.machine import head as machine_head
    from slimgemm.benchmarks.progress import Steps
    from slimgemm.kernels import tune as tuning
    from slimgemm.kernels import tune_table

    command = shlex.join(["slimgemm", *sys.argv[1:]])
    head = {**machine_head(device, command), **tune_table.here(device.index)}
    path = out or tune_table.user_path(head)
    loop: Loop

    def progress(job: Job, done: int, of: int, name: str) -> None:
        loop.show(f"{job}: {done + 1} of {of}, {name}")

    def on_hang(choice: Choice) -> None:
        where = f"{choice} has not come back for {tuning.HANG_S:.0f} s"
        typer.echo(f"error: {where}; run it again: it leaves that one out and goes on", err=True)
        sys.stderr.flush()
        os._exit(HUNG)  # nothing else ends a process that waits for the GPU

    table = tuning.resumed(path, head)
    rows, missing = [], 0
    tuner = tuning.gpu_tuner(device, on_hang, progress, quick)
    left = tuning.left(work, table, tuner)
    with Steps(console, loops=1) as steps, steps.loop("rows", len(left)) as loop:
        for job, row, why in tuning.tune(left, table, path, tuner, minutes=minutes):
            failed = f"not measured, --quick or fewer --tokens take less memory: {why}"
            steps.say(f"{job}: {line(row) if row else failed}")
            rows += [row] if row else []
            missing += row is None
            loop.step()
        loop.result = f"{len(rows)} measured, {len(work) - len(left)} from before"
    for complaint in complaints(rows):
        console.print(complaint, highlight=False, markup=False)
    more = len(left) - len(rows) - missing
    if more:
        console.print(f"{more} of {len(work)} rows are left; the same command goes on with them.")
    console.print(f"Wrote {path}." if rows else f"Nothing new for {path}.", highlight=False)
