import os
import random
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from slimgemm import pruning
from slimgemm.kernels.timing import Times
from slimgemm.pruning import Channels, NofM, count_macs, profile, search_report
from slimgemm.pruning import search as search_module
from slimgemm.pruning.amc import AMC
from slimgemm.pruning.geometry import ModelLatency
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.netadapt import NetAdapt
from slimgemm.pruning.pareto import Pareto
from slimgemm.pruning.search import Search
from slimgemm.pruning.space import Allocation, Choices, Space
from slimgemm.pruning.task import Infeasible

METHODS = {
    "netadapt": NetAdapt(step=0.2),
    "pareto": Pareto(trials=14, population=6),
    "amc": AMC(explore=4, exploit=4),
}


@pytest.fixture
def searching(blobs):
    def make(**options):
        defaults = {
            "method": METHODS["netadapt"], "patterns": (Channels(multiple_of=4),),
            "finetune": blobs.tune, "short": 3, "long": 20, "show": False,
        }  # fmt: skip
        return Search(options.pop("evaluate", blobs.accuracy), **(defaults | options))

    return make


@pytest.fixture
def dense_macs(blobs):
    return count_macs(blobs.model, blobs.example).macs


@pytest.mark.parametrize("method", METHODS)
def test_limits_hold_for_the_finished_model_as_counted(searching, blobs, dense_macs, method):
    if method == "pareto":
        pytest.importorskip("optuna")
    before = {k: v.clone() for k, v in blobs.model.state_dict().items()}
    limit = 0.5 * dense_macs
    patterns = (Channels(multiple_of=4), NofM(2, 4))
    found = searching(max_macs=limit, method=METHODS[method], patterns=patterns).run(
        blobs.model, blobs.example
    )
    assert found.measured.macs <= limit
    counted, masks = count_macs(found.model, blobs.example), found.allocation.patterns
    assert found.measured.macs == sum(
        c.macs * (0.5 if n in masks else 1) for n, c in counted.layers.items()
    )
    assert found.predicted.macs == found.measured.macs
    assert found.value == blobs.accuracy(found.model.eval())
    assert found.drop == found.dense_value - found.value < 15
    assert all(torch.equal(v, before[k]) for k, v in blobs.model.state_dict().items())
    assert any(record.get("kind") == "candidate" for record in found.records)


@pytest.mark.parametrize("name", ["params", "bytes", "energy_mj"])
def test_every_cost_can_be_limited(searching, blobs, name):
    dense = Space(blobs.model, blobs.example, Choices()).costs(Allocation())
    limit = 0.6 * dense.get(name)
    found = searching(**{f"max_{name}": limit}).run(blobs.model, blobs.example)
    assert found.measured.get(name) <= limit
    if name == "params":
        assert found.measured.params == sum(p.numel() for p in found.model.parameters())


def test_max_drop_alone_makes_the_cost_fall(searching, blobs, dense_macs):
    found = searching(max_drop=3.0).run(blobs.model, blobs.example)
    assert found.drop <= 3.0 and found.measured.macs < 0.9 * dense_macs


def test_infeasible_limits_name_the_best_that_can_be_reached(searching, blobs, dense_macs):
    with pytest.raises(Infeasible, match=r"max_macs=10 cannot be reached: .* at its floor") as cost:
        searching(max_macs=10).run(blobs.model, blobs.example)
    floor = 4 * (16 * 4 + 4 * 4 + 4 * 4)
    assert cost.value.best == {"macs": floor} and str(floor) in str(cost.value)
    cure = r"A larger max_drop or more training may help, now short=3 and long=20 steps"
    with pytest.raises(Infeasible, match=rf"cannot be met; the finished model has .* of .*{cure}"):
        searching(max_macs=floor, max_drop=0.5).run(blobs.model, blobs.example)


def test_a_dense_model_within_the_limits_stays(searching, blobs, dense_macs):
    found = searching(max_macs=2 * dense_macs, long=0, short=0).run(blobs.model, blobs.example)
    assert found.measured.macs == dense_macs and not found.allocation.channels


