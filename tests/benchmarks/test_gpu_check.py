"""gpu_check.sh: its plan fits nine minutes, limits hold, and what was reached is kept."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from slimgemm.benchmarks import bench

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
FAKE = """#!/bin/sh
# Stands for python3: answers as pytest and slimgemm do.
case "$*" in
    *"import xdist"*) exit 1 ;;
    *test_gpu.py*-m\\ gpu*|*"-m gpu"*) echo "2 skipped in 0.1s" ;;
    *pytest*) echo "3 passed, 1 skipped in 0.1s" ;;
    *"cli tune"*) mkdir -p "$XDG_CACHE_HOME/slimgemm/tune"
                  echo '{}' > "$XDG_CACHE_HOME/slimgemm/tune/h200.json" ;;
    *"--op spmm_24 "*) folder="$(echo "$*" | sed 's/.*--out \\([^ ]*\\).*/\\1/')"
                       mkdir -p "$folder" && echo "row" > "$folder/spmm.csv"
                       %s ;;
    *) exit 0 ;;
esac
"""


def check(tmp_path, *arguments, spmm="exit 0", python=None, **environment):
    """(process, lines of summary.txt by part, names in results.tar.gz)."""
    fake = tmp_path / "python"
    fake.write_text(FAKE % spmm)
    fake.chmod(0o755)
    out = tmp_path / "out"
    names = {"OUT": str(out), "PYTHON": python or str(fake), **environment}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, **names}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    if not (out / "summary.txt").exists():
        return done, {}, []
    lines = (out / "summary.txt").read_text().splitlines()[1:]
    parts = {re.split(r"\s{2,}", line)[0]: line for line in lines}
    archive = out / "results.tar.gz"
    held = []
    if archive.exists():
        with tarfile.open(archive) as tar:
            held = [Path(name).name for name in tar.getnames()]
    return done, parts, held


def test_the_plan_begins_with_the_instructions_and_ends_within_nine_minutes(tmp_path):
    done, parts, _ = check(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert list(parts) == [
        "machine", "instructions", "gpu tests", "kernels against their twins", "tune",
        "tune, resumed", "spmm_24", "packing and overhead", "models",
        "8 bits and convolutions", "gradients and channels", "spmm_24 against max-autotune",
    ]  # fmt: skip
    limits = [int(re.split(r"\s{2,}", line)[1]) for line in parts.values()]
    assert sum(limits[:-1]) <= 525 and min(limits) > 0  # the last one has what time is left
    assert "tests/kernels/gluon/test_gpu.py" in parts["instructions"]
    named = set(re.findall(r"tests/[\w/]+\.py", "\n".join(parts.values())))
    assert all((SCRIPT.parents[1] / name).is_file() for name in named)
    # Every op is asked of the GPU.
    assert set(re.findall(r"--op (\w+)", done.stdout)) == {*bench.OPS, "models"}


def test_one_part_alone(tmp_path):
    done, parts, held = check(tmp_path, "--only", "spmm_24", "--only", "models")
    assert done.returncode == 0, done.stderr
    assert list(parts) == ["spmm_24", "models"] and "spmm.csv" in held
    done, parts, _ = check(tmp_path, "--only", "spmm")
    assert done.returncode == 2 and not parts
    assert "no part is named spmm; there are machine, instructions, " in done.stderr


def test_the_rows_of_max_autotune_lie_where_the_report_looks_for_them(tmp_path):
    _, _, held = check(tmp_path, "--only", "spmm_24 against max-autotune")
    assert "spmm_compiled.csv" in held and "spmm.csv" not in held


def test_all_parts_run_and_are_kept(tmp_path):
    done, parts, held = check(tmp_path)
    assert "ok: 3 passed, 1 skipped in 0.1s" in parts["instructions"]
    # Nothing that was only skipped counts as shown.
    assert "none passed: 2 skipped" in parts["gpu tests"]
    assert done.returncode == 1
    assert all(" ok" in line for name, line in parts.items() if name != "gpu tests")
    assert {"summary.txt", "log.txt", "spmm.csv", "h200.json"} <= set(held)


def test_a_part_that_fails_does_not_end_the_others(tmp_path):
    done, parts, held = check(tmp_path, "--tiny", spmm="exit 1")
    assert done.returncode == 1
    assert "failed (1)" in parts["spmm_24"] and " ok" in parts["models"]
    assert "spmm.csv" in held


def test_a_part_that_hangs_is_cut_off_and_what_it_wrote_is_kept(tmp_path):
    done, parts, held = check(tmp_path, "--tiny", spmm="sleep 60", GPU_CHECK_SECONDS="7")
    assert done.returncode == 1
    assert "cut off" in parts["spmm_24"]
    assert "no time left" in parts["models"]
    assert "spmm.csv" in held


def test_unknown_arguments_are_refused(tmp_path):
    done, parts, _ = check(tmp_path, "--fast")
    assert done.returncode == 2 and "unknown argument --fast" in done.stderr and not parts


@pytest.mark.slow
def test_the_real_thing_on_tiny_shapes(tmp_path):
    done, parts, held = check(tmp_path, "--tiny", python=sys.executable, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout
    assert all(" ok" in line for line in parts.values())
    # One of each op, of the models, and of what max-autotune would have been timed in.
    assert sum(name.endswith(".csv") for name in held) == len(bench.OPS) + 2
