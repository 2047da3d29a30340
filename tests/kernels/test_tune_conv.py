"""Tuning of convolutions on the CPU: fakes, a fake clock, real checks and files."""

import json

import gluon_numpy
import pytest
import torch
from helpers import assert_no_worse_than_dense
from tune_fakes import HEAD, Fake, clock, conv_fakes, fake_choices, fakes, tuner

from slimgemm.kernels import dispatch, tune, tune_conv, tune_tiles
from slimgemm.kernels.conv_layout import convolution, is_nhwc
from slimgemm.kernels.formats import check
from slimgemm.kernels.gluon import mma_conv
from slimgemm.kernels.implementations import CONVOLUTIONS, Linear
from slimgemm.kernels.reference import spmm_24_ref
from slimgemm.kernels.reference_conv import conv2d_24_ref
from slimgemm.kernels.tune_jobs import INPUT_SETS, REPEATS, ConvJob, Job, conv_jobs
from slimgemm.kernels.tune_table import (
    Choice,
    Table,
    choice_from_json,
    choice_to_json,
    load,
    save,
)

BF16 = torch.bfloat16
THREE = ConvJob(BF16, convolution((16, 8, 3, 3), stride=2, padding=1), 2, 5, 4)
ONE = ConvJob(BF16, convolution((16, 12, 1, 1)), 2, 3, 3)


def run_all(path, todo, candidates=None, convolutions=None, **more):
    table = tune.resumed(path, HEAD)
    return list(tune.tune(todo, table, path, tuner(candidates, convolutions, **more)))


def test_a_job_is_the_layer_that_it_says():
    assert THREE.m == 2 * 3 * 2 and (THREE.n, THREE.k) == (16, 72) and THREE.linear is None
    assert ONE.linear == Job(BF16, 16, 12, 32)  # 18 pixels
    assert ONE.shape == ("conv2d_24", "bf16", 16, 16, 18, ONE.conv)
    x, w = ONE.inputs(torch.device("cpu"), 0)
    assert x.shape == (2, 12, 3, 3) and is_nhwc(x) and x.dtype == BF16
    assert w.shape == (16, 16) and (w.keep, w.group) == (2, 4)
    check(w)
    again, other = (ONE.inputs(torch.device("cpu"), seed) for seed in (0, 1))
    assert torch.equal(again[0], x) and torch.equal(again[1].meta, w.meta)
    assert not torch.equal(other[0], x) and not torch.equal(other[1].meta, w.meta)
    dense = dispatch.twin("unpack_24")(w)
    assert not dense[:, 12:].any() and (dense[:, :12] != 0).float().mean() == 0.5
    exact = conv2d_24_ref(x.double(), w._replace(values=w.values.double()), (16, 12, 1, 1))
    assert 0.2 < exact.std() < 3


def test_each_convolution_comes_once_after_its_linear_layer():
    jobs = conv_jobs([THREE, ONE, THREE, ONE._replace(batch=1)])
    assert jobs == [THREE, ONE.linear, ONE, ONE._replace(batch=1).linear, ONE._replace(batch=1)]


def test_every_candidate_is_checked_and_only_the_right_ones_are_timed(tmp_path):
    convs, timed = conv_fakes(), []

    def spying(calls):
        timed.append(list(calls))
        return clock(calls)

    ((job, row, why),) = run_all(tmp_path / "t.json", [THREE], None, convs, clock=spying)
    assert job == THREE and why == "" and timed == [["dense"]]
    assert [(str(r.choice), r.us_p50) for r in row.ranked] == [("dense", 9.0)]
    verdicts = {str(r.choice): (r.verdict, r.reason) for r in row.results[1:]}
    assert verdicts["portable"] == ("failed", "RuntimeError: no such instruction")
    for name in ("mma_sp mt=1", "mma_sp mt=1 splits=2"):
        verdict, reason = verdicts[name]
        assert verdict == "wrong" and reason.endswith("act silu")
    assert len(verdicts) == 3  # no linear layer
    # Two choices, plain, which is repeated, and with an epilogue: never timed.
    assert convs["mma_sp"].calls == 2 * (1 + REPEATS + 1)
    assert convs["dense"].calls == 2 * (1 + REPEATS) + INPUT_SETS
    assert load(tmp_path / "t.json").rows == (row,)


def test_a_result_of_other_strides_is_wrong(tmp_path):
    convs = {**conv_fakes(), "dense": Fake(lambda *a: conv2d_24_ref(*a).contiguous())}
    ((_, row, _),) = run_all(tmp_path / "t.json", [THREE], None, convs)
    (result,) = [r for r in row.results if r.choice.implementation == "dense"]
    assert (result.verdict, result.reason) == ("wrong", "gave strides (96, 6, 2, 1)")


