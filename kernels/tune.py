"""Measures the implementations of spmm_24, shape by shape, into a table for dispatch.py.

Each candidate (an implementation with one of its tiles) is first checked against float64 by the
tolerance rule, plain and with bias, scale and activation; one that is wrong is recorded and never
timed. Those that pass are timed together: as CUDA graphs, in turn, each with a cold L2 and over
several input sets. The table is written after every row, so a run that ends early loses nothing and
the next one goes on where it stopped.

A kernel that never comes back is remembered too: before a candidate first runs, its name is written
to a file beside the table. If the process dies there, the next run records it and leaves it out.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from slimgemm.kernels.dispatch import implementation
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.implementations import IMPLEMENTATIONS, Candidate, Run
from slimgemm.kernels.reference import allowed_error, output_error, spmm_24_ref
from slimgemm.kernels.timing import Call, Times, time_us
from slimgemm.kernels.tune_table import (
    DTYPES,
    FAILED,
    HEAD,
    OK,
    WRONG,
    Choice,
    Result,
    Row,
    Table,
    choice_from_json,
    choice_to_json,
    load,
    save,
)

OP = "spmm_24"
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)
INPUT_SETS = 4  # a graph runs them all: none finds its weight in the L2
ROUNDS = 20
# A candidate may take this long to be built and checked; beyond it, it counts as hanging.
HANG_S = 180.0
ACTIVATION = "silu"  # of the second check, with bias and scale

Clock = Callable[[Mapping[str, Sequence[Call]]], Mapping[str, Times]]


class Job(NamedTuple):
    """One row to be measured: y [m, n] = x [m, k] @ w.T in `dtype`."""

    dtype: torch.dtype
    n: int
    k: int
    m: int

    @property
    def shape(self) -> tuple[str, str, int, int, int]:
        """The Row.shape that it makes."""
        return (OP, DTYPES[self.dtype], self.n, self.k, self.m)

    def __str__(self) -> str:
        return f"{self.n}x{self.k} {DTYPES[self.dtype]} m={self.m}"


class Stopped(RuntimeError):
    """The GPU no longer answers after a candidate; only a new process can go on."""


def jobs(
    shapes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype], tokens: Sequence[int]
) -> list[Job]:
    """Every combination, shape by shape; tokens ascending.

    Raises:
        ValueError: nothing to do, or a size that cannot be tuned.
    """
    if not (shapes and dtypes and tokens):
        raise ValueError("tune needs at least one shape, dtype and token count")
    for m in tokens:
        if m < 1 or m & (m - 1):
            raise ValueError(f"tokens must be powers of two (rows are dispatched by them), got {m}")
    for n, k in shapes:
        if n < 1 or k < 1:
            raise ValueError(f"a shape must be NxK with both from 1, got {n}x{k}")
    pairs, counts = dict.fromkeys(shapes), sorted(set(tokens))
    return [Job(dtype, n, k, m) for dtype in dtypes for n, k in pairs for m in counts]


@dataclass(frozen=True)
class Tuner:
    """How rows are measured.

    Args:
        device: where.
        clock: name -> calls, one per input set -> microseconds per call.
        choices: what is tried for (m, n, k, dtype).
        candidates: name -> implementation.
        on_hang: called from another thread when a candidate takes longer than HANG_S.
        progress: called before each candidate with (job, done, of, candidate).
    """

    device: torch.device
    clock: Clock
    choices: Callable[[int, int, int, torch.dtype], Sequence[Choice]]
    candidates: Mapping[str, Candidate] = field(default_factory=lambda: IMPLEMENTATIONS)
    on_hang: Callable[[Choice], None] = lambda choice: None
    progress: Callable[[Job, int, int, str], None] = lambda job, done, of, name: None

    def inputs(self, job: Job) -> list[tuple[Tensor, Packed24]]:
        """Random x [m, k] and 2:4 weights [n, k] with random metadata; seeds 0, 1, ..."""
        prune = implementation("prune_24", self.device)
        sets = []
        for seed in range(INPUT_SETS):
            g = torch.Generator(self.device).manual_seed(seed)
            w = torch.randn(job.n, job.k, generator=g, device=self.device) * job.k**-0.5
            x = torch.randn(job.m, job.k, generator=g, device=self.device)
            sets.append((x.to(job.dtype), prune(w.to(job.dtype))))
        return sets

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def gpu_tuner(
    device: torch.device,
    on_hang: Callable[[Choice], None],
    progress: Callable[[Job, int, int, str], None],
    quick: bool = False,
) -> Tuner:
    """The Tuner of a CUDA device, which it makes the current one.

    `quick`: with each implementation's own tile alone.
    """
    from slimgemm.kernels import tune_tiles

    torch.cuda.set_device(device)  # Triton launches on the current device
    gpu = tune_tiles.gpu_of(device)

    def clock(calls: Mapping[str, Sequence[Call]]) -> Mapping[str, Times]:
        return time_us(calls, device, graph=True, flush=True, rounds=ROUNDS)

    def choices(m: int, n: int, k: int, dtype: torch.dtype) -> list[Choice]:
        found = [of(m, n, k, dtype, gpu) for of in tune_tiles.CHOICES.values()]
        return [choice for of in found for choice in (of[:1] if quick else of)]

    return Tuner(device, clock, choices, on_hang=on_hang, progress=progress)


class Judge:
    """Knows what spmm_24 must give for one pair of operands, plain and with an epilogue."""

    def __init__(self, x: Tensor, w: Packed24) -> None:
        g = torch.Generator(x.device).manual_seed(INPUT_SETS)
        bias, scale = torch.randn(2, w.shape[0], generator=g, device=x.device).to(x.dtype)
        self.operands = x, w
        self.cases: list[tuple[tuple, Tensor, float]] = []
        wide = w._replace(values=w.values.double())
        epilogues: list[tuple[Tensor | None, Tensor | None, str]] = [
            (None, None, "none"),
            (bias, scale, ACTIVATION),
        ]
        for epilogue in epilogues:
            wide_bias, wide_scale = (t if t is None else t.double() for t in epilogue[:2])
            exact = spmm_24_ref(x.double(), wide, wide_bias, wide_scale, epilogue[2])
            allowed = allowed_error(spmm_24_ref(x, w, *epilogue), exact)
            self.cases.append((epilogue, exact, allowed))

    def judge(self, choice: Choice, run: Run) -> Result:
        """`run` on the operands, compared: ok without a time, or wrong. The worse case counts."""
        worst: tuple[float, float] = (-1.0, 1.0)
        for epilogue, exact, allowed in self.cases:
            got = run(*self.operands, *epilogue)
            if got.shape != exact.shape or got.dtype != self.operands[0].dtype:
                why = f"gave {got.dtype} {list(got.shape)}"
                return Result(choice, WRONG, reason=why)
            error = output_error(got, exact)
            if not error <= allowed:  # NaN too
                why = f"error {error:.2e} > {allowed:.2e}, act {epilogue[2]}"
                known = error if error < float("inf") else None
                return Result(choice, WRONG, None, known, allowed, why)
            worst = max(worst, (error, allowed), key=lambda pair: pair[0] / pair[1])
        return Result(choice, OK, None, *worst)


def first_line(error: BaseException) -> str:
    """The class and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def journal_path(path: Path) -> Path:
    """The file beside the table at `path` that names the candidate being tried."""
    return path.with_name(path.name + ".trying")


