"""Which function runs an op, and which implementation spmm_24 is dispatched to."""

import inspect
import timeit

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24
from tune_fakes import HEAD, Fake, table_of

from slimgemm import kernels
from slimgemm.kernels import dispatch, implementations, spmm_24_dense, tune_table
from slimgemm.kernels.reference import pack_24_ref, spmm_24_ref
from slimgemm.kernels.tune_table import Choice


@pytest.fixture
def untuned_gpu(monkeypatch):
    """Device 0 is current, and no table is for it."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "plans", lambda device: None)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_has_a_launcher_and_a_twin_with_its_arguments_first(op):
    launcher, twin = dispatch.launcher(op), dispatch.twin(op)
    assert launcher.__name__ == op and twin.__name__ == f"{op}_ref"
    assert launcher.__module__ == f"slimgemm.kernels.{dispatch.OPS[op][0]}"
    names = inspect.signature
    theirs = list(names(twin).parameters)
    assert list(names(launcher).parameters)[: len(theirs)] == theirs


def test_a_cpu_gets_the_twin_and_a_gpu_the_launcher(untuned_gpu):
    assert dispatch.implementation("spmm_24", torch.device("cpu")) is dispatch.twin("spmm_24")
    for name in ("cuda", "cuda:0"):
        run = dispatch.implementation("spmm_24", torch.device(name))
        assert run is dispatch.launcher("spmm_24")


def test_another_gpu_is_made_current_for_the_launch(untuned_gpu, monkeypatch):
    entered = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(dispatch, "launcher", lambda op: lambda *args: (op, list(entered), args))
    run = dispatch.implementation("spmm_24", torch.device("cuda:1"))
    assert run(1, 2) == ("spmm_24", [torch.device("cuda:1")], (1, 2))
    assert entered[-1] == "left"


N, K = 64, 32
PACKED = pack_24_ref(random_24(N, K, torch.bfloat16))
FASTEST_FIRST = {"wgmma_sp": 1.0, "mma_sp": 2.0, "dense": 3.0}


def plans_of(times, row=(N, K, 8), **candidates):
    """Plans of one row, with Fakes for all implementations but those given; and the Fakes."""
    fakes = {name: Fake() for name in implementations.IMPLEMENTATIONS} | candidates
    return dispatch.Plans(table_of((*row, times)), fakes), fakes


def x_of(m, k=K, dtype=torch.bfloat16):
    return randn(m, k, dtype=dtype)


def ran(fakes):
    return [name for name, fake in fakes.items() if fake.calls]


@pytest.fixture
def portable(monkeypatch):
    """The portable launcher is a Fake."""
    fake = Fake()
    monkeypatch.setattr(dispatch, "launcher", lambda op: fake.bind(None, None))
    return fake


def test_the_fastest_that_takes_the_operands_runs(portable):
    plans, fakes = plans_of(FASTEST_FIRST, wgmma_sp=Fake(takes=False))
    x, bias, scale = x_of(3), randn(N, seed=1), randn(N, seed=2)
    y = plans.spmm_24(x, PACKED, bias, scale, "relu")
    assert torch.equal(y, spmm_24_ref(x, PACKED, bias, scale, "relu"))
    assert ran(fakes) == ["mma_sp"] and not portable.calls
    assert fakes["wgmma_sp"].asked == 1 and fakes["dense"].asked == 0


def test_when_none_takes_them_the_portable_one_runs(portable):
    plans, fakes = plans_of({"mma_sp": 1.0}, mma_sp=Fake(takes=False))
    plans.spmm_24(x_of(3), PACKED)
    assert portable.calls == 1 and ran(fakes) == []


def test_a_measured_portable_tile_is_used(portable):
    plans, fakes = plans_of({Choice("portable", (("m", 16), ("n", 32)), 4): 1.0})
    plans.spmm_24(x_of(3), PACKED)
    assert fakes["portable"].bound == [((("m", 16), ("n", 32)), 4)] and not portable.calls


@pytest.mark.parametrize("kind", ["another shape", "fp16", "1:4", "no rows", "no columns"])
def test_what_the_table_does_not_cover_runs_on_the_portable_one(portable, kind):
    plans, fakes = plans_of(FASTEST_FIRST)
    x, w = x_of(3), PACKED
    if kind == "another shape":
        x, w = x_of(3, 256), pack_24_ref(random_24(N, 256, torch.bfloat16))
    elif kind == "fp16":
        x, w = x.half(), w._replace(values=w.values.half())
    elif kind == "1:4":
        w = pack_24_ref(random_24(N, K, torch.bfloat16, keep=1), keep=1)
    elif kind == "no rows":
        x = x_of(0)
    elif kind == "no columns":
        x, w = x_of(3, 0), pack_24_ref(torch.zeros(N, 0, dtype=torch.bfloat16))
    plans.spmm_24(x, w)
    assert portable.calls == 1 and ran(fakes) == []


def test_what_was_decided_is_kept_by_kind_of_operand_and_bounded(monkeypatch):
    plans, fakes = plans_of(FASTEST_FIRST)
    wgmma = fakes["wgmma_sp"]
    for m in (5, 6, 8, 7):  # one bucket
        plans.spmm_24(x_of(m), PACKED)
    assert wgmma.asked == 1 and wgmma.calls == 4
    plans.spmm_24(x_of(4), PACKED)
    assert wgmma.asked == 2
    for _ in range(2):  # 2 bytes off: another kind
        plans.spmm_24(
            torch.cat([x_of(1).flatten(), x_of(1).flatten()])[1 : K + 1].view(1, K), PACKED
        )
        assert wgmma.asked == 3
    monkeypatch.setattr(dispatch, "MOST_PLANS", 3)
    plans.spmm_24(x_of(16), PACKED)
    assert len(plans.kept) == 1


def test_strides_are_asked_about_on_every_call():
    folds = Fake(takes=lambda x, w: x.stride(0) == 2 * K)
    plans, fakes = plans_of({"mma_sp": 1.0, "dense": 2.0}, mma_sp=folds)
    plans.spmm_24(x_of(3, 2 * K)[:, :K], PACKED)
    assert ran(fakes) == ["mma_sp"] and not plans.kept
    plans.spmm_24(x_of(3, 3 * K)[:, :K], PACKED)
    assert ran(fakes) == ["mma_sp", "dense"] and folds.calls == 1


@pytest.mark.parametrize("kind", ["aligned", "x", "values", "meta", "strides", "K of the row"])
def test_a_measured_tile_serves_only_operands_that_lie_as_they_did(kind):
    tile = (("mt", 2),)
    row = (N, 20, 8) if kind == "K of the row" else (N, K, 8)
    plans, fakes = plans_of({Choice("mma_sp", tile, 4): 1.0}, row=row)

    def shifted(t):
        moved = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:]
        return moved.view_as(t).copy_(t)

    x, w = x_of(4), PACKED
    x = shifted(x) if kind == "x" else x_of(4, 2 * K)[:, :K] if kind == "strides" else x
    w = w._replace(**{kind: shifted(getattr(w, kind))}) if kind in ("values", "meta") else w
    y = plans.spmm_24(x, w)
    assert torch.equal(y, spmm_24_ref(x, w))
    assert fakes["mma_sp"].bound == [(tile, 4) if kind == "aligned" else (None, None)]


def test_operands_that_do_not_fit_are_refused():
    plans, _ = plans_of(FASTEST_FIRST)
    with pytest.raises(ValueError, match=r"x must be \[..., 32\] for a \[64, 32\] weight"):
        plans.spmm_24(x_of(4, 64), PACKED)
    with pytest.raises(ValueError, match=r"x must be torch.bfloat16 on cpu as the weight"):
        plans.spmm_24(x_of(4).half(), PACKED)


def test_a_gpu_with_a_table_dispatches_and_reload_reads_it_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: HEAD["gpu"])
    monkeypatch.setattr(tune_table, "here", lambda device: HEAD)
    gpu = torch.device("cuda", 0)
    dispatch.reload()
    try:
        assert dispatch.implementation("spmm_24", gpu) is dispatch.launcher("spmm_24")
        assert "slimgemm tune` was not run on this GPU (NVIDIA Test 9000)" in dispatch.untuned(gpu)
        tune_table.save(table_of((N, K, 8, FASTEST_FIRST)), tune_table.user_path(HEAD))
        assert dispatch.untuned(gpu)  # until it is told
        dispatch.reload()
        run = dispatch.implementation("spmm_24", gpu)
        assert run == dispatch.plans(0).spmm_24 and dispatch.untuned(gpu) == ""
        for op in ("spmm_24_dgrad", "unpack_24"):
            assert dispatch.implementation(op, gpu) is dispatch.launcher(op)
        tune_table.user_path(HEAD).write_text("[")
        dispatch.reload()
        with pytest.raises(ValueError, match="is no table of measured times"):
            dispatch.implementation("spmm_24", gpu)
    finally:
        dispatch.reload()
    assert dispatch.untuned(torch.device("cpu")) == ""


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("act", ["none", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dense_is_right(monkeypatch, dtype, act, scaled):
    unpack = dispatch.twin("unpack_24")
    monkeypatch.setattr(spmm_24_dense, "unpack_24", unpack)
    x, dense = randn(2, 3, 40, dtype=dtype), random_24(24, 40, dtype)
    bias, scale = randn(24, seed=1), randn(24, seed=2) if scaled else None
    got = spmm_24_dense.spmm_24_dense(x, pack_24_ref(dense), bias, scale, act)
    wide = pack_24_ref(dense.double())
    exact = spmm_24_ref(x.double(), wide, bias.double(), scale.double() if scaled else None, act)
    assert_no_worse_than_dense(
        got, spmm_24_ref(x, pack_24_ref(dense), bias, scale, act), exact, "dense"
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = spmm_24_dense.spmm_24_dense(x, pack_24_ref(dense), bias, scale, act)
    assert torch.equal(cast, got)


def test_implementations_are_bound_with_tiles_of_their_own():
    portable = implementations.IMPLEMENTATIONS["portable"]
    tile = (("m", 16), ("n", 32), ("k", 64), ("warps", 4), ("stages", 2))
    bound = portable.bind(tile, 2)
    assert bound.func is dispatch.launcher("spmm_24")
    assert bound.keywords == {"tile": kernels.configs.Tile(16, 32, 64, 4, 2), "split": 2}
    assert portable.bind(None, None) is dispatch.launcher("spmm_24")
    with pytest.raises(ValueError, match=r"is no Tile: .*unexpected keyword argument 'mt'"):
        portable.bind((("mt", 1),), None)
    dense = implementations.IMPLEMENTATIONS["dense"]
    with pytest.raises(ValueError, match=r"spmm_24_dense has no tiles, got {'m': 16}"):
        dense.bind((("m", 16),), None)
    with pytest.raises(ValueError, match="spmm_24_dense has no splits, got 2"):
        dense.bind(None, 2)


@pytest.mark.parametrize("name", implementations.IMPLEMENTATIONS)
def test_what_a_table_names_exists_with_the_arguments_of_spmm_24(name):
    found = implementations.IMPLEMENTATIONS[name]
    pytest.importorskip(f"slimgemm.kernels.{found.file}")
    run = found.bind(None, None)
    parameters = list(inspect.signature(run).parameters)
    assert parameters[2:5] == ["bias", "scale", "act"]
    assert bool(found.tile) == ("tile" in parameters)
    assert (found.splits in parameters) == bool(found.splits)
    assert not found.picky or found.takes(x_of(4), PACKED) is False  # no GPU holds them


def host_us(call, number=2000):
    """Microseconds of one call, the best of ten stretches."""
    call()
    return min(timeit.repeat(call, number=number, repeat=10)) / number * 1e6


def test_a_decision_costs_the_host_little():
    """Generous: it is 1.2 us on one core of an EPYC, and the machine may be busy."""
    plans, _ = plans_of(FASTEST_FIRST)
    nothing = type("Nothing", (Fake,), {"bind": lambda self, tile, splits: lambda *args: None})
    plans.candidates = {"wgmma_sp": nothing()}
    x = x_of(8)
    us = host_us(lambda: plans.spmm_24(x, PACKED))
    assert us < 20, f"{us:.2f} us"