def test_the_linear_layer_is_measured_by_what_its_own_row_found(tmp_path):
    path, linear = tmp_path / "t.json", fakes()
    done = run_all(path, conv_jobs([ONE]), linear)
    rows = load(path).rows
    assert [row for _, row, _ in done] == [*rows] and rows[0].shape == ONE.linear.shape
    assert str(rows[0].ranked[0].choice) == "mma_sp mt=1"
    assert [r.choice.implementation for r in rows[1].ranked] == ["linear", "dense"]
    # 2 checks, repeated, and INPUT_SETS calls of both of its choices, then as the convolution
    assert linear["mma_sp"].calls == 3 * (2 * (1 + REPEATS) + INPUT_SETS)


def test_dispatch_follows_what_was_tuned(tmp_path):
    path = tmp_path / "t.json"
    run_all(path, conv_jobs([ONE, THREE]))
    linear, convs = fakes(), conv_fakes()
    plans = dispatch.Plans(load(path), linear, convs)
    for job, ran in ((THREE, convs["dense"]), (ONE, linear["mma_sp"])):
        arguments = job.arguments(*job.inputs(torch.device("cpu"), 3), None, None, "relu")
        got, exact = plans.conv2d_24(*arguments), conv2d_24_ref(*arguments)
        assert ran.calls == 1 and got.stride() == exact.stride()
        torch.testing.assert_close(got, exact)


def test_it_goes_on_where_it_stopped(tmp_path):
    path, todo = tmp_path / "t.json", conv_jobs([ONE, THREE])
    run_all(path, todo[:2])
    assert [job for job, _, _ in run_all(path, todo)] == [THREE]
    assert run_all(path, todo) == []
    fewer = lambda job: [Choice("dense")]  # noqa: E731
    more = lambda job: [Choice("dense"), Choice("dense", (("m", 1),))]  # noqa: E731
    assert run_all(path, todo, conv_choices=fewer) == []
    again = run_all(path, todo, conv_choices=more)
    assert [job for job, _, _ in again] == [ONE, THREE]


def test_one_that_hung_as_a_convolution_is_still_tried_for_linear_layers(tmp_path):
    path, choice = tmp_path / "t.json", Choice("mma_sp", (("mt", 1),))
    entry = {"op": "conv2d_24", "dtype": "bf16", **choice_to_json(choice)}
    tune.journal_path(path).write_text(json.dumps(entry))
    rows = [row for _, row, _ in run_all(path, conv_jobs([ONE]))]
    assert load(path).stopped == (("conv2d_24", "bf16", choice),)
    reasons = [{r.choice: r.reason for r in row.results}[choice] for row in rows]
    assert reasons == ["", "an earlier run ended while it ran"]


# ---- the table
def damage(tmp_path, change):
    path = tmp_path / "t.json"
    save(Table(HEAD, (run_all(path, [THREE])[0][1],)), path)
    content = json.loads(path.read_text())
    change(content["rows"][0])
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "change,why",
    [
        (lambda r: r.update(conv=None), "conv of conv2d_24 must be a geometry"),
        (lambda r: r.update(op="spmm_24"), "conv of spmm_24 must be null"),
        (lambda r: r.update(op="conv2d"), "op must be one of spmm_24, conv2d_24, got 'conv2d'"),
        (lambda r: r.pop("conv"), "'conv' is missing"),
        (lambda r: r["conv"].pop("groups"), "'groups' is missing"),
        (lambda r: r["conv"].update(kernel=[3]), "conv kernel must be 2 whole numbers, got [3]"),
        (lambda r: r["conv"].update(padding="same"), "conv padding must be 4 whole numbers"),
        (lambda r: r["conv"].update(stride=[1, 0]), "stride must be one or two integers"),
        (lambda r: r["conv"].update(stride=[1, 1.5]), "conv must hold whole numbers"),
        (lambda r: r["conv"].update(groups=3), "groups must divide the 16 out channels"),
        (lambda r: r["conv"].update(out=32), "n and k must be 32 and 72 for its conv, got 16"),
        (lambda r: r["conv"].update(channels=16), "n and k must be 16 and 144 for its conv"),
        (
            lambda r: r["results"][0].update(implementation="cudnn"),
            "implementation of conv2d_24 must be one of portable, mma_sp, wgmma_sp, dense, linear",
        ),
    ],
)
def test_a_damaged_row_is_refused(tmp_path, change, why):
    path = damage(tmp_path, change)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert why in str(caught.value) and str(path) in str(caught.value)


