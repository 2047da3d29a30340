"""Tables and plots from the recorded files: `python -m slimgemm.benchmarks.report`.

Writes README.md and plots into the folder of the recorded files, and the part of the project's
README between the two markers. Every number in them is read from a recorded file; rows that lose
are shown with those that win.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slimgemm.benchmarks import records, report_bars, report_plots
from slimgemm.benchmarks.bench_model import ModelRow
from slimgemm.benchmarks.bench_paper import BuildRow, Prediction
from slimgemm.benchmarks.bench_tables import number
from slimgemm.benchmarks.micro import MicroRow
from slimgemm.benchmarks.records import RESULTS, Record
from slimgemm.benchmarks.report_bars import MEANS, OURS, geometric_means, tokens_of
from slimgemm.benchmarks.rows import TIMED, Row

README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- measured: python -m slimgemm.benchmarks.report -->", "<!-- end of measured -->"
HEAD_KEYS = ("device", "driver", "threads", "clock", "load_average_before", "load_average_after",
             "torch", "triton", "date", "commit")  # fmt: skip
# Title, stage and timed model of each row of the demo's table.
DEMO_STAGES = (
    ("dense", "dense", "dense"),
    ("2:4, fine-tuned, packed", "packed", "packed"),
    ("half the channels, fine-tuned", "cut_tuned", "channels"),
)


def row_class(name: str) -> type:
    """The class of the rows of a recorded file, by the file's name."""
    if name.startswith("prediction_"):
        return Prediction
    if name.startswith("builds_"):
        return BuildRow
    return {"models": ModelRow, "micro": MicroRow}.get(name.rpartition("_")[2], Row)


