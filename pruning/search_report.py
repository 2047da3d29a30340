"""search_report: what a search found, as a table per layer and the front as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from slimgemm.kernels.timing import Times
from slimgemm.pruning.geometry import UNITS, Costs
from slimgemm.pruning.profile import layer_times
from slimgemm.pruning.report import amount, energy
from slimgemm.pruning.space import Allocation

if TYPE_CHECKING:
    from slimgemm.pruning.geometry import LayerCosts, ModelLatency
    from slimgemm.pruning.snapshot import Snapshot
    from slimgemm.pruning.space import Space
    from slimgemm.pruning.task import Limits, Task

WIDTH = 150
PACE = 0.1  # change of the device's pace that is told
NONE = float("nan")


@dataclass(frozen=True)
class LayerRow:
    """One layer, dense and as chosen; microseconds are NaN where nothing was measured."""

    name: str
    dense: LayerCosts
    now: LayerCosts
    measured_dense_us: float = NONE
    measured_us: float = NONE

    @property
    def verdict(self) -> str:
        """What was chosen, and whether it won as measured."""
        if self.now.pattern == self.dense.pattern and self.now.shape == self.dense.shape:
            return "dense"
        what = [] if self.now.pattern == self.dense.pattern else [self.now.pattern]
        what += [] if self.now.shape == self.dense.shape else ["channels"]
        if self.measured_us != self.measured_us:
            return " and ".join(what)
        won = "faster" if self.measured_us < self.measured_dense_us else "not faster"
        return f"{' and '.join(what)}, {won}"


def pace_of(latency: ModelLatency, times: Mapping[str, Times]) -> float:
    """Time of the dense model beside the finished one over that when its layers were timed."""
    return latency.pace(latency.table.of(times["dense"]))


def pace_notes(latency: ModelLatency | None, times: Mapping[str, Times]) -> list[str]:
    """That the latency of the result is not the time that was read, where that is so."""
    if latency is None or abs((pace := pace_of(latency, times)) - 1) <= PACE:
        return []
    read = latency.table.of(times["finished"]) / 1e3
    return [
        f"A forward of the dense model takes {pace:.2f} times what it took when its layers were "
        f"timed; latencies are as of then: {read / pace:.6g} ms, read {read:.6g}"
    ]


def layer_rows(
    task: Task, space: Space, done: Snapshot, deployed: Callable[[nn.Module], nn.Module]
) -> list[LayerRow]:
    """What each layer saves, predicted, and measured where there is a latency.

    Args:
        deployed: finished model -> the one that is timed.
    """
    before = space.geometry.layers()
    masks = task.choices.masks
    patterns = {name: masks[word] for name, word in done.allocation.patterns.items()}
    after = task.geometry(done.model).layers((), patterns)
    times: dict[str, dict[str, float]] = {"dense": {}, "finished": {}}
    if task.latency is not None:
        models = {"dense": task.model, "finished": deployed(done.model)}
        table = task.latency.table
        found = layer_times(models, task.example_inputs, list(before), table)
        times = {m: {n: table.of(us) for n, us in rows.items()} for m, rows in found.items()}
    return [
        LayerRow(
            name, before[name], after[name],
            times["dense"].get(name, NONE), times["finished"].get(name, NONE),
        )
        for name in before
    ]  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        model: finished: cut, masked, fine-tuned; ready for sparse_ops.compress and save.
        allocation: what was kept where.
        dense_value, value, drop: the metric of the dense and the finished model; how much worse.
        dense, predicted, measured: costs of the dense model, and of the finished one as predicted
            and as it is.
        times: whole models, "dense" and "finished", timed in turn; empty without a latency.
        limits: that were asked for.
        records: of the journal, in order: every candidate, step and finished model.
        layers: a row per layer.
        notes: what a reader should know.
        groups: group of coupled channels -> units before the search.
    """

    model: nn.Module = field(repr=False)
    allocation: Allocation
    dense_value: float
    value: float
    drop: float
    dense: Costs
    predicted: Costs
    measured: Costs
    times: Mapping[str, Times]
    limits: Limits
    records: Sequence[Mapping[str, Any]] = field(repr=False)
    layers: Sequence[LayerRow] = field(repr=False)
    notes: Sequence[str] = ()
    groups: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return found_table(self)

    def as_dict(self) -> dict[str, Any]:
        """All but the model, for a JSON file."""
        return {
            "limits": {**self.limits.costs, "max_drop": self.limits.max_drop},
            "allocation": self.allocation.as_dict(),
            "metric": {"dense": self.dense_value, "finished": self.value, "drop": self.drop},
            "costs": {
                "dense": self.dense.as_dict(),
                "predicted": self.predicted.as_dict(),
                "measured": self.measured.as_dict(),
            },
            "us_p20_p50_p80": {name: list(us) for name, us in self.times.items()},
            "layers": [
                {
                    "name": row.name,
                    "verdict": row.verdict,
                    "shape": [list(row.dense.shape), list(row.now.shape)],
                    "pattern": row.now.pattern,
                    "macs": [row.dense.macs, row.now.macs],
                    "weight_bytes": [row.dense.weight_bytes, row.now.weight_bytes],
                    "us_predicted": [_known(row.dense.us), _known(row.now.us)],
                    "us_measured": [_known(row.measured_dense_us), _known(row.measured_us)],
                }
                for row in self.layers
            ],
            "notes": list(self.notes),
        }

    def draw(self, path: str | os.PathLike[str], cost: str | None = None) -> None:
        """Write a picture of the front: the metric's drop against a cost."""
        draw_front(self, path, cost or next(iter(self.limits.costs), self.limits.minimise))


