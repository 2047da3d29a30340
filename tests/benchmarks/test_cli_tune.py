"""`slimgemm tune` on the command line: what it asks for, what it says, where it writes."""

import os
import signal
import threading

import pytest
import torch
from tune_fakes import HEAD, Fake, fake_choices, fakes, tuner
from typer.testing import CliRunner

from slimgemm.benchmarks import cli, cli_tune, machine, shapes
from slimgemm.kernels import tune, tune_jobs, tune_table
from slimgemm.kernels.reference import spmm_24_ref

SMALL = ["--shapes", "16x32,24x32", "--tokens", "4,1"]


def invoke(*options):
    return CliRunner().invoke(cli.app, ["tune", *options])


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU whose implementations are fakes on the CPU; returns them."""
    candidates = fakes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "head", lambda device, command: {**HEAD, "command": command})
    here = {key: HEAD[key] for key in tune_table.SAME}
    monkeypatch.setattr(tune_table, "here", lambda device: here)

    def made(device, on_hang, progress, quick):
        own = lambda *shape: [c for c in fake_choices(*shape) if c.splits is None]  # noqa: E731
        choices = own if quick else fake_choices
        return tuner(candidates, on_hang=on_hang, progress=progress, choices=choices)

    monkeypatch.setattr(tune, "gpu_tuner", made)
    before = signal.getsignal(signal.SIGTERM)
    yield candidates
    signal.signal(signal.SIGTERM, before)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke()
    assert done.exit_code == 2
    assert done.stderr == "error: slimgemm tune measures a GPU, and torch finds none here\n"


@pytest.mark.parametrize(
    "options,why",
    [
        (["--shapes", "gpt"], "shapes must be NxK, sparse-tensor-cores, or of llama3-8b, "),
        (["--shapes", ","], "at least one shape"),
        (["--shapes", "16x0"], "both from 1, got 16x0"),
        (["--tokens", "3"], "powers of two (rows are dispatched by them), got 3"),
        (["--tokens", "-1"], "tokens must be whole numbers, got '-1'"),
        (["--convs", "vgg"], "convs must be resnet50, efficientnet-b0 or their layers, got 'vgg'"),
        (["--convs", ","], "convs must name a convolution, got ','"),
        (["--convs", "resnet50", "--batch", "0"], "batch must be whole numbers, got '0'"),
        (["--dtype", "int8"], "dtype must be one of fp16, bf16, fp32, got 'int8'"),
        (["--device", "1", *SMALL], "device must be below 1, got 1"),
    ],
)
def test_bad_input(gpu, options, why):
    done = invoke(*options)
    assert done.exit_code == 2 and why in done.stderr


def test_shapes_by_name():
    assert cli_tune.named_shapes("16x32, 24x32") == [(16, 32), (24, 32)]
    assert cli_tune.named_shapes("qwen2.5-7b.o,vit-l.fc1") == [(3584, 3584), (4096, 1024)]
    assert len(cli_tune.named_shapes("llama3-8b")) == 4
    eight = cli_tune.named_shapes("sparse-tensor-cores")
    assert len(eight) == 8 and (57344, 8192) in eight
    work = cli_tune.todo("sparse-tensor-cores", "bf16,fp16", "")
    assert len(work) == 2 * 8 * len(tune_jobs.TOKENS)


def test_convolutions_by_name():
    work = cli_tune.todo("", "bf16", "", "resnet50", "32")
    convs = [job for job in work if job.shape[0] == "conv2d_24"]
    assert len(convs) == 23 and sum(job.linear is not None for job in convs) == 12
    layers = {(job.conv.weight_shape, job.conv.stride[0], job.height) for job in convs}
    assert ((64, 3, 7, 7), 2, 224) in layers and ((512, 512, 3, 3), 2, 14) in layers
    assert ((2048, 1024, 1, 1), 2, 14) in layers and ((2048, 512, 1, 1), 1, 7) in layers
    # The linear layer that a convolution is as well comes before it.
    for job in convs:
        if job.linear is not None:
            assert work.index(job.linear) < work.index(job)
    one = cli_tune.todo("", "bf16,fp16", "", "resnet50.layer2.3x3", "1,8")
    assert [str(job) for job in one] == [
        f"128->128 3x3 {kind} images {n}x28x28" for kind in ("bf16", "fp16") for n in (1, 8)
    ]
    both = cli_tune.todo("16x32", "bf16", "1", "efficientnet-b0.depthwise", "1")
    assert [str(job) for job in both] == [
        "16x32 bf16 m=1", "240->240 5x5 groups 240 bf16 images 1x28x28",
    ]  # fmt: skip


def test_convolutions_are_tuned_after_their_linear_layers_and_go_on(gpu, monkeypatch):
    tiny = (
        shapes.Conv("tiny.1x1", 2, 8, 16, 3, 1), shapes.Conv("tiny.3x3", 2, 8, 16, 3, 3, 2),
    )  # fmt: skip
    monkeypatch.setattr(shapes, "RESNET50", tiny)
    done = invoke("--convs", "tiny", "--batch", "2")
    assert done.exit_code == 0, done.output
    assert "16x8 bf16 m=32: mma_sp 5.0 us, dense 9.0 us (1 wrong, 1 failed)" in done.output
    one = "8->16 1x1 bf16 images 2x3x3: linear 7.0 us, dense 9.0 us (2 wrong, 1 failed)"
    assert one in done.output
    assert "8->16 3x3 stride 2 bf16 images 2x3x3: dense 9.0 us (2 wrong, 1 failed)" in done.output
    assert "wrong: mma_sp mt=1, 8->16 1x1 bf16 18 pixels: error " in done.output
    assert "3 measured, 0 from before" in done.output
    table = tune_table.load(tune_table.user_path(HEAD))
    assert [(row.op, row.m) for row in table.rows] == [
        ("spmm_24", 32), ("conv2d_24", 18), ("conv2d_24", 8),
    ]  # fmt: skip
    assert "0 measured, 3 from before" in invoke("--convs", "tiny", "--batch", "2").output
    more = invoke("--convs", "tiny.3x3", "--batch", "2,4").output
    assert "1 measured, 1 from before" in more


def test_it_writes_where_dispatch_looks_and_goes_on_there(gpu):
    done = invoke(*SMALL)
    assert done.exit_code == 0, done.output
    path = tune_table.user_path(HEAD)
    table = tune_table.load(path)
    assert [(r.n, r.k, r.m) for r in table.rows] == [(n, 32, m) for n in (16, 24) for m in (1, 4)]
    assert set(table.head) == set(HEAD) and table.head["gpu"] == HEAD["gpu"]
    said = done.output
    assert "16x32 bf16 m=1: mma_sp 5.0 us, dense 9.0 us (1 wrong, 1 failed)" in said
    assert "wrong: wgmma_sp, 16x32 bf16 m=1: error " in said
    assert "failed: portable, 16x32 bf16 m=1: RuntimeError: no such instruction" in said
    assert said.count("failed: portable") == 1
    assert "4 measured, 0 from before" in said and f"Wrote {path}." in said.replace("\n", "")
    more = invoke("--shapes", "16x32,40x32", "--tokens", "4")
    assert "1 measured, 1 from before" in more.output and "16x32" not in more.output
    assert len(tune_table.load(path).rows) == 5


def test_a_quick_table_is_completed_later(gpu):
    for options, tried in (["--quick"], 4), ([], 5):
        done = invoke("--shapes", "16x32", "--tokens", "1,4", *options)
        assert "2 measured, 0 from before" in done.output
        rows = tune_table.load(tune_table.user_path(HEAD)).rows
        assert [len(row.results) for row in rows] == [tried, tried]
    assert "0 measured, 2 from before" in invoke("--shapes", "16x32", "--tokens", "1,4").output


def test_minutes_and_out(gpu, tmp_path):
    slow = {"now": 0.0}

    def dense(*args):
        # The check runs it 18 times, the clock 4 times: 5 minutes are over with the first row.
        slow["now"] += 15
        return spmm_24_ref(*args)

    gpu["dense"] = Fake(dense)
    monotonic = tune.tune.__kwdefaults__["now"]
    tune.tune.__kwdefaults__["now"] = lambda: slow["now"]
    try:
        done = invoke(*SMALL, "--minutes", "5", "--out", str(tmp_path / "here.json"))
    finally:
        tune.tune.__kwdefaults__["now"] = monotonic
    assert done.exit_code == 0, done.output
    assert len(tune_table.load(tmp_path / "here.json").rows) == 1
    assert "3 of 4 rows are left; the same command goes on with them." in done.output


def test_a_damaged_table_is_refused(gpu):
    path = tune_table.user_path(HEAD)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    done = invoke(*SMALL)
    assert done.exit_code == 2 and f"error: {path} is no table" in done.stderr
    assert path.read_text() == "{"


def test_a_gpu_that_stops_answering(gpu, monkeypatch):
    def synchronize(self):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(tune.Tuner, "synchronize", synchronize)
    done = invoke(*SMALL)
    assert done.exit_code == 2 and "no longer answers after dense" in done.stderr


def test_a_hanging_kernel_ends_the_process_and_is_remembered(gpu, monkeypatch):
    """os._exit is what ends it; here it ends the wait instead."""
    gone = threading.Event()
    codes = []

    def leave(code):
        codes.append(code)
        gone.set()

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(tune, "HANG_S", 0.05)
    gpu["dense"] = Fake(lambda *a: (gone.wait(20), spmm_24_ref(*a))[1])
    done = invoke("--shapes", "16x32", "--tokens", "1")
    assert codes[0] == cli_tune.HUNG
    assert "error: dense has not come back for 0 s; run it again" in done.stderr


def test_being_terminated_is_an_interrupt(gpu):
    """So that the candidate that runs just then is not taken for one that hangs."""

    def terminated(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    gpu["dense"] = Fake(terminated)
    done = invoke(*SMALL)
    assert done.exit_code in (1, 130)
    assert not list(tune_table.user_path(HEAD).parent.iterdir())
