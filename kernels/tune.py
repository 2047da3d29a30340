"""Measures the implementations of 2:4 products, shape by shape, into a table for dispatch.py.

Each candidate (an implementation with one of its tiles) is first checked against float64 by the
tolerance rule, plain and with bias, scale and activation, several times with the same bits; one
that is wrong is recorded and never timed. Those that pass are timed together: as CUDA graphs, in
turn, each with a cold L2 and over several input sets. The table is written after every row, so a
run that ends early loses nothing and the next one goes on where it stopped.

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

import torch
from torch import Tensor

from slimgemm.kernels.dispatch import Plans
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.implementations import CONVOLUTIONS, IMPLEMENTATIONS, Candidate
from slimgemm.kernels.timing import Call, Times, time_us
from slimgemm.kernels.tune_jobs import INPUT_SETS, AnyJob, ConvJob, Judge
from slimgemm.kernels.tune_table import (
    FAILED,
    HEAD,
    OK,
    Choice,
    Result,
    Row,
    Table,
    choice_to_json,
    load,
    save,
    stopped_from_json,
)

ROUNDS = 20
# A candidate may take this long to be built and checked; beyond it, it counts as hanging.
HANG_S = 180.0

Clock = Callable[[Mapping[str, Sequence[Call]]], Mapping[str, Times]]


class Stopped(RuntimeError):
    """The GPU no longer answers after a candidate; only a new process can go on."""


@dataclass(frozen=True)
class Tuner:
    """How rows are measured.

    Args:
        device: where.
        clock: name -> calls, one per input set -> microseconds per call.
        choices: what is tried for (m, n, k, dtype) of a linear layer.
        conv_choices: what is tried for a convolution.
        candidates, convolutions: name -> implementation, as Plans has them.
        on_hang: called from another thread when a candidate takes longer than HANG_S.
        progress: called before each candidate with (job, done, of, candidate).
    """

    device: torch.device
    clock: Clock
    choices: Callable[[int, int, int, torch.dtype], Sequence[Choice]]
    conv_choices: Callable[[ConvJob], Sequence[Choice]]
    candidates: Mapping[str, Candidate] = field(default_factory=lambda: IMPLEMENTATIONS)
    convolutions: Mapping[str, Candidate] = field(default_factory=lambda: CONVOLUTIONS)
    on_hang: Callable[[Choice], None] = lambda choice: None
    progress: Callable[[AnyJob, int, int, str], None] = lambda job, done, of, name: None

    def inputs(self, job: AnyJob) -> list[tuple[Tensor, Packed24]]:
        """Operands with seeds 0, 1, ..."""
        return [job.inputs(self.device, seed) for seed in range(INPUT_SETS)]

    def tried(self, job: AnyJob) -> Sequence[Choice]:
        """What is tried for `job`."""
        if isinstance(job, ConvJob):
            return self.conv_choices(job)
        return self.choices(job.m, job.n, job.k, job.dtype)

    def known(self, job: AnyJob, table: Table) -> Mapping[str, Candidate]:
        """Name -> implementation of the op of `job`; `linear` runs what `table` says."""
        if isinstance(job, ConvJob):
            return Plans(table, self.candidates, self.convolutions).convolutions
        return self.candidates

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def gpu_tuner(
    device: torch.device,
    on_hang: Callable[[Choice], None],
    progress: Callable[[AnyJob, int, int, str], None],
    quick: bool = False,
) -> Tuner:
    """The Tuner of a CUDA device, which it makes the current one.

    `quick`: with each implementation's own tile alone.
    """
    from slimgemm.kernels import tune_conv, tune_tiles

    torch.cuda.set_device(device)  # Triton launches on the current device
    gpu = tune_tiles.gpu_of(device)

    def clock(calls: Mapping[str, Sequence[Call]]) -> Mapping[str, Times]:
        return time_us(calls, device, graph=True, flush=True, rounds=ROUNDS)

    def choices(m: int, n: int, k: int, dtype: torch.dtype) -> list[Choice]:
        found = [of(m, n, k, dtype, gpu) for of in tune_tiles.CHOICES.values()]
        return [choice for of in found for choice in (of[:1] if quick else of)]

    def conv_choices(job: ConvJob) -> list[Choice]:
        found = [of(job, gpu) for of in tune_conv.CHOICES.values()]
        return [choice for of in found for choice in (of[:1] if quick else of)]

    return Tuner(device, clock, choices, conv_choices, on_hang=on_hang, progress=progress)


def first_line(error: BaseException) -> str:
    """The class and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def journal_path(path: Path) -> Path:
    """The file beside the table at `path` that names the candidate being tried."""
    return path.with_name(path.name + ".trying")


