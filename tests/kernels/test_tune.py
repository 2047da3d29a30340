"""Tuning from end to end on the CPU: fake implementations, a fake clock, real checks and files."""

import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import gluon_numpy
import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24
from tune_fakes import HEAD, Fake, clock, fake_choices, fake_conv_choices, fakes, raising, tuner

from slimgemm.kernels import dispatch, tune, tune_jobs, tune_tiles
from slimgemm.kernels.gluon import mma_packed
from slimgemm.kernels.implementations import IMPLEMENTATIONS
from slimgemm.kernels.reference import pack_24_ref, spmm_24_ref
from slimgemm.kernels.tune_table import Choice, Table, choice_from_json, choice_to_json, load

BF16 = torch.bfloat16
JOBS = tune_jobs.jobs([(16, 32), (24, 32)], [BF16], [4, 1])


def run_all(path, candidates=None, todo=JOBS, head=HEAD, **more):
    options = {name: more.pop(name) for name in ("minutes", "now") if name in more}
    table = tune.resumed(path, head)
    return list(tune.tune(todo, table, path, tuner(candidates, **more), **options))


def test_every_candidate_is_checked_and_only_the_right_ones_are_timed(tmp_path):
    candidates, timed = fakes(), []

    def spying(calls):
        timed.append(list(calls))
        return clock(calls)

    done = run_all(tmp_path / "t.json", candidates, JOBS[:1], clock=spying)
    ((job, row, why),) = done
    assert job == (BF16, 16, 32, 1) and why == ""
    assert timed == [["dense", "mma_sp mt=1", "mma_sp mt=1 splits=2"]]
    assert [(str(r.choice), r.us_p50) for r in row.ranked] == [
        ("mma_sp mt=1", 5.0), ("mma_sp mt=1 splits=2", 6.0), ("dense", 9.0),
    ]  # fmt: skip
    assert all(0 <= r.error <= r.allowed for r in row.ranked)
    verdicts = {r.choice.implementation: (r.verdict, r.us_p50, r.reason) for r in row.results[3:]}
    assert verdicts["portable"] == ("failed", None, "RuntimeError: no such instruction")
    verdict, us, reason = verdicts["wgmma_sp"]
    assert (verdict, us) == ("wrong", None) and reason.endswith("act silu")
    again = tune_jobs.REPEATS
    # plain, which is right and repeated, then with bias and scale: never timed
    assert candidates["wgmma_sp"].calls == 1 + again + 1
    # two checks and one call for each input set, for both of its choices
    assert candidates["mma_sp"].calls == 2 * (2 * (1 + again) + tune_jobs.INPUT_SETS)


TURN = itertools.count()


def racing(*args):
    """Right every time, but one time in five by other roundings."""
    y = spmm_24_ref(*args)
    y[0, 0] *= 1 + (next(TURN) % 5 == 4) * 2**-7
    return y


@pytest.mark.parametrize(
    "run,reason",
    [
        (racing, "gave other bits when run again, act none"),
        (lambda *a: spmm_24_ref(*a) * float("nan"), "error nan > "),
        (lambda *a: spmm_24_ref(*a)[:-1], r"gave torch.bfloat16 \[3, 16\]"),
        (lambda *a: spmm_24_ref(*a).float(), r"gave torch.float32 \[4, 16\]"),
        (lambda *a: torch.zeros_like(spmm_24_ref(*a)), "error .* > .*, act none"),
    ],
    ids=["race", "nan", "shape", "dtype", "zeros"],
)
def test_wrong_results(tmp_path, run, reason):
    path = tmp_path / "t.json"
    ((_, row, _),) = run_all(path, {**fakes(), "dense": Fake(run)}, JOBS[1:2])
    (result,) = [r for r in row.results if r.choice.implementation == "dense"]
    assert result.verdict == "wrong" and result.us_p50 is None
    assert re.match(reason, result.reason)
    assert load(path).rows == (row,)


def test_input_sets_differ_and_repeat():
    job = JOBS[0]
    sets, again = tuner().inputs(job), tuner().inputs(job)
    assert len(sets) == tune_jobs.INPUT_SETS
    for (x, w), (x2, w2) in zip(sets, again, strict=True):
        assert torch.equal(x, x2) and torch.equal(w.values, w2.values)
        assert x.shape == (1, 32) and w.shape == (16, 32) and x.dtype == BF16
    assert not torch.equal(sets[0][1].meta, sets[1][1].meta)
    assert len(sets[0][1].meta.unique()) > 10  # random positions


