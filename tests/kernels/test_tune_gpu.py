"""Tuning and dispatch on a real GPU: real kernels, real clock, capture, what the host pays."""

import time

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm import kernels
from slimgemm.kernels import dispatch, tune, tune_jobs, tune_table
from slimgemm.kernels.conv_layout import convolution
from slimgemm.kernels.reference import spmm_24_ref
from slimgemm.kernels.reference_conv import conv2d_24_ref
from slimgemm.kernels.tune_jobs import ConvJob, conv_jobs

pytestmark = pytest.mark.gpu

N, K, M = 512, 1024, 16
MOST_OVERHEAD_US = 10.0  # of an eager call over torch.matmul


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """One row measured on this GPU, where dispatch looks for it; the row."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    device = torch.device("cuda", torch.cuda.current_device())
    head = {**tune_table.here(device.index), "driver": "", "commit": ""}
    path = tune_table.user_path(head)
    said = []
    # Each implementation's own tile: building every tile takes minutes.
    tuner = tune.gpu_tuner(device, lambda choice: None, lambda *what: said.append(what[-1]), True)
    todo = tune_jobs.jobs([(N, K)], [torch.bfloat16], [M])
    ((_, row, why),) = tune.tune(todo, tune.resumed(path, head), path, tuner)
    assert row is not None, why
    assert len(said) == len(row.results)
    dispatch.reload()
    yield row
    patch.undo()
    dispatch.reload()


def operands(m=M):
    w = kernels.pack_24(random_24(N, K, torch.bfloat16, device="cuda"))
    return randn(m, K, dtype=torch.bfloat16, device="cuda"), w


def test_no_candidate_is_wrong_and_the_fastest_is_first(tuned):
    for result in tuned.results:
        print(f"{result.choice}: {result.verdict} {result.us_p50} us {result.reason}")
    assert [(str(r.choice), r.reason) for r in tuned.results if r.verdict == "wrong"] == []
    times = [r.us_p50 for r in tuned.ranked]
    assert times == sorted(times) and times[0] > 0.5
    assert {"portable", "dense"} <= {r.choice.implementation for r in tuned.ranked}


def test_dispatch_follows_the_table(tuned):
    x, w = operands()
    plans = dispatch.plans(x.device.index)
    assert plans.table.rows == (tuned,)
    name, tile, splits = tuned.ranked[0].choice
    best = plans.candidates[name].bind(tile, splits)
    got = kernels.spmm_24(x, w)
    assert torch.equal(got, best(x, w, None, None, "none"))
    (kept,) = plans.kept.values()
    assert getattr(kept, "func", kept) is getattr(best, "func", best)
    exact = spmm_24_ref(x.double(), w._replace(values=w.values.double()))
    assert_no_worse_than_dense(got, spmm_24_ref(x, w), exact, name)


def test_a_dispatched_call_can_be_captured(tuned):
    x, w = operands()
    bias = randn(N, dtype=torch.bfloat16, seed=1, device="cuda")
    kernels.spmm_24(x, w, bias, None, "gelu")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.spmm_24(x, w, bias, None, "gelu")
    x.copy_(randn(M, K, dtype=torch.bfloat16, seed=2, device="cuda"))
    graph.replay()
    assert torch.equal(y, kernels.spmm_24(x, w, bias, None, "gelu"))


def test_a_dispatched_call_keeps_no_memory_but_its_output(tuned):
    x, w = operands()
    y = kernels.spmm_24(x, w)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    reserved = torch.cuda.memory_reserved()
    for _ in range(20):
        y = kernels.spmm_24(x, w)
    assert torch.cuda.memory_allocated() == before  # the new output took the old one's place
    assert torch.cuda.memory_reserved() == reserved
    assert y.shape == (M, N)


CONVS = [
    ConvJob(torch.bfloat16, convolution((128, 64, 1, 1)), 2, 14, 14),
    ConvJob(torch.bfloat16, convolution((128, 64, 3, 3), padding=1), 2, 14, 14),
]


def test_convolutions_are_tuned_dispatched_and_captured(tmp_path):
    device, path = torch.device("cuda", torch.cuda.current_device()), tmp_path / "t.json"
    head = {**tune_table.here(device.index), "driver": "", "commit": ""}
    tuner = tune.gpu_tuner(device, lambda choice: None, lambda *what: None, quick=True)
    todo = conv_jobs(CONVS)
    rows = [row for _, row, _ in tune.tune(todo, tune.resumed(path, head), path, tuner)]
    assert [row.shape for row in rows] == [job.shape for job in todo]
    for row in rows:
        for result in row.results:
            print(f"{row.op} {result.choice}: {result.verdict} {result.us_p50} {result.reason}")
        assert [r for r in row.results if r.verdict == "wrong"] == []
    plans = dispatch.Plans(tune_table.load(path))
    for job in CONVS:
        x, w = job.inputs(device, 7)
        arguments = job.arguments(x, w, None, None, "relu")
        got = plans.conv2d_24(*arguments)
        wide = w._replace(values=w.values.double())
        exact = conv2d_24_ref(*job.arguments(x.double(), wide, None, None, "relu"))
        assert_no_worse_than_dense(got, conv2d_24_ref(*arguments), exact, str(job))
        assert got.is_contiguous(memory_format=torch.channels_last)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = plans.conv2d_24(*arguments)
        x.copy_(job.inputs(device, 8)[0])
        graph.replay()
        assert torch.equal(y, plans.conv2d_24(*arguments))


def host_us(call, calls=200, rounds=15):
    """Microseconds that the host takes to queue one call; the best round."""
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter_ns() - start) / 1e3 / calls)
    return best


def test_what_the_host_pays_over_torchs_own_product(tuned):
    x, w = operands()
    dense = kernels.unpack_24(w).t()
    parts = (w.values, w.meta, None, None, w.k, w.keep, w.group, "none")
    import slimgemm.sparse_ops  # noqa: F401  # registers the operator

    us = {
        "torch.matmul": host_us(lambda: torch.matmul(x, dense)),
        "kernels.spmm_24": host_us(lambda: kernels.spmm_24(x, w)),
        "slimgemm::spmm_24": host_us(lambda: torch.ops.slimgemm.spmm_24(x, *parts)),
    }
    print(", ".join(f"{name} {value:.1f} us" for name, value in us.items()))
    assert us["kernels.spmm_24"] <= us["torch.matmul"] + MOST_OVERHEAD_US
