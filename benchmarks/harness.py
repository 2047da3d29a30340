"""Check -> time -> row. What is wrong is refused a timing; what is missing is a row that says so.

A Case is one op at one shape with everything that competes in it. `measure` makes several random
input sets, checks every implementation on each of them against float64, and times those that
passed, in turn, with a cold L2: as it is called (eager) and as a captured CUDA graph. The host's
share of an eager call hides behind the emptying of the L2 as far as that lasts; host_us_p50 is all
of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimgemm.benchmarks.machine import Limits
from slimgemm.benchmarks.rows import (
    FAILED,
    MISSING,
    REFUSED,
    SHORT,
    TIMED,
    Row,
    columns,
    with_ratios,
)
from slimgemm.kernels.reference import allowed_error, output_error
from slimgemm.kernels.timing import Call, Times, capture, cpu_clock, percentiles, time_us

# Input sets: enough that together they are this many times the L2, but no more than MAX_SETS.
SETS_PER_L2, MAX_SETS = 3, 16
NOTHING: Mapping[str, str] = types.MappingProxyType({})


class Missing(Exception):
    """A competitor that this machine, dtype or shape cannot have; the text says why."""


class Wrong(Exception):
    """A result that its own check refuses; the text says where."""


Inputs = Any
# (inputs, output of the implementation) -> (error, allowed error), relative
Check = Callable[[Inputs, Any], tuple[float, float]]


@dataclass(frozen=True)
class Implementation:
    """One competitor.

    Args:
        name: what the row says; the first word is whose it is: slimgemm or torch.
        prepare: input set -> the call to be timed. What it does itself (packing a weight,
            compiling) is not timed. It may raise Missing.
        moved_bytes: least bytes that the call reads and writes, metadata included.
        read: output of the call -> tensor to compare with the exact one.
        check: instead of the tolerance rule, where results legitimately differ.
        note: what the row says beside its times, asked for after the call was prepared.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    moved_bytes: int
    read: Callable[[Any], Tensor] = lambda out: out
    check: Check | None = None
    note: Callable[[], str] = str


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op, layer: names; sizes: the numbers of the shape, by name (m, n, k, ...).
        dtype: of the operands; flop: multiplications and additions of the dense op.
        inputs: seed -> one input set, random normal, with random valid metadata, on the device.
        exact: input set -> float64 result. dense: torch's own op in `dtype`, whose error is the
            yardstick of the tolerance rule; None where results must be equal bit for bit.
        input_bytes: bytes of one input set that the leanest implementation reads.
    """

    op: str
    layer: str
    sizes: Mapping[str, int | float | str]
    dtype: torch.dtype
    flop: int
    inputs: Callable[[int], Inputs]
    exact: Callable[[Inputs], Tensor]
    dense: Callable[[Inputs], Tensor] | None
    implementations: Sequence[Implementation]
    input_bytes: int

    @property
    def shape(self) -> str:
        """The sizes in words: "m 64, n 4096, k 4096"."""
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())


def first_line(error: BaseException) -> str:
    """The first line of an error, or its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def tolerance(case: Case, given: Inputs) -> Check:
    """The check of `case` on one input set: the tolerance rule, or equality."""
    exact = case.exact(given)
    # Without a dense op of torch the result must be equal.
    allowed = allowed_error(case.dense(given), exact) if case.dense else 0.0

    def check(_: Inputs, got: Tensor) -> tuple[float, float]:
        if got.shape != exact.shape:
            raise Wrong(f"the result is {list(got.shape)}, must be {list(exact.shape)}")
        return output_error(got, exact), allowed

    return check


