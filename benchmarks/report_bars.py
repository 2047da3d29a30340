"""Means over layers, and what the rows of a GPU say against the bars that were set for them.

A bar is a geometric mean over the eight layers of shapes.SPARSE_TENSOR_CORES, of the op as users
call it, after dispatch; besides no layer may be slower than dense.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from slimgemm.benchmarks.rows import TIMED, Row
from slimgemm.benchmarks.shapes import SPARSE_TENSOR_CORES

OURS, RIVAL, AUTOTUNED = "slimgemm spmm_24", "torch cusparselt", "torch dense compiled"
Table = list[list[str]]


class Bar(NamedTuple):
    """At these numbers of tokens: least mean of best dense / this, and of cuSPARSELt / this."""

    tokens: tuple[int, ...]
    dense: float
    cusparselt: float | None


BARS = (
    Bar((1, 8, 16), 1.5, None),
    Bar((32, 64), 1.4, None),
    Bar((4096, 8192), 1.3, 1.0),
)
PACKING = 2.0  # packing from dense may take this many times what a copy of the weight takes
OVERHEAD_US = 10.0  # the host may take this much longer for a call than for torch's product
MEANS = ("dtype", "tokens", "kernel", "best dense / this, geometric mean", "least", "slower at")
AGAINST_BARS = (
    "dtype", "tokens", "layers", "with max-autotune", "best dense / this, geometric mean", "bar",
    "least", "cuSPARSELt / this, geometric mean", "bar", "verdict",
)  # fmt: skip
FASTEST = ("dtype", "tokens", "layer", "fastest of ours", "best dense / it", "dispatched")
PACKED = ("dtype", "kernel", "layers", "this / copy, most", "bar", "verdict")
HOST = ("op", "host µs of ours", "host µs of torch's dense", "difference", "bar", "verdict")


def sizes_of(row: Row) -> dict[str, str]:
    """The numbers of a row's shape by name."""
    parts = (part.rpartition(" ") for part in row.shape.split(", "))
    return {name: value for name, _, value in parts}


def tokens_of(row: Row) -> int:
    """Rows of x."""
    return int(sizes_of(row)["m"])


