"""A pytest plugin for kernels that may hang or fault: each of them costs one test, not the run.

    PYTHONPATH=tests SLIMGEMM_TEST_JOURNAL=folder pytest -p gpu_guard -n 8 ...

With pytest-xdist every worker is a process with a context of its own on the GPU. A test that
outlives SLIMGEMM_TEST_SECONDS, or leaves the GPU answering with errors, ends its worker: xdist
names that test as failed and goes on in a new worker. Where workers died in MOST_DEATHS tests of
one function, its other tests are skipped, so that what hangs everywhere does not take all the time.
"""

import contextlib
import faulthandler
import fcntl
import os
from pathlib import Path

import pytest
import torch

MOST_DEATHS = 3
SECONDS = float(os.environ.get("SLIMGEMM_TEST_SECONDS", "45"))
# A locked file for each test that runs, named by its function and process.
JOURNAL = Path(os.environ["SLIMGEMM_TEST_JOURNAL"])
# The log: during a test, pytest sends the standard error to a file that a dead worker takes along.
LOG = os.dup(2)


def deaths(function):
    """How many processes died in a test of `function`: nobody holds the lock of their file."""
    count = 0
    for path in JOURNAL.glob(f"{function}.*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            count += 1
    return count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    JOURNAL.mkdir(parents=True, exist_ok=True)
    path = JOURNAL / f"{item.function.__name__}.{os.getpid()}"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=LOG)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            path.unlink()


def pytest_runtest_setup(item):
    if deaths(item.function.__name__) >= MOST_DEATHS:
        pytest.skip(f"{MOST_DEATHS} processes died in {item.function.__name__}")


def gpu_is_broken():
    """True if the GPU answers this process with errors, as it does for good after a fault."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and gpu_is_broken():
        os.write(LOG, f"\n{item.nodeid} broke the GPU:\n{report.longreprtext}\n".encode())
        os._exit(1)
    return report
