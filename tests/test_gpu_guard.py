"""gpu_guard: what hangs or faults ends one process, is named in the log, and not tried forever."""

import fcntl
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

HANGS = "import time\ndef test_hangs():\n    time.sleep(60)\n"


@pytest.fixture
def guard(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIMGEMM_TEST_JOURNAL", str(tmp_path))
    sys.modules.pop("gpu_guard", None)
    made = importlib.import_module("gpu_guard")
    log = made.LOG
    yield made
    os.close(log)
    del sys.modules["gpu_guard"]


def test_a_test_that_hangs_ends_its_process_and_counts_as_a_death(tmp_path, guard):
    file = tmp_path / "test_slow.py"
    file.write_text(HANGS)
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parent), "SLIMGEMM_TEST_SECONDS": "0.5",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "gpu_guard", "-p", "no:cacheprovider", str(file)],
        env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and "passed" not in done.stdout
    assert "Timeout" in done.stderr and "in test_hangs" in done.stderr
    assert guard.deaths("test_hangs") == 1


def test_after_three_deaths_the_other_tests_of_a_function_are_skipped(tmp_path, guard):
    item = types.SimpleNamespace(function=types.SimpleNamespace(__name__="test_x"))
    for pid in range(3):
        guard.pytest_runtest_setup(item)
        (tmp_path / f"test_x.{pid}").touch()
    with pytest.raises(pytest.skip.Exception, match="3 processes died in test_x"):
        guard.pytest_runtest_setup(item)
    with (tmp_path / "test_x.0").open() as file:  # this one still runs
        fcntl.flock(file, fcntl.LOCK_EX)
        guard.pytest_runtest_setup(item)


def test_a_test_that_breaks_the_gpu_ends_its_worker_and_is_told(monkeypatch, guard, capfd):
    def fault():
        raise RuntimeError("an illegal memory access was encountered")

    def leave(code):
        raise SystemExit(code)

    def report(failed):
        call = guard.pytest_runtest_makereport(types.SimpleNamespace(nodeid="test_x[1]"))
        next(call)
        with pytest.raises(StopIteration):
            call.send(types.SimpleNamespace(failed=failed, longreprtext="what went wrong"))

    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(guard, "LOG", 2)
    monkeypatch.setattr(os, "_exit", leave)
    report(failed=True)  # the GPU was not used
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    report(failed=True)  # and here it still answers
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    report(failed=False)
    assert not capfd.readouterr().err
    with pytest.raises(SystemExit):
        report(failed=True)
    assert "test_x[1] broke the GPU:\nwhat went wrong" in capfd.readouterr().err
