"""record_cpu.sh: each file by the command that its head names, in place only when all are there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from slimgemm.benchmarks import bench, micro, records
from slimgemm.benchmarks.records import RESULTS

SCRIPT = RESULTS.parent / "record_cpu.sh"
FAKE = """#!/bin/sh
# Stands for python3: notes its arguments and writes what they ask for.
echo "OMP_NUM_THREADS=$OMP_NUM_THREADS $*" >> "$LOG"
case "$*" in
    *"--op $FAILS "*) exit 1 ;;
    *"--op "*) touch "$OUT/cpu_$(echo "$*" | sed 's/.*--op \\([^ ]*\\).*/\\1/').csv" ;;
    *bench_cpu*--out*) touch "$OUT/cpu_layers.json" ;;
    *benchmarks.micro*) touch "$OUT/cpu_micro.csv" ;;
esac
"""


def record(tmp_path, fails="nothing"):
    """(exit code, commands, names in the results of a copy of the script)."""
    results = tmp_path / "tree" / "benchmarks" / "results"
    results.mkdir(parents=True)
    script, fake, log = results.parent / SCRIPT.name, tmp_path / "python", tmp_path / "log"
    shutil.copy(SCRIPT, script)
    fake.write_text(FAKE)
    fake.chmod(0o755)
    names = {"PYTHON": str(fake), "OUT": str(tmp_path / "out"), "LOG": str(log), "FAILS": fails}
    environment = {**os.environ, **names}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, timeout=60)
    return done.returncode, log.read_text().splitlines(), {p.name for p in results.iterdir()}


def test_every_op_that_a_cpu_has_is_recorded_and_then_reported(tmp_path):
    code, commands, held = record(tmp_path)
    # Of products of 8 bits a CPU has none of ours.
    ops = [op for op in (*bench.OPS, "models") if op != "scaled_spmm_24"]
    assert code == 0
    assert held == {*(f"cpu_{op}.csv" for op in ops), "cpu_micro.csv", "cpu_layers.json"}
    assert all(command.startswith("OMP_NUM_THREADS=1 ") for command in commands)
    assert commands[-1].endswith("-m slimgemm.benchmarks.report")
    pytest_options = re.findall(r"--benchmark-[\w-]+(?:=\S+)?", micro.COMMAND)
    (run,) = [command for command in commands if "-m pytest" in command]
    assert all(o in run for o in pytest_options if "json" not in o)


def test_nothing_is_replaced_if_one_of_them_fails(tmp_path):
    code, commands, held = record(tmp_path, fails="pack_24")
    assert code != 0 and not held
    assert not any("benchmarks.report" in command for command in commands)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("cpu_*.csv")), ids=lambda path: path.stem)
def test_the_script_runs_the_command_of_each_recorded_file(path):
    head = Path(path).read_text(encoding="utf-8").splitlines()
    assert head[0] == records.FIRST_LINE
    command = next(line for line in head if line.startswith("# command: "))
    op = path.stem.removeprefix("cpu_")
    if op != "micro":
        assert f"slimgemm bench --op {op} --shapes small --no-compiled" in command
