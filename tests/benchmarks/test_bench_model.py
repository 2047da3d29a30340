"""The models: shapes, decoding, their checks, and every workload at a tiny size."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from slimgemm import sparse_ops
from slimgemm.benchmarks import bench_model, machine, model_check, records
from slimgemm.benchmarks.bench_model import ModelRow, measure_model, run_models
from slimgemm.benchmarks.inputs import generator
from slimgemm.benchmarks.models import Decoder, DecoderSize, ResNet, ResNetSize, Vit, VitSize
from slimgemm.benchmarks.peers import Peers
from slimgemm.benchmarks.workloads import FULL, TINY, built_on, workloads
from slimgemm.kernels.timing import Times

CPU = torch.device("cpu")
PEERS = Peers(compiled=False)
WORK = list(workloads(TINY, torch.float32, CPU))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "size", "published"),
    [
        (Decoder, DecoderSize(), 8_030_261_248),
        (Vit, VitSize(), 304_326_632),
        (ResNet, ResNetSize(), 25_557_032),
    ],
)
def test_full_models_have_the_published_numbers_of_weights(kind, size, published):
    with torch.device("meta"):
        assert parameters(kind(size)) == published


def test_channel_pruning_halves_the_inner_widths():
    with torch.device("meta"):
        assert Decoder(DecoderSize().narrow(0.5)).layers[0].down.in_features == 7168
        assert Vit(VitSize().narrow(0.5)).layers[0].fc1.out_features == 2048
        assert ResNet(ResNetSize().narrow(0.5)).layers[0].conv2.weight.shape[:2] == (32, 32)


def test_decoding_with_a_cache_is_the_same_as_reading_everything_at_once():
    torch.manual_seed(0)
    model = Decoder(TINY.decoder).eval()
    tokens = torch.randint(96, (3, 8))
    cache = model.new_cache(3, 8, model.head.weight, generator(CPU, 0))
    with torch.no_grad():
        for place in range(8):
            got = model(tokens[:, place : place + 1], torch.tensor([place]), cache)
        expected = model(tokens, torch.arange(8))
    assert torch.allclose(got, expected, atol=1e-5)


def test_in_float64_is_a_float64_copy_and_puts_the_weights_back():
    with built_on(CPU, torch.bfloat16):
        model = Vit(TINY.vit).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    args = (torch.randn(2, 3, 16, 16).bfloat16(),)
    (got,) = model_check.exact_outputs(model, args, train=False)
    expected = copy.deepcopy(model).double()(args[0].double())
    assert got.dtype == torch.float64 and torch.allclose(got, expected, atol=1e-12)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def test_models_are_seeded_and_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    first, second = (WORK[0].build(1.0).head.weight for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("work", WORK, ids=lambda w: f"{w.model}, {w.name}")
def test_every_workload_is_checked_and_timed(work):
    rows = {r.variant: r for r in measure_model(work, torch.float32, CPU, PEERS, rounds=1)}
    assert list(rows) == list(bench_model.VARIANTS)
    compiled = rows.pop("dense compiled")
    assert (compiled.status, compiled.reason) == ("missing", "left out by --no-compiled")
    for row in rows.values():
        assert row.status == "timed", row.reason
        assert row.units_per_s == pytest.approx(work.units / row.eager_us_p50 * 1e6)
        assert (row.joules_per_unit, row.joules_from) == (None, "missing: no GPU")
        assert (row.packed_layers > 0) == ("2:4" in row.variant)
        assert (row.error is not None) == ("2:4" in row.variant)
    sizes = {name: row.weight_bytes for name, row in rows.items()}
    assert sizes["channels and 2:4"] < sizes["2:4"] < sizes["dense"]
    assert sizes["channels"] < sizes["dense"]
    assert rows["dense"].best_dense_over_this == 1


@pytest.mark.parametrize("work", [WORK[0], WORK[3]], ids=["decode", "training"])
def test_a_packed_model_that_is_wrong_is_refused_a_timing(work, monkeypatch):
    right = sparse_ops.compress

    def wrong(model, example):
        report = right(model, example)
        layer = next(m for m in model.modules() if isinstance(m, sparse_ops.SparseLinear24))
        layer.values.data *= 1.01
        return report

    monkeypatch.setattr(sparse_ops, "compress", wrong)
    rows = {r.variant: r for r in measure_model(work, torch.float32, CPU, PEERS, rounds=1)}
    for name in ("2:4", "channels and 2:4"):
        assert rows[name].status == "refused" and rows[name].eager_us_p50 is None
        assert rows[name].error > rows[name].allowed_error
    assert rows["dense"].status == "timed"


def test_a_model_that_does_not_fit_is_a_row():
    def build(share):
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = measure_model(dataclasses.replace(WORK[0], build=build), torch.float32, CPU, PEERS)
    assert {r.status for r in rows if r.variant != "dense compiled"} == {"failed"}
    assert "CUDA out of memory" in rows[0].reason


def test_models_are_pruned_along_their_input_channels():
    model = nn.Sequential(nn.Linear(8, 4), nn.Conv2d(8, 4, 3))
    model_check.prune_24(model)
    groups = [model[0].weight.view(-1, 4), model[1].weight.permute(0, 2, 3, 1).reshape(-1, 4)]
    assert all(int((g != 0).sum(1).max()) == 2 == int((g != 0).sum(1).min()) for g in groups)


class FakeGpu:
    """torch.cuda and the timer as far as the models ask them; the model itself runs on the CPU.

    The second model cannot be captured; a replay leaves `scale` times the output in the graph.
    """

    def __init__(self, monkeypatch, scale=1.0):
        self.captured, self.scale, self.held = 0, scale, 100
        timed = iter([10.0, 4.0])

        def time_us(calls, device, **_):
            us = next(timed)
            return {name: Times(us, us, us) for name in calls}

        monkeypatch.setattr(bench_model, "capture", self.capture)
        monkeypatch.setattr(bench_model, "time_us", time_us)
        monkeypatch.setattr(bench_model, "generator", lambda device, seed: generator(CPU, seed))
        monkeypatch.setattr(machine, "joules_of", lambda *_: machine.Energy(8e5, "nvml"))
        for name, value in {
            "memory_allocated": lambda: self.held, "max_memory_allocated": lambda: self.held + 250,
            "reset_peak_memory_stats": lambda: None, "synchronize": lambda: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value())

    def holding(self, build):
        """`build`, each of whose models takes 3000 bytes of this GPU."""

        def counted(share):
            self.held += 3000
            return build(share)

        return counted

    def capture(self, calls, device):
        self.captured += 1
        if self.captured == 2 and self.scale == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        calls[0]()
        outputs = calls[0].args[0]

        class Graph:
            @staticmethod
            def replay():
                outputs[0] = outputs[0] * self.scale

        return Graph


def test_on_a_gpu_graphs_memory_and_joules_are_measured(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    work = dataclasses.replace(WORK[1], build=gpu.holding(WORK[1].build))
    rows = measure_model(work, torch.float32, torch.device("cuda"), PEERS)
    by = {row.variant: row for row in rows}
    dense, sparse = by["dense"], by["2:4"]
    assert (dense.eager_us_p50, dense.graph_us_p50, dense.rate_from) == (10, 4, "graph")
    assert dense.units_per_s == pytest.approx(3 / 4e-6)
    # What this variant alone holds, and what a call takes beside it.
    assert dense.peak_bytes == sparse.peak_bytes == 3000 + 250
    # 2 s of 4 us are 500000 calls of 3 tokens.
    assert dense.joules_per_unit == pytest.approx(8e5 / 500000 / 3)
    assert sparse.graph_us_p50 is None and "no graph: RuntimeError: operation" in sparse.reason
    assert sparse.best_dense_over_this == 1  # eager against eager


def test_a_packed_model_whose_graph_repeats_another_result_is_refused(monkeypatch):
    FakeGpu(monkeypatch, scale=1.01)
    rows = measure_model(WORK[1], torch.float32, torch.device("cuda"), PEERS)
    sparse = next(row for row in rows if row.variant == "2:4")
    assert sparse.status == "refused" and sparse.us is None
    assert "as a CUDA graph 1.00e-02 from the checked output" in sparse.reason


def test_models_are_recorded_and_the_clock_ends_the_run(tmp_path):
    recorder = records.Recorder(tmp_path, "models", CPU, {"device": "here"}, ModelRow)
    begun = []
    run_models(
        TINY, [torch.float32], CPU, recorder, PEERS, seconds=50,
        on_rows=begun.append, rounds=1, started=bench_model.time.monotonic() - 100,
    )  # fmt: skip
    read = records.read(tmp_path / "cpu_models.csv", ModelRow)
    assert not begun and read.rows == []
    assert read.head["ended"].startswith("after 50 s, before tiny decoder decode, 1 sequences")


def test_the_full_workloads_are_those_that_were_promised():
    names = [(w.model, w.name, w.train) for w in workloads(FULL, torch.bfloat16, CPU)]
    assert [n for m, n, _ in names if "decode" in n] == [
        f"decode, {b} sequences, 512 tokens each" for b in (1, 64, 8, 32)
    ]
    assert ("llama3-8b", "prefill, 2048 tokens", False) in names
    assert ("vit-l", "training step, 32 images", True) in names
    assert ("vit-l", "inference, 64 images", False) in names
    assert ("resnet50", "inference, 64 images", False) in names
