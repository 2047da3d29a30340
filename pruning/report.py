"""Report: a plan as a table. rich is imported when a table is printed, not before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimgemm.kernels.formats import LEAST_SAVING, PATTERNS
from slimgemm.pruning.patterns import Channels, NofM, Pattern

if TYPE_CHECKING:
    from slimgemm.pruning.plan import LayerPlan, Plan

WIDTH = 132  # columns of the printed table, whatever the terminal


def amount(value: float, unit: str = "") -> str:
    """1234567 as '1.23 M'; three digits and a decimal prefix."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def energy(pj: float) -> str:
    """Picojoules as pJ, nJ, µJ or mJ; a dash where the table has no figure."""
    if pj != pj:
        return "-"
    for unit, size in (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3)):
        if pj >= size:
            return f"{pj / size:.3g} {unit}"
    return f"{pj:.3g} pJ"


def packed_patterns() -> str:
    """The keep:group patterns that formats and kernels hold packed."""
    return ", ".join(f"{keep}:{group}" for keep, group in PATTERNS)


def storage_notes(pattern: Pattern, entries: Sequence[LayerPlan]) -> tuple[str, ...]:
    """What a reader of the predicted bytes should know."""
    if not isinstance(pattern, Channels) and not (isinstance(pattern, NofM) and pattern.packs):
        return (
            f"No format packs {pattern}: these weights keep their dense bytes, zeros included "
            f"(packed are {packed_patterns()})",
        )
    if isinstance(pattern, Channels):
        return ()
    return tuple(
        f"{entry.name}: {pattern} drops nothing of it, its rows are too short"
        if entry.kept == 1
        else f"{entry.name}: compress will leave it dense, zeros included: packed it would save "
        f"less than {100 * LEAST_SAVING:g} % of its bytes; ignore it to keep all its weights"
        for entry in entries
        if entry.refusal is None and entry.pruned_bytes == entry.dense_bytes
    )


def _change(before: float, after: float, unit: str = "") -> str:
    return f"{amount(before, unit)} → {amount(after, unit)}"


def _kept(entry: LayerPlan) -> str:
    if entry.refusal is not None:
        return "all"
    if entry.mask is not None:
        return f"{100 * entry.kept:.1f} %"
    return f"{list(entry.kept_shape)}"


def _times(before: float, after: float) -> str:
    """Microseconds dense and pruned; a dash for what is not known."""
    return " → ".join("-" if us != us else f"{us:.1f}" for us in (before, after))


def plan_table(plan: Plan) -> str:
    """The plan as text: layer, shape, kept, bytes, MACs, energy, or why a layer is left alone."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.pattern}, {plan.score}, seed {plan.seed}")
    headings = ["layer", "shape", "kept", "weight bytes", "MACs", f"energy, {plan.energy}"]
    timed = any(entry.us == entry.us for entry in plan.entries)
    measured = any(entry.us_measured == entry.us_measured for entry in plan.entries)
    headings += ["µs predicted"] * timed + ["µs measured"] * measured
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for entry in plan.entries:
        name, shape = f"{entry.name} ({entry.kind})", str(list(entry.shape))
        if entry.refusal is not None:
            table.add_row(name, shape, "all", f"left alone: {entry.refusal}")
            continue
        table.add_row(
            name,
            shape,
            _kept(entry),
            _change(entry.dense_bytes, entry.pruned_bytes, "B"),
            _change(entry.macs, entry.pruned_macs),
            f"{energy(entry.energy_pj)} → {energy(entry.pruned_energy_pj)}",
            *[_times(entry.us, entry.pruned_us)] * timed,
            *[_times(entry.us_measured, entry.pruned_us_measured)] * measured,
        )
    console = Console(width=WIDTH, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
        console.print(
            "Predicted for one forward of the example inputs. Energy: 45 nm, weights once from "
            "DRAM, activations once through SRAM; compare rows, do not quote.",
            soft_wrap=True,
        )
        for note in plan.notes:
            console.print(note, soft_wrap=True, markup=False)
    return captured.get()