def test_a_forward_that_is_not_deterministic_is_reported(searching, blobs, dense_macs):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = blobs.model

        def forward(self, x):
            return self.body(x + 1e-6 * torch.rand_like(x))

    search = searching(max_macs=0.9 * dense_macs, short=0, long=0)
    assert not search.run(blobs.model, blobs.example).notes
    (note,) = search.run(Noisy(), blobs.example).notes
    assert "not deterministic: two equal forwards differ by up to" in note


def same(a, b):
    assert a.as_dict() == b.as_dict()
    mine, theirs = a.model.state_dict(), b.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())


@pytest.fixture
def one_thread():
    """A fork does not have the threads of its parent, and OpenMP waits for them for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_it_resumes_to_the_same_end(
    searching, blobs, dense_macs, tmp_path, method, one_thread
):
    if method == "pareto":
        pytest.importorskip("optuna")
    options = {
        "max_macs": 0.5 * dense_macs, "method": METHODS[method],
        "patterns": (Channels(multiple_of=4), NofM(2, 4)),
    }  # fmt: skip
    whole = searching(**options).run(blobs.model, blobs.example)
    luck, left = random.Random(7), [10**9]

    def evaluate(model):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return blobs.accuracy(model)

    search = searching(**options, evaluate=evaluate, folder=tmp_path)
    killed = 0
    for _ in range(3):
        left[0] = luck.randrange(1, 8)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a fork that hangs is killed too
            try:
                search.run(blobs.model, blobs.example)
            finally:
                os._exit(0)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert (tmp_path / search_module.JOURNAL).stat().st_size > 0  # it had begun
    left[0] = 10**9
    assert killed >= 2
    same(search.run(blobs.model, blobs.example), whole)


@pytest.mark.parametrize("where", ["evaluate", "tune", "snapshot", "journal"])
def test_stopped_at_any_call_it_resumes_to_the_same_end(
    searching, blobs, dense_macs, tmp_path, monkeypatch, where
):
    class Stop(BaseException):
        pass

    luck, left = random.Random(where), [10**9]

    def stopping(function):
        def wrapped(*args):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            return function(*args)

        return wrapped

    options = {"max_macs": 0.6 * dense_macs}
    whole = searching(**options).run(blobs.model, blobs.example)
    changed = {}
    if where == "evaluate":
        changed["evaluate"] = stopping(blobs.accuracy)
    elif where == "tune":
        changed["finetune"] = stopping(blobs.tune)
    elif where == "snapshot":
        from slimgemm.pruning import netadapt

        monkeypatch.setattr(netadapt, "save_snapshot", stopping(netadapt.save_snapshot))
    else:
        journal = search_module.Journal
        monkeypatch.setattr(journal, "_write", stopping(journal._write))
    search = searching(**options, **changed, folder=tmp_path)
    for _ in range(2):
        left[0] = luck.randrange(1, 6)
        with pytest.raises(Stop):
            search.run(blobs.model, blobs.example)
            raise Stop  # it may have had too little left to do
    left[0] = 10**9
    same(search.run(blobs.model, blobs.example), whole)


def test_a_folder_of_another_search_is_refused(searching, blobs, dense_macs, tmp_path):
    searching(max_macs=0.8 * dense_macs, folder=tmp_path).run(blobs.model, blobs.example)
    with pytest.raises(ValueError, match="is of another run"):
        searching(max_macs=0.7 * dense_macs, folder=tmp_path).run(blobs.model, blobs.example)


def test_a_folder_with_another_tag_is_of_another_search(searching, blobs, dense_macs, tmp_path):
    options = {"max_macs": 0.8 * dense_macs, "folder": tmp_path}
    search = searching(**options, tag="rate 1e-3")
    search.run(blobs.model, blobs.example)
    assert search.key(blobs.model, blobs.example) in (tmp_path / "candidates.jsonl").read_text()
    with pytest.raises(ValueError, match="is of another run"):
        searching(**options, tag="rate 1e-2").run(blobs.model, blobs.example)


def test_a_missing_library_is_named_before_anything_runs(searching, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for method in ("pareto", Pareto(trials=3)):
        with pytest.raises(ValueError, match="method pareto needs optuna; pip install"):
            searching(max_macs=1, method=method)


def known_latency(space, table, **options):
    """A layer takes in * out / 10 us, packed a third; nothing beside layers takes time."""
    for site, pattern, (out, into) in profile.wanted_times(space):
        rows = table.times.setdefault(site.signature, {}).setdefault(pattern, {})
        if (out, into) not in rows:
            share = 1 if pattern == "dense" else 1 / 3
            rows[out, into] = Times(*[out * into / 10 * share] * 3)
    table.save()
    return ModelLatency(table)


def timed(model):
    return sum(
        float(m.weight.count_nonzero())
        / (10 if m.weight.count_nonzero() == m.weight.numel() else 15)
        for m in model.modules()
        if isinstance(m, nn.Linear)
    )


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Times of whole models, `slower` times what layers add up to."""

    def install(slower, paces=()):
        turns = iter(paces)

        def forward_times(models, example_inputs, table):
            pace = next(turns, 1.0)
            return {n: Times(*[timed(m) * slower * pace] * 3) for n, m in models.items()}

        def layer_times(models, example_inputs, names, table):
            return {n: {name: Times(*[1.0] * 3) for name in names} for n in models}

        monkeypatch.setattr(search_module, "measure_latency", known_latency)
        monkeypatch.setattr(search_module, "forward_times", forward_times)
        monkeypatch.setattr(search_report, "layer_times", layer_times)
        return LatencyTable(path=tmp_path / "table.json", twin=lambda layer, *pattern: layer)

    return install


