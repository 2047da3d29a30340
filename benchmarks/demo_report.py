"""What the demo prints. Every number comes from a demo.Result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slimgemm.benchmarks.demo import Result
from slimgemm.benchmarks.demo_json import hardware
from slimgemm.benchmarks.demo_seed import STAGES, LayerRow, Stage
from slimgemm.benchmarks.demo_timing import KernelRow
from slimgemm.pruning.cost import HOROWITZ45

# stage -> the model whose latency stands in its row
TIMED = {"dense": "dense", "packed": "packed", "cut_tuned": "channels"}


def show(result: Result, console: Console) -> None:
    """Print the table, what the latencies mean, and the checks."""
    whole = Table.grid(padding=(1, 0))
    whole.add_row(layer_table(result))
    whole.add_row(stage_table(result))
    if result.kernels:
        whole.add_row(kernel_table(result.kernels))
    console.print(whole)
    for line in (*size_lines(result), *latency_lines(result), energy_line()):
        console.print(line, highlight=False, markup=False)
    console.print()
    for check in result.checks:
        mark = Text("ok    ", "bold green") if check.ok else Text("FAILED", "bold red")
        console.print(mark, f" {check.name}: {check.found}", sep="", highlight=False, markup=False)


def _table(title: str, columns: Sequence[str], left: int) -> Table:
    """A table whose first `left` columns are text."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", overflow="fold")
    return table


def shape(sizes: Sequence[int]) -> str:
    """[1024, 512] as 1024×512."""
    return "\u00d7".join(str(size) for size in sizes)


def layer_table(result: Result) -> Table:
    """Per layer and pattern: shape, kept, bytes and predicted energy, of seed 0."""
    columns = "layer", "shape", "stored as", "kept %", "dense B", "stored B", "of dense"
    table = _table("Weights, and energy per image", (*columns, "dense µJ", "stored µJ"), 3)
    rows = result.runs[0].layers
    for pattern in ("2:4", "channels"):
        mine = [row for row in rows if row.pattern == pattern]
        table.add_row(Text(pattern, "bold"))
        for row in mine:
            table.add_row(*_layer_cells(row))
        dense, stored = sum(r.dense_bytes for r in mine), sum(r.stored_bytes for r in mine)
        kept = sum(r.kept * math.prod(r.shape) for r in mine) / sum(
            math.prod(r.shape) for r in mine
        )
        energy = sum(r.energy_pj for r in mine), sum(r.stored_energy_pj for r in mine)
        cells = "all", "", "", f"{100 * kept:.1f}", f"{dense:,}", f"{stored:,}"
        ratio = f"{100 * stored / dense:.3f} %"
        table.add_row(
            *cells, ratio, *(f"{pj / 1e6:.2f}" for pj in energy), style="bold", end_section=True
        )
    return table


def _layer_cells(row: LayerRow) -> Iterator[str]:
    if row.packed_16bit_bytes is not None:
        stored_as = "packed 2:4"
    elif row.stored_shape != row.shape:
        stored_as = shape(row.stored_shape)
    else:
        stored_as = "dense, zeros" if row.kept < 1 else "dense"
    yield from (f"  {row.layer}", shape(row.shape), stored_as, f"{100 * row.kept:.1f}")
    yield from (f"{row.dense_bytes:,}", f"{row.stored_bytes:,}")
    yield f"{100 * row.stored_bytes / row.dense_bytes:.3f} %"
    yield from (f"{row.energy_pj / 1e6:.2f}", f"{row.stored_energy_pj / 1e6:.2f}")


def duration(us: float, *around: float) -> str:
    """868 µs, or 29.8 ms from ten milliseconds on; percentiles in the same unit behind it."""
    size, digits, unit = (1, 0, "µs") if us < 1e4 else (1e3, 1, "ms")
    numbers = [f"{value / size:,.{digits}f}" for value in (us, *around)]
    return f"{numbers[0]} {unit}" + (f" ({'-'.join(numbers[1:])})" if around else "")


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def stage_table(result: Result) -> Table:
    """Per stage: accuracy over the seeds, file size, output difference and latency."""
    seeds = len(result.runs)
    title = f"Stages, mean ± standard deviation of {seeds} seeds" if seeds > 1 else "Stages, 1 seed"
    columns = ["stage", "accuracy %", "loss", "file bytes", "output diff"]
    columns += [images(batch) for batch in result.latency]
    table = _table(title, columns, 1)
    for key, name in STAGES.items():
        stages = [run.stages[key] for run in result.runs]
        cells = [
            name,
            spread([stage.accuracy for stage in stages]),
            f"{statistics.mean(stage.loss for stage in stages):.3f}",
            f"{stages[0].file_bytes:,}",
            _difference(stages),
        ]
        for found in result.latency.values():
            timed = found.get(TIMED.get(key, ""))
            cells.append(duration(timed.us_p50) if timed else "")
        table.add_row(*cells, end_section=key in ("dense", "reloaded"))
    return table