@contextlib.contextmanager
def attempt(tuner: Tuner, op: str, dtype: str, choice: Choice, path: Path) -> Iterator[None]:
    """Name `choice` in the journal while it runs; the name stays if the process dies.

    Raises:
        Stopped: the GPU does not answer any more.
    """
    journal = journal_path(path)
    journal.parent.mkdir(parents=True, exist_ok=True)
    entry = {"op": op, "dtype": dtype, **choice_to_json(choice)}
    journal.write_text(json.dumps(entry), encoding="utf-8")
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


def check_all(tuner: Tuner, job: AnyJob, table: Table, path: Path, over: Call) -> list[Result]:
    """Every candidate for `job` that takes its operands, checked; none timed yet.

    Args:
        over: raises when the time is up.
    """
    x, w = job.inputs(tuner.device, 0)
    judge, (op, dtype), known = Judge(job, x, w), job.shape[:2], tuner.known(job, table)
    operands = job.operands(x, w)
    choices = [c for c in tuner.tried(job) if known[c.implementation].takes(*operands)]
    results = []
    for done, choice in enumerate(choices):
        over()
        if (op, dtype, choice) in table.stopped:
            results.append(Result(choice, FAILED, reason="an earlier run ended while it ran"))
            continue
        tuner.progress(job, done, len(choices), str(choice))
        try:
            with attempt(tuner, op, dtype, choice, path):
                run = known[choice.implementation].bind(choice.tile, choice.splits)
                results.append(judge.judge(choice, run))
        except Stopped:
            raise
        except Exception as error:
            results.append(Result(choice, FAILED, reason=first_line(error)))
    return results


def time_all(tuner: Tuner, job: AnyJob, table: Table, results: Sequence[Result]) -> list[Result]:
    """The same results, with the times of those that are ok; a failure in timing is one too."""
    sets, known = tuner.inputs(job), tuner.known(job, table)
    calls: dict[str, list[Call]] = {}
    for result in results:
        if result.verdict == OK:
            choice = result.choice
            run = known[choice.implementation].bind(choice.tile, choice.splits)
            plain = [job.arguments(x, w, None, None, "none") for x, w in sets]
            calls[str(choice)] = [functools.partial(run, *arguments) for arguments in plain]
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
            entry = stopped_from_json(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{journal} is damaged: {error}; delete it") from None
        if entry not in table.stopped:
            table = table._replace(stopped=(*table.stopped, entry))
        save(table, path)
        journal.unlink()
    return table


def left(todo: Sequence[AnyJob], table: Table, tuner: Tuner) -> list[AnyJob]:
    """What of `todo` the table lacks: rows, or choices of an implementation that a row has."""
    rows = {row.shape: {result.choice for result in row.results} for row in table.rows}

    def lacking(job: AnyJob) -> bool:
        tried = rows.get(job.shape, set())
        names = {choice.implementation for choice in tried}
        wanted = tuner.tried(job)
        return not tried or any(c.implementation in names and c not in tried for c in wanted)

    return [job for job in todo if lacking(job)]


class _TimeUp(Exception):
    """The minutes are over in the middle of a row."""


def tune(
    todo: Sequence[AnyJob],
    table: Table,
    path: Path,
    tuner: Tuner,
    *,
    minutes: float = float("inf"),
    now: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[AnyJob, Row | None, str]]:
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
            results = time_all(tuner, job, table, check_all(tuner, job, table, path, over))
        except _TimeUp:
            return
        except torch.OutOfMemoryError as error:
            yield job, None, first_line(error)
            continue
        row = Row(*job.shape[:5], tuple(results), job.shape[5])
        others = tuple(old for old in table.rows if old.shape != row.shape)
        table = table._replace(rows=(*others, row))
        save(table, path)
        yield job, row, ""