def mean(ratios: Iterable[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.mean(math.log(ratio) for ratio in ratios))


def geometric_means(rows: Sequence[Row]) -> Table:
    """Per number of tokens and dtype: mean and least best_dense_over_this of each sparse kernel."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        if row.status == TIMED and row.best_dense_over_this and row.op == "spmm_24":
            key = row.dtype, tokens_of(row)
            ratios = found.setdefault(key, {}).setdefault(row.implementation, [])
            ratios.append(row.best_dense_over_this)
    table = []
    for (dtype, tokens), kernels in sorted(found.items()):
        for name, ratios in kernels.items():
            if name.startswith("torch dense"):
                continue
            lost = sum(r < 1 for r in ratios)
            table.append(
                [dtype, str(tokens), name, f"{mean(ratios):.2f}", f"{min(ratios):.2f}",
                 f"{lost} of {len(ratios)}"]
            )  # fmt: skip
    return table


def by_case(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Case -> implementation -> its timed row."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row.status == TIMED:
            found.setdefault(row.key[:-1], {})[row.implementation] = row
    return found


def with_autotuned(rows: Sequence[Row], compiled: Sequence[Row]) -> list[Row]:
    """`rows`, those of a case taken from `compiled` where torch.compile was timed there."""
    better = {case for case, found in by_case(compiled).items() if AUTOTUNED in found}
    kept = [row for row in rows if row.key[:-1] not in better]
    return [*kept, *(row for row in compiled if row.key[:-1] in better)]


def over(row: Row, rival: Row | None) -> float | None:
    """Time of `rival` over that of `row`, both of the same kind; None if there is none."""
    if rival is None or rival.rate_from != row.rate_from or not rival.us or not row.us:
        return None
    return rival.us / row.us


def _verdict(bar: Bar, ratios: Sequence[float], rivals: Sequence[float]) -> str:
    if len(ratios) < len(SPARSE_TENSOR_CORES):
        return f"{len(ratios)} of {len(SPARSE_TENSOR_CORES)} layers measured"
    reached = mean(ratios) >= bar.dense and min(ratios) >= 1
    if reached and bar.cusparselt is not None:
        if len(rivals) < len(ratios):
            return "dense reached, cuSPARSELt was not timed at every layer"
        reached = mean(rivals) >= bar.cusparselt
    return "reached" if reached else "short"


def against_bars(rows: Sequence[Row]) -> Table:
    """A line per dtype and number of tokens that has a bar, of the op after dispatch."""
    layers = {layer.name for layer in SPARSE_TENSOR_CORES}
    found: dict[tuple[str, int], list[dict[str, Row]]] = {}
    for case in by_case(r for r in rows if r.op == "spmm_24" and r.layer in layers).values():
        ours = case.get(OURS)
        if ours is not None and ours.best_dense_over_this:
            found.setdefault((ours.dtype, tokens_of(ours)), []).append(case)
    table = []
    for (dtype, tokens), cases in sorted(found.items()):
        bar = next((bar for bar in BARS if tokens in bar.tokens), None)
        if bar is None:
            continue
        ratios = [case[OURS].best_dense_over_this or 0.0 for case in cases]
        pairs = [over(case[OURS], case.get(RIVAL)) for case in cases]
        rivals = [ratio for ratio in pairs if ratio]
        of = len(SPARSE_TENSOR_CORES)
        table.append(
            [
                dtype, str(tokens), f"{len(cases)} of {of}",
                f"{sum(AUTOTUNED in case for case in cases)} of {of}",
                f"{mean(ratios):.2f}", f"{bar.dense:g}", f"{min(ratios):.2f}",
                f"{mean(rivals):.2f}" if rivals else "",
                "" if bar.cusparselt is None else f"{bar.cusparselt:g}",
                _verdict(bar, ratios, rivals),
            ]
        )  # fmt: skip
    return table


def fastest_of_ours(rows: Sequence[Row]) -> Table:
    """A line per case of spmm_24: which of our kernels was the fastest, and what dispatch took."""
    table = []
    for (_, layer, _, dtype), case in by_case(r for r in rows if r.op == "spmm_24").items():
        named = {n: r for n, r in case.items() if n.startswith("slimgemm") and n != OURS and r.us}
        if not named:
            continue
        name = min(named, key=lambda n: named[n].us or math.inf)
        ratio, ours = named[name].best_dense_over_this, case.get(OURS)
        table.append(
            [
                dtype, str(tokens_of(named[name])), layer, name.removeprefix("slimgemm "),
                f"{ratio:.2f}" if ratio else "",
                ours.reason.removeprefix("dispatched to ") if ours else "not timed",
            ]
        )  # fmt: skip
    return sorted(table, key=lambda line: (line[0], int(line[1]), line[2]))


def packing(rows: Sequence[Row]) -> Table:
    """Packing from the dense weight against a copy of it: the worst layer of each kernel."""
    found: dict[tuple[str, str], list[float]] = {}
    for case in by_case(r for r in rows if r.op == "pack_24").values():
        for name, row in case.items():
            ratio = over(row, case.get("torch dense clone"))
            if ratio and name.startswith("slimgemm") and "from packed" not in name:
                found.setdefault((row.dtype, name), []).append(1 / ratio)
    return [
        [dtype, name, str(len(ratios)), f"{max(ratios):.2f}", f"{PACKING:g}",
         "reached" if max(ratios) <= PACKING else "short"]
        for (dtype, name), ratios in found.items()
    ]  # fmt: skip


def overhead(rows: Sequence[Row]) -> Table:
    """What the host takes to queue a call of ours, beside torch's dense product of the same."""
    table = []
    for (_, layer, *_), case in by_case(r for r in rows if r.op == "overhead").items():
        ours, dense = case.get(f"slimgemm {layer}"), case.get("torch dense")
        if ours is None or dense is None or not ours.host_us_p50 or not dense.host_us_p50:
            continue
        more = ours.host_us_p50 - dense.host_us_p50
        table.append(
            [layer, f"{ours.host_us_p50:.1f}", f"{dense.host_us_p50:.1f}", f"{more:.1f}",
             f"{OVERHEAD_US:g}", "reached" if more <= OVERHEAD_US else "short"]
        )  # fmt: skip
    return table