def _difference(stages: Sequence[Stage]) -> str:
    """Largest difference to the stage before, of all seeds."""
    known = [stage.difference for stage in stages if stage.difference is not None]
    if not known:
        return ""
    return "0, bit-equal" if all(stage.bit_equal for stage in stages) else f"{max(known):.1e}"


def kernel_table(rows: Sequence[KernelRow]) -> Table:
    """Dense and packed product of the wide layers, medians."""
    columns = "layer", "shape", "dtype", "batch", "dense µs", "packed µs", "dense / packed"
    table = _table("Kernels: dense by torch, packed by spmm_24, cold L2, medians", columns, 3)
    for row in rows:
        times = f"{row.dense.us_p50:.1f}", f"{row.packed.us_p50:.1f}", f"{row.speedup:.2f} x"
        table.add_row(row.layer, shape((row.n, row.k)), row.dtype, str(row.batch), *times)
    return table


def size_lines(result: Result) -> Iterator[str]:
    """What packing gives in bytes, at the dtype of the model and at 16 bit."""
    packed = [row for row in result.runs[0].layers if row.packed_16bit_bytes is not None]
    if not packed:
        yield "No layer was packed: compress found none that is eligible and faster on this device."
        return
    dense = sum(row.dense_bytes for row in packed)
    half = sum(row.packed_16bit_bytes or 0 for row in packed)
    half_dense = sum(2 * math.prod(row.shape) for row in packed)
    stored = sum(row.stored_bytes for row in packed)
    yield (
        f"Packed layers take {100 * stored / dense:.3f} % of their dense float32 bytes, metadata "
        f"included; packed from float16 they take {100 * half / half_dense:.3f} %."
    )


def latency_lines(result: Result) -> Iterator[str]:
    """Latency with its spread, and what to make of it on this device."""
    device = result.settings.device.type
    where = hardware(result)
    threads = f"{where['threads']} thread{'s' * (where['threads'] > 1)} of {where['cpu']}"
    place = where["gpu"] if device == "cuda" else threads
    yield f"Latency on {place}, median (20th-80th percentile), seed 0:"
    for batch, found in result.latency.items():
        parts = [f"{n} {duration(t.us_p50, t.us_p20, t.us_p80)}" for n, t in found.items()]
        yield f"  {images(batch):<10}  {', '.join(parts)}"
    if device == "cuda":
        faster = sum(row.speedup > 1 for row in result.kernels)
        yield (
            "2:4 is a GPU speed-up for large layers; these are small. The packed kernel is faster "
            f"than torch's dense product in {faster} of {len(result.kernels)} rows above."
        )
    else:
        yield (
            "2:4 is a GPU speed-up. A CPU has no instruction for it: packed layers are unpacked at "
            "every call, and what a CPU gets is fewer bytes on disk and in memory. Here one "
            f"forward takes {times_dense(result, 'packed')}."
        )
    yield (
        "Cut channels make every layer smaller, on any device. Here one forward takes "
        f"{times_dense(result, 'channels')}."
    )


def images(batch: int) -> str:
    """1 image, 256 images."""
    return f"{batch} image{'s' * (batch > 1)}"


def times_dense(result: Result, model: str) -> str:
    """Latency of a model over that of the dense one, at every number of images."""
    parts = [
        f"{found[model].us_p50 / found['dense'].us_p50:.2f} x the dense time at {images(batch)}"
        for batch, found in result.latency.items()
    ]
    return ", ".join(parts)


def energy_line() -> str:
    """Where the predicted energy comes from, with word widths."""
    table = HOROWITZ45
    return (
        f"Energy is predicted, for 45 nm: {table.mac_pj[torch.float32]} pJ per float32 multiply-add"
        f", weights once from DRAM at {table.dram_pj:g} pJ and activations through SRAM at "
        f"{table.sram_pj:g} pJ per {table.word_bits}-bit word. Compare rows, do not quote."
    )
