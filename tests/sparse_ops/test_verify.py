"""verify: every kind of difference is found, and counted; equal models pass."""

import copy

import pytest
import torch
from helpers import randn, random_24
from torch import nn

from slimgemm.kernels.formats import PATTERNS
from slimgemm.sparse_ops import compress, verify
from slimgemm.sparse_ops.verify import VerifyReport, tensors_in

X = randn(4, 20, seed=1)


def pair(pattern=(2, 4), dtype=torch.float32):
    """(packed model, its pruned dense reference)"""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6), nn.Linear(6, 3)
    ).to(dtype)
    for seed, layer in enumerate((dense[0], dense[3])):
        layer.weight.data = random_24(*layer.weight.shape, dtype, *pattern, seed=seed)
    model = copy.deepcopy(dense)
    packed = compress(model, X.to(dtype), keep=pattern[0], group=pattern[1]).packed
    assert [layer.name for layer in packed] == ["0", "3"]
    return model, dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
def test_equal_models_pass_and_every_group_is_counted(pattern, dtype):
    model, dense = pair(pattern, dtype)
    report = verify(model, dense, X.to(dtype))
    assert report.ok and bool(report) and not report.violations
    groups = {c.name: c.groups for c in report.checks if c.what.startswith("weight")}
    group = pattern[1]
    assert groups == {"0": 16 * 24 // group, "1": 0, "3": 6 * 16 // group, "4": 0}
    assert [c.what for c in report.checks if c.name == ""] == ["output 0 [4, 3]"]
    assert "WRONG" not in str(report) and "equal, " in str(report)


def changed(kind, model, dense):
    with torch.no_grad():
        if kind == "value":
            model[3].values[2, 1] += 2.0**-10
        elif kind == "dense_weight":
            model[4].weight[0, 0] += 2.0**-10
        elif kind == "bias":
            model[0].bias[3] += 2.0**-10
        elif kind == "buffer":
            model[1].running_mean[3] += 2.0**-10
        elif kind == "nan":
            model[3].values[2, 1] = float("nan")
        elif kind == "moved":
            # One kept position moved: 0b01_00 -> 0b10_00 and so on, still a valid byte.
            byte = int(model[3].meta[0, 0])
            model[3].meta[0, 0] = (byte & 0xF0) | (0b1001 if byte & 15 != 0b1001 else 0b1100)
        elif kind == "flipped":
            model[3].meta[0, 0] = 0
        elif kind == "no_bias":
            model[3].bias = None
        elif kind == "no_layer":
            del model[4]
        elif kind == "more_layers":
            model.append(nn.Linear(3, 3))
        elif kind == "shape":
            model[4] = nn.Linear(6, 2)
    return model, dense


CHANGES = {
    "value": ("3", "1 of 96 differ"),
    "dense_weight": ("4", "1 of 18 differ"),
    "bias": ("0", "1 of 16 differ"),
    "buffer": ("1", "1 of 16 differ"),
    "nan": ("3", "1 of 96 differ"),
    "moved": ("3", "of 96 differ"),
    "flipped": ("3", "meta is not valid in 1 bytes: row 0, byte 0"),
    "no_bias": ("3", "the model has no bias"),
    "no_layer": ("4", "the model has no layer of this name"),
    "more_layers": ("5", "the reference has no layer of this name"),
    "shape": ("4", "the reference has [3, 6]"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_difference_is_found_without_inputs(kind):
    model, dense = changed(kind, *pair())
    report = verify(model, dense)
    name, detail = CHANGES[kind]
    assert not report.ok and not report
    found = [c for c in report.violations if c.name == name and detail in c.detail]
    assert len(found) == 1, report.violations
    assert {c.name for c in report.violations} == {name}
    assert "WRONG" in str(report)


@pytest.mark.parametrize("wrong", ["nan", "far", "shape", "count", "none"])
def test_wrong_outputs_are_found(wrong):
    class Spoiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            y = self.model(x)
            if wrong == "nan":
                y = torch.where(y == y.max(), float("nan"), y)
            elif wrong == "far":
                y = y * (1 + 1e-4)
            elif wrong == "shape":
                y = y[:, :2]
            return {"count": (y, y), "none": y.argmax(-1)}.get(wrong, y)

    class Plain(Spoiled):
        def forward(self, x):
            return self.model(x)

    model, dense = pair()
    report = verify(Spoiled(model), Plain(dense), X)
    text = {
        "nan": "error nan, allowed",
        "far": "error 1",
        "shape": "the reference gives [4, 3]",
        "count": "2 tensors, the reference gives 1",
        "none": "0 tensors, the reference gives 1",
    }[wrong]
    assert [c.name for c in report.violations] == [""]
    assert text in report.violations[0].detail


def test_the_models_are_left_as_they_are():
    model, dense = pair()
    model.train()
    dense[0].train()
    dense[1].eval()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, dense)]
    assert verify(model, dense, X)
    assert model.training and dense[0].training and not dense[1].training
    for m, state in zip((model, dense), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())


def test_nothing_compared_is_not_a_pass():
    assert not VerifyReport() and not verify(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU()))


def test_a_module_under_two_names_is_not_missing():
    model, dense = pair()
    for m in (model, dense):
        m.add_module("again", m[0])
    assert verify(model, dense)


def test_tensors_of_nested_outputs_are_all_compared():
    a, b = torch.ones(2), torch.ones(3)
    found = tensors_in({"y": a, "rest": [(b, 3), None, torch.arange(2)]})
    assert len(found) == 2 and any(t is a for t in found) and any(t is b for t in found)


def test_a_reference_that_cannot_run_in_float64_is_said():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x.softmax(-1, dtype=torch.float32))

    model = Casts()
    report = verify(model, copy.deepcopy(model), torch.zeros(2, 8))
    assert not report.ok
    (bad,) = report.violations
    assert bad.what == "outputs" and "does not run in float64" in bad.detail
