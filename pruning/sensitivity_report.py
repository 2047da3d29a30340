"""sensitivity_report: a scan as one table and one picture. rich and matplotlib load when used."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimgemm.pruning.sensitivity import Scan

WIDTH = 132


def scan_table(scan: Scan, max_drop: float | None = None) -> str:
    """A row per group or layer and pattern: the metric at each share that was reached.

    With `max_drop` also the largest share before the curve first drops by more than that.
    """
    from rich.console import Console
    from rich.table import Table

    better = "higher" if scan.higher_is_better else "lower"
    table = Table(
        title=f"metric after pruning one alone: dense {scan.dense:.4g}, {better} is better"
    )
    most = [] if max_drop is None else [f"within {max_drop:g}"]
    for heading in ("group or layer", "pattern", *most, "dropped share: metric"):
        table.add_column(heading, overflow="fold")
    for (name, pattern), points in scan.curves().items():
        values = "   ".join(f"{point.ratio:.2f}: {point.value:.4g}" for point in points)
        shares = [] if max_drop is None else [f"{scan.shares(pattern, max_drop)[name]:.2f}"]
        table.add_row(name, pattern, *shares, values)
    console = Console(width=WIDTH, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def draw_scan(scan: Scan, path: str | os.PathLike[str], max_drop: float) -> None:
    """PNG: a curve per group or layer, single points for patterns that fix their share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    marks = "os^vDPX*"
    for i, ((name, pattern), points) in enumerate(scan.curves().items()):
        label = f"{name} ({pattern})"
        ratios, values = [p.ratio for p in points], [p.value for p in points]
        if len(points) > 1:
            ratios, values = [0.0, *ratios], [scan.dense, *values]
        style = "-" if i < 10 else "--"
        axes.plot(ratios, values, style, marker=marks[i % len(marks)], markersize=4, label=label)
    line = scan.dense - max_drop if scan.higher_is_better else scan.dense + max_drop
    axes.axhline(line, color="black", linewidth=1, linestyle=":", label=f"threshold {line:.4g}")
    axes.set(xlabel="dropped share of one group or layer", ylabel="metric", xlim=(0, 1))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