def test_implementations_that_do_not_take_the_operands_are_no_candidates(tmp_path):
    candidates = {**fakes(), "mma_sp": Fake(takes=False)}
    ((_, row, _),) = run_all(tmp_path / "t.json", candidates, JOBS[:1])
    assert {r.choice.implementation for r in row.results} == {"dense", "wgmma_sp", "portable"}


def test_one_that_cannot_be_timed_is_left_out(tmp_path):
    def capturing(calls):
        if "dense" in calls:
            raise RuntimeError("operation not permitted when stream is capturing")
        return clock(calls)

    ((_, row, _),) = run_all(tmp_path / "t.json", None, JOBS[:1], clock=capturing)
    assert [r.choice.implementation for r in row.ranked] == ["mma_sp", "mma_sp"]
    (dense,) = [r for r in row.results if r.choice.implementation == "dense"]
    assert (dense.verdict, dense.us_p50) == ("failed", None) and "capturing" in dense.reason


def test_a_shape_that_does_not_fit_in_memory_is_said_and_not_written(tmp_path):
    def clock_of_a_small_gpu(calls):
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")
        return clock(calls)

    path = tmp_path / "t.json"
    done = run_all(path, None, JOBS[:1], clock=clock_of_a_small_gpu)
    assert done == [(JOBS[0], None, "OutOfMemoryError: CUDA out of memory. Tried ...")]
    assert not path.exists()


def test_finished_rows_are_kept_and_the_rest_goes_on(tmp_path):
    path, minute = tmp_path / "t.json", [0.0]

    def slow_clock(calls):
        minute[0] += 60
        return clock(calls)

    first = run_all(path, todo=JOBS, clock=slow_clock, minutes=2, now=lambda: minute[0])
    assert [job for job, _, _ in first] == JOBS[:2]
    candidates = fakes()
    second = run_all(path, candidates, JOBS)
    assert [job for job, _, _ in second] == JOBS[2:]
    assert [row.shape for row in load(path).rows] == [job.shape for job in JOBS]
    assert run_all(path) == []
    later = {**HEAD, "date": "2027-01-01", "command": "slimgemm tune --minutes 1"}
    assert run_all(path, head=later) == []


KEYS = ["gpu", "driver", "torch", "triton", "commit"]


@pytest.mark.parametrize("key", KEYS, ids="another_{}".format)
def test_rows_of_another_head_are_measured_again(tmp_path, key):
    path = tmp_path / "t.json"
    run_all(path)
    head = {**HEAD, key: "another"}
    assert len(run_all(path, todo=JOBS[:1], head=head)) == 1
    assert load(path).head == head and len(load(path).rows) == 1


def test_a_row_is_measured_again_for_choices_that_it_lacks(tmp_path):
    path = tmp_path / "t.json"
    candidates = {**fakes(), "portable": Fake(takes=False)}
    run_all(path, candidates, choices=lambda *shape: fake_choices(*shape)[1:2])
    assert [len(row.results) for row in load(path).rows] == [1] * 4
    assert run_all(path, candidates, choices=lambda *shape: fake_choices(*shape)[1:2]) == []
    assert len(run_all(path, candidates, JOBS[:2])) == 2
    rows = {row.shape: len(row.results) for row in load(path).rows}
    assert [rows[job.shape] for job in JOBS] == [4, 4, 1, 1]
    assert run_all(path, candidates, JOBS[:2]) == []


def test_time_that_ends_inside_a_row_drops_that_row(tmp_path):
    path, seconds = tmp_path / "t.json", iter(range(0, 600, 20))
    assert run_all(path, minutes=1, now=lambda: next(seconds)) == []
    assert not path.exists() and not tune.journal_path(path).exists()


def test_progress_names_each_candidate_before_it_runs(tmp_path):
    said = []
    run_all(tmp_path / "t.json", todo=JOBS[:1], progress=lambda *what: said.append(what))
    names = [str(c) for c in fake_choices(0, 0, 0, BF16)]
    assert said == [(JOBS[0], i, 5, name) for i, name in enumerate(names)]


