"""Recorded files: what is written is what is read, and slower rows are found in them."""

import dataclasses
import subprocess

import pytest
import torch

from slimgemm.benchmarks import machine, records
from slimgemm.benchmarks.records import Record, Recorder
from slimgemm.benchmarks.rows import Row

CPU = torch.device("cpu")
HEAD = {"device": "AMD EPYC", "command": "slimgemm bench --op spmm_24"}


def row(us=10.0, layer="a", **changes):
    made = Row(
        "spmm_24", layer, "m 1, n 2, k 4", "fp32", "slimgemm spmm_24", "timed", "", 1e-7, 2e-7, 2,
        us * 0.98, us, us * 1.02, rate_from="eager", moved_bytes=100, tb_per_s=1e-5,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_a_file_reads_as_it_was_written():
    rows = [row(), row(layer="b", status="missing", reason='no "GPU", here')]
    read = records.from_csv(records.as_csv(HEAD, rows))
    assert read == Record(HEAD, rows)


def test_numbers_keep_six_digits():
    text = records.as_csv(HEAD, [row(us=1234.56789)])
    assert "1234.57" in text and "1234.56789" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("op,layer\n", "must begin with"),
        ("", "must begin with"),
        ("# slimgemm bench\nop,layer\n", "must have the columns op, layer, shape"),
        ("# slimgemm bench\n", "got nothing"),
    ],
)
def test_other_files_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        records.from_csv(text)


def test_a_cell_that_is_no_number_is_named():
    text = records.as_csv(HEAD, [row()]).replace("1e-05", "fast")
    with pytest.raises(ValueError, match="column tb_per_s holds 'fast'"):
        records.from_csv(text)


def test_a_recorder_has_written_everything_after_each_case(tmp_path):
    recorder = Recorder(tmp_path / "new", "spmm_24", CPU, HEAD)
    assert recorder.path.name == "cpu_spmm_24.csv"
    recorder.add([row()])
    assert records.read(recorder.path).rows == [row()]
    recorder.add([row(layer="b")])
    read = records.read(recorder.path)
    assert [r.layer for r in read.rows] == ["a", "b"]
    assert read.head["clock_sm_mhz_after"] == "missing: no GPU"
    assert not list(tmp_path.glob("**/*.part"))


class Properties:
    uuid = "abc"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(machine, "keep_busy", lambda device: BUSY.append(str(device)))
    BUSY.clear()
    return torch.device("cuda")


BUSY = []  # devices that were given work


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100_sxm4_80gb"),
        ("NVIDIA GeForce RTX 4090", "geforce_rtx_4090"),
        ("AMD Instinct MI300X", "amd_instinct_mi300x"),
    ],
)
def test_files_are_named_after_the_gpu(monkeypatch, gpu, name, slug):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert machine.slug(gpu) == slug


def test_the_head_holds_what_nvidia_smi_says(gpu):
    asked = []

    def run(command):
        asked.append((command, len(BUSY)))
        if command[0] == "git":
            return "abc123" if "rev-parse" in command else ""
        return ", ".join(str(n) for n, _ in enumerate(command[2].split(",")))

    head = machine.head(gpu, "slimgemm bench", run)
    assert head["driver"] == "0" and head["power_limit_w"] == "1"
    assert head["clock_sm_mhz_before"] == "0" and head["power_w_before"] == "2"
    assert head["compute_capability"] == "9.0" and head["commit"] == "abc123"
    assert head["torch"] == torch.__version__
    smi = [(command, busy) for command, busy in asked if command[0] == "nvidia-smi"]
    assert all(command[1] == "--id=GPU-abc" for command, _ in smi)
    # Clocks are read of a GPU that has work to do.
    clocks = [busy for command, busy in smi if "clocks.sm" in command[2]]
    assert clocks == [1] and BUSY == ["cuda"]


def test_the_work_of_a_gpu_whose_clocks_are_read_is_products(monkeypatch):
    monkeypatch.setattr(machine, "BUSY_SIDE", 4)
    made = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: made.append(a.shape))
    machine.keep_busy(CPU)
    assert made == [torch.Size([4, 4])] * machine.BUSY_CALLS


def test_what_cannot_be_read_is_said(gpu, monkeypatch):
    def absent(command):
        raise FileNotFoundError(f"{command[0]} is not there")

    monkeypatch.delenv("SLIMGEMM_COMMIT", raising=False)
    head = machine.head(gpu, "x", absent)
    assert head["driver"] == "missing: nvidia-smi is not there"
    assert head["power_w_before"] == "missing: nvidia-smi is not there"
    assert head["commit"] == "missing: git is not there"
    short = machine.nvidia_smi(gpu, machine.STATE, lambda command: "1, 2")
    assert set(short.values()) == {"missing: nvidia-smi said '1, 2'"}
    assert machine.version("no-such-package") == "missing: not installed"


def test_a_changed_tree_is_dirty_and_a_given_commit_is_taken(monkeypatch):
    monkeypatch.delenv("SLIMGEMM_COMMIT", raising=False)
    say = lambda command: "abc" if "rev-parse" in command else " M a.py"  # noqa: E731
    assert machine.commit(say) == "abc-dirty"
    monkeypatch.setenv("SLIMGEMM_COMMIT", "given")
    assert machine.commit(say) == "given"


def test_limits_are_measured():
    limits = machine.measure_limits(CPU, torch.float32, copy_bytes=1 << 20, side=64)
    assert 0 < limits.tb_per_s < 10 and 0 < limits.tflops < 1000


def test_joules_without_a_gpu_are_missing_and_the_work_is_done():
    done = []
    assert machine.joules_of(lambda: done.append(1), CPU) == (None, "missing: no GPU")
    assert done == [1]


def test_joules_are_the_difference_of_the_counter(gpu, monkeypatch):
    counter = iter([5000, 12500])
    monkeypatch.setattr(machine, "_nvml_millijoules", lambda device: next(counter))
    assert machine.joules_of(lambda: None, gpu) == (7.5, "nvml")


def test_joules_from_sampled_power(gpu, monkeypatch):
    class Sampler:
        def terminate(self):
            pass

        def communicate(self):
            return "100.0\n[N/A]\n300.0\n", None

    def absent(device):
        raise ImportError

    monkeypatch.setattr(machine, "_nvml_millijoules", absent)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: Sampler())
    ticks = iter([1.0, 3.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    assert machine.joules_of(lambda: None, gpu) == (400.0, "nvidia-smi")
    with pytest.raises(ValueError, match="no power readings"):
        machine.mean_watts("[N/A]")
