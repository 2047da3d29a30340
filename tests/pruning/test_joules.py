import pytest

from slimgemm.pruning.joules import measure_joules, nvml_counter


class Board:
    """A GPU that draws 50 W when idle and 3 J more for each call, which takes 0.1 s."""

    def __init__(self, jitter=0.0):
        self.time, self.calls, self.jitter = 0.0, 0, jitter

    def call(self):
        self.time += 0.1
        self.calls += 1

    def sleep(self, seconds):
        self.time += seconds

    def counter(self):
        return 50 * self.time + 3 * self.calls + self.jitter * (self.calls // 20)

    def measure(self, **options):
        return measure_joules(
            self.call, counter=self.counter, clock=lambda: self.time, sleep=self.sleep, **options
        )


def test_idle_draw_is_taken_off():
    found = Board().measure(windows=3, window_s=2.0)
    assert found.idle_watts == pytest.approx(50)
    assert found.per_call.p50 == pytest.approx(3)
    assert 60 <= found.calls <= 63
    assert "3000 mJ per forward" in str(found) and "50.0 W" in str(found)


def test_spread_over_windows_is_kept():
    found = Board(jitter=4.0).measure(windows=5, window_s=1.5)
    assert found.per_call.p20 < found.per_call.p80
    assert found.per_call.p20 >= 3


def test_refusals_name_the_cure(monkeypatch):
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, got cpu"):
        nvml_counter("cpu")
    with pytest.raises(ValueError, match="needs a window"):
        Board().measure(windows=0)
    import sys

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ValueError, match="needs nvidia-ml-py"):
        nvml_counter("cuda")


class NvmlError(Exception):
    pass


class Nvml:
    """pynvml for a GPU that has no energy counter."""

    NVMLError = NvmlError

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-12ab"
        return 7

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        raise NvmlError("Not Supported")


def test_a_gpu_without_a_counter_is_refused(monkeypatch):
    import sys
    import types

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    properties = types.SimpleNamespace(uuid="12ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    text = "cuda:1 has no readable energy counter: Not Supported; the predicted energy of"
    with pytest.raises(ValueError, match=text):
        nvml_counter("cuda:1")