@contextlib.contextmanager
def attempt(tuner: Tuner, dtype: str, choice: Choice, path: Path) -> Iterator[None]:
    """Name `choice` in the journal while it runs; the name stays if the process dies.

    Raises:
        Stopped: the GPU does not answer any more.
    """
    journal = journal_path(path)
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.write_text(json.dumps({"dtype": dtype, **choice_to_json(choice)}), encoding="utf-8")
    timer = threading.Timer(HANG_S, tuner.on_hang, [choice])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        try:
            tuner.synchronize()
        except RuntimeError as error:
            raise Stopped(
                f"the GPU no longer answers after {choice} ({first_line(error)}); run "
                "`slimgemm tune` again: it leaves that one out and goes on"
            ) from None
        journal.unlink(missing_ok=True)


def check_all(tuner: Tuner, job: Job, table: Table, path: Path, over: Call) -> list[Result]:
    """Every candidate for `job` that takes its operands, checked; none timed yet.

    Args:
        over: raises when the time is up.
    """
    x, w = tuner.inputs(job)[0]
    judge, dtype = Judge(x, w), DTYPES[job.dtype]
    choices = [
        choice
        for choice in tuner.choices(job.m, job.n, job.k, job.dtype)
        if tuner.candidates[choice.implementation].takes(x, w)
    ]
    results = []
    for done, choice in enumerate(choices):
        over()
        if (dtype, choice) in table.stopped:
            results.append(Result(choice, FAILED, reason="an earlier run ended while it ran"))
            continue
        tuner.progress(job, done, len(choices), str(choice))
        try:
            with attempt(tuner, dtype, choice, path):
                run = tuner.candidates[choice.implementation].bind(choice.tile, choice.splits)
                results.append(judge.judge(choice, run))
        except Stopped:
            raise
        except Exception as error:
            results.append(Result(choice, FAILED, reason=first_line(error)))
    return results