def load(folder: Path) -> dict[str, Record]:
    """File name without .csv -> what is in it; files of other kinds are left out."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8") as file:
            if file.readline().rstrip("\n") == records.FIRST_LINE:
                found[path.stem] = records.read(path, row_class(path.stem))
    return found


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = ([str(cell).replace("|", "/") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _timed_table(rows: Sequence[Any]) -> str:
    models = isinstance(rows[0], ModelRow)
    rates = ["per second", "weights, MB", "joules per unit"] if models else [
        "TB/s", "dense-equivalent TFLOP/s", "% of byte limit", "% of compute limit"
    ]  # fmt: skip
    columns = [
        "case",
        "which",
        "eager µs p20 / p50 / p80",
        "graph µs p50",
        "best dense / this",
        *rates,
    ]
    table, case = [], ""
    for row in rows:
        spread = " / ".join(number(getattr(row, f"eager_us_{p}")) for p in ("p20", "p50", "p80"))
        if models:
            values = [row.units_per_s, row.weight_bytes / 1e6, row.joules_per_unit]
        else:
            values = [
                row.tb_per_s, row.dense_equivalent_tflops,
                row.byte_limit_percent, row.compute_limit_percent,
            ]  # fmt: skip
        ratio = number(row.best_dense_over_this)
        slower = row.best_dense_over_this is not None and row.best_dense_over_this < 1
        before, case = case, ", ".join(row.key[:-1])
        names = ["" if case == before else case, row.key[-1]]
        cells = [*names, spread, number(row.graph_us_p50), f"{ratio} (slower)" * slower or ratio]
        table.append([*cells, *map(number, values)])
    return markdown(columns, table)


def _untimed(rows: Sequence[Any]) -> str:
    """What was not timed and why, equal reasons counted."""
    counts = Counter((r.key[-1], r.status, r.reason) for r in rows if r.status != TIMED)
    lines = [f"- {name}: {status}, {why} ({n} rows)" for (name, status, why), n in counts.items()]
    return "\n".join(lines)


def bar_tables(rows: Sequence[Any]) -> list[tuple[str, str]]:
    """(title, table) of all that has a bar in the rows of one file of a GPU."""
    rows = [row for row in rows if isinstance(row, Row)]
    found = (
        ("After dispatch, over the eight layers:", report_bars.AGAINST_BARS,
         report_bars.against_bars(rows)),
        ("The fastest of our kernels:", report_bars.FASTEST, report_bars.fastest_of_ours(rows)),
        ("Packing against a copy of the dense weight:", report_bars.PACKED,
         report_bars.packing(rows)),
        ("The host, for one call:", report_bars.HOST, report_bars.overhead(rows)),
    )  # fmt: skip
    return [(title, markdown(columns, table)) for title, columns, table in found if table]


def autotuned(loaded: dict[str, Record], name: str) -> Record:
    """The record of `name`, cases in its file `_compiled` taken from there if they compiled."""
    record, compiled = loaded[name], loaded.get(f"{name}_compiled")
    if compiled is None:
        return record
    return record._replace(rows=report_bars.with_autotuned(record.rows, compiled.rows))


def _measured(name: str, record: Record, bars: str) -> str:
    """The tables of one file; `bars`: what they say against the bars, "" if nothing."""
    timed = [row for row in record.rows if row.status == TIMED]
    parts = [_timed_table(timed)] if timed else ["Nothing was timed."]
    means = geometric_means(timed) if timed and isinstance(timed[0], Row) else []
    if means:
        parts.insert(0, markdown(MEANS, means))
    if bars:
        parts.insert(0, bars)
    if len(timed) < len(record.rows):
        parts.append("Not timed:\n\n" + _untimed(record.rows))
    return "\n\n".join(parts)


def _facts(record: Record) -> str:
    """The head, in two lines."""
    head = record.head
    facts = ", ".join(f"{key} {head[key]}" for key in HEAD_KEYS if key in head)
    limits = [f"{key} {value}" for key, value in head.items() if key.startswith("limit_")]
    clocks = [
        f"{k} {v}"
        for k, v in head.items()
        if k.endswith(("_before", "_after")) and k not in HEAD_KEYS
    ]
    if all("missing" in text for text in clocks):
        clocks = ["no clocks or power: no GPU"]
    extra = [head[key] for key in ("note", "ended") if key in head]
    return f"`{head.get('command', '')}`\n\n{facts}; {', '.join([*limits, *clocks, *extra])}."


def _plain_table(rows: Sequence[Any]) -> str:
    columns = list(rows[0].__dataclass_fields__)
    text = lambda v: number(v, 4) if isinstance(v, float) else "" if v is None else str(v)  # noqa: E731
    return markdown(columns, [[text(getattr(row, c)) for c in columns] for row in rows])


def results_readme(loaded: dict[str, Record], plots: Sequence[tuple[str, str]]) -> str:
    """The text of README.md beside the recorded files."""
    parts = [
        "# Measured",
        "Written by `python -m slimgemm.benchmarks.report` from the files in this folder. A result "
        "was timed only after it had passed the tolerance rule on the same inputs. Best dense / "
        "this: above 1 this is faster than the best of torch's dense competitors, below 1 slower.",
    ]
    if not any(is_gpu(name, record) for name, record in loaded.items()):
        parts.append("No file in this folder is of a GPU.")
    parts.append(
        "On a CPU no cache is emptied, so what is small comes from a cache and may pass 100 % of "
        "the byte limit; load averages in the heads say what else the machine did. "
        "`benchmarks/record_cpu.sh` records every CPU file again, `benchmarks/gpu_check.sh` those "
        "of a GPU; a file alone, the command in its head."
    )
    parts += [f"![{title}]({file})" for file, title in plots]
    for name, record in loaded.items():
        parts += [f"## {name}", _facts(record)]
        if not record.rows:
            parts.append("No rows.")
        elif isinstance(record.rows[0], (Row, ModelRow)):
            against = bar_tables(autotuned(loaded, name).rows) if is_gpu(name, record) else []
            bars = "\n\n".join(f"{title}\n\n{table}" for title, table in against)
            parts.append(_measured(name, record, "" if name.endswith("_compiled") else bars))
        elif isinstance(record.rows[0], Prediction):
            parts.append(
                f"{len(record.rows)} rows in [{name}.csv]({name}.csv); those of one layer:"
            )
            parts.append(_plain_table([r for r in record.rows if r.layer == record.rows[0].layer]))
        else:
            parts.append(_plain_table(record.rows))
    return "\n\n".join(parts) + "\n"


def is_gpu(name: str, record: Record) -> bool:
    """True for a file that was measured on a GPU."""
    measured = row_class(name) in (Row, ModelRow)
    return measured and record.head.get("compute_capability", "none") != "none"


def _demo_table(demo: dict[str, Any]) -> str:
    stages = {stage["key"]: stage for stage in demo["stages"]}
    rows = []
    for title, key, timed in DEMO_STAGES:
        stage = stages[key]
        accuracy = f"{stage['accuracy_mean']:.2f} ± {stage['accuracy_std']:.2f}"
        size = max(run["file_bytes"] for run in stage["runs"])
        times = []
        for batch in ("1", "256"):
            us, dense = (demo["latency_us"][batch][k]["us_p50"] for k in (timed, "dense"))
            times.append(f"{us:,.0f}" + (" (slower)" if us > dense else ""))
        rows.append([title, accuracy, f"{size:,}", *times])
    columns = ("model", "accuracy, %", "file, bytes", "1 image, µs", "256 images, µs")
    return markdown(columns, rows)


def _cpu_table(record: Record) -> str:
    """Dense and packed products of a CPU file, a line per layer."""
    found: dict[str, dict[int, dict[str, Row]]] = {}
    for row in record.rows:
        if row.status == TIMED:
            of_layer = found.setdefault(row.layer, {})
            of_layer.setdefault(tokens_of(row), {})[row.implementation] = row
    tokens = sorted({m for of_layer in found.values() for m in of_layer})
    table = []
    for layer, of_layer in found.items():
        cells = [layer]
        for m in tokens:
            if m not in of_layer:
                cells.append("-")
                continue
            dense, ours = of_layer[m]["torch dense"], of_layer[m][OURS]
            times = f"{number(dense.eager_us_p50)}, {number(ours.eager_us_p50)}"
            slower = (ours.best_dense_over_this or 0) < 1
            cells.append(times + " (slower)" * slower)
        table.append(cells)
    return markdown(["dense, packed, µs", *(f"{m} rows" for m in tokens)], table)


def _layers_text(folder: Path) -> str:
    """Packed over dense time of the square layers of cpu_layers.json, in a sentence."""
    path = folder / "cpu_layers.json"
    if not path.is_file():
        return ""
    recorded = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = [
        f"{number(row['packed_over_dense_p50'])} ({row['case'].removeprefix('linear forward, ')})"
        for row in recorded
        if row["case"].startswith("linear forward, ")
    ]
    link = "[cpu_layers.json](benchmarks/results/cpu_layers.json)"
    return f"Packed over dense, square layers ({link}): {', '.join(found)}. "


def _gpu_parts(name: str, record: Record) -> list[str]:
    bars = report_bars.against_bars(record.rows)
    head = record.head
    about = (
        f"{head['device']}, driver {head['driver']}, torch {head['torch']}, triton "
        f"{head['triton']}, {head['date']}; [every row](benchmarks/results/{name}.csv):"
    )
    return [about, markdown(report_bars.AGAINST_BARS, bars) if bars else "No layer of a bar."]


def readme_section(folder: Path) -> str:
    """What stands in the project's README between the markers."""
    loaded = load(folder)
    parts: list[str] = []
    for name, record in loaded.items():
        if is_gpu(name, record) and name.endswith("_spmm_24"):
            parts += _gpu_parts(name, autotuned(loaded, name))
    first = "" if parts else "No GPU has run this tree yet: there is no speed-up to show. "
    demo = json.loads((folder / "cpu_demo.json").read_text(encoding="utf-8"))
    hardware = demo["hardware"]
    parts.append(
        f"{first}On a CPU ({hardware['cpu']}, torch {demo['versions']['torch']}, threads: "
        f"{hardware['threads']}), `{demo['command']}` on handwritten digits, "
        f"{demo['date']} ([all numbers](benchmarks/results/cpu_demo.json)):"
    )
    parts.append(_demo_table(demo))
    cpu = loaded.get("cpu_spmm_24")
    if cpu:
        head = cpu.head
        parts.append(
            f"One layer, fp32 ({head['device']}, torch {head['torch']}, {head['date']}, "
            f"{head['clock']}; `{head['command']}`):"
        )
        parts.append(_cpu_table(cpu))
    parts.append(
        f"{_layers_text(folder)}Every recorded row, losing ones too: "
        "[benchmarks/results](benchmarks/results/README.md). "
        "2:4 on real models without fine-tuning: [pruning.md](benchmarks/results/pruning.md)."
    )
    return "\n\n".join(parts)


