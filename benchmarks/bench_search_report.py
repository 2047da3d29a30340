"""bench_search_report: the tables of bench_search, kept as search.json and shown as search.md."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from slimgemm.benchmarks.pruning_report import hardware, table, versions

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "fashion": "Fashion-MNIST (a part of it): a small residual network, channels, fine-tuned",
    "minilm": "MiniLM (all-MiniLM-L6-v2): channels, no training, cosine to dense in percent",
}
INTRODUCTION = (
    "Written by bench_search from search.json. Even: every group loses the same share, as near\n"
    "below the limit as widths allow, and is fine-tuned for as many steps as the searched model.\n"
    "The margin is searched less even, seed by seed; it counts where it is beyond its spread."
)
METRICS = {"fashion": "accuracy_percent", "minilm": "cosine_percent"}
Row = dict[str, Any]


def record(
    folder: Path, part: str, arguments: Sequence[str], about: Row, rows: Sequence[Row]
) -> None:
    """Put the rows of one run into search.json, and write search.md anew from all runs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "search.json"
    data = json.loads(path.read_text()) if path.is_file() else {}
    shown = list(arguments)
    if "--out" in shown:  # where the rows go changes none of them
        place = shown.index("--out")
        del shown[place : place + 2]
    command = shlex.join(["python", "-m", "slimgemm.benchmarks.bench_search", *shown])
    data.setdefault(part, {})[command] = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "about": about,
        "rows": list(rows),
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
    (folder / "search.md").write_text(page(data))


def page(data: dict[str, dict[str, Row]]) -> str:
    """search.md: one section per part, those without a run included."""
    lines = ["# Searched against even allocations", "", INTRODUCTION, ""]
    for part, title in TITLES.items():
        lines += [f"## {title}", ""]
        if part not in data:
            lines += ["Not run.", ""]
            continue
        for command, entry in data[part].items():
            used = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
            about = "; ".join(f"{key}: {value}" for key, value in entry["about"].items())
            lines += [f"`{command}`  ", f"{entry['date']}, {entry['hardware']}; {used}.", ""]
            lines += [f"{about}.", "", *table(summary(entry["rows"], METRICS[part])), ""]
            lines += _prose(entry["rows"], METRICS[part])
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation of a sample."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def summary(rows: Sequence[Row], metric: str) -> list[Row]:
    """A row per cost: the metric of both, their margin, and whether the limit held."""
    found = []
    for cost in dict.fromkeys(row["cost"] for row in rows if "cost" in row):
        mine = [row for row in rows if row.get("cost") == cost and "failed" not in row]
        by = {
            what: {r["seed"]: r for r in mine if r["what"] == what} for what in ("searched", "even")
        }
        seeds = sorted(by["searched"].keys() & by["even"].keys())
        if not seeds:
            continue
        margins = [by["searched"][s][metric] - by["even"][s][metric] for s in seeds]
        beyond = len(margins) > 1 and mean(margins) > stdev(margins)
        share = {
            what: spread([100 * by[what][s]["value"] / by[what][s]["dense"] for s in seeds], 1)
            for what in by
        }
        met = sum(by["searched"][s]["value"] <= by["searched"][s]["limit"] for s in seeds)
        found.append(
            {
                "cost": cost,
                "seeds": len(seeds),
                "searched": spread([by["searched"][s][metric] for s in seeds]),
                "even": spread([by["even"][s][metric] for s in seeds]),
                "margin": spread(margins),
                "beyond_its_spread": "yes" if beyond else "no",
                "cost_searched_%_of_dense": share["searched"],
                "cost_even_%": share["even"],
                "limit_met_as_measured_again": f"{met} of {len(seeds)}",
            }
        )
    return found


def _prose(rows: Sequence[Row], metric: str) -> list[str]:
    lines = []
    dense = [row[metric] for row in rows if row["what"] == "dense"]
    if dense:
        lines += [f"Dense: {spread(dense)}.", ""]
    errors = [abs(row["error_percent"]) for row in rows if row["what"] == "unseen"]
    if errors:
        within = sum(error <= 10 for error in errors)
        lines += [
            f"Latency of {len(errors)} unseen allocations, predicted against measured in the same "
            f"rounds: median error {median(errors):.1f} %, worst {max(errors):.1f} %, within 10 %: "
            f"{within} of {len(errors)}.",
            "",
        ]
    failed = [
        f"{row['cost']}, seed {row['seed']}: {row['failed']}" for row in rows if "failed" in row
    ]
    if failed:
        lines += ["Failed searches: " + "; ".join(failed) + ".", ""]
    return lines
