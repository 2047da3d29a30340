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
    "Written by bench_search from search.json. Even: every group loses the same share; its cost\n"
    "is the limit of the search. Both allocations are cut from the same dense model, and tuned\n"
    "for so many steps over the same batches. The margin is searched less even, seed by seed\n"
    "(mean ± standard deviation); it counts where it is beyond its spread. Steps `all`: the\n"
    "model that the search ends with, beside the even cut after as many steps of training."
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
    """A row per cost and training: the metric of both, their margin, and whether the limit held."""
    found = []
    mine = [row for row in rows if row.get("what") in ("searched", "even") and metric in row]
    for cost, method, after in dict.fromkeys((r["cost"], r["method"], r["after"]) for r in mine):
        by = {
            what: {
                r["seed"]: r
                for r in mine
                if (r["what"], r["cost"], r["method"], r["after"]) == (what, cost, method, after)
            }
            for what in ("searched", "even")
        }
        seeds = sorted(by["searched"].keys() & by["even"].keys())
        if not seeds:
            continue
        margins = [by["searched"][s][metric] - by["even"][s][metric] for s in seeds]
        beyond = "-" if len(seeds) < 2 else "yes" if mean(margins) > stdev(margins) else "no"
        share = {
            what: spread([100 * by[what][s]["value"] / by[what][s]["dense"] for s in seeds], 1)
            for what in by
        }
        first = [by["searched"][s] for s in seeds]
        met = sum(row["value"] <= row["limit"] for row in first)
        found.append(
            {
                "cost": cost,
                "method": method,
                "steps": after,
                "seeds": len(seeds),
                "searched": spread([row[metric] for row in first]),
                "even": spread([by["even"][s][metric] for s in seeds]),
                "margin": spread(margins),
                "beyond_its_spread": beyond,
                "cost_searched_%_of_dense": share["searched"],
                "cost_even_%": share["even"],
                "limit_%": spread([100 * row["limit"] / row["dense"] for row in first], 1),
                "limit_met_as_measured_again": f"{met} of {len(seeds)}",
                "candidates": spread([row["candidates"] for row in first], 0),
                "search_cpu_s": _known([row.get("search_cpu_s") for row in first]),
            }
        )
    return found


def _known(values: Sequence[float | None]) -> str:
    """Spread of values that were all recorded."""
    known = [value for value in values if value is not None]
    return spread(known, 0) if len(known) == len(values) else "not recorded"


def _prose(rows: Sequence[Row], metric: str) -> list[str]:
    lines = []
    dense = [row[metric] for row in rows if row["what"] == "dense"]
    if dense:
        lines += [f"Dense: {spread(dense)}.", ""]
    ended = [row for row in rows if row["what"] == "searched" and row.get("after") == "all"]
    for cost in dict.fromkeys(row["cost"] for row in ended):
        said = [f"{r['result']} ({r['steps']} steps)" for r in ended if r["cost"] == cost]
        lines += [f"The best finalist at the end, {cost}: {', '.join(said)}.", ""]
    searched = [row for row in rows if row["what"] == "searched" and "predicted" in row]
    held = {(row["seed"], row["cost"]): row for row in searched}.values()
    if held:
        kept = sum(r["held_in_search"] <= r["limit"] for r in held)
        off = [100 * abs(r["predicted"] / r["value"] - 1) for r in held]
        lines += [
            f"Latency limit met by the finished model as the search measured it: {kept} of "
            f"{len(held)}; its prediction was off by at most {max(off):.1f} %.",
            "",
        ]
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
