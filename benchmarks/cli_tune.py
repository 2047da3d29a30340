"""`slimgemm tune`: measure this GPU into the table that 2:4 layers are dispatched from."""

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
    from slimgemm.kernels.tune_jobs import AnyJob, ConvJob
    from slimgemm.kernels.tune_table import Choice, Row

HUNG = 3  # exit code when a kernel does not come back
LAYERS = "sparse-tensor-cores"  # the default of --shapes


def tune(
    shapes: Annotated[
        str,
        typer.Option(
            help="Comma-separated: NxK (out x in features), a model (llama3-8b, vit-l, ...), one "
            f"of its layers (llama3-8b.qkv), or {LAYERS} for eight layers of large models. "
            f"Default: {LAYERS}, or none with --convs."
        ),
    ] = "",
    convs: Annotated[
        str,
        typer.Option(
            help="Comma-separated: convolutions of a model (resnet50, efficientnet-b0) or one of "
            "them (resnet50.layer2.3x3)."
        ),
    ] = "",
    batch: Annotated[
        str, typer.Option(help="Comma-separated numbers of images of --convs.")
    ] = "32",
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
    """Check and time every implementation of 2:4 layers on this GPU, and remember the fastest.

    A packed layer then runs on the fastest implementation that gave right results for its shape.
    Exit code 2 for bad input or no GPU, 3 if a kernel hangs: run it again, it goes on.
    """
    import torch
    from rich.console import Console

    try:
        work = todo(shapes, dtype, tokens, convs, batch)
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


def named_convs(text: str, batches: Sequence[int], dtype: torch.dtype) -> list[ConvJob]:
    """The comma-separated convolutions of models, over each number of images.

    Raises:
        ValueError: a name is not known.
    """
    from slimgemm.benchmarks.shapes import CONVS, RESNET50
    from slimgemm.kernels.conv_layout import convolution
    from slimgemm.kernels.tune_jobs import ConvJob

    known = {conv.name: conv for conv in (*RESNET50, *CONVS)}
    found: list[ConvJob] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        layers = [c for name, c in known.items() if part in (name, name.partition(".")[0])]
        if not layers:
            models = ", ".join(dict.fromkeys(name.partition(".")[0] for name in known))
            raise ValueError(f"convs must be {models} or their layers, got {part!r}")
        for c in layers:
            shape = (c.channels_out, c.channels_in // c.groups, c.kernel, c.kernel)
            conv = convolution(shape, c.stride, c.padding, groups=c.groups)
            found += [ConvJob(dtype, conv, images, c.image, c.image) for images in batches]
    return found


def counts(name: str, text: str) -> list[int]:
    """Comma-separated whole numbers; ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if not part.isdecimal() or int(part) < 1]:
        raise ValueError(f"{name} must be whole numbers, got {unknown[0]!r}")
    return list(map(int, parts))


def todo(shapes: str, dtype: str, tokens: str, convs: str = "", batch: str = "") -> list[AnyJob]:
    """The rows that the options ask for: linear layers, then convolutions.

    Raises:
        ValueError: an option names nothing, or what cannot be tuned.
    """
    from slimgemm.kernels.tune_jobs import TOKENS, conv_jobs, jobs
    from slimgemm.kernels.tune_table import DTYPES

    by_name = {name: kind for kind, name in DTYPES.items()}
    kinds = [name.strip() for name in dtype.split(",")]
    if unknown := [name for name in kinds if name not in by_name]:
        raise ValueError(f"dtype must be one of {', '.join(by_name)}, got {unknown[0]!r}")
    dtypes = [by_name[name] for name in kinds]
    rows = counts("tokens", tokens) if tokens else list(TOKENS)
    linears = named_shapes(shapes or ("" if convs else LAYERS))
    work: list[AnyJob] = [*jobs(linears, dtypes, rows)] if linears or not convs else []
    if convs:
        images = counts("batch", batch)
        found = conv_jobs(job for kind in dtypes for job in named_convs(convs, images, kind))
        if not found:
            raise ValueError(f"convs must name a convolution, got {convs!r}")
        done = {job.shape for job in work}
        work += [job for job in found if job.shape not in done]
    return work


def place(row: Row) -> str:
    """A row's shape in a few words."""
    if row.conv is None:
        return f"{row.n}x{row.k} {row.dtype} m={row.m}"
    conv = row.conv
    kernel = "x".join(map(str, conv.kernel))
    return f"{conv.channels}->{conv.out} {kernel} {row.dtype} {row.m} pixels"


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
    seen: dict[tuple[str, str, str], str] = {}
    for row in rows:
        for result in row.results:
            if result.verdict != "ok":
                key = (row.op, result.verdict, str(result.choice))
                seen.setdefault(key, f"{place(row)}: {result.reason}")
    return [f"{verdict}: {choice}, {where}" for (_, verdict, choice), where in seen.items()]


def measure(
    work: Sequence[AnyJob],
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

    def progress(job: AnyJob, done: int, of: int, name: str) -> None:
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
            cure = "--quick, fewer --tokens or a smaller --batch take less memory"
            failed = f"not measured, {cure}: {why}"
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
