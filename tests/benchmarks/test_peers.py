"""Competitors: each is a call, or says why there is none."""

import pytest
import torch
from helpers import randn, random_24

from slimgemm.benchmarks import peers
from slimgemm.benchmarks.harness import Missing, Wrong
from slimgemm.benchmarks.peers import Compiled, Cusparselt, Peers
from slimgemm.kernels.reference import prune_dense_24_ref
from slimgemm.kernels.timing import Times

X, W = randn(4, 128), random_24(128, 128, seed=1)


def test_compiled_compiles_once_for_all_input_sets(monkeypatch):
    asked = []

    def compile_(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    fast = Compiled(torch.matmul, Peers())
    assert torch.equal(fast(X, W)(), X @ W)
    assert torch.equal(fast(2 * X, W)(), 2 * X @ W)
    assert asked == [{"mode": "max-autotune-no-cudagraphs", "dynamic": False}]


def test_compiled_can_be_left_out():
    with pytest.raises(Missing, match="left out by --no-compiled"):
        Compiled(torch.matmul, Peers(compiled=False))(X, W)


@pytest.mark.slow
def test_compiled_by_the_real_compiler():
    assert torch.allclose(Compiled(torch.matmul, Peers())(X, W)(), X @ W)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda: Cusparselt()(X, W), "cuSPARSELt needs a GPU"),
        (lambda: peers.cutlass_linear(X, W), "CUTLASS backend needs a GPU"),
        (lambda: peers.torch_pack(W, "cutlass"), "CUTLASS backend needs a GPU"),
        (lambda: peers.torch_pack(W, "cusparselt"), "cuSPARSELt needs a GPU"),
        (lambda: peers.torch_prune(W, "cutlass"), "prune and pack needs a GPU"),
    ],
)
def test_without_a_gpu_they_say_so(prepare, text):
    with pytest.raises(Missing, match=text):
        prepare()


def on_a_gpu(monkeypatch, capability="9.0"):
    monkeypatch.setattr(peers, "need_gpu", lambda t, what: None)
    monkeypatch.setattr(peers, "capability", lambda device: capability)


def test_cutlass_is_for_ampere_alone(monkeypatch):
    on_a_gpu(monkeypatch)
    with pytest.raises(Missing, match=r"8\.x, this is 9\.0"):
        peers.cutlass_linear(X, W)
    on_a_gpu(monkeypatch, "8.6")
    peers.check_cutlass(W)


@pytest.mark.parametrize(
    ("w", "text"),
    [(W, "fp16 and bf16 only"), (W[:100].half(), "whole tiles"), (W[:, :64].half(), "whole tiles")],
)
def test_what_torch_does_not_prune(monkeypatch, w, text):
    on_a_gpu(monkeypatch)
    with pytest.raises(Missing, match=text):
        peers.torch_prune(w, "cusparselt")


def slow_but(best):
    """A timer by which the call named `best` is the fastest."""
    return lambda calls, rounds: {n: Times(*[1.0 if n == str(best) else 2.0] * 3) for n in calls}


def test_the_fastest_algorithm_that_runs_is_taken():
    def broken():
        raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")

    calls = [(0, lambda: 0), (1, broken), (2, lambda: 0)]
    assert peers.fastest(calls, slow_but(2)) == (2, 2)
    with pytest.raises(Missing, match="no algorithm of cuSPARSELt ran: CUSPARSE_STATUS_NOT"):
        peers.fastest([(1, broken)], slow_but(1))


def test_algorithms_are_timed_one_by_one_and_the_best_again_in_turn():
    asked = []
    first = {str(n): 100.0 - n for n in range(10)}  # the last ones look best ...
    last = {**first, "5": 1.0}  # ... but of the finalists, this one is

    def timer(calls, rounds):
        asked.append((sorted(calls), rounds))
        us = first if len(calls) == 1 else last
        return {name: Times(us[name], us[name], us[name]) for name in calls}

    assert peers.fastest([(n, lambda: 0) for n in range(10)], timer) == (5, 10)
    assert asked[:10] == [([str(n)], peers.FIRST_ROUNDS) for n in range(10)]
    assert asked[10:] == [(["4", "5", "6", "7", "8", "9"], peers.LAST_ROUNDS)]


def test_algorithms_are_timed_as_graphs_and_eager_only_where_there_is_none(monkeypatch):
    asked = []

    def time_us(calls, device, *, graph=False, rounds, warmup):
        asked.append(graph)
        if graph and "stubborn" in calls:
            raise RuntimeError("operation not permitted when stream is capturing")
        return dict.fromkeys(calls, Times(1.0, 1.0, 1.0))

    monkeypatch.setattr(peers, "time_us", time_us)
    timer = peers.search_timer(torch.device("cuda"))
    assert timer({"0": print}, 2) and asked == [True]
    assert timer({"stubborn": print}, 2) and asked == [True, True, False]


def test_cusparselt_searches_once_and_says_what_it_took(monkeypatch):
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "get_max_alg_id", lambda: 4)
    packed = []

    def pack(w, alg_id):
        packed.append(w.clone())
        return packed[-1]

    monkeypatch.setattr(peers, "_cusparselt", pack)
    lt = Cusparselt(slow_but(3))
    x = X[:3]
    got = lt(x, W)()
    # Rows of zeros up to what cuSPARSELt multiplies without a copy.
    assert got.shape == (8, 128)
    assert torch.allclose(got[:3], torch.nn.functional.linear(x, W), atol=1e-5)
    lt.timer = None  # a second search would fail without a GPU
    lt(x, W)
    assert [weight.alg_id_cusparselt for weight in packed] == [3, 3]  # one for each input set
    assert lt.note() == "alg_id 3, fastest of 5, x with 5 more rows before it is timed"


def test_all_ids_are_tried_where_torch_does_not_know_them(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "get_max_alg_id", lambda: None)
    assert peers.algorithms() == range(peers.ALGORITHMS)


def test_another_pruner_is_held_to_two_of_four_of_the_same_weights():
    w = randn(8, 16)
    assert peers.check_pruned(w, prune_dense_24_ref(w)) == (0.0, 0.0)
    error, allowed = peers.check_pruned(w, prune_dense_24_ref(w) * 1.01)
    assert error > allowed
    for bad, text in ((w, "more than two"), (torch.zeros_like(w), "are kept"), (w[1:], "must be")):
        with pytest.raises(Wrong, match=text):
            peers.check_pruned(w, bad)
