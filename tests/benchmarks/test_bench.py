"""Every op's cases run on tiny shapes: inputs are random and valid, ours and dense agree."""

import dataclasses

import pytest
import torch

from slimgemm import kernels
from slimgemm.benchmarks import bench, bench_scaled, inputs, records
from slimgemm.benchmarks.bench import Settings
from slimgemm.benchmarks.machine import Limits
from slimgemm.benchmarks.peers import Peers
from slimgemm.benchmarks.shapes import LINEARS, SETS, SPARSE_TENSOR_CORES, shapes
from slimgemm.kernels import dispatch
from slimgemm.kernels.quantize_24 import scaled_spmm_24_ref

bench_no_answer = bench.no_answer
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
LIMITS = dict.fromkeys(DTYPES, Limits(0.01, 0.05))
EIGHT = {"fp8", "int8"}
NO_TWIN = {"scaled_spmm_24"}  # on a CPU it has no implementation of ours to call


def settings(tmp_path, **changes):
    made = Settings(
        shapes("tiny"), (torch.float32,), CPU, tmp_path, "slimgemm bench", Peers(compiled=False)
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("op", bench.OPS)
def test_every_op_is_checked_timed_and_recorded(op, tmp_path):
    seen = []
    recorder = bench.run(op, settings(tmp_path), LIMITS, seen.extend)
    read = records.read(tmp_path / f"cpu_{op}.csv")
    assert read.rows and len(seen) == len(read.rows) == len(recorder.rows)
    timed = [row for row in read.rows if row.status == "timed"]
    # Nothing of ours may be refused or fail, and a dense competitor is always there.
    assert {row.status for row in read.rows} == {"timed", "missing"}
    assert op in NO_TWIN or any(row.implementation.startswith("slimgemm") for row in timed)
    assert any(row.implementation.startswith("torch dense") for row in timed)
    assert all(row.eager_us_p50 > 0 and row.best_dense_over_this for row in timed)
    assert all(row.reason for row in read.rows if row.status == "missing")
    dtypes = {row.dtype for row in read.rows}
    assert all(read.head[f"limit_copy_tb_per_s_{dtype}"] == "0.01" for dtype in dtypes)
    assert read.head["command"] == "slimgemm bench"


@pytest.mark.parametrize("op", bench.OPS)
def test_every_op_in_bf16(op, tmp_path):
    one = shapes("tiny")
    small = one._replace(tokens=(3,), linears=one.linears[:1], convs=one.convs[:1])
    recorder = bench.run(op, settings(tmp_path, shapes=small, dtypes=(torch.bfloat16,)), LIMITS)
    assert {row.status for row in recorder.rows} == {"timed", "missing"}
    assert {row.dtype for row in recorder.rows} == ({"bf16"} if op not in NO_TWIN else EIGHT)


# op of a case -> the kernel that its result comes from
PLANTED = {op: op for op in bench.OPS if op not in ("overhead", "pack_24", "prune_24", *NO_TWIN)}
PLANTED |= {"spmm_24_epilogue": "spmm_24", "gemm_channels_dgrad": "gemm_channels"}
PLANTED |= {"spmm_24_step": "spmm_24_wgrad"}


@pytest.mark.parametrize("op", PLANTED)
def test_a_kernel_that_is_wrong_by_one_per_cent_is_refused_a_timing(op, tmp_path, monkeypatch):
    right = dispatch.twin(PLANTED[op])
    wrong = {PLANTED[op]: lambda *a, **k: right(*a, **k) * 1.01}
    monkeypatch.setattr(dispatch, "twin", lambda op, twin=dispatch.twin: wrong.get(op) or twin(op))
    rows = bench.run(op, settings(tmp_path), LIMITS).rows
    ours = [r for r in rows if r.implementation.startswith("slimgemm") and r.status != "missing"]
    assert ours and {row.status for row in ours} == {"refused"}
    assert all(row.eager_us_p50 is None for row in ours)
    rivals = [row for row in rows if row.implementation.startswith("torch dense")]
    assert any(row.status == "timed" for row in rivals)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize(("factor", "status"), [(1.0, "timed"), (1.01, "refused")])
def test_a_scaled_kernel_is_timed_if_it_is_right_and_refused_if_not(
    dtype, factor, status, tmp_path, monkeypatch
):
    def ordered(name, g):
        operands = g.x, g.packed, g.scale_x, g.scale_w
        return lambda: scaled_spmm_24_ref(*operands, out_dtype=torch.float32) * factor

    monkeypatch.setattr(bench_scaled, "ordered", ordered)
    rows = bench.run("scaled_spmm_24", settings(tmp_path), LIMITS).rows
    ours = [r for r in rows if r.implementation.startswith("slimgemm") and r.dtype == dtype]
    assert ours and {row.status for row in ours} == {status}


@pytest.mark.parametrize("op", ["pack_24", "prune_24"])
def test_packing_that_loses_a_weight_is_refused(op, tmp_path, monkeypatch):
    right = getattr(kernels, op)

    def lossy(w):
        packed = right(w)
        values = packed.values.clone()
        values[-1, -1] *= 1.01
        return packed._replace(values=values)

    monkeypatch.setattr(kernels, op, lossy)
    rows = bench.run(op, settings(tmp_path), LIMITS).rows
    assert {r.status for r in rows if r.implementation == f"slimgemm {op}"} == {"refused"}


def test_a_case_that_cannot_be_measured_is_rows_that_say_why(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(bench, "measure", fail)
    recorder = bench.run("overhead", settings(tmp_path), LIMITS)
    assert recorder.rows and {row.status for row in recorder.rows} == {"failed"}
    assert {row.reason for row in recorder.rows} == {"RuntimeError: CUDA error: out of memory"}


def test_an_8_bit_product_that_torch_refuses_is_still_checked(tmp_path, monkeypatch):
    def refuse(*operands):
        raise RuntimeError("mat2 shape must be divisible by 16")

    monkeypatch.setattr(bench_scaled, "dense_fp8", refuse)
    rows = bench.run("scaled_spmm_24", settings(tmp_path), LIMITS).rows
    fp8 = {row.implementation: row.status for row in rows if row.dtype == "fp8"}
    assert fp8["torch dense"] == "failed" and fp8["torch dense bf16, no scales"] == "timed"


def test_no_case_is_begun_after_the_time_is_up_and_the_file_says_so(tmp_path):
    late = bench.time.monotonic() - 100
    recorder = bench.run("pack_24", settings(tmp_path, seconds=50), LIMITS, started=late)
    assert not recorder.rows
    assert records.read(recorder.path).head["ended"].startswith("after 50 s, before tiny.square")


def test_an_op_ends_where_the_gpu_no_longer_answers_and_the_file_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "no_answer", lambda device: "AcceleratorError: illegal address")
    recorder = bench.run("prune_24", settings(tmp_path), LIMITS)
    assert {row.layer for row in recorder.rows} == {"tiny.square"}
    ended = records.read(recorder.path).head["ended"]
    assert ended == "after tiny.square n 64, k 64: AcceleratorError: illegal address"
    assert not bench_no_answer(CPU)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"op must be one of spmm_24, .*got 'gemm'"):
        bench.check_ops(["gemm"])
    with pytest.raises(ValueError, match=r"shapes must be one of all, .*got 'huge'"):
        shapes("huge")
    assert bench.check_ops([]) == list(bench.OPS)


