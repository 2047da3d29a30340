"""The CPU micro-benchmarks of tests/benchmarks/test_bench_cpu.py as a recorded file.

pytest tests/benchmarks/test_bench_cpu.py --benchmark-enable --benchmark-json=micro.json
python -m slimgemm.benchmarks.micro micro.json --out benchmarks/results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from slimgemm.benchmarks import machine, records

COMMAND = (
    "OMP_NUM_THREADS=1 pytest tests/benchmarks/test_bench_cpu.py --benchmark-enable "
    "--benchmark-timer=time.thread_time --benchmark-min-rounds=7 --benchmark-max-time=0.5 "
    "--benchmark-json=micro.json; "
    "python -m slimgemm.benchmarks.micro micro.json"
)


@dataclasses.dataclass(frozen=True)
class MicroRow:
    """One micro-benchmark: quartiles and least of its rounds, microseconds of CPU time."""

    group: str
    case: str
    rounds: int
    us_min: float
    us_p25: float
    us_p50: float
    us_p75: float


def rows_of(report: dict[str, Any]) -> list[MicroRow]:
    """The rows of a report of pytest-benchmark.

    Raises:
        ValueError: it holds no benchmark.
    """
    found = []
    for entry in report.get("benchmarks", []):
        stats = {key: entry["stats"][key] * 1e6 for key in ("min", "q1", "median", "q3")}
        group = entry["group"] or entry["name"].partition("[")[0].removeprefix("test_")
        found.append(MicroRow(group, entry["name"], entry["stats"]["rounds"], *stats.values()))
    if not found:
        raise ValueError("the report holds no benchmark; was --benchmark-enable given?")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m slimgemm.benchmarks.micro")
    parser.add_argument("report", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder")
    args = parser.parse_args(arguments)
    try:
        rows = rows_of(json.loads(args.report.read_text()))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cpu = torch.device("cpu")
    path = args.out / "cpu_micro.csv"
    records.write_text(path, records.as_csv(machine.head(cpu, COMMAND), rows, MicroRow))
    print(f"Wrote {path}: {len(rows)} rows.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
