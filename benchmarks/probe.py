"""Tries the sparse tensor core kernels in processes of their own before they are timed in one.

A kernel that never ends, or that writes where it must not, takes the process with it, and every
number that was still to come. Here it takes one that did nothing else; the run then leaves it out
and says so in its row. What these processes compile, the run finds in Triton's cache.

    python -m slimgemm.benchmarks.probe --op spmm_24 --shapes check --dtype bf16 \
        --implementation "slimgemm wgmma_sp"
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from slimgemm.benchmarks import bench
from slimgemm.benchmarks.bench import DTYPES, Settings
from slimgemm.benchmarks.harness import Case, check_all, graphable, is_ours
from slimgemm.benchmarks.rows import SHORT, TIMED
from slimgemm.benchmarks.shapes import shapes

# A process that says nothing for so long, and begins no other case, hangs.
SILENCE_S = 40.0
WORKERS = 8
CALLS = 20  # of a kernel that passed its check, queued at once


class Task(NamedTuple):
    """One implementation of one op."""

    op: str
    implementation: str


def needs_probe(name: str) -> bool:
    """True for our kernels on sparse tensor cores: their synchronization is their own."""
    return is_ours(name) and "mma" in name


def smallest(cases: Iterable[Case]) -> list[Case]:
    """For each number of rows the case of least work; tiles are chosen by the rows."""
    found: dict[tuple[object, ...], Case] = {}
    for case in cases:
        sizes = dict(case.sizes)
        # Of convolutions, all but the channels decide.
        key = (case.dtype, *(sizes[name] for name in sizes if name not in ("n", "k", "in", "out")))
        if key not in found or case.flop < found[key].flop:
            found[key] = case
    return list(found.values())


def tasks_of(ops: Sequence[str], s: Settings) -> list[Task]:
    """Every implementation of `ops` that needs a probe."""
    found: list[Task] = []
    for op in ops:
        first = next(iter(bench.cases_of(op, s)), None)  # all of an op have the same ones
        names = [one.name for one in first.implementations] if first else []
        found += [Task(op, name) for name in names if needs_probe(name)]
    return found


def try_case(case: Case, device: torch.device) -> None:
    """Check the implementations of `case`, captured too, and call those that passed CALLS times."""
    entries = [e for e in check_all(case, sets=1) if e.status == TIMED]
    if device.type == "cuda":
        graphable(entries, device)
    for entry in entries:
        for _ in range(CALLS if entry.calls else 0):
            entry.calls[0]()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # raises if the GPU no longer answers


def child(task: Task, s: Settings) -> None:
    """Try one implementation on the smallest case of each number of rows, saying which.

    Raises:
        ValueError: no case has this implementation.
    """
    tried = 0
    for case in smallest(bench.cases_of(task.op, s)):
        ours = [one for one in case.implementations if one.name == task.implementation]
        if ours:
            print(f"{SHORT[case.dtype]}, {case.shape}", flush=True)
            with torch.no_grad():
                try_case(dataclasses.replace(case, implementations=ours), s.device)
            tried += 1
    if not tried:
        raise ValueError(f"{task.op} has no implementation {task.implementation!r}")


class _Running(NamedTuple):
    task: Task
    process: subprocess.Popen[bytes]
    said: Path  # what it wrote to stdout
    erred: Path


def _start(task: Task, command: Sequence[str], folder: Path, number: int) -> _Running:
    said, erred = folder / f"{number}.out", folder / f"{number}.err"
    with said.open("wb") as out, erred.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
    return _Running(task, process, said, erred)


def _last(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _verdict(one: _Running, silence_s: float) -> str | None:
    """None while it runs, "" if all was well, else why it must be left out."""
    where = f" at {_last(one.said)}" if _last(one.said) else " before its first case"
    code = one.process.poll()
    if code is None:
        if time.time() - one.said.stat().st_mtime < silence_s:
            return None
        one.process.kill()
        return f"left out: in a process of its own it did not end within {silence_s:g} s{where}"
    if code == 0:
        return ""
    cause = _last(one.erred) or f"exit code {code}"
    return f"left out: a process of its own died{where}: {cause}"


def unfit(
    tasks: Sequence[Task],
    command: Callable[[Task], Sequence[str]],
    silence_s: float = SILENCE_S,
    workers: int = WORKERS,
) -> dict[Task, str]:
    """Which of `tasks` must not run in a process that has more to do, and why.

    Args:
        command: task -> what tries it: 0 if it ended, another exit code if it did not survive.
        silence_s: seconds without a line on stdout after which it counts as hanging.
        workers: processes at a time.
    """
    found: dict[Task, str] = {}
    waiting, running = list(enumerate(tasks)), list[_Running]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < workers:
                number, task = waiting.pop(0)
                running.append(_start(task, command(task), Path(folder), number))
            time.sleep(0.05)
            for one in list(running):
                verdict = _verdict(one, silence_s)
                if verdict is not None:
                    running.remove(one)
                    if verdict:
                        found[one.task] = verdict
    return found


def command_of(shape_set: str, dtypes: Iterable[torch.dtype]) -> Callable[[Task], list[str]]:
    """Task -> the command line of this module that tries it."""
    words = [word for dtype in dtypes for word in ("--dtype", SHORT[dtype])]

    def command(task: Task) -> list[str]:
        own = ["--op", task.op, "--implementation", task.implementation, "--shapes", shape_set]
        return [sys.executable, "-m", "slimgemm.benchmarks.probe", *own, *words]

    return command


def skips(ops: Sequence[str], shape_set: str, s: Settings) -> dict[str, dict[str, str]]:
    """op -> implementation -> why it is left out of a run of `ops` on a GPU."""
    found: dict[str, dict[str, str]] = {}
    for task, why in unfit(tasks_of(ops, s), command_of(shape_set, s.dtypes)).items():
        found.setdefault(task.op, {})[task.implementation] = why
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module: 0 if the process lived, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m slimgemm.benchmarks.probe")
    parser.add_argument("--op", required=True)
    parser.add_argument("--implementation", required=True)
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), required=True)
    args = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    try:
        bench.check_ops([args.op])
        dtypes = tuple(DTYPES[name] for name in args.dtype)
        s = Settings(shapes(args.shapes), dtypes, device, Path(), "", bench.Peers(compiled=False))
        child(Task(args.op, args.implementation), s)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
