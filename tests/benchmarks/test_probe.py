"""Probes: what hangs or dies in a process of its own is left out of the run, with the reason."""

import dataclasses
import sys

import pytest
import torch

from slimgemm.benchmarks import bench, probe
from slimgemm.benchmarks.bench import Settings
from slimgemm.benchmarks.peers import Peers
from slimgemm.benchmarks.probe import Task, child, needs_probe, smallest, tasks_of, unfit
from slimgemm.benchmarks.shapes import shapes

CPU = torch.device("cpu")


def settings(tmp_path, name="tiny"):
    return Settings(shapes(name), (torch.float32,), CPU, tmp_path, "", Peers(compiled=False))


SCRIPTS = {
    "fine": "print('m 1'); print('m 2')",
    "hangs": "import time; print('m 64', flush=True); time.sleep(60)",
    "dies": "import os; print('m 8', flush=True); os.abort()",
    "faults": "print('m 1', flush=True); raise RuntimeError('CUDA error: illegal address')",
}


def test_what_hangs_or_dies_is_found_and_what_lives_is_not():
    tasks = [Task("spmm_24", name) for name in SCRIPTS]
    command = lambda task: [sys.executable, "-c", SCRIPTS[task.implementation]]  # noqa: E731
    found = unfit(tasks, command, silence_s=3, workers=2)
    assert {task.implementation for task in found} == {"hangs", "dies", "faults"}
    why = {task.implementation: text for task, text in found.items()}
    assert why["hangs"] == ("left out: in a process of its own it did not end within 3 s at m 64")
    assert why["dies"] == "left out: a process of its own died at m 8: exit code -6"
    assert why["faults"].endswith("died at m 1: RuntimeError: CUDA error: illegal address")


def test_sparse_tensor_core_kernels_of_every_op_are_probed(tmp_path):
    s = settings(tmp_path)
    tasks = tasks_of(list(bench.OPS), s)
    assert len(set(tasks)) == len(tasks)
    names = {op: {t.implementation for t in tasks if t.op == op} for op in bench.OPS}
    forms = {"mma_sp", "wgmma_sp", "mma_sp ordered", "wgmma_sp ordered"}
    assert names["spmm_24"] == {f"slimgemm {form}" for form in forms}
    assert names["conv2d_24"] == {"slimgemm mma_sp", "slimgemm wgmma_sp"}
    assert len(names["scaled_spmm_24"]) == 2 and len(names["pack_24"]) == 4
    assert not names["gemm_channels"]
    assert not needs_probe("torch mma") and not needs_probe("slimgemm portable")


def test_the_smallest_layer_of_each_number_of_rows_is_tried(tmp_path):
    s = settings(tmp_path, "main")
    cases = smallest(bench.cases_of("spmm_24", s))
    sizes = {case.sizes["m"]: (case.sizes["n"], case.sizes["k"]) for case in cases}
    assert set(s.shapes.tokens) <= set(sizes) and len(cases) == len(sizes)
    assert sizes[64] == (4096, 4096)


def test_a_probe_runs_the_implementation_it_is_named_for_and_says_where_it_is(
    tmp_path, monkeypatch, capsys
):
    tried = []
    monkeypatch.setattr(probe, "try_case", lambda case, device: tried.append(case))
    child(Task("spmm_24", "slimgemm portable"), settings(tmp_path))
    assert [[one.name for one in case.implementations] for case in tried] == [
        ["slimgemm portable"]
    ] * len(tried)
    assert capsys.readouterr().out.splitlines() == [f"fp32, {case.shape}" for case in tried]
    assert {case.sizes["m"] for case in tried} >= set(shapes("tiny").tokens)


def test_a_kernel_that_passed_its_check_is_called_many_times(tmp_path):
    (case, *_) = bench.cases_of("spmm_24", settings(tmp_path))
    calls = []

    def prepare(given):
        def call():
            calls.append(given)
            return given.x @ given.w.t()

        return call

    one = dataclasses.replace(case.implementations[0], prepare=prepare)
    probe.try_case(dataclasses.replace(case, implementations=[one]), CPU)
    assert len(calls) == 1 + probe.CALLS


@pytest.mark.parametrize(
    ("op", "name", "code", "text"),
    [
        ("overhead", "slimgemm spmm_24", 0, ""),
        ("overhead", "slimgemm none", 2, "overhead has no implementation 'slimgemm none'"),
        ("gemm", "slimgemm none", 2, "op must be one of"),
    ],
)
def test_the_command_line(op, name, code, text, capsys):
    words = ["--op", op, "--implementation", name, "--shapes", "tiny", "--dtype", "fp32"]
    assert probe.main(words) == code
    assert text in capsys.readouterr().err


def test_a_task_is_tried_by_this_module_with_the_same_shapes_and_dtypes():
    command = probe.command_of("check", (torch.bfloat16, torch.float16))
    words = command(Task("spmm_24", "slimgemm mma_sp"))
    assert words[1:] == [
        "-m", "slimgemm.benchmarks.probe", "--op", "spmm_24", "--implementation",
        "slimgemm mma_sp", "--shapes", "check", "--dtype", "bf16", "--dtype", "fp16",
    ]  # fmt: skip


def test_what_is_left_out_is_a_row_that_says_why(tmp_path):
    why = "left out: a process of its own died at m 8: exit code -6"
    s = dataclasses.replace(settings(tmp_path), skip={"spmm_24": {"slimgemm mma_sp": why}})
    limits = {torch.float32: bench.Limits(0.01, 0.05)}
    rows = bench.run("spmm_24", s, limits).rows
    left = [row for row in rows if row.implementation == "slimgemm mma_sp"]
    assert left and {(row.status, row.reason) for row in left} == {("failed", why)}
    assert not [row for row in bench.run("overhead", s, limits).rows if row.status == "failed"]