def test_the_latency_limit_holds_as_measured(searching, blobs, clock):
    table = clock(1.3)  # the finished model is slower than predicted
    limit = 0.5 * 1.3 * timed(blobs.model) / 1e3
    found = searching(max_latency_ms=limit, latency=table).run(blobs.model, blobs.example)
    assert found.measured.latency_ms <= limit
    assert found.measured.latency_ms == pytest.approx(1.3 * timed(found.model) / 1e3)
    finished = [r for r in found.records if r["kind"] == "finished"]
    assert len(finished) > 1 and finished[0]["costs"]["latency_ms"] > limit
    assert set(found.times) == {"dense", "finished"}


def test_a_slower_machine_moves_no_limit(searching, blobs, clock, monkeypatch):
    table = clock(1.0, paces=[1.5])  # what else runs makes everything slower after the table
    whole = timed(blobs.model)
    monkeypatch.setattr(
        search_module,
        "measure_latency",
        lambda space, table, **options: replace(known_latency(space, table), dense_us=whole),
    )
    search = searching(max_latency_ms=0.5 * whole / 1e3, latency=table)
    found = search.run(blobs.model, blobs.example)
    assert [r["kind"] for r in found.records].count("finished") == 1  # not tightened
    assert found.measured.latency_ms == pytest.approx(timed(found.model) / 1e3)
    assert found.times["dense"].p50 == pytest.approx(1.5 * whole)
    ms = found.measured.latency_ms
    note = f"timed; latencies are as of then: {ms:.6g} ms, read {1.5 * ms:.6g}"
    assert [n for n in found.notes if "takes 1.50 times what" in n and n.endswith(note)]


def test_limits_that_the_dense_model_meets_are_told(searching, blobs):
    macs = count_macs(blobs.model, blobs.example).macs
    found = searching(max_macs=macs).run(blobs.model, blobs.example)
    assert found.allocation == Allocation() and found.measured.macs == macs
    assert found.notes == (f"Nothing was pruned: the dense model is within {macs:g} MACs",)


def test_the_pace_is_told_once_and_of_the_result(searching, blobs, clock, monkeypatch):
    whole = timed(blobs.model)
    table = clock(1.0, paces=[1.5, 2.0])  # a second model is finished, at another pace
    monkeypatch.setattr(
        search_module,
        "measure_latency",
        lambda space, table, **options: replace(
            known_latency(space, table), dense_us=whole, factor=1.6
        ),
    )
    limit = 0.45 * whole / 1e3
    found = searching(max_latency_ms=limit, latency=table, evaluate=wide).run(
        blobs.model, blobs.example
    )
    assert [r["kind"] for r in found.records].count("finished") == 2
    pace = found.times["dense"].p50 / whole
    (note,) = [n for n in found.notes if "when its layers were timed" in n]
    assert f"takes {pace:.2f} times" in note