def _known(value: float) -> float | None:
    return None if value != value else value


def _pair(before: float, after: float) -> str:
    return "-" if before != before else f"{before:.1f} → {after:.1f}"


def found_table(found: Found) -> str:
    """Layers with what each saves, predicted and measured; then the model, and the notes."""
    from rich.console import Console
    from rich.table import Table

    layers = Table(title="layers: dense → chosen")
    for heading in ("layer", "weight", "choice", "MACs", "weight bytes", "energy",
                    "µs predicted", "µs measured"):  # fmt: skip
        layers.add_column(heading, overflow="fold")
    for row in found.layers:
        a, b = row.dense, row.now
        layers.add_row(
            row.name, f"{list(a.shape)} → {list(b.shape)}", row.verdict,
            f"{amount(a.macs)} → {amount(b.macs)}",
            f"{amount(a.weight_bytes, 'B')} → {amount(b.weight_bytes, 'B')}",
            f"{energy(a.energy_mj * 1e9)} → {energy(b.energy_mj * 1e9)}",
            _pair(a.us, b.us), _pair(row.measured_dense_us, row.measured_us),
        )  # fmt: skip
    whole = Table(title=f"model: limits {found.limits}")
    for heading in ("", "dense", "predicted", "finished"):
        whole.add_column(heading)
    dense, predicted, measured = (
        c.as_dict() for c in (found.dense, found.predicted, found.measured)
    )
    for name, unit in UNITS.items():
        if name in dense:
            values = (dense[name], predicted[name], measured.get(name, NONE))
            whole.add_row(unit, *(f"{value:,.6g}" for value in values))
    whole.add_row("metric", f"{found.dense_value:.4g}", "", f"{found.value:.4g}")
    console = Console(width=WIDTH, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(layers)
        console.print(whole)
        for name, us in found.times.items():
            console.print(f"{name}: {us.p50:.0f} µs ({us.p20:.0f} to {us.p80:.0f}, p20 to p80)")
        for note in found.notes:
            console.print(note, soft_wrap=True, markup=False)
    return captured.get()


def draw_front(found: Found, path: str | os.PathLike[str], cost: str) -> None:
    """PNG: every candidate, the front of those that nothing beats, dense, finished, limits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sign = 1 if found.drop * (found.dense_value - found.value) >= 0 else -1
    points = [
        (record["costs"][cost], sign * (found.dense_value - record["value"]))
        for record in found.records
        if record.get("kind") in ("candidate", "step")
        and cost in record.get("costs", {})
        and math.isfinite(record["value"])
    ]
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if points:
        axes.plot(*zip(*points, strict=True), "o", color="0.6", markersize=4, label="candidates")
        axes.plot(*zip(*front(points), strict=True), "-", color="#0072B2", label="front")
    dense = found.dense.get(cost)
    axes.plot([dense], [0.0], "s", color="black", label="dense")
    axes.plot([found.measured.get(cost)], [found.drop], "*", color="#D55E00", markersize=13,
              label="finished, as measured")  # fmt: skip
    if cost in found.limits.costs:
        axes.axvline(found.limits.costs[cost], color="black", linestyle=":", label="limit")
    if found.limits.max_drop is not None:
        axes.axhline(found.limits.max_drop, color="black", linestyle="--", label="max drop")
    axes.set(xlabel=UNITS[cost], ylabel="drop of the metric", xlim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(path)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, drop in sorted(points):
        if not best or drop < best[-1][1]:
            best.append((cost, drop))
    return best
