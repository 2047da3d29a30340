"""How `slimgemm bench` shows its rows, and which of them it complains of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimgemm.benchmarks.rows import FAILED, REFUSED, TIMED

if TYPE_CHECKING:
    from rich.console import Console


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits, whole where it has more; no exponent from 1e-4 on."""
    if value is None:
        return ""
    if abs(value) < 1:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - len(str(int(abs(value)))))}f}"


def _cells(row: Any) -> list[str]:
    """Times, ratio and rates of a row, or why there are none."""
    if row.status != TIMED:
        return ["", "", "", "", "", f"{row.status}: {row.reason}"]
    if hasattr(row, "variant"):
        rates = [number(row.units_per_s), number(row.weight_bytes / 1e6)]
    else:
        rates = [number(row.byte_limit_percent), number(row.compute_limit_percent)]
    times = [number(row.eager_us_p50), number(row.graph_us_p50)]
    return [*times, number(row.best_dense_over_this), *rates, row.reason]


def show(rows: Sequence[Any], console: Console) -> None:
    """Print a table of the rows of one op, or of the models: a heading for each case."""
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        console.print("no rows")
        return
    rates = ("per s", "weights, MB") if hasattr(rows[0], "variant") else ("% of bytes", "% of flop")
    names = ("implementation", "eager us", "graph us", "best dense / this", *rates, "note")
    table = Table(*names, box=None, pad_edge=False)
    case: tuple[str, ...] = ()
    for row in rows:
        if row.key[:-1] != case:
            case = row.key[:-1]
            table.add_row(escape(", ".join(case)), style="bold")
        style = "red" if row.status in (REFUSED, FAILED) else "" if row.status == TIMED else "dim"
        table.add_row(*map(escape, (f"  {row.key[-1]}", *_cells(row))), style=style)
    console.print(table)


def is_ours(row: Any) -> bool:
    """True for a row of slimgemm: for models, of a variant that is packed."""
    return (
        "2:4" in row.variant if hasattr(row, "variant") else row.implementation.startswith("slim")
    )


def complaints(rows: Sequence[Any]) -> list[str]:
    """Our rows that were refused or that failed, one line each; what peers do is no fault."""
    return [
        f"{row.status}: {', '.join(row.key)}: {row.reason}"
        for row in rows
        if is_ours(row) and row.status in (REFUSED, FAILED)
    ]