def test_what_was_predicted_too_dear_may_use_what_the_limit_allows(searching, blobs, clock):
    table = clock(0.6)  # the finished model is faster than predicted
    limit = 0.45 * timed(blobs.model) / 1e3  # of 0.6 that the dense model takes
    found = searching(max_latency_ms=limit, latency=table, evaluate=wide).run(
        blobs.model, blobs.example
    )
    first, second = (r for r in found.records if r["kind"] == "finished")
    assert first["costs"]["latency_ms"] < 0.65 * limit < second["costs"]["latency_ms"] <= limit
    assert found.value == second["value"] > first["value"]
    assert found.measured.latency_ms == pytest.approx(0.6 * timed(found.model) / 1e3)
    # where the wider one is no better, or does not hold, the first stays
    narrow = searching(max_latency_ms=limit, latency=table, evaluate=lambda m: -wide(m))
    found = narrow.run(blobs.model, blobs.example)
    first, second = (r for r in found.records if r["kind"] == "finished")
    assert found.value == first["value"] > second["value"]


def wide(model):
    return float(sum(p.numel() for p in model.parameters()))


def test_24_is_chosen_only_where_the_packed_layer_wins(searching, blobs, clock):
    table = clock(1.0)
    both = (Channels(multiple_of=16), NofM(2, 4))
    whole = timed(blobs.model) / 1e3
    # below what channels alone can reach
    chosen = searching(max_latency_ms=0.45 * whole, latency=table, patterns=both)
    assert chosen.run(blobs.model, blobs.example).allocation.patterns
    for patterns in table.times.values():
        patterns["2:4"] = {width: Times(*[1e6] * 3) for width in patterns["dense"]}
    with pytest.raises(Infeasible, match="at its floor"):
        chosen.run(blobs.model, blobs.example)
    slow = searching(max_latency_ms=0.6 * whole, latency=table, patterns=both)
    found = slow.run(blobs.model, blobs.example)
    assert not found.allocation.patterns and found.measured.latency_ms <= 0.6 * whole


def test_measured_energy_is_what_the_limit_is_of(searching, blobs):
    def joules(model):
        return 2.0 * sum(p.numel() for p in model.parameters())

    limit = 0.5 * joules(blobs.model)
    found = searching(max_energy_mj=limit, joules=joules).run(blobs.model, blobs.example)
    assert found.measured.energy_mj == joules(found.model) <= limit
    assert found.dense.energy_mj == pytest.approx(joules(blobs.model))


