"""Timing: order of the calls, percentiles, refusals."""

import time

import pytest
import torch

from slimgemm.kernels import timing
from slimgemm.kernels.timing import Times, cpu_clock, percentiles, time_us


def test_calls_take_turns_in_every_round_and_sets_rotate():
    seen = []
    calls = {
        "a": [lambda: seen.append("a0"), lambda: seen.append("a1")],
        "b": lambda: seen.append("b"),
    }
    times = time_us(calls, "cpu", rounds=3, warmup=1)
    assert seen == ["a0", "b", "a1", "b", "a0", "b", "a1", "b"]
    assert list(times) == ["a", "b"] and all(t.p20 <= t.p50 <= t.p80 for t in times.values())


def test_where_caches_shall_be_warm_each_call_runs_once_untimed_before():
    seen, now = [], [0]

    def call(name):
        seen.append(name)
        now[0] += 1000 * len(seen)  # each run takes a microsecond longer than the one before

    calls = {name: lambda name=name: call(name) for name in "ab"}
    times = time_us(calls, "cpu", rounds=1, warmup=0, warm=True, clock=lambda: now[0])
    assert seen == ["a", "a", "b", "b"]
    assert (times["a"].p50, times["b"].p50) == (2.0, 4.0)


def test_the_time_is_that_of_the_call():
    times = time_us({"sleep": lambda: time.sleep(0.01), "nothing": lambda: None}, "cpu", rounds=5)
    assert times["sleep"].p20 >= 10_000
    assert times["nothing"].p50 < 1_000


def test_cpu_time_of_one_thread_does_not_count_waiting(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    slept = time_us({"nap": lambda: time.sleep(0.02)}, "cpu", rounds=3, clock=cpu_clock())
    assert slept["nap"].p50 < 10_000
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    waited = time_us({"nap": lambda: time.sleep(0.02)}, "cpu", rounds=3, clock=cpu_clock())
    assert waited["nap"].p50 >= 20_000


def test_percentiles():
    assert percentiles([7.0]) == Times(7.0, 7.0, 7.0)
    assert percentiles([float(i) for i in range(11)]) == Times(2.0, 5.0, 8.0)


@pytest.mark.parametrize(
    "calls,more,text",
    [
        ({}, {}, "needs calls and at least one round, got 0 and 30"),
        ({"a": print}, {"rounds": 0}, "got 1 and 0"),
        ({"a": print}, {"graph": True}, "a CUDA graph needs a CUDA device, got cpu"),
    ],
)
def test_refusals(calls, more, text):
    with pytest.raises(ValueError, match=text):
        time_us(calls, "cpu", **more)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_two_sets_takes_as_long_per_call_as_one():
    a = [torch.randn(4096, 4096, device="cuda") for _ in range(2)]
    one = time_us({"mm": lambda: a[0] @ a[0]}, "cuda", graph=True)["mm"]
    two = time_us({"mm": [lambda: a[0] @ a[0], lambda: a[1] @ a[1]]}, "cuda", graph=True)["mm"]
    assert 0.7 < two.p50 / one.p50 < 1.4


class Buffer:
    """Stands for the flush buffer: notes what is done to it."""

    def __init__(self, log):
        self.log = log

    def __getattr__(self, name):
        return lambda *args: self.log.append(f"{name} buffer")


def test_the_l2_is_emptied_by_reading_before_every_timed_call(monkeypatch):
    # Written lines would still go to memory while the call is timed.
    log = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: log.append("event")
            self.synchronize = lambda: None
            self.elapsed_time = lambda end: 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing._gpu_us(lambda: log.append("call"), Buffer(log), False) == 500.0
    assert log == ["sum buffer", "event", "call", "event"]
    log.clear()
    timing._gpu_us(lambda: log.append("call"), Buffer(log), True)
    assert log == ["sum buffer", "call", "event", "call", "event"]


@pytest.mark.gpu
def test_a_call_on_a_small_tensor_finds_it_in_memory_not_in_the_l2():
    a = torch.randn(2**22, device="cuda")
    cold = time_us({"read": a.sum}, "cuda")["read"]
    warm = time_us({"read": a.sum}, "cuda", flush=False)["read"]
    assert warm.p50 < cold.p50
