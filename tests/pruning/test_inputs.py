import pytest
import torch
from torch import nn

from slimgemm.pruning.inputs import arguments, evaluating, run, tensors_of


class Two(nn.Module):
    def forward(self, a, b=2):
        return {"sum": a + b, "parts": [a, (b,)]}


def test_arguments_of_each_form():
    x = torch.ones(1)
    assert arguments(x) == ((x,), {})
    assert arguments((x, 3)) == ((x, 3), {})
    assert arguments({"a": x}) == ((), {"a": x})
    with pytest.raises(ValueError, match="got str"):
        arguments("x")


def test_run_and_nested_tensors():
    x = torch.ones(1)
    found = tensors_of(run(Two(), {"a": x, "b": x}))
    assert len(found) == 3 and found[0].item() == 2
    assert tensors_of(run(Two(), (x, 5)))[0].item() == 6


def test_evaluating_restores_flags_and_random_state():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model[0].training
        torch.rand(1)
        raise RuntimeError
    assert model[0].training and not model[1].training and model.training
    assert torch.equal(torch.get_rng_state(), before)
