"""`slimgemm bench`: what it runs, writes, compares and refuses."""

import dataclasses
import re
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from slimgemm import kernels
from slimgemm.benchmarks import bench as job
from slimgemm.benchmarks import bench_paper, cli_bench, machine, probe, records
from slimgemm.benchmarks.bench_tables import is_ours, number
from slimgemm.benchmarks.cli import app
from slimgemm.benchmarks.compare import SLOWER
from slimgemm.benchmarks.records import Recorder
from slimgemm.benchmarks.shapes import shapes
from slimgemm.kernels.build_compile import Report

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs what a CPU runs")


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    """Limits of the device by a small copy and product; no threads asked for."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "COPY_BYTES", 16 << 20)
    monkeypatch.setattr(machine, "PRODUCT", 1024)


def bench(out, *arguments):
    words = ["bench", "--shapes", "tiny", "--no-compiled", "--out", str(out), *arguments]
    return CliRunner().invoke(app, words)


def test_one_op_is_recorded_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/slimgemm", "bench", "--op", "pack_24", "--out", "here"])
    done = bench(tmp_path, "--op", "pack_24")
    assert done.exit_code == 0, done.output
    read = records.read(tmp_path / "cpu_pack_24.csv")
    assert read.head["command"] == "slimgemm bench --op pack_24"
    assert float(read.head["limit_copy_tb_per_s_fp32"]) > 0
    assert "tiny.square" in done.output and "slimgemm pack_24" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["cpu_pack_24.csv"]


def test_ops_share_the_time(tmp_path, monkeypatch):
    until = {}

    def run_one(op, shapes, settings, limits, steps, started):
        until[op] = settings.seconds
        return Recorder(tmp_path, op, settings.device, {})

    monkeypatch.setattr(cli_bench, "_run_one", run_one)
    ops = ("overhead", "pack_24", "prune_24", "spmm_24")
    words = [word for op in ops for word in ("--op", op)]
    assert bench(tmp_path, *words, "--seconds", "40").exit_code == 0
    assert until == {"overhead": 10, "pack_24": 20, "prune_24": 30, "spmm_24": 40}


def test_on_a_gpu_what_hangs_or_dies_alone_is_left_out_of_the_run(tmp_path, monkeypatch):
    skip, seen = {"spmm_24": {"slimgemm mma_sp": "left out: it died"}}, []
    asked = lambda ops, shapes, settings: seen.append((ops, shapes)) or skip  # noqa: E731
    monkeypatch.setattr(probe, "skips", asked)
    monkeypatch.setattr(job, "limits_of", lambda settings: {})

    def run_one(op, shapes, settings, limits, steps, started):
        seen.append((op, settings.skip))
        return Recorder(tmp_path, op, torch.device("cpu"), {})

    monkeypatch.setattr(cli_bench, "_run_one", run_one)
    gpu = torch.device("cuda")
    made = job.Settings(shapes("tiny"), (torch.bfloat16,), gpu, tmp_path, "", job.Peers(False))
    cli_bench.run_all(["spmm_24", "models"], "tiny", made, {}, Console())
    assert seen == [(["spmm_24"], "tiny"), ("spmm_24", skip), ("models", skip)]


def test_a_slower_run_is_an_error_and_the_same_file_is_not(tmp_path):
    bench(tmp_path / "old", "--op", "overhead")
    path = tmp_path / "old" / "cpu_overhead.csv"
    old = records.read(path)
    for scale, code in ((1e3, 0), (1e-3, 1)):
        rows = [scaled(row, scale) if is_ours(row) else row for row in old.rows]
        records.write_text(path, records.as_csv(old.head, rows))
        done = bench(tmp_path / "new", "--op", "overhead", "--compare", str(path.parent))
        assert done.exit_code == code, done.output
        assert ("slower: overhead" in done.output) == bool(code)
        assert ("measuring again, for 2 that may be slower" in done.output) == bool(code)
        assert f"compared 2 rows of ours, {2 * code} slower" in done.output
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["cpu_overhead.csv"]


def test_the_help_says_what_is_compared():
    text = " ".join(
        re.sub(r"[│\n]", " ", CliRunner().invoke(app, ["bench", "--help"]).output).split()
    )
    assert f"a median of {SLOWER} times the recorded one" in text and "torch's own rows" in text


def test_a_table_has_each_case_and_says_once_what_is_missing(tmp_path):
    text = bench(tmp_path, "--op", "spmm_24").output
    assert "spmm_24, tiny.square, m 1, n 64, k 64, fp32" in text.splitlines()
    assert text.count("cuSPARSELt needs a GPU") == 1 and "best dense / this: above 1" in text
    assert "Missing: torch dense compiled (left out by --no-compiled)" in text


def scaled(row, scale):
    names = [f"eager_us_{p}" for p in ("p20", "p50", "p80")]
    if row.status != "timed":
        return row
    return dataclasses.replace(row, **{name: getattr(row, name) * scale for name in names})


def test_a_refused_row_of_ours_is_an_error(tmp_path, monkeypatch):
    right = kernels.gemm_channels
    monkeypatch.setattr(kernels, "gemm_channels", lambda *a, **k: right(*a, **k) * 1.01)
    done = bench(tmp_path, "--op", "gemm_channels")
    assert done.exit_code == 1
    assert "refused: gemm_channels" in done.output and "rows are not as they must be" in done.output
    assert (tmp_path / "cpu_gemm_channels.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--op", "gemm"], r"op must be one of spmm_24, .* got 'gemm'"),
        (["--dtype", "int8"], r"dtype must be one of fp16, bf16, fp32, got 'int8'"),
        (["--shapes", "huge"], r"shapes must be one of all, .* got 'huge'"),
        (["--compare", "/nowhere"], r"must be or hold one of cpu_"),
    ],
)
def test_bad_input_is_refused(tmp_path, arguments, text):
    done = bench(tmp_path, *arguments)
    assert done.exit_code == 2 and re.search(text, " ".join(done.output.split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_made_is_refused_before_measuring(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    done = bench(tmp_path / place, "--op", "pack_24")
    assert done.exit_code == 2 and "must be a folder" in done.output
    assert (tmp_path / "file").read_text() == "mine"


def test_an_op_named_twice_runs_once(tmp_path):
    done = bench(tmp_path, "--op", "pack_24", "--op", "pack_24")
    assert done.exit_code == 0 and done.output.count("Wrote ") == 1


def test_predictions_are_labelled_and_are_the_floors_of_the_data_sheet(tmp_path):
    done = bench(tmp_path, "--op", "prediction")
    assert done.exit_code == 0 and "nothing in this file was measured" in done.output
    read = records.read(tmp_path / "prediction_h200.csv", bench_paper.Prediction)
    assert read.head["note"] == "prediction from data sheets; nothing in this file was measured"
    rows = {(r.layer, r.m): r for r in read.rows}
    one = rows["llama3-8b.o", 1]
    # 2 bytes a weight at 4.8 TB/s; 1.125 of them packed.
    assert one.dense_us == pytest.approx(2 * 4096**2 / 4.8e6, rel=1e-3)
    assert one.sparse_us == pytest.approx(1.125 * 4096**2 / 4.8e6, rel=1e-3)
    assert one.bound == "bytes" and 1.7 < one.dense_over_sparse < 16 / 9
    many = rows["llama3-8b.o", 16384]
    assert many.bound == "products" and many.dense_over_sparse == pytest.approx(2, rel=1e-3)
    assert many.portable_us == many.dense_us


@pytest.mark.parametrize(
    ("op", "case", "tile"),
    [
        ("spmm_24", "16x64x64 w4 s3", (64, 16)),
        ("spmm_24", "add parts", None),
        ("spmm_24_mma_sp", "m 8", (32, 8)),
        ("spmm_24_mma_sp", "m 64 split", (128, 64)),
        ("spmm_24_wgmma_sp", "m 256 gelu", (128, 256)),
        ("spmm_24_mma_packed", "m 64", (64, 64)),
        ("spmm_24_wgmma_packed", "m 64", (128, 64)),
    ],
)
def test_tiles_of_builds(op, case, tile):
    assert bench_paper.tile_of(op, case) == tile


def test_figures_of_a_build(tmp_path, monkeypatch):
    sound = Report(
        "spmm_24_mma_sp", "_mma_sp_kernel", "m 8", "bf16", "sm_90", 78, 0, 0, 49152,
        {"HMMA.SP.16832.F32.BF16": 16}, {16: 9},
    )  # fmt: skip
    spilt = Report("spmm_24", "_spmm_24_kernel", "16x64x64", "bf16", "sm_90", 255, 99, 3, 1024)
    monkeypatch.setattr(bench_paper, "_reports", lambda s: [sound, spilt])
    done = bench(tmp_path, "--op", "builds")
    assert done.exit_code == 0 and "2 kernels built, 1 not sound" in done.output
    first, second = records.read(tmp_path / "builds_spmm_24.csv", bench_paper.BuildRow).rows
    assert (first.status, first.registers, first.smem_bytes) == ("sound", 78, 49152)
    assert first.tensor_core == "16 x HMMA.SP.16832.F32.BF16"
    # 32 rows x 128 columns at 9 bits a weight; 8 tokens x 128 columns of 2 bytes.
    assert (first.weight_bytes, first.x_bytes) == (32 * 128 * 9 // 8, 8 * 128 * 2)
    assert first.flop_per_byte == pytest.approx(2 * 32 * 8 * 128 / (4608 + 2048), rel=1e-5)
    assert second.status == "not sound" and second.tile_rows is None
    # One value of two bytes and a byte of metadata for eight weights.
    sparser = bench_paper.with_bytes(dataclasses.replace(second, case="16x64x64 w4 s3 1:8"))
    assert sparser.weight_bytes == 64 * 128 // 8 * 3


def test_the_recorded_command_measures_the_same_again(monkeypatch):
    words = ["/usr/bin/slimgemm", "bench", "--out", "/tmp/a b", "--op", "pack_24", "--out=x"]
    assert cli_bench.command_of(words) == "slimgemm bench --op pack_24"
    assert cli_bench.command_of(["slimgemm", "bench", "--op", "a b"]) == "slimgemm bench --op 'a b'"
    other = ["x", "--threads", "1", "--out", "/home/me/cpu_layers.json"]
    assert cli_bench.command_of(other, "python -m part") == "python -m part --threads 1"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli_bench.command_of(words) == "OMP_NUM_THREADS=1 slimgemm bench --op pack_24"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (1234.5, "1,234"), (12.345, "12.3"), (0.123456, "0.123"), (1e-7, "1e-07"),
     (0.0, "0"), (1234567.8, "1,234,568")],
)  # fmt: skip
def test_numbers_in_tables(value, text):
    assert number(value) == text
