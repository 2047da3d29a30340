"""Which function runs an op."""

import inspect

import pytest
import torch

from slimgemm.kernels import dispatch


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_has_a_launcher_and_a_twin_with_its_arguments_first(op):
    launcher, twin = dispatch.launcher(op), dispatch.twin(op)
    assert launcher.__name__ == op and twin.__name__ == f"{op}_ref"
    assert launcher.__module__ == f"slimgemm.kernels.{dispatch.OPS[op][0]}"
    names = inspect.signature
    theirs = list(names(twin).parameters)
    assert list(names(launcher).parameters)[: len(theirs)] == theirs


def test_a_cpu_gets_the_twin_and_a_gpu_the_launcher(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert dispatch.implementation("spmm_24", torch.device("cpu")) is dispatch.twin("spmm_24")
    for name in ("cuda", "cuda:0"):
        run = dispatch.implementation("spmm_24", torch.device(name))
        assert run is dispatch.launcher("spmm_24")


def test_another_gpu_is_made_current_for_the_launch(monkeypatch):
    entered = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(dispatch, "launcher", lambda op: lambda *args: (op, list(entered), args))
    run = dispatch.implementation("spmm_24", torch.device("cuda:1"))
    assert run(1, 2) == ("spmm_24", [torch.device("cuda:1")], (1, 2))
    assert entered[-1] == "left"
