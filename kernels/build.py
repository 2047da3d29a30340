"""Ahead-of-time builds: every kernel for every architecture claimed, without a GPU.

    python -m slimgemm.kernels.build --arch sm_80 --arch gfx942 --op spmm_24 --out builds.json

build_kernels.py says what is built, build_compile.py builds one; this file runs them all and
prints registers, spills, shared memory, tensor-core instructions and load widths.

Compilers run in processes of their own: the Triton interpreter replaces `triton.jit` in a process
where TRITON_INTERPRET is set, and a compiler that crashes must not take the caller with it.

Limits that a build is held to:
- no spills, but for build_compile.PARKED_BYTES outside loops. A thread has at most 255 registers
  on CUDA (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", row
  "Maximum number of 32-bit registers per thread"), a lane 512 vector registers with its
  accumulators on CDNA3 and CDNA4 (AMD's "Instruction Set Architecture" guides of both, chapter on
  vector registers).
- shared memory within configs.SMEM_BYTES: the same CUDA table, row "Maximum amount of shared memory
  per thread block"; 64 KiB of LDS on CDNA3 and 160 KiB on CDNA4, same AMD guides.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimgemm.kernels.build_compile import PARKED_BYTES, Build, Report, builds, compile_build
from slimgemm.kernels.build_kernels import DTYPES, OPS
from slimgemm.kernels.configs import SMEM_BYTES

__all__ = ["Build", "Report", "builds", "compile_build", "kernels_command", "run"]

SECONDS_LIMIT = 600  # of one build, after which its compiler is ended


class _Compiler:
    """A process that compiles one build after another; started again after a crash."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.Popen(
            [sys.executable, "-m", "slimgemm.kernels.build", "--worker"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, build: Build) -> list[Report]:
        process = self.process = self.process or self.start()
        assert process.stdin is not None and process.stdout is not None
        limit = threading.Timer(SECONDS_LIMIT, process.kill)
        limit.start()
        try:
            process.stdin.write(json.dumps(build) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if line:
            return [Report(**report) for report in json.loads(line)]
        code = process.wait()
        self.close()
        return [Report(build.op, "", *build[1:], error=f"the compiler ended with status {code}")]

    def close(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            process.wait()


WIDTH = 140  # columns of the table where stdout is no terminal


def _worker() -> None:
    """Read builds, one JSON list a line, and answer each with a line of reports."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a compiler may print
    for line in sys.stdin:
        build = Build(*json.loads(line))
        try:
            reports = compile_build(build)
        except Exception as error:  # a launcher that refuses its own shipped configuration
            reports = [Report(build.op, "", *build[1:], error=f"{type(error).__name__}: {error}")]
        answers.write(json.dumps([asdict(report) for report in reports]) + "\n")
        answers.flush()
    os._exit(0)  # Triton's bindings print what they leaked on an ordinary exit


def run(
    wanted: Iterable[Build],
    jobs: int = 2,
    on_reports: Callable[[list[Report]], None] | None = None,
) -> list[Report]:
    """Compile `wanted` in `jobs` processes; the reports in the order of the builds.

    Args:
        on_reports: called with the reports of each build when it is done, from any thread.
    """
    compilers: queue.SimpleQueue[_Compiler] = queue.SimpleQueue()
    everyone = [_Compiler() for _ in range(jobs)]
    for compiler in everyone:
        compilers.put(compiler)

    def one(build: Build) -> list[Report]:
        compiler = compilers.get()
        try:
            reports = compiler(build)
        finally:
            compilers.put(compiler)
        if on_reports is not None:
            on_reports(reports)
        return reports

    try:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            return [report for reports in pool.map(one, wanted) for report in reports]
    finally:
        for compiler in everyone:
            compiler.close()


def table(reports: Iterable[Report]) -> Any:
    """A rich table of the reports, what is not sound in red."""
    from rich.table import Table

    columns = ("op", "kernel", "case", "arch", "dtype")
    numbers = ("registers", "spills, B (in loops)", "shared, KiB")
    made = Table(*columns, *numbers, "tensor cores", "global loads, B")
    for report in reports:
        head = (report.op, report.kernel.strip("_"), report.case, report.arch, report.dtype)
        if report.unsupported or report.error:
            style = "dim" if report.unsupported else "red"
            made.add_row(*head, "", "", "", report.unsupported or report.error, "", style=style)
            continue
        counts = [
            ", ".join(f"{count} x {name}" for name, count in sorted(found.items())) or "-"
            for found in (report.tensor_core, report.loads)
        ]
        spills = f"{report.spill_bytes} ({report.loop_spills})" if report.spill_bytes else "0"
        facts = (str(report.registers), spills, f"{report.smem_bytes / 1024:.1f}", *counts)
        made.add_row(*head, *facts, style="" if report.sound else "red")
    return made


def _nothing_built(op: str | None, archs: Sequence[str], dtype: str | None) -> str:
    """What to say of an op, architectures and a dtype that are never built together."""
    asked = ", ".join(part for part in (op, dtype, *archs) if part)
    if op is None:
        return f"nothing is built for {asked} together; leave one of them out"
    known = OPS[op]
    where = ", ".join(known.archs) or "every architecture"
    return f"nothing is built for {asked} together; {op} has {', '.join(known.dtypes)} for {where}"


def kernels_command(
    op: str | None = None,
    arch: Sequence[str] | None = None,
    dtype: str | None = None,
    out: Path | None = None,
    jobs: int = 2,
) -> int:
    """What `slimgemm kernels` runs: build, print a table, write JSON to `out`. Exit status.

    Args:
        op, arch, dtype: which to build; all of them unless given.
        out: file for the reports, a JSON list with the Triton version beside it.
    Returns:
        0 if every build is sound, else 1.
    Raises:
        ValueError: an op, architecture or dtype that is not known, ones that are never built
            together, fewer than one job, or a folder as `out`.
    """
    import triton
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    wanted = list(builds([op] if op else None, arch or None, [dtype] if dtype else None))
    if not wanted:
        raise ValueError(_nothing_built(op, arch or (), dtype))
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out must be a JSON file, {out} is a folder")
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=Console(stderr=True)) as progress:
        task = progress.add_task("compile", total=len(wanted))

        def done(reports: list[Report]) -> None:
            last = reports[-1]
            progress.update(task, advance=1, description=f"{last.op} {last.dtype} {last.arch}")

        reports = run(wanted, jobs, done)
    console.print(table(reports))
    unsound = sum(not report.sound for report in reports)
    skipped = sum(bool(report.unsupported) for report in reports)
    console.print(
        f"{len(reports)} kernels built with triton {triton.__version__} for "
        f"{len({r.arch for r in reports})} of {len(SMEM_BYTES)} architectures: "
        f"{unsound} not sound, {skipped} not supported"
    )
    parked = sum(report.sound and report.spill_bytes > 0 for report in reports)
    if parked:
        console.print(
            f"{parked} of the sound ones hold up to {PARKED_BYTES} bytes a thread in local memory "
            "outside loops: ptxas parks a register or two before a loop and fetches them once "
            "after it, to stay under a register count that lets more programs run at once"
        )
    if out is not None:
        rows = {"triton": triton.__version__, "reports": [asdict(report) for report in reports]}
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(rows, indent=1) + "\n")
    return int(unsound > 0)


def main() -> int:
    """Command line of this module; `slimgemm kernels` has the same options."""
    parser = argparse.ArgumentParser(prog="python -m slimgemm.kernels.build", description=__doc__)
    parser.add_argument("--op", help="one op; all unless given")
    parser.add_argument("--arch", action="append", help="an architecture; may be repeated")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; all unless given")
    parser.add_argument("--out", type=Path, help="write the reports as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _worker()
        return 0
    try:
        return kernels_command(args.op, args.arch, args.dtype, args.out, args.jobs)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