def time_all(tuner: Tuner, job: Job, results: Sequence[Result]) -> list[Result]:
    """The same results, with the times of those that are ok; a failure in timing is one too."""
    sets = tuner.inputs(job)
    calls: dict[str, list[Call]] = {}
    for result in results:
        if result.verdict == OK:
            choice = result.choice
            run = tuner.candidates[choice.implementation].bind(choice.tile, choice.splits)
            calls[str(choice)] = [functools.partial(run, x, w, None, None, "none") for x, w in sets]
    times, failed = _timed(tuner.clock, calls)
    timed = []
    for result in results:
        name = str(result.choice)
        if result.verdict == OK and name in failed:
            result = result._replace(verdict=FAILED, reason=failed[name])
        elif result.verdict == OK:
            result = result._replace(us_p50=times[name].p50)
        timed.append(result)
    return sorted(timed, key=lambda r: (r.verdict != OK, r.us_p50 or 0.0))


def _timed(
    clock: Clock, calls: Mapping[str, Sequence[Call]]
) -> tuple[Mapping[str, Times], dict[str, str]]:
    """Times of `calls`, all in turn; if that fails, without those that fail on their own too."""
    if not calls:
        return {}, {}
    try:
        return clock(calls), {}
    except Exception as error:
        failed: dict[str, str] = {}
        for name, several in calls.items():
            try:
                clock({name: several})
            except Exception as own:
                failed[name] = first_line(own)
        if not failed:  # together they are too much: memory, most likely
            raise error
    rest = {name: several for name, several in calls.items() if name not in failed}
    return (clock(rest) if rest else {}), failed


def resumed(path: Path, head: Mapping[str, str]) -> Table:
    """The table at `path` if it is of the same GPU, versions and commit, else an empty one.

    A candidate that the journal names is added to those that are not tried again.

    Raises:
        ValueError: the file is damaged, or the journal is.
    """
    table = Table(head)
    if path.is_file():
        found = load(path)
        if found.agrees(head, HEAD):
            table = found._replace(head=head)
    journal = journal_path(path)
    if journal.is_file():
        try:
            content = json.loads(journal.read_text(encoding="utf-8"))
            entry = (content["dtype"], choice_from_json(content))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{journal} is damaged: {error}; delete it") from None
        if entry not in table.stopped:
            table = table._replace(stopped=(*table.stopped, entry))
        save(table, path)
        journal.unlink()
    return table


def left(todo: Sequence[Job], table: Table, tuner: Tuner) -> list[Job]:
    """What of `todo` the table lacks: rows, or choices of an implementation that a row has."""
    rows = {row.shape: {result.choice for result in row.results} for row in table.rows}

    def lacking(job: Job) -> bool:
        tried = rows.get(job.shape, set())
        names = {choice.implementation for choice in tried}
        wanted = tuner.choices(job.m, job.n, job.k, job.dtype)
        return not tried or any(c.implementation in names and c not in tried for c in wanted)

    return [job for job in todo if lacking(job)]


class _TimeUp(Exception):
    """The minutes are over in the middle of a row."""


def tune(
    todo: Sequence[Job],
    table: Table,
    path: Path,
    tuner: Tuner,
    *,
    minutes: float = float("inf"),
    now: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Job, Row | None, str]]:
    """Measure `todo` row by row, and write `table` with each new row to `path`.

    Args:
        table: what `resumed` gave; only what is `left` is measured.
        minutes: no candidate starts after them; a row that is not finished then is not written.
    Yields:
        (job, row, ""), or (job, None, why it could not be measured: memory).
    Raises:
        Stopped: the GPU no longer answers.
    """
    until = now() + 60 * minutes

    def over() -> None:
        if now() >= until:
            raise _TimeUp

    for job in left(todo, table, tuner):
        try:
            over()
            results = time_all(tuner, job, check_all(tuner, job, table, path, over))
        except _TimeUp:
            return
        except torch.OutOfMemoryError as error:
            yield job, None, first_line(error)
            continue
        row = Row(*job.shape, tuple(results))
        others = tuple(old for old in table.rows if old.shape != row.shape)
        table = table._replace(rows=(*others, row))
        save(table, path)
        yield job, row, ""
