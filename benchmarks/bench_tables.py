"""How `slimgemm bench` shows its rows, and which of them it complains of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimgemm.benchmarks.rows import FAILED, MISSING, REFUSED, TIMED

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


WIDTHS = (30, 10, 10, 17, 11, 11)  # of all columns but the last, which takes the rest
LEGEND = "best dense / this: above 1, faster than the best dense competitor of its case"


def show(rows: Sequence[Any], console: Console) -> None:
    """Print the rows of one op, or of the models, case by case; what is missing in lines below."""
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        console.print("no rows")
        return
    rates = ("per s", "weights, MB") if hasattr(rows[0], "variant") else ("% of bytes", "% of flop")
    names = ("implementation", "eager us", "graph us", "best dense / this", *rates)
    cases: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        cases.setdefault(row.key[:-1], []).append(row)
    for place, (case, mine) in enumerate(cases.items()):
        console.print(escape(", ".join(part for part in case if part)), style="bold")
        table = Table(box=None, pad_edge=False, show_header=place == 0)
        for name, width in zip(names, WIDTHS, strict=True):
            table.add_column(name, width=width)
        table.add_column("note")
        for row in mine:
            if row.status == MISSING:
                continue
            style = "red" if row.status in (REFUSED, FAILED) else ""
            table.add_row(*map(escape, (f"  {row.key[-1]}", *_cells(row))), style=style)
        console.print(table)
    console.print(f"{LEGEND}.", style="dim", highlight=False)
    for reason, missing in _missing(rows).items():
        text = f"Missing: {', '.join(missing)} ({reason})"
        console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def _missing(rows: Sequence[Any]) -> dict[str, list[str]]:
    """Reason -> the implementations that are missing for it, in any case."""
    found: dict[str, list[str]] = {}
    for row in rows:
        names = found.setdefault(row.reason, []) if row.status == MISSING else []
        if row.key[-1] not in names:
            names.append(row.key[-1])
    return found


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