def test_random_weights_are_two_of_four_at_all_six_pairs_and_never_zero_filled():
    w = inputs.random_24(64, 63, torch.float32, inputs.generator(CPU, 0))
    padded = torch.nn.functional.pad(w, (0, 1)).view(-1, 4)
    assert int((padded != 0).sum(1).max()) == 2
    assert len({tuple(row) for row in (padded[: 64 * 15] != 0).tolist()}) >= 6
    assert 0.4 < float((w != 0).float().mean()) < 0.55
    assert torch.equal(w, inputs.random_24(64, 63, torch.float32, inputs.generator(CPU, 0)))


@pytest.mark.parametrize(
    ("width", "ratio", "run", "kept"),
    [(256, 0.5, 64, 128), (256, 0.125, 64, 64), (48, 0.5, 64, 48), (100, 0.375, 1, 38),
     (200, 0.5, 64, 128)],
)  # fmt: skip
def test_kept_channels(width, ratio, run, kept):
    index = inputs.random_index(width, ratio, run, inputs.generator(CPU, 1))
    assert index.kept == kept == inputs.kept_count(width, ratio, run)
    kernels.channel_index(index.index, width)  # ascending, no repeats, inside
    starts = index.index[:: min(run, width)]
    assert torch.equal(starts % min(run, width), torch.zeros_like(starts))


def test_the_shapes_are_those_that_were_promised():
    assert {(s.n, s.k) for s in SPARSE_TENSOR_CORES} == {
        (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336),
        (37888, 3584), (3584, 18944), (8192, 8192), (57344, 8192),
    }  # fmt: skip
    assert len(SPARSE_TENSOR_CORES) == 8
    everything = SETS["all"]
    assert (min(everything.tokens), max(everything.tokens)) == (1, 16384)
    assert everything.ratios[0] == 0.125 and everything.ratios[-1] == 0.875
    assert any((t.m, t.k, t.n) == (13008, 1024, 4096) for t in everything.training)
    families = {linear.name.partition(".")[0] for linear in LINEARS}
    assert {"llama3-8b", "llama3-70b", "qwen2", "vit-l", "bert"} <= families
    assert {c.name.partition(".")[0] for c in everything.convs} == {"resnet50", "efficientnet-b0"}


@pytest.mark.gpu
@pytest.mark.parametrize("op", bench.OPS)
def test_every_op_on_a_gpu(op, tmp_path):
    gpu = torch.device("cuda", torch.cuda.current_device())
    limits = dict.fromkeys(DTYPES, Limits(1.0, 100.0))
    rows = bench.run(op, settings(tmp_path, device=gpu, dtypes=(torch.bfloat16,)), limits).rows
    ours = [row for row in rows if row.implementation.startswith("slimgemm")]
    assert {row.status for row in ours} <= {"timed", "missing"}, [r.reason for r in ours]
    timed = [row for row in rows if row.status == "timed"]
    assert any(row.implementation.startswith("slimgemm") for row in timed)
    assert all(row.host_us_p50 and row.peak_call_bytes is not None for row in timed)
    assert any(row.graph_us_p50 for row in timed if row.implementation.startswith("torch dense"))
