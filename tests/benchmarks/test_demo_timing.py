"""Timing of models and kernels with a timer that counts instead of measuring."""

import pytest
import torch
from helpers import random_24

from slimgemm import kernels
from slimgemm.benchmarks import demo_timing


class CountingTimer:
    """Runs the call and says that it took 1, 2, 3, ... µs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, call):
        call()
        self.calls += 1
        return float(self.calls)


def test_calls_take_turns_and_the_warm_up_is_not_counted():
    order = []
    timer = CountingTimer()
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    ticks = []
    found = demo_timing.interleaved(calls, timer, 11, lambda: ticks.append(0))
    assert order == ["a", "b"] * (demo_timing.WARMUP + 11) and len(ticks) == 11
    first = 2 * demo_timing.WARMUP + 1  # time of the first counted call of "a"
    assert found["a"] == demo_timing.Latency(first + 4, first + 10, first + 16, 11)
    assert found["b"].us_p50 == found["a"].us_p50 + 1


def test_the_cpu_timer_measures():
    a = torch.ones(400, 400)
    assert demo_timing.cpu_timer(lambda: a @ a) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_time_kernels_checks_and_times_every_batch(dtype, device):
    weights = {"wide1": random_24(32, 64).to(device), "wide2": random_24(16, 32, seed=1).to(device)}
    timer = CountingTimer()
    rows = list(demo_timing.time_kernels(weights, timer, dtype=dtype, batches=(1, 4, 33), rounds=2))
    assert [(r.layer, r.n, r.k, r.batch) for r in rows[2:4]] == [
        ("wide1", 32, 64, 33),
        ("wide2", 16, 32, 1),
    ]
    assert len(rows) == 6 and timer.calls == 6 * 2 * (demo_timing.WARMUP + 2)
    assert all(0 <= row.error <= row.allowed for row in rows)
    assert all(row.speedup == row.dense.us_p50 / row.packed.us_p50 for row in rows)


@pytest.mark.parametrize("wrong", [1.0, float("nan")], ids=["shifted", "nan"])
def test_a_wrong_product_is_not_timed(monkeypatch, device, wrong):
    right = kernels.spmm_24
    monkeypatch.setattr(demo_timing.kernels, "spmm_24", lambda x, w: right(x, w) + wrong)
    timer = CountingTimer()
    with pytest.raises(AssertionError, match=r"wide1, batch 1: error .* not timed"):
        list(demo_timing.time_kernels({"wide1": random_24(16, 32).to(device)}, timer, batches=(1,)))
    assert timer.calls == 0


@pytest.mark.gpu
def test_the_cuda_timer_measures(device):
    a = torch.ones(512, 512, device=device)
    assert 0 < demo_timing.timer_for(device)(lambda: a @ a) < 1e6
