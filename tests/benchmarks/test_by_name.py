"""Rows by name: each implementation runs with its best measured tile, or says why it does not."""

import pytest
import torch
from helpers import randn, random_24

from slimgemm import kernels
from slimgemm.benchmarks import bench_spmm_24, by_name
from slimgemm.benchmarks.bench_conv import conv2d_24
from slimgemm.benchmarks.by_name import Dispatched, Named, Operands, candidates, named
from slimgemm.benchmarks.harness import Missing
from slimgemm.benchmarks.peers import Peers
from slimgemm.benchmarks.shapes import Conv
from slimgemm.kernels.tune_table import Choice, Result, Row

CPU = torch.device("cpu")
X, W = randn(5, 64), random_24(32, 64, seed=1)


class Fake:
    """An implementation that notes how it was bound, and may refuse."""

    def __init__(self, takes=True, text=""):
        self.takes_it, self.text, self.bound = takes, text, []

    def takes(self, x, w, *conv):
        return self.takes_it

    def bind(self, tile, splits):
        self.bound.append((tile, splits))

        def run(x, w, *more):
            if self.text:
                raise ValueError(self.text)
            return kernels.spmm_24(x, w, *more)

        return run


def operands(given):
    return Operands(given[0], kernels.pack_24(given[1]), given[0].shape[0])


def with_(monkeypatch, ranked=(), **fakes):
    """A GPU on which these implementations are all there is, with this measured row."""
    results = tuple(Result(choice, "ok", us) for us, choice in enumerate(ranked, 1))
    row = Row("spmm_24", "fp32", 32, 64, 8, results) if ranked else None
    monkeypatch.setattr(by_name, "measured", lambda of: row)
    monkeypatch.setattr(by_name, "candidates", lambda convolution: fakes)
    monkeypatch.setattr(by_name, "need_gpu", lambda t, what: None)


def test_each_name_runs_with_the_best_tile_that_was_measured_for_it(monkeypatch):
    one, two = Fake(), Fake()
    wide = Choice("one", (("tokens", 64),), 2)
    with_(monkeypatch, [Choice("two"), wide, Choice("one", (("tokens", 8),))], one=one, two=two)
    first, second = named(operands, 1000)
    call = first.prepare((X, W))
    assert torch.equal(call(), kernels.spmm_24(X, kernels.pack_24(W)))
    assert one.bound == [((("tokens", 64),), 2)]
    assert (first.name, first.note()) == ("slimgemm one", "one tokens=64 splits=2")
    second.prepare((X, W))
    assert two.bound == [(None, None)] and second.note() == ""


def test_what_an_implementation_refuses_is_missing_with_its_own_words(monkeypatch):
    with_(monkeypatch, one=Fake(False, "k must be a multiple of 32"), two=Fake(False))
    with pytest.raises(Missing, match="k must be a multiple of 32"):
        Named("one", operands)((X, W))
    with pytest.raises(Missing, match="two does not take these operands"):
        Named("two", operands)((X, W))


def test_without_a_gpu_every_name_is_a_row_that_says_so():
    for convolution, names in ((False, by_name.IMPLEMENTATIONS), (True, by_name.CONVOLUTIONS)):
        assert set(names) <= set(candidates(convolution))
    assert "linear" in candidates(True)
    with pytest.raises(Missing, match="mma_sp needs a GPU"):
        Named("mma_sp", operands)((X, W))
    assert by_name.dispatched(operands((X, W))) == ""


def test_the_note_of_the_op_itself_says_what_it_was_dispatched_to(monkeypatch):
    fast, slow = Choice("one", (("tokens", 8),)), Choice("two")
    with_(monkeypatch, [fast, slow], one=Fake(False), two=Fake())
    ours = Dispatched(kernels.spmm_24, operands)
    assert torch.equal(ours((X, W))(), kernels.spmm_24(X, kernels.pack_24(W)))
    assert ours.note() == "dispatched to two"  # the faster one does not take them


def test_every_implementation_that_a_table_may_name_has_a_row():
    product = bench_spmm_24.Product("a", 3, 32, 64, torch.float32, CPU, Peers(compiled=False))
    names = {one.name for one in bench_spmm_24.forward(product).implementations}
    assert {f"slimgemm {name}" for name in by_name.IMPLEMENTATIONS} <= names
    assert {"slimgemm mma_sp ordered", "slimgemm wgmma_sp ordered", "slimgemm spmm_24"} <= names
    conv = conv2d_24(Conv("a", 1, 16, 16, 4, 3), torch.float32, CPU, Peers(compiled=False))
    names = {one.name for one in conv.implementations}
    assert {f"slimgemm {name}" for name in candidates(True)} <= names