def section_of(text: str) -> str:
    """The part of a README between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    _, begin, rest = text.partition(BEGIN)
    section, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must hold the lines {BEGIN} and {END}")
    return section.strip()


def with_section(text: str, section: str) -> str:
    """`text` with `section` between the markers."""
    section_of(text)
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.partition(END)[2]}"


def recorded_numbers(folder: Path) -> tuple[set[float], str]:
    """Every number in the recorded files, and all their text."""
    texts = [p.read_text(encoding="utf-8") for p in sorted(folder.glob("cpu_*.json"))]
    texts += [p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.csv"))]
    text = "\n".join(texts)
    return {float(found) for found in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", text)}, text


def derived(loaded: dict[str, Record], name: str) -> Iterator[str]:
    """Words of the tables that are computed from the rows of a file."""
    rows = [row for row in autotuned(loaded, name).rows if isinstance(row, Row)]
    for line in (*geometric_means(rows), *report_bars.against_bars(rows)):
        for cell in line:
            yield from cell.split()


def unrecorded(section: str, folder: Path) -> list[str]:
    """Numbers in `section` that no recorded file holds, as they are rounded there.

    Means over several rows are made of their rows.
    """
    numbers, text = recorded_numbers(folder)
    loaded = load(folder)
    means = {word for name in loaded for word in derived(loaded, name)}
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`", " ", section)
    missing = []
    for token in re.findall(r"(?<![\w.:-])\d[\d,]*\.?\d*(?![\w:-])", prose):
        plain = token.rstrip(".,").replace(",", "")
        digits = len(plain.partition(".")[2])
        near = (f"{n:.{digits}f}" for n in numbers)
        verbatim = re.search(rf"(?<![\d.]){re.escape(plain)}(?![\d])", text)
        if plain not in means and not verbatim and plain not in near:
            missing.append(token)
    return missing


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m slimgemm.benchmarks.report")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the recorded files")
    parser.add_argument("--readme", type=Path, default=README, help="the project's README")
    args = parser.parse_args(arguments)
    try:
        loaded = load(args.results)
        text = with_section(args.readme.read_text(encoding="utf-8"), readme_section(args.results))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plots = report_plots.draw(loaded, args.results)
    records.write_text(args.results / "README.md", results_readme(loaded, plots))
    records.write_text(args.readme, text)
    print(f"Wrote {args.results / 'README.md'}, {len(plots)} plots and {args.readme}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