def test_as_an_amount_it_gives_the_allocation(searching, blobs, dense_macs):
    search = searching(max_macs=0.5 * dense_macs, short=0, long=0)
    plan = pruning.plan(
        blobs.model, blobs.example, pattern=Channels(multiple_of=4),
        score=pruning.Magnitude(p=2), amount=search,
    )  # fmt: skip
    kept = search.run(blobs.model, blobs.example).allocation.channels
    assert kept and all(plan[name].kept_shape[0] == units for name, units in kept.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_dense_metric_that_is_not_finite_is_refused(searching, blobs, tmp_path, value):
    def f1_score(model):
        return value

    search = searching(evaluate=f1_score, max_macs=100, folder=tmp_path)
    with pytest.raises(ValueError, match=f"metric f1_score of the dense model is {value}, .* look"):
        search.run(blobs.model, blobs.example)
    # Nothing of it is kept: with the metric repaired the same folder goes on.
    assert "dense" not in (tmp_path / "candidates.jsonl").read_text()


def test_what_the_metric_raises_says_which_candidate_it_was(searching, blobs, dense_macs):
    def metric(model):
        if model[0].out_features < 32:
            raise KeyError("x")
        return blobs.accuracy(model)

    with pytest.raises(KeyError, match="x") as error:
        searching(evaluate=metric, max_macs=0.8 * dense_macs).run(blobs.model, blobs.example)
    assert error.value.__notes__ == ["while trying step 0 0"]
    with pytest.raises(KeyError) as error:
        searching(evaluate=lambda model: {}[0], max_macs=100).run(blobs.model, blobs.example)
    assert error.value.__notes__ == ["while trying dense"]


def test_a_metric_that_is_no_number_is_refused(searching, blobs):
    def both(model):
        return 1.0, 2.0

    with pytest.raises(ValueError, match="metric both gave a tuple, it must give one number"):
        searching(evaluate=both, max_macs=100).run(blobs.model, blobs.example)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("higher", [True, False], ids=["higher", "lower"])
def test_a_candidate_whose_metric_is_not_finite_loses(
    searching, blobs, dense_macs, method, higher, tmp_path
):
    if method == "pareto":
        pytest.importorskip("optuna")
    sign = 1 if higher else -1

    def bad(model):
        return model[0].weight.shape[0] in (4, 16, 24, 28)

    def metric(model):  # what a wrong comparison would take for the best of all
        return sign * (float("inf") if bad(model) else blobs.accuracy(model))

    said = []
    found = searching(
        evaluate=metric, max_macs=0.8 * dense_macs, method=METHODS[method], say=said.append,
        patterns=(Channels(multiple_of=4), NofM(2, 4)), higher_is_better=higher, folder=tmp_path,
    ).run(blobs.model, blobs.example)  # fmt: skip
    assert not bad(found.model) and found.measured.macs <= 0.8 * dense_macs
    lost = [record for record in found.records if "lost" in record]
    assert lost and all(record["lost"].startswith("the metric metric is ") for record in lost)
    assert f"{len(lost)} candidates lost: their metric is not finite" in found.notes
    assert sum(", lost" in line for line in said) == len(lost) < len(said)
    assert said[-1].startswith("finished 0: ") and max(map(len, said)) < 130
    found.draw(tmp_path / "front.png")


def test_where_every_candidate_loses_it_says_so(searching, blobs, dense_macs):
    def metric(model):
        return float("nan") if count_macs(model, blobs.example).macs < dense_macs else 50.0

    with pytest.raises(Infeasible, match=r"NetAdapt cannot meet .*candidates lost: their metric"):
        searching(evaluate=metric, max_macs=0.8 * dense_macs).run(blobs.model, blobs.example)


def test_patterns_that_no_format_packs_are_refused(searching, blobs):
    with pytest.raises(ValueError, match=r"no format packs 3:7, .* channels and 2:4, 1:4, 1:8"):
        searching(max_macs=1, patterns=(NofM(3, 7),))
    amount = searching(max_macs=1)
    with pytest.raises(ValueError, match="no format packs 1:2"):
        pruning.plan(blobs.model, blobs.example, pattern=NofM(1, 2), amount=amount)


def test_refusals(searching, blobs):
    with pytest.raises(ValueError, match="short must be a whole number of at least 0, got -1"):
        searching(max_macs=1, short=-1)
    with pytest.raises(ValueError, match=r"long must be a whole number of at least 0, got 1\.5"):
        searching(max_macs=1, long=1.5)
    with pytest.raises(ValueError, match="method must be one of netadapt, pareto, amc, got 'x'"):
        searching(max_macs=1, method="x")
    with pytest.raises(ValueError, match="a search needs a limit"):
        searching()
    with pytest.raises(ValueError, match="max_macs must be positive, got -1"):
        searching(max_macs=-1)
    with pytest.raises(ValueError, match="max_drop must be 0 or more"):
        searching(max_drop=-1.0)
    with pytest.raises(ValueError, match="minimise must be one of macs, params"):
        searching(max_drop=1.0, minimise="time")
    with pytest.raises(ValueError, match="steps of finetune=, which is missing"):
        searching(max_macs=1, finetune=None)
    with pytest.raises(ValueError, match="energy must be one of"):
        searching(max_macs=1, energy="x")
    with pytest.raises(ValueError, match=r"pass it to plan\(amount=\)"):
        searching(max_macs=1).drops([])
