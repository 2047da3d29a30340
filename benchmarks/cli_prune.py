"""`slimgemm prune`, `inspect` and `verify`: search under limits, and look at what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

COLUMNS = 100  # of tables, where stdout is no terminal
FOLDER = "Written by sparse_ops.save, or by slimgemm prune as --out: its model/ is read."
DEBUG = (
    "Show the traceback of what your code raises in the middle, instead of writing it to a file."
)
EXTENSIONS = "my_module:function, found from the present folder or among installed modules"
CROSS_ENTROPY = "torch.nn.functional:cross_entropy"
# Options of prune that scan and staircase have too.
Metric = Annotated[
    str,
    typer.Option(
        help="accuracy (percent), loss, or your own: module:function of a model -> number."
    ),
]
Lower = Annotated[
    bool, typer.Option("--lower-is-better", help="Of your own metric; else more is better.")
]
Loss = Annotated[str, typer.Option(help="module:function of (outputs, target).")]
Ignore = Annotated[
    list[str] | None, typer.Option(help="Layers that stay: names, or re:REGEX; repeat.")
]
Rows = Annotated[
    int | None,
    typer.Option(min=1, help="Rows that a forward has, at most a test batch, the default."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:NUMBER.")]


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong on stderr and leave with this exit code."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def console_of() -> Console:
    """A console as wide as its terminal, or COLUMNS."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=COLUMNS)


def prune(
    model: Annotated[str, typer.Argument(help=f"Makes the trained dense model: {EXTENSIONS}.")],
    data: Annotated[
        str,
        typer.Argument(help="Makes (training loader, test loader) of (inputs, target): the same."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for model/, search/ and the report.")] = Path(
        "out"
    ),
    max_drop: Annotated[
        float | None,
        typer.Option(help="Most that the metric may lose."),
    ] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Of a forward, measured.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="Of a forward.")] = None,
    max_params: Annotated[float | None, typer.Option(help="Parameters kept.")] = None,
    max_bytes: Annotated[float | None, typer.Option(help="Of the model as stored.")] = None,
    max_energy_mj: Annotated[
        float | None, typer.Option(help="Of a forward, predicted by a table of operations.")
    ] = None,
    measured_energy: Annotated[
        bool,
        typer.Option("--measured-energy", help="By the counter of an NVIDIA GPU, not predicted."),
    ] = False,
    method: Annotated[str, typer.Option(help="netadapt, pareto, amc.")] = "netadapt",
    minimise: Annotated[
        str, typer.Option(help="What falls under --max-drop alone: macs, params, latency_ms, ...")
    ] = "macs",
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="channels, 2:4, 1:4, 1:8, 2:8 or 4:8; repeat to mix. Default: channels."),
    ] = None,
    multiple_of: Annotated[int, typer.Option(min=1, help="Of widths after channels.")] = 8,
    metric: Metric = "accuracy",
    lower: Lower = False,
    loss: Loss = CROSS_ENTROPY,
    rows: Rows = None,
    short: Annotated[int, typer.Option(min=0, help="Steps of training after each candidate.")] = 20,
    long: Annotated[int, typer.Option(min=0, help="Steps of training at the end.")] = 500,
    exchange: Annotated[
        int, typer.Option(min=0, help="Rounds of exchanging widths at the end, at the same cost.")
    ] = 4,
    rate: Annotated[float, typer.Option(help="Highest learning rate (Adam).")] = 1e-3,
    ignore: Ignore = None,
    device: Device = "cpu",
    seed: Annotated[
        int, typer.Option(min=0, help="Of your functions, fine-tuning and search.")
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG)] = False,
) -> None:
    """Search how much to prune where under limits, fine-tune, pack, verify and save.

    Killed and started again with the same options it goes on where it was (OUT/search); with other
    ones it begins anew, and what OUT held moves to OUT/earlier-1, and so on. Where a function of
    yours raises in the middle, a line says which, where and at what; repaired, it goes on likewise.
    Exit code 1 if the limits cannot be met or verification fails, 2 for bad input.
    """
    limits = {
        "max_drop": max_drop, "max_latency_ms": max_latency_ms, "max_macs": max_macs,
        "max_params": max_params, "max_bytes": max_bytes, "max_energy_mj": max_energy_mj,
    }  # fmt: skip
    from slimgemm.benchmarks import prune_job
    from slimgemm.benchmarks.user_data import Source
    from slimgemm.pruning.task import Infeasible

    options = {
        "method": method, "minimise": minimise, "short": short, "long": long, "seed": seed,
        "exchange": exchange, "ignore": tuple(ignore or ()), **limits,
    }  # fmt: skip
    try:
        job = prune_job.Job(
            Source(model, data, metric, lower, loss, rows, device, seed), out,
            patterns=tuple(dict.fromkeys(pattern or ("channels",))), multiple_of=multiple_of,
            rate=rate, options=options, measured_energy=measured_energy, debug=debug,
        )  # fmt: skip
        result = job.run(console_of())
    except Infeasible as error:
        fail(f"{error}. What was tried is in {out}/search", 1)
    except ValueError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        fail(f"stopped; the same command goes on from {out}/search", 130)
    if not result.ok:
        fail(f"verification failed: {result.violations[0]}", 1)


def inspect(
    folder: Annotated[Path, typer.Argument(help=FOLDER)],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """What a saved folder holds: each layer, what was done to it, and its bytes.

    Exit code 2 if it is no checkpoint or damaged.
    """
    from slimgemm.benchmarks import saved

    try:
        contents = saved.contents(saved.checkpoint_in(folder))
    except ValueError as error:
        fail(str(error), 2)
    typer.echo(json.dumps(contents, indent=1) if as_json else saved.table(contents))


def verify(
    folder: Annotated[Path, typer.Argument(help=FOLDER)],
    model: Annotated[
        str | None, typer.Argument(help=f"Makes the dense model, to load it into: {EXTENSIONS}.")
    ] = None,
) -> None:
    """Check a saved folder: digests, every group of every packed weight, and that it loads.

    Exit code 1 if something is wrong, 2 if there is no checkpoint to check.
    """
    from slimgemm.benchmarks import saved
    from slimgemm.benchmarks.user_code import named

    make: Callable[[], nn.Module] | None = None
    try:
        folder = saved.checkpoint_in(folder)
        make = None if model is None else named(model)
    except ValueError as error:
        fail(str(error), 2)
    checks = saved.checks(folder, make)
    for check in checks:
        typer.echo(f"{'ok   ' if check.ok else 'WRONG'}  {check.what}: {check.detail}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the three commands to the command line."""
    for command in (prune, inspect, verify):
        app.command()(command)