# ---- what is tried
GPU = tune_tiles.Gpu("sm_90", 132)
LAYERS = {
    "stem": ConvJob(BF16, convolution((64, 3, 7, 7), 2, 3), 32, 224, 224),
    "three": ConvJob(BF16, convolution((512, 512, 3, 3), 1, 1), 32, 7, 7),
    "one pixel": ConvJob(BF16, convolution((2048, 512, 1, 1)), 1, 1, 1),
    "narrow": ConvJob(BF16, convolution((16, 64, 3, 3)), 1, 8, 8),
    "depthwise": ConvJob(BF16, convolution((240, 1, 5, 5), 1, 2, 1, 240), 32, 28, 28),
    "fp32": ConvJob(torch.float32, convolution((128, 128, 3, 3), 1, 1), 32, 28, 28),
}


@pytest.mark.parametrize("arch", ["sm_90", "sm_86", "sm_75"])
@pytest.mark.parametrize("layer", LAYERS)
def test_choices_are_distinct_legal_and_survive_the_table(layer, arch):
    job, gpu = LAYERS[layer], tune_tiles.Gpu(arch, 84, arch != "sm_75")
    for name, of in tune_conv.CHOICES.items():
        found = of(job, gpu)
        assert found and len(set(found)) == len(found)
        assert {c.implementation for c in found} == {name}
        candidate = {**CONVOLUTIONS, "linear": Linear(spmm_24_ref)}[name]
        for choice in found:
            text = json.dumps(choice_to_json(choice))
            assert choice_from_json(json.loads(text), "conv2d_24") == choice
            options = getattr(candidate.bind(choice.tile, choice.splits), "keywords", {})
            assert choice.tile is None or tune_tiles.fields_of(options["tile"]) == choice.tile
            assert choice.splits is None or choice.splits in options.values()
    if layer == "depthwise":
        assert tune_conv.portable_choices(job, gpu) == [Choice("portable")]
    else:
        assert len(tune_conv.portable_choices(job, gpu)) > 2


def test_a_gpus_tuner_tries_everything(monkeypatch):
    properties = type("Card", (), {"major": 9, "minor": 0, "multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    full, quick = (
        tune.gpu_tuner(torch.device("cuda", 0), lambda choice: None, lambda *what: None, quick)
        for quick in (False, True)
    )
    tried, own = full.tried(LAYERS["three"]), quick.tried(LAYERS["three"])
    assert [c.implementation for c in own] == ["portable", "mma_sp", "wgmma_sp", "linear", "dense"]
    assert set(own) < set(tried) and {c.implementation for c in tried} == {*own_names(own)}
    assert full.tried(Job(BF16, 64, 64, 1)) == full.choices(1, 64, 64, BF16)


def own_names(choices):
    return [choice.implementation for choice in choices]


def test_the_portable_kernels_choices_are_all_right(tmp_path):
    """On the kernel itself: in the interpreter where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = ConvJob(torch.float16, convolution((24, 16, 3, 3), 1, 1), 1, 3, 4)
    portable = {"portable": CONVOLUTIONS["portable"]}
    found = tune.Tuner(
        device, clock, fake_choices, lambda job: tune_conv.portable_choices(job, GPU),
        convolutions=portable,
    )  # fmt: skip
    results = tune.check_all(found, job, Table(HEAD), tmp_path / "t.json", lambda: None)
    assert len(results) >= 6
    assert [(str(r.choice), r.reason) for r in results if r.verdict != "ok"] == []


@pytest.mark.slow
def test_every_choice_of_mma_sp_is_right():
    """On the NumPy executor."""
    shape = (24, 64, 3, 3)
    layers = [
        ConvJob(torch.float16, convolution(shape, 1, 1), 1, 1, m) for m in (1, 16, 32, 64, 4096)
    ]
    tiles = {
        choice.tile: CONVOLUTIONS["mma_sp"].bind(choice.tile, None).keywords["tile"]
        for job in layers
        for choice in tune_conv.mma_choices(job, GPU)
    }
    assert len(tiles) > 15
    job = ConvJob(torch.float16, convolution(shape, 1, 1), 1, 5, 7)
    x, w = job.inputs(torch.device("cpu"), 0)
    wide = w._replace(values=w.values.double())
    exact = conv2d_24_ref(x.double(), wide, shape, None, 1, 1)
    for tile in tiles.values():
        launch = mma_conv.prepare(x, w, job.conv, tile=tile)
        gluon_numpy.run(mma_conv._mma_packed_kernel, launch.grid, *launch.args, **launch.constants)
        twin = conv2d_24_ref(x, w, shape, None, 1, 1)
        assert_no_worse_than_dense(launch.out, twin, exact, str(tile))
