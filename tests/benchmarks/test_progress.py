"""Progress with and without a terminal."""

import io

import pytest
from rich.console import Console

from slimgemm.benchmarks import progress


def run_loop(terminal, rounds=3):
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    with progress.Steps(console, 1) as steps, steps.loop("train", rounds) as loop:
        for i in range(rounds):
            loop.step(f"{i} %")
        loop.result = "accuracy 98 %"
    return console.file.getvalue()


def test_a_log_gets_one_line_per_loop():
    lines = run_loop(terminal=False).splitlines()
    assert len(lines) == 1 and lines[0].split() == ["train", "0.0", "s", "accuracy", "98", "%"]


def test_a_long_loop_reports_to_a_log_in_between(monkeypatch):
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.0)
    lines = run_loop(terminal=False).splitlines()
    assert lines[:2] == ["  train: 1 of 3  0 %", "  train: 2 of 3  1 %"] and len(lines) == 3


def test_a_terminal_gets_bars_and_the_same_last_line(monkeypatch):
    monkeypatch.setattr(progress, "REFRESH_S", 0.0)
    text = run_loop(terminal=True)
    assert "all steps" in text and "1/3" in text and "accuracy 98 %" in text


def test_a_failed_loop_leaves_no_line():
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    with pytest.raises(RuntimeError), progress.Steps(console, 1) as steps, steps.loop("train", 2):
        raise RuntimeError
    assert console.file.getvalue() == ""