def set_count(case: Case, device: torch.device) -> int:
    """How many input sets are needed so that one that comes again is no longer in the L2."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, max(2, math.ceil(SETS_PER_L2 * l2 / max(1, case.input_bytes))))


@dataclass
class _Entry:
    """What is known of one implementation so far."""

    implementation: Implementation
    calls: list[Call] = field(default_factory=list)
    status: str = TIMED
    reason: str = ""
    error: float = 0.0
    allowed: float = math.inf
    # Checks another output of the first call.
    check: Callable[[Any], tuple[float, float]] | None = None

    def fail(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        self.calls.clear()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN inside (integers: of their largest).

    Else an output may lie where the result of the implementation before it was, and what a kernel
    does not write would be right.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # it is then that torch fills what torch.empty gives
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def is_ours(name: str) -> bool:
    """True for the name of an implementation of slimgemm."""
    return name.startswith("slimgemm")


def _try(entry: _Entry, given: Inputs, rule: Check) -> None:
    """Prepare and check one implementation on one input set."""
    one = entry.implementation
    try:
        # Torch's own kernels may be others in this mode.
        with poisoned() if is_ours(one.name) else contextlib.nullcontext():
            call = one.prepare(given)
            out = call()
        check = functools.partial(one.check or rule, given)
        error, allowed = check(one.read(out))
    except Missing as why:
        return entry.fail(MISSING, str(why))
    except Wrong as why:
        return entry.fail(REFUSED, str(why))
    except Exception as why:  # a peer may raise anything; it becomes a row
        return entry.fail(FAILED, first_line(why))
    # Of several sets, the one closest to its tolerance is reported.
    if not entry.calls or not error * entry.allowed <= entry.error * allowed:
        entry.error, entry.allowed = error, allowed
    if not error <= allowed:  # also catches NaN
        return entry.fail(REFUSED, too_large(error, allowed))
    entry.check = entry.check or (lambda out: check(one.read(out)))
    entry.calls.append(call)
    return None


def too_large(error: float, allowed: float) -> str:
    """Why a result is refused."""
    return f"error {error:.2e} > {allowed:.2e} allowed; not timed"


def check_all(case: Case, sets: int, skip: Mapping[str, str] = NOTHING) -> list[_Entry]:
    """Prepare and check every implementation on `sets` input sets; `skip` as `measure` has it."""
    entries = [_Entry(one) for one in case.implementations]
    for entry in entries:
        if entry.implementation.name in skip:
            entry.fail(FAILED, skip[entry.implementation.name])
    for seed in range(sets):
        given = case.inputs(seed)
        rule = tolerance(case, given)
        for entry in entries:
            if entry.status == TIMED:
                _try(entry, given, rule)
        del given, rule
    return entries


def graphable(entries: Sequence[_Entry], device: torch.device) -> dict[str, list[Call]]:
    """The calls of those that a CUDA graph can hold and repeats rightly; the others say why not."""
    found = {}
    for entry in entries:
        assert entry.check is not None
        outputs: list[Any] = []
        try:
            # The last output is the graph's own: nothing has been computed there before replay.
            capture([functools.partial(keep_output, outputs, entry.calls[0])], device).replay()
            error, allowed = entry.check(outputs[-1])
        except RuntimeError as why:
            entry.reason = f"no graph: {first_line(why)}"
            continue
        if error <= allowed:
            found[entry.implementation.name] = entry.calls
        else:
            entry.error, entry.allowed = error, allowed
            entry.fail(REFUSED, f"as a CUDA graph: {too_large(error, allowed)}")
    return found


def keep_output(outputs: list[Any], call: Call) -> None:
    """Call it, and keep its output, the last one only, in `outputs`."""
    outputs[:] = [call()]


def measure(
    case: Case,
    device: torch.device,
    limits: Limits,
    *,
    rounds: int = 30,
    sets: int | None = None,
    skip: Mapping[str, str] = NOTHING,
) -> list[Row]:
    """One row for each implementation of `case`; only those that passed their check are timed.

    Args:
        limits: of this device, in this run.
        rounds: timed rounds; sets: input sets, by the size of the L2 unless given.
        skip: implementation that must not run here -> why; it is a row that says so.
    """
    names = [one.name for one in case.implementations]
    if len(set(names)) != len(names):
        raise ValueError(f"implementations must have different names, got {', '.join(names)}")
    sets = sets or set_count(case, device)
    with torch.no_grad():
        entries = check_all(case, sets, skip)
        passed = [entry for entry in entries if entry.status == TIMED]
        eager: dict[str, Times] = {}
        graph: dict[str, Times] = {}
        if passed:
            calls: dict[str, Any] = {e.implementation.name: e.calls for e in passed}
            eager = time_us(calls, device, rounds=rounds, clock=cpu_clock())
        if passed and device.type == "cuda":
            captured: dict[str, Any] = dict(graphable(passed, device))
            if captured:
                graph = time_us(captured, device, graph=True, rounds=rounds)
        rows = [_row(case, entry, eager, graph, limits, sets) for entry in entries]
        if device.type == "cuda":
            rows = [_with_host(row, e, device) for row, e in zip(rows, entries, strict=True)]
    return with_ratios(rows)


def _row(
    case: Case,
    entry: _Entry,
    eager: Mapping[str, Times],
    graph: Mapping[str, Times],
    limits: Limits,
    sets: int,
) -> Row:
    one = entry.implementation
    row = Row(case.op, case.layer, case.shape, SHORT[case.dtype], one.name, entry.status)
    if math.isfinite(entry.allowed):
        row = dataclasses.replace(row, error=entry.error, allowed_error=entry.allowed)
    if entry.status != TIMED:
        return dataclasses.replace(row, reason=entry.reason)
    called, replayed = eager[one.name], graph.get(one.name)
    us = (replayed or called).p50
    tb_per_s = one.moved_bytes / us / 1e6
    tflops = case.flop / us / 1e6 if case.flop else None
    return dataclasses.replace(
        row,
        reason="; ".join(part for part in (one.note(), entry.reason) if part),
        input_sets=sets,
        **columns("eager", called),
        **columns("graph", replayed),
        rate_from="graph" if replayed else "eager",
        moved_bytes=one.moved_bytes,
        tb_per_s=tb_per_s,
        dense_equivalent_tflops=tflops,
        byte_limit_percent=100 * tb_per_s / limits.tb_per_s,
        compute_limit_percent=None if tflops is None else 100 * tflops / limits.tflops,
    )


def host_us(call: Call, wait: Call, rounds: int = 20) -> float:
    """Median microseconds that the host takes for `call`; `wait` lets the device finish."""
    samples = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    wait()
    return percentiles(samples).p50


def _with_host(row: Row, entry: _Entry, device: torch.device) -> Row:
    """`row` with what only a GPU shows of one call: the host's time and the memory it takes."""
    if row.status != TIMED:
        return row
    call = entry.calls[0]
    us = host_us(call, torch.cuda.synchronize)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return dataclasses.replace(row, host_us_p50=us, peak_call_bytes=peak)
