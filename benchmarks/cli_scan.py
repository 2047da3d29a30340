"""`slimgemm scan` and `staircase`: look before a search, at what pruning costs and what widths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgemm.benchmarks.cli_prune import (
    CROSS_ENTROPY,
    DEBUG,
    EXTENSIONS,
    Device,
    Ignore,
    Loss,
    Lower,
    Metric,
    Rows,
    console_of,
    fail,
)

RATIOS = tuple(share / 10 for share in range(1, 10))
Model = Annotated[str, typer.Argument(help=f"Makes the trained dense model: {EXTENSIONS}.")]
Data = Annotated[
    str, typer.Argument(help="Makes (training loader, test loader) of (inputs, target): the same.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of your functions.")]


def scan(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for scan/.")] = Path("out"),
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="channels, 2:4, 1:4, 1:8, 2:8 or 4:8; repeat. Default: channels."),
    ] = None,
    multiple_of: Annotated[int, typer.Option(min=1, help="Of widths after channels.")] = 1,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Dropped share; repeat. Default: 0.1, 0.2, ... 0.9.")
    ] = None,
    max_drop: Annotated[
        float, typer.Option(min=0, help="Threshold of the table and the picture.")
    ] = 1.0,
    metric: Metric = "accuracy",
    lower: Lower = False,
    loss: Loss = CROSS_ENTROPY,
    ignore: Ignore = None,
    rows: Rows = None,
    device: Device = "cpu",
    seed: Seed = 0,
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG)] = False,
) -> None:
    """What the metric loses where each group of channels, or each layer, alone is pruned.

    Nothing is trained. A table, and OUT/scan/scan.png with a curve each. Killed and started again
    with the same options it goes on where it was (OUT/scan/points.jsonl).
    Exit code 2 for bad input.
    """
    from slimgemm.benchmarks.scan_job import ScanJob
    from slimgemm.benchmarks.user_data import Source

    try:
        source = Source(model, data, metric, lower, loss, rows, device, seed)
        patterns = tuple(dict.fromkeys(pattern or ("channels",)))
        ScanJob(
            source, out, patterns, multiple_of, tuple(ratio or RATIOS), max_drop,
            tuple(ignore or ()), debug,
        ).run(console_of())  # fmt: skip
    except ValueError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        fail(f"stopped; the same command goes on from {out}/scan", 130)


def staircase(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for staircase/.")] = Path("out"),
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Name; repeat. Default: of those that can be cut the four that do most work."
        ),
    ] = None,
    span: Annotated[
        int, typer.Option(min=4, help="Widths that are timed, up to the layer's own.")
    ] = 128,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds of all widths.")] = 20,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Share of time that rounding a width up may cost.")
    ] = 0.03,
    rows: Rows = None,
    device: Device = "cpu",
    seed: Seed = 0,
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG)] = False,
) -> None:
    """How long layers take at each width on this device, and the multiple to round widths to.

    A table, the --multiple-of to prune with, and OUT/staircase/staircase.png. What was timed is in
    OUT/staircase/latency.json and is not timed again. Exit code 2 for bad input.
    """
    from slimgemm.benchmarks.scan_job import StaircaseJob
    from slimgemm.benchmarks.user_data import Source

    try:
        source = Source(model, data, rows=rows, device=device, seed=seed)
        job = StaircaseJob(source, out, tuple(layer or ()), span, rounds, tolerance, debug)
        job.run(console_of())
    except ValueError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        fail(f"stopped; the same command goes on from {out}/staircase", 130)


def register(app: typer.Typer) -> None:
    """Add the two commands to the command line."""
    for command in (scan, staircase):
        app.command()(command)
