"""compare: rows of ours that are slower than they were recorded, beyond noise.

    slower: p20 now > moved * p80 recorded,  and  p50 now >= SLOWER * moved * p50 recorded

`moved` is the most that a row of torch in the same file rose, and at least 1. Torch's rows run code
that did not change, so what they take more is the machine's doing (clocks, heat, neighbours), and
so is as much of ours. Torch's rows themselves are never complained of.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from slimgemm.benchmarks.bench_tables import is_ours
from slimgemm.benchmarks.records import Record
from slimgemm.benchmarks.rows import TIMED

SLOWER = 1.1


class Change(NamedTuple):
    """One row of two runs: medians in microseconds; `new_us` is None where not timed any more."""

    key: tuple[str, ...]
    old_us: float
    new_us: float | None
    reason: str = ""

    def __str__(self) -> str:
        what = ", ".join(part for part in self.key if part)
        if self.new_us is None:
            return f"{what}: {self.old_us:.1f} us before, now {self.reason}"
        ratio = self.new_us / self.old_us
        return f"{what}: {self.old_us:.1f} us before, now {self.new_us:.1f} us ({ratio:.2f} of it)"


class Comparison(NamedTuple):
    """Two runs of one op.

    Args:
        rows: rows of ours that were compared.
        moved: the most that a row of torch rose, 1 or more.
        slower: what is slower, or not timed any more.
    """

    rows: int
    moved: float
    slower: list[Change]

    def __str__(self) -> str:
        noise = f"; rows of torch took up to {self.moved:.2f} of theirs" * (self.moved > 1)
        return f"compared {self.rows} rows of ours, {len(self.slower)} slower{noise}"


def _range(row: Any) -> tuple[float, float, float]:
    """(p20, p50, p80) of the times that a timed row is judged by."""
    which = row.rate_from
    found = (getattr(row, f"{which}_us_{p}") for p in ("p20", "p50", "p80"))
    return typing.cast("tuple[float, float, float]", tuple(found))


def _moved(pairs: Sequence[tuple[Any, Any]]) -> float:
    """The most that the median of a row of torch rose, at least 1."""
    ratios = [
        _range(new)[1] / _range(old)[1]
        for old, new in pairs
        if new.status == TIMED and new.rate_from == old.rate_from and not is_ours(new)
    ]
    return max([1.0, *ratios])


def compare(old: Record, new: Record) -> Comparison:
    """Rows of ours in `new` that are slower than in `old` beyond noise, or no longer timed.

    Rows that only one of the runs has are not compared, nor a file without a timed row of ours.

    Raises:
        ValueError: the runs are of different devices or clocks, or have no row of ours in common.
    """
    for key in ("device", "clock"):
        if old.head.get(key) != new.head.get(key):
            raise ValueError(
                f"recorded with {key} {old.head.get(key)}, measured with {new.head.get(key)}: such "
                "times cannot be compared"
            )
    before = {row.key: row for row in old.rows if row.status == TIMED}
    pairs = [(before[row.key], row) for row in new.rows if row.key in before]
    ours = [(was, row) for was, row in pairs if is_ours(row)]
    if not ours and any(map(is_ours, before.values())):
        raise ValueError("the recorded file and this run have no timed row of ours in common")
    moved, slower = _moved(pairs), []
    for was, row in ours:
        if row.status != TIMED:
            slower.append(Change(row.key, was.us, None, f"{row.status}: {row.reason}"))
            continue
        if row.rate_from != was.rate_from:
            reason = f"timed as {row.rate_from}: {row.reason}"
            slower.append(Change(row.key, was.us, None, reason))
            continue
        (_, old_p50, old_p80), (new_p20, new_p50, _) = _range(was), _range(row)
        if new_p20 > moved * old_p80 and new_p50 >= SLOWER * moved * old_p50:
            slower.append(Change(row.key, old_p50, new_p50))
    return Comparison(len(ours), moved, slower)


def twice_slower(
    old: Record, new: Record, again: Callable[[], Record], say: Callable[[str], None]
) -> list[str]:
    """What `compare` finds in `new` and, where that is slower rows, in a second run too.

    Args:
        again: measures the op once more; called only where rows are slower.
        say: told how many rows were compared.
    """
    first = compare(old, new)
    say(str(first))
    slower = [change for change in first.slower if change.new_us is not None]
    lost = [change for change in first.slower if change.new_us is None]
    if slower:
        say(f"measuring again, for {len(slower)} that may be slower")
        second = again()
        both = {row.key for row in second.rows if row.status == TIMED}
        kept = {change.key for change in compare(old, second).slower} if both else set()
        # A row that a run cut off by --seconds did not reach again stands as it was measured.
        slower = [change for change in slower if change.key in kept or change.key not in both]
    return [f"slower: {change}" for change in [*lost, *slower]]