def test_a_damaged_table_stops_tuning(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json is no table of measured times"):
        tune.resumed(path, HEAD)
    path.unlink()
    tune.journal_path(path).write_text('{"op": "spmm_24", "dtype": "bf16"}')
    with pytest.raises(ValueError, match=r"t\.json\.trying is damaged: 'implementation'; delete"):
        tune.resumed(path, HEAD)


def test_a_candidate_that_kills_the_process_is_left_out_afterwards(tmp_path):
    path = tmp_path / "t.json"
    code = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from tune_fakes import HEAD, Fake, fakes, tuner
from slimgemm.kernels import tune, tune_jobs
from slimgemm.kernels.reference import spmm_24_ref

def deadly(x, w, *epilogue):
    if len(w.values) == 24:
        os.kill(os.getpid(), signal.SIGKILL)
    return spmm_24_ref(x, w, *epilogue)

path = Path({str(path)!r})
todo = tune_jobs.jobs([(16, 32), (24, 32)], [torch.bfloat16], [4, 1])
candidates = {{**fakes(), "mma_sp": Fake(deadly)}}
list(tune.tune(todo, tune.resumed(path, HEAD), path, tuner(candidates)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(load(path).rows) == 2 and tune.journal_path(path).exists()
    candidates = {**fakes(), "mma_sp": Fake()}
    rows = [row for _, row, _ in run_all(path, candidates)]
    assert [row.shape for row in rows] == [job.shape for job in JOBS[2:]]
    dead = Choice("mma_sp", (("mt", 1),))
    assert (
        load(path).stopped == (("spmm_24", "bf16", dead),) and not tune.journal_path(path).exists()
    )
    for row in rows:
        (result,) = [r for r in row.results if r.choice == dead]
        assert (result.verdict, result.reason) == ("failed", "an earlier run ended while it ran")
        assert row.ranked[0].choice == dead._replace(splits=2)


def test_an_error_or_an_interrupt_is_no_death(tmp_path):
    path = tmp_path / "t.json"

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(path, {**fakes(), "dense": Fake(interrupted)})
    assert not tune.journal_path(path).exists()


def test_a_gpu_that_no_longer_answers_ends_the_run_and_is_remembered(tmp_path, monkeypatch):
    path = tmp_path / "t.json"

    def synchronize(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(tune.Tuner, "synchronize", synchronize)
    with pytest.raises(tune.Stopped, match=r"after dense .*illegal memory access.*run `slimgemm"):
        run_all(path, {**fakes(), "dense": Fake(raising)})
    monkeypatch.undo()
    ((_, row, _),) = run_all(path, todo=JOBS[:1])
    assert [r.reason for r in row.results if r.choice.implementation == "dense"] == [
        "an earlier run ended while it ran"
    ]


def test_one_that_hangs_is_told_of(tmp_path, monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(tune, "HANG_S", 0.05)
    hanging = Fake(lambda *a: (told.wait(20), spmm_24_ref(*a))[1])
    seen = []
    run_all(
        tmp_path / "t.json", {**fakes(), "dense": hanging}, JOBS[:1],
        on_hang=lambda choice: (seen.append(choice), told.set()),
    )  # fmt: skip
    assert seen[0] == Choice("dense")


@pytest.mark.parametrize(
    "shapes,tokens,why",
    [
        ([], [1], "at least one shape"),
        ([(16, 32)], [3], "tokens must be powers of two .*, got 3"),
        ([(16, 32)], [0], "got 0"),
        ([(16, 0)], [1], "a shape must be NxK with both from 1, got 16x0"),
    ],
)
def test_jobs_that_are_refused(shapes, tokens, why):
    with pytest.raises(ValueError, match=why):
        tune_jobs.jobs(shapes, [BF16], tokens)


def test_dispatch_follows_what_was_tuned(tmp_path):
    path = tmp_path / "t.json"
    run_all(path, todo=JOBS)
    fresh = fakes()
    plans = dispatch.Plans(load(path), fresh)
    x, w = tuner().inputs(JOBS[1])[0]
    assert torch.equal(plans.spmm_24(x, w), spmm_24_ref(x, w))
    assert fresh["mma_sp"].bound == [((("mt", 1),), None)] and fresh["mma_sp"].calls == 1
    assert fresh["wgmma_sp"].calls == 0  # faster, and wrong


GPU = tune_tiles.Gpu("sm_90", 132)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("m", tune_jobs.TOKENS)
def test_choices_are_distinct_and_begin_with_the_implementations_own(m, dtype):
    for name, of in tune_tiles.CHOICES.items():
        if name in ("mma_sp", "wgmma_sp") and dtype == torch.float32:
            continue
        found = of(m, 4096, 4096, dtype, GPU)
        assert found and len(set(found)) == len(found)
        assert {c.implementation for c in found} == {name}
        for choice in found:
            assert choice.tile is None or all(value >= 1 for _, value in choice.tile)
            assert choice.splits is None or 1 <= choice.splits <= 16


def test_choices_keep_to_shared_memory():
    small = tune_tiles.Gpu("sm_86", 84)
    for m in tune_jobs.TOKENS:
        fewer = tune_tiles.mma_choices(m, 4096, 4096, BF16, small)
        assert {c.tile for c in fewer} <= {
            c.tile for c in tune_tiles.mma_choices(m, 4096, 4096, BF16, GPU)
        }
        for choice in tune_tiles.portable_choices(m, 4096, 4096, BF16, small):
            tile = dict(choice.tile)
            assert (tile["stages"] * tile["m"] + tile["n"]) * tile["k"] * 2 <= 99 << 10


def test_the_portable_kernels_choices_are_all_right(tmp_path, monkeypatch):
    """On the kernel itself: in the interpreter where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":  # which takes seconds a run, and has no races
        monkeypatch.setattr(tune_jobs, "REPEATS", 0)
    job = tune_jobs.Job(torch.float16, 40, 136, 2)

    def choices(m, n, k, dtype):
        return tune_tiles.portable_choices(m, n, k, dtype, GPU)

    found = tune.Tuner(
        device, clock, choices, fake_conv_choices, {"portable": IMPLEMENTATIONS["portable"]}
    )
    results = tune.check_all(found, job, Table(HEAD), tmp_path / "t.json", lambda: None)
    assert len(results) >= 8
    assert [(str(r.choice), r.reason) for r in results if r.verdict != "ok"] == []


def test_a_gpus_tuner_tries_everything_and_times_graphs_with_a_cold_cache(monkeypatch):
    seen = {}
    card = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(current=device))
    monkeypatch.setattr(tune, "time_us", lambda calls, device, **how: seen.update(how) or calls)
    device = torch.device("cuda", 1)
    full, quick = (
        tune.gpu_tuner(device, lambda choice: None, lambda *what: None, quick)
        for quick in (False, True)
    )
    assert seen["current"] == device
    tried = full.choices(8, 4096, 4096, BF16)
    own = quick.choices(8, 4096, 4096, BF16)
    assert (
        {c.implementation for c in tried} == {c.implementation for c in own} == {*IMPLEMENTATIONS}
    )
    assert len(own) == len(IMPLEMENTATIONS) < len(tried) and set(own) < set(tried)
    full.clock({"a": []})
    assert seen["graph"] and seen["flush"] and seen["rounds"] == tune.ROUNDS


@pytest.mark.parametrize("name", tune_tiles.CHOICES)
def test_choices_survive_the_table_and_bind(name):
    for m in (1, 64, 4096):
        for choice in tune_tiles.CHOICES[name](m, 4096, 4096, BF16, GPU):
            again = choice_from_json(json.loads(json.dumps(choice_to_json(choice))), "spmm_24")
            assert again == choice
            run = IMPLEMENTATIONS[name].bind(again.tile, again.splits)
            options = getattr(run, "keywords", {})
            assert again.tile is None or tune_tiles.fields_of(options["tile"]) == choice.tile
            assert again.splits is None or again.splits in options.values()


@pytest.mark.slow
def test_every_choice_of_mma_sp_is_right():
    """On the NumPy executor, one ragged shape of more than one block of K each."""
    tiles = {
        choice.tile: IMPLEMENTATIONS["mma_sp"].bind(choice.tile, None).keywords["tile"]
        for m in tune_jobs.TOKENS
        for choice in tune_tiles.mma_choices(m, 4096, 4096, BF16, GPU)
    }
    assert len(tiles) > 30
    for tile in tiles.values():
        m, n, k = tile.tokens + 3, tile.rows + 8, 256 * tile.warps_k + 288
        packed = pack_24_ref(random_24(n, k, BF16))
        x = randn(m, k, dtype=BF16)
        launch = mma_packed.prepare(x, packed, tile=tile)
        gluon_numpy.run(
            mma_packed._mma_packed_kernel, launch.grid, *launch.args, **launch.constants
        )
        exact = spmm_24_ref(x.double(), packed._replace(values=packed.values.double()))
        assert_no_worse_than_dense(launch.out, spmm_24_ref(x, packed), exact, str(tile))
