"""The command line: `slimgemm <command>`. Commands import what they need when they run."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from slimgemm.benchmarks import cli_bench, cli_prune, cli_scan, cli_tune

COLUMNS = 100  # of tables, where stdout is no terminal

app = typer.Typer(
    name="slimgemm",
    help="Prune PyTorch models, pack them into 2:4 and channel formats, run them, prove them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> None:
    """Say which versions run, and leave."""
    if wanted:
        found = [f"{name} {metadata.version(name)}" for name in ("slimgemm", "torch")]
        typer.echo(", ".join(found))
        raise typer.Exit()


@app.callback()
def commands(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and leave."),
    ] = False,
) -> None:
    """Prune PyTorch models, pack them into 2:4 and channel formats, run them, prove them."""


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of IDX files (MNIST, Fashion-MNIST), instead of scikit-learn's digits."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Trainings, with seeds 0, 1, ...")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for demo.json, demo.png and models/.")] = Path(
        "out"
    ),
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Epochs of dense training; 2:4 fine-tuning takes half. Default: by size."
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            min=1, help="CPU threads. One is best for 8 x 8 images, also on a busy machine."
        ),
    ] = 1,
) -> None:
    """The main job on real digits: train, prune, fine-tune, pack, verify, save, load, time.

    Exit code 1 if accuracy, verification or reloading fails (it says which), 2 for bad input.
    """
    # cuBLAS reads it when it starts; without it, its results may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=COLUMNS)
    with console.status("loading torch") if console.is_terminal else contextlib.nullcontext():
        from slimgemm.benchmarks import demo as job
        from slimgemm.benchmarks import demo_json, demo_picture, demo_reload, demo_report, digits
    settings = job.Settings(out, data, seeds, epochs, threads)
    try:
        demo_picture.require()
        result = job.run(settings, console)
    except (digits.DataError, job.OutError, demo_picture.PictureError) as error:
        _fail(str(error), 2)
    except demo_reload.ReloadError as error:
        _fail(str(error), 1)
    demo_json.write_json(result, out / "demo.json")
    demo_picture.draw(result, out / "demo.png")
    demo_report.show(result, console)
    console.print(f"\nWrote {out}/demo.json, {out}/demo.png and {out}/models/.", highlight=False)
    console.print(f"{result.seconds:.0f} s in all.", highlight=False)
    if not result.ok:
        failed = [check.name for check in result.checks if not check.ok]
        _fail(f"the demo failed: {'; '.join(failed)}", 1)


@app.command()
def kernels(
    op: Annotated[
        str | None, typer.Option(help="One op, for example spmm_24. Default: all.")
    ] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, gfx942, ...; may be repeated. Default: all.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp16, bf16, fp32, tf32, fp8 or int8. Default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the reports.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Compilers that run side by side.")] = 2,
) -> None:
    """Build every kernel ahead of time and print registers, spills and instructions. No GPU needed.

    Exit code 1 if a build fails, spills or takes too much shared memory, 2 for bad input.
    """
    from slimgemm.kernels.build import kernels_command

    try:
        status = kernels_command(op, arch, dtype, out, jobs)
    except ValueError as error:
        _fail(str(error), 2)
    raise typer.Exit(status)


app.command(name="bench")(cli_bench.bench)
app.command(name="tune")(cli_tune.tune)
cli_scan.register(app)
cli_prune.register(app)


def _fail(message: str, code: int) -> NoReturn:
    """Say what is wrong on stderr and leave with this exit code."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the `slimgemm` script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # tables hold ± and µ; an ASCII pipe must not crash
    app()


if __name__ == "__main__":
    main()
