"""The harness: what is wrong is refused a timing, what is missing is a row, rates are exact."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import randn

from slimgemm.benchmarks import harness
from slimgemm.benchmarks.harness import Case, Implementation, Missing, Wrong, measure
from slimgemm.benchmarks.machine import Limits
from slimgemm.benchmarks.rows import Row
from slimgemm.kernels.timing import Times

CPU = torch.device("cpu")
LIMITS = Limits(tb_per_s=0.01, tflops=0.05)
M, N, K = 6, 8, 16


def inputs(seed):
    return randn(M, K, seed=2 * seed), randn(N, K, seed=2 * seed + 1)


def dense(given):
    return F.linear(*given)


def case(*implementations, **changes):
    made = Case(
        op="linear",
        layer="tiny",
        sizes={"m": M, "n": N, "k": K},
        dtype=torch.float32,
        flop=2 * M * N * K,
        inputs=inputs,
        exact=lambda g: g[0].double() @ g[1].double().t(),
        dense=dense,
        implementations=implementations,
        input_bytes=4 * K * (M + N),
    )
    return dataclasses.replace(made, **changes)


def one(name, run, **extra):
    """An implementation that counts its calls."""
    calls = []

    def prepare(given):
        def call():
            calls.append(given)
            return run(given)

        return call

    return Implementation(name, prepare, 1000, **extra), calls


def rows_of(*implementations, **changes):
    rows = measure(case(*implementations, **changes), CPU, LIMITS, rounds=4)
    return {row.implementation: row for row in rows}


def test_a_right_result_is_checked_on_every_input_set_and_timed():
    right, calls = one("slimgemm linear", dense)
    row = rows_of(right)["slimgemm linear"]
    assert row.status == "timed" and row.input_sets == 2
    assert row.error <= row.allowed_error
    assert 0 < row.eager_us_p20 <= row.eager_us_p50 <= row.eager_us_p80
    assert row.graph_us_p50 is None and row.rate_from == "eager"
    # 2 checks, then 3 warm-up and 4 timed rounds that rotate through the sets.
    assert len(calls) == 2 + 7
    assert len({id(given[0]) for given in calls}) == 2


def test_a_result_that_is_wrong_by_one_per_cent_is_refused_and_never_timed():
    wrong, calls = one("slimgemm broken", lambda g: dense(g) * 1.01)
    right, _ = one("torch dense", dense)
    rows = rows_of(wrong, right)
    row = rows["slimgemm broken"]
    assert row.status == "refused" and row.eager_us_p50 is None
    assert 0.009 < row.error < 0.011
    assert "not timed" in row.reason
    assert len(calls) == 1
    assert rows["torch dense"].status == "timed"


def test_one_wrong_element_is_seen():
    def run(given):
        y = dense(given)
        y[-1, -1] += 0.05 * y.abs().max()
        return y

    assert rows_of(one("slimgemm broken", run)[0])["slimgemm broken"].status == "refused"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    broken, _ = one("slimgemm broken", lambda g: dense(g).fill_(bad))
    assert rows_of(broken)["slimgemm broken"].status == "refused"


def test_an_error_that_only_the_second_input_set_shows_is_refused():
    first = inputs(0)[0]
    broken, calls = one(
        "slimgemm broken", lambda g: dense(g) * (1.0 if torch.equal(g[0], first) else 1.01)
    )
    assert rows_of(broken)["slimgemm broken"].status == "refused"
    assert len(calls) == 2


def test_a_result_of_another_shape_is_refused():
    broken, _ = one("slimgemm broken", lambda g: dense(g)[:-1])
    row = rows_of(broken)["slimgemm broken"]
    assert row.status == "refused" and "[5, 8], must be [6, 8]" in row.reason


def test_a_peer_that_raises_becomes_a_row():
    def fail(given):
        raise RuntimeError("CUDA error: no kernel image\nmore")

    failing, _ = one("torch peer", fail)
    right, _ = one("torch dense", dense)
    rows = rows_of(failing, right)
    assert rows["torch peer"].status == "failed"
    assert rows["torch peer"].reason == "RuntimeError: CUDA error: no kernel image"
    assert rows["torch dense"].status == "timed"


def test_a_peer_that_is_missing_becomes_a_row_with_the_reason():
    def prepare(given):
        raise Missing("needs a GPU")

    row = rows_of(Implementation("torch peer", prepare, 1))["torch peer"]
    assert (row.status, row.reason) == ("missing", "needs a GPU")
    assert row.error is None and row.us is None


def test_a_check_of_its_own_may_refuse():
    def check(given, got):
        raise Wrong("a group of four keeps more than two")

    row = rows_of(one("torch peer", dense, check=check)[0])["torch peer"]
    assert (row.status, row.reason) == ("refused", "a group of four keeps more than two")


def test_without_a_dense_op_results_must_be_equal():
    moved, _ = one("slimgemm move", lambda g: g[0])
    close, _ = one("slimgemm close", lambda g: g[0] * (1 + 1e-6))
    rows = rows_of(moved, close, dense=None, exact=lambda g: g[0].double())
    assert rows["slimgemm move"].status == "timed" and rows["slimgemm move"].error == 0
    assert rows["slimgemm close"].status == "refused"


def test_names_must_differ():
    with pytest.raises(ValueError, match="different names"):
        rows_of(one("torch dense", dense)[0], one("torch dense", dense)[0])


def fake_times(us):
    def time_us(calls, device, *, graph=False, rounds=30, **_):
        return {
            name: Times(*(scale * us[name, graph] for scale in (0.9, 1, 1.1))) for name in calls
        }

    return time_us


def test_rates_and_ratios(monkeypatch):
    us = {("slimgemm linear", False): 2.0, ("torch dense", False): 3.0}
    us["torch dense compiled", False] = 2.5
    monkeypatch.setattr(harness, "time_us", fake_times(us))
    rows = rows_of(*(one(name, dense)[0] for name, _ in us))
    row = rows["slimgemm linear"]
    assert row.tb_per_s == pytest.approx(1000 / 2e-6 / 1e12)
    assert row.dense_equivalent_tflops == pytest.approx(2 * M * N * K / 2e-6 / 1e12)
    assert row.byte_limit_percent == pytest.approx(100 * row.tb_per_s / 0.01)
    assert row.compute_limit_percent == pytest.approx(100 * row.dense_equivalent_tflops / 0.05)
    # Against the best dense competitor, not the first one.
    assert row.best_dense_over_this == pytest.approx(1.25)
    assert rows["torch dense"].best_dense_over_this == pytest.approx(2.5 / 3)


class Graph:
    """A captured graph whose calls ran when it was captured."""

    @staticmethod
    def replay():
        pass


class FakeGpu:
    """torch.cuda as far as the harness asks it; the tensors stay on the CPU."""

    def __init__(self, monkeypatch, capture):
        self.synchronized = 0
        monkeypatch.setattr(harness, "capture", capture)
        for name, value in {
            "synchronize": self.synchronize,
            "memory_allocated": lambda device: 1000,
            "max_memory_allocated": lambda device: 5096,
            "reset_peak_memory_stats": lambda device: None,
            "get_device_properties": lambda device: type("P", (), {"L2_cache_size": 3000}),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def synchronize(self, device=None):
        self.synchronized += 1


def test_on_a_gpu_graphs_are_timed_too_and_what_cannot_be_captured_says_so(monkeypatch):
    def capture(calls, device):
        calls[0]()
        if "stubborn" in repr(calls[0].args[0]):
            raise RuntimeError("operation not permitted when stream is capturing")
        return Graph

    gpu = FakeGpu(monkeypatch, capture)
    us = {("slimgemm linear", False): 9.0, ("slimgemm linear", True): 2.0}
    us |= {("torch dense", False): 8.0, ("torch dense", True): 3.0, ("torch peer", False): 7.0}
    monkeypatch.setattr(harness, "time_us", fake_times(us))

    class Stubborn:
        def __repr__(self):
            return "stubborn"

    stubborn = Implementation(
        "torch peer", lambda g: Stubborn, 1000, check=lambda g, got: (0.0, 1.0)
    )
    right = [one(name, dense)[0] for name in ("slimgemm linear", "torch dense")]
    rows = measure(case(*right, stubborn), torch.device("cuda"), LIMITS)
    ours, other, peer = rows
    assert (ours.graph_us_p50, ours.eager_us_p50, ours.rate_from) == (2.0, 9.0, "graph")
    assert ours.best_dense_over_this == pytest.approx(1.5)
    assert other.best_dense_over_this == 1
    assert peer.status == "timed" and peer.graph_us_p50 is None and peer.rate_from == "eager"
    assert peer.reason == "no graph: RuntimeError: operation not permitted when stream is capturing"
    # Compared with dense by the same kind of time.
    assert peer.best_dense_over_this == pytest.approx(8 / 7)
    assert ours.peak_call_bytes == 4096 and ours.host_us_p50 > 0
    assert gpu.synchronized > 0


def test_a_graph_that_repeats_another_result_is_refused(monkeypatch):
    def capture(calls, device):
        calls[0]()
        calls[0].args[0][0] *= 1.01  # what the replay leaves in the graph's own output
        return Graph

    FakeGpu(monkeypatch, capture)
    us = {("slimgemm linear", False): 9.0}
    monkeypatch.setattr(harness, "time_us", fake_times(us))
    (row,) = measure(case(one("slimgemm linear", dense)[0]), torch.device("cuda"), LIMITS)
    assert row.status == "refused" and row.us is None
    assert row.reason.startswith("as a CUDA graph: error") and 0.009 < row.error < 0.011


def test_input_sets_are_three_times_the_l2_but_few(monkeypatch):
    FakeGpu(monkeypatch, None)
    gpu = torch.device("cuda")
    sized = lambda size: harness.set_count(case(input_bytes=size), gpu)  # noqa: E731
    assert sized(1000) == 9
    assert sized(1) == harness.MAX_SETS
    assert sized(10**9) == 2
    assert harness.set_count(case(), CPU) == 2


def test_a_row_says_what_it_is_judged_by():
    row = Row("op", "layer", "m 1", "fp32", "torch dense", "timed", eager_us_p50=4.0)
    assert row.us == 4.0
    assert dataclasses.replace(row, graph_us_p50=3.0).us == 3.0


def test_what_a_kernel_does_not_write_is_seen_though_a_right_result_lay_there():
    torch.set_deterministic_debug_mode("default")  # as in a run; a fixture sets it back

    def forgetful(given):
        # As the kernel before it wrote the same bytes, memory that is used again may be right.
        y = given[0].new_empty(M, N)
        y[:-1] = dense(given)[:-1]
        return y

    for _ in range(3):
        rows = rows_of(one("torch dense", dense)[0], one("slimgemm broken", forgetful)[0])
        assert rows["slimgemm broken"].status == "refused"
        assert "error nan" in rows["slimgemm broken"].reason
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_must_not_run_is_a_row_that_says_why_and_is_never_called():
    hangs, calls = one("slimgemm hangs", dense)
    right, _ = one("torch dense", dense)
    why = {"slimgemm hangs": "no answer after 30 s"}
    rows = measure(case(hangs, right), CPU, LIMITS, rounds=2, skip=why)
    assert [row.status for row in rows] == ["failed", "timed"]
    assert rows[0].reason == "no answer after 30 s"
    assert not calls
