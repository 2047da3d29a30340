"""Plots of the recorded files: speed-up against tokens, roofline, staircase, accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimgemm.benchmarks.records import Record
from slimgemm.benchmarks.rows import TIMED, Row

SIZE = (7.5, 4.5)  # inches
DPI = 90
MARKERS = "osD^v<>PX*"


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    # Without the version of matplotlib, so that the same numbers give the same file.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _sizes(row: Row) -> dict[str, float]:
    parts = (part.rpartition(" ") for part in row.shape.split(", "))
    return {name: float(value) for name, _, value in parts}


def _timed(record: Record) -> list[Row]:
    return [r for r in record.rows if isinstance(r, Row) and r.status == TIMED]


def speedup(name: str, record: Record, folder: Path) -> str | None:
    """Best dense time over ours, against rows of x, a line per layer and kernel."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in _timed(record):
        if row.implementation in ("slimgemm spmm_24", "torch cusparselt"):
            where = lines.setdefault(f"{row.layer} {row.dtype}: {row.implementation}", [])
            where.append((_sizes(row)["m"], row.best_dense_over_this or 0.0))
    if not lines:
        return None
    figure, axes = _axes(f"{name}: {record.head['device']}", "rows of x", "best dense / this")
    for number, (label, points) in enumerate(lines.items()):
        style = "-" if "slimgemm" in label else ":"
        marker = MARKERS[number // 2 % len(MARKERS)]
        axes.plot(*zip(*sorted(points), strict=True), style + marker, label=label, lw=1, ms=4)
    axes.axhline(1.0, color="black", lw=1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    file = f"{name}_speedup.png"
    _save(figure, axes, folder / file)
    return file


def roofline(name: str, record: Record, folder: Path) -> str | None:
    """Dense-equivalent TFLOP/s against operations per byte, under the measured limits."""
    rows = [r for r in _timed(record) if r.dense_equivalent_tflops and r.tb_per_s]
    if not rows:
        return None
    figure, axes = _axes(
        f"{name}: {record.head['device']}", "dense-equivalent operations per byte moved",
        "dense-equivalent TFLOP/s",
    )  # fmt: skip
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        assert row.dense_equivalent_tflops is not None and row.tb_per_s is not None
        at = row.dense_equivalent_tflops / row.tb_per_s, row.dense_equivalent_tflops
        points.setdefault(row.implementation, []).append(at)
    for number, (label, found) in enumerate(points.items()):
        axes.plot(*zip(*found, strict=True), MARKERS[number % len(MARKERS)], label=label, ms=4)
    reach = [x for found in points.values() for x, _ in found]
    ends = min(reach), max(reach)
    dtype = rows[0].dtype
    copy = float(record.head[f"limit_copy_tb_per_s_{dtype}"])
    dense = float(record.head[f"limit_dense_tflops_{dtype}"])
    knee = max(ends[0], min(ends[1], dense / copy))
    roof = [min(dense, copy * x) for x in (ends[0], knee, ends[1])]
    axes.plot([ends[0], knee, ends[1]], roof, "k-", lw=1, label="measured copy and dense product")
    axes.loglog()
    file = f"{name}_roofline.png"
    _save(figure, axes, folder / file)
    return file


def staircase(name: str, record: Record, folder: Path) -> str | None:
    """Latency against kept channels, in runs and anywhere."""
    lines: dict[str, list[tuple[float, float]]] = {}
    rows = [r for r in _timed(record) if "kept_k" in r.shape]
    most = max((_sizes(r)["m"] for r in rows), default=0)
    for row in rows:
        sizes = _sizes(row)
        if sizes["m"] == most and row.us and "compiled" not in row.implementation:
            kind = f"{row.layer}: {row.implementation}, runs of {sizes['run']:.0f}"
            lines.setdefault(kind, []).append((sizes["kept_k"] / sizes["k"], row.us))
    if not lines:
        return None
    figure, axes = _axes(
        f"{name}, {most:.0f} rows: {record.head['device']}", "share of channels kept", "µs"
    )
    for number, (label, points) in enumerate(lines.items()):
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(*zip(*sorted(points), strict=True), f"-{marker}", label=label, lw=1, ms=4)
    axes.set_yscale("log")
    file = f"{name}_staircase.png"
    _save(figure, axes, folder / file)
    return file


def accuracy(demo: dict[str, Any], folder: Path) -> str:
    """Accuracy of the demo's models against the latency of 256 images."""
    stages = {stage["key"]: stage for stage in demo["stages"]}
    figure, axes = _axes(
        f"slimgemm demo: {demo['hardware']['gpu'] or demo['hardware']['cpu']}",
        "µs for 256 images", "accuracy, %",
    )  # fmt: skip
    for key, timed in (("dense", "dense"), ("packed", "packed"), ("cut_tuned", "channels")):
        times = demo["latency_us"]["256"][timed]
        middle = times["us_p50"]
        spread = [[middle - times["us_p20"]], [times["us_p80"] - middle]]
        mean, std = (stages[key][f"accuracy_{k}"] or 0 for k in ("mean", "std"))
        axes.errorbar([middle], [mean], xerr=spread, yerr=[std], fmt="o", label=timed, capsize=3)
    file = "cpu_demo_accuracy.png"
    _save(figure, axes, folder / file)
    return file


def _drawn(loaded: dict[str, Record], folder: Path) -> Iterator[tuple[str | None, str]]:
    for name, record in loaded.items():
        if name.endswith("_spmm_24") and not name.startswith("builds_"):
            yield speedup(name, record, folder), f"{name}: speed-up against rows of x"
            yield roofline(name, record, folder), f"{name}: roofline"
        if name.endswith("_gemm_channels"):
            yield staircase(name, record, folder), f"{name}: latency staircase"
    demo = folder / "cpu_demo.json"
    if demo.is_file():
        content = json.loads(demo.read_text(encoding="utf-8"))
        yield accuracy(content, folder), "slimgemm demo: accuracy against latency"


def draw(loaded: dict[str, Record], folder: Path) -> list[tuple[str, str]]:
    """Draw what the records allow: (file in `folder`, title) of each plot."""
    return [(file, title) for file, title in _drawn(loaded, folder) if file]
